"""ResNet-18 recipe (B = 2), 224 px, batch 1, CPU: the explanation in onnxruntime, by our graph, and by autograd.

    python bench/onnx_vs_autograd.py [--threads 2] [--runs 15] [--output bench/results/onnx_vs_autograd.json]

Every contender computes logits, W [1, 6, 224, 224] and the contribution map of the top class from the same weights. The
contenders run in turn, round after round, and medians are reported, so that a drift of the machine's speed meets all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from bcos_rt import BcosNetwork, Recipe, bcosify, explain, recalibrate
from bcos_rt.export import to_onnx
from bcos_rt.kernels import ops, reference


def detached_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
    b: float = 2.0,
    eps: float = reference.CONV_EPS,
) -> Tensor:
    """The B-cos convolution with its multiplier detached: what the published explanation mode does."""
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    with torch.no_grad():
        m = reference.dynamic_scale(z, reference.patch_norm(x, weight.shape[2:], stride, padding, dilation, groups), b)
    return z * m


def by_autograd(net: BcosNetwork, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, W and contributions through autograd."""
    plain, ops.conv2d = ops.conv2d, detached_conv2d
    try:
        encoded = net.encode(images).detach().requires_grad_()
        logits = net.forward_encoded(encoded)
        (weights,) = torch.autograd.grad(logits.amax(1).sum(), encoded)
    finally:
        ops.conv2d = plain
    return logits.detach(), weights, (weights * encoded.detach()).sum(1)


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure(threads: int, runs: int) -> dict[str, Any]:
    """Medians of all contenders, in milliseconds, with what they depend on."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net, _ = bcosify(torchvision.models.resnet18(), Recipe())
    recalibrate(net, [torch.rand(4, 3, 224, 224)])
    net.eval()
    for parameter in net.parameters():  # an explanation needs no weight gradients: autograd must not pay for them
        parameter.requires_grad_(False)
    images = torch.rand(1, 3, 224, 224)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, settings in (
            ("explanation", {"outputs": ["logits", "weights", "contributions"]}),
            ("forward", {"forward_only": True}),
        ):
            to_onnx(net, Path(folder) / f"{name}.onnx", image_size=224, **settings)
            files[name] = onnxruntime.InferenceSession(
                str(Path(folder) / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
            )
    ids = np.array([-1])
    contenders: dict[str, Callable[[], Any]] = {
        "onnxruntime, explanation": lambda: files["explanation"].run(None, {"image": images.numpy(), "class_ids": ids}),
        "PyTorch autograd, explanation": lambda: by_autograd(net, images),
        "PyTorch explanation graph (unfused), explanation": lambda: explain(net, images),
        "onnxruntime, forward only": lambda: files["forward"].run(None, {"image": images.numpy()}),
        "PyTorch, forward only": lambda: forward(net, images),
    }
    weights = by_autograd(net, images)[1].numpy()
    names = [o.name for o in files["explanation"].get_outputs()]
    ours = contenders["onnxruntime, explanation"]()[names.index("weights")]
    difference = float(np.abs(ours - weights).max() / np.abs(weights).max())

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 2):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            if run >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "runs": runs,
        "largest difference of W, relative": difference,
        "median ms": {name: round(statistics.median(v), 2) for name, v in times.items()},
        "all ms": {name: [round(t, 2) for t in v] for name, v in times.items()},
    }


def forward(net: BcosNetwork, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = net(images)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.threads, arguments.runs)
    for name, value in result["median ms"].items():
        print(f"{value:8.1f} ms  {name}")
    difference = result["largest difference of W, relative"]
    print(f"largest difference of W between onnxruntime and autograd: {difference:.1e} of the largest |W|")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, arguments.output)


if __name__ == "__main__":
    main()

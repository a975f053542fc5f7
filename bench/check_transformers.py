"""Transformers at full size, seeded: what tests/test_transformers.py checks on small ones.

    python bench/check_transformers.py                     every model, into bench/results/transformers/models.json
    python bench/check_transformers.py --name "timm deit"    only this one; repeatable

For each: the B = 1 conversion's logits against the source's; by the default recipe the completeness error
and W against autograd with detached factors, both in float64; the engine in float32 against W in float64; the ONNX file
against PyTorch, with a batch of mixed targets. Of CLIP's image towers, by their recipe, embeddings instead of
logits, and the scores of three texts are explained. A killed run goes on with the models that are missing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bcos_rt import Engine, Recipe, bcosify, explain, explain_text, recalibrate  # noqa: E402
from bcos_rt.benchmark import machine  # noqa: E402
from bcos_rt.benchmark.subject import made_up_images  # noqa: E402
from bcos_rt.export import to_onnx  # noqa: E402
from bcos_rt.files import write_json  # noqa: E402
from bcos_rt.models import load_model  # noqa: E402
from tests.explanation.test_text import text_oracle  # noqa: E402
from tests.oracle import oracle  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "transformers" / "models.json"
console = Console(stderr=True)


def _named(name: str) -> Callable[[], nn.Module]:
    return lambda: load_model(name, weights="random").module


def _hugging_face(architecture: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(num_labels=1000)
    model: nn.Module = getattr(transformers, f"{architecture}ForImageClassification")(config)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"simple_vit {n}": _named(f"simple_vit:{n}") for n in ("simple_vit_ti_patch16_224", "vitc_ti_patch1_14")},
    **{f"timm {n}": _named(f"timm:{n}") for n in (
        "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny",
    )},
    **{f"torchvision {n}": _named(f"torchvision:{n}") for n in ("vit_b_16", "swin_t")},
    "hugging face ViTForImageClassification": lambda: _hugging_face("ViT"),
    "hugging face Dinov2ForImageClassification": lambda: _hugging_face("Dinov2"),
    **{f"open_clip {n}": _named(f"open_clip:{n}") for n in ("RN50", "ViT-B-32")},
}  # fmt: skip


def check(build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Everything about one model; differences are relative to the largest value, but for the completeness error."""
    torch.manual_seed(0)
    source = build().eval()
    for name, parameter in source.named_parameters():
        # What is initialised to 0 or 1 would hide a mistake.
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.copy_(0.5 + torch.rand_like(parameter) if "weight" in name or "gamma" in name
                                else 0.1 * torch.randn_like(parameter))  # fmt: skip
        elif not parameter.any():  # torchvision's heads
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    images = made_up_images(2, 224)
    start = time.perf_counter()
    _, report = bcosify(source, Recipe.equivalent(), verify_images=images)
    tower = type(source).__module__.startswith("open_clip.")
    net, converted = bcosify(source, Recipe.clip() if tower else None)
    if tower:
        # With the norms' initial statistics RN50's float32 embedding is below what its norm's eps leaves of it.
        recalibrate(net, [images])
    net.eval()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in source.parameters()),
        "weights_complete": converted.weights_copied.complete,
        "equivalence": report.equivalence.max_relative_error if report.equivalence is not None else None,
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = ["logits", *([] if tower else ["class_used"]), "weights"]  # of a tower: the texts' scores
        exported = to_onnx(net, Path(folder) / "net.onnx", 224, outputs=outputs)
    if exported.parity is not None:
        found["onnx_logits"] = exported.parity.differences["logits"].max_relative
        found["onnx_weights"] = exported.parity.differences["weights"].max_relative
    engine = Engine(net, (224, 224))
    if tower:
        texts = torch.randn(3, net(images).shape[1])
        given = engine.explain_text(images, texts)
        # RN50's 16 blocks of B = 2 are ill-conditioned: what float32 costs the un-fused graph is the measure.
        single = explain_text(net, images, texts).weights.double()
        net = net.double()
        exact = explain_text(net, images.double(), texts)
        logits, weights = text_oracle(net, images.double(), texts.double(), "mean")
    else:
        given = engine.explain(images)
        net = net.double()
        exact = explain(net, images.double(), given.target)
        logits, weights = oracle(net, net.encode(images.double()), exact.target)
    found["completeness_float64"] = float(exact.completeness_error().max())
    found["logits_float64"] = _relative(exact.logits, logits)
    found["weights_float64"] = _relative(exact.weights, weights)
    if tower:
        found["float32_weights"] = _relative(single, weights)
    found["engine_weights"] = _relative(given.weights.double(), weights)
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).abs().max() / expected.abs().max())


def main(
    name: Annotated[list[str] | None, typer.Option(help="Part of a model's name; repeatable.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o")] = RESULTS,
) -> None:
    """Check the models that the table does not have yet, or those that are named."""
    rows: dict[str, Any] = json.loads(output.read_text())["models"] if output.exists() else {}
    for model, build in MODELS.items():
        if not any(part in model for part in name) if name else model in rows:
            continue
        rows[model] = check(build)
        console.print(model, rows[model])
        ordered = {m: rows[m] for m in MODELS if m in rows}
        write_json(output, {"models": ordered, "threads": torch.get_num_threads(), "machine": machine.describe()})


if __name__ == "__main__":
    typer.run(main)

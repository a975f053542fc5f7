"""How near bf16 contribution maps are to fp32 ones on photographs."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from bcos_rt import Engine
from bcos_rt.images import load_image
from bench.explain_bench.networks import subject

__all__ = ["COLUMNS", "compare_dtypes"]

COLUMNS = ("network", "photographs", "cosine_min", "cosine_median", "backend")


def compare_dtypes(network: str, tar: Path, count: int, backend: str = "auto", size: int = 224) -> dict[str, Any]:
    """Cosines of both engines' maps of a photograph's fp32 top class, over evenly spaced photographs of a tar file."""
    net = subject(network).net
    engines = [Engine(net, (size, size), dtype=d, backend=backend) for d in (torch.float32, torch.bfloat16)]  # type: ignore[arg-type]
    cosines = []
    with tempfile.TemporaryDirectory() as folder, tarfile.open(tar) as archive:
        archive.extractall(folder, filter="data")
        files = sorted(Path(folder).rglob("*.jpg"))
        for path in files[:: max(1, len(files) // count)][:count]:
            image = load_image(path, size=size)[None]
            full = engines[0].explain(image)
            half = engines[1].explain(image, full.target)
            a, b = (e.contributions.double().flatten() for e in (full, half))
            cosines.append(float(torch.nn.functional.cosine_similarity(a, b, 0)))
    middle = sorted(cosines)[len(cosines) // 2]
    values = (network, len(cosines), min(cosines), middle, engines[0].backend)
    return dict(zip(COLUMNS, values, strict=True))

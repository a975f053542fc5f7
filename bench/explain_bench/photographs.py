"""How near bf16 contribution maps are to fp32 ones on photographs, with all of an engine in bf16 or its adjoint."""

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

COLUMNS = ("network", "forward", "photographs", "cosine_min", "cosine_median", "backend")


def compare_dtypes(
    network: str, tar: Path, count: int, backend: Any = "auto", size: int = 224, forward: str = "bfloat16"
) -> dict[str, Any]:
    """Cosines of both engines' maps of a photograph's fp32 top class, over evenly spaced photographs of a tar file.

    Args:
        forward: dtype of the bf16 engine's forward pass.
    """
    net = subject(network).net
    full_engine = Engine(net, (size, size), backend=backend)
    half_engine = Engine(
        net, (size, size), dtype=torch.bfloat16, forward_dtype=getattr(torch, forward), backend=backend
    )
    cosines = []
    with tempfile.TemporaryDirectory() as folder, tarfile.open(tar) as archive:
        archive.extractall(folder, filter="data")
        files = sorted(Path(folder).rglob("*.jpg"))
        for path in files[:: max(1, len(files) // count)][:count]:
            image = load_image(path, size=size)[None]
            full = full_engine.explain(image)
            half = half_engine.explain(image, full.target)
            a, b = (e.contributions.double().flatten() for e in (full, half))
            cosines.append(float(torch.nn.functional.cosine_similarity(a, b, 0)))
    middle = sorted(cosines)[len(cosines) // 2]
    values = (network, forward, len(cosines), min(cosines), middle, full_engine.backend)
    return dict(zip(COLUMNS, values, strict=True))

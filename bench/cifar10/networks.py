"""The networks of the runs: built, converted, filled with the weights they begin with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bcos_rt import bcosify, load
from bcos_rt.models import load_model
from bench.cifar10.images import CLASSES
from bench.cifar10.plan import Run

__all__ = ["build", "trained"]


def build(run: Run, work: Path) -> nn.Module:
    """The network a run begins with."""
    torch.manual_seed(run.seed)
    weights = "random" if run.source is None else str(work / run.source / "last.safetensors")
    source = load_model(f"small:{run.network}", weights=weights, num_classes=len(CLASSES))
    if run.kind == "standard":
        return source.conventional(CLASSES)
    net, _ = bcosify(source, run.conversion, class_names=CLASSES)
    return net


def trained(run: Run, work: Path) -> nn.Module:
    """The network a run ended with, in evaluation mode."""
    path = work / run.name / "last.safetensors"
    if run.kind != "standard":
        return load(path)
    source = load_model(f"small:{run.network}", weights=str(path), num_classes=len(CLASSES))
    return source.conventional(CLASSES).eval()

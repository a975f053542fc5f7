"""The networks of the runs: built, converted, filled with the weights they begin with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bcos_rt import bcosify, load
from bcos_rt.models import load_model
from bench.cifar10.images import CLASSES
from bench.cifar10.plan import Run, runs
from bench.logs import all_epochs

__all__ = ["COMMITTED_WEIGHTS", "build", "trained", "weights_of"]

# A finished run's last.safetensors, in the folder of its logs.
COMMITTED_WEIGHTS = "weights.safetensors"


def weights_of(name: str, work: Path, results: Path) -> Path | None:
    """The network a run ended with: of this machine, or else the committed one; None without either."""
    (epochs,) = {run.recipe.epochs for run in runs() if run.name == name}
    mine = work / name / "last.safetensors"
    if mine.exists() and all_epochs(mine.parent, epochs):
        return mine
    committed = results / name / COMMITTED_WEIGHTS
    return committed if committed.exists() else None


def _weights_of(name: str, work: Path, results: Path) -> Path:
    path = weights_of(name, work, results)
    if path is None:
        raise SystemExit(f"{name} is to be trained first: no weights in {work} or {results}")
    return path


def build(run: Run, work: Path, results: Path) -> nn.Module:
    """The network a run begins with."""
    torch.manual_seed(run.seed)
    weights = "random" if run.source is None else str(_weights_of(run.source, work, results))
    source = load_model(f"small:{run.network}", weights=weights, num_classes=len(CLASSES))
    if run.kind == "standard":
        return source.conventional(CLASSES)
    net, _ = bcosify(source, run.conversion, class_names=CLASSES)
    return net


def trained(run: Run, work: Path, results: Path) -> nn.Module:
    """The network a run ended with, in evaluation mode."""
    path = _weights_of(run.name, work, results)
    if run.kind != "standard":
        return load(path)
    source = load_model(f"small:{run.network}", weights=str(path), num_classes=len(CLASSES))
    return source.conventional(CLASSES).eval()

"""The network that comes with the package: the best fine-tuned one of a family, and what is known of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bcos_rt.files import read_rows, replacing, write_json
from bcos_rt.packaged import FOLDER
from bench.cifar10.networks import COMMITTED_WEIGHTS
from bench.cifar10.plan import Run, runs
from bench.cifar10.table import last_epoch, localisation

__all__ = ["LARGEST", "ship_best"]

# Bytes; every installation carries it.
LARGEST = 2_000_000


def ship_best(network: str, logs: Path, folder: Path = FOLDER) -> Path:
    """Copy the B-cosified network with the highest test accuracy of all seeds, and describe it in a JSON beside it."""
    found: list[tuple[float, Run]] = []
    for run in runs():
        row = last_epoch(logs, run) if run.network == network and run.kind == "bcosified" and not run.variant else None
        if row is not None and localisation(logs, run):
            found.append((float(row["val_top1"]), run))
    if not found:
        raise SystemExit(f"{network}: no B-cosified run is finished and localised in {logs}")
    top1, run = max(found, key=lambda entry: entry[0])
    weights = logs / run.name / COMMITTED_WEIGHTS
    if weights.stat().st_size > LARGEST:
        raise SystemExit(
            f"{weights.name} of {run.name} has {weights.stat().st_size} bytes, at most {LARGEST} are shipped"
        )
    target = folder / f"cifar10-{network}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copy(weights, temporary)
    write_json(target.with_suffix(".json"), _about(run, top1, len(found), logs))
    return target


def _about(run: Run, top1: float, seeds: int, logs: Path) -> dict[str, Any]:
    source = next(other for other in runs() if other.name == run.source)
    folders = "--data cifar10.tar.gz --work again --results again"
    commands = [f"python -m bench.cifar10 run {one.name} {folders}" for one in (source, run)]
    return {
        "network": f"small:{run.network}, B-cosified and fine-tuned on CIFAR-10's 50,000 training images",
        "chosen": f"by its test accuracy, of {seeds} seed{'s' if seeds > 1 else ''}",
        "seed": run.seed,
        "epochs": {"conventional": source.recipe.epochs, "bcosified": run.recipe.epochs},
        "test_top1": top1,
        "test_top1_conventional": float(read_rows(logs / source.name / "metrics.csv")[-1]["val_top1"]),
        "grid_pointing_3x3": localisation(logs, run)["bcos"],
        "commands": commands,
    }

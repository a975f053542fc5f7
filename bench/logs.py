"""What long training experiments have in common: where their files lie, and which logs are committed."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import torch

from bcos_rt.benchmark import machine
from bcos_rt.files import read_rows, replacing, write_json

__all__ = ["ROOT", "all_epochs", "copy_logs", "copy_whole", "describe_machine"]

ROOT = Path(__file__).resolve().parents[1]


def all_epochs(run: Path, epochs: int) -> bool:
    """Whether a run's folder has a row of each epoch. (Its networks are written after every one.)"""
    return len(read_rows(run / "metrics.csv")) >= epochs


def copy_logs(run: Path, target: Path) -> None:
    """Copy a run's recipe and rows to the folder that is committed, beside the machine they come from."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.csv", "steps.csv", "recipe.json"):
        copy_whole(run / name, target / name)
    describe_machine(target)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file; a kill leaves the whole of the old one or of the new one."""
    with replacing(target) as temporary:
        shutil.copy(source, temporary)


def describe_machine(target: Path) -> None:
    """Write what this machine is to ``target/machine.json``."""
    described = {**machine.describe(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    write_json(target / "machine.json", described)

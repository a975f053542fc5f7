"""The paper's table and the study's, from the raw logs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bcos_rt.files import read_rows, write_csv
from bench.cifar10.plan import Run, runs

__all__ = ["last_epoch", "localisation", "study_rows", "table_rows", "write_tables"]

COLUMNS = (
    "model", "seed", "pretrained_top1", "bcos_top1", "bcosified_top1", "delta", "scratch_epochs", "t", "speedup",
    "loc_bcos", "loc_bcosified", "loc_best_posthoc", "best_posthoc", "loc_grids", "best_posthoc_grids",
)  # fmt: skip
STUDY_COLUMNS = ("model", "variant", "epochs", "top1", "localisation", "grids", "images_per_s")


def last_epoch(logs: Path, run: Run) -> dict[str, str] | None:
    """The last epoch of a finished run."""
    rows = read_rows(logs / run.name / "metrics.csv")
    return rows[-1] if len(rows) >= run.recipe.epochs else None


def localisation(logs: Path, run: Run) -> dict[str, float]:
    """Mean share inside the right cell by method."""
    return {method: float(row["mean"]) for method, row in _localised(logs, run).items()}


def _localised(logs: Path, run: Run) -> dict[str, dict[str, str]]:
    """By method, its row of numbers."""
    files = ("localisation.csv", "localisation_costly.csv")
    return {row["method"]: row for name in files for row in read_rows(logs / run.name / name)}


def table_rows(logs: Path) -> list[dict[str, Any]]:
    """One row a network and seed whose three runs are finished; what is not known stays blank."""
    by_name = {run.name: run for run in runs() if not run.variant}
    rows = []
    for run in by_name.values():
        names = {kind: run.name.replace("-standard-", f"-{kind}-") for kind in ("standard", "bcos", "bcosified")}
        # A network of the study alone has no run from scratch.
        if run.kind != "standard" or not all(name in by_name for name in names.values()):
            continue
        group = {kind: by_name[name] for kind, name in names.items()}
        last = {kind: last_epoch(logs, member) for kind, member in group.items()}
        if any(row is None for row in last.values()):
            continue
        top1 = {kind: float(row["val_top1"]) for kind, row in last.items() if row is not None}
        found = {kind: localisation(logs, member) for kind, member in group.items()}
        others = {method: mean for method, mean in found["standard"].items() if method != "random"}
        best = max(others, key=lambda m: others[m]) if others else None
        passed = epoch_of_passing(read_rows(logs / group["bcosified"].name / "metrics.csv"), top1["bcos"])
        scratch = group["bcos"].recipe.epochs
        rows.append({
            "model": run.network,
            "seed": run.seed,
            "pretrained_top1": _percent(top1["standard"]),
            "bcos_top1": _percent(top1["bcos"]),
            "bcosified_top1": _percent(top1["bcosified"]),
            "delta": f"{100 * (top1['bcosified'] - top1['bcos']):+.2f}",
            "scratch_epochs": scratch,
            "t": passed,
            "speedup": None if passed is None else f"{scratch / passed:.1f}",
            "loc_bcos": _percent(found["bcos"].get("bcos")),
            "loc_bcosified": _percent(found["bcosified"].get("bcos")),
            "loc_best_posthoc": None if best is None else _percent(others[best]),
            "best_posthoc": best,
            "loc_grids": _grids(logs, group["bcosified"], "bcos"),
            "best_posthoc_grids": _grids(logs, group["standard"], best),
        })  # fmt: skip
    return rows


def epoch_of_passing(rows: list[dict[str, str]], accuracy: float) -> int | None:
    """The first epoch after which the accuracy is at or above another's; None if never."""
    return next((int(row["epoch"]) for row in rows if float(row["val_top1"]) >= accuracy), None)


def study_rows(logs: Path) -> list[dict[str, Any]]:
    """One row a finished variant."""
    rows = []
    for run in runs():
        last = last_epoch(logs, run) if run.variant else None
        if last is not None:
            rows.append({
                "model": run.network,
                "variant": run.variant,
                "epochs": run.recipe.epochs,
                "top1": _percent(float(last["val_top1"])),
                "localisation": _percent(localisation(logs, run).get("bcos")),
                "grids": _grids(logs, run, "bcos"),
                "images_per_s": f"{float(last['images_per_s'] or 0):.0f}",
            })  # fmt: skip
    return rows


def _grids(logs: Path, run: Run, method: str | None) -> str | None:
    """How many a method played."""
    row = _localised(logs, run).get(method) if method is not None else None
    return None if row is None else row["grids"]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f}"


def write_tables(logs: Path, target: Path) -> None:
    """Write ``cifar10.csv`` and ``cifar10_study.csv`` into ``target``."""
    write_csv(target / "cifar10.csv", table_rows(logs), COLUMNS)
    write_csv(target / "cifar10_study.csv", study_rows(logs), STUDY_COLUMNS)

"""A table of kernels against an earlier one."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bcos_rt.errors import InvalidArgumentError

__all__ = ["Change", "Comparison", "compare", "key_of", "read"]

OPTION = "--compare"
_KEY = ("op", "variant", "shape", "batch", "dtype", "device")
# Where these differ, so do the times, whatever the kernels.
_CONDITIONS = {"machine": "the machine", "isa": "the instruction set", "threads": "threads"}
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One row in both tables.

    Attributes:
        key: what names the row.
        before_us, now_us: medians, microseconds.
    """

    key: tuple[str, ...]
    before_us: float
    now_us: float

    @property
    def ratio(self) -> float:
        """Above 1 it has become slower."""
        return self.now_us / self.before_us


@dataclass(frozen=True)
class Comparison:
    """What became of the rows.

    Attributes:
        tolerance: a row whose ratio is above it is slower.
        changes: rows in both tables.
        only_here, only_before: rows without a counterpart.
        warnings: what the two tables were not measured alike in.
    """

    tolerance: float
    changes: list[Change]
    only_here: list[tuple[str, ...]]
    only_before: list[tuple[str, ...]]
    warnings: list[str] = field(default_factory=list)

    @property
    def slower(self) -> list[Change]:
        """Rows that exceed the tolerance, the worst first."""
        return sorted((c for c in self.changes if c.ratio > self.tolerance), key=lambda c: -c.ratio)

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""

        def named(key: tuple[str, ...]) -> dict[str, str]:
            return dict(zip(_KEY, key, strict=True))

        return {
            "tolerance": self.tolerance,
            "compared": len(self.changes),
            "slower": [
                {**named(c.key), "before_us": c.before_us, "now_us": c.now_us, "ratio": c.ratio} for c in self.slower
            ],
            "only_here": [named(key) for key in self.only_here],
            "only_before": [named(key) for key in self.only_before],
        }


def read(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier ``--csv``.

    Raises:
        InvalidArgumentError: naming ``--compare``: no such file, no CSV of kernels, or a row without a median.
    """
    wanted = "a CSV file that `bcos-rt bench kernels --csv` wrote"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgumentError(OPTION, f"{str(path)!r} ({reason})", wanted) from error
    missing = [name for name in (*_KEY, *_CONDITIONS, "median_us") if rows and rows[0].get(name) is None]
    if not rows or missing:
        found = f"no column {missing[0]!r}" if missing else "no rows"
        raise InvalidArgumentError(OPTION, f"{str(path)!r} ({found})", wanted)
    for line, row in enumerate(rows, 2):
        try:
            good = math.isfinite(float(row["median_us"])) and float(row["median_us"]) > 0
        except (TypeError, ValueError):
            good = False
        if not good or any(row[name] is None for name in _KEY):
            got = f"{str(path)!r} (line {line}: median_us {row['median_us']!r})"
            raise InvalidArgumentError(OPTION, got, "a positive number of microseconds in every row")
    return rows


def compare(
    rows: Sequence[_Row], before: Sequence[_Row], tolerance: float, asked: Mapping[str, Sequence[Any]]
) -> Comparison:
    """Rows just measured against earlier ones.

    Args:
        asked: column -> the values that this run was asked for: rows of others are not missed.
    """
    wanted = {name: {str(v) for v in values} for name, values in asked.items()}
    ours = {key_of(row): row for row in rows}
    theirs = {key_of(r): r for r in before if all(str(r[name]) in values for name, values in wanted.items())}
    both = [key for key in ours if key in theirs]
    changes = [Change(key, float(theirs[key]["median_us"]), float(ours[key]["median_us"])) for key in both]
    warnings = []
    for name, text in _CONDITIONS.items():
        now = sorted({str(ours[key][name]) for key in both})
        then = sorted({str(theirs[key][name]) for key in both})
        if now != then:
            warnings.append(
                f"{OPTION}: NOT COMPARABLE: {text} of the committed rows: {', '.join(then)}; here: {', '.join(now)}. "
                "The ratios say nothing about the kernels."
            )
    return Comparison(
        tolerance, changes, [k for k in ours if k not in theirs], [k for k in theirs if k not in ours], warnings
    )


def key_of(row: _Row) -> tuple[str, ...]:
    """What names a row: op, variant, shape, batch, dtype, device."""
    return tuple(str(row[name]) for name in _KEY)

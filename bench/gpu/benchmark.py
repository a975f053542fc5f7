"""The benchmark: a list of work, most important first, and a table that is whole after every measurement.

A row is written as "running" before its work starts. If a fault of the GPU ends the process, the next one finds the
row, marks it "crashed" and goes on behind it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import DTYPES, Case, Shape
from bench.gpu.contenders import CONTENDERS, Contender, UnsupportedError
from bench.gpu.files import read_rows, write_rows
from bench.gpu.timing import Timer, sm_clock
from tests.tolerances import kernel_tolerance

__all__ = [
    "COLUMNS",
    "Ceilings",
    "Table",
    "Work",
    "error_of",
    "limit_of",
    "measure",
    "measure_ceilings",
    "totals",
    "work_list",
]

COLUMNS = (
    "model", "layer", "count", "shape", "dtype", "mode", "contender", "status", "ms", "low_ms", "high_ms",
    "launched_ms", "how", "tflops", "gbps", "percent_of_gemm", "percent_of_copy", "percent_of_bound", "error",
    "error_limit", "flops",
    "bytes", "sm_clock_mhz", "dry_run", "note",
)  # fmt: skip

# Everything at its best for the layers that matter most, then breadth, then what is slow to prepare.
FIRST_LAYERS = 4  # of each model

OK, UNSUPPORTED, WRONG, ERROR, RUNNING, CRASHED = "ok", "unsupported", "wrong", "error", "running", "crashed"


@dataclass(frozen=True)
class Work:
    """One measurement."""

    shape: Shape
    dtype: str
    mode: str
    contender: Contender

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies its row."""
        s = self.shape
        return (s.model, s.layer, s.label(), self.dtype, self.mode, self.contender.name)


def work_list(
    shapes: Sequence[Shape], dtypes: Sequence[str], modes: Sequence[str], contenders: Iterable[Contender] = CONTENDERS
) -> list[Work]:
    """All measurements, most important first; ``shapes`` as :func:`bench.gpu.cases.ordered` returns them.

    The first layers of each model with every contender, mode after mode; then the others without what is slow to
    prepare; then that. All contenders of one layer follow each other, so that they meet the same clocks.
    """
    chosen = list(contenders)
    models = {s.model for s in shapes}
    first, rest = shapes[: FIRST_LAYERS * len(models)], shapes[FIRST_LAYERS * len(models) :]
    quick, slow = [c for c in chosen if not c.slow], [c for c in chosen if c.slow]
    out: list[Work] = []
    for dtype in dtypes:
        for layers, group in ((first, quick), (first, slow), (rest, quick), (rest, slow)):
            for mode in modes:
                out += [Work(s, dtype, mode, c) for s in layers for c in group if mode in c.builders]
    return out


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches at best, measured: GB/s of a copy (read and written), TFLOP/s of a matrix product."""

    copy_gbps: float
    gemm_tflops: Mapping[str, float]


def measure_ceilings(
    timer: Timer, dtypes: Sequence[str], device: str, side: int = 8192, copy_mb: int = 2048
) -> Ceilings:
    """A large copy, and square products in each dtype (``side``^3); infinite where the timer measures nothing."""
    source = torch.empty(copy_mb << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = timer(partial(target.copy_, source)).ms
    copy_gbps = 2 * source.numel() / copy_ms / 1e6 if copy_ms else math.inf
    del source, target
    gemm = {}
    for name in dtypes:
        # Random data: products of zeros draw less power, and so run at higher clocks.
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        ms = timer(partial(torch.matmul, a, b)).ms
        gemm[name] = 2 * side**3 / ms / 1e9 if ms else math.inf
    return Ceilings(copy_gbps, gemm)


class Table:
    """The rows of ``layers.csv``, written out after every change."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in read_rows(path) if resume else []:
            if set(row) != set(COLUMNS):
                continue
            if row["status"] == RUNNING:
                row |= {"status": CRASHED, "note": "the process ended (or was ended) during this measurement"}
            self.rows[self._key(row)] = row

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("model", "layer", "shape", "dtype", "mode", "contender"))

    def done(self, work: Work) -> bool:
        """Whether ``work`` has its row."""
        return work.key in self.rows

    def put(self, row: dict[str, Any]) -> None:
        """Add or replace a row."""
        self.rows[self._key(row)] = row
        write_rows(self.path, COLUMNS, self.rows.values())


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the expected array's largest magnitude; infinite for NaN or another shape."""
    if actual.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    error = float(difference / expected.double().abs().max().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf


def limit_of(dtype: torch.dtype, ours: bool) -> float:
    """How far :func:`error_of` may go; others sum norms in the storage dtype, which costs them accuracy."""
    tolerance = kernel_tolerance(dtype)
    return (tolerance["rtol"] + tolerance["atol"]) * (1 if ours else 3)


def measure(
    works: Sequence[Work],
    table: Table,
    timer: Timer,
    ceilings: Ceilings,
    device: str,
    *,
    deadline: float = math.inf,
    dry_run: bool = False,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure what ``table`` does not have yet, until ``deadline`` (of ``clock``).

    Returns:
        Counts of rows by status, ``left``: measurements that were not made, ``wrong``: our own disagreements.
    """
    case: Case | None = None
    mhz: float | None = None
    left = 0
    for work in works:
        if table.done(work):
            continue
        if clock() >= deadline:
            left += 1
            continue
        dtype = DTYPES[work.dtype]
        if case is None or case.shape != work.shape or case.dtype != dtype:
            case = None  # frees the last one's memory
            case = Case(work.shape, dtype, device)
            mhz = sm_clock() if device == "cuda" else None
        row = _row(work) | {"status": RUNNING, "dry_run": dry_run, "sm_clock_mhz": mhz}
        table.put(row)
        try:
            result = _measured(work, case, timer, ceilings)
        except UnsupportedError as error:
            result = {"status": UNSUPPORTED, "note": str(error)}
        except Exception as error:  # one contender's failure is a row, not the end
            if device == "cuda":
                # If the context is lost this raises, for nothing after it could be measured. The row stays "running":
                # the next process marks it as the one that crashed.
                torch.cuda.synchronize()
            result = {"status": ERROR, "note": f"{type(error).__name__}: {error}"[:300]}
        row = row | result
        row["note"] = " ".join(str(row.get("note", "")).split())
        table.put(row)
        say(_line(row))
    counts: dict[str, int] = {}
    for row in table.rows.values():
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    ours = {c.name for c in CONTENDERS if c.ours}
    bad = [r for r in table.rows.values() if r["contender"] in ours and r["status"] in (WRONG, ERROR, CRASHED)]
    failures = [
        f"{r['contender']} {r['mode']} {r['model']} {r['shape']} {r['dtype']}: {r['status']} {r['note']}" for r in bad
    ]
    return {"rows": counts, "left": left, "failures": failures}


def _row(work: Work) -> dict[str, Any]:
    s = work.shape
    return dict.fromkeys(COLUMNS) | {
        "model": s.model,
        "layer": s.layer,
        "count": s.count,
        "shape": s.label(),
        "dtype": work.dtype,
        "mode": work.mode,
        "contender": work.contender.name,
        "flops": s.flops(work.mode),
        "bytes": s.bytes(work.mode, DTYPES[work.dtype]),
        "note": "",
    }


def _measured(work: Work, case: Case, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    prepared = work.contender.builders[work.mode](case)
    pairs = [(name, error_of(actual, expected)) for name, actual, expected in prepared.pairs()]
    name, error = max(pairs, key=lambda pair: pair[1])
    limit = limit_of(case.dtype, work.contender.ours)
    out: dict[str, Any] = {"error": error, "error_limit": limit}
    if not error <= limit:
        return out | {"status": WRONG, "note": f"{name} differs from the reference by {error:.2g}: not timed"}
    timing = timer(prepared.run)
    out |= {
        "status": OK,
        "ms": timing.ms,
        "low_ms": timing.low,
        "high_ms": timing.high,
        "launched_ms": timing.launched_ms,
        "how": timing.how,
        "note": timing.note,
    }
    if timing.ms:
        flops, moved = work.shape.flops(work.mode), work.shape.bytes(work.mode, case.dtype)
        tflops, gbps = flops / timing.ms / 1e9, moved / timing.ms / 1e6
        gemm, copy = ceilings.gemm_tflops[work.dtype], ceilings.copy_gbps
        bound_ms = max(flops / gemm / 1e9, moved / copy / 1e6)
        out |= {
            "tflops": tflops,
            "gbps": gbps,
            "percent_of_gemm": 100 * tflops / gemm,
            "percent_of_copy": 100 * gbps / copy,
            "percent_of_bound": 100 * bound_ms / timing.ms,
        }
    return out


def _line(row: Mapping[str, Any]) -> str:
    text = f"{row['model']:12} {row['shape']:34} {row['dtype']} {row['mode']:8} {row['contender']:20} {row['status']}"
    if row["ms"] is not None:
        text += f" {row['ms']:.4f} ms, {row['percent_of_bound']:.0f}% of the bound"
    return text + (f" ({row['note'][:120]})" if row["note"] else "")


def totals(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per model, dtype and mode: each contender's sum over layers (times their counts).

    Only layers that our own kernels and the contender both have are summed, and our sum over the same layers stands
    beside it: sums over different layers would not be comparable. ``how`` tells if some could only be timed as launched
    from Python, which counts the launches as well.
    """
    times: dict[tuple[str, str, str], dict[str, dict[tuple[str, str], float]]] = {}
    how: dict[tuple[str, str, str, str], set[str]] = {}
    for row in rows:
        if row["status"] == OK and row["ms"] not in (None, ""):
            group = times.setdefault((row["model"], row["dtype"], row["mode"]), {})
            layer = (row["layer"], row["shape"])
            how.setdefault((row["model"], row["dtype"], row["mode"], row["contender"]), set()).add(row["how"])
            group.setdefault(row["contender"], {})[layer] = int(row["count"]) * float(row["ms"])
    out = []
    for (model, dtype, mode), group in times.items():
        ours = group.get("bcos_rt", {})
        for contender, by_layer in group.items():
            common = by_layer.keys() & ours.keys()
            if not common:
                continue
            total, own = sum(by_layer[k] for k in common), sum(ours[k] for k in common)
            out.append(
                {
                    "model": model, "dtype": dtype, "mode": mode, "contender": contender, "layers": len(common),
                    "of_layers": len(ours), "ms": total, "bcos_rt_ms": own, "times_bcos_rt": total / own,
                    "how": "+".join(sorted(how[model, dtype, mode, contender])),
                }
            )  # fmt: skip
    return out

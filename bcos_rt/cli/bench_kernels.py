"""``bcos-rt bench kernels``: single ops on the layers of known networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bcos_rt.cli.inputs import Json, check_output
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.errors import InvalidArgumentError, UnsupportedOpError, did_you_mean

if TYPE_CHECKING:
    from bcos_rt.benchmark.kernels.committed import Comparison
    from bcos_rt.benchmark.kernels.timing import Ceilings

__all__ = ["kernels"]

DTYPES = ("fp32", "bf16")
# With --compare, times that slower rows are measured again, the fastest counting: a machine has slow minutes.
LOOKS = 2
# Rows without a counterpart that are listed by name; the rest are counted.
LISTED = 10


def kernels(
    op: Annotated[list[str] | None, typer.Option("--op", metavar="NAME", help="Only this op; repeatable.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", metavar="fp32|bf16", help="Only this dtype; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: a GPU where there is one.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the cores there are.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short, noisy measurements of the same rows.")] = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the rows there, the environment to FILE.json.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Compare with an earlier --csv; exit code 1 if a row is slower."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="RATIO", help="With --compare: slower is more than this times the earlier median.")
    ] = 1.25,
    as_json: Json = False,
) -> None:
    """Time our kernels one by one on layers of ResNet-18 and -50, DenseNet-121, EfficientNet-Lite0 and ViT-B/16.

    Each as GB/s and GFLOP/s, as a share of what a copy of as many bytes and a large matrix product reach on this
    machine, and beside the same computation in PyTorch op by op.
    """
    slower = False

    def work(progress: Progress) -> Outcome:
        nonlocal slower
        if not (math.isfinite(tolerance) and tolerance >= 1):
            raise InvalidArgumentError("--tolerance", tolerance, "a number of at least 1")
        if csv is not None:
            check_output(csv, (".csv",), "--csv")
        dtypes = _chosen("--dtype", dtype, DTYPES)
        import torch

        from bcos_rt.benchmark import machine
        from bcos_rt.benchmark.kernels import cases, committed, layers, timing
        from bcos_rt.benchmark.kernels.rows import COLUMNS, about_device, measure
        from bcos_rt.benchmark.table import write_json, write_rows

        before = None if compare is None else committed.read(compare)
        where = _device(device)
        operations = _chosen("--op", op, cases.operations(where))
        count = threads or machine.available_cores()
        budget = timing.QUICK if quick else timing.FULL
        with _threads(count):
            environment = {
                "setting": {**about_device(where), "batch": batch, "dtypes": dtypes, "quick": quick},
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "cuda": torch.version.cuda if where == "cuda" else None,
                "machine": machine.describe(),
            }
            ceilings = timing.Ceilings(budget, where)
            sweep = layers.networks(batch, 8 if where == "cuda" else 6)
            work_list = [(spec, name) for spec in cases.specs(sweep, operations) for name in dtypes]
            rows = measure(work_list, batch, where, ceilings, lambda items: progress.track(items, "kernels"))
            comparison = None
            if before is not None:
                asked = {"op": operations, "dtype": dtypes, "device": (where,), "batch": (batch,)}
                # What is written stays as it was measured first; only the comparison takes the fastest look.
                best = list(rows)
                comparison = committed.compare(best, before, tolerance, asked)
                for _ in range(LOOKS):
                    slow = {change.key for change in comparison.slower}
                    at = [i for i, row in enumerate(best) if committed.key_of(row) in slow]
                    if not at:
                        break
                    with progress.working(f"looking again at {len(at)} slower rows"):
                        again = measure([work_list[i] for i in at], batch, where, ceilings)
                    for i, row in zip(at, again, strict=True):
                        best[i] = min(best[i], row, key=lambda r: float(r["median_us"]))
                    comparison = committed.compare(best, before, tolerance, asked)
        environment["ceilings"] = _ceilings(ceilings)
        if csv is not None:
            write_rows(csv, rows, COLUMNS)
            write_json(csv.with_suffix(".json"), environment)
        data: dict[str, Any] = {"command": "bench kernels", "environment": environment, "rows": rows}
        if comparison is not None:
            slower = bool(comparison.slower)
            data["comparison"] = comparison.as_json()
            import warnings

            for text in comparison.warnings:
                warnings.warn(text, stacklevel=1)

        def shown() -> list[Any]:
            about = about_device(where)
            head = f"{about['machine']}, {about['isa']}, {count} threads, batch {batch}"
            parts = [_shown(rows), Text(head + (", quick" if quick else ""))]
            return parts if comparison is None else [*parts, *_compared(comparison)]

        return Outcome(data, shown)

    run(work, as_json)
    if slower:
        raise typer.Exit(1)


def _chosen(option: str, given: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """What a repeatable option names, in the order of ``known``; all where it was not given."""
    for name in given or ():
        if name not in known:
            raise InvalidArgumentError(option, repr(name), ", ".join(known), did_you_mean(name, known))
    return tuple(name for name in known if not given or name in given)


def _device(name: str) -> str:
    import torch

    from bcos_rt.kernels import cpu

    known = ("auto", "cpu", "cuda")
    if name not in known:
        raise InvalidArgumentError("--device", repr(name), ", ".join(known), did_you_mean(name, known))
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("--device", "'cuda', which PyTorch does not find here", "auto or cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return "cuda"
    if not cpu.available():
        raise UnsupportedOpError(f"--device cpu: the C++ kernels are not built: {cpu.unavailable_reason()}")
    return "cpu"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ceilings(ceilings: Ceilings) -> dict[str, Any]:
    return {
        "gemm_side": ceilings.budget.gemm_side,
        "gemm_gflop_s": {str(dtype).removeprefix("torch."): v for dtype, v in ceilings.products.items()},
        "copy_gb_s": {str(size): v for size, v in sorted(ceilings.copies.items())},
    }


def _shown(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for column in ("op", "variant", "shape", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("median us", "quartiles", "GB/s", "of copy", "GFLOP/s", "of GEMM", "PyTorch us", "speedup"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["op"], row["variant"], row["shape"], row["dtype"], f"{row['median_us']:.1f}",
            f"{row['q1_us']:.1f} {row['q3_us']:.1f}", f"{row['gb_s']:.1f}", f"{100 * row['share_copy']:.0f} %",
            f"{row['gflop_s']:.1f}", f"{100 * row['share_gemm']:.0f} %", f"{row['reference_us']:.1f}",
            f"{row['speedup']:.1f}",
        )  # fmt: skip
    return table


def _compared(comparison: Comparison) -> list[Any]:
    """The slower rows as a table, then what else there is to say."""
    parts: list[Any] = []
    slower = comparison.slower
    if slower:
        table = Table(title="slower than committed")
        for column in ("op", "variant", "shape", "batch", "dtype", "device"):
            table.add_column(column, overflow="fold")
        for column in ("committed", "now", "ratio"):
            table.add_column(column, justify="right", no_wrap=True)
        for change in slower:
            times = (f"{change.before_us:.1f} us", f"{change.now_us:.1f} us", f"{change.ratio:.2f}")
            table.add_row(*change.key, *times)
        parts.append(table)
    compared = f"{len(comparison.changes)} rows compared, {len(slower)} slower than {comparison.tolerance:g} times"
    parts.append(Text(compared, style="bold red" if slower else "bold"))
    for keys, text in (
        (comparison.only_here, "measured here, not in the file"),
        (comparison.only_before, "in the file, not measured here"),
    ):
        if keys:
            named = [" ".join(key) for key in keys[:LISTED]]
            more = [f"... and {len(keys) - LISTED} more"] if len(keys) > LISTED else []
            parts.append(Text("\n  ".join([f"{len(keys)} rows {text}:", *named, *more])))
    parts += [Text(text, style="bold red") for text in comparison.warnings]
    return parts

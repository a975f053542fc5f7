"""Forward and explanation of B-cos networks, measured on the CPU against everything a user could pick instead.

    python -m bench.explain main          times, memory, start-up of all contenders          main.csv
    python -m bench.explain training      a training step, and what autograd keeps           training.csv
    python -m bench.explain growth        over batch, image side and classes                 growth.csv
    python -m bench.explain photographs PHOTOS.tar     bf16 maps against fp32                photographs.csv
    python -m bench.explain breakdown     the native engine's time by step               breakdown.csv
    python -m bench.explain targets       the table of targets, from the CSV files           targets.json, targets.md
    python -m bench.explain plots         time-2.png, time-1.png, growth.png

Run it on a machine that does nothing else. A killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # python bench/explain.py
    sys.path.insert(0, str(ROOT))

from bcos_rt.benchmark.table import read_rows, write_json, write_rows, write_text  # noqa: E402
from bench.explain_bench import matrix, networks, targets  # noqa: E402
from bench.explain_bench.driver import measure  # noqa: E402

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")]
Networks = Annotated[list[str] | None, typer.Option("--network", help="Only this network; repeatable.")]
Batches = Annotated[list[int] | None, typer.Option("--batch", help="Only this batch; repeatable.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer rounds and contenders.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what the table has.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Size = Annotated[int, typer.Option(help="Side of an image in pixels.")]
RESULTS = ROOT / "bench" / "results" / "explain"


def _end(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        console.print(result)
    if result.get("rows", {}).get("failed"):
        raise typer.Exit(1)


def _checked(names: list[str] | None) -> tuple[str, ...]:
    known = (*networks.NETWORKS, *networks.TRANSFORMERS, networks.CLIP, networks.TINY)
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--network")
    return tuple(names or networks.NETWORKS)


@app.command("main")
def main_matrix(
    output: Output = RESULTS,
    network: Networks = None,
    batch: Batches = None,
    threads: Annotated[list[int] | None, typer.Option(help="Repeatable. [default: 2 1]")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Only this contender; repeatable.")] = None,
    size: Size = 224,
    quick: Quick = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Every contender on every network, batch 1 and 8, 2 and 1 threads."""
    for name in contender or ():
        if name not in matrix.ENTRIES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(matrix.ENTRIES)}", param_hint="--contender")
    cells = matrix.main_cells(
        _checked(network), tuple(batch or (1, 8)), tuple(threads or (2, 1)), size, quick, tuple(contender or ())
    )
    _end(measure(cells, output, "main", quick=quick, fresh=fresh, console=console), as_json)


@app.command()
def training(
    output: Output = RESULTS,
    network: Networks = None,
    batch: Batches = None,
    threads: int = 2,
    size: Size = 224,
    quick: Quick = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Forward, backward and SGD of the B-cos network, ours against the published layers."""
    cells = matrix.training_cells(_checked(network), tuple(batch or (8,)), threads, size)
    _end(measure(cells, output, "training", quick=quick, fresh=fresh, console=console), as_json)


@app.command()
def growth(
    output: Output = RESULTS,
    network: str = "resnet18",
    threads: int = 2,
    quick: Quick = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """How cost grows: batch 1 to 32, image side 128 to 512, 1 to 10 classes of an image."""
    cells = matrix.growth_cells(_checked([network])[0], threads, quick)
    _end(measure(cells, output, "growth", quick=quick, fresh=fresh, console=console), as_json)


@app.command()
def photographs(
    tar: Path,
    output: Output = RESULTS,
    network: Networks = None,
    count: Annotated[int, typer.Option(help="Photographs.")] = 40,
    backend: str = "auto",
    as_json: Json = False,
) -> None:
    """Contribution maps of bf16 engines against fp32 ones on photographs (a tar file of JPEG images)."""
    from bench.explain_bench.photographs import COLUMNS, compare_dtypes

    rows = []
    for name in _checked(network):
        for forward in ("bfloat16", "float32"):
            rows.append(compare_dtypes(name, tar, count, backend, forward=forward))
            console.print(rows[-1])
            write_rows(output / "photographs.csv", rows, COLUMNS)
    _end({"photographs": rows}, as_json)


@app.command()
def breakdown(
    output: Output = RESULTS,
    network: Networks = None,
    threads: int = 2,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Every step of the native engine's programs on one image, timed by itself."""
    from bcos_rt.benchmark.comparison import Workplace
    from bench.explain_bench.breakdown import COLUMNS, by_kind

    rows = []
    with Workplace([str(ROOT)]) as place:
        for name in _checked(network):
            arguments = {"network": name, "threads": threads, "dtype": dtype}
            rows += place.call("bench.explain_bench.breakdown:rows_of", threads, **arguments)
            write_rows(output / "breakdown.csv", rows, COLUMNS)
    sums = [{"network": n, "program": p, "ms": kinds} for (n, p), kinds in by_kind(rows).items()]
    _end({"breakdown": sums}, as_json)


@app.command("targets")
def table_of_targets(
    output: Output = RESULTS,
    ours: Annotated[str, typer.Option(help="The engine's backend.")] = "native",
    threads: int = 2,
    as_json: Json = False,
) -> None:
    """The table of targets, from the CSV files alone."""
    tables = (read_rows(output / f"{name}.csv") for name in ("main", "training", "photographs"))
    found = targets.figures(*tables, ours=ours, threads=threads)
    write_json(output / "targets.json", {"figures": targets.as_json(found)})
    write_text(output / "targets.md", targets.markdown(found))
    if as_json:
        print(json.dumps(targets.as_json(found)))
    else:
        print(targets.markdown(found))


@app.command()
def plots(output: Output = RESULTS) -> None:
    """Draw what was measured."""
    from bench.explain_bench import plots as drawing

    described = json.loads((output / "main.json").read_text()) if (output / "main.json").exists() else {}
    title = f"{described.get('cpu', {}).get('model', '')}, torch {described.get('packages', {}).get('torch', '')}"
    rows = read_rows(output / "main.csv")
    for threads in sorted({int(r["threads"]) for r in rows}):
        drawing.bars(rows, output / f"time-{threads}.png", threads, title)
    if grown := read_rows(output / "growth.csv"):
        drawing.growth(grown, output / "growth.png", f"{grown[0]['network']}, {title}")


if __name__ == "__main__":
    app()

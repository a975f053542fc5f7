"""``python -m bcos_rt.kernels.static``: what can be known of the kernels without a GPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bcos_rt.errors import BcosError
from bcos_rt.kernels.static.cases import cases
from bcos_rt.kernels.static.compile import CACHE
from bcos_rt.kernels.static.report import KnownException, Result, compile_cases, violations, write_report
from bcos_rt.kernels.static.targets import TARGETS

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What can be known of the kernels without a GPU.")

_Arch = Annotated[list[str] | None, typer.Option(help=f"Targets: {', '.join(TARGETS)}; all by default.")]
_Workers = Annotated[int | None, typer.Option(help="Processes; as many as processors by default.")]
_Cache = Annotated[Path, typer.Option(help="Folder of compiled kernels and results.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _compile(arch: list[str] | None, workers: int | None, cache: Path) -> list[Result]:
    console = Console(stderr=True)
    unknown = sorted(set(arch or ()) - set(TARGETS))
    if unknown:
        raise typer.BadParameter(f"got {', '.join(unknown)}; known are {', '.join(TARGETS)}", param_hint="--arch")
    found = cases(arch or TARGETS)
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    started = time.monotonic()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(found), last="")

        def progress(done: int, total: int, last: str) -> None:
            bar.update(task, completed=done, total=total, last=last)

        results = compile_cases(found, cache, workers, progress)
    console.print(f"{len(results)} launches in {time.monotonic() - started:.0f} s")
    return results


@app.command()
def check(arch: _Arch = None, workers: _Workers = None, cache: _Cache = CACHE, as_json: _Json = False) -> None:
    """Compile every kernel for every target; exit 1 and list what breaks a rule (spills, tensor cores, ...)."""
    results = _compile(arch, workers, cache)
    failed, excused = violations(results)
    # With a target left out an exception may have nothing to excuse.
    idle: list[KnownException] = [] if arch else [exception for exception, covered in excused.items() if not covered]
    if as_json:
        content = {
            "launches": len(results),
            "violations": [asdict(v) for v in failed],
            "excused": [{**asdict(v), "reason": e.reason} for e, vs in excused.items() for v in vs],
            "unneeded_exceptions": [asdict(e) for e in idle],
        }
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
    else:
        console = Console()
        if failed:
            table = Table("rule", "kernel", "arch", "config", "dtype", "variant", "what", title="Broken rules")
            for v in failed:
                table.add_row(v.rule, v.kernel, v.arch, v.config, v.dtype, v.variant, v.what)
            console.print(table)
        for exception, covered in excused.items():
            console.print(f"known exception, {len(covered)} launches: {exception.rule}, {exception.kernel} "
                          f"{exception.arch} {exception.dtype}: {exception.reason}", highlight=False)  # fmt: skip
        for exception in idle:
            console.print(f"exception that nothing needs: {exception}", highlight=False)
        console.print(f"{len(results)} launches, {len(failed)} broken rules", highlight=False)
    if failed or idle:
        raise typer.Exit(1)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder for kernels.md and kernels.json.")] = Path("docs"),
    workers: _Workers = None,
    cache: _Cache = CACHE,
) -> None:
    """Compile every kernel for every target and write docs/kernels.md and docs/kernels.json."""
    page, data = write_report(_compile(None, workers, cache), out)
    Console().print(f"wrote {page} and {data}", highlight=False)


@app.command()
def plan(
    arch: Annotated[str, typer.Option(help=f"Target: {', '.join(TARGETS)}.")] = "sm_90",
    model: Annotated[str, typer.Option(help="Any model that `bcos-rt` knows.")] = "resnet50",
    batch: Annotated[int, typer.Option(help="Images.")] = 32,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    as_json: _Json = False,
) -> None:
    """Tile configuration of every layer of a model, with the reasoning behind it. An estimate."""
    from bcos_rt.kernels.static.plan import plan as run

    run(arch=arch, model=model, batch=batch, dtype=dtype, as_json=as_json)


@app.command()
def roofline(
    model: Annotated[list[str] | None, typer.Option(help="torchvision network, may be repeated; resnet50.")] = None,
    batch: Annotated[int, typer.Option(help="Images.")] = 32,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    arch: Annotated[str, typer.Option(help=f"Target: {', '.join(TARGETS)}.")] = "sm_90",
    out: Annotated[Path | None, typer.Option(help="Folder for roofline.md and .json instead.")] = None,
    as_json: _Json = False,
) -> None:
    """Bytes, operations and the least time of a model's forward pass and explanation. A bound, not a measurement."""
    from bcos_rt.kernels.static.roofline import roofline as run

    run(model=model or ["resnet50"], batch=batch, dtype=dtype, as_json=as_json, arch=arch, out=out)


def main() -> None:
    """Run the command line; an argument that is no good ends with one line and exit code 2."""
    try:
        app()
    except BcosError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()

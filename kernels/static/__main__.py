"""``python -m bcos_rt.kernels.static``: what can be known of the kernels without a GPU."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bcos_rt.errors import BcosError
from bcos_rt.kernels.static.cases import Case, cases
from bcos_rt.kernels.static.compile import CACHE
from bcos_rt.kernels.static.record import RENEW, LookUp, look_up, read
from bcos_rt.kernels.static.report import (
    KnownException,
    Result,
    compile_cases,
    judged,
    stale,
    violations,
    write_report,
)
from bcos_rt.kernels.static.targets import TARGETS

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What can be known of the kernels without a GPU.")

# Lines of a list that may be as long as there are launches.
_SHOWN = 20

_Arch = Annotated[list[str] | None, typer.Option(help=f"Targets: {', '.join(TARGETS)}; all by default.")]
_Workers = Annotated[int | None, typer.Option(help="Processes; as many as processors by default.")]
_Cache = Annotated[Path, typer.Option(help="Folder of compiled kernels and results.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _cases(arch: list[str] | None) -> list[Case]:
    unknown = sorted(set(arch or ()) - set(TARGETS))
    if unknown:
        raise typer.BadParameter(f"got {', '.join(unknown)}; known are {', '.join(TARGETS)}", param_hint="--arch")
    return cases(arch or TARGETS)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None, last="")
        yield lambda done, total, last: bar.update(task, completed=done, total=total, last=last)


def _compile(arch: list[str] | None, workers: int | None, cache: Path) -> list[Result]:
    console = Console(stderr=True)
    started = time.monotonic()
    with _progress(console) as progress:
        results = compile_cases(_cases(arch), cache, workers, progress)
    console.print(f"{len(results)} launches in {time.monotonic() - started:.0f} s")
    return results


def _look_up(
    arch: list[str] | None, workers: int | None, cache: Path, recorded: Path, seed: int
) -> tuple[list[Result], LookUp, list[str]]:
    """Results, where they are from, and the files that are not what they make."""
    console = Console(stderr=True)
    started = time.monotonic()
    found = _cases(arch)
    known = {key: one for key, one in read(recorded).items() if not arch or one.arch in arch}
    with _progress(console) as progress:
        looked_up = look_up(found, known, seed, cache, workers, progress)
    results = judged(found, looked_up.analyses)
    console.print(
        f"{len(results)} launches in {time.monotonic() - started:.0f} s, {looked_up.compiled} of them compiled: "
        f"{len(looked_up.missing)} not in {recorded}, {looked_up.sampled} to check it (--sample-seed {seed})",
        highlight=False,
    )
    # The files are of all targets.
    return results, looked_up, [] if arch else stale(results, recorded)


@app.command()
def check(
    arch: _Arch = None,
    workers: _Workers = None,
    cache: _Cache = CACHE,
    as_json: _Json = False,
    recorded: Annotated[
        Path | None,
        typer.Option(help="kernels.json of `report`: compile what is not in it and a sample; fail where it is stale."),
    ] = None,
    sample_seed: Annotated[
        int | None, typer.Option(help="Which recorded launches are compiled again; today's date (UTC), 20260131.")
    ] = None,
) -> None:
    """Compile every kernel for every target; exit 1 and list what breaks a rule (spills, tensor cores, ...)."""
    looked_up: LookUp | None = None
    outdated: list[str] = []
    if recorded is None:
        results = _compile(arch, workers, cache)
    else:
        # By date, not by commit or content: after some days every launch has been compiled again, on any machine and
        # whether or not the kernels changed; and the number says which ones they were.
        seed = int(datetime.now(UTC).strftime("%Y%m%d")) if sample_seed is None else sample_seed
        results, looked_up, outdated = _look_up(arch, workers, cache, recorded, seed)
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
        if looked_up is not None:
            content["recorded"] = {
                "sample_seed": seed,
                "compiled": looked_up.compiled,
                "sampled": looked_up.sampled,
                "differences": [asdict(difference) for difference in looked_up.differences],
                "missing": looked_up.missing,
                "obsolete": looked_up.obsolete,
                "stale_files": outdated,
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
        if looked_up is not None:
            _print_record(console, looked_up, outdated)
        console.print(f"{len(results)} launches, {len(failed)} broken rules", highlight=False)
    wrong = looked_up is not None and bool(looked_up.differences or looked_up.missing or looked_up.obsolete or outdated)
    if failed or idle or wrong:
        raise typer.Exit(1)


def _print_record(console: Console, looked_up: LookUp, outdated: Sequence[str]) -> None:
    listed: tuple[tuple[str, Sequence[object]], ...] = (
        ("recorded launches that compile to something else", looked_up.differences),
        ("launches that are not recorded", looked_up.missing),
        ("recorded launches that the source no longer has", looked_up.obsolete),
        ("files that are not what `report` writes", outdated),
    )
    for title, entries in listed:
        if entries:
            lines = [f"{len(entries)} {title}:", *(f"  {entry}" for entry in entries[:_SHOWN])]
            if len(entries) > _SHOWN:
                lines.append(f"  and {len(entries) - _SHOWN} more")
            console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    if any(entries for _, entries in listed):
        console.print(f"renew the files with: {RENEW}", highlight=False, markup=False, soft_wrap=True)


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

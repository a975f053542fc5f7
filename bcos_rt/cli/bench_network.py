"""``bcos-rt bench network``: a network's prediction and explanation, timed in every way this installation has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bcos_rt.cli.inputs import DEFAULT_SIZE, Json, NumClasses, Weights, check_output, is_saved
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.errors import BcosError, InvalidArgumentError, did_you_mean

if TYPE_CHECKING:
    from bcos_rt.benchmark.comparison import Entry

__all__ = ["network"]

_MODULE = "bcos_rt.benchmark.contenders:"
_ENGINES = ("native", "inductor", "eager", "auto")
# Name on the command line -> contenders.
_OTHERS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "onnx": (("onnx", "OnnxContender", {"file": "bcos"}), ("plain onnx", "OnnxContender", {"file": "plain"})),
    "plain": (("plain", "PlainContender", {}),),
    "plain-compiled": (("plain-compiled", "PlainContender", {"compiled": True}),),
}


def network(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="torchvision:NAME, timm:NAME, hf:NAME, simple_vit:NAME, efficientnet-lite0, or a saved network.",
        ),
    ] = "torchvision:resnet18",
    weights: Weights = "random",
    num_classes: NumClasses = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: the cores there are.")] = None,
    size: Annotated[int, typer.Option("--size", "-s", min=1, help="Side of the image in pixels.")] = DEFAULT_SIZE,
    backends: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Who is timed: native, inductor, eager, auto (the engine's backends; NAME:bf16 for bfloat16), onnx, "
            "plain (the network before its conversion), plain-compiled.",
        ),
    ] = "native,inductor,eager,onnx,plain",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="After this time no further round begins.")] = 30.0,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory too, in further processes.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write all numbers there.")] = None,
    as_json: Json = False,
) -> None:
    """Time prediction and explanation of a network on this machine.

    A model by name is converted with the default recipe (B = 2). Each contender runs in a process of its own, in turn
    with the others; compiling contenders take a minute to get ready.
    """

    def work(progress: Progress) -> Outcome:
        entries = _entries(backends)
        if csv is not None:
            check_output(csv, (".csv",), "--csv")
        saved = is_saved(model)
        if not saved and weights not in (None, "random", "default") and not Path(str(weights)).is_file():
            raise InvalidArgumentError("--weights", repr(weights), "an existing file, or 'random'")
        from bcos_rt.benchmark import machine
        from bcos_rt.benchmark.comparison import OK, Plan, Workplace, compare, measure_memory
        from bcos_rt.benchmark.contender import EXPLAIN, FORWARD, Setting
        from bcos_rt.benchmark.process import WorkerError
        from bcos_rt.benchmark.table import row_of, write_rows

        count = threads or machine.available_cores()
        with Workplace() as place:
            setting = Setting(place.folder / "network", batch, size, 1, count)
            maker = "bcos_rt.benchmark.subject:"
            arguments = {
                "model": None if saved else model,
                "checkpoint": model if saved else None,
                "weights": weights,
                "num_classes": num_classes,
                "size": size,
            }
            try:
                with progress.working("making the network"):
                    about = place.call(
                        f"{maker}make",
                        count,
                        folder=str(setting.folder),
                        function=f"{maker}by_name",
                        arguments=arguments,
                    )
                with progress.working("expected results and files"):
                    place.call(f"{maker}reference", count, setting=setting.as_json())
                    if any(e.factory.endswith("OnnxContender") for e in entries):
                        place.call(f"{maker}export", count, folder=str(setting.folder), size=size)
            except WorkerError as error:
                raise BcosError(str(error)) from error
            plan = Plan(rounds=rounds, least_rounds=min(3, rounds), seconds=seconds)
            with progress.working("preparing and timing"):
                measured = compare(entries, (FORWARD, EXPLAIN), setting, plan, place.launch)
            if memory:
                with progress.working("memory"):
                    for m in measured:
                        if m.status == OK:
                            m.memory = measure_memory(m.entry, setting, plan, place.launch, m.mode)
        rows = [{k: v for k, v in row_of(model, setting, m, {}).items() if v is not None} for m in measured]
        if csv is not None:
            write_rows(csv, rows)
        data = {
            "command": "bench network",
            "network": about,
            "setting": {"batch": batch, "size": size, "threads": count},
            "machine": machine.describe(),
            "rows": rows,
        }
        return Outcome(data, lambda: [_shown(rows), Text(f"{machine.cpu_model()}, {count} threads, batch {batch}")])

    run(work, as_json)


def _entries(text: str) -> list[Entry]:
    """The contenders behind ``--backends``."""
    from bcos_rt.benchmark.comparison import Entry
    from bcos_rt.benchmark.contender import EXPLAIN, FORWARD

    modes = (FORWARD, EXPLAIN)
    entries = []
    for name in dict.fromkeys(part.strip() for part in text.split(",") if part.strip()):
        engine, _, dtype = name.partition(":")
        if engine in _ENGINES and dtype in ("", "bf16"):
            options = {"backend": engine, "dtype": "bfloat16" if dtype else "float32"}
            entries.append(Entry(name, f"{_MODULE}EngineContender", modes, options))
        elif name in _OTHERS:
            for label, factory, options in _OTHERS[name]:
                one = label in ("plain onnx", "plain-compiled")
                entries.append(Entry(label, _MODULE + factory, modes[:1] if one else modes, options))
        else:
            known = (*_ENGINES, *(f"{e}:bf16" for e in _ENGINES), *_OTHERS)
            raise InvalidArgumentError("--backends", repr(name), ", ".join(known), did_you_mean(name, known))
    if not entries:
        raise InvalidArgumentError("--backends", repr(text), "at least one name")
    return entries


def _shown(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("contender", overflow="fold")
    table.add_column("mode")
    for column in ("median", "quartiles", "ready in", "memory", "error of W"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["status"] != "ok":
            table.add_row(row["contender"], row["mode"], Text(f"{row['status']}: {row['note']}"[:60]))
            continue
        ready = row["load_s"] + row["build_s"] + row["first_s"]
        table.add_row(
            row["contender"],
            "input x gradient" if row["contender"] == "plain" and row["mode"] == "explain" else row["mode"],
            f"{row['median_ms']:.2f} ms",
            f"{row['q1_ms']:.2f} to {row['q3_ms']:.2f}",
            f"{ready:.1f} s",
            f"{row['memory_mib']:.0f} MiB" if "memory_mib" in row else "",
            f"{row['error_weights']:.1e}" if "error_weights" in row else "",
        )
    return table

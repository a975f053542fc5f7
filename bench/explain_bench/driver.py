"""Goes through the cells: what the table has already is kept, everything else is measured, cell by cell."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bcos_rt.benchmark import machine
from bcos_rt.benchmark.comparison import OK, Workplace, compare, measure_memory
from bcos_rt.benchmark.contender import EXPLAIN, Setting
from bcos_rt.benchmark.table import COLUMNS, read_rows, row_of, write_json, write_rows
from bench.explain_bench.matrix import ENTRIES, SLOW, Cell, expected_seconds, plan

__all__ = ["environment", "measure", "sources"]

ROOT = Path(__file__).resolve().parents[2]
_MEASURED = (("bcos_rt", "*.py"), ("kernels", "*.py"), ("kernels/cpu", "*.[ch]*"), ("export", "*.py"))


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def sources() -> str:
    """A hash of the code that is measured, and of the contenders; committed or not."""
    digest = hashlib.sha256()
    files = {p for folder, pattern in _MEASURED for p in (ROOT / folder).rglob(pattern)}
    # Of the benchmark itself, what is timed: plots and targets may change without new measurements.
    files |= {ROOT / "bench/explain_bench" / name for name in ("contenders.py", "published.py", "networks.py")}
    for path in sorted(files):
        if "cli" not in path.parts:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Machine, versions, commit."""
    return {
        **machine.describe(),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": [line[3:] for line in _git("status", "--porcelain", "-uno").splitlines()],
        "sources": sources(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Table:
    """The rows of a CSV file by cell; a cell's rows are written together, so that they are of one session or absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [r for r in read_rows(path) if set(r) == set(COLUMNS)]

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("network", "batch", "size", "classes", "threads"))

    def done(self, cell: Cell, code: str, rounds: int) -> bool:
        """Whether all rows of a cell were measured with this code, in one session, with enough rounds."""
        mine = [r for r in self.rows if self._key(r) == cell.key and (r["contender"], r["mode"]) in cell.rows()]
        if {(r["contender"], r["mode"]) for r in mine} != cell.rows() or len({r["session"] for r in mine}) != 1:
            return False
        return all(r["sources"] == code and (r["status"] != OK or int(r["rounds"]) >= rounds) for r in mine)

    def put(self, cell: Cell, rows: Sequence[dict[str, Any]]) -> None:
        """Replace a cell's rows: all of them, for other sessions' rows could not be compared with these."""
        modes = {row["mode"] for row in rows}
        self.rows = [r for r in self.rows if self._key(r) != cell.key or r["mode"] not in modes]
        self.rows += rows
        write_rows(self.path, self.rows)


def measure(
    cells: Sequence[Cell], folder: Path, name: str, *, quick: bool = False, fresh: bool = False, console: Console
) -> dict[str, Any]:
    """Measure cells into ``folder/name.csv`` and describe the machine in ``folder/name.json``.

    A killed run goes on where it stopped: cells in the table that were measured with the same code and with enough
    rounds are kept unless ``fresh``.

    Returns:
        Counts: cells measured, kept; rows by status.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = environment()
    write_json(folder / f"{name}.json", described)
    table, code = Table(folder / f"{name}.csv"), described["sources"]
    left = [c for c in cells if fresh or not table.done(c, code, plan(c, quick).least_rounds)]
    session = {"commit": described["commit"][:12], "sources": code}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    statuses: dict[str, int] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(expected_seconds(c, quick) for c in left))
        done = 0.0
        with Workplace([str(ROOT)]) as place:
            for cell in left:
                text = f"{cell.network} batch {cell.batch} size {cell.size} K {cell.classes} threads {cell.threads}"

                def tell(what: str, text: str = text) -> None:
                    progress.update(task, description=f"{text}: {what}")

                def step(share: float, cell: Cell = cell, before: float = done) -> None:
                    progress.update(task, completed=before + share * plan(cell, quick).seconds)

                rows = _cell(cell, place, session, quick, tell, step)
                table.put(cell, rows)
                for row in rows:
                    statuses[row["status"]] = statuses.get(row["status"], 0) + 1
                done += expected_seconds(cell, quick)
                progress.update(task, completed=done)
                _say(console, text, rows)
    return {"measured": len(left), "kept": len(cells) - len(left), "rows": statuses, "table": str(table.path)}


def _cell(cell: Cell, place: Workplace, session: dict[str, str], quick: bool, tell: Any, step: Any) -> list[Any]:
    folder = place.folder / cell.network
    setting = Setting(folder, cell.batch, cell.size, cell.classes, cell.threads)
    # A cache of this cell's own: compiling counts as start-up time, and the memory pass finds everything compiled.
    cache = place.folder / "inductor"
    place.environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    shutil.rmtree(cache, ignore_errors=True)
    maker = "bcos_rt.benchmark.subject:"
    threads = machine.available_cores()
    if not (folder / "facts.json").exists():
        tell("making the network")
        arguments = {"name": cell.network, "size": min(cell.size, 224)}
        place.call(
            f"{maker}make", threads, folder=str(folder), function="bench.explain_bench.networks:subject",
            arguments=arguments,
        )  # fmt: skip
    tell("expected results")
    place.call(f"{maker}reference", threads, setting=setting.as_json())
    if {"onnx", "plain_onnx"} & set(cell.contenders):
        tell("exporting")
        place.call(f"{maker}export", threads, folder=str(folder), size=cell.size, multi=cell.classes > 1)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mark = {**session, "session": f"{now}-{os.getpid()}", "date": now}
    entries = [ENTRIES[name] for name in cell.contenders]
    measured = compare(entries, cell.modes, setting, plan(cell, quick), place.launch, tell=tell, step=step)
    if cell.memory:
        for m in measured:
            # What compiles for minutes is not compiled once more for this.
            if m.status == OK and m.mode == EXPLAIN and m.entry.name not in SLOW:
                tell(f"memory of {m.entry.name}")
                m.memory = measure_memory(m.entry, setting, plan(cell, quick), place.launch, m.mode)
                if "error" in m.memory:
                    m.note = f"{m.note}; memory: {m.memory['error']}".strip("; ")
    return [row_of(cell.network, setting, m, mark) for m in measured]


def _say(console: Console, text: str, rows: Sequence[dict[str, Any]]) -> None:
    console.print(f"[bold]{text}[/bold]")
    for row in rows:
        if row["status"] == OK:
            spread = f"{row['q1_ms']:8.1f} to {row['q3_ms']:.1f}"
            console.print(
                f"  {row['contender']:20} {row['mode']:8} {row['median_ms']:8.1f} ms {spread}", highlight=False
            )
        else:
            console.print(f"  {row['contender']:20} {row['mode']:8} {row['status']}: {row['note'][:100]}", markup=False)

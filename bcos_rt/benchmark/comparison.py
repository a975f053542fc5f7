"""Contenders against each other: prepared one after the other, then timed in turn, round after round.

In a round every contender runs a few times while all others are stopped; the next round has another order. So the
ratio of two contenders can be taken round by round, between times a few seconds apart, and a machine whose speed drifts
(other tenants, clocks) spoils neither the ratio nor hides its own unsteadiness: the ratios' spread shows it.
"""

from __future__ import annotations

import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bcos_rt.benchmark.contender import EXPLAIN, Setting, UnsupportedError
from bcos_rt.benchmark.process import Worker, WorkerError

__all__ = [
    "FAILED",
    "OK",
    "UNSUPPORTED",
    "Entry",
    "Measured",
    "Plan",
    "compare",
    "measure_memory",
    "paired_ratio",
    "quartiles",
]

OK, FAILED, UNSUPPORTED = "ok", "failed", "unsupported"


@dataclass(frozen=True)
class Entry:
    """A contender as the driver knows it.

    Attributes:
        name: in results.
        factory: ``package.module:class`` of its :class:`Contender`, resolved in the worker.
        modes: what it is timed in.
        options: passed to the factory, JSON-ready.
    """

    name: str
    factory: str
    modes: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: at most.
        least_rounds: at least, whatever the time.
        seconds: after this time no further round begins.
        turn_seconds: a contender runs as often in a turn as fits into this, once to ``most_calls`` times.
        most_calls: see ``turn_seconds``.
        prepare_seconds: a contender that takes longer to load or to prepare has failed.
    """

    rounds: int = 15
    least_rounds: int = 5
    seconds: float = 60.0
    turn_seconds: float = 0.1
    most_calls: int = 5
    prepare_seconds: float = 1800.0


@dataclass
class Measured:
    """What is known about one contender in one mode.

    Attributes:
        status: ``ok``, ``failed`` or ``unsupported``.
        note: the reason, or what a reader should know.
        rounds: seconds of one call, the median of each round's calls.
        calls: per round.
        load_s, build_s, first_s: seconds to import and read weights; to build or compile; of the first call.
        differences: from the expected results, see :func:`bcos_rt.benchmark.worker.differences`.
        facts: what the contender said about itself.
        memory: bytes, see :mod:`bcos_rt.benchmark.worker`; empty if it was not measured.
    """

    entry: Entry
    mode: str
    status: str = OK
    note: str = ""
    rounds: list[float] = field(default_factory=list)
    calls: int = 0
    load_s: float | None = None
    build_s: float | None = None
    first_s: float | None = None
    differences: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        """Note that it could not be measured."""
        self.status = UNSUPPORTED if isinstance(error, UnsupportedError) else FAILED
        self.note = " ".join(str(error).split())


Tell = Callable[[str], None]
Launch = Callable[[int], Worker]


def compare(
    entries: Sequence[Entry],
    modes: Sequence[str],
    setting: Setting,
    plan: Plan,
    launch: Launch,
    *,
    tell: Tell = lambda text: None,
    step: Callable[[float], None] = lambda share: None,
    seed: int = 0,
) -> list[Measured]:
    """Measure every entry in every mode both it and ``modes`` have.

    Args:
        launch: starts a worker process with that many threads.
        tell: called with what is being done.
        step: called with the share of the rounds that are over, 0 to 1.
        seed: of the order of contenders within the rounds.
    """
    results: list[Measured] = []
    workers: dict[str, Worker] = {}
    try:
        for entry in entries:
            mine = [Measured(entry, mode) for mode in modes if mode in entry.modes]
            if not mine:
                continue
            results += mine
            tell(f"preparing {entry.name}")
            workers[entry.name] = launch(setting.threads)
            _prepare(workers[entry.name], mine, setting, plan)
            workers[entry.name].suspend()
        _rounds([m for m in results if m.status == OK], workers, plan, tell, step, random.Random(seed))
    finally:
        for worker in workers.values():
            worker.close()
    return results


def _load(worker: Worker, entry: Entry, setting: Setting, plan: Plan) -> float:
    answer = worker.ask(
        "load",
        plan.prepare_seconds,
        factory=entry.factory,
        options=dict(entry.options),
        setting=setting.as_json(),
    )
    return float(answer["load_s"])


def _prepare(worker: Worker, measured: Sequence[Measured], setting: Setting, plan: Plan) -> None:
    try:
        load_s = _load(worker, measured[0].entry, setting, plan)
    except (UnsupportedError, WorkerError) as error:
        for m in measured:
            m.fail(error)
        return
    for m in measured:
        try:
            answer = worker.ask("prepare", plan.prepare_seconds, mode=m.mode)
        except (UnsupportedError, WorkerError) as error:
            m.fail(error)
            continue
        m.load_s, m.build_s, m.first_s = load_s, answer["build_s"], answer["first_s"]
        m.differences, m.facts = answer["differences"], answer["facts"]
        m.note = str(m.facts.pop("note", ""))
        wanted = math.ceil(plan.turn_seconds / max(answer["call_s"], 1e-6))
        m.calls = max(1, min(wanted, plan.most_calls))


def _rounds(
    measured: list[Measured],
    workers: Mapping[str, Worker],
    plan: Plan,
    tell: Tell,
    step: Callable[[float], None],
    order: random.Random,
) -> None:
    start = time.monotonic()
    for done in range(plan.rounds):
        elapsed = time.monotonic() - start
        if done >= plan.least_rounds and elapsed + elapsed / done > plan.seconds:
            break
        tell(f"round {done + 1} of at most {plan.rounds}")
        for m in order.sample(measured, len(measured)):
            if m.status != OK:
                continue
            worker = workers[m.entry.name]
            worker.resume()
            try:
                answer = worker.ask("time", plan.prepare_seconds, mode=m.mode, calls=m.calls)
                m.rounds.append(statistics.median(answer["seconds"]))
            except (UnsupportedError, WorkerError) as error:
                m.fail(error)
            worker.suspend()
        step(max((done + 1) / plan.rounds, min(1.0, (time.monotonic() - start) / max(plan.seconds, 1e-9))))
    step(1.0)


def measure_memory(
    entry: Entry, setting: Setting, plan: Plan, launch: Launch, mode: str = EXPLAIN, calls: int = 3
) -> dict[str, Any]:
    """Memory of one entry in one mode, in a process that does nothing else.

    Returns:
        Bytes, see :mod:`bcos_rt.benchmark.worker`; ``{"error": ...}`` if it could not be measured.
    """
    worker = launch(setting.threads)
    try:
        _load(worker, entry, setting, plan)
        return worker.ask("memory", plan.prepare_seconds, mode=mode, calls=calls)
    except (UnsupportedError, WorkerError) as error:
        return {"error": " ".join(str(error).split())}
    finally:
        worker.close()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile of at least one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired_ratio(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of ours / theirs, round by round; two contenders of one comparison have equally many rounds.

    If one of them was lost on the way, the rounds both have are taken.
    """
    return quartiles([a / b for a, b in zip(ours, others, strict=False)])


class Workplace:
    """A temporary folder with the logs of the workers launched from it.

    Args:
        paths: folders the workers import from, before the usual ones.
        environment: variables to set in them.
    """

    def __init__(self, paths: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bcos-rt-bench-"))
        self.paths, self.environment = paths, dict(environment or {})
        self._launched = 0

    def launch(self, threads: int) -> Worker:
        """A new worker process."""
        self._launched += 1
        return Worker(threads, self.folder / f"worker-{self._launched}.log", self.paths, self.environment)

    def call(self, function: str, threads: int, timeout: float = 1800.0, /, **arguments: Any) -> Any:
        """What ``package.module:function`` returns in a process of its own (JSON-ready in and out)."""
        with self.launch(threads) as worker:
            return worker.ask("call", timeout, function=function, arguments=arguments)["result"]

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

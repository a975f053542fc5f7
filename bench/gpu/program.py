"""The run: stages in their own processes, limits, and ``summary.json`` after every one."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from bench.gpu.files import read_json, read_rows, write_json
from bench.gpu.options import EXIT_FAILED, EXIT_OK, FAILED, PASSED, SKIPPED, STAGES, TIMEOUT, Options, Outcome
from bench.gpu.stages import run_command

__all__ = ["in_process", "in_subprocess", "run", "seconds_for"]

# Seconds a stage may take at most, and what share of the whole run; the benchmark has what the others leave.
CAPS = {
    "environment": (60.0, 1.0),
    "correctness": (900.0, 0.35),
    "graph": (90.0, 0.15),
    "onnx": (120.0, 0.15),
    "sanitizer": (120.0, 0.15),
    "plots": (60.0, 0.1),
}
# Kept for stages behind the benchmark.
RESERVES = {"sanitizer": 45.0, "plots": 20.0}

Execute = Callable[[str, Options, float], Outcome]


def seconds_for(stage: str, options: Options, remaining: float) -> float:
    """How long ``stage`` may take when ``remaining`` seconds of the run are left."""
    if stage == "benchmark":
        behind = sum(s for name, s in RESERVES.items() if name in options.stages)
        return remaining - min(behind, 0.25 * remaining)
    cap, share = CAPS[stage]
    if stage == "plots":
        return cap  # a few seconds, and without them the run was for less
    if "benchmark" not in options.stages:
        share = 1.0  # nothing has to be left over
    return min(cap, share * options.minutes * 60, remaining)


def run(
    options: Options,
    execute: Execute,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the stages; the exit code: 0, or 1 if one failed or did not finish.

    A stage that fails is recorded and the others go on. ``summary.json`` is written before and after each stage;
    stages of an earlier run in the same folder that are not run again keep their entries.
    """
    start = clock()
    end = start + 60 * options.minutes
    path = options.folder / "summary.json"
    earlier = read_json(path).get("stages", {}) if options.resume else {}
    stages: dict[str, object] = {name: earlier[name] for name in STAGES if name in earlier}
    outcomes: dict[str, Outcome] = {}

    def save(status: str) -> None:
        write_json(
            path,
            {
                "status": status,
                "dry_run": options.dry_run,
                "options": options.as_json(),
                "seconds": round(clock() - start, 1),
                "stages": {name: stages[name] for name in STAGES if name in stages},
            },
        )

    chosen = [name for name in STAGES if name in options.stages]
    for name in chosen:
        stages[name] = Outcome("running").as_json()
        save("running")
        seconds = seconds_for(name, options, end - clock())
        begun = clock()
        if seconds <= 0:
            outcome = Outcome(TIMEOUT, "no time was left")
        else:
            say(f"=== {name} (at most {seconds:.0f} s)")
            try:
                outcome = execute(name, options, seconds)
            except Exception as error:  # whatever happens to one stage, the others run
                outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
        outcomes[name] = outcome
        stages[name] = outcome.as_json() | {"seconds": round(clock() - begun, 1)}
        say(f"=== {name}: {outcome.status} in {clock() - begun:.0f} s. {outcome.message}")
        save("running")
    bad = [name for name, outcome in outcomes.items() if outcome.status not in (PASSED, SKIPPED)]
    save("failed" if bad else "passed")
    say(f"{'FAILED: ' + ', '.join(bad) if bad else 'everything is fine'}; results are in {options.folder}")
    return EXIT_FAILED if bad else EXIT_OK


def in_process(stage: str, options: Options, seconds: float) -> Outcome:
    """The stage in this process."""
    from bench.gpu.stages import RUN

    return RUN[stage](options, time.monotonic() + seconds)


def in_subprocess(
    stage: str, options: Options, seconds: float, *, patience: float = 150.0, say: Callable[[str], None] = print
) -> Outcome:
    """The stage in a process of its own, ended after ``seconds`` (and a little).

    The benchmark's process is started again, behind the measurement that ended it, as long as there is time; one that
    writes no row for ``patience`` seconds is taken to hang.
    """
    end = time.monotonic() + seconds
    job, answer = options.folder / "logs" / f"{stage}.job.json", options.folder / "logs" / f"{stage}.json"
    restarts = 0
    while True:
        log = options.folder / "logs" / f"{stage}{restarts or ''}.log"
        answer.unlink(missing_ok=True)
        left = end - time.monotonic()
        resume = options.as_json() | ({"resume": True} if restarts else {})
        write_json(job, {"options": resume, "seconds": left})
        command = [sys.executable, "-m", "bench.gpu.worker", stage, str(job), str(answer)]
        rows_file = options.folder / "layers.csv" if stage == "benchmark" else None
        code = run_command(command, log, left + 10, progress=rows_file, patience=patience if rows_file else math.inf)
        found = read_json(answer)
        if found:
            return Outcome(
                found.pop("status"), found.pop("message"), found | ({"restarts": restarts} if restarts else {})
            )
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        reason = "did not end in time" if code is None else f"its process exited {code}"
        rows = read_rows(options.folder / "layers.csv") if stage == "benchmark" else []
        if not rows or restarts == 8 or end - time.monotonic() < 30:
            return Outcome(TIMEOUT if code is None else FAILED, f"{reason}; see {log.name}", {"tail": tail})
        restarts += 1
        say(f"benchmark: {reason}; going on behind the measurement that ended it")

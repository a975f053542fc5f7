"""One stage in its own process: ``python -m bench.gpu.worker STAGE JOB.json ANSWER.json``, started by the program.

``--exercise DEVICE DTYPE...`` calls every op once: what compute-sanitizer is put over.
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from bench.gpu.files import read_json, write_json
from bench.gpu.options import FAILED, Options, Outcome
from bench.gpu.stages import RUN, exercise


def main(arguments: list[str]) -> int:
    """Run what the arguments say; 0 unless something could not even be recorded."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if arguments[0] == "--exercise":
        return exercise(arguments[1], arguments[2:])
    stage, job, answer = arguments
    begun = time.monotonic()
    given = read_json(Path(job))
    try:
        outcome = RUN[stage](Options.from_json(given["options"]), begun + given["seconds"])
    except Exception as error:
        if stage == "benchmark":
            raise  # no answer: the program starts it again behind the measurement that failed
        traceback.print_exc()
        outcome = Outcome(FAILED, f"{type(error).__name__}: {error}"[:500])
    write_json(Path(answer), outcome.as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

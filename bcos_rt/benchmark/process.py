"""The driver's side of a worker process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bcos_rt.benchmark.contender import UnsupportedError

__all__ = ["Worker", "WorkerError"]

# Libraries read the number of threads from these when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TAIL = 300  # characters of a worker's log that go into an error


class WorkerError(Exception):
    """A worker failed, ended, or took too long; the message says which."""


class Worker:
    """A process that answers requests, and can be stopped while others are being timed.

    Args:
        threads: threads of one operation in it.
        log: where what it prints goes.
        paths: folders to import from, before the usual ones.
        environment: variables to set in it.
    """

    def __init__(
        self, threads: int, log: Path, paths: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        variables = {**os.environ, **dict.fromkeys(_THREADS, str(threads)), **(environment or {})}
        if paths:
            variables["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with open(log, "ab") as stderr:
            # A session of its own: a signal for it then reaches the processes it starts (compilers), too.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bcos_rt.benchmark.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=variables,
                text=True,
                start_new_session=os.name == "posix",
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        if self._process.stdout is not None:
            # The pipe is closed under this thread when the worker is.
            with contextlib.suppress(ValueError, OSError):
                for line in self._process.stdout:
                    self._lines.put(line)
        self._lines.put(None)

    def ask(self, do: str, timeout: float = 1800.0, /, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            UnsupportedError: the contender cannot do what was asked.
            WorkerError: it failed, ended, or took longer than ``timeout`` seconds; in the last two cases it is closed.
        """
        try:
            if self._process.stdin is None:
                raise BrokenPipeError
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer to {do!r} within {timeout:.0f} s") from None
        except (OSError, ValueError):
            line = None
        if line is None:
            code = self._process.poll()
            self.close()
            raise WorkerError(f"the process ended during {do!r} (exit code {code}): {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise (UnsupportedError if answer.get("unsupported") else WorkerError)(answer["error"])
        return answer

    def _tail(self) -> str:
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return " ".join(text[-TAIL:].split())

    def suspend(self) -> None:
        """Stop it: threads that spin while they wait for work would take time from whoever is measured."""
        self._signal("SIGSTOP")

    def resume(self) -> None:
        """Let it go on."""
        self._signal("SIGCONT")

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:  # Windows has neither
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, getattr(signal, name))

    def close(self) -> None:
        """End it, whatever it does."""
        self._signal("SIGKILL")
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

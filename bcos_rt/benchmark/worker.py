"""The process of one contender: ``python -m bcos_rt.benchmark.worker``, asked in JSON lines on stdin.

Requests are objects with ``"do"``; each gets one line of JSON on stdout, ``{"error": ...}`` where it failed:

======== ======================================= =====================================================================
do       with                                    answer
======== ======================================= =====================================================================
call     function, arguments                     what ``package.module:function`` returns; for preparing files
load     factory, options, setting               seconds
prepare  mode                                    seconds to build, seconds of first and second call, differences, facts
time     mode, calls                             seconds of each of ``calls`` calls, after one that is not counted
memory   mode, calls                             bytes: loaded, ready, peak of preparing, peak of running
======== ======================================= =====================================================================
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from bcos_rt.benchmark import memory
from bcos_rt.benchmark.contender import Contender, Prepared, Setting, UnsupportedError

__all__ = ["differences", "main", "resolve"]

PR_SET_PDEATHSIG = 1


def resolve(name: str) -> Any:
    """The object called ``package.module:attribute``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def differences(answer: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """How far results are from expected ones.

    Returns:
        ``error_logits``, ``error_weights``, ``error_map``: the largest difference relative to the largest expected
        magnitude; ``cosine_map``: the smallest cosine of an image's contribution map with the expected one;
        ``other_class``: images of another top class, whose W and maps are not compared. Entries that one side lacks
        are left out.
    """
    import numpy as np

    found: dict[str, float] = {}
    logits, wanted = (np.asarray(x["logits"], dtype=np.float64) for x in (answer, expected))
    found["error_logits"] = _error(logits, wanted)
    same = logits.argmax(1) == wanted.argmax(1)
    single = "contributions" in expected and np.ndim(expected["contributions"]) == 3
    if not single:
        same = np.ones_like(same)
    for name, column in (("weights", "error_weights"), ("contributions", "error_map")):
        if name not in answer or name not in expected:
            continue
        found["other_class"] = float((~same).sum())
        ours, theirs = (np.asarray(x[name], dtype=np.float64)[same] for x in (answer, expected))
        if not same.any():
            continue
        found[column] = _error(ours, theirs)
        if name == "contributions" and ours.shape == theirs.shape:
            a, b = (v.reshape(-1, v.shape[-2] * v.shape[-1]) for v in (ours, theirs))
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            found["cosine_map"] = float(((a * b).sum(1) / np.maximum(lengths, 1e-300)).min())
    return found


def _error(actual: Any, expected: Any) -> float:
    import numpy as np

    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-300))


class _Worker:
    """The state between requests."""

    def __init__(self) -> None:
        self.contender: Contender | None = None
        self.ready: dict[str, Prepared] = {}
        self.loaded: int | None = None

    def do(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        action: Callable[[Mapping[str, Any]], dict[str, Any]] = {
            "call": self._call,
            "load": self._load,
            "prepare": self._prepare,
            "time": self._time,
            "memory": self._memory,
        }[request["do"]]
        return action(request)

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"result": resolve(request["function"])(**request["arguments"])}

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        setting = Setting.from_json(request["setting"])
        if "torch" in sys.modules:
            _set_threads(setting.threads)
        contender: Contender = resolve(request["factory"])(setting, request["options"])
        contender.load()
        if "torch" in sys.modules:
            _set_threads(setting.threads)
        self.contender = contender
        seconds = time.perf_counter() - start
        memory.trim()
        self.loaded = memory.resident()
        return {"load_s": seconds}

    def _prepare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.contender is None:
            raise RuntimeError("prepare before load")
        mode = request["mode"]
        times = [time.perf_counter()]
        prepared = self.contender.prepare(mode)
        result = None
        for _ in range(3):
            times.append(time.perf_counter())
            result = prepared.run()
        times.append(time.perf_counter())
        answer = {"build_s": times[1] - times[0], "first_s": times[2] - times[1], "call_s": times[4] - times[3]}
        self.ready[mode] = prepared
        found: dict[str, float] = {}
        if prepared.reference and request.get("check", True):
            got = prepared.answer(result)
            names = ("logits", "weights", "contributions")
            kept = self.contender.setting.arrays(*(f"{prepared.reference}.{n}" for n in names))
            expected = {name.partition(".")[2]: value for name, value in kept.items()}
            found = differences(got, expected)
        return answer | {"differences": found, "facts": dict(prepared.facts)}

    def _time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        run = self.ready[request["mode"]].run
        gc.collect()
        gc.disable()
        try:
            run()
            times = []
            for _ in range(request["calls"]):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        finally:
            gc.enable()
        return {"seconds": times}

    def _memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.contender is None:
            raise RuntimeError("memory before load")
        mode = request["mode"]
        memory.reset_peak()
        prepared = self.contender.prepare(mode)
        prepared.run()
        preparing = memory.peak()
        memory.trim()
        ready = memory.resident()
        separate = memory.reset_peak()
        for _ in range(request["calls"]):
            prepared.run()
        running = memory.peak()
        return {
            "loaded": None if self.loaded is None else self.loaded + self.contender.weight_bytes(),
            "ready": ready,
            "peak_preparing": preparing,
            "peak_running": running,
            # Without it (macOS) the peak of running may be that of preparing.
            "separate": separate,
        }


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _die_with_parent() -> None:
    """Have the kernel end this process with its driver: a stopped one would not notice (Linux)."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        except (OSError, AttributeError):
            return


def main() -> None:
    """Answer requests until stdin ends."""
    _die_with_parent()
    # Libraries print to stdout: the answers get a copy of it to themselves, and stdout goes where stderr goes.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        try:
            answer = worker.do(json.loads(line))
        except UnsupportedError as error:
            answer = {"error": str(error), "unsupported": True}
        except Exception as error:  # whatever goes wrong in a contender belongs in its row
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

"""Timers: of a GPU, and one that only counts calls (dry runs)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["CallCounter", "DeviceTimer", "Timer", "Timing", "sm_clock"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        ms: the median, device time alone where ``how`` is "graph".
        low, high: the 20th and 80th percentile.
        launched_ms: the median with Python launching every kernel, as an eager caller sees it.
        how: "graph" (replays of a CUDA graph), "eager" (it could not be captured), "none" (nothing was measured).
        note: why it could not be captured.
    """

    ms: float | None
    low: float | None
    high: float | None
    launched_ms: float | None
    how: str
    note: str = ""


class Timer(Protocol):
    """Times a function without arguments."""

    def __call__(self, run: Callable[[], Any]) -> Timing:
        """Time ``run``."""


class DeviceTimer:
    """``triton.testing.do_bench``: the median over repeated calls, the L2 cache flushed before each.

    A function of several small kernels can take longer to launch than to run. So it is timed twice: launched from
    Python, and as a CUDA graph, in which only the device counts.
    """

    def __init__(self, warmup_ms: int = 10, measure_ms: int = 30) -> None:
        self.warmup_ms, self.measure_ms = warmup_ms, measure_ms

    def __call__(self, run: Callable[[], Any]) -> Timing:
        """Time ``run``; errors of ``run`` itself are passed on."""
        launched = self._quantiles(run)
        try:
            graph = captured(run)
        except Exception as error:  # what cannot be captured is told by many kinds of errors
            torch.cuda.synchronize()
            return Timing(*launched, launched[0], "eager", f"{type(error).__name__}: {error}"[:200])
        return Timing(*self._quantiles(graph.replay), launched[0], "graph")

    def _quantiles(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=self.warmup_ms, rep=self.measure_ms, quantiles=[0.5, 0.2, 0.8])
        return median, low, high


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """``run`` as a CUDA graph, captured after three calls on a side stream (libraries set themselves up in them)."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    return graph


class CallCounter:
    """Calls the function and measures nothing: on a CPU, and in an interpreter, a time would mean nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, run: Callable[[], Any]) -> Timing:
        """Call ``run`` once."""
        run()
        self.calls += 1
        return Timing(None, None, None, None, "none")


def sm_clock() -> float | None:
    """The first GPU's present SM clock in MHz, None if nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None

"""Times of a function without arguments, and the most this machine does in a copy and in a matrix product."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["FULL", "QUICK", "Budget", "Ceilings", "time_blocks"]


@dataclass(frozen=True)
class Budget:
    """How long one function is timed.

    Attributes:
        passes: times that all functions are gone through, each with blocks of its own: a phase in which the machine is
            slow then meets every function in one pass, not one function in all of its blocks.
        warmup_s: seconds of calls before the blocks of a pass; at least two calls.
        block_s: a block holds as many calls as take this long, at least one.
        blocks: at least, in a pass.
        least_s: of all blocks of a pass together, at least.
        gemm_side: of the square matrices of the matrix product.
    """

    passes: int
    warmup_s: float
    block_s: float
    blocks: int
    least_s: float
    gemm_side: int


FULL = Budget(passes=3, warmup_s=0.015, block_s=0.004, blocks=5, least_s=0.04, gemm_side=2048)
QUICK = Budget(passes=1, warmup_s=0.002, block_s=0.001, blocks=3, least_s=0.005, gemm_side=512)


def time_blocks(run: Callable[[], Any], budget: Budget, device: str) -> list[float]:
    """Seconds of one call, a value a block: the block's time by its calls.

    On the CPU by the clock. On CUDA by events before and after a block's launches: a kernel that is shorter than its
    launch from Python shows the launch.
    """
    block = _cuda_block if device == "cuda" else _cpu_block
    begin, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - begin < budget.warmup_s:
        block(run, 1)
        calls += 1
    one = min(block(run, 1) for _ in range(2))
    calls = max(1, math.ceil(budget.block_s / max(one, 1e-7)))
    seconds: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(seconds) < budget.blocks or sum(seconds) * calls < budget.least_s:
            seconds.append(block(run, calls) / calls)
    finally:
        if collecting:
            gc.enable()
    return seconds


def _cpu_block(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - begin


def _cuda_block(run: Callable[[], Any], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Ceilings:
    """The most that was reached, in the fastest block of all looks, with the device's present number of threads.

    Attributes:
        copies: GB/s of a copy, by the bytes it moves.
        products: GFLOP/s of a matrix product, by dtype.
    """

    def __init__(self, budget: Budget, device: str) -> None:
        self.budget, self.device = budget, device
        self.copies: dict[int, float] = {}
        self.products: dict[torch.dtype, float] = {}

    def look_at_copy(self, size: int) -> None:
        """Time a copy that moves ``size`` bytes: half of them read, half written, the same memory every time.

        So a copy that fits in a cache runs in that cache, as a kernel does whose operands fit.
        """
        # Written once: pages that were only asked for are all the same empty one.
        source = torch.ones(max(1, size // 8), device=self.device)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * source.element_size()
        reached = moved / self._fastest(lambda: target.copy_(source)) / 1e9
        self.copies[size] = max(reached, self.copies.get(size, 0.0))

    def look_at_gemm(self, dtype: torch.dtype) -> None:
        """Time ``torch.mm`` of two large square matrices."""
        side = self.budget.gemm_side
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        reached = 2 * side**3 / self._fastest(lambda: torch.mm(a, b, out=out)) / 1e9
        self.products[dtype] = max(reached, self.products.get(dtype, 0.0))

    def _fastest(self, run: Callable[[], Any]) -> float:
        with torch.inference_mode():
            return min(time_blocks(run, self.budget, self.device))

"""Cases as rows of a table: times, and how much of this machine's copy and matrix product they reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from bcos_rt.benchmark import machine
from bcos_rt.benchmark.comparison import quartiles
from bcos_rt.benchmark.kernels.cases import Spec
from bcos_rt.benchmark.kernels.timing import Ceilings, time_blocks
from bcos_rt.kernels import cpu

__all__ = ["COLUMNS", "DTYPES", "about_device", "measure"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = (
    "op", "variant", "network", "shape", "batch", "dtype", "device", "machine", "isa", "threads",
    # Microseconds of a call: of our kernel, then the median of the same in PyTorch op by op.
    "median_us", "q1_us", "q3_us", "reference_us", "speedup",
    # What the op must move and compute at least, and how fast it did.
    "bytes", "flops", "gb_s", "gflop_s",
    # Of a copy of as many bytes, and of a large matrix product, on this machine in the same run.
    "copy_gb_s", "gemm_gflop_s", "share_copy", "share_gemm",
)  # fmt: skip


def about_device(device: str) -> dict[str, Any]:
    """The columns that are the same in every row: device, machine, instruction set, threads."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name, isa = torch.cuda.get_device_name(), f"sm_{major}{minor}"
    else:
        name, isa = machine.cpu_model(), cpu.isa()
    return {"device": device, "machine": name, "isa": isa, "threads": torch.get_num_threads()}


def measure(
    work: Sequence[tuple[Spec, str]],
    batch: int,
    device: str,
    ceilings: Ceilings,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[dict[str, Any]]:
    """One row for each case and dtype ("fp32", "bf16"), in that order.

    Args:
        ceilings: how long to measure; looked at again in every pass.
        track: given what is to be done, gives it back one by one.
    """
    budget = ceilings.budget
    ours: list[list[float]] = [[] for _ in work]
    plain: list[list[float]] = [[] for _ in work]
    counts: list[tuple[int, int]] = [(0, 0) for _ in work]
    looked: set[int] = set()
    for i in track([*range(len(work))] * budget.passes):
        spec, name = work[i]
        if i == 0:
            looked.clear()
            for one in dict.fromkeys(name for _, name in work):
                ceilings.look_at_gemm(DTYPES[one])
        case = spec.make(DTYPES[name], device)
        with torch.inference_mode():
            counts[i] = case.bytes(case.run()), case.flops
            ours[i] += time_blocks(case.run, budget, device)
            plain[i] += time_blocks(case.plain, budget, device)
        if counts[i][0] not in looked:
            ceilings.look_at_copy(counts[i][0])
            looked.add(counts[i][0])
    same = {"batch": batch, **about_device(device)}
    return [_row(*work[i], same, ours[i], plain[i], counts[i], ceilings) for i in range(len(work))]


def _row(
    spec: Spec,
    dtype: str,
    same: Mapping[str, Any],
    ours: Sequence[float],
    plain: Sequence[float],
    counts: tuple[int, int],
    ceilings: Ceilings,
) -> dict[str, Any]:
    (low, middle, high), reference = quartiles(ours), quartiles(plain)[1]
    size, flops = counts
    gb_s, gflop_s = size / middle / 1e9, flops / middle / 1e9
    copy, gemm = ceilings.copies[size], ceilings.products[DTYPES[dtype]]
    return {
        "op": spec.op, "variant": spec.variant, "network": spec.layer.name, "shape": spec.shape, "dtype": dtype,
        **same, "median_us": 1e6 * middle, "q1_us": 1e6 * low, "q3_us": 1e6 * high, "reference_us": 1e6 * reference,
        "speedup": reference / middle, "bytes": size, "flops": flops, "gb_s": gb_s, "gflop_s": gflop_s,
        "copy_gb_s": copy, "gemm_gflop_s": gemm, "share_copy": gb_s / copy, "share_gemm": gflop_s / gemm,
    }  # fmt: skip

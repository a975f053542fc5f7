"""Cases as rows of a table: times, and how much of this machine's copy and matrix product they reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from bcos_rt.benchmark import machine
from bcos_rt.benchmark.comparison import quartiles
from bcos_rt.benchmark.kernels.cases import Spec
from bcos_rt.benchmark.kernels.timing import Budget, Ceilings, time_blocks
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
    specs: Iterable[tuple[Spec, str]], batch: int, device: str, budget: Budget, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """One row for each case and dtype ("fp32", "bf16"), as soon as it is measured."""
    same = about_device(device)
    for spec, name in specs:
        dtype = DTYPES[name]
        with torch.inference_mode():
            case = _made(spec, dtype, device)
            size = case.bytes(case.run())
            seconds = time_blocks(case.run, budget, device)
            reference = quartiles(time_blocks(case.plain, budget, device))[1]
        low, middle, high = quartiles(seconds)
        gb_s, gflop_s = size / middle / 1e9, case.flops / middle / 1e9
        copy, gemm = ceilings.copy_gb_s(size), ceilings.gemm_gflop_s(dtype)
        yield {
            "op": spec.op, "variant": spec.variant, "network": spec.layer.name, "shape": spec.shape, "batch": batch,
            "dtype": name, **same, "median_us": 1e6 * middle, "q1_us": 1e6 * low, "q3_us": 1e6 * high,
            "reference_us": 1e6 * reference, "speedup": reference / middle, "bytes": size, "flops": case.flops,
            "gb_s": gb_s, "gflop_s": gflop_s, "copy_gb_s": copy, "gemm_gflop_s": gemm, "share_copy": gb_s / copy,
            "share_gemm": gflop_s / gemm,
        }  # fmt: skip


def _made(spec: Spec, dtype: torch.dtype, device: str) -> Any:
    # Tracing an op into a program is no place for tensors of inference mode.
    with torch.inference_mode(False):
        return spec.make(dtype, device)

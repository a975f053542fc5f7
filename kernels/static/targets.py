"""The GPUs that the kernels are compiled for: limits that occupancy depends on, and peak rates from data sheets.

Sources. Limits per multiprocessor: CUDA C++ Programming Guide 13.0, table "Technical Specifications per Compute
Capability" (8.0, 9.0, 10.0, 12.0), and AMD "Instinct MI300 / CDNA3 ISA Reference Guide" (512 VGPRs of 64 lanes per
SIMD, architectural and accumulation registers together; 4 SIMDs, 64 KB of LDS per compute unit; 8 wavefronts per SIMD).
Rates (dense, no sparsity, fp32 accumulation): each entry's ``source``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """One GPU.

    Attributes:
        arch: "sm_90", "gfx942", ...
        device: the product whose numbers these are.
        multiprocessors: streaming multiprocessors, on AMD compute units.
        registers_per_sm: 32-bit registers.
        shared_per_sm, shared_per_block: bytes of shared memory (LDS); a block may ask for less than there is.
        shared_reserved: bytes the system takes of every block's shared memory.
        max_warps, max_blocks: resident per multiprocessor.
        max_registers: per thread.
        warp_size: threads of a warp (wavefront).
        clock_ghz: the clock at which ``tflops`` are stated.
        bandwidth_gb_s: of the device memory, in 10^9 bytes per second.
        tflops: dense peak in 10^12 operations per second (a multiply-add is two): "fp16", "bf16" and "tf32" of the
            matrix units with fp32 accumulation; "fp32" is what a float32 product of full accuracy reaches: a third of
            tf32 on NVIDIA (``tf32x3``), the fp32 matrix instructions on AMD.
        source: where clock, bandwidth and rates are from.
    """

    arch: str
    device: str
    multiprocessors: int
    registers_per_sm: int
    shared_per_sm: int
    shared_per_block: int
    shared_reserved: int
    max_warps: int
    max_blocks: int
    max_registers: int
    warp_size: int
    clock_ghz: float
    bandwidth_gb_s: float
    tflops: Mapping[str, float]
    source: str

    @property
    def nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    def triton_target(self) -> Any:
        """The ``GPUTarget`` that Triton compiles for."""
        if self.nvidia:
            return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), self.warp_size)
        return GPUTarget("hip", self.arch, self.warp_size)

    def blocks_per_sm(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Blocks resident on one multiprocessor; 0 if not even one fits.

        Registers are handed out per warp, in portions of 256 (on AMD 8 per lane), out of one of four equal files, each
        serving a quarter of the warps.
        """
        portion = 256 // self.warp_size if self.nvidia else 8
        per_warp = -(-max(registers, 1) // portion) * portion * self.warp_size
        warps_per_quarter = min(self.max_warps // 4, self.registers_per_sm // 4 // per_warp)
        blocks = warps_per_quarter * 4 // num_warps if num_warps < 4 else warps_per_quarter // (-(-num_warps // 4))
        if shared_bytes > self.shared_per_block:
            return 0
        shared = shared_bytes + self.shared_reserved
        by_shared = self.shared_per_sm // shared if shared else self.max_blocks
        return min(self.max_blocks, blocks, by_shared)

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int) -> float:
        """Resident warps, as a part of those that the multiprocessor has room for, 0 to 1."""
        return self.blocks_per_sm(registers, shared_bytes, num_warps) * num_warps / self.max_warps


_KB = 1024

TARGETS: dict[str, Target] = {
    target.arch: target
    for target in (
        Target(
            "sm_80", "NVIDIA A100 SXM 80 GB", 108, 65536, 164 * _KB, 163 * _KB, _KB, 64, 32, 255, 32, 1.41, 2039.0,
            {"fp16": 312.0, "bf16": 312.0, "tf32": 156.0, "fp32": 52.0},
            "NVIDIA A100 Tensor Core GPU data sheet (June 2021); boost clock from the Ampere architecture white paper",
        ),
        Target(
            "sm_90", "NVIDIA H100 SXM 80 GB", 132, 65536, 228 * _KB, 227 * _KB, _KB, 64, 32, 255, 32, 1.83, 3350.0,
            {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 164.9},
            "NVIDIA H100 Tensor Core GPU data sheet and Hopper architecture white paper (1.83 GHz is its clock for "
            "tensor-core rates)",
        ),
        Target(
            "sm_100", "NVIDIA B200", 148, 65536, 228 * _KB, 227 * _KB, _KB, 64, 32, 255, 32, 1.86, 7700.0,
            {"fp16": 2250.0, "bf16": 2250.0, "tf32": 1125.0, "fp32": 375.0},
            "NVIDIA HGX B200 data sheet, rates per GPU (half of the sparse ones); clock as these rates imply",
        ),
        Target(
            "sm_120", "NVIDIA RTX 5090", 170, 65536, 100 * _KB, 99 * _KB, _KB, 48, 24, 255, 32, 2.41, 1792.0,
            {"fp16": 209.5, "bf16": 209.5, "tf32": 104.8, "fp32": 34.9},
            "NVIDIA RTX Blackwell GPU architecture white paper, table of the GeForce RTX 5090",
        ),
        Target(
            "gfx942", "AMD Instinct MI300X", 304, 131072, 64 * _KB, 64 * _KB, 0, 32, 32, 512, 64, 2.1, 5300.0,
            {"fp16": 1307.4, "bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},
            "AMD Instinct MI300X data sheet",
        ),
    )
}  # fmt: skip

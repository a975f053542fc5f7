"""Occupancy against numbers worked out by hand from the programming guides."""

from __future__ import annotations

import pytest

from bcos_rt.kernels.static.targets import TARGETS


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        # 65536 registers / (64 * 32 * 4) = 8 blocks of four warps: 32 of 64 warps.
        ("sm_80", 64, 0, 4, 8),
        # 33 registers are handed out as 40: 1280 a warp, 12 warps a quarter.
        ("sm_80", 33, 0, 4, 12),
        # 228 KB / (98432 bytes + 1 KB) = 2.3.
        ("sm_90", 100, 98432, 8, 2),
        ("sm_90", 255, 98432, 8, 1),
        ("sm_90", 16, 0, 1, 32),
        # 48 warps, 24 blocks.
        ("sm_120", 32, 0, 1, 24),
        ("sm_120", 32, 0, 4, 12),
        # More than a block may have.
        ("sm_120", 32, 100 * 1024, 4, 0),
        # 512 registers per lane and SIMD: 128 let four wavefronts in.
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 129, 0, 4, 3),
        ("gfx942", 64, 32896, 8, 1),
    ],
)
def test_blocks_per_multiprocessor(arch: str, registers: int, shared: int, warps: int, blocks: int):
    target = TARGETS[arch]
    assert target.blocks_per_sm(registers, shared, warps) == blocks
    assert target.occupancy(registers, shared, warps) == pytest.approx(blocks * warps / target.max_warps)


@pytest.mark.parametrize("arch", TARGETS)
def test_rates_follow_from_units_and_clock(arch: str):
    # Matrix units do a power of two of operations per clock and multiprocessor.
    target = TARGETS[arch]
    per_clock = target.tflops["bf16"] * 1e3 / (target.multiprocessors * target.clock_ghz)
    assert min(abs(per_clock / 2**e - 1) for e in range(8, 15)) < 0.01
    assert target.tflops["fp16"] == target.tflops["bf16"] > target.tflops["tf32"] > target.tflops["fp32"]

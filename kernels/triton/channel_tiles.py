"""Tiles of the memory-bound kernels: places times channels, cut so that a tile's sums of squares belong to groups.

A kernel that reads and writes images sees [places, C]. Programs along the grid's first axis share out the places, along
its second the channels, ``PARTS`` parts of up to ``WIDTH`` each: a part is a group, or one of the ``chunks`` of
``MAP_COLUMNS`` channels that a wider group is cut into. Each part is one entry of the map of sums of squares::

    squares[place, part] = sum over the part's channels of y[place, c]^2        (fp32, y as rounded)
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.reference import MAP_COLUMNS, map_entries
from bcos_rt.kernels.triton.common import unit
from bcos_rt.kernels.triton.launch import Config, current_arch

__all__ = [
    "ELEMENTS",
    "channel_tile",
    "place_tile",
    "store_squares",
    "tile_arguments",
    "total_channels",
    "vector_elements",
]

# Widest tile of channels, and elements of a tile: with 4 warps 16 a thread, two 128-bit accesses of 16-bit values.
_WIDEST = 256
ELEMENTS = 2048


@triton.jit
def total_channels(units, groups, UNIT: tl.constexpr, EXACT: tl.constexpr):
    """C, as a product with a compile-time unit: this is how the compiler knows that 128-bit accesses are aligned."""
    return units * UNIT if EXACT else units * UNIT * groups


@triton.jit
def channel_tile(
    units, groups, chunks, UNIT: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """The channels [PARTS * WIDTH] of this program's tile, and which of them exist."""
    lane = tl.arange(0, PARTS * WIDTH)
    if EXACT:
        # Parts fill their columns of the tile (but the last of a single group): channels follow each other.
        channel = tl.program_id(1) * (PARTS * WIDTH) + lane
        inside = channel < units * UNIT
    else:
        size = units * UNIT
        part = tl.program_id(1) * PARTS + lane // WIDTH
        within = (part % chunks) * WIDTH + lane % WIDTH
        channel = (part // chunks) * size + within
        inside = (within < size) & (part < groups * chunks)
    return channel, inside


@triton.jit
def store_squares(
    y,
    squares_ptr,
    places,
    place_in,
    channel_in,
    parts,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the sums of squares of a tile y [BLOCK_M, PARTS * WIDTH], already rounded to storage, fp32 again."""
    # Outside there may be anything: the -inf of an empty window, the activation of a missing shift.
    y = tl.where(channel_in[None, :], y, 0.0)
    sums = tl.sum(tl.reshape(y * y, (BLOCK_M, PARTS, WIDTH)), 2)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    mask = place_in[:, None] & (part < parts)[None, :]
    tl.store(squares_ptr + places[:, None] * parts + part[None, :], sums, mask=mask)


def _part(channels: int, groups: int) -> tuple[int, int]:
    """Columns that a part takes in a tile, and parts of a group."""
    if groups < 1 or channels % groups:
        raise InvalidArgumentError("groups", groups, f"a divisor of the {channels} channels")
    size = channels // groups
    return min(triton.next_power_of_2(size), MAP_COLUMNS), map_entries(size)


def place_tile(channels: int, groups: int = 1, elements: int = ELEMENTS) -> Config:
    """The tile of a kernel that touches each element once: as many channels as fit, then places."""
    width, chunks = _part(channels, groups)
    # Parts share a tile, so that neighbouring threads read neighbouring channels of small groups as well.
    width *= min(triton.next_power_of_2(groups * chunks), _WIDEST // width)
    return Config(max(elements // width, 1), width)


def vector_elements(x: Tensor) -> int:
    """Elements of a tile that is one 128-bit vector for each thread of 4 warps."""
    threads = 4 * (64 if current_arch(x.device).startswith("gfx") else 32)
    return threads * 16 // x.element_size()


def tile_arguments(channels: int, groups: int, tile: Config) -> tuple[int, int, dict[str, Any]]:
    """How ``tile.block_n`` columns are shared out: programs along the channels, parts of the map, kernel arguments.

    Raises:
        InvalidArgumentError: ``groups`` does not divide ``channels``.
    """
    width, chunks = _part(channels, groups)
    parts = groups * chunks
    in_tile = min(max(tile.block_n // width, 1), triton.next_power_of_2(parts))
    exact = groups == 1 or chunks * width == channels // groups
    whole = channels if exact else channels // groups
    arguments = {
        "units": whole // unit(whole),
        "groups": groups,
        "chunks": chunks,
        "UNIT": unit(whole),
        "EXACT": exact,
        "PARTS": in_tile,
        "WIDTH": width,
        "BLOCK_M": tile.block_m,
    }
    return -(-parts // in_tile), parts, arguments

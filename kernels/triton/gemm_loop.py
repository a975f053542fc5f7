"""The main loop every matrix-multiplying kernel shares: an implicit GEMM over kernel places and channels.

Nothing of the B-cos transform is in it, which is the point: norms come out of the sum-of-squares map in the epilogue,
so that a B-cos convolution has a plain convolution's main loop, instruction for instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["implicit_gemm", "inside_bits", "swizzle"]


@triton.jit
def swizzle(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (row, column) of this program: ``GROUP_M`` row tiles before the next column, to share operands in L2."""
    program = tl.program_id(0)
    per_group = GROUP_M * tiles_n
    group = program // per_group
    first = group * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    inside = program - group * per_group
    return first + inside % size, inside // size


@triton.jit
def inside_bits(first, step, taps, size):
    """Bit i of each: whether ``first + i step`` lies in [0, size); ``step > 0``, ``taps <= 31``; int32.

    In closed form: a loop here would tie its result to one data layout, and the main loop would move it to another,
    through shared memory, in every iteration.
    """
    begin = tl.minimum(tl.maximum(-first + step - 1, 0) // step, taps)
    end = tl.minimum(tl.maximum(size - first + step - 1, 0) // step, taps)
    return ((1 << end) - 1) & (-1 << begin)


@triton.jit
def implicit_gemm(
    x_ptr,
    weight_ptr,
    row_offset,
    inside_h,
    inside_w,
    w,
    column_offset,
    width,
    x_stride,
    channels,
    taps_h,
    taps_w,
    step_h,
    step_w,
    weight_step_h,
    weight_step_w,
    CHECK: tl.constexpr,
    EVEN_K: tl.constexpr,
    FOLD: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc[m, n] = sum_(i, j, c) x[h_m + i step_h, w_m + j step_w, c] * weight[i, j, c, n]``, zeros outside x; fp32.

    Args:
        row_offset: [BLOCK_M], offset of each row's first place in x.
        inside_h, inside_w: [BLOCK_M], :func:`inside_bits` along both axes (CHECK). w: its column (FOLD).
        column_offset: [BLOCK_N], offset of each column in the weight, whose innermost dimension is the sum's.
        x_stride: elements from one place of x to the next.
        channels: length of the innermost sum; taps_h, taps_w: how many places.
        weight_step_h, weight_step_w: weight elements from one place to the next.
        CHECK: places may lie outside x. EVEN_K: BLOCK_K divides ``channels``.
        SINGLE: one place only, so that there is nothing to count but channels.
        FOLD: not 0: x's channels; ``channels`` then runs over the places of one kernel row and their channels, which
            are contiguous in x (taps_w = 1), so that few channels, as in a stem, still fill a tile.

    The places are counted up by hand (c, then j, then i): a division per iteration costs 20 more instructions. Which of
    them lie inside x is worked out before the loop, which then only shifts and tests a bit.
    """
    offsets_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_rows = x_ptr + row_offset
    weight_columns = weight_ptr + column_offset
    blocks = tl.cdiv(channels, BLOCK_K)
    # How far the operands move from one block of channels to the next, from the last block of a place to the next
    # place, and how much further at the end of a kernel row.
    x_jump = step_w * x_stride - (blocks - 1) * BLOCK_K
    weight_jump = weight_step_w - (blocks - 1) * BLOCK_K
    x_row_jump = (step_h * width - taps_w * step_w) * x_stride
    weight_row_jump = weight_step_h - taps_w * weight_step_w
    c = 0
    j = 0
    i = 0
    x_delta = 0
    weight_delta = 0
    for _ in range(taps_h * taps_w * blocks):
        x_tile = (x_rows + x_delta)[:, None] + offsets_k[None, :]
        weight_tile = (weight_columns + weight_delta)[None, :] + offsets_k[:, None]
        if FOLD:
            k = c + offsets_k
            w_here = w[:, None] + (k // FOLD)[None, :]
            inside = (k < channels)[None, :] & (((inside_h >> i) & 1) != 0)[:, None]
            a = tl.load(x_tile, mask=inside & (w_here >= 0) & (w_here < width), other=0.0)
        elif CHECK:
            inside = ((inside_h >> i) & (inside_w >> j) & 1) != 0
            if EVEN_K:
                a = tl.load(x_tile, mask=inside[:, None], other=0.0)
            else:
                a = tl.load(x_tile, mask=inside[:, None] & (c + offsets_k < channels)[None, :], other=0.0)
        elif EVEN_K:
            a = tl.load(x_tile)
        else:
            a = tl.load(x_tile, mask=(c + offsets_k < channels)[None, :], other=0.0)
        if EVEN_K:
            b = tl.load(weight_tile)
        else:
            b = tl.load(weight_tile, mask=(c + offsets_k < channels)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        c += BLOCK_K
        if SINGLE:
            x_delta += BLOCK_K
            weight_delta += BLOCK_K
        else:
            place_done = c >= channels
            c = tl.multiple_of(tl.where(place_done, 0, c), BLOCK_K)
            x_delta += tl.where(place_done, x_jump, BLOCK_K)
            weight_delta += tl.where(place_done, weight_jump, BLOCK_K)
            j += tl.where(place_done, 1, 0)
            row_done = j >= taps_w
            j = tl.where(row_done, 0, j)
            i += tl.where(row_done, 1, 0)
            x_delta += tl.where(row_done, x_row_jump, 0)
            weight_delta += tl.where(row_done, weight_row_jump, 0)
    return acc

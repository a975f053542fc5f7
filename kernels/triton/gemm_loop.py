"""The main loop every matrix-multiplying kernel shares: an implicit GEMM over kernel places and channels.

Nothing of the B-cos transform is in it, which is the point: norms come out of the sum-of-squares map in the epilogue,
so that a B-cos convolution has a plain convolution's main loop, instruction for instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["implicit_gemm", "swizzle"]


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
def implicit_gemm(
    x_ptr,
    weight_ptr,
    row_offset,
    h,
    w,
    column_offset,
    height,
    width,
    x_stride,
    channels,
    taps_h,
    taps_w,
    step_h,
    step_w,
    weight_step_h,
    weight_step_w,
    weight_k_stride,
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
        row_offset, h, w: [BLOCK_M], offset of each row's first place in x (without channel), and its coordinates.
        column_offset: [BLOCK_N], offset of each column in the weight.
        x_stride: elements from one place of x to the next.
        channels: length of the innermost sum; taps_h, taps_w: how many places.
        weight_step_h, weight_step_w, weight_k_stride: weight elements from one place, one channel to the next.
        CHECK: places may lie outside x. EVEN_K: BLOCK_K divides ``channels``.
        SINGLE: one place only, so that there is nothing to count but channels.
        FOLD: not 0: x's channels; ``channels`` then runs over the places of one kernel row and their channels, which
            are contiguous in x (taps_w = 1), so that few channels, as in a stem, still fill a tile.

    The places are counted up by hand (c, then j, then i): a division per iteration costs 20 more instructions.
    """
    offsets_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_rows = x_ptr + row_offset
    weight_columns = weight_ptr + column_offset
    c = 0
    j = 0
    i_h = 0
    j_w = 0
    x_delta = 0
    weight_delta = 0
    for _ in range(taps_h * taps_w * tl.cdiv(channels, BLOCK_K)):
        x_tile = (x_rows + (x_delta + c))[:, None] + offsets_k[None, :]
        weight_tile = (weight_columns + (weight_delta + c * weight_k_stride))[None, :] + (offsets_k * weight_k_stride)[
            :, None
        ]
        if FOLD:
            k = c + offsets_k
            w_here = w[:, None] + (k // FOLD)[None, :]
            inside = (k < channels)[None, :] & (h + i_h >= 0)[:, None] & (h + i_h < height)[:, None]
            inside = inside & (w_here >= 0) & (w_here < width)
            a = tl.load(x_tile, mask=inside, other=0.0)
            b = tl.load(weight_tile, mask=(k < channels)[:, None], other=0.0)
        else:
            if CHECK:
                inside = (h + i_h >= 0) & (h + i_h < height) & (w + j_w >= 0) & (w + j_w < width)
                if EVEN_K:
                    a = tl.load(x_tile, mask=inside[:, None], other=0.0)
                    b = tl.load(weight_tile)
                else:
                    k_in = c + offsets_k < channels
                    a = tl.load(x_tile, mask=inside[:, None] & k_in[None, :], other=0.0)
                    b = tl.load(weight_tile, mask=k_in[:, None], other=0.0)
            else:
                if EVEN_K:
                    a = tl.load(x_tile)
                    b = tl.load(weight_tile)
                else:
                    k_in = c + offsets_k < channels
                    a = tl.load(x_tile, mask=k_in[None, :], other=0.0)
                    b = tl.load(weight_tile, mask=k_in[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        c += BLOCK_K
        if not SINGLE:
            row_done = c >= channels
            c = tl.multiple_of(tl.where(row_done, 0, c), BLOCK_K)
            j = tl.where(row_done, j + 1, j)
            j_w = tl.where(row_done, j_w + step_w, j_w)
            x_delta = tl.where(row_done, x_delta + step_w * x_stride, x_delta)
            weight_delta = tl.where(row_done, weight_delta + weight_step_w, weight_delta)
            plane_done = j >= taps_w
            j = tl.where(plane_done, 0, j)
            j_w = tl.where(plane_done, 0, j_w)
            i_h = tl.where(plane_done, i_h + step_h, i_h)
            x_delta = tl.where(plane_done, x_delta + (step_h * width - taps_w * step_w) * x_stride, x_delta)
            weight_delta = tl.where(plane_done, weight_delta + weight_step_h - taps_w * weight_step_w, weight_delta)
    return acc

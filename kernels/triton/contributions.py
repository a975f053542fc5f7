"""The last step of an explanation: the first layer's adjoint, summed up pixel by pixel instead of stored.

    W[m, c, h, w]        = inverse_std_c scale * conv^T(grad)                       (as in ``conv_transposed.py``)
    contributions[m,h,w] = sum_c W_c e_c              with e = [x, 1 - x] the encoded image (or x)
    colour[m, :, h, w]   = d_c / (d_c + d_(c+3) + 1e-12) for c < 3, and ||W|| (1e-12 where the contribution is negative)
                           with d = max(W / (max_c |W_c| + 1e-12), 0): the per-pixel terms of the colour picture

Eight columns are a pixel's channels, so one tile holds whole pixels: W itself never has to go through memory. Where
patches tile the image the columns run over a patch's pixels; otherwise a tile has one pixel per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.common import (
    class_steps,
    dot_precision,
    empty,
    nhwc,
    unit,
    window_arguments,
)
from bcos_rt.kernels.triton.conv_transposed import class_taps
from bcos_rt.kernels.triton.gemm_loop import implicit_gemm, inside_bits, swizzle
from bcos_rt.kernels.triton.launch import Config, current_arch, launch

__all__ = ["conv2d_contributions"]

# Columns of one pixel: the encoding's 6 (or 3) channels, padded.
CHANNELS = tl.constexpr(8)


@triton.jit
def _channel(tile, channel, C: tl.constexpr):
    """Channel ``C`` of [M, PIXELS, 8], as [M, PIXELS]."""
    return tl.sum(tl.where(channel == C, tile, 0.0), 2)


@triton.jit
def contributions_kernel(
    grad_ptr,
    weight_ptr,
    image_ptr,
    inverse_std_ptr,
    weights_ptr,
    contributions_ptr,
    colour_ptr,
    scale,
    batch,
    per_image,
    height,
    width,
    out_height,
    out_width,
    filter_units,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    kernel_h,
    kernel_w,
    p_step,
    q_step,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    PATCHES: tl.constexpr,
    USED: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNIT_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    filters = filter_units * UNIT_K
    taps = kernel_h * kernel_w
    if PATCHES:
        parity_h = 0
        parity_w = 0
        rows_h = out_height
        rows_w = out_width
        columns = taps * CHANNELS
    else:
        parity_h = tl.program_id(1) // stride_w
        parity_w = tl.program_id(1) % stride_w
        rows_h = tl.cdiv(height, stride_h)
        rows_w = tl.cdiv(width, stride_w)
        columns = CHANNELS
    rows_total = batch * rows_h * rows_w
    tile_m, tile_n = swizzle(tl.cdiv(rows_total, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < rows_total
    safe = tl.where(row_in, rows, 0)
    row_w = safe % rows_w
    row_h = (safe // rows_w) % rows_h
    sample = safe // (rows_w * rows_h)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = column < columns

    inside_p = row_in.to(tl.int32)
    inside_q = inside_p
    if PATCHES:
        p = row_h
        q = row_w
        first_tap = 0
        taps_h = 1
        taps_w = 1
        h = row_h * kernel_h
        w = row_w * kernel_w
    else:
        first_h, taps_h, p_offset = class_taps(parity_h, padding_h, dilation_h, kernel_h, stride_h, STEP_H)
        first_w, taps_w, q_offset = class_taps(parity_w, padding_w, dilation_w, kernel_w, stride_w, STEP_W)
        first_tap = (first_h * kernel_w + first_w) * filters
        h = row_h * stride_h + parity_h
        w = row_w * stride_w + parity_w
        row_in = row_in & (h < height) & (w < width)
        p = row_h + p_offset
        q = row_w + q_offset
        inside_p = tl.where(row_in, inside_bits(out_height - 1 - p, p_step, taps_h, out_height), 0)
        inside_q = inside_bits(out_width - 1 - q, q_step, taps_w, out_width)
    place = tl.where(row_in, (sample * out_height + p) * out_width + q, 0)
    # The weight is packed [8, kh, kw, O], or for patches [kh, kw, 8, O]: one filter row per column either way.
    acc = implicit_gemm(
        grad_ptr,
        weight_ptr + first_tap,
        place * filters,
        inside_p,
        inside_q,
        q,
        tl.where(column_in, column, 0) * (filters if PATCHES else taps * filters),
        out_width,
        filters,
        filters,
        taps_h,
        taps_w,
        -p_step,
        -q_step,
        STEP_H * kernel_w * filters,
        STEP_W * filters,
        not PATCHES,
        EVEN_K,
        0,
        PATCHES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )

    PIXELS: tl.constexpr = BLOCK_N // CHANNELS
    tile = tl.reshape(acc, (BLOCK_M, PIXELS, CHANNELS))
    channel = tl.arange(0, CHANNELS)[None, None, :]
    pixel = tile_n * PIXELS + tl.arange(0, PIXELS)
    pixel_h = h[:, None]
    pixel_w = w[:, None]
    if PATCHES:
        pixel_h += (pixel // kernel_w)[None, :]
        pixel_w += (pixel % kernel_w)[None, :]
        inside = row_in[:, None] & (pixel < taps)[None, :]
    else:
        pixel_h += (pixel * 0)[None, :]
        inside = row_in[:, None] & (pixel == 0)[None, :]
    position = pixel_h * width + pixel_w
    used = channel < USED
    tile *= tl.load(inverse_std_ptr + channel, mask=used, other=0.0) * scale

    plane = height * width
    source = ((sample // per_image) * 3 * plane)[:, None] + position
    x_mask = inside[:, :, None] & used
    x = tl.load(image_ptr + source[:, :, None] + (channel % 3) * plane, mask=x_mask, other=0).to(tl.float32)
    if image_ptr.dtype.element_ty == tl.uint8:
        x = x / 255.0
    encoded = tl.where(channel < 3, x, 1.0 - x)
    contribution = tl.sum(tl.where(used, tile * encoded, 0.0), 2)
    target = (sample * plane)[:, None] + position
    tl.store(contributions_ptr + target, contribution, mask=inside)
    if weights_ptr is not None:
        offset = (sample * (USED * plane))[:, None] + position
        tl.store(weights_ptr + offset[:, :, None] + channel * plane, tile, mask=inside[:, :, None] & used)
    if colour_ptr is not None:
        largest = tl.max(tl.abs(tile), 2)
        direction = tl.maximum(tile / (largest + 1e-12)[:, :, None], 0.0)
        colour = (sample * (4 * plane))[:, None] + position
        for c in tl.static_range(3):
            plus = _channel(direction, channel, c)
            minus = _channel(direction, channel, c + 3)
            tl.store(colour_ptr + colour + c * plane, plus / (plus + minus + 1e-12), mask=inside)
        # Relative to the largest, or tiny weights' squares would underflow.
        unit_tile = tile / tl.maximum(largest, 1e-30)[:, :, None]
        norm = largest * tl.sqrt(tl.sum(unit_tile * unit_tile, 2))
        tl.store(colour_ptr + colour + 3 * plane, tl.where(contribution < 0, 1e-12, norm), mask=inside)


def conv2d_contributions(
    grad: Tensor,
    weight: Tensor,
    image: Tensor,
    inverse_std: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    scale: float = 1.0,
    want_weights: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contributions of every pixel; see :func:`bcos_rt.kernels.ops.conv2d_contributions` for every argument."""
    batch, filters, out_height, out_width = grad.shape
    _, _, kernel_h, kernel_w = weight.shape
    height, width = image.shape[2:]
    used = inverse_std.numel()
    patches = (
        (kernel_h, kernel_w) == tuple(stride)
        and tuple(padding) == (0, 0)
        and tuple(dilation) == (1, 1)
        and (height, width) == (out_height * kernel_h, out_width * kernel_w)
    )
    packed = F.pad(weight[:, :used], (0, 0, 0, 0, 0, 8 - used))
    packed = (packed.permute(2, 3, 1, 0) if patches else packed.permute(1, 2, 3, 0)).contiguous()
    rows = batch * (
        out_height * out_width
        if patches
        else math.prod(-(-n // s) for n, s in zip((height, width), stride, strict=True))
    )
    columns = 8 * kernel_h * kernel_w if patches else 8
    arch = current_arch(grad.device)
    picked = config or tune.pick("conv2d_transposed", arch, rows, 16, filters, grad.dtype)
    # The epilogue holds several values per pixel and channel: a narrow tile leaves it the registers.
    block_n = min(32, triton.next_power_of_2(columns)) if patches else 16
    block_k = min(picked.block_k, max(16, triton.next_power_of_2(filters)))
    tile = Config(min(picked.block_m, 64), block_n, block_k, 4, picked.num_stages, picked.group_m)

    weights = empty(grad, (batch, used, height, width), torch.float32) if want_weights else None
    contributions = empty(grad, (batch, height, width), torch.float32)
    colour = empty(grad, (batch, 4, height, width), torch.float32) if used == 6 else None
    launch(
        "conv2d_contributions",
        contributions_kernel,
        (-(-rows // tile.block_m) * -(-columns // block_n), 1 if patches else stride[0] * stride[1]),
        tile,
        {
            "grad_ptr": nhwc(grad),
            "weight_ptr": packed,
            "image_ptr": image.contiguous(),
            "inverse_std_ptr": inverse_std.float().contiguous(),
            "weights_ptr": weights,
            "contributions_ptr": contributions,
            "colour_ptr": colour,
            "scale": float(scale),
            "batch": batch,
            "per_image": batch // max(image.shape[0], 1),
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "filter_units": filters // unit(filters),
            **window_arguments((kernel_h, kernel_w), stride, padding, dilation),
            **class_steps(stride, dilation),
            "PATCHES": patches,
            "USED": used,
            "EVEN_K": filters % tile.block_k == 0,
            "UNIT_K": unit(filters),
            "PRECISION": dot_precision(grad.dtype, arch),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
        },
        gemm=True,
        dtype=grad.dtype,
    )
    nothing = contributions.new_empty(0)
    return nothing if weights is None else weights, contributions, nothing if colour is None else colour

"""Layer and group normalisation with the map of sums of squares, and their adjoints.

    y = (x - mean) rstd weight_c + bias_c             rstd = 1 / sqrt(mean of (x - mean)^2 + eps)
    squares = sum over the (group's) channels of y^2  (what the next B-cos layer's norm is made of)

The means are over a token's channels, or over a group's channels and pixels. An explanation holds rstd constant, not
the mean, so that with g = grad * weight_c its adjoint is (rstd of image m // K, where every image has K classes)::

    out = rstd (g - mean g) + identity

A token stays in registers: one pass over memory, with the variance taken from centred values. A group of an image
does not: one program reads it twice, first for its statistics (Welford's update in every lane, merged at the end, as
sums of squares of x would cancel), then to normalise it, out of the L2 cache where it fits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.triton.common import empty, nhwc, unit
from bcos_rt.kernels.triton.launch import Config, launch

__all__ = ["MAX_CHANNELS", "group_norm", "group_norm_transposed", "layer_norm", "layer_norm_transposed"]

# What one program keeps in registers: 32 values a thread with 16 warps.
MAX_CHANNELS = 16384


@triton.jit
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rstd_ptr,
    squares_ptr,
    eps,
    rows_total,
    units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y = (x - mean) rstd weight + bias`` of BLOCK_M whole rows, their rstd, optionally their sums of squares."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < rows_total
    column = tl.arange(0, BLOCK_N)
    channels = units * UNIT
    column_in = column < channels
    mask = row_in[:, None] & column_in[None, :]
    offset = rows[:, None] * channels + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / channels
    centred = tl.where(column_in[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column_in, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column_in, other=0.0)[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, y, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_in)
    if squares_ptr is not None:
        # Lanes past the row hold zeros: centred, weight and bias are zero there.
        wide = y.to(tl.float32)
        tl.store(squares_ptr + rows, tl.sum(wide * wide, 1), mask=row_in)


@triton.jit
def layer_norm_transposed_kernel(
    grad_ptr,
    rstd_ptr,
    weight_ptr,
    identity_ptr,
    out_ptr,
    rows_total,
    image_rows,
    per_image,
    units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``out = rstd (g - mean g) + identity`` of BLOCK_M whole rows, g = grad * weight; rstd of the gradient's image."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < rows_total
    column = tl.arange(0, BLOCK_N)
    channels = units * UNIT
    column_in = column < channels
    mask = row_in[:, None] & column_in[None, :]
    offset = rows[:, None] * channels + column[None, :]
    saved = rows // (image_rows * per_image) * image_rows + rows % image_rows
    rstd = tl.load(rstd_ptr + saved, mask=row_in, other=0.0)
    g = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + column, mask=column_in, other=0.0)[None, :]
    mean = tl.sum(g, 1) / channels
    out = (g - mean[:, None]) * rstd[:, None]
    if identity_ptr is not None:
        out += tl.load(identity_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def group_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rstd_ptr,
    squares_ptr,
    eps,
    image_places,
    units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One group (grid axis 1) of one image (axis 0): its statistics in a first loop, y and squares in a second."""
    image = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    size = units * UNIT
    channels = size * groups
    column = tl.arange(0, BLOCK_N)
    column_in = column < size
    channel = group * size + column

    # Each lane counts what it has seen; the columns past the group see nothing.
    count = tl.zeros((BLOCK_M, 1), tl.float32)
    lane_mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lane_spread = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, image_places, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        place_in = (place < image_places)[:, None]
        mask = place_in & column_in[None, :]
        offset = (image * image_places + place)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        count += place_in.to(tl.float32)
        step = tl.where(mask, x - lane_mean, 0.0)
        lane_mean += step * (1.0 / tl.maximum(count, 1.0))
        lane_spread += tl.where(mask, step * (x - lane_mean), 0.0)
    total = image_places * size * 1.0
    mean = tl.sum(tl.sum(lane_mean * count, 1), 0) / total
    apart = tl.where(column_in[None, :], lane_mean - mean, 0.0)
    spread = tl.sum(tl.sum(lane_spread + count * apart * apart, 1), 0)
    rstd = 1.0 / tl.sqrt(spread / total + eps)
    tl.store(rstd_ptr + image * groups + group, rstd)

    scale = tl.full((BLOCK_N,), 1.0, tl.float32) * rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=column_in, other=0.0)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channel, mask=column_in, other=0.0)
    for first in range(0, image_places, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        place_in = place < image_places
        mask = place_in[:, None] & column_in[None, :]
        row = image * image_places + place
        offset = row[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        y = ((x - mean) * scale[None, :] + shift[None, :]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, y, mask=mask)
        if squares_ptr is not None:
            wide = tl.where(column_in[None, :], y.to(tl.float32), 0.0)
            tl.store(squares_ptr + row * groups + group, tl.sum(wide * wide, 1), mask=place_in)


@triton.jit
def group_norm_transposed_kernel(
    grad_ptr,
    rstd_ptr,
    weight_ptr,
    identity_ptr,
    out_ptr,
    image_places,
    per_image,
    units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One group (grid axis 1) of one gradient (axis 0): the mean of g in a first loop, out in a second."""
    sample = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    size = units * UNIT
    channels = size * groups
    column = tl.arange(0, BLOCK_N)
    column_in = column < size
    channel = group * size + column
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channel, mask=column_in, other=0.0)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, image_places, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        mask = (place < image_places)[:, None] & column_in[None, :]
        offset = (sample * image_places + place)[:, None] * channels + channel[None, :]
        total += tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(total, 0) * weight, 0) / (image_places * size * 1.0)
    rstd = tl.load(rstd_ptr + (sample // per_image) * groups + group)
    weight *= rstd
    mean *= rstd

    for first in range(0, image_places, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        mask = (place < image_places)[:, None] & column_in[None, :]
        offset = (sample * image_places + place)[:, None] * channels + channel[None, :]
        out = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32) * weight[None, :] - mean
        if identity_ptr is not None:
            out += tl.load(identity_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(channels: int, elements: int, config: Config | None) -> Config:
    """Whole rows of ``channels``, ``elements`` in all if they are short; up to 16 values a thread, 32 in the longest.

    Raises:
        InvalidArgumentError: more channels than a program can hold.
    """
    if not 0 < channels <= MAX_CHANNELS:
        raise InvalidArgumentError("channels to normalise", channels, f"1 to {MAX_CHANNELS}")
    width = triton.next_power_of_2(channels)
    block_m = config.block_m if config else max(elements // width, 1)
    warps = config.num_warps if config else min(max(block_m * width // 512, 4), 16)
    return Config(block_m, width, num_warps=warps)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    want_squares: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation, its rstd and its map; see :func:`bcos_rt.kernels.ops.layer_norm`."""
    x = x.contiguous()
    lead, channels = x.shape[:-1], x.shape[-1]
    rows = math.prod(lead)
    tile = _tile(channels, 2048, config)
    y = empty(x, x.shape)
    rstd = empty(x, lead, torch.float32)
    squares = empty(x, (*lead, 1), torch.float32) if want_squares else None
    launch(
        "layer_norm",
        layer_norm_kernel,
        (-(-rows // tile.block_m),),
        tile,
        {
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "y_ptr": y,
            "rstd_ptr": rstd,
            "squares_ptr": squares,
            "eps": eps,
            "rows_total": rows,
            "units": channels // unit(channels),
            "UNIT": unit(channels),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=channels * x.element_size() % 16 == 0,
        dtype=x.dtype,
    )
    return y, rstd, x.new_empty(0) if squares is None else squares


def layer_norm_transposed(
    grad: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    identity: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Adjoint of :func:`layer_norm`, rstd constant; see :func:`bcos_rt.kernels.ops.layer_norm_transposed`."""
    grad = grad.contiguous()
    lead, channels = grad.shape[:-1], grad.shape[-1]
    rows = math.prod(lead)
    tile = _tile(channels, 2048, config)
    out = empty(grad, grad.shape)
    launch(
        "layer_norm_transposed",
        layer_norm_transposed_kernel,
        (-(-rows // tile.block_m),),
        tile,
        {
            "grad_ptr": grad,
            "rstd_ptr": rstd.contiguous(),
            "weight_ptr": weight,
            "identity_ptr": None if identity is None else identity.contiguous(),
            "out_ptr": out,
            "rows_total": rows,
            "image_rows": math.prod(lead[1:]),
            "per_image": rows // max(rstd.numel(), 1),
            "units": channels // unit(channels),
            "UNIT": unit(channels),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=channels * grad.element_size() % 16 == 0,
        dtype=grad.dtype,
    )
    return out


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    want_squares: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group normalisation, its rstd and its map; see :func:`bcos_rt.kernels.ops.group_norm`.

    Raises:
        InvalidArgumentError: ``groups`` does not divide the channels, or a group has more than :data:`MAX_CHANNELS`.
    """
    x = nhwc(x)
    batch, height, width, channels = x.shape
    size = _group_size(channels, groups)
    tile = _tile(size, 4096, config)
    y = empty(x, x.shape)
    rstd = empty(x, (batch, groups), torch.float32)
    squares = empty(x, (batch, height, width, groups), torch.float32) if want_squares else None
    launch(
        "group_norm",
        group_norm_kernel,
        (batch, groups),
        tile,
        {
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "y_ptr": y,
            "rstd_ptr": rstd,
            "squares_ptr": squares,
            "eps": eps,
            "image_places": height * width,
            "units": size // unit(size),
            "UNIT": unit(size),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=size * x.element_size() % 16 == 0,
        dtype=x.dtype,
    )
    return y.permute(0, 3, 1, 2), rstd, x.new_empty(0) if squares is None else squares.permute(0, 3, 1, 2)


def group_norm_transposed(
    grad: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    identity: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Adjoint of :func:`group_norm`, rstd constant; see :func:`bcos_rt.kernels.ops.group_norm_transposed`."""
    grad = nhwc(grad)
    batch, height, width, channels = grad.shape
    size = _group_size(channels, groups)
    tile = _tile(size, 4096, config)
    out = empty(grad, grad.shape)
    launch(
        "group_norm_transposed",
        group_norm_transposed_kernel,
        (batch, groups),
        tile,
        {
            "grad_ptr": grad,
            "rstd_ptr": rstd.contiguous(),
            "weight_ptr": weight,
            "identity_ptr": None if identity is None else nhwc(identity),
            "out_ptr": out,
            "image_places": height * width,
            "per_image": batch // max(rstd.shape[0], 1),
            "units": size // unit(size),
            "UNIT": unit(size),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=size * grad.element_size() % 16 == 0,
        dtype=grad.dtype,
    )
    return out.permute(0, 3, 1, 2)


def _group_size(channels: int, groups: int) -> int:
    if groups < 1 or channels % groups:
        raise InvalidArgumentError("groups", groups, f"a divisor of the {channels} channels")
    return channels // groups

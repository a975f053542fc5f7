"""What the kernels share: activations and their gates, the B-cos multiplier, layout and argument checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels import reference
from bcos_rt.kernels.triton.launch import Config

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "HARDSWISH",
    "MAP_COLUMNS",
    "NONE",
    "POWER_GENERAL",
    "POWER_PLAIN",
    "POWER_SQUARE",
    "RELU",
    "RELU6",
    "SILU",
    "activate",
    "activation_gate",
    "bcos_multiplier",
    "class_steps",
    "classes_per_image",
    "column_parts",
    "dot_precision",
    "empty",
    "empty_nhwc",
    "forward_epilogue",
    "nchw",
    "nhwc",
    "optional_nhwc",
    "pack_bits",
    "power_mode",
    "split_columns",
    "transposed_epilogue",
    "unit",
    "unpack_bits",
    "window_arguments",
]

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
GELU = tl.constexpr(3)
SILU = tl.constexpr(4)
HARDSWISH = tl.constexpr(5)
ACTIVATIONS: dict[str, int] = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

# How B enters: not at all (B = 1), as the square (B = 2), or as a run-time exponent.
POWER_PLAIN = tl.constexpr(0)
POWER_SQUARE = tl.constexpr(1)
POWER_GENERAL = tl.constexpr(2)

# Columns that one entry of a sum-of-squares map is the sum of (within a group).
MAP_COLUMNS = tl.constexpr(reference.MAP_COLUMNS)


def power_mode(b: float) -> int:
    """The constexpr that selects the code for ``b``; only 1 and 2 have their own."""
    return {1.0: 0, 2.0: 1}.get(float(b), 2)


@triton.jit
def activation_gate(u, ACTIVATION: tl.constexpr):
    """Gate ``g`` with ``act(u) = g * u``, fp32 -> fp32; for an explanation it is a constant."""
    if ACTIVATION == RELU:
        gate = tl.where(u > 0, 1.0, 0.0)
    elif ACTIVATION == RELU6:
        gate = tl.where(u > 0, tl.where(u < 6.0, 1.0, 6.0 / u), 0.0)
    elif ACTIVATION == GELU:
        gate = 0.5 * (1.0 + tl.math.erf(u * 0.7071067811865476))
    elif ACTIVATION == SILU:
        gate = 1.0 / (1.0 + tl.exp(-u))
    elif ACTIVATION == HARDSWISH:
        gate = tl.minimum(tl.maximum(u + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    else:
        gate = tl.full(u.shape, 1.0, tl.float32)
    return gate


@triton.jit
def activate(u, gate, ACTIVATION: tl.constexpr):
    """``act(u)`` where ``gate`` is :func:`activation_gate` of u."""
    if ACTIVATION == RELU:
        # Not u * gate: that would turn an infinity's zero gate into NaN, and a NaN into 0.
        y = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        y = u * gate
    return y


@triton.jit
def bcos_multiplier(z, inverse_norm, b, POWER: tl.constexpr):
    """``(|z| / n)^(B-1)``; other B than 1 and 2 as published, ``(|z| / n + 1e-6)^(B-1)``. fp32.

    The division comes before any product with z: ``z |z|`` alone overflows where ``z (|z| / n)`` does not.
    """
    ratio = tl.abs(z) * inverse_norm
    if POWER == POWER_GENERAL:
        ratio = tl.exp2((b - 1.0) * tl.log2(ratio + 1e-6))
    return ratio


@triton.jit
def pack_bits(on, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of 0/1 int32 -> [ROWS, COLUMNS // 8] uint8, bit i of byte j is column 8 j + i."""
    bits = tl.reshape(on, (ROWS, COLUMNS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)


@triton.jit
def unpack_bits(bytes_ptr, rows, columns, row_bytes, mask):
    """fp32 0/1 of a bit mask made by :func:`pack_bits`: rows [M, 1] or [M, N], columns [1, N]."""
    packed = tl.load(bytes_ptr + rows * row_bytes + columns // 8, mask=mask, other=0).to(tl.int32)
    return ((packed >> (columns % 8)) & 1).to(tl.float32)


@triton.jit
def forward_epilogue(
    z,
    inverse_norm,
    exponent,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    multiplier_ptr,
    gate_ptr,
    rows,
    row_in,
    channel,
    column_in,
    y_stride,
    byte,
    byte_in,
    gate_stride,
    POWER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Everything after the response z [BLOCK_M, BLOCK_N] of a B-cos layer, and its stores.

    Args:
        inverse_norm: [BLOCK_M, 1] or like z.
        byte, byte_in: [BLOCK_N // 8], where the columns' bytes of a ReLU's bit mask go, and which of them exist.

    Returns:
        y as it was stored, fp32 again, zeros past the columns: what the map of sums of squares is made of.
    """
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channel, mask=column_in, other=0.0)[None, :]
    scale = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
    if POWER != 0:
        scale = bcos_multiplier(z, inverse_norm, exponent, POWER)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr + channel, mask=column_in, other=0.0)[None, :]
    u = z * scale
    if shift_ptr is not None:
        u += tl.load(shift_ptr + channel, mask=column_in, other=0.0)[None, :]
    offset = rows[:, None] * y_stride + channel[None, :]
    inside = row_in[:, None] & column_in[None, :]
    if residual_ptr is not None:
        u += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    gate = activation_gate(u, ACTIVATION)
    y = activate(u, gate, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, y, mask=inside)
    if multiplier_ptr is not None:
        tl.store(multiplier_ptr + offset, (scale * gate).to(multiplier_ptr.dtype.element_ty), mask=inside)
    if gate_ptr is not None:
        if ACTIVATION == RELU:
            packed = pack_bits(tl.where(inside, u > 0, False).to(tl.int32), BLOCK_M, BLOCK_N)
            byte_inside = row_in[:, None] & byte_in[None, :]
            tl.store(gate_ptr + rows[:, None] * gate_stride + byte[None, :], packed, mask=byte_inside)
        else:
            tl.store(gate_ptr + offset, gate.to(gate_ptr.dtype.element_ty), mask=inside)
    return tl.where(column_in[None, :], y.to(tl.float32), 0.0)


@triton.jit
def transposed_epilogue(
    total,
    identity_ptr,
    multiplier_ptr,
    gate_ptr,
    out_ptr,
    raw_ptr,
    place,
    image_place,
    channel,
    channels,
    inside,
    gate_stride,
    GATE_BITS: tl.constexpr,
):
    """``G = total + identity``, ``out = G * multiplier``, ``raw = G * gate``: how every adjoint kernel ends.

    Args:
        total: [M, N], rows of places and columns of channels.
        place, image_place: [M, 1] or [M, N], the place in the gradient's batch and in the images' (K gradients each).
        channel: [N]. channels: elements from one place to the next.
    """
    offset = place * channels + channel[None, :]
    image_offset = image_place * channels + channel[None, :]
    if identity_ptr is not None:
        total += tl.load(identity_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    out = total
    if multiplier_ptr is not None:
        out = total * tl.load(multiplier_ptr + image_offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)
    if raw_ptr is not None:
        raw = total
        if gate_ptr is not None:
            if GATE_BITS:
                raw = total * unpack_bits(gate_ptr, image_place, channel[None, :], gate_stride, inside)
            else:
                raw = total * tl.load(gate_ptr + image_offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(raw_ptr + offset, raw.to(raw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def split_columns(tile, PARTS: tl.constexpr):
    """[M, N] -> a tuple of ``PARTS`` (1, 2 or 4) tiles [M, N / PARTS], left to right; moves no data between threads."""
    if PARTS == 1:
        parts = (tile,)
    elif PARTS == 2:
        left, right = _halves(tile)
        parts = (left, right)
    else:
        left, right = _halves(tile)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


def column_parts(config: Config, arch: str) -> int:
    """Into how many parts an epilogue splits its columns: at most 16 values of a part per thread, 32 columns at least.

    With 32 values the epilogue, not the main loop, decides how many registers a kernel needs: 224 instead of 146 for
    one tile on sm_90. A part never spans two entries of the sum-of-squares map. On AMD there are two parts at least: a
    result stored straight from the matrix cores' layout goes out 8 bytes at a time.
    """
    least = 2 if arch.startswith("gfx") and config.block_n >= 32 else 1
    parts = max(least, config.block_n // reference.MAP_COLUMNS)
    while (
        parts < 4
        and config.block_n // parts > 32
        and config.block_m * config.block_n // parts > 16 * 32 * config.num_warps
    ):
        parts *= 2
    return parts


def unit(count: int) -> int:
    """The largest power of two up to 16 that divides ``count``."""
    return min(count & -count, 16) if count else 16


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """``input_precision`` of ``tl.dot``: fp32 operands take three tf32 products (one alone misses the tolerances).

    AMD's matrix cores multiply fp32 as it is.
    """
    if dtype == torch.float32 and arch.startswith("sm_"):
        return "tf32x3"
    return "ieee"


def nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] -> its contiguous [N, H, W, C]: a view of a channels-last tensor, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


# Every result is allocated through this: tests put guard bands around it and poison what is inside.
allocator: Callable[..., Tensor] = torch.empty


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous tensor on ``like``'s device, in ``like``'s dtype unless another is given."""
    return allocator(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [N, C, H, W] (``shape``) in channels-last memory, on ``like``'s device."""
    n, c, h, w = shape
    return empty(like, (n, h, w, c), dtype).permute(0, 3, 1, 2)


def optional_nhwc(x: Tensor | None) -> Tensor | None:
    """:func:`nhwc` of a tensor that may be missing."""
    return None if x is None else nhwc(x)


def nchw(x: Tensor) -> Tensor:
    """A result [N, H, W, C] as [N, C, H, W] in channels-last memory; what was not asked for stays empty."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def classes_per_image(rows: int, *saved: Tensor | None) -> int:
    """K, where ``rows`` gradients belong to the images that values were ``saved`` of in the forward pass."""
    return next((rows // s.shape[0] for s in saved if s is not None and s.shape[0]), 1)


def window_arguments(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int] | None = None
) -> dict[str, int]:
    """A window's kernel arguments, ``kernel_h`` to ``dilation_w``; no dilation where a kernel knows none."""
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return {f"{name}_{axis}": pair[i] for name, pair in pairs.items() if pair for i, axis in enumerate("hw")}


def class_steps(stride: Sequence[int], dilation: Sequence[int]) -> dict[str, int]:
    """An adjoint's kernel arguments: from one kernel place that a parity class meets to the next, and in its p and q.

    See ``class_taps`` (``conv_transposed.py``).
    """
    arguments = {}
    for axis, place, s, d in zip("HW", "pq", stride, dilation, strict=True):
        arguments[f"STEP_{axis}"] = s // math.gcd(s, d)
        arguments[f"{place}_step"] = d // math.gcd(s, d)
    return arguments

"""Adjoint of a convolution (the explanation's step through a layer), as implicit GEMMs without inserted zeros.

    G[m, h, w, c] = sum over (r, s, o) with h + pad - r dil = p stride of grad[m, p, q, o] weight[o, r, s, c]
                    + identity[m, h, w, c]
    out = G * multiplier          raw = G * gate          (of image m // K, where every image has K classes)

The places of one parity class ``(h mod stride, w mod stride)`` meet the same kernel places, so each class is a dense
implicit GEMM over those: one launch, the class along its second axis. A class that meets none still writes its
identity term or zeros. Where patches tile the image (kernel = stride, no padding) the whole is one GEMM from a patch's
gradient to its places and channels. A linear layer is the same kernel on an image of one place.

In training the same kernel gives grad_x: with ``x`` and ``norm_grad = grad_n / n`` it adds the gradient through the
patch norm, ``x[h, w, c] * sum over the places of grad_n / n`` (``n^2 = sum over the patch of x^2 + eps``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.common import (
    class_steps,
    classes_per_image,
    column_parts,
    dot_precision,
    empty,
    nchw,
    nhwc,
    optional_nhwc,
    split_columns,
    transposed_epilogue,
    unit,
    window_arguments,
)
from bcos_rt.kernels.triton.conv import tile_for
from bcos_rt.kernels.triton.gemm_loop import implicit_gemm, inside_bits, swizzle
from bcos_rt.kernels.triton.launch import Config, current_arch, launch

__all__ = ["class_taps", "conv2d_transposed", "launch_transposed", "linear_transposed", "pack_transposed"]


@triton.jit
def class_taps(parity, padding, dilation, kernel, stride, STEP: tl.constexpr):
    """The kernel places a parity class meets along one axis: first place, how many, and the first one's offset in p.

    ``r`` is met if ``parity + padding - r dilation`` is a multiple of the stride; with ``STEP = stride / gcd(stride,
    dilation)`` these are ``first, first + STEP, ...``, and ``p = h // stride + offset - i dilation STEP / stride``.
    """
    first = kernel
    for r in tl.static_range(STEP):
        # The added multiple of the stride keeps the dividend positive.
        met = (parity + padding - r * dilation + r * dilation * stride) % stride == 0
        first = tl.where(met & (r < first), r, first)
    count = tl.maximum((kernel - first + STEP - 1) // STEP, 0)
    shifted = parity + padding - first * dilation
    return first, count, (shifted + first * dilation * stride) // stride - first * dilation


@triton.jit
def conv2d_transposed_kernel(
    grad_ptr,
    weight_ptr,
    identity_ptr,
    multiplier_ptr,
    gate_ptr,
    x_ptr,
    norm_grad_ptr,
    out_ptr,
    raw_ptr,
    batch,
    per_image,
    height,
    width,
    out_height,
    out_width,
    filter_units,
    channel_units,
    gate_stride,
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
    SINGLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATE_BITS: tl.constexpr,
    UNIT_K: tl.constexpr,
    UNIT_N: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    filters = filter_units * UNIT_K
    channels = channel_units * UNIT_N
    groups = tl.num_programs(2)
    group = tl.program_id(2)
    all_channels = channels * groups
    all_filters = filters * groups
    taps = kernel_h * kernel_w

    # Rows: the places of this parity class; or patches, or rows of a token matrix.
    if PATCHES or SINGLE:
        parity_h = 0
        parity_w = 0
        rows_h = out_height
        rows_w = out_width
    else:
        parity_h = tl.program_id(1) // stride_w
        parity_w = tl.program_id(1) % stride_w
        rows_h = tl.cdiv(height, stride_h)
        rows_w = tl.cdiv(width, stride_w)
    columns = channels
    if PATCHES:
        columns = taps * channels
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

    # The weight is [G, C, kh, kw, O]; the columns of patches run over places, then channels.
    weight_column = tl.where(column_in, column, 0)
    if PATCHES:
        weight_column = weight_column % channels * taps + weight_column // channels
    elif not SINGLE:
        weight_column *= taps
    weight_column *= filters

    inside_p = row_in.to(tl.int32)
    inside_q = inside_p
    if PATCHES or SINGLE:
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
        # Places are met upwards: mirrored, so that they count down.
        inside_p = tl.where(row_in, inside_bits(out_height - 1 - p, p_step, taps_h, out_height), 0)
        inside_q = inside_bits(out_width - 1 - q, q_step, taps_w, out_width)
    place = tl.where(row_in, (sample * out_height + p) * out_width + q, 0)

    acc = implicit_gemm(
        grad_ptr,
        weight_ptr + group * channels * taps * filters + first_tap,
        place * all_filters + group * filters,
        inside_p,
        inside_q,
        q,
        weight_column,
        out_width,
        all_filters,
        filters,
        taps_h,
        taps_w,
        -p_step,
        -q_step,
        STEP_H * kernel_w * filters,
        STEP_W * filters,
        not (PATCHES or SINGLE),
        EVEN_K,
        0,
        PATCHES or SINGLE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )

    spread = tl.zeros((BLOCK_M,), tl.float32)
    if norm_grad_ptr is not None:
        for i in range(taps_h):
            for j in range(taps_w):
                met = ((inside_p >> i) & (inside_q >> j) & 1) != 0
                here = (place - i * p_step * out_width - j * q_step) * groups + group
                spread += tl.load(norm_grad_ptr + here, mask=met, other=0.0)

    out_place = ((sample * height + h) * width + w)[:, None]
    image_place = (((sample // per_image) * height + h) * width + w)[:, None]
    parts = split_columns(acc, PARTS)
    for part in tl.static_range(PARTS):
        part_column = tile_n * BLOCK_N + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        part_in = row_in[:, None] & (part_column < columns)[None, :]
        total = parts[part]
        if PATCHES:
            tap = part_column // channels
            within = ((tap // kernel_w) * width + tap % kernel_w)[None, :]
            channel = part_column % channels
        else:
            within = tl.zeros((1, BLOCK_N // PARTS), tl.int32)
            channel = group * channels + part_column
        if x_ptr is not None:
            x = tl.load(x_ptr + out_place * all_channels + channel[None, :], mask=part_in, other=0.0)
            total += x.to(tl.float32) * spread[:, None]
        transposed_epilogue(
            total,
            identity_ptr,
            multiplier_ptr,
            gate_ptr,
            out_ptr,
            raw_ptr,
            out_place + within,
            image_place + within,
            channel,
            all_channels,
            part_in,
            gate_stride,
            GATE_BITS,
        )


def launch_transposed(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
    x: Tensor | None,
    norm_grad: Tensor | None,
    config: Config | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Launch on contiguous NHWC tensors: grad [M, H', W', O], the others [., H, W, C]; weight [O, C / groups, kh, kw].

    Returns:
        out and raw [M, H, W, C]; raw empty if not wanted.
    """
    batch, out_height, out_width, all_filters = grad.shape
    _, channels, kernel_h, kernel_w = weight.shape
    height, width = input_size
    filters = all_filters // groups
    single = kernel_h == kernel_w == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    patches = (
        not single
        and groups == 1
        and (kernel_h, kernel_w) == tuple(stride)
        and tuple(padding) == (0, 0)
        and tuple(dilation) == (1, 1)
        and (height, width) == (out_height * kernel_h, out_width * kernel_w)
        and norm_grad is None
    )
    classes = 1 if single or patches else stride[0] * stride[1]
    if single or patches:
        rows, columns = batch * out_height * out_width, channels * kernel_h * kernel_w
    else:
        rows, columns = batch * -(-height // stride[0]) * -(-width // stride[1]), channels
    arch = current_arch(grad.device)
    op = "linear_transposed" if single or patches else "conv2d_transposed"

    def again(candidate: Config) -> object:
        return launch_transposed(
            grad, weight, input_size, stride, padding, dilation, groups, multiplier, identity, gate, want_raw, x,
            norm_grad, candidate, name,
        )  # fmt: skip

    picked = config or tune.choose(op, again, arch, rows, columns, filters, grad.dtype)
    tile = tile_for(picked, columns, filters)
    # [G, C, kh, kw, O], the sum's index innermost as in the forward kernel: the same loads, and the only order in which
    # tensor cores take fp32 operands. A weight kept by :func:`pack_transposed` is not copied here.
    by_group = weight.reshape(groups, filters, channels, kernel_h, kernel_w)
    packed = by_group.permute(0, 2, 3, 4, 1).contiguous()

    out = empty(grad, (batch, height, width, channels * groups))
    raw = empty(grad, out.shape) if want_raw else grad.new_empty(0)
    launch(
        name,
        conv2d_transposed_kernel,
        (-(-rows // tile.block_m) * -(-columns // tile.block_n), classes, groups),
        tile,
        {
            "grad_ptr": grad,
            "weight_ptr": packed,
            "identity_ptr": identity,
            "multiplier_ptr": multiplier,
            "gate_ptr": gate if want_raw else None,
            "x_ptr": x,
            "norm_grad_ptr": norm_grad,
            "out_ptr": out,
            "raw_ptr": raw if want_raw else None,
            "batch": batch,
            "per_image": classes_per_image(batch, multiplier, gate),
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "filter_units": filters // unit(filters),
            "channel_units": channels // unit(channels),
            "gate_stride": gate.shape[-1] if gate is not None else 1,
            **window_arguments((kernel_h, kernel_w), stride, padding, dilation),
            **class_steps(stride, dilation),
            "PATCHES": patches,
            "SINGLE": single,
            "EVEN_K": filters % tile.block_k == 0,
            "GATE_BITS": gate is not None and gate.dtype == torch.uint8,
            "UNIT_K": unit(filters),
            "UNIT_N": unit(channels),
            "PARTS": column_parts(tile, arch),
            "PRECISION": dot_precision(grad.dtype, arch),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
        },
        gemm=True,
        vector_operands=all(n * grad.element_size() % 16 == 0 for n in (filters, channels)),
        dtype=grad.dtype,
    )
    return out, raw


def pack_transposed(weight: Tensor) -> Tensor:
    """``weight`` [O, C, kh, kw] or [O, C] (one group), equal in value, in the memory order its adjoint is read in."""
    return weight.movedim(0, -1).contiguous().movedim(-1, 0)


def conv2d_transposed(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
    x: Tensor | None = None,
    norm_grad: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Adjoint of a convolution; see :func:`bcos_rt.kernels.ops.conv2d_transposed`. ``x``, ``norm_grad``: training."""
    if groups > 1 and weight.shape[1] == 1 and norm_grad is None:
        from bcos_rt.kernels.triton.depthwise import depthwise_transposed

        return depthwise_transposed(
            grad, weight, input_size, stride, padding, dilation, groups, multiplier, identity, gate, want_raw
        )
    out = launch_transposed(
        nhwc(grad), weight, input_size, stride, padding, dilation, groups, optional_nhwc(multiplier),
        optional_nhwc(identity), optional_nhwc(gate), want_raw, optional_nhwc(x),
        optional_nhwc(norm_grad), config, "conv2d_transposed",
    )  # fmt: skip
    first, raw = (nchw(t) for t in out)
    return first, raw


def linear_transposed(
    grad: Tensor,
    weight: Tensor,
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
    x: Tensor | None = None,
    norm_grad: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Adjoint of a linear layer, ``grad @ weight``; see :func:`bcos_rt.kernels.ops.linear_transposed`."""
    lead = grad.shape[:-1]
    # Rows of one sample are its tokens: an image of height 1 keeps "sample // K" right.
    batch = lead[0] if len(lead) else 1

    def image(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        samples = tensor.shape[0] if tensor.ndim > 1 else 1
        tokens = math.prod(tensor.shape[1:-1])
        return tensor.reshape(samples, 1, tokens, tensor.shape[-1]).contiguous()

    tokens = math.prod(lead[1:])
    out = launch_transposed(
        grad.reshape(batch, 1, tokens, grad.shape[-1]).contiguous(), weight[:, :, None, None], (1, tokens),
        (1, 1), (0, 0), (1, 1), 1, image(multiplier), image(identity), image(gate), want_raw, image(x),
        image(norm_grad), config, "linear_transposed",
    )  # fmt: skip
    first, raw = (t.reshape(*lead, t.shape[-1]) if t.ndim == 4 else t for t in out)
    return first, raw

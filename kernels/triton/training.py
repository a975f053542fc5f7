"""Gradients of the B-cos convolution and linear layer, the gradient through the norm included.

With ``u = |z| / n`` and ``d`` = 0 for B = 2, 1e-6 otherwise (the published fractional power), ``y = z (u + d)^(B-1)``:

    grad_z    = grad m (1 + (B-1) u / (u + d))                                (B = 2: 2 |z| / n)
    grad_n    = -sum over channels of (B-1) grad z m / n  u / (u + d)         (B = 2: -z |z| / n^2)
    grad_B    = sum of grad z m log(u + d)
    grad_x    = conv^T(grad_z) + x * sum over the places of grad_n / n        (``conv_transposed.py``)
    grad_w[o, r, s, c] = sum over the rows of grad_z[row, o] x[row's place (r, s), c]
    grad_bias = sum over the rows of grad_z

Nothing but x, y and the weight is kept from the forward pass: for B = 2, ``z = sign(y) sqrt(|y| n)``; for any other B
one plain convolution recomputes z. The norm comes from x's squares in one cheap pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.common import (
    dot_precision,
    empty,
    power_mode,
    unit,
    window_arguments,
)
from bcos_rt.kernels.triton.conv import launch_forward
from bcos_rt.kernels.triton.conv_transposed import launch_transposed
from bcos_rt.kernels.triton.gemm_loop import inside_bits, swizzle
from bcos_rt.kernels.triton.launch import Config, current_arch, launch

__all__ = ["backward", "grad_response", "grad_weight"]


@triton.jit
def grad_response_kernel(
    grad_ptr,
    y_ptr,
    z_ptr,
    squares_ptr,
    grad_z_ptr,
    norm_grad_ptr,
    grad_b_ptr,
    b,
    eps,
    rows_total,
    height,
    width,
    out_height,
    out_width,
    column_units,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    kernel_h,
    kernel_w,
    POWER: tl.constexpr,
    ROW_NORM: tl.constexpr,
    B_IN_MEMORY: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_z, and per row and group grad_n / n (for a row norm grad_n / ||x||) and grad_B's terms."""
    columns = column_units * UNIT
    groups = tl.num_programs(1)
    group = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < rows_total
    safe = tl.where(row_in, rows, 0)
    h = (safe // out_width) % out_height * stride_h - padding_h
    w = safe % out_width * stride_w - padding_w
    place = (safe // (out_width * out_height) * height + h) * width + w
    inside_h = tl.where(row_in, inside_bits(h, dilation_h, kernel_h, height), 0)
    inside_w = inside_bits(w, dilation_w, kernel_w, width)
    square_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(kernel_h):
        for j in range(kernel_w):
            here = (place + i * dilation_h * width + j * dilation_w) * groups + group
            met = ((inside_h >> i) & (inside_w >> j) & 1) != 0
            square_sum += tl.load(squares_ptr + here, mask=met, other=0.0)
    if ROW_NORM:
        length = tl.sqrt(square_sum)
        norm = length + eps
    else:
        norm = tl.sqrt(square_sum + eps)
        length = norm
    exponent = 2.0
    if POWER == 2:
        exponent = b
        if B_IN_MEMORY:
            exponent = tl.load(b).to(tl.float32)

    grad_norm = tl.zeros((BLOCK_M,), tl.float32)
    grad_b = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = row_in[:, None] & (column < columns)[None, :]
        offset = rows[:, None] * (columns * groups) + (group * columns + column)[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if POWER == 1:
            y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            # The product of the roots, not the root of the product: |y| n overflows or underflows before they do.
            size = tl.sqrt(tl.abs(y)) * tl.sqrt(norm)[:, None]
            z = tl.where(y < 0, -size, size)
            m = size / norm[:, None]
            slope = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
        else:
            z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            u = tl.abs(z) / norm[:, None]
            log = tl.log2(u + 1e-6)
            m = tl.exp2((exponent - 1.0) * log)
            slope = u / (u + 1e-6)
            if grad_b_ptr is not None:
                grad_b += tl.sum(tl.where(mask, grad * z * m * (log * 0.6931471805599453), 0.0), 1)
        grad_z = grad * m * (1.0 + (exponent - 1.0) * slope)
        tl.store(grad_z_ptr + offset, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)
        grad_norm += tl.sum(tl.where(mask, grad * (z / norm[:, None]) * m * slope, 0.0), 1)
    grad_norm = -(exponent - 1.0) * grad_norm
    out = rows * groups + group
    # A row of zeros has no direction: its norm's gradient is zero.
    norm_grad = tl.where(length > 0, grad_norm / length, 0.0)
    tl.store(norm_grad_ptr + out, norm_grad, mask=row_in)
    if grad_b_ptr is not None:
        tl.store(grad_b_ptr + out, grad_b, mask=row_in)


def grad_response(
    grad: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    squares: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    b: float | Tensor,
    eps: float,
    row_norm: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad, y or z [N, H', W', O], squares [N, H, W, G] -> grad_z, grad_n / n [N, H', W', G], grad_B's terms."""
    batch, out_height, out_width, filters = grad.shape
    groups = squares.shape[-1]
    columns = filters // groups
    rows = batch * out_height * out_width
    block_n = min(triton.next_power_of_2(columns), 128)
    tile = config or Config(max(2048 // block_n, 4), block_n)
    grad_z = empty(grad, grad.shape)
    norm_grad = empty(grad, (batch, out_height, out_width, groups), torch.float32)
    grad_b = empty(grad, norm_grad.shape, torch.float32) if isinstance(b, Tensor) else None
    launch(
        "grad_response",
        grad_response_kernel,
        (-(-rows // tile.block_m), groups),
        tile,
        {
            "grad_ptr": grad,
            "y_ptr": y,
            "z_ptr": z,
            "squares_ptr": squares,
            "grad_z_ptr": grad_z,
            "norm_grad_ptr": norm_grad,
            "grad_b_ptr": grad_b,
            "b": b,
            "eps": eps,
            "rows_total": rows,
            "height": size[0],
            "width": size[1],
            "out_height": out_height,
            "out_width": out_width,
            "column_units": columns // unit(columns),
            **window_arguments(kernel, stride, padding, dilation),
            "POWER": 2 if isinstance(b, Tensor) else power_mode(b),
            "ROW_NORM": row_norm,
            "B_IN_MEMORY": isinstance(b, Tensor),
            "UNIT": unit(columns),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=columns * grad.element_size() % 16 == 0,
        dtype=grad.dtype,
    )
    return grad_z, norm_grad, grad_b


@triton.jit
def grad_weight_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    rows_total,
    rows_per_split,
    height,
    width,
    out_height,
    out_width,
    filter_units,
    channel_units,
    groups,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    kernel_h,
    kernel_w,
    SINGLE: tl.constexpr,
    FOLD: tl.constexpr,
    UNIT_M: tl.constexpr,
    UNIT_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One [filters, channels] tile of one kernel place (FOLD: of one kernel row), over one share of the rows."""
    filters = filter_units * UNIT_M
    channels = channel_units * UNIT_N
    columns = channels
    taps_w = kernel_w
    if FOLD:
        columns = channels * kernel_w
        taps_w = 1
    tap = tl.program_id(1) % (kernel_h * taps_w)
    group = tl.program_id(1) // (kernel_h * taps_w)
    i = tap // taps_w
    j = tap % taps_w
    tile_m, tile_n = swizzle(tl.cdiv(filters, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP_M)
    filter = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    filter_in = filter < filters
    column_in = column < columns
    first = tl.program_id(2) * rows_per_split
    end = tl.minimum(first + rows_per_split, rows_total)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        row_in = rows < end
        grad = tl.load(
            grad_ptr + (rows * (filters * groups))[:, None] + (group * filters + filter)[None, :],
            mask=row_in[:, None] & filter_in[None, :],
            other=0.0,
        )
        if SINGLE:
            x_rows = rows * (channels * groups)
            x_mask = row_in[:, None] & column_in[None, :]
        else:
            h = (rows // out_width) % out_height * stride_h - padding_h + i * dilation_h
            w = rows % out_width * stride_w - padding_w + j * dilation_w
            x_rows = ((rows // (out_width * out_height) * height + h) * width + w) * (channels * groups)
            x_mask = (row_in & (h >= 0) & (h < height))[:, None] & column_in[None, :]
            if FOLD:
                w_here = w[:, None] + (column // FOLD)[None, :]
                x_mask = x_mask & (w_here >= 0) & (w_here < width)
            else:
                x_mask = x_mask & ((w >= 0) & (w < width))[:, None]
        x = tl.load(x_ptr + x_rows[:, None] + (group * channels + column)[None, :], mask=x_mask, other=0.0)
        acc = tl.dot(tl.trans(grad), x, acc, input_precision=PRECISION)
    # [splits, O, kh, kw, C / groups]: summed afterwards in a fixed order, so that a run repeats bit for bit.
    row = (tl.program_id(2) * groups + group) * filters + filter
    offset = (row * kernel_h * taps_w + tap)[:, None] * columns + column[None, :]
    tl.store(out_ptr + offset, acc, mask=filter_in[:, None] & column_in[None, :])


def grad_weight(
    grad_z: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: Config | None = None,
) -> Tensor:
    """grad_z [N, H', W', O], x [N, H, W, C] -> fp32 [O, kh, kw, C / groups]."""
    batch, out_height, out_width, all_filters = grad_z.shape
    _, height, width, all_channels = x.shape
    filters, channels = all_filters // groups, all_channels // groups
    kernel_h, kernel_w = kernel
    rows = batch * out_height * out_width
    arch = current_arch(x.device)
    fold = kernel_w > 1 and groups == 1 and dilation[1] == 1 and channels <= 16
    columns = channels * kernel_w if fold else channels

    def again(candidate: Config) -> object:
        return grad_weight(grad_z, x, kernel, stride, padding, dilation, groups, candidate)

    picked = config or tune.choose("grad_weight", again, arch, filters, columns, rows, x.dtype)
    tile = Config(
        min(picked.block_m, max(16, triton.next_power_of_2(filters))),
        min(picked.block_n, max(16, triton.next_power_of_2(columns))),
        picked.block_k,
        picked.num_warps,
        picked.num_stages,
        picked.group_m,
    )
    tiles = -(-filters // tile.block_m) * -(-columns // tile.block_n)
    places = groups * kernel_h * (1 if fold else kernel_w)
    # Enough programs for two waves of the largest GPUs, as long as each has eight blocks of rows to sum.
    splits = max(1, min(-(-300 // (tiles * places)), rows // (8 * tile.block_k)))
    blocks = -(-rows // (splits * tile.block_k))
    rows_per_split = blocks * tile.block_k
    splits = max(1, -(-rows // max(rows_per_split, 1)))
    out = empty(x, (splits, all_filters, kernel_h, kernel_w, channels), torch.float32)
    launch(
        "grad_weight",
        grad_weight_kernel,
        (tiles, places, splits),
        tile,
        {
            "grad_ptr": grad_z,
            "x_ptr": x,
            "out_ptr": out,
            "rows_total": rows,
            "rows_per_split": rows_per_split,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "filter_units": filters // unit(filters),
            "channel_units": channels // unit(channels),
            "groups": groups,
            **window_arguments((kernel_h, kernel_w), stride, padding, dilation),
            "SINGLE": kernel_h == kernel_w == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0),
            "FOLD": channels if fold else 0,
            "UNIT_M": unit(filters),
            "UNIT_N": unit(channels),
            "PRECISION": dot_precision(x.dtype, arch),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
        },
        gemm=True,
        vector_operands=all(n * x.element_size() % 16 == 0 for n in (filters, channels)),
        dtype=x.dtype,
    )
    return out.sum(0) if splits > 1 else out[0]


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    squares: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float | Tensor,
    eps: float,
    needs: Sequence[bool],
    row_norm: bool,
    name: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for x, weight, bias and B, on contiguous NHWC tensors; weight [O, kh, kw, C / groups], B not 1."""
    kernel = weight.shape[1:3]
    size = x.shape[1:3]
    z = None
    if isinstance(b, Tensor) or b != 2:
        z = launch_forward(
            x, weight, None, None if bias is None else bias.float(), None, None, None, stride, padding, dilation,
            groups, 1.0, eps, "none", False, False, False, row_norm, None, name,
        )[0]  # fmt: skip
    grad_z, norm_grad, b_terms = grad_response(
        grad, y if z is None else None, z, squares, size, kernel, stride, padding, dilation, b, eps, row_norm
    )
    grad_x = grad_w = grad_bias = grad_b = None
    if needs[0]:
        grad_x = launch_transposed(
            grad_z, weight.permute(0, 3, 1, 2), size, stride, padding, dilation, groups, None, None, None, False,
            x, norm_grad, None, f"{name}_transposed",
        )[0]  # fmt: skip
    if needs[1]:
        grad_w = grad_weight(grad_z, x, kernel, stride, padding, dilation, groups).to(weight.dtype)
    if needs[2] and bias is not None:
        grad_bias = grad_z.sum((0, 1, 2), dtype=torch.float32).to(bias.dtype)
    if needs[3] and b_terms is not None and isinstance(b, Tensor):
        grad_b = b_terms.sum().to(b.dtype)
    return grad_x, grad_w, grad_bias, grad_b

"""B-cos convolution, forward: implicit GEMM over NHWC with the whole B-cos transform in its epilogue.

    z = conv(x, w) + bias                                   (the main loop, a plain convolution's)
    n = sqrt(sum over the patch of squares + eps)           (squares: the producer's map of channel sums of squares)
    s = (|z| / n)^(B-1)                                     (1 for B = 1)
    u = z s scale + shift + residual
    y = gate(u) u                                           (ReLU and its relatives)
    multiplier = s scale gate(u)                            (what y is linear in z by, once held constant)

B-cos networks (arXiv 2205.10268, eq. 3) with un-normalised weights (arXiv 2411.00715, eq. 4). A linear layer is the
same kernel on a 1 x 1 image (``linear.py``), with n = sqrt(sum of squares) + eps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.reference import CONV_EPS, map_entries, pack_mask
from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.common import (
    ACTIVATIONS,
    MAP_COLUMNS,
    column_parts,
    dot_precision,
    empty,
    forward_epilogue,
    nchw,
    nhwc,
    power_mode,
    split_columns,
    unit,
    window_arguments,
)
from bcos_rt.kernels.triton.gemm_loop import implicit_gemm, inside_bits, swizzle
from bcos_rt.kernels.triton.launch import Config, current_arch, launch
from bcos_rt.kernels.triton.square_sum import square_sum

__all__ = ["conv2d_fused", "launch_forward"]


@triton.jit
def conv2d_kernel(
    x_ptr,
    weight_ptr,
    squares_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    multiplier_ptr,
    gate_ptr,
    out_squares_ptr,
    b,
    eps,
    rows_total,
    height,
    width,
    out_height,
    out_width,
    channel_units,
    column_units,
    map_tiles,
    gate_stride,
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
    ACTIVATION: tl.constexpr,
    CHECK: tl.constexpr,
    EVEN_K: tl.constexpr,
    FOLD: tl.constexpr,
    SINGLE: tl.constexpr,
    UNIT_IN: tl.constexpr,
    UNIT_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    ENTRY_PARTS: tl.constexpr,
    B_IN_MEMORY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Multiples of a compile-time unit: this is how the compiler knows that 128-bit accesses are aligned.
    channels = FOLD if FOLD else channel_units * UNIT_IN
    columns = column_units * UNIT_OUT
    x_stride = FOLD if FOLD else channels * tl.num_programs(1)
    y_stride = columns * tl.num_programs(1)
    map_stride = map_tiles * tl.num_programs(1)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tile_m, tile_n = swizzle(tl.cdiv(rows_total, BLOCK_M), tiles_n, GROUP_M)
    group = tl.program_id(1)

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < rows_total
    # Rows past the end read row 0 (or nothing, where places are checked) and are dropped at the store.
    safe = tl.where(row_in, rows, 0)
    q = safe % out_width
    p = (safe // out_width) % out_height
    image = safe // (out_width * out_height)
    h = p * stride_h - padding_h
    w = q * stride_w - padding_w
    place = (image * height + h) * width + w
    inside_h = row_in.to(tl.int32)
    inside_w = inside_h
    if CHECK or FOLD:
        inside_h = tl.where(row_in, inside_bits(h, dilation_h, kernel_h, height), 0)
        inside_w = inside_bits(w, dilation_w, kernel_w, width)

    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = column < columns
    filter_size = kernel_h * kernel_w * channels
    acc = implicit_gemm(
        x_ptr,
        weight_ptr,
        place * x_stride + group * channels,
        inside_h,
        inside_w,
        w,
        (group * columns + tl.where(column_in, column, 0)) * filter_size,
        width,
        x_stride,
        kernel_w * channels if FOLD else channels,
        kernel_h,
        1 if FOLD else kernel_w,
        dilation_h,
        dilation_w,
        kernel_w * channels,
        channels,
        CHECK,
        EVEN_K,
        FOLD,
        SINGLE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )

    inverse_norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    exponent = b
    if POWER != 0:
        square_sum = tl.zeros((BLOCK_M,), tl.float32)
        for i in range(kernel_h):
            for j in range(kernel_w):
                inside = row_in
                if CHECK or FOLD:
                    inside = ((inside_h >> i) & (inside_w >> j) & 1) != 0
                here = squares_ptr + (place + i * dilation_h * width + j * dilation_w) * map_stride
                for t in range(map_tiles):
                    square_sum += tl.load(here + (group * map_tiles + t), mask=inside, other=0.0)
        if ROW_NORM:
            inverse_norm = 1.0 / (tl.sqrt(square_sum) + eps)
        else:
            inverse_norm = 1.0 / tl.sqrt(square_sum + eps)
        if B_IN_MEMORY:
            exponent = tl.load(b).to(tl.float32)

    # The epilogue works on a part of the columns at a time: with every option asked for, a whole tile of 128 x 128
    # would need more registers than there are.
    nothing_yet = tl.zeros((BLOCK_M,), tl.float32)
    squares = nothing_yet
    entries = tl.cdiv(columns, MAP_COLUMNS)
    parts = split_columns(acc, PARTS)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        first = tile_n * BLOCK_N + part * WIDTH
        part_column = first + tl.arange(0, WIDTH)
        byte = first // 8 + tl.arange(0, WIDTH // 8)
        stored = forward_epilogue(
            parts[part],
            inverse_norm[:, None],
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
            group * columns + part_column,
            part_column < columns,
            y_stride,
            group * (columns // 8) + byte,
            byte * 8 < columns,
            gate_stride,
            POWER,
            ACTIVATION,
            BLOCK_M,
            WIDTH,
        )
        if out_squares_ptr is not None:
            squares += tl.sum(stored * stored, 1)
        if out_squares_ptr is not None and (part == PARTS - 1 or (part + 1) % ENTRY_PARTS == 0):
            entry = first // MAP_COLUMNS
            offset = rows * (tl.num_programs(1) * entries) + group * entries + entry
            tl.store(out_squares_ptr + offset, squares, mask=row_in & (entry < entries))
            squares = nothing_yet


def tile_for(config: Config, columns: int, length: int) -> Config:
    """``config`` without the part of its tile that a narrow output or a short sum would leave empty.

    A tile is as wide as an entry of the sum-of-squares map at least, so that no two programs share one.
    """
    block_n = min(max(config.block_n, MAP_COLUMNS.value), max(16, triton.next_power_of_2(columns)))
    block_k = min(config.block_k, max(16, triton.next_power_of_2(length)))
    return Config(config.block_m, block_n, block_k, config.num_warps, config.num_stages, config.group_m)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float | Tensor,
    eps: float,
    activation: str,
    want_multiplier: bool,
    want_gate: bool,
    want_squares: bool,
    row_norm: bool,
    config: Config | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch on contiguous NHWC tensors: x [N, H, W, C], weight [O, kh, kw, C / groups], squares [N, H, W, T].

    Returns:
        y [N, H', W', O], multiplier and gate like it (a ReLU's gate packed into bytes), squares [N, H', W', T'];
        empty tensors for what was not asked for.
    """
    batch, height, width, channels = x.shape
    filters, kernel_h, kernel_w, group_in = weight.shape
    out_height = (height + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    if kernel_h == kernel_w == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        # Every place by itself: a plain GEMM on an image of one place.
        rows, height, width, launch_h, launch_w = batch * height * width, 1, 1, 1, 1
    else:
        rows, launch_h, launch_w = batch * out_height * out_width, out_height, out_width
    group_out = filters // groups
    power = 2 if isinstance(b, Tensor) else power_mode(b)
    plain = power == 0

    arch = current_arch(x.device)
    length = kernel_h * kernel_w * group_in

    def again(candidate: Config) -> object:
        return launch_forward(
            x, weight, squares, bias, scale, shift, residual, stride, padding, dilation, groups, b, eps, activation,
            want_multiplier, want_gate, want_squares, row_norm, candidate, name,
        )  # fmt: skip

    op = "linear" if length == group_in else "conv2d"
    picked = config or tune.choose(op, again, arch, rows, group_out, length, x.dtype)
    fold = kernel_w > 1 and groups == 1 and dilation[1] == 1 and 2 * channels <= picked.block_k
    inner = kernel_w * channels if fold else group_in
    tile = tile_for(picked, group_out, inner)
    tiles_n = -(-group_out // tile.block_n)

    parts = column_parts(tile, arch)
    shape = (batch, out_height, out_width, filters)
    y = empty(x, shape)
    nothing = x.new_empty(0)
    multiplier = empty(x, shape) if want_multiplier else nothing
    gate = nothing
    bits = want_gate and activation == "relu"
    # A byte of a bit mask must not belong to two groups.
    pack_later = bits and groups > 1 and group_out % 8 != 0
    if bits and not pack_later:
        gate = empty(x, (*shape[:3], -(-filters // 8)), torch.uint8)
    elif want_gate and not pack_later and activation != "none":
        gate = empty(x, shape)
    out_squares = empty(x, (*shape[:3], groups * map_entries(group_out)), torch.float32) if want_squares else nothing

    def optional(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is not None and tensor.numel() else None

    aligned = all(n * x.element_size() % 16 == 0 for n in (group_in, group_out))
    launch(
        name,
        conv2d_kernel,
        (-(-rows // tile.block_m) * tiles_n, groups),
        tile,
        {
            "x_ptr": x,
            "weight_ptr": weight,
            "squares_ptr": None if plain else squares,
            "bias_ptr": bias,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "residual_ptr": residual,
            "y_ptr": y,
            "multiplier_ptr": optional(multiplier),
            "gate_ptr": optional(gate),
            "out_squares_ptr": optional(out_squares),
            "b": b,
            "eps": eps,
            "rows_total": rows,
            "height": height,
            "width": width,
            "out_height": launch_h,
            "out_width": launch_w,
            "channel_units": group_in // unit(group_in),
            "column_units": group_out // unit(group_out),
            "map_tiles": squares.shape[-1] // groups if squares is not None and not plain else 1,
            "gate_stride": gate.shape[-1],
            **window_arguments((kernel_h, kernel_w), stride, padding, dilation),
            "POWER": power,
            "ROW_NORM": row_norm,
            "ACTIVATION": ACTIVATIONS[activation],
            "CHECK": any(padding),
            "EVEN_K": inner % tile.block_k == 0,
            "FOLD": channels if fold else 0,
            "UNIT_IN": unit(group_in),
            "UNIT_OUT": unit(group_out),
            "PARTS": parts,
            # Parts of a tile that make up one entry of the map.
            "ENTRY_PARTS": max(1, MAP_COLUMNS.value * parts // tile.block_n),
            "SINGLE": kernel_h == kernel_w == 1,
            "B_IN_MEMORY": isinstance(b, Tensor),
            "PRECISION": dot_precision(x.dtype, arch),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
        },
        gemm=True,
        vector_operands=aligned,
        plain=plain,
        dtype=x.dtype,
    )
    if pack_later:
        gate = pack_mask(y > 0)
    return y, multiplier, gate, out_squares


def conv2d_fused(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    b: float | Tensor = 2.0,
    eps: float = CONV_EPS,
    activation: str = "none",
    want_multiplier: bool = False,
    want_gate: bool = False,
    want_squares: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B-cos convolution with its epilogue; see :func:`bcos_rt.kernels.ops.conv2d_fused` for every argument."""
    if groups == x.shape[1] and groups > 1:
        from bcos_rt.kernels.triton.depthwise import depthwise_fused

        return depthwise_fused(
            x, weight, squares, bias, scale, shift, residual, stride, padding, dilation, groups, b, eps, activation,
            want_multiplier, want_gate, want_squares,
        )  # fmt: skip
    if squares is None and not (isinstance(b, float | int) and b == 1):
        squares = square_sum(x, groups)
    pad = -x.shape[1] % (16 // x.element_size()) if groups == 1 else 0
    if pad:
        # A place must start on 16 bytes for 128-bit loads: 6 channels become 8. Zeros change neither z nor the norm.
        x, weight = F.pad(nhwc(x), (0, pad)).permute(0, 3, 1, 2), F.pad(weight, (0, 0, 0, 0, 0, pad))
    out = launch_forward(
        nhwc(x), nhwc(weight), None if squares is None else nhwc(squares), bias, scale, shift,
        None if residual is None else nhwc(residual), stride, padding, dilation, groups, b, eps, activation,
        want_multiplier, want_gate, want_squares, False, config, "conv2d",
    )  # fmt: skip
    y, multiplier, gate, out_squares = (nchw(t) for t in out)
    return y, multiplier, gate, out_squares

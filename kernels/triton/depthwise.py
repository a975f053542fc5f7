"""Depthwise convolution (every filter sees one channel): B-cos forward, adjoint, and gradient of the weight.

With ``c = o // multiple`` (O = multiple C filters) and ``h = p stride - pad + r dil``, ``w`` likewise:

    z[n, p, q, o] = sum over (r, s) of x[n, h, w, c] weight[o, r, s] + bias[o]
    norm          = sqrt(sum over (r, s) of x[n, h, w, c]^2 + eps)               (each filter's own: one channel)
    m = (|z| / norm)^(B-1)      u = z m scale + shift + residual      y = gate(u) u      multiplier = m scale gate(u)

    G[m, h, w, c] = sum over (r, s, o) with h + pad - r dil = p stride of grad[m, p, q, o] weight[o, r, s]  + identity
    out = G * multiplier        raw = G * gate        (of image m // K, where every image has K classes)

    grad_w[o, r, s] = sum over (n, p, q) of grad_z[n, p, q, o] x[n, h, w, c]

No matrices are multiplied: a few multiplications per element read, so memory and the number of instructions decide. A
thread owns one vector of channels at one column of the image and walks over ``ROWS`` output rows of it at once; a row
of x is loaded, converted and squared once for all of the output rows it is part of. Kernel rows are therefore
compile-time constants (``TAPS`` of them at a time, a divisor of the kernel's height), kernel columns a run-time loop;
any kernel size works. The adjoint is the same walk over grad, kernel rows in reverse, one launch index per parity class
``(h mod stride, w mod stride)``: those places meet the same kernel places, and no inserted zero is multiplied.
"""

# ruff: noqa: RUF005 (Triton compiles a sum of tuples, not a starred element)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.reference import CONV_EPS, map_entries
from bcos_rt.kernels.triton.channel_tiles import vector_elements
from bcos_rt.kernels.triton.common import (
    ACTIVATIONS,
    MAP_COLUMNS,
    class_steps,
    classes_per_image,
    empty,
    forward_epilogue,
    nchw,
    nhwc,
    optional_nhwc,
    power_mode,
    transposed_epilogue,
    unit,
    window_arguments,
)
from bcos_rt.kernels.triton.conv_transposed import class_taps
from bcos_rt.kernels.triton.launch import Config, launch

__all__ = ["depthwise_fused", "depthwise_grad_weight", "depthwise_transposed", "rows_and_taps"]

# Vectors a thread holds at most (sums, image rows, the rows' sums of squares): 20 of 16-bit values spill.
_HELD = 18
# Programs below which fewer rows per thread fill the GPU better: two for each of an H100's 132 multiprocessors.
_PROGRAMS = 264
# Kernel places whose gradients a program sums at a time.
_GRAD_TAPS = 9
# Programs along the pixels of a weight gradient at most; each writes one partial sum.
_GRAD_PARTS = 256


@triton.jit
def _tiles(COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tuple of ``COUNT`` tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    return tiles


@triton.jit
def _window_sums(
    x_ptr,
    weight_ptr,
    image,
    row,
    column,
    place_in,
    channel,
    channel_in,
    filter_of,
    height,
    width,
    channels,
    filters,
    first_tap,
    taps_h,
    taps_w,
    tap_step_h,
    tap_step_w,
    row_unit,
    column_step,
    NORM: tl.constexpr,
    REPEATS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Weighted sums over windows of ``ROWS`` output rows, and their sums of squares: two tuples of [M, N], fp32.

    Output row i reads image rows ``row + (i ROW_STEP + t TAP_STEP) row_unit``, kernel rows t, and columns ``column +
    s column_step``. ``channel`` [N] is the first of ``REPEATS`` neighbouring channels of x that are summed up,
    ``filter_of`` the filter of the first.
    """
    SPAN: tl.constexpr = (ROWS - 1) * ROW_STEP + (TAPS - 1) * TAP_STEP + 1
    sums = _tiles(ROWS, BLOCK_M, BLOCK_N)
    norms = _tiles(ROWS if NORM else 0, BLOCK_M, BLOCK_N)
    for block in range(taps_h // TAPS):
        first_row = row + block * (TAPS * TAP_STEP) * row_unit
        squares = _tiles(SPAN if NORM else 0, BLOCK_M, BLOCK_N)
        for s in range(taps_w):
            w = column + s * column_step
            column_inside = place_in & (w >= 0) & (w < width)
            start = (image * height + first_row) * width + w
            tap = first_tap + block * TAPS * tap_step_h + s * tap_step_w
            for repeat in tl.static_range(REPEATS):
                values = ()
                for i in tl.static_range(SPAN):
                    h = first_row + i * row_unit
                    inside = column_inside & (h >= 0) & (h < height)
                    offset = (start + i * row_unit * width)[:, None] * channels + (channel + repeat)[None, :]
                    value = tl.load(x_ptr + offset, mask=inside[:, None] & channel_in[None, :], other=0.0)
                    values = values + (value.to(tl.float32),)
                if NORM:
                    longer = ()
                    for i in tl.static_range(SPAN):
                        longer = longer + (squares[i] + values[i] * values[i],)
                    squares = longer
                for t in tl.static_range(TAPS):
                    at = (tap + t * tap_step_h) * filters + filter_of + repeat
                    weight = tl.load(weight_ptr + at, mask=channel_in, other=0.0).to(tl.float32)[None, :]
                    added = ()
                    for i in tl.static_range(ROWS):
                        added = added + (sums[i] + values[i * ROW_STEP + t * TAP_STEP] * weight,)
                    sums = added
        if NORM:
            for t in tl.static_range(TAPS):
                grown = ()
                for i in tl.static_range(ROWS):
                    grown = grown + (norms[i] + squares[i * ROW_STEP + t * TAP_STEP],)
                norms = grown
    return sums, norms


@triton.jit
def depthwise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    multiplier_ptr,
    gate_ptr,
    squares_ptr,
    b,
    eps,
    lanes_total,
    bands,
    height,
    width,
    out_height,
    out_width,
    channel_units,
    gate_stride,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    row_unit,
    dilation_w,
    kernel_w,
    POWER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    B_IN_MEMORY: tl.constexpr,
    UNIT: tl.constexpr,
    MULTIPLE: tl.constexpr,
    KERNEL_H: tl.constexpr,
    ROW_STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """z, its norm and the epilogue of ``ROWS`` output rows at BLOCK_M columns, BLOCK_N filters."""
    # Multiples of a compile-time unit: this is how the compiler knows that 128-bit accesses are aligned.
    channels = channel_units * UNIT
    filters = channel_units * (UNIT * MULTIPLE)
    lanes = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane_in = lanes < lanes_total
    q = lanes % out_width
    band = lanes // out_width
    p = band % bands * ROWS
    image = band // bands
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_in = channel < filters

    sums, norms = _window_sums(
        x_ptr,
        weight_ptr,
        image,
        p * stride_h - padding_h,
        q * stride_w - padding_w,
        lane_in,
        channel // MULTIPLE,
        channel_in,
        channel,
        height,
        width,
        channels,
        filters,
        0,
        KERNEL_H,
        kernel_w,
        kernel_w,
        1,
        row_unit,
        dilation_w,
        POWER != 0,
        1,
        ROW_STEP,
        TAP_STEP,
        ROWS,
        TAPS,
        BLOCK_M,
        BLOCK_N,
    )

    ENTRY: tl.constexpr = MAP_COLUMNS if BLOCK_N > MAP_COLUMNS else BLOCK_N
    exponent = b
    if B_IN_MEMORY:
        exponent = tl.load(b).to(tl.float32)
    for i in tl.static_range(ROWS):
        row_in = lane_in & (p + i < out_height)
        rows = (image * out_height + p + i) * out_width + q
        inverse_norm = 1.0
        if POWER != 0:
            inverse_norm = tl.rsqrt(norms[i] + eps)
        byte = tl.program_id(1) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        stored = forward_epilogue(
            sums[i],
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
            channel_in,
            filters,
            byte,
            byte < gate_stride,
            gate_stride,
            POWER,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
        )
        if squares_ptr is not None:
            parts = tl.sum(tl.reshape(stored * stored, (BLOCK_M, BLOCK_N // ENTRY, ENTRY)), 2)
            entry = tl.program_id(1) * (BLOCK_N // ENTRY) + tl.arange(0, BLOCK_N // ENTRY)
            entries = tl.cdiv(filters, MAP_COLUMNS)
            entry_in = row_in[:, None] & (entry < entries)[None, :]
            tl.store(squares_ptr + rows[:, None] * entries + entry[None, :], parts, mask=entry_in)


@triton.jit
def depthwise_transposed_kernel(
    grad_ptr,
    weight_ptr,
    identity_ptr,
    multiplier_ptr,
    gate_ptr,
    out_ptr,
    raw_ptr,
    lanes_total,
    bands,
    class_width,
    per_image,
    height,
    width,
    out_height,
    out_width,
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
    row_unit,
    q_step,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    GATE_BITS: tl.constexpr,
    UNIT: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ROW_STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``G * multiplier`` and ``G * gate`` of ``ROWS`` rows of one parity class at BLOCK_M columns, BLOCK_N channels."""
    channels = channel_units * UNIT
    filters = channel_units * (UNIT * MULTIPLE)
    parity_h = tl.program_id(2) // stride_w
    parity_w = tl.program_id(2) % stride_w
    lanes = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    class_column = lanes % class_width
    band = lanes // class_width
    class_row = band % bands * ROWS
    sample = band // bands
    w = class_column * stride_w + parity_w
    lane_in = (lanes < lanes_total) & (w < width)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_in = channel < channels

    first_r, taps_h, offset_p = class_taps(parity_h, padding_h, dilation_h, kernel_h, stride_h, STEP_H)
    first_s, taps_w, offset_q = class_taps(parity_w, padding_w, dilation_w, kernel_w, stride_w, STEP_W)
    # From the last kernel place to the first, so that p and q count up.
    last_r = first_r + (taps_h - 1) * STEP_H
    last_s = first_s + (taps_w - 1) * STEP_W
    sums, _ = _window_sums(
        grad_ptr,
        weight_ptr,
        sample,
        class_row + offset_p - (taps_h - 1) * (TAP_STEP * row_unit),
        class_column + offset_q - (taps_w - 1) * q_step,
        lane_in,
        channel * MULTIPLE,
        channel_in,
        channel * MULTIPLE,
        out_height,
        out_width,
        filters,
        filters,
        last_r * kernel_w + last_s,
        taps_h,
        taps_w,
        -STEP_H * kernel_w,
        -STEP_W,
        row_unit,
        q_step,
        False,
        MULTIPLE,
        ROW_STEP,
        TAP_STEP,
        ROWS,
        TAPS,
        BLOCK_M,
        BLOCK_N,
    )

    for i in tl.static_range(ROWS):
        h = (class_row + i) * stride_h + parity_h
        transposed_epilogue(
            sums[i],
            identity_ptr,
            multiplier_ptr,
            gate_ptr,
            out_ptr,
            raw_ptr,
            ((sample * height + h) * width + w)[:, None],
            ((sample // per_image * height + h) * width + w)[:, None],
            channel,
            channels,
            (lane_in & (h < height))[:, None] & channel_in[None, :],
            gate_stride,
            GATE_BITS,
        )


@triton.jit
def depthwise_grad_weight_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    rows_total,
    rows_per_program,
    height,
    width,
    out_height,
    out_width,
    channel_units,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    kernel_w,
    taps,
    UNIT: tl.constexpr,
    MULTIPLE: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial[program, tap, o]: the sum over this program's pixels, for ``TAPS`` kernel places and BLOCK_N filters."""
    channels = channel_units * UNIT
    filters = channel_units * (UNIT * MULTIPLE)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_in = channel < filters
    first_tap = tl.program_id(2) * TAPS
    first_row = tl.program_id(0) * rows_per_program
    sums = _tiles(TAPS, BLOCK_M, BLOCK_N)
    for start in range(first_row, tl.minimum(first_row + rows_per_program, rows_total), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_in = rows < rows_total
        h0 = rows // out_width % out_height * stride_h - padding_h
        w0 = rows % out_width * stride_w - padding_w
        image = rows // (out_width * out_height)
        grad_offset = rows[:, None] * filters + channel[None, :]
        grad = tl.load(grad_ptr + grad_offset, mask=row_in[:, None] & channel_in[None, :], other=0.0).to(tl.float32)
        added = ()
        for t in tl.static_range(TAPS):
            tap = first_tap + t
            h = h0 + tap // kernel_w * dilation_h
            w = w0 + tap % kernel_w * dilation_w
            inside = row_in & (h >= 0) & (h < height) & (w >= 0) & (w < width) & (tap < taps)
            offset = ((image * height + h) * width + w)[:, None] * channels + (channel // MULTIPLE)[None, :]
            x = tl.load(x_ptr + offset, mask=inside[:, None] & channel_in[None, :], other=0.0).to(tl.float32)
            added = added + (sums[t] + grad * x,)
        sums = added
    for t in tl.static_range(TAPS):
        at = (tl.program_id(0) * taps + first_tap + t) * filters + channel
        tl.store(partial_ptr + at, tl.sum(sums[t], 0), mask=channel_in & (first_tap + t < taps))


def rows_and_taps(rows: Sequence[int], taps: int, row_step: int, tap_step: int, norm: bool) -> tuple[int, int]:
    """Output rows a thread walks over at once (one of ``rows``) and kernel rows per step (a divisor of ``taps``).

    Those with the fewest loads, of image rows and of weights, per product, as long as what a thread holds fits its
    registers. Rows of output are ``row_step`` image rows apart, kernel rows ``tap_step``; with ``norm`` a sum of
    squares is kept for each image row.
    """
    choices = []
    for count in rows:
        for part in range(1, taps + 1):
            span = (count - 1) * row_step + (part - 1) * tap_step + 1
            fits = count + span * (1 + norm) <= _HELD
            # More than two rows are not worth their registers where no image row serves two of them.
            fits = fits and (count <= 2 or span < count * part)
            if taps % part == 0 and fits:
                choices.append(((span + part) / (count * part), count, -part))
    if not choices:
        return rows[0], 1
    _, count, part = min(choices)
    return count, -part


def _tile(
    x: Tensor, config: Config | None, channels: int, places: tuple[int, int], taps: tuple[int, int, int, bool]
) -> Config:
    """The tile rule: 64 channels (one entry of the map, 128 bytes of 16-bit values) or all of fewer, one 128-bit vector
    a thread, and in ``block_k`` as many output rows a thread as :func:`rows_and_taps` likes, fewer for small problems.

    ``places``: output rows, and columns of all images; ``taps``: as for :func:`rows_and_taps`.
    """
    widest = max(8, triton.next_power_of_2(channels))
    if config is not None:
        # No two programs share an entry of the map.
        block_n = min(max(config.block_n, MAP_COLUMNS.value), widest)
        return Config(config.block_m, block_n, max(config.block_k, 1), config.num_warps, config.num_stages)
    block_n = min(MAP_COLUMNS.value, widest)
    block_m = max(vector_elements(x) // block_n, 1)
    programs = places[0] * places[1] * -(-channels // block_n) // block_m
    rows, _ = rows_and_taps([n for n in (1, 2, 4) if programs >= n * _PROGRAMS or n == 1], *taps)
    return Config(block_m, block_n, rows)


def _packed(weight: Tensor) -> Tensor:
    """[O, 1, kh, kw] -> [kh, kw, O]: a view of what ``pack_transposed`` (``conv_transposed.py``) made, else a copy."""
    return weight[:, 0].permute(1, 2, 0).contiguous()


def depthwise_fused(
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
    """Depthwise B-cos convolution with its epilogue: ``groups`` = C, the weight [O, 1, kh, kw] with O a multiple of C.

    Arguments and results are those of :func:`bcos_rt.kernels.ops.conv2d_fused`; ``squares`` is not read, the norm of
    each channel's patch being summed up in the same loop. The map returned has one group: an entry per 64 channels.
    """
    x, residual = nhwc(x), optional_nhwc(residual)
    batch, height, width, channels = x.shape
    filters, _, kernel_h, kernel_w = weight.shape
    out_height = (height + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    row_unit = math.gcd(stride[0], dilation[0])
    power = 2 if isinstance(b, Tensor) else power_mode(b)
    taps = (kernel_h, stride[0] // row_unit, dilation[0] // row_unit, power != 0)
    tile = _tile(x, config, filters, (out_height, batch * out_width), taps)
    bands = -(-out_height // tile.block_k)
    lanes = batch * bands * out_width

    shape = (batch, out_height, out_width, filters)
    y = empty(x, shape)
    multiplier = empty(x, shape) if want_multiplier else None
    gate = None
    if want_gate and activation == "relu":
        gate = empty(x, (*shape[:3], -(-filters // 8)), torch.uint8)
    elif want_gate and activation != "none":
        gate = empty(x, shape)
    out_squares = empty(x, (*shape[:3], map_entries(filters)), torch.float32) if want_squares else None
    launch(
        "depthwise",
        depthwise_kernel,
        (-(-lanes // tile.block_m), -(-filters // tile.block_n)),
        tile,
        {
            "x_ptr": x,
            "weight_ptr": _packed(weight),
            "bias_ptr": bias,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "residual_ptr": residual,
            "y_ptr": y,
            "multiplier_ptr": multiplier,
            "gate_ptr": gate,
            "squares_ptr": out_squares,
            "b": b,
            "eps": eps,
            "lanes_total": lanes,
            "bands": bands,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "channel_units": channels // unit(channels),
            "gate_stride": 1 if gate is None else gate.shape[-1],
            "stride_h": stride[0],
            "stride_w": stride[1],
            "padding_h": padding[0],
            "padding_w": padding[1],
            "row_unit": row_unit,
            "dilation_w": dilation[1],
            "kernel_w": kernel_w,
            "POWER": power,
            "ACTIVATION": ACTIVATIONS[activation],
            "B_IN_MEMORY": isinstance(b, Tensor),
            "UNIT": unit(channels),
            "MULTIPLE": filters // channels,
            "KERNEL_H": kernel_h,
            "ROW_STEP": taps[1],
            "TAP_STEP": taps[2],
            "ROWS": tile.block_k,
            "TAPS": rows_and_taps((tile.block_k,), *taps)[1],
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=filters == channels and unit(channels) * x.element_size() >= 16,
        dtype=x.dtype,
    )
    nothing = x.new_empty(0)
    y, multiplier, gate, out_squares = (
        nothing if t is None else nchw(t) for t in (y, multiplier, gate, out_squares)
    )  # fmt: skip
    return y, multiplier, gate, out_squares


def depthwise_transposed(
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
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Adjoint of a depthwise convolution, weight [O, 1, kh, kw] and ``groups`` = C dividing O.

    Arguments and results are those of :func:`bcos_rt.kernels.ops.conv2d_transposed`.
    """
    grad = nhwc(grad)
    multiplier, identity, gate = (optional_nhwc(t) for t in (multiplier, identity, gate))
    batch, out_height, out_width, filters = grad.shape
    height, width = input_size
    kernel_h, kernel_w = weight.shape[2:]
    steps = class_steps(stride, dilation)
    p_step = steps.pop("p_step")
    # With a step of 1 a class meets every kernel row or none; otherwise their number differs between classes.
    taps = (kernel_h if steps["STEP_H"] == 1 else 1, 1, p_step, False)
    class_h, class_w = -(-height // stride[0]), -(-width // stride[1])
    classes = stride[0] * stride[1]
    tile = _tile(grad, config, groups, (class_h, batch * class_w * classes), taps)
    bands = -(-class_h // tile.block_k)
    lanes = batch * bands * class_w

    out = empty(grad, (batch, height, width, groups))
    raw = empty(grad, out.shape) if want_raw else None
    launch(
        "depthwise_transposed",
        depthwise_transposed_kernel,
        (-(-lanes // tile.block_m), -(-groups // tile.block_n), classes),
        tile,
        {
            "grad_ptr": grad,
            "weight_ptr": _packed(weight),
            "identity_ptr": identity,
            "multiplier_ptr": multiplier,
            "gate_ptr": gate if want_raw else None,
            "out_ptr": out,
            "raw_ptr": raw,
            "lanes_total": lanes,
            "bands": bands,
            "class_width": class_w,
            "per_image": classes_per_image(batch, multiplier, gate),
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "channel_units": groups // unit(groups),
            "gate_stride": 1 if gate is None else gate.shape[-1],
            **window_arguments((kernel_h, kernel_w), stride, padding, dilation),
            "row_unit": 1,
            **steps,
            "GATE_BITS": gate is not None and gate.dtype == torch.uint8,
            "UNIT": unit(groups),
            "MULTIPLE": filters // groups if groups else 1,
            "ROW_STEP": 1,
            "TAP_STEP": p_step,
            "ROWS": tile.block_k,
            "TAPS": rows_and_taps((tile.block_k,), *taps)[1],
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=filters == groups and unit(groups) * grad.element_size() >= 16,
        dtype=grad.dtype,
    )
    return nchw(out), grad.new_empty(0) if raw is None else nchw(raw)


def depthwise_grad_weight(
    grad_z: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    config: Config | None = None,
) -> Tensor:
    """Gradient of a depthwise convolution's weight, summed in a fixed order: the same bits on every run.

    Args:
        grad_z: [N, O, H', W'], the gradient of ``z = conv(x, weight)``; O a multiple of C.
        x: [N, C, H, W].
        kernel_size: (kh, kw).

    Returns:
        [O, 1, kh, kw] float32; zeros for an empty batch.
    """
    grad_z, x = nhwc(grad_z), nhwc(x)
    batch, height, width, channels = x.shape
    _, out_height, out_width, filters = grad_z.shape
    kernel_h, kernel_w = kernel_size
    taps = kernel_h * kernel_w
    tap_blocks = -(-taps // _GRAD_TAPS)
    rows = batch * out_height * out_width
    if config is None:
        block_n = min(MAP_COLUMNS.value, max(8, triton.next_power_of_2(filters)))
        tile = Config(max(vector_elements(x) // block_n, 1), block_n)
    else:
        tile = config
    # A few steps per program at least, so that the sum within a program and the partial sums are not the whole work.
    parts = min(_GRAD_PARTS, -(-rows // (4 * tile.block_m)))
    per_program = tile.block_m * -(-rows // (tile.block_m * parts)) if parts else 0
    parts = -(-rows // per_program) if parts else 0
    partial = empty(x, (parts, kernel_h, kernel_w, filters), torch.float32)
    launch(
        "depthwise_grad_weight",
        depthwise_grad_weight_kernel,
        (parts, -(-filters // tile.block_n), tap_blocks),
        tile,
        {
            "grad_ptr": grad_z,
            "x_ptr": x,
            "partial_ptr": partial,
            "rows_total": rows,
            "rows_per_program": per_program,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "channel_units": channels // unit(channels),
            "stride_h": stride[0],
            "stride_w": stride[1],
            "padding_h": padding[0],
            "padding_w": padding[1],
            "dilation_h": dilation[0],
            "dilation_w": dilation[1],
            "kernel_w": kernel_w,
            "taps": taps,
            "UNIT": unit(channels),
            "MULTIPLE": filters // channels,
            "TAPS": -(-taps // tap_blocks),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=False,
        dtype=x.dtype,
    )
    return partial.sum(0).permute(2, 0, 1)[:, None].contiguous()

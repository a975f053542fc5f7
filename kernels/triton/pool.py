"""Average and max pooling with the map of sums of squares, and their adjoints (the explanation's step through them).

    avg:  y[n, p, q, c] = (sum over the window's places of x[n, h, w, c]) / divisor[p, q]
    max:  y[n, p, q, c] = max over the window's places of x[n, h, w, c]       index = r kw + s of the place it picked
    squares = sum over the channels of a group of y^2                         (what the next layer's norm is made of)

with h = p stride - pad + r dilation, w likewise; places outside the image do not count, except in the divisor where
``count_include_pad`` says so (torch's rules). The adjoints gather over a place's windows, so that every result is
written once, in a fixed order of sums and without atomics:

    avg:  G[m, h, w, c] = sum over the windows (p, q) that hold (h, w) of grad[m, p, q, c] / divisor[p, q] + identity
    max:  G[m, h, w, c] = sum over those of grad[m, p, q, c] where index[p, q, c] is the place (h, w)    + identity
    out = G * multiplier          raw = G * gate          (of image m // K, where every image has K classes)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.reference_layers import pooled_size, window_index_dtype
from bcos_rt.kernels.triton.channel_tiles import (
    ELEMENTS,
    channel_tile,
    place_tile,
    store_squares,
    tile_arguments,
    total_channels,
    vector_elements,
)
from bcos_rt.kernels.triton.common import (
    classes_per_image,
    empty,
    nhwc,
    optional_nhwc,
    transposed_epilogue,
    window_arguments,
)
from bcos_rt.kernels.triton.launch import Config, launch

__all__ = ["avg_pool2d", "avg_pool2d_transposed", "max_pool2d", "max_pool2d_transposed"]


@triton.jit
def _counted(first, kernel, size, padding, INCLUDE_PAD: tl.constexpr):
    """Places of the windows starting at ``first`` that the divisor counts, along one axis; at least 1."""
    if INCLUDE_PAD:
        # Rows below even the padding, where ceil_mode lets a window stick out, do not count.
        count = tl.minimum(first + kernel, size + padding) - first
    else:
        count = tl.minimum(first + kernel, size) - tl.maximum(first, 0)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def avg_pool2d_kernel(
    x_ptr,
    y_ptr,
    squares_ptr,
    places_total,
    height,
    width,
    out_height,
    out_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    units,
    groups,
    chunks,
    INCLUDE_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``y = sum / divisor`` of one tile of output places and channels; optionally its sums of squares."""
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place_in = places < places_total
    channel, channel_in = channel_tile(units, groups, chunks, UNIT, EXACT, PARTS, WIDTH)
    channels = total_channels(units, groups, UNIT, EXACT)
    h0 = (places // out_width) % out_height * stride_h - padding_h
    w0 = places % out_width * stride_w - padding_w
    image = places // (out_width * out_height)

    total = tl.zeros((BLOCK_M, PARTS * WIDTH), tl.float32)
    for r in range(kernel_h):
        for s in range(kernel_w):
            h = h0 + r
            w = w0 + s
            inside = place_in & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            offset = ((image * height + h) * width + w)[:, None] * channels + channel[None, :]
            mask = inside[:, None] & channel_in[None, :]
            total += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    divisor = _counted(h0, kernel_h, height, padding_h, INCLUDE_PAD)
    divisor *= _counted(w0, kernel_w, width, padding_w, INCLUDE_PAD)
    y = (total * (1.0 / divisor)[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + places[:, None] * channels + channel[None, :], y, mask=place_in[:, None] & channel_in[None, :])
    if squares_ptr is not None:
        store_squares(
            y.to(tl.float32), squares_ptr, places, place_in, channel_in, groups * chunks, BLOCK_M, PARTS, WIDTH
        )


@triton.jit
def global_avg_pool2d_kernel(
    x_ptr,
    y_ptr,
    squares_ptr,
    image_places,
    inverse_divisor,
    units,
    groups,
    chunks,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``y = sum / divisor`` where one window holds the image: BLOCK_M of its places at a time, one image a program."""
    image = tl.program_id(0)
    channel, channel_in = channel_tile(units, groups, chunks, UNIT, EXACT, PARTS, WIDTH)
    channels = total_channels(units, groups, UNIT, EXACT)
    total = tl.zeros((BLOCK_M, PARTS * WIDTH), tl.float32)
    for first in range(0, image_places, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        offset = (image * image_places + place)[:, None] * channels + channel[None, :]
        mask = (place < image_places)[:, None] & channel_in[None, :]
        total += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y = (tl.sum(total, 0) * inverse_divisor).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + image * channels + channel, y, mask=channel_in)
    if squares_ptr is not None:
        one = image + tl.arange(0, 1)
        store_squares(
            y.to(tl.float32)[None, :], squares_ptr, one, one >= 0, channel_in, groups * chunks, 1, PARTS, WIDTH
        )


@triton.jit
def max_pool2d_kernel(
    x_ptr,
    y_ptr,
    index_ptr,
    squares_ptr,
    places_total,
    height,
    width,
    out_height,
    out_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    units,
    groups,
    chunks,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The maximum of one tile of windows; optionally which place it is at, and the sums of squares."""
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place_in = places < places_total
    channel, channel_in = channel_tile(units, groups, chunks, UNIT, EXACT, PARTS, WIDTH)
    channels = total_channels(units, groups, UNIT, EXACT)
    h0 = (places // out_width) % out_height * stride_h - padding_h
    w0 = places % out_width * stride_w - padding_w
    image = places // (out_width * out_height)

    best = tl.full((BLOCK_M, PARTS * WIDTH), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M, PARTS * WIDTH), -1, tl.int32)
    for r in range(kernel_h):
        for s in range(kernel_w):
            h = h0 + r * dilation_h
            w = w0 + s * dilation_w
            inside = place_in & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            offset = ((image * height + h) * width + w)[:, None] * channels + channel[None, :]
            mask = inside[:, None] & channel_in[None, :]
            value = tl.load(x_ptr + offset, mask=mask, other=float("-inf")).to(tl.float32)
            # As torch: the first of equal maxima, but the last NaN.
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            if index_ptr is not None:
                # A window of -inf alone picks its first place.
                index = tl.where(better | (mask & (index < 0)), r * kernel_w + s, index)
    offset = places[:, None] * channels + channel[None, :]
    mask = place_in[:, None] & channel_in[None, :]
    y = best.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, y, mask=mask)
    if index_ptr is not None:
        tl.store(index_ptr + offset, index.to(index_ptr.dtype.element_ty), mask=mask)
    if squares_ptr is not None:
        store_squares(
            y.to(tl.float32), squares_ptr, places, place_in, channel_in, groups * chunks, BLOCK_M, PARTS, WIDTH
        )


@triton.jit
def pool2d_transposed_kernel(
    grad_ptr,
    index_ptr,
    multiplier_ptr,
    identity_ptr,
    gate_ptr,
    out_ptr,
    raw_ptr,
    places_total,
    per_image,
    gate_stride,
    height,
    width,
    out_height,
    out_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    windows_h,
    windows_w,
    units,
    groups,
    chunks,
    INCLUDE_PAD: tl.constexpr,
    GATE_BITS: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``G * multiplier`` and ``G * gate`` of one tile of input places; max pooling where there is an ``index``.

    A place is met by at most ``windows_h * windows_w`` windows: they are tried from the last that can hold it.
    """
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place_in = places < places_total
    channel, channel_in = channel_tile(units, groups, chunks, UNIT, EXACT, PARTS, WIDTH)
    channels = total_channels(units, groups, UNIT, EXACT)
    h = (places // width) % height + padding_h
    w = places % width + padding_w
    sample = places // (width * height)
    image = sample // per_image
    last_p = tl.minimum(h // stride_h, out_height - 1)
    last_q = tl.minimum(w // stride_w, out_width - 1)

    total = tl.zeros((BLOCK_M, PARTS * WIDTH), tl.float32)
    for i in range(windows_h):
        p = last_p - i
        down = h - p * stride_h
        inside_h = place_in & (p >= 0) & (down // dilation_h < kernel_h) & (down % dilation_h == 0)
        for j in range(windows_w):
            q = last_q - j
            right = w - q * stride_w
            inside = inside_h & (q >= 0) & (right // dilation_w < kernel_w) & (right % dilation_w == 0)
            mask = inside[:, None] & channel_in[None, :]
            window = p * out_width + q
            at = (sample * (out_height * out_width) + window)[:, None] * channels + channel[None, :]
            value = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if index_ptr is not None:
                at = (image * (out_height * out_width) + window)[:, None] * channels + channel[None, :]
                picked = tl.load(index_ptr + at, mask=mask, other=0).to(tl.int32)
                here = down // dilation_h * kernel_w + right // dilation_w
                value = tl.where(picked == here[:, None], value, 0.0)
            else:
                divisor = _counted(p * stride_h - padding_h, kernel_h, height, padding_h, INCLUDE_PAD)
                divisor *= _counted(q * stride_w - padding_w, kernel_w, width, padding_w, INCLUDE_PAD)
                value *= (1.0 / divisor)[:, None]
            total += value

    transposed_epilogue(
        total,
        identity_ptr,
        multiplier_ptr,
        gate_ptr,
        out_ptr,
        raw_ptr,
        places[:, None],
        (image * (height * width) + places % (height * width))[:, None],
        channel,
        channels,
        place_in[:, None] & channel_in[None, :],
        gate_stride,
        GATE_BITS,
    )


def _image(squares: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if squares is None else squares.permute(0, 3, 1, 2)


def _global_avg_pool2d(
    x: Tensor, divisor: int, want_squares: bool, groups: int, config: Config | None
) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = x.shape
    # 64 channels are whole 128-byte lines; so many programs keep a small batch's few images from leaving the GPU idle.
    wide = min(place_tile(channels, groups).block_n, 64)
    tile = config or Config(min(64, triton.next_power_of_2(height * width)), wide)
    programs, parts, arguments = tile_arguments(channels, groups, tile)
    y = empty(x, (batch, 1, 1, channels))
    squares = empty(x, (batch, 1, 1, parts), torch.float32) if want_squares else None
    launch(
        "global_avg_pool2d",
        global_avg_pool2d_kernel,
        (batch, programs),
        tile,
        {
            "x_ptr": x,
            "y_ptr": y,
            "squares_ptr": squares,
            "image_places": height * width,
            "inverse_divisor": 1.0 / divisor,
            **arguments,
        },
        vector_operands=False,
        dtype=x.dtype,
    )
    return y.permute(0, 3, 1, 2), _image(squares, x)


def avg_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    want_squares: bool = False,
    groups: int = 1,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Average pooling and its map; see :func:`bcos_rt.kernels.ops.avg_pool2d`."""
    out_height, out_width = pooled_size(x.shape[2:], kernel_size, stride, padding, (1, 1), ceil_mode)
    x = nhwc(x)
    batch, height, width, channels = x.shape
    groups = groups if want_squares else 1
    ends = [kernel_size[i] - padding[i] for i in range(2)]
    if out_height == out_width == 1 and ends[0] >= height and ends[1] >= width:
        divisor = height * width
        if count_include_pad:
            divisor = (min(ends[0], height + padding[0]) + padding[0]) * (min(ends[1], width + padding[1]) + padding[1])
        return _global_avg_pool2d(x, divisor, want_squares, groups, config)
    places = batch * out_height * out_width
    tile = config or place_tile(channels, groups)
    programs, parts, arguments = tile_arguments(channels, groups, tile)
    y = empty(x, (batch, out_height, out_width, channels))
    squares = empty(x, (batch, out_height, out_width, parts), torch.float32) if want_squares else None
    launch(
        "avg_pool2d",
        avg_pool2d_kernel,
        (-(-places // tile.block_m), programs),
        tile,
        {
            "x_ptr": x,
            "y_ptr": y,
            "squares_ptr": squares,
            "places_total": places,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "INCLUDE_PAD": count_include_pad,
            **window_arguments(kernel_size, stride, padding),
            **arguments,
        },
        vector_operands=arguments["UNIT"] * x.element_size() >= 16,
        dtype=x.dtype,
    )
    return y.permute(0, 3, 1, 2), _image(squares, x)


def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
    want_index: bool = False,
    want_squares: bool = False,
    groups: int = 1,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Max pooling, the places it picked and its map; see :func:`bcos_rt.kernels.ops.max_pool2d`."""
    out_height, out_width = pooled_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    x = nhwc(x)
    batch, height, width, channels = x.shape
    groups = groups if want_squares else 1
    places = batch * out_height * out_width
    # With more than a vector a thread, the index's bytes would be shuffled to other threads than their values.
    tile = config or place_tile(channels, groups, vector_elements(x))
    programs, parts, arguments = tile_arguments(channels, groups, tile)
    y = empty(x, (batch, out_height, out_width, channels))
    index = empty(x, y.shape, window_index_dtype(kernel_size)) if want_index else None
    squares = empty(x, (batch, out_height, out_width, parts), torch.float32) if want_squares else None
    launch(
        "max_pool2d",
        max_pool2d_kernel,
        (-(-places // tile.block_m), programs),
        tile,
        {
            "x_ptr": x,
            "y_ptr": y,
            "index_ptr": index,
            "squares_ptr": squares,
            "places_total": places,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            **window_arguments(kernel_size, stride, padding, dilation),
            **arguments,
        },
        vector_operands=arguments["UNIT"] * x.element_size() >= 16,
        dtype=x.dtype,
    )
    return y.permute(0, 3, 1, 2), _image(index, x), _image(squares, x)


def _transposed(
    name: str,
    grad: Tensor,
    index: Tensor | None,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    count_include_pad: bool,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
    config: Config | None,
) -> tuple[Tensor, Tensor]:
    grad = nhwc(grad)
    batch, out_height, out_width, channels = grad.shape
    height, width = input_size
    places = batch * height * width
    extents = [dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)]
    bits = gate is not None and gate.dtype == torch.uint8
    # As in max_pool2d.
    elements = ELEMENTS if index is None else vector_elements(grad)
    tile = config or place_tile(channels, 1, elements)
    programs, _, arguments = tile_arguments(channels, 1, tile)
    out = empty(grad, (batch, height, width, channels))
    raw = empty(grad, out.shape) if want_raw else None
    launch(
        name,
        pool2d_transposed_kernel,
        (-(-places // tile.block_m), programs),
        tile,
        {
            "grad_ptr": grad,
            "index_ptr": optional_nhwc(index),
            "multiplier_ptr": optional_nhwc(multiplier),
            "identity_ptr": optional_nhwc(identity),
            "gate_ptr": nhwc(gate) if gate is not None and want_raw else None,
            "out_ptr": out,
            "raw_ptr": raw,
            "places_total": places,
            "per_image": classes_per_image(batch, index, multiplier, gate),
            "gate_stride": gate.shape[1] if gate is not None else 1,
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "windows_h": min(-(-extents[0] // stride[0]), out_height),
            "windows_w": min(-(-extents[1] // stride[1]), out_width),
            "INCLUDE_PAD": count_include_pad,
            "GATE_BITS": bits,
            **window_arguments(kernel_size, stride, padding, dilation),
            **arguments,
        },
        vector_operands=arguments["UNIT"] * grad.element_size() >= 16,
        dtype=grad.dtype,
    )
    return out.permute(0, 3, 1, 2), _image(raw, grad)


def avg_pool2d_transposed(
    grad: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Adjoint of :func:`avg_pool2d` with its epilogue; see :func:`bcos_rt.kernels.ops.avg_pool2d_transposed`."""
    pooled_size(input_size, kernel_size, stride, padding, (1, 1), ceil_mode)
    return _transposed(
        "avg_pool2d_transposed", grad, None, input_size, kernel_size, stride, padding, (1, 1), count_include_pad,
        multiplier, identity, gate, want_raw, config,
    )  # fmt: skip


def max_pool2d_transposed(
    grad: Tensor,
    index: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Adjoint of :func:`max_pool2d` with its epilogue; see :func:`bcos_rt.kernels.ops.max_pool2d_transposed`."""
    return _transposed(
        "max_pool2d_transposed", grad, index, input_size, kernel_size, stride, padding, dilation, True,
        multiplier, identity, gate, want_raw, config,
    )  # fmt: skip

"""Image encoding, pooling and normalisation in plain PyTorch, any float dtype, any device.

The signatures are those of :mod:`bcos_rt.kernels.ops`. Sums, statistics and maps of sums of squares are computed in
float32, in float64 for float64 input; results are rounded to the input's dtype once. Images are [N, C, H, W] in
channels-last memory.

In an explanation every map here is held linear: pooling is (a max picks constant places), an activation is a constant
gate, and a normalisation keeps its variance constant. The functions named ``*_transposed`` apply the adjoints of those
linear maps to gradients [N K, C, H, W] of K classes per image, the class fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.reference import (
    MAP_COLUMNS,
    activation_gate,
    channels_last,
    map_entries,
    norm_dtype,
    per_row,
    square_sum,
    transposed_rows,
)

__all__ = [
    "ENCODED_CHANNELS",
    "avg_pool2d",
    "avg_pool2d_transposed",
    "encode_image",
    "group_norm",
    "group_norm_transposed",
    "layer_norm",
    "layer_norm_transposed",
    "max_pool2d",
    "max_pool2d_transposed",
    "pooled_size",
    "scale_act",
    "scale_act_transposed",
    "transposed_epilogue",
    "window_index_dtype",
]

# What an encoded image is padded to with zeros: 16 bytes a pixel in 16-bit storage.
ENCODED_CHANNELS = 8


def _maybe_squares(y: Tensor, groups: int, want: bool) -> Tensor:
    """Map of sums of squares as a convolution's: an entry for each ``MAP_COLUMNS`` channels of a group."""
    if not want:
        return y.new_empty(0)
    batch, channels, height, width = y.shape
    if groups < 1 or channels % groups:
        raise InvalidArgumentError("groups", groups, f"a divisor of the {channels} channels")
    size = channels // groups
    entries = map_entries(size)
    by_group = y.reshape(batch, groups, size, height, width)
    padded = F.pad(by_group, (0, 0, 0, 0, 0, entries * MAP_COLUMNS - size))
    return square_sum(padded.reshape(batch, groups * entries * MAP_COLUMNS, height, width), groups * entries)


def _transposed(
    total: Tensor,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """:func:`transposed_rows` on images."""

    def last(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.permute(0, 2, 3, 1)

    outs = transposed_rows(
        total.permute(0, 2, 3, 1).contiguous(), last(multiplier), last(identity), last(gate), want_raw, dtype
    )
    out, raw = (t.permute(0, 3, 1, 2) if t.ndim == 4 else t for t in outs)
    return out, raw


def transposed_epilogue(
    total: Tensor,
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
) -> tuple[Tensor, Tensor]:
    """The epilogue of the adjoints by itself, ``G = total + identity``, ``(G multiplier, G gate)``.

    Args:
        total, identity: [M, C, H, W], or rows [M, ..., C].
        multiplier: of N images for M = N K rows. ``gate``: the same, or a bit mask (uint8, C / 8 bytes a pixel).
        want_raw: the second result is empty otherwise.
    """
    # A copy: an op's results share no memory with its arguments.
    wide = total.to(norm_dtype(total), copy=True)
    if total.ndim == 4:
        return _transposed(wide, multiplier, identity, gate, want_raw, total.dtype)
    return transposed_rows(wide, multiplier, identity, gate, want_raw, total.dtype)


def encode_image(
    image: Tensor, mean: Tensor, std: Tensor, six_channels: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A network's input, ``(v_c - mean_c) / std_c`` for v = [x, 1 - x] (or x), padded with zeros to 8 channels.

    Args:
        image: [N, 3, H, W], uint8 (0 to 255) or floating point (0 to 1), any strides.
        mean, std: float32 [6], or [3] without ``six_channels``.
        dtype: of the result.

    Returns:
        The encoded image [N, 8, H, W] and its map of channel sums of squares [N, 1, H, W].
    """
    wide = torch.promote_types(dtype, torch.float32)
    if image.dtype == torch.uint8:
        x = image.to(wide) / 255
    else:
        wide = torch.promote_types(wide, image.dtype)
        x = image.to(wide)
    if six_channels:
        x = torch.cat([x, 1 - x], 1)
    x = (x - mean.to(wide)[:, None, None]) / std.to(wide)[:, None, None]
    encoded = channels_last(F.pad(x, (0, 0, 0, 0, 0, ENCODED_CHANNELS - x.shape[1])).to(dtype))
    return encoded, square_sum(encoded)


def pooled_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[int, int]:
    """Rows and columns of a pooled image, as torch counts them.

    Raises:
        InvalidArgumentError: an empty window or stride, more padding than half a window, or an empty result.
    """
    sizes = []
    for axis in range(2):
        size, kernel, step, pad = input_size[axis], kernel_size[axis], stride[axis], padding[axis]
        if kernel < 1:
            raise InvalidArgumentError("kernel_size", tuple(kernel_size), "two positive numbers")
        if step < 1:
            raise InvalidArgumentError("stride", tuple(stride), "two positive numbers")
        if dilation[axis] < 1:
            raise InvalidArgumentError("dilation", tuple(dilation), "two positive numbers")
        extent = dilation[axis] * (kernel - 1) + 1
        if not 0 <= pad <= kernel // 2:
            raise InvalidArgumentError("padding", tuple(padding), f"at most half of {tuple(kernel_size)}")
        out = (size + 2 * pad - extent + (step - 1 if ceil_mode else 0)) // step + 1
        # The last window must start inside the image or its left padding.
        if ceil_mode and (out - 1) * step >= size + pad:
            out -= 1
        if out < 1:
            raise InvalidArgumentError("kernel_size", tuple(kernel_size), f"a window within {tuple(input_size)}")
        sizes.append(out)
    return sizes[0], sizes[1]


def avg_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    want_squares: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Average pooling as :func:`torch.nn.functional.avg_pool2d`, with the result's map of sums of squares.

    Returns:
        y [N, C, H', W'] and squares [N, groups map_entries(C / groups), H', W'] (empty if not wanted).
    """
    pooled_size(x.shape[2:], kernel_size, stride, padding, (1, 1), ceil_mode)
    y = F.avg_pool2d(
        x.to(norm_dtype(x)), tuple(kernel_size), tuple(stride), tuple(padding), ceil_mode, count_include_pad
    )
    y = channels_last(y.to(x.dtype))
    return y, _maybe_squares(y, groups, want_squares)


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
) -> tuple[Tensor, Tensor]:
    """The adjoint of average pooling, [N K, C, H', W'] -> [N K, C, H, W], with the explanation's epilogue."""
    pooled_size(input_size, kernel_size, stride, padding, (1, 1), ceil_mode)
    wide = grad.to(norm_dtype(grad))
    shape_of_input = wide.new_empty(*grad.shape[:2], *input_size)
    total = torch.ops.aten.avg_pool2d_backward(
        wide, shape_of_input, list(kernel_size), list(stride), list(padding), ceil_mode, count_include_pad, None
    )
    return _transposed(total, multiplier, identity, gate, want_raw, grad.dtype)


def window_index_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    """What a position inside the window is stored as: one byte where 256 values suffice."""
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 256 else torch.int32


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Max pooling as :func:`torch.nn.functional.max_pool2d`: NaN is the greatest value.

    Returns:
        y [N, C, H', W']; the position ``r kw + s`` inside the window of what it picked (the first maximum; the last
        NaN), uint8, int32 for more than 256 places; squares as :func:`avg_pool2d`'s. Empty if not wanted.
    """
    size = pooled_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    y, flat = F.max_pool2d(
        x, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode, return_indices=True
    )
    y = channels_last(y)
    index = y.new_empty(0)
    if want_index:
        first_h, first_w = (torch.arange(size[i], device=x.device) * stride[i] - padding[i] for i in range(2))
        r = (flat // x.shape[3] - first_h[:, None]) // dilation[0]
        s = (flat % x.shape[3] - first_w) // dilation[1]
        index = channels_last((r * kernel_size[1] + s).to(window_index_dtype(kernel_size)))
    return y, index, _maybe_squares(y, groups, want_squares)


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
) -> tuple[Tensor, Tensor]:
    """The adjoint of picking the places ``index`` (:func:`max_pool2d`'s, [N, C, H', W']), with the epilogue."""
    rows, channels, out_h, out_w = grad.shape
    height, width = input_size
    place = index.to(torch.int64)
    first_h = torch.arange(out_h, device=grad.device)[:, None] * stride[0] - padding[0]
    first_w = torch.arange(out_w, device=grad.device) * stride[1] - padding[1]
    h = first_h + place // kernel_size[1] * dilation[0]
    w = first_w + place % kernel_size[1] * dilation[1]
    flat = per_row((h * width + w).flatten(2), rows)
    total = grad.new_zeros(rows, channels, height * width, dtype=norm_dtype(grad))
    total = total.scatter_add(2, flat, grad.to(total.dtype).flatten(2)).reshape(rows, channels, height, width)
    return _transposed(total, multiplier, identity, gate, want_raw, grad.dtype)


def _per_channel(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)[:, None, None]


def scale_act(
    x: Tensor, scale: Tensor, shift: Tensor, activation: str, want_squares: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """``y = act(scale_c x + shift_c)`` with its map of sums of squares: x [N, C, H, W], scale and shift [C]."""
    wide = norm_dtype(x)
    u = x.to(wide) * _per_channel(scale, wide) + _per_channel(shift, wide)
    y = u.relu() if activation == "relu" else u * activation_gate(u, activation)
    y = channels_last(y.to(x.dtype))
    return y, _maybe_squares(y, groups, want_squares)


def scale_act_transposed(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, activation: str, identity: Tensor | None = None
) -> Tensor:
    """``grad * scale_c * gate(scale_c x + shift_c) + identity``: grad [N K, C, H, W], x [N, C, H, W]."""
    wide = norm_dtype(grad)
    u = x.to(wide) * _per_channel(scale, wide) + _per_channel(shift, wide)
    slope = _per_channel(scale, wide) * activation_gate(u, activation)
    out = grad.to(wide) * per_row(slope, grad.shape[0])
    if identity is not None:
        out = out + identity.to(wide)
    return channels_last(out.to(grad.dtype))


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, want_squares: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation over the last dimension, ``(x - mean) rstd weight + bias``.

    Args:
        x: [..., C].
        weight, bias: [C] or None.

    Returns:
        y [..., C]; ``rstd = 1 / sqrt(var + eps)`` [...]; squares [..., 1] (empty if not wanted).
    """
    wide = x.to(norm_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = y.to(x.dtype).contiguous()
    squares = y.to(wide.dtype).square().sum(-1, keepdim=True) if want_squares else y.new_empty(0)
    return y, rstd.squeeze(-1), squares


def layer_norm_transposed(grad: Tensor, rstd: Tensor, weight: Tensor | None, identity: Tensor | None = None) -> Tensor:
    """The adjoint of :func:`layer_norm` with its variance constant, ``rstd (g w - mean_C(g w)) + identity``.

    Args:
        grad: [N K, ..., C].
        rstd: [N, ...].
    """
    g = grad.to(norm_dtype(grad))
    if weight is not None:
        g = g * weight.to(g.dtype)
    rows = rstd.to(g.dtype) if grad.ndim == 1 else per_row(rstd.to(g.dtype), grad.shape[0])
    out = rows[..., None] * (g - g.mean(-1, keepdim=True))
    if identity is not None:
        out = out + identity.to(g.dtype)
    return out.to(grad.dtype).contiguous()


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, want_squares: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Group normalisation of an image, over each group's channels and pixels.

    Args:
        x: [N, C, H, W].
        weight, bias: [C] or None.

    Returns:
        y [N, C, H, W]; ``rstd = 1 / sqrt(var + eps)`` [N, groups]; squares [N, groups, H, W] (empty if not wanted).
    """
    if groups < 1 or x.shape[1] % groups:
        raise InvalidArgumentError("groups", groups, f"a divisor of the {x.shape[1]} channels")
    n, channels, height, width = x.shape
    wide = x.to(norm_dtype(x)).reshape(n, groups, channels // groups, height, width)
    centred = wide - wide.mean((2, 3, 4), keepdim=True)
    rstd = ((centred * centred).mean((2, 3, 4), keepdim=True) + eps).rsqrt()
    y = (centred * rstd).flatten(1, 2)
    if weight is not None:
        y = y * _per_channel(weight, y.dtype)
    if bias is not None:
        y = y + _per_channel(bias, y.dtype)
    y = channels_last(y.to(x.dtype))
    squares = square_sum(y, groups) if want_squares else y.new_empty(0)
    return y, rstd.flatten(1), squares


def group_norm_transposed(
    grad: Tensor, rstd: Tensor, weight: Tensor | None, groups: int, identity: Tensor | None = None
) -> Tensor:
    """The adjoint of :func:`group_norm` with its variance constant, ``rstd (g w - mean(g w)) + identity``.

    Args:
        grad: [N K, C, H, W]; the mean is over each group's channels and pixels.
        rstd: [N, groups].
    """
    g = grad.to(norm_dtype(grad))
    if weight is not None:
        g = g * _per_channel(weight, g.dtype)
    n, channels, height, width = grad.shape
    g = g.reshape(n, groups, channels // groups, height, width)
    rows = per_row(rstd.to(g.dtype), grad.shape[0])[:, :, None, None, None]
    out = (rows * (g - g.mean((2, 3, 4), keepdim=True))).flatten(1, 2)
    if identity is not None:
        out = out + identity.to(g.dtype)
    return channels_last(out.to(grad.dtype))

"""Shapes, strides and dtypes of the fused ops' results, for tensors without data.

An engine evaluates every fused op on fake tensors several times while it is built. The reference function gives the
same answer through some thirty symbolic operations; these need one for each result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bcos_rt.kernels import reference, reference_layers
from bcos_rt.kernels.reference import map_entries, norm_dtype, output_size
from bcos_rt.kernels.reference_layers import ENCODED_CHANNELS, pooled_size, window_index_dtype

__all__ = ["SHAPES", "patch_norm_shape", "row_norm_shape"]


def _image(like: Tensor, batch: int, channels: int, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """[N, C, H, W], channels last in memory."""
    return like.new_empty((batch, size[0], size[1], channels), dtype=dtype or like.dtype).permute(0, 3, 1, 2)


def _squares(y: Tensor, groups: int, want: bool) -> Tensor:
    if not want:
        return y.new_empty(0)
    entries = groups * map_entries(y.shape[1] // groups)
    return _image(y, y.shape[0], entries, y.shape[2:], norm_dtype(y))


def _gate_channels(channels: int, activation: str) -> int:
    return math.ceil(channels / 8) if activation == "relu" else channels


def _conv2d_fused(
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
    b: float,
    eps: float,
    activation: str,
    want_multiplier: bool,
    want_gate: bool,
    want_squares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    batch, channels = x.shape[0], weight.shape[0]
    y = _image(x, batch, channels, size)
    multiplier = torch.empty_like(y) if want_multiplier else y.new_empty(0)
    gate = y.new_empty(0)
    if want_gate and activation != "none":
        dtype = torch.uint8 if activation == "relu" else y.dtype
        gate = _image(x, batch, _gate_channels(channels, activation), size, dtype)
    depthwise = groups == x.shape[1] and groups > 1
    return y, multiplier, gate, _squares(y, 1 if depthwise else groups, want_squares)


def _linear_fused(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    b: float,
    eps: float,
    activation: str,
    want_multiplier: bool,
    want_gate: bool,
    want_squares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, channels = x.shape[:-1], weight.shape[0]
    y = x.new_empty((*rows, channels))
    multiplier = torch.empty_like(y) if want_multiplier else y.new_empty(0)
    gate = out_squares = y.new_empty(0)
    if want_gate and activation != "none":
        dtype = torch.uint8 if activation == "relu" else y.dtype
        gate = x.new_empty((*rows, _gate_channels(channels, activation)), dtype=dtype)
    if want_squares:
        out_squares = x.new_empty((*rows, map_entries(channels)), dtype=norm_dtype(y))
    return y, multiplier, gate, out_squares


def _with_raw(out: Tensor, want_raw: bool) -> tuple[Tensor, Tensor]:
    return out, torch.empty_like(out) if want_raw else out.new_empty(0)


def _conv2d_transposed(
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
) -> tuple[Tensor, Tensor]:
    return _with_raw(_image(grad, grad.shape[0], groups * weight.shape[1], input_size), want_raw)


def _linear_transposed(
    grad: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
) -> tuple[Tensor, Tensor]:
    return _with_raw(grad.new_empty((*grad.shape[:-1], weight.shape[1])), want_raw)


def _transposed_epilogue(
    total: Tensor, multiplier: Tensor | None, identity: Tensor | None, gate: Tensor | None, want_raw: bool
) -> tuple[Tensor, Tensor]:
    if total.ndim == 4:
        return _with_raw(_image(total, total.shape[0], total.shape[1], total.shape[2:]), want_raw)
    return _with_raw(torch.empty_like(total), want_raw)


def _scale_act(
    x: Tensor, scale: Tensor, shift: Tensor, activation: str, want_squares: bool, groups: int
) -> tuple[Tensor, Tensor]:
    y = _image(x, x.shape[0], x.shape[1], x.shape[2:])
    return y, _squares(y, groups, want_squares)


def _scale_act_transposed(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, activation: str, identity: Tensor | None
) -> Tensor:
    return _image(grad, grad.shape[0], grad.shape[1], grad.shape[2:])


def _max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    want_index: bool,
    want_squares: bool,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    size = pooled_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    y = _image(x, x.shape[0], x.shape[1], size)
    index = y.new_empty(0)
    if want_index:
        index = _image(x, x.shape[0], x.shape[1], size, window_index_dtype(kernel_size))
    return y, index, _squares(y, groups, want_squares)


def _avg_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    want_squares: bool,
    groups: int,
) -> tuple[Tensor, Tensor]:
    size = pooled_size(x.shape[2:], kernel_size, stride, padding, (1, 1), ceil_mode)
    y = _image(x, x.shape[0], x.shape[1], size)
    return y, _squares(y, groups, want_squares)


def _max_pool2d_transposed(
    grad: Tensor, index: Tensor, input_size: Sequence[int], *options: Any
) -> tuple[Tensor, Tensor]:
    return _with_raw(_image(grad, grad.shape[0], grad.shape[1], input_size), options[-1])


def _avg_pool2d_transposed(
    grad: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    pooled_size(input_size, kernel_size, stride, padding, (1, 1), ceil_mode)
    return _with_raw(_image(grad, grad.shape[0], grad.shape[1], input_size), options[-1])


def _encode_image(
    image: Tensor, mean: Tensor, std: Tensor, six_channels: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    encoded = _image(image, image.shape[0], ENCODED_CHANNELS, image.shape[2:], dtype)
    return encoded, _image(encoded, image.shape[0], 1, image.shape[2:], norm_dtype(encoded))


def _in_order(x: Tensor) -> bool:
    """Whether ``x`` is contiguous; no symbolic size is compared, which would pin it."""
    expected = 1
    for i in range(x.ndim - 1, -1, -1):
        step, size = x.stride(i), x.shape[i]
        if not isinstance(step, int) or step != expected:
            return False
        if i and not isinstance(size, int):
            return False
        expected *= size if i else 1
    return True


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, want_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _in_order(x):
        return reference_layers.layer_norm(x, weight, bias, eps, want_squares)
    wide, rows = norm_dtype(x), x.shape[:-1]
    squares = x.new_empty((*rows, 1), dtype=wide) if want_squares else x.new_empty(0)
    return torch.empty_like(x), x.new_empty(rows, dtype=wide), squares


def _layer_norm_transposed(grad: Tensor, rstd: Tensor, weight: Tensor | None, identity: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape)


def row_norm_shape(x: Tensor, eps: float) -> Tensor:
    """Of :func:`reference.row_norm`."""
    if not _in_order(x):
        return reference.row_norm(x, eps)
    return x.new_empty((*x.shape[:-1], 1), dtype=norm_dtype(x))


def patch_norm_shape(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    """Of :func:`reference.patch_norm`."""
    if groups != 1:  # the order in memory is x's
        return reference.patch_norm(x, kernel_size, stride, padding, dilation, groups, eps)
    return _image(x, x.shape[0], 1, output_size(x.shape[2:], kernel_size, stride, padding, dilation), norm_dtype(x))


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    images, heads, tokens = query.shape[:3]
    out = query.new_empty((images, tokens, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty((images, heads, tokens), dtype=norm_dtype(query))


def _attention_transposed(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    return grad.new_empty((*grad.shape[:2], *key.shape[2:3], grad.shape[3]))


# The other ops' shapes are those of the reference function.
SHAPES: dict[str, Any] = {
    "conv2d_fused": _conv2d_fused,
    "linear_fused": _linear_fused,
    "conv2d_transposed": _conv2d_transposed,
    "linear_transposed": _linear_transposed,
    "transposed_epilogue": _transposed_epilogue,
    "avg_pool2d": _avg_pool2d,
    "avg_pool2d_transposed": _avg_pool2d_transposed,
    "max_pool2d": _max_pool2d,
    "max_pool2d_transposed": _max_pool2d_transposed,
    "encode_image": _encode_image,
    "layer_norm": _layer_norm,
    "layer_norm_transposed": _layer_norm_transposed,
    "scale_act": _scale_act,
    "scale_act_transposed": _scale_act_transposed,
    "attention": _attention,
    "attention_transposed": _attention_transposed,
}

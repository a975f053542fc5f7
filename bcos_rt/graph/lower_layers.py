"""Lowerings of image encoding, pooling, activations and norms with their adjoints, and of un-fused B-cos factors."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from bcos_rt.graph.lowering import Encoded, Lowering, Results, lowering
from bcos_rt.kernels.reference_layers import ENCODED_CHANNELS, pooled_size

__all__: list[str] = []

aten = torch.ops.aten


# --- image -----------------------------------------------------------------------------------------------------------


@lowering("encode_image")
def encode_image(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``(v_c - mean_c) / std_c`` for v = [x, 1 - x] (or x), padded with zeros to 8 channels, and its map of squares."""
    call, image, dtype = low.call, a["image"], a["dtype"]
    wide = torch.promote_types(dtype, torch.float32)
    if image.meta["val"].dtype == torch.uint8:
        x = call(aten.div.Scalar, low.cast(image, wide), 255.0)
    else:
        wide = torch.promote_types(wide, image.meta["val"].dtype)
        x = low.cast(image, wide)
    mean, std = (low.per_channel(a[name], wide, True) for name in ("mean", "std"))
    mirrored = bool(a["six_channels"]) and _mirrors(low, a["mean"], a["std"], wide)
    if mirrored:
        mean, std = (low.derived(v, "first three", lambda c, t: c(aten.slice.Tensor, t, 0, 0, 3)) for v in (mean, std))
    elif a["six_channels"]:
        x = call(aten.cat.default, [x, call(aten.rsub.Scalar, x, 1.0)], 1)
    x = low.cast(call(aten.div.Tensor, call(aten.sub.Tensor, x, mean), std), dtype)
    both = call(aten.cat.default, [x, call(aten.neg.default, x)], 1) if mirrored else x
    missing = ENCODED_CHANNELS - both.meta["val"].shape[1]
    encoded = call(aten.constant_pad_nd.default, both, [0, 0, 0, 0, 0, missing])
    low.encoded[encoded] = Encoded(x, mirrored)
    squares = low.square_sum(x, 1)
    if mirrored:
        squares = call(aten.mul.Scalar, squares, 2.0)
    return encoded, low.once(("square_sum", encoded, 1), lambda: squares)


def _mirrors(low: Lowering, mean: Node, std: Node, dtype: torch.dtype) -> bool:
    """Whether the inverted channels are normalised to the negative of the others, to a rounding error of ``dtype``."""
    if mean not in low.program.constants or std not in low.program.constants:
        return False
    m, s = low.program.constants[mean].double(), low.program.constants[std].double()
    error = (m[3:] - (1 - m[:3])).abs().max()
    return bool(error <= torch.finfo(dtype).eps) and torch.equal(s[3:], s[:3])


@lowering("square_sum")
def square_sum(low: Lowering, a: Mapping[str, Any]) -> Results:
    """Channel sums of squares per group."""
    return low.square_sum(a["x"], a["groups"])


# --- pooling ---------------------------------------------------------------------------------------------------------


def _is_global(size: Sequence[int], kernel: Sequence[int], padding: Sequence[int]) -> bool:
    return list(size) == list(kernel) and not any(padding)


@lowering("avg_pool2d")
def avg_pool2d(low: Lowering, a: Mapping[str, Any]) -> Results:
    """Average pooling; over the whole image it is a mean."""
    x = a["x"]
    wide, kernel = low.wide(x), list(a["kernel_size"])
    if _is_global(x.meta["val"].shape[2:], kernel, a["padding"]):
        y = low.call(aten.mean.dim, wide, [2, 3], True)
    else:
        window = (kernel, list(a["stride"]), list(a["padding"]))
        y = low.call(aten.avg_pool2d.default, wide, *window, a["ceil_mode"], a["count_include_pad"])
    y = low.cast(y, x.meta["val"].dtype)
    return y, low.square_sum(y, a["groups"]) if a["want_squares"] else None


@lowering("avg_pool2d_transposed")
def avg_pool2d_transposed(low: Lowering, a: Mapping[str, Any]) -> Results:
    """Each gradient shared out over its window."""
    grad, size, kernel = a["grad"], list(a["input_size"]), list(a["kernel_size"])
    wide = low.wide(grad)
    channels, *places = grad.meta["val"].shape[1:]
    apart = list(a["stride"]) == kernel and not any(a["padding"])
    if apart and [n * k for n, k in zip(places, kernel, strict=True)] == size:
        share = low.call(aten.mul.Scalar, wide, 1 / math.prod(kernel))
        m = low.size(grad, 0)
        if _is_global(size, kernel, a["padding"]):
            total = low.call(aten.expand.default, share, [m, channels, *size])
        else:
            split = low.call(aten.reshape.default, share, [m, channels, places[0], 1, places[1], 1])
            split = low.call(aten.expand.default, split, [m, channels, places[0], kernel[0], places[1], kernel[1]])
            total = low.call(aten.reshape.default, split, [m, channels, *size])
    else:
        window = (kernel, list(a["stride"]), list(a["padding"]), a["ceil_mode"], a["count_include_pad"], None)
        total = low.call(aten.avg_pool2d_backward.default, wide, _like(low, wide, size), *window)
    return low.transposed_epilogue(total, a, grad.meta["val"].dtype)


def _like(low: Lowering, grad: Node, size: Sequence[int]) -> Node:
    """A tensor of the pool's input's shape, whose values nobody reads (so no forward value has to wait for it)."""
    value = grad.meta["val"]
    shape = [low.size(grad, 0), value.shape[1], *size]
    return low.call(
        aten.empty.memory_format,
        shape,
        dtype=value.dtype,
        device=value.device,
        pin_memory=False,
        memory_format=torch.channels_last,
    )


@lowering("max_pool2d")
def max_pool2d(low: Lowering, a: Mapping[str, Any]) -> Results:
    """Max pooling; what it chose, as a flat position in the image."""
    window = (list(a["kernel_size"]), list(a["stride"]), list(a["padding"]), list(a["dilation"]), a["ceil_mode"])
    index: Node | None = None
    if a["want_index"]:
        both = low.call(aten.max_pool2d_with_indices.default, a["x"], *window)
        y, index = (low.call(operator.getitem, both, i) for i in range(2))
        low.flat_positions.add(index)
    else:
        y = low.call(aten.max_pool2d.default, a["x"], *window)
    return y, index, low.square_sum(y, a["groups"]) if a["want_squares"] else None


@lowering("max_pool2d_transposed")
def max_pool2d_transposed(low: Lowering, a: Mapping[str, Any]) -> Results:
    """Each gradient to the place its maximum came from."""
    grad, size, index = a["grad"], list(a["input_size"]), a["index"]
    wide = low.wide(grad)
    window = (list(a["kernel_size"]), list(a["stride"]), list(a["padding"]), list(a["dilation"]))
    if index not in low.flat_positions:
        index = _flat_position(low, index, size, a)
    # Which of the two the forward pass rounded by shows in the sizes.
    ceil_mode = pooled_size(size, *window) != tuple(grad.meta["val"].shape[2:])

    like = _like(low, wide, size)
    places = low.repeated(index, wide)
    total = low.call(aten.max_pool2d_with_indices_backward.default, wide, like, *window, ceil_mode, places)
    return low.transposed_epilogue(total, a, grad.meta["val"].dtype)


def _flat_position(low: Lowering, index: Node, size: Sequence[int], a: Mapping[str, Any]) -> Node:
    """A place inside the window, ``r kw + s``, as the position in the image; for an index no lowered op made."""
    call, device = low.call, index.meta["val"].device
    place = call(aten._to_copy.default, index, dtype=torch.int64)
    columns = a["kernel_size"][1]
    inside = (
        call(aten.div.Scalar_mode, place, columns, rounding_mode="floor"),
        call(aten.remainder.Scalar, place, columns),
    )
    position: list[Node] = []
    for axis in range(2):
        first = torch.arange(index.meta["val"].shape[2 + axis], device=device) * a["stride"][axis] - a["padding"][axis]
        first = first[:, None] if axis == 0 else first
        name = f"first of {tuple(first.shape)}, stride {a['stride'][axis]}, padding {a['padding'][axis]}"
        step = call(aten.mul.Scalar, inside[axis], a["dilation"][axis])
        position.append(call(aten.add.Tensor, step, low.constant(first, name)))
    return call(aten.add.Tensor, call(aten.mul.Scalar, position[0], size[1]), position[1])


# --- activations and norms -------------------------------------------------------------------------------------------


def _scaled(low: Lowering, x: Node, a: Mapping[str, Any]) -> tuple[Node, Node]:
    """(scale, ``scale x + shift``) in at least float32."""
    wide = low.wide(x)
    dtype = wide.meta["val"].dtype
    scale, shift = (low.per_channel(a[name], dtype, True) for name in ("scale", "shift"))
    return scale, low.call(aten.add.Tensor, low.call(aten.mul.Tensor, wide, scale), shift)


@lowering("scale_act")
def scale_act(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``act(scale_c x + shift_c)``."""
    x = a["x"]
    y = low.cast(low.activated(_scaled(low, x, a)[1], a["activation"]), x.meta["val"].dtype)
    return y, low.square_sum(y, a["groups"]) if a["want_squares"] else None


@lowering("scale_act_transposed")
def scale_act_transposed(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``grad scale_c gate(scale_c x + shift_c) + identity``."""
    grad, activation = a["grad"], a["activation"]
    wide = low.wide(grad)
    scale, u = _scaled(low, a["x"], a)
    scaled = low.call(aten.mul.Tensor, wide, scale)
    if activation == "none":
        out = scaled
    else:
        gate = low.call(aten.gt.Scalar, u, 0) if activation == "relu" else low.gate(u, activation)
        out = low.per_row(low.gated, scaled, gate)
    if a["identity"] is not None:
        out = low.call(aten.add.Tensor, out, low.cast(a["identity"], wide.meta["val"].dtype))
    return low.cast(out, grad.meta["val"].dtype)


def _affine(low: Lowering, y: Node, a: Mapping[str, Any], image: bool) -> Node:
    dtype = y.meta["val"].dtype
    if a["weight"] is not None:
        y = low.call(aten.mul.Tensor, y, low.per_channel(a["weight"], dtype, image))
    if a["bias"] is not None:
        y = low.call(aten.add.Tensor, y, low.per_channel(a["bias"], dtype, image))
    return y


def _normalised(low: Lowering, x: Node, dims: list[int], eps: float) -> tuple[Node, Node]:
    """(``(x - mean) rstd``, ``rstd``) over ``dims``."""
    call = low.call
    centred = call(aten.sub.Tensor, x, call(aten.mean.dim, x, dims, True))
    variance = call(aten.mean.dim, call(aten.mul.Tensor, centred, centred), dims, True)
    rstd = call(aten.rsqrt.default, call(aten.add.Scalar, variance, eps))
    return call(aten.mul.Tensor, centred, rstd), rstd


@lowering("layer_norm")
def layer_norm(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``(x - mean) rstd weight + bias`` over the last dimension."""
    x = a["x"]
    y, rstd = _normalised(low, low.wide(x), [-1], a["eps"])
    y = low.cast(_affine(low, y, a, False), x.meta["val"].dtype)
    squares: Node | None = None
    if a["want_squares"]:
        wide = low.wide(y)
        squares = low.call(aten.sum.dim_IntList, low.call(aten.mul.Tensor, wide, wide), [-1], True)
    return y, low.call(aten.squeeze.dim, rstd, -1), squares


@lowering("layer_norm_transposed")
def layer_norm_transposed(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``rstd (g w - mean_C(g w)) + identity``."""
    g = _weighted(low, a, False)
    centred = low.call(aten.sub.Tensor, g, low.call(aten.mean.dim, g, [-1], True))
    rstd = low.call(aten.unsqueeze.default, low.cast(a["rstd"], g.meta["val"].dtype), -1)
    if g.meta["val"].ndim == 1:
        out = low.call(aten.mul.Tensor, centred, rstd)
    else:
        out = low.per_row(lambda rows, factor: low.call(aten.mul.Tensor, rows, factor), centred, rstd)
    return _with_identity(low, out, a)


@lowering("group_norm")
def group_norm(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``(x - mean) rstd weight + bias`` over each group's channels and pixels."""
    x, groups = a["x"], a["groups"]
    channels, height, width = x.meta["val"].shape[1:]
    n = low.size(x, 0)
    split = low.call(aten.reshape.default, low.wide(x), [n, groups, channels // groups, height, width])
    y, rstd = _normalised(low, split, [2, 3, 4], a["eps"])
    y = low.call(aten.reshape.default, y, [n, channels, height, width])
    y = low.cast(_affine(low, y, a, True), x.meta["val"].dtype)
    rstd = low.call(aten.reshape.default, rstd, [n, groups])
    return y, rstd, low.square_sum(y, groups) if a["want_squares"] else None


@lowering("group_norm_transposed")
def group_norm_transposed(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``rstd (g w - mean(g w)) + identity``, the mean over each group's channels and pixels."""
    g, groups = _weighted(low, a, True), a["groups"]
    channels, height, width = g.meta["val"].shape[1:]
    m = low.size(g, 0)
    split = low.call(aten.reshape.default, g, [m, groups, channels // groups, height, width])
    centred = low.call(aten.sub.Tensor, split, low.call(aten.mean.dim, split, [2, 3, 4], True))
    rstd = low.cast(a["rstd"], g.meta["val"].dtype)
    rstd = low.call(aten.reshape.default, rstd, [low.size(rstd, 0), groups, 1, 1, 1])
    out = low.per_row(lambda rows, factor: low.call(aten.mul.Tensor, rows, factor), centred, rstd)
    out = low.call(aten.reshape.default, out, [m, channels, height, width])
    return _with_identity(low, out, a)


def _weighted(low: Lowering, a: Mapping[str, Any], image: bool) -> Node:
    g = low.wide(a["grad"])
    if a["weight"] is None:
        return g
    return low.call(aten.mul.Tensor, g, low.per_channel(a["weight"], g.meta["val"].dtype, image))


def _with_identity(low: Lowering, out: Node, a: Mapping[str, Any]) -> Node:
    if a["identity"] is not None:
        out = low.call(aten.add.Tensor, out, low.cast(a["identity"], out.meta["val"].dtype))
    return low.cast(out, a["grad"].meta["val"].dtype)


# --- what no pass fused ----------------------------------------------------------------------------------------------


@lowering("patch_norm")
def patch_norm(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``sqrt(box_sum(sum_c x_c^2) + eps)``."""
    window = (a["kernel_size"], a["stride"], a["padding"], a["dilation"])
    box = low.box_sum(low.square_sum(a["x"], a["groups"]), *window)
    return low.call(aten.sqrt.default, low.call(aten.add.Scalar, box, a["eps"]))


@lowering("row_norm")
def row_norm(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``||x|| + eps`` of the last dimension."""
    wide = low.wide(a["x"])
    total = low.call(aten.sum.dim_IntList, low.call(aten.mul.Tensor, wide, wide), [-1], True)
    return low.call(aten.add.Scalar, low.call(aten.sqrt.default, total), a["eps"])


@lowering("dynamic_scale")
def dynamic_scale(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``(|z| / n)^(B-1)``."""
    z, norm = a["z"], a["n"]
    if a["b"] == 1:
        return low.call(aten.ones_like.default, z)
    if a["channel_dim"] == 1:
        norm = low.per_filter(norm, z.meta["val"].shape[1])
    wide = low.cast(z, norm.meta["val"].dtype)
    inverse = low.call(aten.reciprocal.default, norm)
    return low.cast(low.multiplier(wide, inverse, a["b"]), z.meta["val"].dtype)

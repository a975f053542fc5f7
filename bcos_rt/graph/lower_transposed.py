"""Lowerings of the adjoint's layers: transposed convolutions and linear layers, and what the image's adjoint gives.

Transposed convolutions (the adjoint of ``y = conv(x, w)``) take one of these forms, weights rearranged once:

* stride 1: the convolution with flipped weights, inputs and outputs of each group exchanged;
* few channels, or a kernel no larger than its stride: one stride-1 convolution that computes every parity class of the
  result as channels of its own, and a pixel shuffle. With ``i = s q + a`` along an axis,
  ``x[i] = sum_o g[o] w[i + p - s o]`` has only the taps ``k = s j + c``, ``c = (a + p) mod s``, each of the place
  ``o = q + floor((a + p) / s) - j``;
* depthwise and strided: zeros between the places, then the flipped convolution; 1 x 1 and strided: the other way
  round;
* anything else: ``conv_transpose2d``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from bcos_rt.graph.lowering import Call, Lowering, Results, lowering
from bcos_rt.kernels.reference import COLOUR_EPS, output_padding

__all__ = ["ParityAxis", "flipped", "parity_weight"]

aten = torch.ops.aten
# A result of at most this many channels is worth the taps that are zero in some of its parity classes.
FEW_CHANNELS = 8
# Filters that a convolution computes at a time (AVX-512 floats): fewer cost as much.
FILTER_BLOCK = 16


@dataclass(frozen=True)
class ParityAxis:
    """One axis of a strided transposed convolution by parity classes.

    Attributes:
        first: ``g[q + first], ..., g[q + first + length - 1]`` is what the results ``s q + a`` of its classes need.
        taps: for each class ``a``, the kernel's tap at each of those places; the kernel's size where it has none.
    """

    first: int
    taps: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(kernel: int, stride: int, padding: int, classes: Sequence[int] | None = None) -> ParityAxis:
        """The axis for all classes ``0, ..., stride - 1``, or for some."""
        origins = [divmod(a + padding, stride) for a in (range(stride) if classes is None else classes)]
        # A class without any tap (a 1 x 1 kernel at stride 2) stays zero.
        counts = [max(0, -(-(kernel - c) // stride)) for _, c in origins]
        used = [(e, n) for (e, _), n in zip(origins, counts, strict=True) if n] or [(0, 1)]
        first, last = min(e - n + 1 for e, n in used), max(e for e, _ in used)
        taps = tuple(
            tuple(stride * (e - p) + c if 0 <= e - p < n else kernel for p in range(first, last + 1))
            for (e, c), n in zip(origins, counts, strict=True)
        )
        return ParityAxis(first, taps)

    @property
    def length(self) -> int:
        return len(self.taps[0])

    @property
    def last(self) -> int:
        return self.first + self.length - 1


def flipped(weight: Tensor, groups: int) -> Tensor:
    """[O, C / G, kh, kw] -> the stride-1 adjoint's weight [C, O / G, kh, kw], both axes reversed."""
    filters, per_group, kh, kw = weight.shape
    by_group = weight.reshape(groups, filters // groups, per_group, kh, kw).transpose(1, 2)
    return by_group.reshape(groups * per_group, filters // groups, kh, kw).flip(2, 3).contiguous()


def parity_weight(weight: Tensor, rows: ParityAxis, columns: ParityAxis) -> Tensor:
    """[O, C, kh, kw] -> [sh sw C, O, rows.length, columns.length], the classes outermost."""
    # A row and a column of zeros behind the kernel are what the missing taps read.
    padded = F.pad(weight, (0, 1, 0, 1))
    r, c = (torch.tensor(axis.taps, device=weight.device) for axis in (rows, columns))
    picked = padded[:, :, r[:, None, :, None], c[None, :, None, :]]  # [O, C, sh, sw, rows.length, columns.length]
    return picked.permute(2, 3, 1, 0, 4, 5).flatten(0, 2).contiguous()


def conv_adjoint(
    low: Lowering,
    grad: Node,
    weight: Node,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    factor: Node | None = None,
) -> Node:
    """The adjoint of a convolution, [M, O, H', W'] -> [M, C, H, W], in the storage dtype.

    With a factor [C, 1, 1] it is multiplied by it, in at least float32.
    """
    shuffled = _by_parity(low, grad, weight, input_size, stride, padding, dilation, groups, factor)
    if shuffled is not None:
        return shuffled
    total = _unshuffled(low, grad, weight, input_size, stride, padding, dilation, groups)
    return total if factor is None else low.call(aten.mul.Tensor, low.wide(total), factor)


def _unshuffled(
    low: Lowering,
    grad: Node,
    weight: Node,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Node:
    """:func:`conv_adjoint` in every form but the parity classes'."""
    filters, _, *kernel = weight.meta["val"].shape
    inside = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    plain, pointwise, depthwise = all(s == 1 for s in stride), max(kernel) == 1, groups > 1 and groups == filters
    if min(inside) >= 0 and (plain or pointwise or depthwise):
        turned = low.rearranged(weight, f"flipped {groups}", lambda w: flipped(w, groups))
        if turned is not None:
            # A convolution of n places gives n + 2 inside - dilation (kernel - 1).
            size = [input_size[i] - 2 * inside[i] + dilation[i] * (kernel[i] - 1) for i in range(2)]
            if not plain and not pointwise:
                grad = _zeros_between(low, grad, stride, size)
            out = low.call(aten.conv2d.default, grad, turned, None, [1, 1], inside, list(dilation), groups)
            return _zeros_between(low, out, stride, size) if pointwise and not plain else out
    extra = output_padding(input_size, kernel, stride, padding, dilation)
    return low.call(
        aten.conv_transpose2d.input, grad, weight, None, list(stride), list(padding), extra, groups, list(dilation)
    )


def _by_parity(
    low: Lowering,
    grad: Node,
    weight: Node,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    factor: Node | None,
) -> Node | None:
    """:func:`conv_adjoint` as one stride-1 convolution and a pixel shuffle; None where that is not worth it."""
    _, per_group, *kernel = weight.meta["val"].shape
    if groups > 1 or any(d > 1 for d in dilation) or all(s == 1 for s in stride):
        return None
    rows, columns = (ParityAxis.of(k, s, p) for k, s, p in zip(kernel, stride, padding, strict=True))
    multiplications = rows.length * columns.length * stride[0] * stride[1]
    if multiplications > kernel[0] * kernel[1] and (per_group > FEW_CHANNELS or min(kernel) == 1):
        return None
    if weight not in low.program.constants:
        return None
    # All classes at once, or those of each row apart, which have fewer taps: whatever leaves fewer blocks of filters.
    apart = [ParityAxis.of(kernel[0], stride[0], padding[0], [a]) for a in range(stride[0])]
    together = -(-stride[0] * stride[1] * per_group // FILTER_BLOCK) * rows.length
    one_each = -(-stride[1] * per_group // FILTER_BLOCK) * sum(axis.length for axis in apart)
    parts = [rows] if together <= one_each else apart
    counts = [-(-n // s) for n, s in zip(size, stride, strict=True)]
    pieces = [_parity_part(low, grad, weight, axis, columns, counts, factor) for axis in parts]
    # In the order of the result's pixels it is one plain copy; what reads the result then has whole rows to read.
    if len(pieces) > 1:
        out = low.call(aten.cat.default, pieces, 3)
    else:
        out = low.call(aten.clone.default, pieces[0], memory_format=torch.contiguous_format)
    out = low.strided(out, [low.size(grad, 0), per_group, *(s * n for s, n in zip(stride, counts, strict=True))])
    for dim in range(2):
        out = _cut(low, out, dim + 2, 0, size[dim])
    return out


def _parity_part(
    low: Lowering,
    grad: Node,
    weight: Node,
    rows: ParityAxis,
    columns: ParityAxis,
    counts: Sequence[int],
    factor: Node | None,
) -> Node:
    """The results of some row classes, [M, C, rows, classes, columns, classes], times the factor."""
    channels, axes = weight.meta["val"].shape[1], (rows, columns)
    classes = low.derived(weight, f"parity {axes}", lambda _, w: parity_weight(w, rows, columns))
    # One padding serves both ends; what it makes too many is cut off.
    ends = [
        max(0, -axis.first, count + axis.last - places)
        for axis, count, places in zip(axes, counts, grad.meta["val"].shape[2:], strict=True)
    ]
    out = low.call(aten.conv2d.default, grad, classes, None, [1, 1], ends, [1, 1], 1)
    for dim in range(2):
        start = axes[dim].first + ends[dim]
        out = _cut(low, out, dim + 2, start, start + counts[dim])
    shape = [low.size(grad, 0), len(rows.taps), len(columns.taps), channels, *counts]
    out = low.call(aten.permute.default, low.call(aten.reshape.default, out, shape), [0, 3, 4, 1, 5, 2])
    if factor is None:
        return out
    spread = low.call(aten.reshape.default, factor, [channels, 1, 1, 1, 1])
    return low.call(aten.mul.Tensor, low.wide(out), spread)


def _cut(low: Lowering, x: Node, dim: int, start: int, end: int) -> Node:
    if start == 0 and x.meta["val"].shape[dim] == end:
        return x
    return low.call(aten.slice.Tensor, x, dim, start, end)


def _zeros_between(low: Lowering, grad: Node, stride: Sequence[int], size: Sequence[int]) -> Node:
    """[M, C, H', W'] with ``stride - 1`` zeros behind each place; cut or padded with zeros to ``size``."""
    channels, *places = grad.meta["val"].shape[1:]
    m = low.size(grad, 0)
    out = low.call(aten.reshape.default, grad, [m, channels, places[0], 1, places[1], 1])
    out = low.call(aten.constant_pad_nd.default, out, [0, stride[1] - 1, 0, 0, 0, stride[0] - 1])
    full = [n * s for n, s in zip(places, stride, strict=True)]
    out = low.call(aten.reshape.default, out, [m, channels, *full])
    if full == list(size):
        return out
    return low.call(aten.constant_pad_nd.default, out, [0, size[1] - full[1], 0, size[0] - full[0]])


# --- the lowerings ---------------------------------------------------------------------------------------------------


@lowering("conv2d_transposed")
def conv2d_transposed(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``G = conv^T(grad) + identity``; ``(G multiplier, G gate)``."""
    grad = a["grad"]
    geometry = (a["input_size"], a["stride"], a["padding"], a["dilation"], a["groups"])
    total = conv_adjoint(low, grad, a["weight"], *geometry)
    return low.transposed_epilogue(total, a, grad.meta["val"].dtype)


@lowering("linear_transposed")
def linear_transposed(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``G = grad W + identity`` on rows."""
    grad = a["grad"]
    total = low.call(aten.matmul.default, grad, a["weight"])
    return low.transposed_epilogue(total, a, grad.meta["val"].dtype)


@lowering("transposed_epilogue")
def transposed_epilogue(low: Lowering, a: Mapping[str, Any]) -> Results:
    """The epilogue by itself."""
    return low.transposed_epilogue(a["total"], a, a["total"].meta["val"].dtype)


@lowering("conv2d_contributions")
def conv2d_contributions(low: Lowering, a: Mapping[str, Any]) -> Results:
    """The stem's transposed convolution and what is made of its result."""
    channels = a["inverse_std"].meta["val"].shape[0]
    weight = a["weight"]
    if weight.meta["val"].shape[1] != channels:
        weight = low.derived(weight, f"first {channels}", lambda call, w: call(aten.slice.Tensor, w, 1, 0, channels))
    size = a["image"].meta["val"].shape[2:]
    geometry = (size, a["stride"], a["padding"], a["dilation"], 1)
    weights = conv_adjoint(low, a["grad"], weight, *geometry, _inverse_std(low, a))
    return _contributions(low, weights, a)


@lowering("image_contributions")
def image_contributions(low: Lowering, a: Mapping[str, Any]) -> Results:
    """Weights, contributions and colours of an image's adjoint."""
    total = _cut(low, a["grad"], 1, 0, a["inverse_std"].meta["val"].shape[0])
    return _contributions(low, low.call(aten.mul.Tensor, low.wide(total), _inverse_std(low, a)), a)


def _inverse_std(low: Lowering, a: Mapping[str, Any]) -> Node:
    """``scale / std`` per channel, [C, 1, 1]: what makes weights of the normalised image's adjoint."""
    wide, scale = low.wide_dtype(a["grad"]), a["scale"]

    def make(call: Call, value: Any) -> Any:
        spatial = call(aten.reshape.default, call(aten._to_copy.default, value, dtype=wide), [-1, 1, 1])
        return call(aten.mul.Scalar, spatial, scale)

    return low.derived(a["inverse_std"], f"times {scale} as {wide}", make)


def _contributions(low: Lowering, weights: Node, a: Mapping[str, Any]) -> Results:
    call, wide = low.call, weights.meta["val"].dtype
    weights = low.realised(weights)
    image = a["image"]
    x = low.cast(image, wide)
    if image.meta["val"].dtype == torch.uint8:
        x = call(aten.div.Scalar, x, 255.0)

    def product(w: Node, v: Node) -> Node:
        return call(aten.mul.Tensor, w, v)

    colour: Node | None = None
    if a["inverse_std"].meta["val"].shape[0] == 3:
        contributions = call(aten.sum.dim_IntList, low.per_row(product, weights, x), [1])
    else:
        # The six channels are x and 1 - x.
        bright = low.per_row(product, _cut(low, weights, 1, 0, 3), x)
        dark = low.per_row(product, _cut(low, weights, 1, 3, 6), call(aten.rsub.Scalar, x, 1.0))
        contributions = call(aten.sum.dim_IntList, call(aten.add.Tensor, bright, dark), [1])
        colour = _colour(low, weights, contributions)
    return weights if a["want_weights"] else None, contributions, colour


def _colour(low: Lowering, weights: Node, contributions: Node) -> Node:
    """The per-pixel terms of the colour picture (bcos_rt/explanation/picture.py), [M, 4, H, W]."""
    call = low.call
    largest = call(aten.amax.default, call(aten.abs.default, weights), [1], True)
    direction = call(aten.div.Tensor, weights, call(aten.add.Scalar, largest, COLOUR_EPS))
    direction = call(aten.clamp.default, direction, 0)
    bright, dark = _cut(low, direction, 1, 0, 3), _cut(low, direction, 1, 3, 6)
    both = call(aten.add.Scalar, call(aten.add.Tensor, bright, dark), COLOUR_EPS)
    rgb = call(aten.div.Tensor, bright, both)
    length = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, weights), [1])
    alpha = call(aten.sqrt.default, length)
    # Nothing is opaque where the contribution is negative; where.ScalarSelf keeps the dtype of alpha.
    alpha = call(aten.where.ScalarSelf, call(aten.lt.Scalar, contributions, 0), COLOUR_EPS, alpha)
    return call(aten.cat.default, [rgb, call(aten.unsqueeze.default, alpha, 1)], 1)

"""A layer shape with its operands, what it costs at least, and what it must compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_rt.kernels import reference
from bcos_rt.kernels.reference import CONV_EPS, LINEAR_EPS

__all__ = ["DTYPES", "TOY_SHAPES", "Case", "Shape", "exact", "merge", "ordered"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One layer of a network.

    Attributes:
        model, layer: whose it is; ``layer`` is the first of ``count`` layers of this shape.
        x: its input, [N, C, H, W] of a convolution, [N, T, C] of a linear layer.
        weight: [O, C / groups, kh, kw] or [O, C].
        count: layers of this shape in the network.
    """

    model: str
    layer: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    count: int = 1

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution, not a linear layer."""
        return len(self.weight) == 4

    @property
    def out(self) -> tuple[int, ...]:
        """Its output, [N, O, H', W'] or [N, T, O]."""
        if not self.is_conv:
            return (*self.x[:-1], self.weight[0])
        sides = (
            (self.x[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.weight[2 + i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        )
        return (self.x[0], self.weight[0], *sides)

    def flops(self, mode: str) -> int:
        """Two per multiply-add of the matrix product(s): one product forward and explaining, three to train."""
        product = 2 * _size(self.out) * _size(self.weight[1:])
        return product * (3 if mode == "train" else 1)

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        """What must be read and written at least once, norm maps (float32) included.

        forward: x, w, map -> y, map; explain: grad, w, multiplier -> grad; train: forward, then grad, y, x, w -> both
        gradients.
        """
        x, w, y = _size(self.x), _size(self.weight), _size(self.out)
        x_map = x // self.x[1 if self.is_conv else -1] * 4
        y_map = y // self.weight[0] * 4
        if mode == "forward":
            return (x + w + y) * dtype.itemsize + x_map + y_map
        if mode == "explain":
            return (y + w + 2 * x) * dtype.itemsize
        return (x + w + y) * dtype.itemsize + x_map + (2 * y + 2 * x + 2 * w) * dtype.itemsize

    def label(self) -> str:
        """Short text: ``64x56x56 -> 256 1x1 s1``."""
        if not self.is_conv:
            return f"{self.x[-1]} -> {self.weight[0]}, {_size(self.x[:-1])} tokens"
        groups = f" g{self.groups}" if self.groups > 1 else ""
        channels = "x".join(map(str, self.x[1:]))
        return f"{channels} -> {self.weight[0]} {self.weight[2]}x{self.weight[3]} s{self.stride[0]}{groups}"


def _size(shape: Sequence[int]) -> int:
    out = 1
    for side in shape:
        out *= side
    return out


# Each model once, with shapes that divide nothing: what the dry run goes through.
TOY_SHAPES = (
    Shape("resnet50", "conv1", (2, 8, 9, 9), (16, 8, 3, 3), (2, 2), (1, 1)),
    Shape("resnet50", "layer1.0.conv1", (2, 16, 5, 5), (16, 16, 1, 1), count=3),
    Shape("densenet121", "features.conv", (2, 16, 5, 5), (8, 16, 3, 3), (1, 1), (1, 1)),
    Shape("vit_b_16", "mlp.0", (2, 5, 16), (24, 16), count=2),
)


def merge(shapes: Iterable[Shape]) -> list[Shape]:
    """Layers of one model with equal shapes become one, their counts added; order kept."""
    merged: dict[Shape, Shape] = {}
    for shape in shapes:
        key = replace(shape, layer="", count=0)
        known = merged.get(key)
        merged[key] = shape if known is None else replace(known, count=known.count + shape.count)
    return list(merged.values())


def ordered(shapes: Sequence[Shape]) -> list[Shape]:
    """Most important first: by the share of its model's work, the models taking turns."""
    by_model: dict[str, list[Shape]] = {}
    for shape in shapes:
        by_model.setdefault(shape.model, []).append(shape)
    for members in by_model.values():
        members.sort(key=lambda s: -s.count * s.flops("forward"))
    turns = max((len(m) for m in by_model.values()), default=0)
    return [members[i] for i in range(turns) for members in by_model.values() if i < len(members)]


def exact() -> AbstractContextManager[None]:
    """cuDNN as a reference: no tf32, no search for the fastest algorithm."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)
    return flags


class Case:
    """Operands of one shape on one device, in one dtype; made when first asked for.

    Filters have unit norm, so that the published layer, which normalises them, computes the same function.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self.activation = "relu" if shape.is_conv else "none"
        self.eps = CONV_EPS if shape.is_conv else LINEAR_EPS

    def _normal(self, shape: Sequence[int]) -> Tensor:
        values = torch.randn(tuple(shape), generator=self._generator, device=self.device)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    @cached_property
    def x(self) -> Tensor:
        """The input."""
        return self._normal(self.shape.x).to(self.dtype)

    @cached_property
    def weight(self) -> Tensor:
        """Filters of norm 1."""
        values = self._normal(self.shape.weight)
        norm: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1).reshape(-1, *[1] * (values.ndim - 1))
        return (values / norm).to(self.dtype)

    @cached_property
    def scale(self) -> Tensor:
        """[O] float32, BatchNorm's; of both signs as in real networks."""
        return 1 + 0.5 * self._normal((self.shape.weight[0],))

    @cached_property
    def shift(self) -> Tensor:
        """[O] float32."""
        return 0.1 * self._normal((self.shape.weight[0],))

    @cached_property
    def grad(self) -> Tensor:
        """A gradient of the output, or what an explanation brings from above."""
        return self._normal(self.shape.out).to(self.dtype)

    @cached_property
    def multiplier(self) -> Tensor:
        """The multiplier of the layer below: shape of x."""
        return self._normal(self.shape.x).abs().to(self.dtype)

    @cached_property
    def squares(self) -> Tensor:
        """The map of squares the producer of x would have left."""
        if self.shape.is_conv:
            return reference.square_sum(self.x, self.shape.groups)
        return self.x.float().square().sum(-1, keepdim=True)

    @cached_property
    def inverse_norm(self) -> Tensor:
        """1 / n, [N, 1, H', W'] or [N, T, 1], float32."""
        s = self.shape
        if s.is_conv:
            norm = reference.patch_norm(self.x, s.weight[2:], s.stride, s.padding, s.dilation, s.groups, self.eps)
        else:
            norm = reference.row_norm(self.x, self.eps)
        inverse: Tensor = norm.reciprocal().contiguous()
        return inverse

    @property
    def geometry(self) -> dict[str, Any]:
        """Keyword arguments of a convolution; none of a linear layer."""
        s = self.shape
        if not s.is_conv:
            return {}
        return {"stride": s.stride, "padding": s.padding, "dilation": s.dilation, "groups": s.groups}

    # --- what must come out, in float64, of the first and the last image: the others go the same way ----------------

    def ends(self, value: Tensor) -> Tensor:
        """The first and the last image (or sequence) of ``value``."""
        return value[:: max(1, value.shape[0] - 1)] if value.shape[0] > 1 else value

    def _wide(self, value: Tensor) -> Tensor:
        return self.ends(value).double()

    def expected_forward(self, affine: bool = True) -> Tensor:
        """``act(z |z| / n * scale + shift)`` (linear layers: ``z |z| / n``); plain B-cos without ``affine``."""
        with exact():
            if not self.shape.is_conv:
                return reference.linear(self._wide(self.x), self.weight.double(), None, 2.0, self.eps)
            x, w = self._wide(self.x), self.weight.double()
            y = reference.conv2d(x, w, None, **self.geometry, b=2.0, eps=self.eps)
        return self.affine(y).relu() if affine else y

    def expected_plain(self) -> Tensor:
        """What the network without B-cos computes: ``relu(conv(x) * scale + shift)``, or ``x w^T``."""
        with exact():
            if not self.shape.is_conv:
                return F.linear(self._wide(self.x), self.weight.double())
            z = F.conv2d(self._wide(self.x), self.weight.double(), None, **self.geometry)
        return self.affine(z).relu()

    def affine(self, y: Tensor) -> Tensor:
        """``y * scale + shift`` per channel of [N, O, H', W'], in y's dtype."""
        return y * self.scale.to(y.dtype)[:, None, None] + self.shift.to(y.dtype)[:, None, None]

    def transpose(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The layer's transpose, [N, O, H', W'] -> [N, C, H, W] or [N, T, O] -> [N, T, C]; plain PyTorch."""
        s = self.shape
        if not s.is_conv:
            return grad @ weight
        x = grad.new_empty((grad.shape[0], *s.x[1:])).contiguous(memory_format=torch.channels_last)
        out: Tensor = torch.ops.aten.convolution_backward(
            grad, x, weight, None, list(s.stride), list(s.padding), list(s.dilation), False, [0, 0], s.groups,
            [True, False, False],
        )[0]  # fmt: skip
        return out

    def expected_explain(self) -> Tensor:
        """``transpose(grad) * multiplier``."""
        with exact():
            return self.transpose(self._wide(self.grad), self.weight.double()) * self._wide(self.multiplier)

    def expected_published_explain(self) -> Tensor:
        """The published layer multiplies before its transpose: ``transpose(grad * |z| / n)``."""
        with exact():
            x, w = self._wide(self.x), self.weight.double()
            z = F.conv2d(x, w, None, **self.geometry) if self.shape.is_conv else F.linear(x, w)
            norm = self.ends(self.inverse_norm).double()
            if self.shape.is_conv and self.shape.groups > 1:
                norm = norm.repeat_interleave(self.shape.weight[0] // self.shape.groups, 1)
            return self.transpose(self._wide(self.grad) * z.abs() * norm, w)

    def expected_grad_x(self, b: float = 2.0) -> Tensor:
        """The gradient of the plain B-cos layer (no affine) for x; ``b`` 1: of the plain layer."""
        with exact():
            x, w, grad = self._wide(self.x), self.weight.double(), self._wide(self.grad)
            if b == 1:
                return self.transpose(grad, w)
            needs = (True, False, False)
            if not self.shape.is_conv:
                y = reference.linear(x, w, None, b, self.eps)
                out = reference.linear_backward(grad, x, w, None, y, b, self.eps, needs)[0]
            else:
                y = reference.conv2d(x, w, None, **self.geometry, b=b, eps=self.eps)
                out = reference.conv2d_backward(grad, x, w, None, y, **self.geometry, b=b, eps=self.eps, needs=needs)[0]
        if out is None:
            raise RuntimeError("the reference returned no gradient for x")
        return out

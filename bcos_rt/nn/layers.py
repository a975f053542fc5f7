"""B-cos convolution and linear layer."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.kernels import ops

__all__ = ["BcosConv2d", "BcosLinear"]

WeightNorm = Literal["none", "unit"]


def _unit_norm(weight: Tensor) -> Tensor:
    """Every filter scaled to norm 1; a dead filter (norm 0, real networks have them) stays 0 instead of NaN."""
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return weight / torch.where(norm > 0, norm, torch.ones_like(norm))


class BcosConv2d(nn.Conv2d):
    """B-cos convolution ``y = z * (|z| / ||patch||)^(B-1)``, ``z = conv(x, w) + bias``.

    Shapes and constructor arguments are those of :class:`torch.nn.Conv2d`; in addition:

    Args:
        b: B >= 1; 1 is the plain convolution. :mod:`bcos_rt.nn.exponent` changes it later, or has it learned.
        weight_norm: ``"unit"`` scales each filter to norm 1 (B-cos v2), ``"none"`` leaves it (B-cosification, eq. 4).
        tf_same_padding: pad as TensorFlow's ``SAME`` does, by the image's size (timm's ``Conv2dSame``).
    """

    b: float | nn.Parameter

    def __init__(
        self,
        *args: Any,
        b: float = 2.0,
        weight_norm: WeightNorm = "none",
        tf_same_padding: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.b = float(b)
        self.weight_norm = weight_norm
        self.tf_same_padding = tf_same_padding

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The image with all padding done that the op itself (symmetric zeros) cannot do, and what is left for it."""
        if self.tf_same_padding:
            pad: list[int] = []
            for i in (1, 0):
                size, stride = x.shape[2 + i], self.stride[i]
                total = (math.ceil(size / stride) - 1) * stride + self.dilation[i] * (self.kernel_size[i] - 1) + 1
                total = max(total - size, 0)
                pad += [total // 2, total - total // 2]
            return (F.pad(x, pad) if any(pad) else x), (0, 0)
        # torch fills this list for padding="same" too: [left, right, top, bottom].
        sides: list[int] = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return F.pad(x, sides, mode=self.padding_mode), (0, 0)
        if sides[0] != sides[1] or sides[2] != sides[3]:
            return F.pad(x, sides), (0, 0)
        return x, (sides[2], sides[0])

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self._padded(input)
        weight = _unit_norm(self.weight) if self.weight_norm == "unit" else self.weight
        return ops.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups, self.b)

    def extra_repr(self) -> str:
        base: str = super().extra_repr()  # type: ignore[no-untyped-call]
        unit = ", weight_norm='unit'" if self.weight_norm == "unit" else ""
        return f"{base}, b={float(self.b):g}{unit}" + (", tf_same_padding=True" if self.tf_same_padding else "")


class BcosLinear(nn.Linear):
    """B-cos linear layer over the last dimension; see :class:`BcosConv2d` for ``b`` and ``weight_norm``."""

    b: float | nn.Parameter

    def __init__(self, *args: Any, b: float = 2.0, weight_norm: WeightNorm = "none", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.b = float(b)
        self.weight_norm = weight_norm

    def forward(self, input: Tensor) -> Tensor:
        weight = _unit_norm(self.weight) if self.weight_norm == "unit" else self.weight
        return ops.linear(input, weight, self.bias, self.b)

    def extra_repr(self) -> str:
        return (
            super().extra_repr()
            + f", b={float(self.b):g}"
            + (", weight_norm='unit'" if self.weight_norm == "unit" else "")
        )

"""1 x 1 float32 convolutions as matrix products, with the epilogue on each block of pixels while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bcos_rt.kernels import cpu

__all__ = ["Pointwise", "suits"]


def suits(weight: Tensor, padding: Sequence[int], groups: int) -> bool:
    """Whether :class:`Pointwise` can compute the convolution, and was measured to be the faster way."""
    one = tuple(weight.shape[2:]) == (1, 1) and not any(padding) and groups == 1
    return one and weight.dtype == torch.float32 and cpu.isa() == "avx512"


class Pointwise:
    """``conv2d(x, weight, None, stride)`` as the first half of :func:`bcos_rt.kernels.cpu.conv_epilogue`.

    Args:
        weight: float32 [O, C, 1, 1]; packed here.
    """

    def __init__(self, weight: Tensor, stride: Sequence[int] = (1, 1)) -> None:
        self.outputs, self.channels = (int(n) for n in weight.shape[:2])
        self.stride = tuple(stride)
        weight, kernels = weight.contiguous(), cpu._kernels()
        pad = kernels.POINTWISE_PAD
        self.packed = torch.empty(self.channels * -(-self.outputs // pad) * pad, dtype=torch.float32, device="cpu")
        kernels.pointwise_pack(self.outputs, self.channels, weight.data_ptr(), self.packed.data_ptr())

    def empty(self, x: Tensor) -> Tensor:
        """Channels-last memory for the result, [N, O, H', W']."""
        n, _, *size = x.shape
        return cpu._image_like(
            (n, self.outputs, *((s - 1) // t + 1 for s, t in zip(size, self.stride, strict=True))), torch.float32
        )

    def product(self, x: Tensor) -> tuple[Any, ...]:
        """The product of ``x`` [N, C, H, W], whose channels are next to each other, as an epilogue's ``product``."""
        return cpu._operand(x), self.channels, *self.stride, self.packed.data_ptr()

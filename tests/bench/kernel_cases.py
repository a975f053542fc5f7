"""A sweep of tiny layers with sizes that divide nothing, and how a case's results are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from bcos_rt.benchmark.kernels.layers import Sweep, convolution, image, linear, pool
from bcos_rt.kernels import reference
from tests.tolerances import KERNEL

__all__ = ["TINY", "assert_close", "tiny_sweep"]

TINY = Sweep(
    stem=(convolution("tiny", 2, 6, 12, 16, 7, 2),),
    convolutions=(
        convolution("tiny", 2, 16, 7, 24, 3, 2),
        convolution("tiny", 2, 16, 5, 8, 1),
        convolution("tiny", 2, 16, 9, 16, 3),
    ),
    depthwise=(convolution("tiny", 2, 21, 7, 21, 3, 2, groups=21), convolution("tiny", 2, 16, 5, 16, 5, 1, groups=16)),
    linears=(linear("tiny", 5, 12, 19),),
    max_pools=(pool("tiny", "max_pool2d", 2, 8, 7, 3, 2, 1),),
    avg_pools=(pool("tiny", "avg_pool2d", 2, 8, 6, 2, 2), pool("tiny", "avg_pool2d", 2, 8, 3, 3, 3)),
    epilogues=(convolution("tiny", 2, 16, 5, 9, 3), convolution("tiny", 2, 16, 5, 8, 1)),
    norms=(image("tiny", 2, 19, 5),),
    pictures=(image("tiny", 2, 3, 8),),
)


def tiny_sweep(batch: int, encoded_channels: int) -> Sweep:
    """In place of :func:`bcos_rt.benchmark.kernels.layers.networks`."""
    return TINY


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """A result against its definition in float64.

    A ReLU's gate, and the multiplier that it is in, may differ where the value is within rounding of 0: the share of
    such places is bounded instead of their difference.
    """
    if actual.dtype in (torch.uint8, torch.bool) or expected.dtype in (torch.uint8, torch.bool):
        on = [_unpacked(t, max(actual.shape[1], expected.shape[1])) for t in (actual, expected)]
        assert float((on[0] != on[1]).double().mean()) < 0.02, what
        return
    if actual.ndim == 4 and actual.shape[1] == 1 < expected.shape[1]:
        expected = expected.sum(1, keepdim=True)  # a map, split by channels
    assert actual.shape == expected.shape, what
    rtol, atol = KERNEL[dtype]
    difference = (actual.double() - expected.double()).abs()
    allowed = rtol * expected.double().abs() + atol * max(1.0, float(expected.abs().max()))
    assert float((difference > allowed).double().mean()) < 0.02, f"{what}: {float((difference - allowed).max()):.3g}"


def _unpacked(mask: Tensor, channels: int) -> Tensor:
    """Bool [N, C, H, W] of bytes or bits."""
    if mask.dtype == torch.bool:
        return mask
    return reference.unpack_mask(mask.permute(0, 2, 3, 1), channels).permute(0, 3, 1, 2)

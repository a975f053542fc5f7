"""Problems that the tests of several kernels share, and the comparison with the reference in float64.

Shapes are toys (an interpreted program takes milliseconds; its tile is 32 x 32 x 32), chosen so
that nothing divides anything: partial tiles in every direction, partial bytes of a mask, partial vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bcos_rt.kernels import ops
from bcos_rt.kernels.ops import ACTIVATIONS
from tests.triton.guard import Guards, check

__all__ = [
    "ACTIVATIONS",
    "BS",
    "DTYPES",
    "GEOMETRIES",
    "RESULTS",
    "Geometry",
    "channels_last",
    "compare",
    "draw",
    "is_channels_last",
]

BS = (1.0, 1.5, 2.0, 2.5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What each op returns, in order, for messages.
RESULTS: dict[str, tuple[str, ...]] = {
    "conv2d_fused": ("y", "multiplier", "gate", "squares"),
    "linear_fused": ("y", "multiplier", "gate", "squares"),
    "conv2d_transposed": ("out", "raw"),
    "linear_transposed": ("out", "raw"),
    "conv2d_contributions": ("weights", "contributions", "colour"),
    "square_sum": ("squares",),
}
# In float32 whatever the storage dtype; the last two come from fp32 sums that are never rounded to it.
FLOAT32_RESULTS = {"squares", "weights", "contributions", "colour"}
UNROUNDED_RESULTS = FLOAT32_RESULTS - {"squares"}


@dataclass(frozen=True)
class Geometry:
    """A convolution: channels in and out, kernel, stride, padding, dilation, groups, and the image's size."""

    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (6, 5)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the ops."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        h, w = (
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        return h, w

    def x(self, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """[batch, C, H, W], channels-last."""
        return channels_last(draw((batch, self.channels, *self.size), dtype, seed))

    def y_like(self, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """[batch, O, H', W'], channels-last."""
        return channels_last(draw((batch, self.filters, *self.out_size), dtype, seed))

    def weight(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """[O, C / groups, kh, kw] of unit norm, channels-last."""
        w = draw((self.filters, self.channels // self.groups, *self.kernel), torch.float64, seed)
        return channels_last((w / w.flatten(1).norm(dim=1)[:, None, None, None]).to(dtype))


GEOMETRIES: dict[str, Geometry] = {
    "3x3": Geometry(8, 16, (3, 3), padding=(1, 1)),
    "odd_channels": Geometry(5, 7, (3, 3), padding=(1, 1)),
    "many_channels": Geometry(40, 70, (3, 3), padding=(1, 1), size=(5, 4)),
    "stem": Geometry(8, 16, (7, 7), (2, 2), (3, 3), size=(13, 10)),
    "1x1": Geometry(33, 35, (1, 1)),
    "1x1_strided": Geometry(16, 24, (1, 1), (2, 2), size=(8, 5)),
    "1x1_padded": Geometry(8, 9, (1, 1), padding=(1, 1), size=(3, 4)),
    "patchify": Geometry(8, 24, (4, 4), (4, 4), size=(8, 12)),
    "patchify_rest": Geometry(8, 6, (4, 4), (4, 4), size=(9, 11)),
    "uneven": Geometry(16, 8, (3, 2), (2, 1), (1, 0), (1, 2), 2, size=(9, 6)),
    "dilated": Geometry(8, 12, (3, 3), padding=(2, 2), dilation=(2, 2), size=(7, 6)),
    "dilated_strided": Geometry(8, 12, (3, 3), (2, 3), (2, 3), (2, 2), size=(9, 10)),
    "grouped": Geometry(24, 12, (3, 3), (2, 2), (1, 1), groups=4, size=(7, 7)),
    "grouped_bytes": Geometry(16, 48, (3, 3), padding=(1, 1), groups=2, size=(4, 4)),
    "wide_padding": Geometry(8, 8, (3, 3), (2, 1), (4, 3), size=(3, 4)),
    "even_kernel": Geometry(8, 10, (2, 4), (2, 2), (1, 2), size=(6, 7)),
    "no_padding": Geometry(12, 8, (3, 3), size=(5, 7)),
    "one_pixel": Geometry(8, 8, (3, 3), padding=(1, 1), size=(1, 1)),
    "stride_over_kernel": Geometry(8, 8, (2, 2), (3, 4), size=(8, 10)),
}


def draw(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values, the same everywhere."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] -> the same in channels-last memory, for every shape."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def is_channels_last(x: Tensor) -> bool:
    """Whether an image lies in channels-last memory (torch's own flag is ambiguous)."""
    return x.permute(0, 2, 3, 1).is_contiguous()


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value


def compare(
    guards: Guards,
    name: str,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor | None],
    **options: Any,
) -> tuple[Tensor, ...]:
    """Run op ``name`` as Triton kernels on guarded copies, and compare all it returns with the float64 reference.

    Returns:
        What the kernels returned, on the CPU.
    """
    given = {key: None if value is None else guards.guarded(value) for key, value in tensors.items()}
    with ops.use_backend("triton"):
        actual = getattr(ops, name)(**given, **options)
    with ops.use_backend("reference"):
        expected = getattr(ops, name)(**{key: _double(value) for key, value in tensors.items()}, **options)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for result, truth, label in zip(actual, expected, RESULTS[name], strict=True):
        check(result, truth, torch.float32 if label in UNROUNDED_RESULTS else dtype, label)
        if result.numel() and label in FLOAT32_RESULTS:
            assert result.dtype == torch.float32, label
        elif result.numel() and not (label == "gate" and result.dtype == torch.uint8):
            assert result.dtype == dtype, label
        if result.ndim == 4 and name.startswith("conv2d") and label not in UNROUNDED_RESULTS:
            assert is_channels_last(result), label
    if "squares" in RESULTS[name][1:] and actual[-1].numel():
        # Of the rounded values: what the next layer reads.
        dim = 1 if name.startswith("conv2d") else -1
        check(actual[-1].sum(dim), actual[0].double().square().sum(dim), torch.float32, "squares of y")
    guards.verify()
    return tuple(result.cpu() for result in actual)

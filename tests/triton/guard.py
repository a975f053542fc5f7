"""What a kernel must not touch: operands inside poisoned buffers, results between guard bands.

A copy made by :meth:`Guards.guarded` lies in the middle of a buffer of NaN (integers: of a sentinel), so a read outside
poisons the result; in the interpreter the address itself is caught. Results come from :meth:`Guards.allocate` full of
the same poison, so what a kernel leaves unwritten shows as well. :meth:`Guards.verify` looks at every band and
at every operand afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bcos_rt.kernels.triton import common
from bcos_rt.kernels.triton.launch import interpreting
from tests.tolerances import kernel_tolerance
from tests.triton import interpreter

__all__ = ["INTEGER_POISON", "Guards", "OutsideError", "check", "guarding"]

# All bits on is a NaN in every float type, and not the one that arithmetic makes.
FLOAT_POISON = 0xFF
INTEGER_POISON = 0xA5
BAND = 1040  # bytes at least: a start on 16 bytes, but not on 32


class OutsideError(AssertionError):
    """A kernel wrote where it must not, or (in the interpreter) read there."""


@dataclass(frozen=True)
class _Block:
    buffer: Tensor  # bytes
    band: int
    size: int  # bytes of the tensor between the bands
    poison: int
    before: Tensor | None  # an operand's whole buffer as it was given; None for a result
    name: str

    def check(self) -> None:
        edges = {"before": self.buffer[: self.band], "after": self.buffer[self.band + self.size :]}
        for side, edge in edges.items():
            wrong = (edge != self.poison).nonzero().flatten()
            if wrong.numel():
                raise OutsideError(f"{self.name}: {wrong.numel()} bytes written {side} it, first at {int(wrong[0])}")
        if self.before is not None and not torch.equal(self.buffer, self.before):
            raise OutsideError(f"{self.name}: an operand was written to")


class Guards:
    """The guarded operands and results of one test; ``device`` is where they live."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._blocks: list[_Block] = []
        self._bounds: NDArray[np.uint64] | None = None

    def _make(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any, what: str) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
        size = span * dtype.itemsize
        # As far as the tensor is large: a wrong row or image lands in the band, not in someone else's memory.
        band = BAND + -(-size // 32) * 32
        poison = FLOAT_POISON if dtype.is_floating_point else INTEGER_POISON
        buffer = torch.full((2 * band + -(-size // 16) * 16,), poison, dtype=torch.uint8, device=device)
        tensor = buffer[band : band + size].view(dtype).as_strided(shape, stride)
        self._blocks.append(_Block(buffer, band, size, poison, None, f"{what} {tuple(shape)} {dtype}"))
        self._bounds = None
        return tensor

    def guarded(self, tensor: Tensor) -> Tensor:
        """A copy of an operand, strides included, inside a poisoned buffer; starts on 16 bytes."""
        if any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"an expanded tensor (strides {tensor.stride()}) has no copy of the same layout")
        copy = self._make(tensor.shape, tensor.stride(), tensor.dtype, self.device, "operand")
        copy.copy_(tensor.detach())
        self._blocks[-1] = replace(self._blocks[-1], before=self._blocks[-1].buffer.clone())
        return copy

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        """A contiguous result full of poison between two bands (stands in for ``common.allocator``)."""
        if torch.device(device).type == "meta":
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        stride = [1]
        for n in reversed(shape[1:]):
            stride.insert(0, stride[0] * max(n, 1))
        return self._make(tuple(shape), stride[: len(shape)], dtype, device, "result")

    def verify(self) -> None:
        """Raise :class:`OutsideError` if a band or an operand was written to."""
        for block in self._blocks:
            block.check()

    def look(self, addresses: NDArray[np.uint64], itemsize: int) -> None:
        """Raise :class:`OutsideError` if one of the addresses lies in a band (the interpreter's watcher)."""
        if self._bounds is None:
            edges = []
            for block in self._blocks:
                start = block.buffer.data_ptr()
                edges += [(start, start + block.band)]
                edges += [(start + block.band + block.size, start + block.buffer.numel())]
            self._bounds = np.array([edge for pair in sorted(edges) for edge in pair], dtype=np.uint64)
        if addresses.size == 0 or self._bounds.size == 0:
            return
        # Odd places are inside a band.
        found = np.searchsorted(self._bounds, addresses, side="right") % 2 == 1
        if found.any():
            bad = int(addresses[found].flat[0])
            for block in self._blocks:
                offset = bad - block.buffer.data_ptr()
                if 0 <= offset < block.buffer.numel():
                    first = (offset - block.band) // itemsize
                    raise OutsideError(f"{block.name}: {int(found.sum())} addresses outside it, first element {first}")


@contextmanager
def guarding(device: str) -> Iterator[Guards]:
    """Guards whose results every launcher gets, and that see every address in the interpreter; verified at the end."""
    guards = Guards(device)
    plain = common.allocator
    common.allocator = guards.allocate
    try:
        if interpreting():
            with interpreter.watch(guards.look):
                yield guards
        else:
            yield guards
    finally:
        common.allocator = plain
    guards.verify()


def check(actual: Tensor, expected64: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    """``|actual - expected| <= atol max|expected| + rtol |expected|`` everywhere, with ``kernel_tolerance(dtype)``.

    Args:
        actual: what a kernel returned; its shape must be the expected one.
        expected64: the same in float64. Integers are compared exactly, infinities and zeros by value.
        dtype: the storage dtype of the computation.
    """
    if tuple(actual.shape) != tuple(expected64.shape):
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}")
    expected, given = expected64.detach().cpu(), actual.detach().cpu()
    if not given.dtype.is_floating_point:
        wrong = (given != expected.to(given.dtype)).sum()
        if wrong:
            raise AssertionError(f"{what}: {int(wrong)} of {given.numel()} integers differ")
        return
    given, expected = given.double(), expected.double()
    tolerance = kernel_tolerance(dtype)
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    error = (given - expected).abs()
    bound = tolerance["atol"] * scale + tolerance["rtol"] * expected.abs()
    # A NaN fails every comparison; equal infinities have no difference.
    right = (expected.isfinite() & (error <= bound)) | (given == expected)
    if not right.all():
        first = tuple((~right).nonzero()[0].tolist())
        worst = float(error[error.isfinite()].max()) if error.isfinite().any() else float("nan")
        raise AssertionError(
            f"{what}: {int((~right).sum())} of {right.numel()} values are wrong ({int(given.isnan().sum())} NaN), "
            f"first at {first}: {float(given[first])}, expected {float(expected[first])}; "
            f"largest error {worst:.3g}, largest magnitude {scale:.3g}"
        )

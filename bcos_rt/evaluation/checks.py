"""What every evaluation asks of a network, of its logits and of the maps of a method."""

from __future__ import annotations

import numbers
from itertools import chain

import torch
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError

__all__ = ["check_count", "checked_logits", "checked_maps", "example_tensor", "is_number", "logits_of", "spread"]


def check_count(argument: str, value: object, least: int = 1) -> None:
    """Raise InvalidArgumentError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgumentError(argument, repr(value), f"an integer of at least {least}")


def is_number(value: object) -> bool:
    """Whether this is one real number: Python's, NumPy's or a tensor without dimensions."""
    if isinstance(value, Tensor):
        return value.ndim == 0
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def spread(count: int, among: int) -> set[int]:
    """``count`` indices (all, where there are fewer) spread evenly over 0 to ``among - 1``."""
    count = min(count, among)
    return {i * among // count for i in range(count)}


def example_tensor(net: nn.Module) -> Tensor:
    """One floating-point tensor of a network, to put images where it is; for a network without any, on the CPU."""
    for tensor in chain(net.parameters(), net.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)


def checked_logits(outputs: object, first: int = 0, network: str = "the network") -> Tensor:
    """``outputs`` as finite logits [N, classes].

    Args:
        outputs: what the network returned.
        first: index of the first image of these, for the message.
        network: what the message calls it.

    Raises:
        InvalidArgumentError: something else, or a logit that is NaN or infinite; the first such image is named.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InvalidArgumentError("net", f"an output of {network} of {got}", "logits [N, classes]")
    finite = torch.isfinite(outputs).all(1)
    if not bool(finite.all()):
        index = first + int((~finite).nonzero()[0, 0])
        raise InvalidArgumentError(
            "net", f"logits of {network} with NaN or infinite values (image {index})", "finite ones"
        )
    return outputs


def logits_of(net: nn.Module, images: Tensor, first: int = 0, network: str = "the network") -> Tensor:
    """A network's finite logits [N, classes], see :func:`checked_logits`; an image that is not finite is named."""
    try:
        outputs = net(images)
    except InvalidArgumentError as error:
        bad = (~torch.isfinite(images.flatten(1)).all(1)).nonzero()
        if error.argument != "images" or not len(bad):
            raise
        raise InvalidArgumentError(
            "data", f"NaN or infinite values (image {first + int(bad[0, 0])})", error.expected
        ) from error
    return checked_logits(outputs, first, network)


def checked_maps(maps: Tensor, name: str, expected: tuple[int, ...]) -> Tensor:
    """Finite maps of the shape ``expected``, detached.

    Raises:
        InvalidArgumentError: others; the method ``name`` is named.
    """
    if tuple(maps.shape) != expected:
        raise InvalidArgumentError("methods", f"maps of shape {tuple(maps.shape)} from {name!r}", f"{expected}")
    if not bool(torch.isfinite(maps).all()):
        raise InvalidArgumentError("methods", f"maps with NaN or infinite values from {name!r}", "finite ones")
    return maps.detach()

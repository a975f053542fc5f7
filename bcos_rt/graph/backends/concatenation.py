"""Concatenations of channels in place, for backends whose kernels read and write slices of channels.

A dense block concatenates what it has with each layer's result: :math:`n` layers copy their inputs :math:`n` times, and
all copies wait for the adjoint. Here a chain of such concatenations has one channels-last buffer with the channels of
its last link. A link writes its new channels behind those of the link before, and its value is the buffer's first
channels; a layer whose result goes nowhere else writes it there itself.

No view is ever written to after it was made: a later link writes behind it. The buffer is a value of the graph, so each
call has its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bcos_rt.graph.program import Program

__all__ = ["Slice", "join_in_place"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Slice:
    """Channels [begin, end) of a buffer."""

    buffer: Node
    begin: int
    end: int

    def of(self, buffer: Tensor) -> Tensor:
        """The channels of a buffer's value."""
        return buffer.narrow(1, self.begin, self.end - self.begin)


def join_in_place(program: Program, writes: Callable[[Node], bool]) -> dict[Node, Slice]:
    """Replace concatenations of channels by steps on buffers.

    Args:
        program: changed in place.
        writes: whether the step of a node (the producer of a result 0) can write it into a slice of channels.

    Returns:
        the slices that such nodes' steps have to write their result 0 into; those results are then the slices.
    """
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    slices: dict[Node, Slice] = {}
    for chain in _chains(program):
        direct = {
            producer: operand
            for link in chain
            for operand in _operands(link)
            if (producer := _sole_producer(operand)) is not None and writes(producer)
        }
        if len(chain) == 1 and not direct:
            continue
        channels = int(chain[-1].meta["val"].shape[1])
        # Before the first that writes to it.
        first = min([chain[0], *direct], key=position.__getitem__)
        with program.graph.inserting_before(first):
            buffer = program.graph.call_function(_buffer_like(chain[-1], channels), (program.image,))
        before: Node | None = None
        for link in chain:
            ends = 0
            places: list[tuple[int, int] | None] = []
            for operand in _operands(link):
                begin, ends = ends, ends + int(operand.meta["val"].shape[1])
                producer = _sole_producer(operand)
                if producer is not None and producer in direct:
                    slices[producer] = Slice(buffer, begin, ends)
                places.append(None if producer in direct or (begin == 0 and operand is before) else (begin, ends))
            with program.graph.inserting_before(link):
                joined = program.graph.call_function(_join(link, places, ends), (buffer, *_operands(link)))
            joined.meta.update(link.meta)
            link.replace_all_uses_with(joined)
            program.graph.erase_node(link)
            before = joined
    return slices


def _chains(program: Program) -> list[list[Node]]:
    """Concatenations, each the first operand of the next."""
    chains: list[list[Node]] = []
    last: dict[Node, list[Node]] = {}  # by the chain's last link so far
    for node in program.graph.nodes:
        if not _joins_channels(program, node):
            continue
        # What one chain already goes on with is copied by another.
        chain = last.pop(_operands(node)[0], None)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(node)
        last[node] = chain
    return chains


def _joins_channels(program: Program, node: Node) -> bool:
    """Whether a node concatenates the channels of images of one dtype, the batch's (not the rows of gradients)."""
    if node.target is not aten.cat.default or len(node.args) < 2 or node.args[1] not in (1, -3):
        return False
    value = node.meta["val"]
    if value.ndim != 4 or str(value.shape[0]) != str(program.image.meta["val"].shape[0]):
        return False
    if not all(isinstance(size, int) for size in value.shape[1:]):
        return False
    return all(o.meta["val"].ndim == 4 and o.meta["val"].dtype == value.dtype for o in _operands(node))


def _operands(link: Node) -> list[Node]:
    """What a node concatenates."""
    given: Any = link.args[0]
    return list(given)


def _sole_producer(operand: Node) -> Node | None:
    """The node whose result 0 an operand is, if nothing else reads that result and it is concatenated once."""
    if len(operand.users) != 1 or operand.target is not operator.getitem or operand.args[1] != 0:
        return None
    (user,) = operand.users
    producer = operand.args[0]
    once = user.target is aten.cat.default and sum(o is operand for o in _operands(user)) == 1
    return producer if once and isinstance(producer, Node) else None


def _buffer_like(link: Node, channels: int) -> Callable[[Tensor], Tensor]:
    height, width = link.meta["val"].shape[2:]
    dtype = link.meta["val"].dtype

    def buffer(image: Tensor) -> Tensor:
        size = (image.shape[0], channels, height, width)
        return torch.empty(size, dtype=dtype, memory_format=torch.channels_last)

    buffer.__name__ = f"buffer_{link.name}"
    return buffer


def _join(link: Node, places: list[tuple[int, int] | None], channels: int) -> Callable[..., Tensor]:
    """Writes the operands that are not in the buffer yet; returns its first ``channels``."""
    copies = [(i, begin, end - begin) for i, place in enumerate(places) if place is not None for begin, end in [place]]

    def join(buffer: Tensor, *operands: Tensor) -> Tensor:
        for i, begin, count in copies:
            buffer.narrow(1, begin, count).copy_(operands[i])
        return buffer.narrow(1, 0, channels)

    join.__name__ = f"join_{link.name}"
    return join

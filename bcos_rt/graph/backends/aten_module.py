"""A lowered program as a module of its own: constants as buffers, images and targets as its only inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.graph.program import Program

__all__ = ["aten_module", "check_inputs"]


def aten_module(program: Program) -> GraphModule:
    """``module(images[, targets])`` -> the outputs as a tuple, in the order of ``program.outputs``.

    The constants are buffers, so that a compiler may freeze them; generated code lets go of a value after its last
    use.
    """
    root, graph = nn.Module(), Graph()
    copies: dict[Node, Node] = {}
    for node in program.graph.nodes:
        if node in program.constants:
            name = f"constant_{len(copies)}"
            root.register_buffer(name, program.constants[node], persistent=False)
            copies[node] = graph.get_attr(name)
            copies[node].meta["val"] = node.meta["val"]
        elif node.op != "output":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in program.outputs.values()))
    return GraphModule(root, graph)


def check_inputs(program: Program, images: Tensor, targets: Tensor | None) -> None:
    """What a compiled graph takes on trust.

    Raises:
        InvalidArgumentError, InvalidTypeError: images or targets that the program was not made for.
    """
    value = program.image.meta["val"]
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(value.shape[1:]):
        raise InvalidArgumentError(
            "images", f"shape {tuple(images.shape)}", f"[N, {', '.join(map(str, value.shape[1:]))}]"
        )
    if images.dtype not in (torch.uint8, value.dtype):
        raise InvalidTypeError("images", f"dtype {images.dtype}", f"{value.dtype} or torch.uint8")
    if (targets is None) != (program.targets is None):
        wanted = "None: this program only predicts" if program.targets is None else "a tensor"
        raise InvalidArgumentError("targets", "None" if targets is None else "a tensor", wanted)
    if targets is not None and program.targets is not None:
        expected = program.targets.meta["val"]
        tail = tuple(expected.shape[2:])
        if targets.ndim != expected.ndim or targets.shape[0] != images.shape[0] or tuple(targets.shape[2:]) != tail:
            wanted = ", ".join(map(str, (images.shape[0], "K", *tail)))
            raise InvalidArgumentError("targets", f"shape {tuple(targets.shape)}", f"[{wanted}]")
        if targets.dtype != expected.dtype:
            raise InvalidTypeError("targets", f"dtype {targets.dtype}", str(expected.dtype))

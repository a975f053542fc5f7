"""A program for one batch size, one number of classes and one image dtype: its symbolic sizes become numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from bcos_rt.graph.program import Program

__all__ = ["specialise", "with_image_dtype"]

aten = torch.ops.aten
# What works sizes out from other sizes. Their values become numbers, so the nodes go.
_ARITHMETIC = (operator.mul, operator.add, operator.sub, operator.floordiv)


def with_image_dtype(program: Program, dtype: torch.dtype) -> Program:
    """The program for images of another dtype (uint8 in place of floating point), as a copy; sizes stay symbolic."""
    result = program.copy()
    result.image.meta["val"] = program.image.meta["val"].to(dtype)
    return result


def specialise(
    program: Program, batch: int, classes: int | None = None, image_dtype: torch.dtype | None = None
) -> Program:
    """The program for ``batch`` images and ``classes`` classes of each, as a copy that shares the constants.

    Args:
        classes: K; ignored by a program without class ids.
        image_dtype: dtype of the images, where it is not the program's.
    """
    result = program.copy()
    sizes: dict[Any, int] = {}
    _bind(sizes, result.image, 0, batch)
    if result.targets is not None and classes is not None:
        _bind(sizes, result.targets, 1, classes)
    mode = FakeTensorMode()

    def number(value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr.subs(sizes)
        return int(expression) if expression.is_Integer else value

    def fixed(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(fixed(v) for v in value)
        if not isinstance(value, Tensor):
            return number(value)
        shape, stride = [number(s) for s in value.shape], [number(s) for s in value.stride()]
        with mode:
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    for node in list(result.graph.nodes):
        if node.op == "output":
            continue
        node.meta["val"] = fixed(node.meta["val"])
        # Numbers inside the arguments: a SymInt never stands there by itself, it is a node.
        if isinstance(node.meta["val"], int) and (node.target is aten.sym_size.int or node.target in _ARITHMETIC):
            _inline(node)
            result.graph.erase_node(node)
    if image_dtype is not None:
        with mode:
            result.image.meta["val"] = result.image.meta["val"].to(image_dtype)
    return result


def _inline(node: Node) -> None:
    """A node's number in place of the node in every argument."""

    def number(n: Node) -> Any:
        return node.meta["val"] if n is node else n

    for user in list(node.users):
        user.args, user.kwargs = torch.fx.node.map_arg((user.args, user.kwargs), number)


def _bind(sizes: dict[Any, int], node: Node, dim: int, value: int) -> None:
    size = node.meta["val"].shape[dim]
    if isinstance(size, torch.SymInt):
        sizes[size.node.expr] = value

"""Asymmetric padding as a part of a convolution's window, for kernels that take any window.

TensorFlow's "same" padding of a strided layer pads more behind than before. As a step of its own it copies the image,
and its adjoint, a crop, the gradient. The C++ kernels read zeros wherever a window leaves the image and are told the
size of their result, so padding in front is an offset of the window and padding behind is nothing at all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from bcos_rt.graph.capture import bound_arguments
from bcos_rt.graph.program import Program

__all__ = ["fold_crop_of_the_image", "fold_crops", "padding_of"]

aten = torch.ops.aten
bcos = torch.ops.bcos_rt
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


def padding_of(node: Node) -> tuple[Node, tuple[int, int]] | None:
    """For an image padded with zeros: the image, and how many rows and columns stand before it. None for others."""
    found = _pads(node)
    if found is None or min(found[1]) < 0:
        return None
    source, (left, _, top, _) = found
    return source, (top, left)


def fold_crops(program: Program, folds: Callable[[Node], bool]) -> None:
    """Let transposed convolutions compute only what is left of their result, and end with the epilogue behind the crop.

    Args:
        program: changed in place. ``input_size`` of such a convolution may then be smaller than the window gives.
        folds: whether the step of a transposed convolution (which has no epilogue yet) can do that.
    """
    for node in list(program.graph.nodes):
        found = _cropped_convolution(node, folds)
        if found is None:
            continue
        producer, (top, left) = found
        a = bound_arguments(producer)
        a["input_size"] = [int(s) for s in node.meta["val"].shape[2:]]
        a["padding"] = [a["padding"][0] - top, a["padding"][1] - left]
        epilogue = _sole_user(node)
        if epilogue is None or epilogue.target is not bcos.transposed_epilogue.default or epilogue.args[0] is not node:
            epilogue = None
        else:
            end = bound_arguments(epilogue)
            a.update({name: end[name] for name in ("multiplier", "identity", "gate", "want_raw")})
        # The epilogue's factors may be made only just before it.
        with program.graph.inserting_before(epilogue or node):
            new = program.graph.call_function(bcos.conv2d_transposed.default, tuple(a.values()))
            if epilogue is not None:
                new.meta.update(epilogue.meta)
                epilogue.replace_all_uses_with(new)
                continue
            result = program.graph.call_function(operator.getitem, (new, 0))
        new.meta.update(producer.meta)
        result.meta.update(node.meta)
        node.replace_all_uses_with(result)
    program.clean()


def fold_crop_of_the_image(program: Program, folds: Callable[[Node], bool]) -> None:
    """:func:`fold_crops` for the stem's transposed convolution and the contributions made of its result."""
    for node in list(program.graph.nodes):
        if node.target is not bcos.image_contributions.default:
            continue
        given = bound_arguments(node)
        found = _cropped_convolution(given["grad"], folds)
        if found is None or _sole_user(given["grad"]) is None:
            continue
        producer, (top, left) = found
        a = bound_arguments(producer)
        args = (
            a["grad"], a["weight"], given["image"], given["inverse_std"], a["stride"],
            [a["padding"][0] - top, a["padding"][1] - left], a["dilation"], given["scale"], given["want_weights"],
        )  # fmt: skip
        with program.graph.inserting_before(node):
            new = program.graph.call_function(bcos.conv2d_contributions.default, args)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
    program.clean()


def _pads(node: Node) -> tuple[Node, tuple[int, int, int, int]] | None:
    """The image that a node pads with zeros (or, below 0, crops), and by how much: left, right, top, bottom."""
    if node.target not in _PADS:
        return None
    a: dict[str, Any] = bound_arguments(node)
    left, right, top, bottom = a["pad"] if len(a["pad"]) == 4 else (0, 0, 0, 0)
    if len(a["pad"]) != 4 or node.meta["val"].ndim != 4 or a.get("mode", "constant") != "constant" or a["value"]:
        return None
    if not all(isinstance(p, int) for p in (left, right, top, bottom)):
        return None
    return a["self"], (left, right, top, bottom)


def _cropped_convolution(node: Node, folds: Callable[[Node], bool]) -> tuple[Node, tuple[int, int]] | None:
    """The transposed convolution whose bare result a node crops, if it folds; rows and columns to come off in front.

    They are negative, as in the node.
    """
    found = _pads(node)
    if found is None or max(found[1]) > 0:
        return None
    cropped, (left, _, top, _) = found
    producer = _bare_result(cropped)
    return None if producer is None or not folds(producer) else (producer, (top, left))


def _sole_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _bare_result(node: Node) -> Node | None:
    """The transposed convolution without an epilogue whose result a node is, if nothing reads that but one node."""
    if node.target is not operator.getitem or node.args[1] != 0 or _sole_user(node) is None:
        return None
    producer: Any = node.args[0]
    if producer.target is not bcos.conv2d_transposed.default or _sole_user(producer) is None:
        return None
    a = bound_arguments(producer)
    bare = not a["want_raw"] and all(a[name] is None for name in ("multiplier", "identity", "gate"))
    return producer if bare else None

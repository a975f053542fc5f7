"""Half precision: which nodes stay in fp32, and how far the adjoint's seed is scaled up."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bcos_rt.export import fused
from bcos_rt.export.program import Program

__all__ = ["scale_seed", "wide_nodes"]

HEADROOM = 16.0  # how far the largest adjoint of the calibration images stays below fp16's largest number
LARGEST_FACTOR = 2.0**14

aten = torch.ops.aten


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def wide_nodes(program: Program) -> set[Node]:
    """Nodes in fp32: encoded images and texts, the residual's terms, W once it is unscaled and all that follows."""
    ends = [program.outputs["logits"]] if "logits" in program.outputs else []
    ends += [n.args[0] for n in program.graph.nodes if n.target is aten.argmax.default]
    if program.adjoint is not None:
        ends.append(program.adjoint)
    else:  # the residual may be asked for without W: its adjoints are as large as W's
        ends += [n for n in program.graph.nodes if n.target is aten.conv_transpose2d.input]
    half = _ancestors(ends)
    encoding = {n for n in program.graph.nodes if n is program.image or n.target is fused.encode_image}
    if program.targets is not None and program.targets.meta["val"].is_floating_point():
        # The text, of any norm, until it is scaled to 1.
        texts = {program.targets}
        for node in program.graph.nodes:
            if node.all_input_nodes and texts.issuperset(node.all_input_nodes):
                texts.add(node)
        encoding |= texts
    return {n for n in program.graph.nodes if n not in half} | encoding


def scale_seed(program: Program, images: Tensor, targets: Tensor) -> float:
    """Scale the seed by a power of two and unscale W and residual, in fp32; returns the factor.

    Half of all |W| lie below fp16's smallest normal number, 6e-5. The largest adjoint on the given images decides the
    factor: that one stays :data:`HEADROOM` below fp16's largest number.

    Args:
        images, targets: what to run the program on.
    """
    if program.seed is None:
        return 1.0
    largest = 0.0

    def watch(node: Node, value: Any) -> None:
        nonlocal largest
        if node in half and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            largest = max(largest, float(value.abs().max()))

    wide = wide_nodes(program)
    half = {n for n in program.graph.nodes if n.meta.get("side") == "adjoint" and n not in wide}
    program.run(images, targets, watch)
    limit = torch.finfo(torch.float16).max / HEADROOM
    factor = 1.0
    while largest > 0 and 2 * factor * largest <= limit and factor < LARGEST_FACTOR:
        factor *= 2
    if factor != 1.0:
        _insert(program, program.seed, factor)
        residual = program.outputs.get("residual")
        # Without any constant in the network the residual is 0 times something else.
        terms = set() if residual is None or residual.target is aten.mul.Scalar else _ancestors([residual])
        if program.adjoint is not None:
            # The input mean's term in the residual multiplies W too; the residual is unscaled once, as a whole.
            _insert(program, program.adjoint, 1 / factor, terms)
        if residual is not None and terms:
            _insert(program, residual, 1 / factor)
        program.outputs = dict(next(n for n in program.graph.nodes if n.op == "output").args[0])
    return factor


def _insert(program: Program, node: Node, factor: float, but_for: Set[Node] = frozenset()) -> None:
    """Scale a node for all its users but those given."""
    with program.graph.inserting_after(node):
        scaled = program.graph.call_function(fused.scale, (node, factor))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled and user not in but_for)

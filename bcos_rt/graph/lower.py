"""A program of fused ops as a program of ATen ops alone: what a compiler of ATen graphs can see into.

Every fused op of :mod:`bcos_rt.kernels.ops` becomes a convolution or matrix product in the storage dtype and
elementwise ops in at least float32 around it. ``torch.compile`` with frozen weights turns the first into packed oneDNN
calls and the second into a few loops; run op by op it is PyTorch's own kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from bcos_rt.graph import lower_layers, lower_transposed  # noqa: F401 (they register their lowerings)
from bcos_rt.graph.capture import bound_arguments
from bcos_rt.graph.lowering import LOWERINGS, Encoded, Lowering, Results, lowering
from bcos_rt.graph.program import Program

__all__ = ["lower_to_aten"]

aten = torch.ops.aten
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def lower_to_aten(program: Program, *, compiled: bool = False) -> Program:
    """The program in ATen ops, a new one; constants that stay as they are share their memory.

    Args:
        program: of any sizes, symbolic or not, and any image dtype (as its ``image`` node says).
        compiled: for a compiler, instead of op by op (:class:`bcos_rt.graph.lowering.Lowering`).

    Raises:
        UnsupportedOpError: an op outside the fused ones reads a gate or a max-pool's choice, which have another form
            here.
    """
    low = Lowering(program, compiled)
    values: dict[Node, Node] = {}
    results: dict[Node, tuple[Node | None, ...]] = {}
    for node in program.graph.nodes:
        low.begin(node)
        if node.op == "placeholder":
            values[node] = _placeholder(low, program, node)
        elif node.op == "output":
            continue
        elif node.target is operator.getitem and node.args[0] in results:
            item = results[node.args[0]][node.args[1]]
            if item is not None or node.users:
                values[node] = item if item is not None else low.call(aten.new_empty.default, low.program.image, [0])
        elif (found := _lowering_of(node)) is not None:
            arguments = torch.fx.node.map_arg(bound_arguments(node), lambda n: values.get(n))
            made = found(low, arguments)
            if isinstance(made, tuple):
                results[node] = made
            else:
                values[node] = made
        else:
            values[node] = _copied(low, node, values)
    outputs = {name: values[node] for name, node in program.outputs.items()}
    _refuse_private(low, outputs.values())
    low.program.set_outputs(outputs)
    return low.program


def _placeholder(low: Lowering, program: Program, node: Node) -> Node:
    copy = low.builder.placeholder(str(node.target), node.meta["val"])
    copy.meta.update(node.meta)
    if node in program.constants:
        low.program.constants[copy] = program.constants[node]
        low.program.names[copy] = program.names[node]
    elif node is program.image:
        low.program.image = copy
    elif node is program.targets:
        low.program.targets = copy
    return copy


def _lowering_of(node: Node) -> Any:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "bcos_rt":
        return None
    return LOWERINGS.get(target._schema.name.removeprefix("bcos_rt::"))


def _copied(low: Lowering, node: Node, values: dict[Node, Node]) -> Node:
    """An ATen node as it is, but for views: lowered values may have other strides, so these become reshapes."""
    inputs = [values[n] for n in node.all_input_nodes]
    _refuse_private(low, inputs)
    image = low.program.image
    if image in inputs and image.meta["val"].dtype == torch.uint8 and node.target is not aten.sym_size.int:
        scaled = low.once(("scaled image",), lambda: _scaled_image(low))
        values = {n: scaled if values[n] is image else values[n] for n in node.all_input_nodes}
    copy = low.builder.graph.node_copy(node, lambda n: values[n])
    if node.target in _PADS and inputs[0] in low.encoded and _pads_with_zeros(node):
        part = low.encoded[inputs[0]]
        low.encoded[copy] = Encoded(low.call(node.target, part.channels, node.args[1]), part.mirrored)
    if copy.target in _VIEWS:
        copy.target = aten.reshape.default
    return copy


def _pads_with_zeros(node: Node) -> bool:
    """Spatial padding alone, with zeros (so that a map of squares is the padded map)."""
    a = bound_arguments(node)
    return len(a["pad"]) == 4 and not a["value"] and a.get("mode", "constant") == "constant"


def _scaled_image(low: Lowering) -> Node:
    image = low.call(aten._to_copy.default, low.program.image, dtype=torch.float32)
    return low.call(aten.div.Scalar, image, 255.0)


def _refuse_private(low: Lowering, nodes: Any) -> None:
    for node in nodes:
        if node in low.gates or node in low.flat_positions:
            raise low.fail("it reads a gate or a max-pool's choice, which only fused ops do")


# --- layers ----------------------------------------------------------------------------------------------------------


def _bias(low: Lowering, x: Node, bias: Node | None) -> tuple[Node | None, Node | None]:
    """(bias for the convolution to add, bias for the epilogue): in 16-bit storage it is added after, unrounded."""
    if bias is None or x.meta["val"].dtype != low.wide_dtype(x):
        return None, bias
    dtype = x.meta["val"].dtype
    return low.derived(bias, str(dtype), lambda call, v: call(aten._to_copy.default, v, dtype=dtype)), None


@lowering("conv2d_fused")
def conv2d_fused(low: Lowering, a: Mapping[str, Any]) -> Results:
    """``y = act(z (|z| / n)^(B-1) scale + shift + residual)``."""
    x, weight, groups = a["x"], a["weight"], a["groups"]
    window = (list(a["stride"]), list(a["padding"]), list(a["dilation"]))
    early, late = _bias(low, x, a["bias"])
    z = low.call(aten.conv2d.default, *_first_layer(low, x, weight), early, *window, groups)
    inverse = None
    if a["b"] != 1:
        filters, kernel = weight.meta["val"].shape[0], list(weight.meta["val"].shape[2:])
        inverse = low.per_filter(low.inverse_patch_norm(x, kernel, *window, groups, a["eps"]), filters)
    y, multiplier, gate = low.epilogue(z, inverse, a, late, x.meta["val"].dtype, True)
    depthwise = groups == x.meta["val"].shape[1] and groups > 1
    squares = low.square_sum(y, 1 if depthwise else groups) if a["want_squares"] else None
    return y, multiplier, gate, squares


def _first_layer(low: Lowering, x: Node, weight: Node) -> tuple[Node, Node]:
    """Input and weight of a convolution; of an encoded image only the channels that are needed."""
    part = low.encoded.get(x)
    if part is None:
        return x, weight
    channels = part.channels.meta["val"].shape[1]
    if part.mirrored:
        fewer = low.rearranged(weight, "of u in [u, -u]", lambda w: w[:, :channels] - w[:, channels : 2 * channels])
    else:
        fewer = low.rearranged(weight, f"first {channels}", lambda w: w[:, :channels].contiguous())
    return (x, weight) if fewer is None else (part.channels, fewer)


@lowering("linear_fused")
def linear_fused(low: Lowering, a: Mapping[str, Any]) -> Results:
    """The same for rows [..., C]."""
    x, weight = a["x"], a["weight"]
    early, late = _bias(low, x, a["bias"])
    z = low.call(aten.linear.default, x, weight, early)
    inverse = None if a["b"] == 1 else low.inverse_row_norm(x, a["eps"])
    y, multiplier, gate = low.epilogue(z, inverse, a, late, x.meta["val"].dtype, False)
    squares = None
    if a["want_squares"]:
        wide = low.wide(y)
        squares = low.call(aten.sum.dim_IntList, low.call(aten.mul.Tensor, wide, wide), [-1], True)
    return y, multiplier, gate, squares

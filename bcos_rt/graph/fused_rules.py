"""The adjoints of the fused ops, in fused ops: what :mod:`bcos_rt.graph.rules` is for ATen.

A layer's rule asks its forward op for the multiplier ``m = (|z| / n)^(B-1) scale gate`` (so only layers on the path of
an explanation save one), puts the epilogue ``G -> (G m, G gate)`` behind the adjoint that arrives, and sends
``conv^T(G m)`` to its input and ``G gate`` to its residual. The passes of :mod:`bcos_rt.graph.fuse` then move every
epilogue into the op that wrote ``G``. Factors belong to N images, adjoints to N * K rows: no factor is repeated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from bcos_rt.graph.adjoint import Adjoint
from bcos_rt.graph.capture import bound_arguments
from bcos_rt.graph.fuse import result
from bcos_rt.graph.rules import Rule

__all__ = ["FUSED_RULES"]

aten = torch.ops.aten
bcos = torch.ops.bcos_rt

FUSED_RULES: dict[Any, Rule] = {}


def _fused_rule(target: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        FUSED_RULES[target] = function
        return function

    return register


def _channel_constant(adjoint: Adjoint, grad: Node, vector: Any, channel_dim: int) -> None:
    """``<grad, c>`` of a constant per channel to the residual."""
    for _ in range(grad.meta["val"].ndim - 2 if channel_dim == 1 else 0):
        vector = adjoint.call(aten.unsqueeze.default, vector, -1)
    adjoint.add_residual(grad, vector)


def _epilogue(adjoint: Adjoint, node: Node, grad: Node, wants: tuple[int, int], channel_dim: int) -> Node:
    """Send ``G gate`` to shift and residual; returns what goes into the transposed layer, ``G m``."""
    a = bound_arguments(node)
    gated, plain = a["activation"] != "none", a["b"] == 1 and a["scale"] is None
    aside = a["residual"] is not None or a["shift"] is not None
    multiplier = gate = None
    if not plain:
        multiplier = result(adjoint.builder, node, 1, wants[0])
    if gated and (aside or plain):
        gate = result(adjoint.builder, node, 2, wants[1])
    if multiplier is None and gate is None:
        out = raw = grad  # a plain layer without activation passes its adjoint on
    else:
        want_raw = aside or multiplier is None
        both = adjoint.call(bcos.transposed_epilogue.default, grad, multiplier, None, gate, want_raw)
        raw = adjoint.call(operator.getitem, both, 1)
        out = adjoint.call(operator.getitem, both, 0) if multiplier is not None else raw
    if a["residual"] is not None:
        adjoint.send(a["residual"], raw)
    if a["shift"] is not None:
        _channel_constant(adjoint, raw, a["shift"], channel_dim)
    if a["bias"] is not None:
        _channel_constant(adjoint, out, a["bias"], channel_dim)
    return out


@_fused_rule(bcos.conv2d_fused.default)
def conv2d_fused(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``conv^T(G m)``."""
    a = bound_arguments(node)
    out = _epilogue(adjoint, node, grad, (14, 15), 1)
    size = [int(s) for s in a["x"].meta["val"].shape[2:]]
    back = adjoint.call(
        bcos.conv2d_transposed.default, out, a["weight"], size, list(a["stride"]), list(a["padding"]),
        list(a["dilation"]), a["groups"], None, None, None, False,
    )  # fmt: skip
    adjoint.send(a["x"], adjoint.call(operator.getitem, back, 0))


@_fused_rule(bcos.linear_fused.default)
def linear_fused(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``(G m) W``."""
    a = bound_arguments(node)
    out = _epilogue(adjoint, node, grad, (10, 11), -1)
    back = adjoint.call(bcos.linear_transposed.default, out, a["weight"], None, None, None, False)
    adjoint.send(a["x"], adjoint.call(operator.getitem, back, 0))


@_fused_rule(bcos.layer_norm.default)
def layer_norm(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``rstd (G w - mean(G w))``: the variance is constant."""
    a = bound_arguments(node)
    if a["bias"] is not None:
        adjoint.add_residual(grad, a["bias"])
    rstd = result(adjoint.builder, node, 1)
    adjoint.send(a["x"], adjoint.call(bcos.layer_norm_transposed.default, grad, rstd, a["weight"], None))


@_fused_rule(bcos.scale_act.default)
def scale_act(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``G s gate``, the gate worked out from the input again."""
    a = bound_arguments(node)
    x, scale, shift = a["x"], a["scale"], a["shift"]
    if node.meta.get("no_shift"):
        args = (grad, x, scale, shift, a["activation"], None)
        adjoint.send(x, adjoint.call(bcos.scale_act_transposed.default, *args))
        return
    # <G gate, t> needs the gated adjoint without its slope: that of act(u) at u = s x + t.
    call = adjoint.call
    wide, one, zero = (
        _spatial(adjoint, scale),
        call(aten.ones_like.default, scale),
        call(aten.zeros_like.default, scale),
    )
    u = call(aten.add.Tensor, call(aten.mul.Tensor, x, wide), _spatial(adjoint, shift))
    raw = call(bcos.scale_act_transposed.default, grad, u, one, zero, a["activation"], None)
    _channel_constant(adjoint, raw, shift, 1)
    adjoint.send(x, call(aten.mul.Tensor, raw, wide))


def _spatial(adjoint: Adjoint, vector: Any) -> Node:
    return adjoint.call(aten.unsqueeze.default, adjoint.call(aten.unsqueeze.default, vector, -1), -1)


@_fused_rule(bcos.max_pool2d.default)
def max_pool2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each adjoint to the place that was picked."""
    a = bound_arguments(node)
    index = result(adjoint.builder, node, 1, 6)
    size = [int(s) for s in a["x"].meta["val"].shape[2:]]
    back = adjoint.call(
        bcos.max_pool2d_transposed.default, grad, index, size, list(a["kernel_size"]), list(a["stride"]),
        list(a["padding"]), list(a["dilation"]), None, None, None, False,
    )  # fmt: skip
    adjoint.send(a["x"], adjoint.call(operator.getitem, back, 0))


@_fused_rule(bcos.avg_pool2d.default)
def avg_pool2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each output hands its window an equal share."""
    a = bound_arguments(node)
    size = [int(s) for s in a["x"].meta["val"].shape[2:]]
    back = adjoint.call(
        bcos.avg_pool2d_transposed.default, grad, size, list(a["kernel_size"]), list(a["stride"]), list(a["padding"]),
        a["ceil_mode"], a["count_include_pad"], None, None, None, False,
    )  # fmt: skip
    adjoint.send(a["x"], adjoint.call(operator.getitem, back, 0))


@_fused_rule(bcos.encode_image.default)
def encode_image(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The adjoint of the *normalised* image, as it is: weights and residual are derived from it in one op."""
    adjoint.send(node.args[0], grad)

"""The rule table: for each ATen op, the argument it is (held) linear in and its transpose.

A rule ``(adjoint, node, grad)`` gets the adjoint of ``node``'s output and sends an adjoint to the argument that the op
is linear in, once every other image-dependent factor is held constant (B-cos networks, arXiv 2205.10268, section 3;
for normalisation, gates and attention arXiv 2306.10898 and 2411.00715):

* convolution, linear, pooling, shape ops: their plain transposes; max-pool: the element it picked;
* ReLU and its relatives: ``f(x) = g(x) * x`` with the gate ``g`` constant;
* normalisations: the variance constant, the centring linear;
* a product of two image-dependent values: the operand that comes out of a sigmoid, softmax, tanh, hard-sigmoid or
  reciprocal root (else: out of another activation) is the gate; a quotient is linear in its numerator;
* a constant summand (bias, mean, position embedding): ``<adjoint, constant>`` goes to the residual.

Extend it with::

    @bcos_rt.graph.rule(torch.ops.aten.my_op.default)
    def my_op(adjoint, node, grad):
        x = node.args[0]
        adjoint.send(x, adjoint.call(torch.ops.aten.mul.Tensor, grad, adjoint.saved(gate)))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from bcos_rt.graph.adjoint import Adjoint
from bcos_rt.graph.attention import attention_transposed
from bcos_rt.graph.capture import bound_arguments
from bcos_rt.graph.fuse import result
from bcos_rt.kernels.reference import output_padding

__all__ = ["RULES", "Rule", "rule"]

aten = torch.ops.aten
Rule = Callable[[Adjoint, Node, Node], None]

RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for one or more op overloads (a later registration replaces an earlier one)."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def _operands(node: Node) -> tuple[Any, Any]:
    """The two operands of a binary op."""
    left, right = node.args[:2]
    return left, right


# Linear layers -----------------------------------------------------------------------------------------------------


def _pair(value: Any) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return values * 2 if len(values) == 1 else values


def _conv_padding(adjoint: Adjoint, node: Node, padding: Any, kernel: list[int], dilation: list[int]) -> list[int]:
    if not isinstance(padding, str):
        return _pair(padding)
    if padding == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        raise adjoint.fail(node, "padding='same' with an even kernel pads unevenly; pad explicitly before it")
    return [t // 2 for t in total]


@rule(aten.conv2d.default, aten.conv2d.padding)
def conv2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``y = conv(x, w) + b``: the transposed convolution; ``<grad, b>`` to the residual."""
    a = bound_arguments(node)
    x, weight = a["input"], a["weight"]
    if adjoint.depends(weight):
        raise adjoint.fail(node, "its weights depend on the image")
    size, kernel = list(x.meta["val"].shape[2:]), list(weight.meta["val"].shape[2:])
    stride, dilation = _pair(a["stride"]), _pair(a["dilation"])
    padding = _conv_padding(adjoint, node, a["padding"], kernel, dilation)
    extra = output_padding(size, kernel, stride, padding, dilation)
    back = adjoint.call(aten.conv_transpose2d.input, grad, weight, None, stride, padding, extra, a["groups"], dilation)
    adjoint.send(x, back)
    if a["bias"] is not None:
        _channel_residual(adjoint, grad, a["bias"])


@rule(aten.conv_transpose2d.input)
def conv_transpose2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The transposed convolution's transpose is the convolution; ``<grad, b>`` to the residual."""
    a = bound_arguments(node)
    if adjoint.depends(a["weight"]):
        raise adjoint.fail(node, "its weights depend on the image")
    geometry = (_pair(a["stride"]), _pair(a["padding"]), _pair(a["dilation"]))
    back = adjoint.call(aten.conv2d.default, grad, a["weight"], None, *geometry, a["groups"])
    # An output padding as wide as the stride (allowed with a dilation) makes positions that nothing came from.
    for dim in (2, 3):
        back = adjoint.call(aten.slice.Tensor, back, dim, 0, a["input"].meta["val"].shape[dim])
    adjoint.send(a["input"], back)
    if a["bias"] is not None:
        _channel_residual(adjoint, grad, a["bias"])


def _channel_residual(adjoint: Adjoint, grad: Node, constant: Node) -> None:
    """``<grad, c>`` for a per-channel constant of a [N, C, ...] value."""
    trailing = grad.meta["val"].ndim - 2
    for _ in range(trailing):
        constant = adjoint.call(aten.unsqueeze.default, constant, -1)
    adjoint.add_residual(grad, constant)


@rule(aten.linear.default)
def linear(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``y = x w^T + b``: ``grad w``, without the columns of ``grad`` that are zero (queries and keys of attention)."""
    a = bound_arguments(node)
    weight, bias = a["weight"], a["bias"]
    if adjoint.depends(weight):
        raise adjoint.fail(node, "its weights depend on the image")
    filled = _filled_columns(grad)
    if filled is not None:
        begin, end = filled
        # Not padded in the first place, where the padding is all that makes zeros.
        pads = [begin, int(grad.meta["val"].shape[-1]) - end]
        padded = grad.target is aten.constant_pad_nd.default and grad.args[1] == pads
        grad = grad.args[0] if padded else adjoint.call(aten.slice.Tensor, grad, -1, begin, end)  # type: ignore[assignment]
        weight = adjoint.call(aten.slice.Tensor, weight, 0, begin, end)
        bias = None if bias is None else adjoint.call(aten.slice.Tensor, bias, 0, begin, end)
    adjoint.send(a["input"], adjoint.call(aten.matmul.default, grad, weight))
    if bias is not None:
        adjoint.add_residual(grad, bias)


# What only moves numbers, or puts zeros beside them.
_MOVING = {
    aten.constant_pad_nd.default, aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int,
    aten.clone.default, aten.unsqueeze.default, aten.squeeze.dim,
}  # fmt: skip


def _for_one(size: Any) -> int:
    """A size where there is one image and one class."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _filled_columns(grad: Node) -> tuple[int, int] | None:
    """The columns [begin, end) of the last dimension outside of which an adjoint is zero by its form; None: no such.

    Of a packed projection only the values' part gets an adjoint; the parts of queries and keys are zeros.
    """
    width = int(grad.meta["val"].shape[-1])
    chain: list[Node] = []
    source = grad
    while source.target in _MOVING:
        chain.append(source)
        source = source.args[0]  # type: ignore[assignment]
    if not any(step.target is aten.constant_pad_nd.default for step in chain):
        return None
    # The same moves on ones, for one class of one image: a size of the graph's own is the batch's.
    filled = torch.ones([_for_one(size) for size in source.meta["val"].shape])
    for step in reversed(chain):
        arguments = torch.fx.node.map_arg(step.args[1:], lambda n: -1)
        target: Any = step.target
        filled = target(filled, *arguments, **step.kwargs)
    columns = filled.reshape(-1, width).any(0).nonzero()
    if len(columns) == 0:
        return None
    begin, end = int(columns.min()), int(columns.max()) + 1
    return None if end - begin == width else (begin, end)


@rule(aten.addmm.default)
def addmm(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``c + x w`` with constant ``w``."""
    a = bound_arguments(node)
    if adjoint.depends(a["mat2"]) or a["alpha"] != 1 or a["beta"] != 1:
        raise adjoint.fail(node, "only c + x w with constant w and unit factors is linear in x")
    adjoint.send(a["mat1"], adjoint.call(aten.matmul.default, grad, adjoint.call(aten.t.default, a["mat2"])))
    adjoint.send_broadcast(a["self"], grad)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``a b``: linear in the operand that is no gate (attention: softmax(q k^T) is the gate, values are linear)."""
    left, right = _operands(node)
    shapes = [left.meta["val"].ndim, right.meta["val"].ndim]
    if min(shapes) < 2:
        raise adjoint.fail(node, "a product with a vector has no rule; use a matrix")
    if adjoint.depends(left) and adjoint.depends(right):
        gate = _gate(adjoint, node, left, right)
        linear_in = right if gate is left else left
    else:
        linear_in = left if adjoint.depends(left) else right
    transposed = adjoint.call(aten.transpose.int, adjoint.saved(right if linear_in is left else left), -2, -1)
    if linear_in is left:
        adjoint.send_broadcast(left, adjoint.call(aten.matmul.default, grad, transposed))
    else:
        adjoint.send_broadcast(right, adjoint.call(aten.matmul.default, transposed, grad))


@rule(torch.ops.bcos_rt.attention.default)
def attention(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``softmax(s q k^T + mask) v``: linear in the values; the softmax is made again from q, k and its log-sum-exp."""
    value = node.args[2]
    if not adjoint.depends(value):
        raise adjoint.fail(node, "its values do not depend on the image, so it is linear in nothing that does")
    adjoint.send(value, attention_transposed(adjoint.builder, node, grad, result(adjoint.builder, node, 1)))


# Sums, products, quotients -----------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.add.Scalar)
def add(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``a + alpha b``."""
    a = bound_arguments(node)
    adjoint.send_broadcast(a["self"], grad)
    other = grad if a["alpha"] == 1 else adjoint.call(aten.mul.Scalar, grad, a["alpha"])
    adjoint.send_broadcast(a["other"], other)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``a - alpha b``."""
    a = bound_arguments(node)
    adjoint.send_broadcast(a["self"], grad)
    adjoint.send_broadcast(a["other"], adjoint.call(aten.mul.Scalar, grad, -a["alpha"]))


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``b - alpha a``."""
    a = bound_arguments(node)
    adjoint.send_broadcast(a["self"], adjoint.call(aten.mul.Scalar, grad, -a["alpha"]))
    adjoint.send_broadcast(a["other"], grad)


@rule(aten.neg.default)
def neg(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``-x``."""
    adjoint.send(node.args[0], adjoint.call(aten.neg.default, grad))


# How strongly an op's output claims to be the gate of a product.
_BOUNDED = {
    aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int, aten._softmax.default, aten.tanh.default,
    aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, torch.ops.bcos_rt.dynamic_scale.default,
    torch.ops.bcos_rt.patch_norm.default, torch.ops.bcos_rt.row_norm.default, aten.linalg_vector_norm.default,
}  # fmt: skip
_ACTIVATIONS = {
    aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.gelu.default,
    aten.silu.default, aten.hardswish.default, aten.leaky_relu.default, aten.elu.default, aten.relu6.default,
    aten.softplus.default, aten.exp.default,
}  # fmt: skip
_TRANSPARENT = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.transpose.int,
    aten.clone.default, aten._to_copy.default, aten.slice.Tensor, aten.select.int, aten.mean.dim, aten.alias.default,
    aten.dropout.default, aten.contiguous.default, aten.flatten.using_ints, aten.expand_as.default, aten.to.dtype,
}  # fmt: skip
_AFFINE = {
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.mul.Scalar, aten.div.Scalar,
    aten.add.Scalar, aten.sub.Scalar,
}  # fmt: skip


def _gate_rank(adjoint: Adjoint, node: Node) -> int:
    """2: comes out of a bounded gate op; 1: out of another activation; 0: neither. Looks through shape ops."""
    while True:
        if node.target in _BOUNDED:
            return 2
        if node.target in _ACTIVATIONS:
            return 1
        inputs = [n for n in node.all_input_nodes if adjoint.depends(n)]
        # A quotient of two such values is what its numerator is (a norm over the mean of norms).
        quotient = node.target is aten.div.Tensor and len(inputs) == 2 and inputs[0] is node.args[0]
        if (len(inputs) != 1 and not quotient) or node.target not in _TRANSPARENT | _AFFINE:
            return 0
        node = inputs[0]


def _gate(adjoint: Adjoint, node: Node, left: Node, right: Node) -> Node:
    ranks = (_gate_rank(adjoint, left), _gate_rank(adjoint, right))
    if left is right or ranks[0] == ranks[1]:
        raise adjoint.fail(
            node,
            "a product of two image-dependent values of which neither, or both, come out of a gate (sigmoid, softmax, "
            "tanh, ...): it is not clear in which one it is linear",
        )
    return left if ranks[0] > ranks[1] else right


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``a b``: times the constant, or times the gate where both depend on the image."""
    left, right = _operands(node)
    if adjoint.depends(left) and adjoint.depends(right):
        gate = _gate(adjoint, node, left, right)
        left, right = (right, gate) if gate is left else (left, gate)
    elif adjoint.depends(right):
        left, right = right, left
    if isinstance(right, Node):
        adjoint.send_broadcast(left, adjoint.call(aten.mul.Tensor, grad, adjoint.saved(right)))
    else:
        adjoint.send_broadcast(left, adjoint.call(aten.mul.Scalar, grad, right))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``a / b``: linear in the numerator."""
    numerator, denominator = _operands(node)
    if not adjoint.depends(numerator):
        raise adjoint.fail(node, "a constant divided by an image-dependent value is not linear in it")
    if isinstance(denominator, Node):
        adjoint.send_broadcast(numerator, adjoint.call(aten.div.Tensor, grad, adjoint.saved(denominator)))
    else:
        adjoint.send_broadcast(numerator, adjoint.call(aten.div.Scalar, grad, denominator))


# Activations: f(x) = gate(x) * x -----------------------------------------------------------------------------------


def _send_gated(adjoint: Adjoint, x: Any, grad: Node, gate: Node) -> None:
    adjoint.send(x, adjoint.builder.call_like(grad, aten.mul.Tensor, grad, adjoint.saved(gate)))


def _as_number(adjoint: Adjoint, mask: Node, like: Node) -> Node:
    return adjoint.call(aten._to_copy.default, mask, dtype=like.meta["val"].dtype)


@rule(aten.relu.default)
def relu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Gate ``1 if x > 0 else 0``, read off the output so that the input need not be kept."""
    _send_gated(adjoint, node.args[0], grad, _as_number(adjoint, adjoint.call(aten.gt.Scalar, node, 0), node))


def _ratio(adjoint: Adjoint, node: Node, at_zero: float) -> Node:
    """Gate ``f(x) / x``, and its given value at 0."""
    x = node.args[0]
    zero = adjoint.call(aten.eq.Scalar, x, 0)
    safe = adjoint.call(aten.masked_fill.Scalar, x, zero, 1.0)
    return adjoint.call(aten.masked_fill.Scalar, adjoint.call(aten.div.Tensor, node, safe), zero, at_zero)


@rule(aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default)
def clamp(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``clamp(x, lo, hi) / x``, at 0: 0 where lo = 0 (ReLU6), else 1. Needs lo <= 0 <= hi, so that f(0) = 0."""
    a = bound_arguments(node) if node.target is not aten.relu6.default else {"min_val": 0, "max_val": 6}
    low = a.get("min_val", a.get("min"))
    high = a.get("max_val", a.get("max"))
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if isinstance(low, Node) or isinstance(high, Node) or not low <= 0 <= high:
        raise adjoint.fail(node, f"clamp to [{low}, {high}] does not map 0 to 0, so it is no gate times its input")
    x = node.args[0]
    if low == 0:
        # Nothing divides by 0, and where x <= 0 the quotient is 0 by itself.
        positive = adjoint.call(aten.clamp_min.default, x, torch.finfo(node.meta["val"].dtype).tiny)
        gate = adjoint.call(aten.div.Tensor, node, positive)
    else:
        gate = _ratio(adjoint, node, 1.0)
    _send_gated(adjoint, x, grad, gate)


@rule(aten.elu.default, aten.celu.default, aten.selu.default, aten.tanh.default)
def elu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``f(x) / x``, at 0 its slope there."""
    slope = 1.0507009873554805 if node.target is aten.selu.default else bound_arguments(node).get("scale", 1.0)
    _send_gated(adjoint, node.args[0], grad, _ratio(adjoint, node, float(slope)))


@rule(aten.leaky_relu.default)
def leaky_relu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Gate ``1 if x > 0 else slope``."""
    a = bound_arguments(node)
    slope = float(a["negative_slope"])
    mask = _as_number(adjoint, adjoint.call(aten.gt.Scalar, a["self"], 0), node)
    gate = adjoint.call(aten.add.Scalar, adjoint.call(aten.mul.Scalar, mask, 1 - slope), slope)
    _send_gated(adjoint, a["self"], grad, gate)


@rule(aten.rrelu.default)
def rrelu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """In evaluation mode a LeakyReLU with the mean of the two slopes."""
    a = bound_arguments(node)
    if a["training"]:
        raise adjoint.fail(node, "its slopes are random; explain in evaluation mode")
    _send_gated(adjoint, a["self"], grad, _ratio(adjoint, node, (float(a["lower"]) + float(a["upper"])) / 2))


@rule(aten.glu.default)
def glu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``a sigmoid(b)`` of the two halves: linear in ``a``, the sigmoid is the gate."""
    a = bound_arguments(node)
    x = a["self"]
    ndim = x.meta["val"].ndim
    dim = a["dim"] % ndim
    half = x.meta["val"].shape[dim] // 2
    gate = adjoint.call(aten.sigmoid.default, adjoint.call(aten.slice.Tensor, x, dim, half, 2 * half))
    linear_half = adjoint.call(aten.mul.Tensor, grad, adjoint.saved(gate))
    adjoint.send(x, _pad_back(adjoint, linear_half, ndim, dim, 0, half))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def where(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each operand where it was picked; the condition is held constant."""
    condition, left, right = node.args
    mask = adjoint.saved(_as_number(adjoint, condition, node))  # type: ignore[arg-type]
    other = adjoint.call(aten.rsub.Scalar, mask, 1.0)
    for operand, picked in ((left, mask), (right, other)):
        adjoint.send_broadcast(operand, adjoint.call(aten.mul.Tensor, grad, picked))


@rule(aten.masked_fill.Scalar)
def masked_fill(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """What is not filled passes; the filling goes to the residual."""
    x, condition, value = node.args
    mask = adjoint.saved(_as_number(adjoint, condition, node))  # type: ignore[arg-type]
    filled = adjoint.call(aten.mul.Tensor, grad, mask)
    adjoint.add_residual(filled, value)
    adjoint.send_broadcast(x, adjoint.call(aten.sub.Tensor, grad, filled))


@rule(aten.maximum.default, aten.max.other, aten.minimum.default, aten.min.other)
def maximum(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Linear in the operand that was picked; of two equal ones in half of each."""
    left, right = _operands(node)
    picked = [adjoint.call(aten.eq.Tensor, node, operand) for operand in (left, right)]
    masks = [_as_number(adjoint, mask, node) for mask in picked]
    count = adjoint.call(aten.add.Tensor, *masks)
    for operand, mask in zip((left, right), masks, strict=True):
        share = adjoint.saved(adjoint.call(aten.div.Tensor, mask, count))
        adjoint.send_broadcast(operand, adjoint.call(aten.mul.Tensor, grad, share))


@rule(aten.gelu.default)
def gelu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``x Phi(x)``: the gate is ``Phi(x)`` (or its tanh approximation)."""
    a = bound_arguments(node)
    x, call = a["self"], adjoint.call
    if a["approximate"] == "tanh":
        cube = call(aten.mul.Tensor, call(aten.mul.Tensor, x, x), x)
        inner = call(aten.add.Tensor, x, call(aten.mul.Scalar, cube, 0.044715))
        phi = call(aten.tanh.default, call(aten.mul.Scalar, inner, math.sqrt(2 / math.pi)))
    else:
        phi = call(aten.erf.default, call(aten.mul.Scalar, x, 1 / math.sqrt(2)))
    _send_gated(adjoint, x, grad, call(aten.add.Scalar, call(aten.mul.Scalar, phi, 0.5), 0.5))


@rule(aten.silu.default)
def silu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``x sigmoid(x)``: the gate is the sigmoid."""
    _send_gated(adjoint, node.args[0], grad, adjoint.call(aten.sigmoid.default, node.args[0]))


@rule(aten.hardswish.default)
def hardswish(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``x clamp(x + 3, 0, 6) / 6``: the gate is the hard sigmoid."""
    shifted = adjoint.call(aten.add.Scalar, node.args[0], 3.0)
    gate = adjoint.call(aten.div.Scalar, adjoint.call(aten.clamp.default, shifted, 0.0, 6.0), 6.0)
    _send_gated(adjoint, node.args[0], grad, gate)


@rule(aten.mish.default)
def mish(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``x tanh(softplus(x))``."""
    _send_gated(
        adjoint, node.args[0], grad, adjoint.call(aten.tanh.default, adjoint.call(aten.softplus.default, node.args[0]))
    )


@rule(aten.prelu.default)
def prelu(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Gate ``1 if x > 0 else w_c``."""
    x, weight = _operands(node)
    for _ in range(x.meta["val"].ndim - 2):
        weight = adjoint.call(aten.unsqueeze.default, weight, -1)
    mask = _as_number(adjoint, adjoint.call(aten.gt.Scalar, x, 0), node)
    slope = adjoint.call(aten.mul.Tensor, adjoint.call(aten.rsub.Scalar, mask, 1.0), weight)
    _send_gated(adjoint, x, grad, adjoint.call(aten.add.Tensor, mask, slope))


# Normalisation -----------------------------------------------------------------------------------------------------


@rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def batch_norm(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Evaluation-mode BatchNorm is affine: ``x s + t``, ``s = w / sqrt(var + eps)``, ``t = b - mean s``."""
    a = bound_arguments(node)
    if a.get("training"):
        raise adjoint.fail(
            node, "BatchNorm without running statistics uses the batch's: it is no function of one image"
        )
    call = adjoint.call
    scale = call(aten.rsqrt.default, call(aten.add.Scalar, a["running_var"], a["eps"]))
    if a["weight"] is not None:
        scale = call(aten.mul.Tensor, scale, a["weight"])
    shift = call(aten.neg.default, call(aten.mul.Tensor, a["running_mean"], scale))
    if a["bias"] is not None:
        shift = call(aten.add.Tensor, shift, a["bias"])
    _channel_residual(adjoint, grad, shift)
    for _ in range(grad.meta["val"].ndim - 2):
        scale = call(aten.unsqueeze.default, scale, -1)
    adjoint.send(a["input"], call(aten.mul.Tensor, grad, scale))


def _centred_norm(adjoint: Adjoint, x: Node, grad: Node, dims: list[int], eps: float) -> Node:
    """Transpose of ``(x - mean(x)) / sqrt(var(x) + eps)`` with the root constant: centre the adjoint, then scale."""
    call = adjoint.call
    var = call(aten.var.correction, x, dims, correction=0, keepdim=True)
    rstd = call(aten.rsqrt.default, call(aten.add.Scalar, var, eps))
    centred = call(aten.sub.Tensor, grad, call(aten.mean.dim, grad, dims, True))
    return call(aten.mul.Tensor, centred, adjoint.saved(rstd))


@rule(aten.layer_norm.default)
def layer_norm(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """LayerNorm with its variance constant."""
    a = bound_arguments(node)
    if a["bias"] is not None:
        adjoint.add_residual(grad, a["bias"])
    if a["weight"] is not None:
        grad = adjoint.call(aten.mul.Tensor, grad, a["weight"])
    dims = [-i for i in range(len(a["normalized_shape"]), 0, -1)]
    adjoint.send(a["input"], _centred_norm(adjoint, a["input"], grad, dims, a["eps"]))


@rule(aten.group_norm.default)
def group_norm(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """GroupNorm with its variance constant."""
    a = bound_arguments(node)
    _grouped_norm(adjoint, a, grad, a["num_groups"])


@rule(aten.instance_norm.default)
def instance_norm(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """InstanceNorm: GroupNorm with a channel a group; with running statistics BatchNorm."""
    a = bound_arguments(node)
    if a["use_input_stats"]:
        _grouped_norm(adjoint, a, grad, int(a["input"].meta["val"].shape[1]))
    else:
        batch_norm(adjoint, node, grad)


def _grouped_norm(adjoint: Adjoint, a: dict[str, Any], grad: Node, groups: int) -> None:
    x = a["input"]
    if a["bias"] is not None:
        _channel_residual(adjoint, grad, a["bias"])
    if a["weight"] is not None:
        weight = a["weight"]
        for _ in range(x.meta["val"].ndim - 2):
            weight = adjoint.call(aten.unsqueeze.default, weight, -1)
        grad = adjoint.call(aten.mul.Tensor, grad, weight)
    shape = adjoint.shape(x)
    grouped = adjoint.reshape(x, [adjoint.batch, groups, -1])
    back = _centred_norm(adjoint, grouped, adjoint.reshape(grad, [adjoint.rows, groups, -1]), [2], a["eps"])
    adjoint.send(x, adjoint.reshape(back, shape))


@rule(aten.rms_norm.default)
def rms_norm(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """RMSNorm with its root mean square constant."""
    a = bound_arguments(node)
    call, x = adjoint.call, a["input"]
    if a["weight"] is not None:
        grad = call(aten.mul.Tensor, grad, a["weight"])
    eps = a["eps"] if a["eps"] is not None else torch.finfo(x.meta["val"].dtype).eps
    dims = [-i for i in range(len(a["normalized_shape"]), 0, -1)]
    mean_square = call(aten.mean.dim, call(aten.mul.Tensor, x, x), dims, True)
    _send_gated(adjoint, x, grad, call(aten.rsqrt.default, call(aten.add.Scalar, mean_square, eps)))


# Pooling -----------------------------------------------------------------------------------------------------------


@rule(aten.avg_pool2d.default)
def avg_pool2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each output hands its window an equal share."""
    a = bound_arguments(node)
    back = adjoint.call(
        aten.avg_pool2d_backward.default,
        grad,
        adjoint.saved(a["self"]),
        _pair(a["kernel_size"]),
        _pair(a["stride"] or a["kernel_size"]),
        _pair(a["padding"]),
        a["ceil_mode"],
        a["count_include_pad"],
        a["divisor_override"],
    )
    adjoint.send(a["self"], back)


def _adaptive_matrix(size: int, out: int) -> Tensor:
    """[out, size]: row i averages ``floor(i size / out) .. ceil((i + 1) size / out)``, as adaptive pooling does."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        start, stop = i * size // out, -((-(i + 1) * size) // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


@rule(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """``A_h x A_w^T`` with constant averaging matrices: ``A_h^T grad A_w``; a global pool spreads evenly."""
    x: Any = node.args[0]
    size, out = list(x.meta["val"].shape[-2:]), list(node.meta["val"].shape[-2:])
    if out == [1, 1]:
        share = adjoint.call(aten.div.Scalar, grad, float(size[0] * size[1]))
        adjoint.send(x, adjoint.call(aten.expand.default, share, adjoint.shape(x)))
        return
    if out == size:
        adjoint.send(x, grad)
        return
    rows = adjoint.constant(f"adaptive_{size[0]}_{out[0]}_transposed", _adaptive_matrix(size[0], out[0]).t())
    columns = adjoint.constant(f"adaptive_{size[1]}_{out[1]}", _adaptive_matrix(size[1], out[1]))
    adjoint.send(x, adjoint.call(aten.matmul.default, rows, adjoint.call(aten.matmul.default, grad, columns)))


@rule(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def max_pool2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Linear in the element that was picked."""
    a = bound_arguments(node)
    x = a["self"]
    window = (
        _pair(a["kernel_size"]),
        _pair(a["stride"] or a["kernel_size"]),
        _pair(a["padding"]),
        _pair(a["dilation"]),
        a["ceil_mode"],
    )
    pooled = adjoint.call(aten.max_pool2d_with_indices.default, x, *window)
    indices = adjoint.call(operator.getitem, pooled, 1)
    back = adjoint.call(
        aten.max_pool2d_with_indices_backward.default,
        grad,
        adjoint.saved(x),
        *window,
        adjoint.saved(indices),
    )
    adjoint.send(x, back)


@rule(aten.adaptive_max_pool2d.default)
def adaptive_max_pool2d(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Linear in the element that was picked."""
    x: Any = node.args[0]
    indices = adjoint.saved(adjoint.call(operator.getitem, node, 1))
    adjoint.send(x, adjoint.call(aten.adaptive_max_pool2d_backward.default, grad, adjoint.saved(x), indices))


@rule(
    aten.upsample_nearest2d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
)
def upsample(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Interpolation works on rows, then columns: ``A_h x A_w^T``, each matrix read off the op itself."""
    a = bound_arguments(node)
    x = a["input"]
    size, out = list(x.meta["val"].shape[2:]), list(node.meta["val"].shape[2:])
    matrices = []
    for i in range(2):
        options = {k: v for k, v in a.items() if k != "input"}
        if options["output_size"] is not None:
            options["output_size"] = [out[i], 1]
        if options["scale_factors"] is not None:
            options["scale_factors"] = [options["scale_factors"][i], 1.0]
        with _disable_current_modes():
            eye = torch.eye(size[i], dtype=torch.float64)[None, :, :, None]
            matrices.append(node.target(input=eye, **options)[0, :, :, 0])  # type: ignore[operator]
    name = f"{node.name}_{size[0]}x{size[1]}_to_{out[0]}x{out[1]}"
    rows = adjoint.constant(f"{name}_rows", matrices[0])
    columns = adjoint.constant(f"{name}_columns", matrices[1].t())
    adjoint.send(x, adjoint.call(aten.matmul.default, rows, adjoint.call(aten.matmul.default, grad, columns)))


# Reductions, shapes, slices ----------------------------------------------------------------------------------------


def _restore_dims(adjoint: Adjoint, node: Node, grad: Node, x: Node, dims: Any, keepdim: bool) -> Node:
    """Undo a reduction's shape: put reduced dimensions back as size 1, then expand."""
    ndim = x.meta["val"].ndim
    wanted = [d % ndim for d in dims] if dims else list(range(ndim))
    if any(isinstance(x.meta["val"].shape[d], torch.SymInt) for d in wanted):
        raise adjoint.fail(node, "reduces over the batch: it is no function of one image")
    if not keepdim:
        for d in sorted(wanted):
            grad = adjoint.call(aten.unsqueeze.default, grad, d)
    return adjoint.call(aten.expand.default, grad, adjoint.shape(x))


@rule(aten.mean.dim)
def mean(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each element gets ``1 / count``."""
    a = bound_arguments(node)
    x = a["self"]
    spread = _restore_dims(adjoint, node, grad, x, a["dim"], a["keepdim"])
    shape = x.meta["val"].shape
    # Reduced dimensions are static here; going through numel() would pin the batch.
    count = math.prod(int(shape[d]) for d in (a["dim"] or range(len(shape))))
    adjoint.send(x, adjoint.call(aten.div.Scalar, spread, float(count)))


@rule(aten.sum.dim_IntList)
def sum_(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each element gets the adjoint of its sum."""
    a = bound_arguments(node)
    adjoint.send(a["self"], _restore_dims(adjoint, node, grad, a["self"], a["dim"], a["keepdim"]))


@rule(aten.amax.default, aten.amin.default)
def amax(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Linear in the elements that are the largest; equal ones share."""
    a = bound_arguments(node)
    x: Any = a["self"]
    dims = a["dim"] or list(range(x.meta["val"].ndim))
    peak = adjoint.call(node.target, x, dims, True)  # type: ignore[arg-type]
    mask = _as_number(adjoint, adjoint.call(aten.eq.Tensor, x, peak), node)
    share = adjoint.call(aten.div.Tensor, mask, adjoint.call(aten.sum.dim_IntList, mask, dims, True))
    _send_gated(adjoint, x, _restore_dims(adjoint, node, grad, x, dims, a["keepdim"]), share)


@rule(aten.max.dim, aten.min.dim)
def max_dim(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Linear in the element that was picked."""
    a = bound_arguments(node)
    x: Any = a["self"]
    dim = a["dim"] % x.meta["val"].ndim
    size = x.meta["val"].shape[dim]
    index = adjoint.call(operator.getitem, node, 1)
    if not a["keepdim"]:
        index = adjoint.call(aten.unsqueeze.default, index, dim)
    places = adjoint.call(aten.arange.default, size, device=x.meta["val"].device, pin_memory=False)
    for _ in range(x.meta["val"].ndim - 1 - dim):
        places = adjoint.call(aten.unsqueeze.default, places, -1)
    picked = _as_number(adjoint, adjoint.call(aten.eq.Tensor, index, places), x)
    _send_gated(adjoint, x, _restore_dims(adjoint, node, grad, x, [dim], a["keepdim"]), picked)


@rule(aten.flip.default)
def flip(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The flip back."""
    adjoint.send(node.args[0], adjoint.call(aten.flip.default, grad, node.args[1]))


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The inverse permutation."""
    adjoint.send(node.args[0], adjoint.call(aten.pixel_unshuffle.default, grad, node.args[1]))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The inverse permutation."""
    adjoint.send(node.args[0], adjoint.call(aten.pixel_shuffle.default, grad, node.args[1]))


@rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The inverse permutation: channels as [C / groups, groups], transposed."""
    x, groups = _operands(node)
    shape = adjoint.shape(x)
    wide = adjoint.reshape(grad, [shape[0], shape[1] // groups, groups, *shape[2:]])
    adjoint.send(x, adjoint.reshape(adjoint.call(aten.transpose.int, wide, 1, 2), shape))


@rule(aten.repeat.default, aten.repeat_interleave.self_int)
def repeat(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The sum over the copies."""
    x: Any = node.args[0]
    ndim = x.meta["val"].ndim
    interleaved = node.target is aten.repeat_interleave.self_int
    if interleaved:
        a = bound_arguments(node)
        if a["dim"] is None:
            raise adjoint.fail(node, "repeats over the batch")
        repeats = [a["repeats"] if d == a["dim"] % ndim else 1 for d in range(ndim)]
    else:
        repeats = list(bound_arguments(node)["repeats"])
    if len(repeats) != ndim or any(
        r != 1 and isinstance(s, torch.SymInt) for r, s in zip(repeats, x.meta["val"].shape, strict=True)
    ):
        raise adjoint.fail(node, "repeats over the batch or along a new dimension")
    shape = adjoint.shape(x)
    for d in [d for d, r in enumerate(repeats) if r != 1]:
        now = [
            *shape[: d + 1],
            *(s if r == 1 else s * r for s, r in zip(shape[d + 1 :], repeats[d + 1 :], strict=True)),
        ]
        pair = [shape[d], repeats[d]] if interleaved else [repeats[d], shape[d]]
        wide = adjoint.reshape(grad, [*now[:d], *pair, *now[d + 1 :]])
        grad = adjoint.call(aten.sum.dim_IntList, wide, [d + 1 if interleaved else d])
    adjoint.send(x, grad)


@rule(aten.index_select.default, aten.index.Tensor)
def index(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each adjoint is added where its element was taken; the indices are held constant."""
    x: Any = node.args[0]
    if node.target is aten.index_select.default:
        indices: list[Any] = [None] * (int(node.args[1]) % x.meta["val"].ndim) + [node.args[2]]  # type: ignore[arg-type]
    else:
        indices = list(node.args[1])  # type: ignore[arg-type]
    if any(adjoint.depends(i) for i in indices):
        raise adjoint.fail(node, "its indices depend on the image")
    if indices[0] is not None:
        raise adjoint.fail(node, "indexes the batch")
    zeros = adjoint.call(aten.zeros_like.default, adjoint.saved(x))
    adjoint.send(x, adjoint.call(aten.index_put.default, zeros, indices, grad, True))


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
)
def reshape(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The same numbers in another shape."""
    x: Any = node.args[0]
    adjoint.send(x, adjoint.reshape(grad, adjoint.shape(x)))


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.lift_fresh_copy.default,
)
def identity(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The same tensor (dropout: in evaluation mode)."""
    if node.target in (aten.dropout.default, aten.feature_dropout.default) and node.args[2]:
        raise adjoint.fail(node, "dropout is active; explain in evaluation mode")
    adjoint.send(node.args[0], grad)


@rule(aten._to_copy.default, aten.to.dtype)
def cast(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """A cast, back to the input's dtype."""
    x: Any = node.args[0]
    adjoint.send(x, adjoint.call(aten._to_copy.default, grad, dtype=x.meta["val"].dtype))


@rule(aten.permute.default)
def permute(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The inverse permutation."""
    a = bound_arguments(node)
    order = [d % len(a["dims"]) for d in a["dims"]]
    adjoint.send(a["self"], adjoint.call(aten.permute.default, grad, [order.index(i) for i in range(len(order))]))


@rule(aten.transpose.int)
def transpose(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The same swap."""
    adjoint.send(node.args[0], adjoint.call(aten.transpose.int, grad, *node.args[1:]))


@rule(aten.t.default)
def t(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The same swap."""
    adjoint.send(node.args[0], adjoint.call(aten.t.default, grad))


@rule(aten.expand.default)
def expand(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The sum over what was repeated."""
    adjoint.send_broadcast(node.args[0], grad)


@rule(aten.cat.default)
def cat(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each part gets its slice."""
    a = bound_arguments(node)
    dim = a["dim"] % node.meta["val"].ndim
    start = 0
    for part in a["tensors"]:
        size = part.meta["val"].shape[dim]
        if isinstance(size, torch.SymInt):
            raise adjoint.fail(node, "concatenates along the batch")
        adjoint.send(part, adjoint.call(aten.slice.Tensor, grad, dim, start, start + size))
        start += size


@rule(aten.stack.default)
def stack(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each part gets its layer."""
    a = bound_arguments(node)
    dim = a["dim"] % node.meta["val"].ndim
    for i, part in enumerate(a["tensors"]):
        adjoint.send(part, adjoint.call(aten.select.int, grad, dim, i))


def _pad_back(adjoint: Adjoint, grad: Node, ndim: int, dim: int, before: int, after: int) -> Node:
    """``grad`` with zeros put back before and after it along one dimension."""
    if before == 0 and after == 0:
        return grad
    pads = [0, 0] * (ndim - dim)
    pads[-2:] = [before, after]
    return adjoint.call(aten.constant_pad_nd.default, grad, pads, 0.0)


@rule(aten.slice.Tensor)
def slice_(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Zeros where nothing was taken."""
    a = bound_arguments(node)
    x = a["self"]
    ndim = x.meta["val"].ndim
    dim = a["dim"] % ndim
    size = x.meta["val"].shape[dim]
    if isinstance(size, torch.SymInt):
        if node.meta["val"].shape[dim] == size:
            adjoint.send(x, grad)
            return
        raise adjoint.fail(node, "slices the batch")
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(size)
    if step != 1:
        taken = len(range(start, stop, step))
        # x[start::step]: spread the adjoint over a [taken, step] grid, then cut and pad to size.
        shape = adjoint.shape(x)
        grid = adjoint.call(aten.unsqueeze.default, grad, dim + 1)
        grid = _pad_back(adjoint, grid, ndim + 1, dim + 1, 0, step - 1)
        flat = adjoint.reshape(grid, [*shape[:dim], taken * step, *shape[dim + 1 :]])
        adjoint.send(x, _pad_back(adjoint, flat, ndim, dim, start, size - start - taken * step))
        return
    adjoint.send(x, _pad_back(adjoint, grad, ndim, dim, start, size - max(stop, start)))


@rule(aten.select.int)
def select(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Zeros where nothing was taken."""
    a = bound_arguments(node)
    x = a["self"]
    ndim = x.meta["val"].ndim
    dim = a["dim"] % ndim
    size = x.meta["val"].shape[dim]
    if isinstance(size, torch.SymInt):
        raise adjoint.fail(node, "selects from the batch")
    index = a["index"] % size
    wide = adjoint.call(aten.unsqueeze.default, grad, dim)
    adjoint.send(x, _pad_back(adjoint, wide, ndim, dim, index, size - index - 1))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Each part's adjoint back in its place."""
    a = bound_arguments(node)
    x = a["self"]
    ndim = x.meta["val"].ndim
    dim = a["dim"] % ndim
    size = x.meta["val"].shape[dim]
    if isinstance(size, torch.SymInt):
        raise adjoint.fail(node, "splits the batch")
    start = 0
    for i, part in enumerate(node.meta["val"]):
        width = 1 if node.target is aten.unbind.int else part.shape[dim]
        if i in adjoint.output_grads[node]:
            piece = adjoint.output_grads[node][i]
            if node.target is aten.unbind.int:
                piece = adjoint.call(aten.unsqueeze.default, piece, dim)
            adjoint.send(x, _pad_back(adjoint, piece, ndim, dim, start, size - start - width))
        start += width


# Each border element adds to the pixel it mirrors or repeats.
_PAD_BACKWARD = {
    "reflect": aten.reflection_pad2d_backward.default,
    "replicate": aten.replication_pad2d_backward.default,
}


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """Constant padding: cut off what was added; padding with other than zeros goes to the residual."""
    a = bound_arguments(node)
    x, pads = a["self"], list(a["pad"])
    mode = a.get("mode", "constant")
    if mode in _PAD_BACKWARD and len(pads) == 4:
        adjoint.send(x, adjoint.call(_PAD_BACKWARD[mode], grad, adjoint.saved(x), pads))
        return
    if mode == "circular":
        adjoint.send(x, _unwrap(adjoint, x, grad, pads))
        return
    if mode != "constant":
        raise adjoint.fail(node, f"padding mode {mode!r} has no rule")
    value = a.get("value") or 0
    back = adjoint.call(aten.constant_pad_nd.default, grad, [-p for p in pads], 0.0)
    if value:
        # <grad, border> = value * (sum of all - sum of the inside)
        adjoint.add_residual(grad, float(value))
        adjoint.add_residual(back, -float(value))
    adjoint.send(x, back)


def _unwrap(adjoint: Adjoint, x: Node, grad: Node, pads: list[int]) -> Node:
    """Transpose of circular padding: what was added at one end goes back to the other end."""
    ndim = x.meta["val"].ndim
    for i in range(len(pads) // 2):
        dim, before, after = ndim - 1 - i, *pads[2 * i : 2 * i + 2]
        size = x.meta["val"].shape[dim]
        inner = adjoint.call(aten.slice.Tensor, grad, dim, before, before + size)
        if before:
            ends = adjoint.call(aten.slice.Tensor, grad, dim, 0, before)
            inner = adjoint.call(aten.add.Tensor, inner, _pad_back(adjoint, ends, ndim, dim, size - before, 0))
        if after:
            ends = adjoint.call(aten.slice.Tensor, grad, dim, before + size, before + size + after)
            inner = adjoint.call(aten.add.Tensor, inner, _pad_back(adjoint, ends, ndim, dim, 0, size - after))
        grad = inner
    return grad


@rule(aten.roll.default)
def roll(adjoint: Adjoint, node: Node, grad: Node) -> None:
    """The roll back."""
    a = bound_arguments(node)
    adjoint.send(a["self"], adjoint.call(aten.roll.default, grad, [-s for s in a["shifts"]], a["dims"]))

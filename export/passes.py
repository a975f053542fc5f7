"""Rewrites of a program, each a small pure change of form: the same function, fewer or cheaper nodes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bcos_rt.export import fused
from bcos_rt.export.program import Program

__all__ = ["fold_convolution_scale", "fuse_bcos_convolutions", "fuse_relu", "gather_class_rows", "rewrite"]

aten = torch.ops.aten
bcos = torch.ops.bcos_rt
POWER_EPS = 1e-6


def rewrite(program: Program) -> dict[str, int]:
    """Run every pass; returns how often each changed something."""
    counts = {
        "B-cos convolutions with BatchNorm scale and kernel area in their weights": fuse_bcos_convolutions(program),
        "ReLUs moved before the scaling": fuse_relu(program),
        "convolutions with a constant scale and shift in their weights": fold_convolution_scale(program),
        "products with a one-hot seed as the class's row of weights": gather_class_rows(program),
    }
    program.clean()
    program.graph.lint()
    return counts


# Matching ----------------------------------------------------------------------------------------------------------


def _const(program: Program, node: Any) -> Tensor | None:
    return program.constants.get(node) if isinstance(node, Node) else None


def _per_channel(program: Program, node: Any, channels: int) -> Tensor | None:
    """A constant that varies only along dimension 1 of [N, C, H, W], as [C]; None for anything else."""
    value = _const(program, node)
    if value is None or value.ndim not in (3, 4):
        return None
    shape = tuple(value.shape)[-3:]
    if value.numel() != shape[0] or shape[1:] != (1, 1) or shape[0] not in (1, channels):
        return None
    return value.reshape(-1).expand(channels)


def _other(node: Node, operand: Node) -> Any:
    """The other operand of a binary op."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def _products(node: Node) -> list[Node]:
    return [u for u in node.users if u.target is aten.mul.Tensor and u.args[0] is not u.args[1]]


def _repeated(node: Node) -> list[Node]:
    """A node and its copies repeated for K classes."""
    return [node, *(u for u in node.users if u.target is aten.repeat_interleave.self_int)]


def _is_adjoint(node: Node) -> bool:
    return node.meta.get("side") == "adjoint"


def _only_user(node: Node, adjoint: bool = False) -> Node | None:
    users = [u for u in node.users if _is_adjoint(u) == adjoint]
    return users[0] if len(users) == 1 else None


def _adjoint_products(factor: Node) -> list[Node]:
    """Products on the adjoint side with a forward factor (or its repeated copies)."""
    return [p for copy in _repeated(factor) for p in _products(copy) if _is_adjoint(p)]


def _grad_of(product: Node, factor: Node) -> Node:
    """The adjoint that a product of :func:`_adjoint_products` multiplies with the factor."""
    grads = [n for n in product.args if isinstance(n, Node) and n not in _repeated(factor)]
    return grads[0]


def _copy_meta(node: Node, like: Node) -> Node:
    for key in ("nn_module_stack", "stack_trace", "side"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


# B-cos convolutions ------------------------------------------------------------------------------------------------


def fuse_bcos_convolutions(program: Program) -> int:
    """``z``, ``n``, ``m``, ``z m`` (and a BatchNorm scale ``a`` after it) become one node with other weights.

    With A the kernel's area, ``n' = n / sqrt(A)`` is what an average pool gives, and::

        w' = sign(a) c w,   c = (|a| A^(-(B-1)/2))^(1/B)   ->   y' = z' m' = a y,   m' w' = a m w

    exactly, for any a (negative, or 0 for a dead channel), so both the forward pass and the adjoint, which is linear
    with the factor ``m' w'``, lose the scale. The published 1e-6 inside a fractional power becomes ``1e-6 c sqrt(A)``.
    """
    count = 0
    for m in list(program.graph.nodes):
        if m.target is bcos.dynamic_scale.default and _fuse_bcos_convolution(program, m):
            count += 1
    program.clean()
    return count


def _fuse_bcos_convolution(program: Program, m: Node) -> bool:
    arguments: tuple[Any, ...] = m.args
    z, n, b, channel_dim = arguments
    if not isinstance(z, Node) or not isinstance(n, Node) or channel_dim != 1:
        return False
    if z.target is not aten.conv2d.default or n.target is not bcos.patch_norm.default or len(n.users) != 1:
        return False
    x, w, bias, stride, padding, dilation, groups = (*z.args, None, None, None, None)[:7]
    weight = _const(program, w)
    if weight is None or bias is not None or n.args[0] is not x or not isinstance(w, Node):
        return False
    product = [p for p in _products(z) if _other(p, z) is m]
    if len(product) != 1 or set(z.users) != {m, product[0]}:
        return False
    y = product[0]
    channels = weight.shape[0]

    # The scale after it, if there is one and nothing else sees y.
    scale: Node | None = None
    out, a = y, torch.ones(channels)
    following = _only_user(y)
    if following is not None and len(y.users) == 1 and following.target is aten.mul.Tensor:
        given = _per_channel(program, _other(following, y), channels)
        if given is not None:
            scale, out, a = _other(following, y), following, given

    # On the adjoint side: (g a) m into transposed convolutions with w, and nothing else.
    sites: list[tuple[Node, Node, list[Node]]] = []
    for gz in _adjoint_products(m):
        grad = _grad_of(gz, m)
        if scale is not None:
            if grad.target is not aten.mul.Tensor or scale not in grad.args:
                return False
            grad = _other(grad, scale)
        backs = list(gz.users)
        if not all(u.target is aten.conv_transpose2d.input and u.args[1] is w for u in backs):
            return False
        sites.append((gz, grad, backs))
    if any(u is not y and u not in _repeated(m) and u not in [s[0] for s in sites] for u in m.users):
        return False

    kernel = weight.shape[2] * weight.shape[3]
    eps: Any = n.args[6]
    wide = a.double()
    c = (wide.abs() * kernel ** (-(b - 1) / 2)) ** (1 / b)
    factor = (wide.sign() * c).reshape(-1, 1, 1, 1)
    scaled = (weight.double() * factor).to(weight.dtype)
    new_weight = program.add_constant(scaled, f"{program.names[w]}.folded", w)
    delta: Node | None = None
    if b != 2:
        value = (POWER_EPS * c * kernel**0.5).to(weight.dtype).reshape(-1, 1, 1)
        delta = program.add_constant(value, f"{program.names[w]}.delta", w)
    with program.graph.inserting_before(y):
        pair = program.graph.call_function(
            fused.bcos_conv2d,
            (x, new_weight, None, stride, padding, dilation, groups, b, eps / kernel, delta, False),
        )
        new_y = program.graph.call_function(operator.getitem, (pair, 0))
        new_m = program.graph.call_function(operator.getitem, (pair, 1))
    pair.meta["val"] = (y.meta["val"], m.meta["val"])
    new_y.meta["val"], new_m.meta["val"] = y.meta["val"], m.meta["val"]
    for node in (pair, new_y, new_m):
        _copy_meta(node, z)
    for gz, grad, backs in sites:
        if scale is not None:
            gz.replace_input_with(_grad_of(gz, m), grad)
        for back in backs:
            back.replace_input_with(w, new_weight)
    out.replace_all_uses_with(new_y)
    m.replace_all_uses_with(new_m, delete_user_cb=lambda user: user is not y)
    return True


def fuse_relu(program: Program) -> int:
    """``relu(z m) = relu(z) relu(z) / n`` at B = 2: the convolution and the ReLU fuse, and ``m`` holds the gate."""
    count = 0
    for pair in list(program.graph.nodes):
        if pair.target is fused.bcos_conv2d and pair.args[7] == 2 and not pair.args[10]:
            count += _fuse_relu(pair)
    program.clean()
    return count


def _fuse_relu(pair: Node) -> bool:
    parts = {u.args[1]: u for u in pair.users}
    y, m = parts.get(0), parts.get(1)
    if y is None or len(y.users) != 1:
        return False
    relu = next(iter(y.users))
    if relu.target is not aten.relu.default:
        return False
    sites = []
    if m is not None:
        for gz in _adjoint_products(m):
            gated = _grad_of(gz, m)
            masks = [n for n in gated.args if isinstance(n, Node) and _is_mask_of(n, relu)]
            if gated.target is not aten.mul.Tensor or len(masks) != 1:
                return False
            sites.append((gz, gated, _other(gated, masks[0])))
    pair.args = (*pair.args[:10], True)
    relu.replace_all_uses_with(y)
    for gz, gated, grad in sites:
        gz.replace_input_with(gated, grad)
    return True


def _is_mask_of(node: Node, relu: Node) -> bool:
    """Whether a node is ``(relu > 0)`` as a number, perhaps repeated for K classes."""
    if node.target is aten.repeat_interleave.self_int:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not aten._to_copy.default:
        return False
    compare: Any = node.args[0]
    return compare.target is aten.gt.Scalar and compare.args[0] is relu and compare.args[1] == 0


# Plain convolutions ------------------------------------------------------------------------------------------------


def fold_convolution_scale(program: Program) -> int:
    """``conv(x, w, b) s + t`` becomes ``conv(x, s w, s b + t)``, and ``conv^T(g s, w)`` becomes ``conv^T(g, s w)``."""
    count = 0
    for conv in list(program.graph.nodes):
        if conv.target is aten.conv2d.default and _fold_scale(program, conv):
            count += 1
    program.clean()
    return count


def _fold_scale(program: Program, conv: Node) -> bool:
    target: Any = conv.target
    x, w, bias, *rest = (*conv.args, None)[: max(len(conv.args), 3)]
    weight = _const(program, w)
    if weight is None or not isinstance(w, Node):
        return False
    following = _only_user(conv)
    if following is None or len(conv.users) != 1:
        return False
    channels = weight.shape[0]
    factor: Tensor | None = None
    last = conv
    if following.target is aten.mul.Tensor:
        factor = _per_channel(program, _other(following, conv), channels)
        if factor is None:
            return False
        last = following
        next_one = _only_user(following)
        shifted = next_one if next_one is not None and len(following.users) == 1 else None
    else:
        shifted = following
    shift: Tensor | None = None
    if shifted is not None and shifted.target is aten.add.Tensor and len(shifted.args) == 2 and not shifted.kwargs:
        shift = _per_channel(program, _other(shifted, last), channels)
        if shift is not None:
            last = shifted
    if last is conv:
        return False

    old_bias = _const(program, bias)
    if bias is not None and old_bias is None:
        return False
    total = torch.zeros(channels, dtype=torch.float64)
    if old_bias is not None:
        total = total + old_bias.double() * (factor.double() if factor is not None else 1)
    if shift is not None:
        total = total + shift.double()
    new_w: Node = w
    if factor is not None:
        value = (weight.double() * factor.double()[:, None, None, None]).to(weight.dtype)
        new_w = program.add_constant(value, f"{program.names[w]}.folded", w)
        _fold_scale_adjoint(program, w, new_w, following.args)
    new_bias: Node | None = None
    if old_bias is not None or shift is not None:
        new_bias = program.add_constant(total.to(weight.dtype), f"{program.names[w]}.shift", w)
    with program.graph.inserting_before(last):
        new = program.graph.call_function(target, (x, new_w, new_bias, *rest), conv.kwargs)
    new.meta["val"] = last.meta["val"]
    _copy_meta(new, conv)
    last.replace_all_uses_with(new)
    return True


def _fold_scale_adjoint(program: Program, w: Node, new_w: Node, operands: Iterable[Any]) -> None:
    scales = [n for n in operands if _const(program, n) is not None]
    for back in list(w.users):
        if back.target is not aten.conv_transpose2d.input or back.args[1] is not w:
            continue
        grad: Any = back.args[0]
        if grad.target is aten.mul.Tensor and any(s in grad.args for s in scales):
            scale = next(s for s in scales if s in grad.args)
            back.replace_input_with(grad, _other(grad, scale))
            back.replace_input_with(w, new_w)


# The head ----------------------------------------------------------------------------------------------------------


def gather_class_rows(program: Program) -> int:
    """The adjoint starts one-hot in the class: follow it through the head with one channel instead of all.

    ``seed``, reshaped, spread over the pooled positions and multiplied with ``m``, stays zero outside its class; a
    product with the head's weights then is the class's row times that one channel.
    """
    if program.seed is None or program.targets is None or program.targets.meta["val"].is_floating_point():
        return 0  # a text's seed is not one-hot
    compared: Any = program.seed.args[0]
    head = _Head(program, compared.args[0])
    for node in list(program.graph.nodes):
        if node.op == "call_function":
            head.visit(node)
    program.clean()
    return head.products


class _Head:
    """Nodes that are zero outside the class's channel (dimension 1), and for each the node of that one channel."""

    def __init__(self, program: Program, class_ids: Node) -> None:
        self.program, self.class_ids = program, class_ids
        self.only: dict[Node, Node] = {}
        self.products = 0

    def add(self, node: Node, target: Any, args: tuple[Any, ...], channels: int, **kwargs: Any) -> Node:
        """A node before ``node``, with its shape but for the number of channels."""
        with self.program.graph.inserting_before(node):
            new = self.program.graph.call_function(target, args, kwargs)
        like: Any = node.meta["val"]
        with like.fake_mode:
            new.meta["val"] = torch.empty((like.shape[0], channels, *like.shape[2:]), dtype=like.dtype)
        return _copy_meta(new, node)

    def visit(self, node: Node) -> None:
        """Follow the one channel through ``node``, where that is possible."""
        if node is self.program.seed:
            dtype = node.meta["val"].dtype
            self.only[node] = self.add(node, aten.ones_like.default, (self.class_ids,), 1, dtype=dtype)
            return
        given: Any = node.args[0] if node.args else None
        if not isinstance(given, Node) or given not in self.only:
            return
        only, target, shape = self.only[given], node.target, tuple(node.meta["val"].shape)
        classes = given.meta["val"].shape[1]
        other: Any = node.args[1] if len(node.args) > 1 else None
        if target in (aten.mul.Scalar, aten.div.Scalar, fused.scale):
            self.only[node] = self.add(node, target, (only, other), 1)
        elif target is aten.reshape.default and shape[1:] == (classes, 1, 1):
            self.only[node] = self.add(node, target, (only, [other[0], 1, 1, 1]), 1)
        elif target is aten.expand.default and len(shape) == 4 and shape[1] == classes:
            self.only[node] = self.add(node, target, (only, [other[0], 1, *other[2:]]), 1)
        elif target is aten.mul.Tensor and tuple(other.meta["val"].shape) == shape:
            picked = self.add(node, fused.class_channel, (other, self.class_ids), 1)
            self.only[node] = self.add(node, target, (only, picked), 1)
        elif (target is aten.matmul.default and len(shape) == 2) or self.is_pointwise(node):
            weight = _const(self.program, other)
            if weight is not None:
                row = self.add(node, fused.class_row, (other, self.class_ids), weight.shape[1])
                node.replace_all_uses_with(self.add(node, aten.mul.Tensor, (only, row), weight.shape[1]))
                self.products += 1

    @staticmethod
    def is_pointwise(node: Node) -> bool:
        """A transposed 1x1 convolution, stride 1, nothing else."""
        if node.target is not aten.conv_transpose2d.input:
            return False
        arguments: tuple[Any, ...] = (*node.args, *[None] * 8)[:8]
        _, weight, bias, stride, padding, extra, groups, _ = arguments
        plain = list(stride or [1, 1]) == [1, 1] and not any(padding or [0]) and not any(extra or [0])
        return bias is None and plain and groups in (None, 1) and tuple(weight.meta["val"].shape[2:]) == (1, 1)

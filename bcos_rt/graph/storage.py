"""What a program's values are stored in: 16 bits for all of it, or for its adjoint alone.

Per-channel scales, norms and a program's outputs stay in the network's dtype. The adjoint alone is what keeps
explanations: a B-cos network's forward pass squares its cosines layer by layer and carries a rounding error on, while
the adjoint is linear (its multipliers were worked out before).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node

from bcos_rt.graph.program import Program, propagate

__all__ = ["store_adjoint_as", "store_as"]

aten = torch.ops.aten

# Arguments of fused ops that stay in the network's dtype: per channel, read once a kernel, or in an exponent.
_WIDE_ARGUMENTS = {"scale", "shift", "bias", "mean", "std", "inverse_std", "image", "lse", "mask"}


def store_as(program: Program, dtype: torch.dtype, stored: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Store activations and weights as ``dtype``; scales, shifts, mean, std and outputs stay as they are.

    ``stored`` has what constants of other programs were rounded to, by their identity, and is added to.
    """
    wide_dtype = program.image.meta["val"].dtype
    for node in list(program.constants):
        if node.meta["val"].dtype == wide_dtype and not _only_wide_uses(node):
            value = program.constants[node]
            _, rounded = stored.setdefault(id(value), (value, value.to(dtype)))
            wide_users = [u for u in node.users if _uses_wide(u, node)]
            narrow = program.add_constant(rounded, program.names[node], node)
            node.replace_all_uses_with(narrow, delete_user_cb=_outside(wide_users))
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.args = torch.fx.node.map_aggregate(node.args, lambda a: dtype if a is wide_dtype else a)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda a: dtype if a is wide_dtype else a)
            _keep_positive(node, dtype)
    _round_texts(program, dtype)
    program.clean()
    propagate(program.graph, program.image.meta["val"].fake_mode)
    _widen_outputs(program, wide_dtype)


def _round_texts(program: Program, dtype: torch.dtype) -> None:
    """Text embeddings, which come as float32, meet tokens of ``dtype``."""
    texts = program.targets
    if texts is None or not texts.meta["val"].is_floating_point():
        return
    readers = [user for user in texts.users if user.target is not aten.sym_size.int]
    with program.graph.inserting_after(texts):
        rounded = program.graph.call_function(aten._to_copy.default, (texts,), {"dtype": dtype})
    texts.replace_all_uses_with(rounded, delete_user_cb=lambda user: user in readers)


def _keep_positive(node: Node, dtype: torch.dtype) -> None:
    """A limit above 0 that keeps a divisor from 0 is too small for float16, whose 0 it would be."""
    limit = node.args[1] if node.target is torch.ops.aten.clamp_min.default else None
    if isinstance(limit, float) and 0 < limit < torch.finfo(dtype).tiny:
        node.update_arg(1, torch.finfo(dtype).tiny)


def store_adjoint_as(program: Program, dtype: torch.dtype, seed: Node) -> None:
    """Store what comes of ``seed``, the adjoint of the logits, as ``dtype``, with its weights and multipliers.

    A forward value that an adjoint op reads is rounded once, behind the op that made it; logits and the classes that
    are explained do not change.
    """
    wide_dtype = program.image.meta["val"].dtype
    fake_mode = program.image.meta["val"].fake_mode
    after = {seed}
    rounded: dict[Node, Node] = {}

    def narrow(node: Node) -> Node:
        if node not in rounded:
            if node in program.constants:
                rounded[node] = program.add_constant(program.constants[node].to(dtype), program.names[node], node)
            else:
                with program.graph.inserting_after(node):
                    rounded[node] = program.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
                origin = {k: v for k, v in node.meta.items() if k in ("side", "nn_module_stack", "stack_trace")}
                rounded[node].meta.update(origin)
                rounded[node].meta["val"] = node.meta["val"].to(dtype)
        return rounded[node]

    for node in list(program.graph.nodes):
        if node.op != "call_function" or not (node is seed or any(n in after for n in node.all_input_nodes)):
            continue
        after.add(node)
        if node is seed or any(n in after and _has(n, dtype) for n in node.all_input_nodes):
            inputs = [n for n in node.all_input_nodes if _has(n, wide_dtype) and not _uses_wide(node, n)]
            if node.target is torch.ops.bcos_rt.attention_transposed.default:
                # Queries and keys as the softmax saw them: rounded ones would give another than the log-sum-exp's.
                inputs = [n for n in inputs if n is node.args[0]]
            # The image times its weights: the product is wide, as either would be.
            inputs = [n for n in inputs if n is not program.image]
            for n in inputs:
                node.replace_input_with(n, narrow(n))
            node.args = torch.fx.node.map_aggregate(node.args, lambda a: dtype if a is wide_dtype else a)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda a: dtype if a is wide_dtype else a)
        _refresh(node, fake_mode)
    program.clean()
    propagate(program.graph, fake_mode)
    _widen_outputs(program, wide_dtype)


def _has(node: Node, dtype: torch.dtype) -> bool:
    return isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype == dtype


def _refresh(node: Node, fake_mode: Any) -> None:
    """Work a node's fake value out anew."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    target: Any = node.target
    with fake_mode, enable_python_dispatcher(), torch.no_grad():
        node.meta["val"] = target(*args, **kwargs)


def _widen_outputs(program: Program, wide_dtype: torch.dtype) -> None:
    outputs = dict(program.outputs)
    for name, node in outputs.items():
        if node.meta["val"].is_floating_point() and node.meta["val"].dtype != wide_dtype:
            with program.graph.inserting_before(next(iter(reversed(program.graph.nodes)))):
                outputs[name] = program.graph.call_function(aten._to_copy.default, (node,), {"dtype": wide_dtype})
            outputs[name].meta.update(node.meta)
            outputs[name].meta["val"] = node.meta["val"].to(wide_dtype)
    program.set_outputs(outputs)


def _outside(users: list[Node]) -> Callable[[Node], bool]:
    return lambda user: user not in users


def _uses_wide(user: Node, node: Node) -> bool:
    if user.target is torch.ops.bcos_rt.encode_image.default:
        return True
    if not isinstance(user.target, torch._ops.OpOverload) or user.target.namespace != "bcos_rt":
        return False
    names = [a.name for a in user.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, user.args, strict=False)), **user.kwargs}
    return all(name in _WIDE_ARGUMENTS for name, value in given.items() if value is node)


def _only_wide_uses(node: Node) -> bool:
    """Used by kernels that read it wide alone, or a few numbers (mean, logit bias) in sums and products."""
    few = node.meta["val"].numel() <= 8
    simple = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
    return all(_uses_wide(user, node) or (few and user.target in simple) for user in node.users)

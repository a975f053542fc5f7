"""What becomes of ``scaled_dot_product_attention`` in a captured graph: its softmax stored, or made again.

In an explanation attention is linear in its values, ``out = P v`` with ``P = softmax(scale q k^T + mask)`` constant, so
its adjoint ``P^T grad`` needs P. There are two ways to have it:

* *store*: product, softmax and product are nodes of their own, standard ops alone. Every layer's P, [N, H, T, S], is
  kept from the forward pass to the adjoint, and repeated for K classes;
* *recompute*: one op gives ``out`` and the softmax's log-sum-exp, [N, H, T]; the adjoint's op makes P again from
  queries, keys and that, in tiles, once for all classes of an image (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.fx import Node

from bcos_rt.errors import InvalidArgumentError, UnsupportedOpError, did_you_mean

if TYPE_CHECKING:
    from bcos_rt.graph.capture import GraphBuilder

__all__ = ["RECOMPUTE_ABOVE", "Attention", "attention_transposed", "check_attention", "lower_attention"]

aten = torch.ops.aten
bcos = torch.ops.bcos_rt

# How a network's attention is kept for the adjoint; "auto" recomputes where a softmax is RECOMPUTE_ABOVE times as large
# as its queries, keys and log-sum-exp. Measured (docs/results/attention.md): at 1.5 memory is the same, for queries and
# keys mostly are parts of a projection that holds the values too; at 4.5 it is 21 to 35 % less.
Attention = Literal["auto", "store", "recompute"]
RECOMPUTE_ABOVE = 2.0


def check_attention(choice: Any) -> None:
    """Raises InvalidArgumentError for what is no :data:`Attention`."""
    names = get_args(Attention)
    if choice not in names:
        hint = did_you_mean(str(choice), names)
        raise InvalidArgumentError("attention", repr(choice), "one of " + ", ".join(map(repr, names)), hint)


def lower_attention(
    builder: GraphBuilder, a: Mapping[str, Any], choice: Attention = "store", batch: Any = None
) -> Node:
    """``softmax(s q k^T + mask) v``, so that the adjoint can hold the softmax constant.

    Args:
        a: the op's arguments by name.
        batch: the symbol of the number of images. What has not got it in front is stored whatever the choice.
    """
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"]:
        raise UnsupportedOpError(f"{aten.scaled_dot_product_attention.default}: dropout is active in evaluation mode")
    if a["enable_gqa"] and query.meta["val"].shape[-3] != key.meta["val"].shape[-3]:
        groups = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key, value = (builder.call(aten.repeat_interleave.self_int, n, groups, -3) for n in (key, value))
    scale = float(a["scale"] if a["scale"] is not None else 1 / math.sqrt(query.meta["val"].shape[-1]))
    wanted = choice == "recompute" or (choice == "auto" and _stored_is_larger(query, key))
    if wanted and _has_images(query, key, value, mask, batch):
        return _recomputed(builder, query, key, value, mask, a["is_causal"], scale)
    transposed = builder.call(aten.transpose.int, key, -2, -1)
    scores = builder.call(aten.matmul.default, builder.call(aten.mul.Scalar, query, scale), transposed)
    if a["is_causal"]:
        mask = _causal(builder, query, key)
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = builder.call(aten.masked_fill.Scalar, scores, builder.call(aten.logical_not.default, mask), -math.inf)
    elif mask is not None:
        scores = builder.call(aten.add.Tensor, scores, mask)
    return builder.call(aten.matmul.default, builder.call(aten.softmax.int, scores, -1), value)


def _causal(builder: GraphBuilder, query: Node, key: Node) -> Node:
    """Which keys a query may look at, bool [T, S]."""
    size = [int(node.meta["val"].shape[-2]) for node in (query, key)]
    device = query.meta["val"].device
    return builder.call(
        aten.tril.default, builder.call(aten.ones.default, size, dtype=torch.bool, device=device, pin_memory=False)
    )


def _has_images(query: Node, key: Node, value: Node, mask: Node | None, batch: Any) -> bool:
    """Whether these are [N f, ..., T, D] of N images, with a mask that the op takes."""
    shapes = [node.meta["val"].shape for node in (query, key, value)]
    first = shapes[0]
    if len(first) < 3 or any(s[:-2] != first[:-2] for s in shapes) or not isinstance(first[0], torch.SymInt):
        return False
    if not (first[0].node.expr / batch).is_Integer or any(isinstance(n, torch.SymInt) for s in shapes for n in s[1:]):
        return False
    if mask is None or mask.meta["val"].ndim <= 2:
        return True
    given = mask.meta["val"].shape
    alike = len(first) == len(given) == 4 and first[0].node.expr == batch
    return len(given) <= 4 and (alike or all(n == 1 for n in given[:-2]))


def _stored_is_larger(query: Node, key: Node) -> bool:
    tokens, channels = (int(n) for n in query.meta["val"].shape[-2:])
    keys = int(key.meta["val"].shape[-2])
    return tokens * keys > RECOMPUTE_ABOVE * ((tokens + keys) * channels + tokens)


def _recomputed(
    builder: GraphBuilder, query: Node, key: Node, value: Node, mask: Node | None, causal: bool, scale: float
) -> Node:
    """The op on [N, heads, T, D]: what stands between N and the tokens (windows, too) are heads to it."""
    shape = list(query.meta["val"].shape)
    if causal:
        mask = _causal(builder, query, key)
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        nothing = builder.call(aten.zeros_like.default, mask, dtype=query.meta["val"].dtype)
        mask = builder.call(aten.masked_fill.Scalar, nothing, builder.call(aten.logical_not.default, mask), -math.inf)
    folded = len(shape) != 4 or not shape[0].node.expr.is_Symbol
    if folded:
        per_image = int(shape[0].node.expr / next(iter(shape[0].node.expr.free_symbols))) * math.prod(shape[1:-2])
        query, key, value = (
            builder.call(aten.reshape.default, n, [-1, per_image, *(int(s) for s in n.meta["val"].shape[-2:])])
            for n in (query, key, value)
        )
    both = builder.call(bcos.attention.default, query, key, value, mask, scale)
    _named(both, str(aten.scaled_dot_product_attention.default))
    out = builder.call(operator.getitem, both, 0)
    if folded:
        channels = int(value.meta["val"].shape[-1])
        out = builder.call(aten.reshape.default, out, [-1, *(int(s) for s in shape[1:-1]), channels])
    return out


def attention_transposed(builder: GraphBuilder, node: Node, grad: Node, lse: Node) -> Node:
    """The adjoint of a recomputed attention ``node`` for N K gradients: its queries, keys and mask stay N rows."""
    query, key, _, mask, scale = node.args
    back = builder.call(bcos.attention_transposed.default, grad, query, key, lse, mask, scale)
    _named(back, str(node.target))
    return back


def _named(node: Node, origin: str) -> None:
    """What an engine's summary says of a node."""
    node.meta["pass"], node.meta["fused_from"] = "recompute_attention", (origin,)

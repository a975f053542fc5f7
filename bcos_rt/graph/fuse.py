"""Fusion passes: a captured network, and then its adjoint, rewritten in the fused ops of :mod:`bcos_rt.kernels.ops`.

Each pass is a small change of form that keeps the function (its name in the summary says which one made a node):

* forward, on a :class:`Captured` graph, before the adjoint is derived from it by the rules of
  :mod:`bcos_rt.graph.fused_rules`: :func:`fold_norms`, :func:`nest_concatenations`, :func:`fuse_convolutions`,
  :func:`fuse_linears`, :func:`fuse_layer_norms`, :func:`fuse_pools`, :func:`fuse_scaled_activations`,
  :func:`prepare_stem`, :func:`thread_squares`;
* on the whole explanation graph, after it: :func:`fuse_identities`, :func:`fuse_multipliers`,
  :func:`drop_copies`, :func:`fuse_contributions`.

What no pass recognises stays as it was captured, and runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from bcos_rt.graph.capture import Captured, GraphBuilder, bound_arguments, image_dependent

__all__ = [
    "drop_copies",
    "fold_norms",
    "fuse_adjoint",
    "fuse_contributions",
    "fuse_convolutions",
    "fuse_forward",
    "fuse_identities",
    "fuse_layer_norms",
    "fuse_linears",
    "fuse_multipliers",
    "fuse_pools",
    "fuse_scaled_activations",
    "nest_concatenations",
    "prepare_stem",
    "refresh",
    "thread_squares",
]

aten = torch.ops.aten
bcos = torch.ops.bcos_rt


def fuse_forward(captured: Captured, six_channels: bool) -> dict[str, int]:
    """Every forward pass in order; how often each changed something."""
    passes: tuple[Callable[[Captured], int], ...] = (
        fold_norms, nest_concatenations, fuse_convolutions, fuse_linears, fuse_layer_norms, fuse_pools,
        fuse_scaled_activations,
    )  # fmt: skip
    counts = {}
    for function in passes:
        counts[function.__name__] = function(captured)
        refresh(captured)
    counts["prepare_stem"] = prepare_stem(captured, six_channels)
    refresh(captured)
    counts["thread_squares"] = thread_squares(captured)
    refresh(captured)
    return counts


def fuse_adjoint(builder: GraphBuilder) -> dict[str, int]:
    """Every pass on the explanation graph in order; how often each changed something."""
    passes: tuple[Callable[[GraphBuilder], int], ...] = (
        fuse_identities, fuse_multipliers, drop_copies, fuse_contributions,
    )  # fmt: skip
    counts = {}
    for function in passes:
        counts[function.__name__] = function(builder)
        builder.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return counts


def refresh(captured: Captured) -> None:
    """Remove dead nodes; work out anew which ones depend on the image."""
    graph = captured.builder.graph
    graph.output(captured.logits)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.erase_node(next(iter(reversed(graph.nodes))))
    captured.depends = image_dependent(graph, captured.encoded)


def _replace(captured: Captured, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    if old in captured.depends:
        captured.depends.add(new)
    if captured.logits is old:
        captured.logits = new


def _made_by(node: Node, name: str, *origins: Node) -> Node:
    """Note the pass and the nodes a fused node stands for (they end in its summary)."""
    node.meta["pass"] = name
    node.meta["fused_from"] = tuple(str(o.target) for o in origins)
    # It is the first one's layer, wherever the last one's activation stands.
    node.meta.update({k: v for k, v in origins[0].meta.items() if k in ("nn_module_stack", "stack_trace")})
    return node


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _image(node: Any) -> bool:
    """A 4-D value."""
    return isinstance(node, Node) and isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].ndim == 4


def _by_image(captured: Captured, node: Any) -> bool:
    """Whether row i of a value belongs to image i.

    The fused adjoints find an image's factors for each of its K rows by that. Windows of images as rows, or tokens
    before images, would get another image's.
    """
    return bool(node.meta["val"].ndim > 0 and node.meta["val"].shape[0] == captured.encoded.meta["val"].shape[0])


# --- forward ---------------------------------------------------------------------------------------------------------


def fold_norms(captured: Captured) -> int:
    """Evaluation-mode BatchNorm: ``x s + t`` with constants per channel."""
    builder, count = captured.builder, 0
    for node in list(builder.graph.nodes):
        if node.target not in (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default):
            continue
        a = bound_arguments(node)
        if a.get("training") or not _image(a["input"]):
            continue
        call = builder.call
        with builder.in_place_of(node):
            scale = call(aten.rsqrt.default, call(aten.add.Scalar, a["running_var"], a["eps"]))
            if a["weight"] is not None:
                scale = call(aten.mul.Tensor, scale, a["weight"])
            shift = call(aten.neg.default, call(aten.mul.Tensor, a["running_mean"], scale))
            if a["bias"] is not None:
                shift = call(aten.add.Tensor, shift, a["bias"])
            out = call(aten.mul.Tensor, a["input"], _spatial(builder, scale))
            out = call(aten.add.Tensor, out, _spatial(builder, shift))
        first = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), node)
        _replace(captured, first, out)
        count += 1
    return count


def _spatial(builder: GraphBuilder, vector: Node) -> Node:
    return builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, vector, 1), 2)


def nest_concatenations(captured: Captured) -> int:
    """``cat([a, b, c])`` after ``cat([a, b])`` becomes ``cat([cat([a, b]), c])``.

    A dense block's features then reach its layers through one chain, whose adjoint adds each gradient once, where the
    flat form's adds every feature's slice of every layer's.
    """
    seen: dict[tuple[Any, ...], Node] = {}
    count = 0
    for node in list(captured.builder.graph.nodes):
        if node.target is not aten.cat.default or not _image(node):
            continue
        a = bound_arguments(node)
        if a["dim"] != 1:
            continue
        parts = tuple(a["tensors"])
        if len(parts) == 1:
            _replace(captured, node, parts[0])
            seen[parts] = parts[0]
            count += 1
            continue
        for length in range(len(parts) - 1, 1, -1):
            if parts[:length] in seen:
                node.args = ([seen[parts[:length]], *parts[length:]], 1)
                count += 1
                break
        seen[parts] = node
    return count


def _per_channel(captured: Captured, node: Any, channels: int) -> Node | None:
    """A constant that varies along dimension 1 of [N, C, H, W] only, as a node [C]; None for anything else."""
    if not isinstance(node, Node) or node in captured.depends or not isinstance(node.meta["val"], torch.Tensor):
        return None
    shape = tuple(node.meta["val"].shape)
    if (
        len(shape) not in (3, 4)
        or shape[-2:] != (1, 1)
        or shape[-3] != channels
        or node.meta["val"].numel() != channels
    ):
        return None
    return captured.builder.call(aten.reshape.default, node, [channels])


def _constant_operand(captured: Captured, node: Node, value: Node) -> Any:
    """The other operand of a binary op, where it does not depend on the image."""
    left, right = node.args[:2]
    other = right if left is value else left
    return None if other is value or other in captured.depends else other


def _activation(node: Node) -> str | None:
    """The fused ops' name of an activation node."""
    a = bound_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    simple = {aten.relu.default: "relu", aten.relu6.default: "relu6", aten.silu.default: "silu",
              aten.hardswish.default: "hardswish"}  # fmt: skip
    if node.target in simple:
        return simple[node.target]
    if node.target is aten.gelu.default and a["approximate"] == "none":
        return "gelu"
    if node.target is aten.hardtanh.default and (a["min_val"], a["max_val"]) == (0, 6):
        return "relu6"
    if node.target is aten.clamp.default and (a["min"], a["max"]) == (0, 6):
        return "relu6"
    return None


@dataclass
class _Chain:
    """What follows a layer and is applied to it element by element, in the order the fused ops know."""

    last: Node
    scale: Node | None = None
    shift: Node | None = None
    residual: Node | None = None
    activation: str = "none"


def _follow(captured: Captured, y: Node, channels: int, channel_dim: int) -> _Chain:
    """Scale, shift, residual, activation after ``y``, as far as each is the only user of the one before."""
    chain, builder = _Chain(y), captured.builder
    while (user := _only_user(chain.last)) is not None and captured.logits is not chain.last:
        clean = chain.shift is None and chain.residual is None
        last = chain.last
        vector: Node | None = None
        if channel_dim == 1 and user.target in (aten.mul.Tensor, aten.add.Tensor) and not user.kwargs:
            with builder.in_place_of(user):
                vector = _per_channel(captured, _constant_operand(captured, user, last), channels)
        if user.target is aten.mul.Tensor and vector is not None and clean and chain.scale is None:
            chain.scale = vector
        elif user.target is aten.add.Tensor and vector is not None and clean:
            chain.shift = vector
        elif user.target is aten.add.Tensor and chain.residual is None and _is_residual(captured, user, last):
            operands: Any = user.args
            chain.residual = operands[1] if operands[0] is last else operands[0]
        elif _activation(user) is not None:
            chain.activation = _activation(user) or "none"
            chain.last = user
            break
        else:
            break
        chain.last = user
    return chain


def _is_residual(captured: Captured, add: Node, value: Node) -> bool:
    if len(add.args) != 2 or add.kwargs or add.args[0] is add.args[1]:
        return False
    other = add.args[1] if add.args[0] is value else add.args[0]
    if not isinstance(other, Node) or other not in captured.depends:
        return False
    return bool(other.meta["val"].shape == value.meta["val"].shape)


def _bcos(captured: Captured, z: Node, norm: Any, channel_dim: int) -> tuple[Node, Node, Node] | None:
    """(m, norm node, y) of ``y = z m``, ``m = dynamic_scale(z, norm(x))``, where nothing else uses any of them."""
    scales = [u for u in z.users if u.target is bcos.dynamic_scale.default and u.args[0] is z]
    if len(scales) != 1 or len(z.users) != 2:
        return None
    m = scales[0]
    _, n, _, dim = m.args
    y = _only_user(m)
    if not isinstance(n, Node) or n.target is not norm or dim != channel_dim or n.args[0] is not z.args[0]:
        return None
    if y is None or y.target is not aten.mul.Tensor or set(y.args) != {z, m}:
        return None
    return m, n, y


def fuse_convolutions(captured: Captured) -> int:
    """A convolution, its B-cos factor, per-channel scale and shift, residual and activation: ``conv2d_fused``.

    A plain convolution (B = 1) takes the scale into its weights, so that its adjoint has no factor to save but the
    activation's gate.
    """
    builder, count = captured.builder, 0
    for z in list(builder.graph.nodes):
        if z.target is not aten.conv2d.default or not _image(z):
            continue
        a = bound_arguments(z)
        x, weight, bias = a["input"], a["weight"], a["bias"]
        if x not in captured.depends or weight in captured.depends or not _by_image(captured, x):
            continue
        found = _bcos(captured, z, bcos.patch_norm.default, 1)
        b: Any = 1.0 if found is None else found[0].args[2]
        eps: Any = 0.0 if found is None else found[1].args[6]
        y = z if found is None else found[2]
        chain = _follow(captured, y, weight.meta["val"].shape[0], 1)
        if found is None and chain.last is z:
            continue  # a convolution by itself: nothing to fuse
        with builder.in_place_of(chain.last):
            if found is None and chain.scale is not None:
                column = builder.call(aten.reshape.default, chain.scale, [-1, 1, 1, 1])
                weight = builder.call(aten.mul.Tensor, weight, column)
                bias = None if bias is None else builder.call(aten.mul.Tensor, bias, chain.scale)
                chain.scale = None
            geometry = (list(a["stride"]), list(a["padding"]), list(a["dilation"]))
            node = builder.call(
                bcos.conv2d_fused.default, x, weight, None, bias, chain.scale, chain.shift, chain.residual,
                *geometry, a["groups"], float(b), float(eps), chain.activation, False, False, False,
            )  # fmt: skip
            out = builder.call(operator.getitem, node, 0)
        _made_by(node, "fuse_convolutions", z, *(() if found is None else (found[2],)), chain.last)
        _replace(captured, chain.last, out)
        count += 1
    return count


def fuse_linears(captured: Captured) -> int:
    """A B-cos linear layer with residual and activation: ``linear_fused``."""
    builder, count = captured.builder, 0
    for z in list(builder.graph.nodes):
        if z.target is not aten.linear.default:
            continue
        a = bound_arguments(z)
        found = _bcos(captured, z, bcos.row_norm.default, -1)
        if found is None or a["weight"] in captured.depends or not _by_image(captured, z):
            continue
        m, n, y = found
        b: Any = m.args[2]
        eps: Any = n.args[1]
        chain = _follow(captured, y, a["weight"].meta["val"].shape[0], -1)
        # Four dimensions mean an image to the adjoint's epilogue: [N, H, W, C] goes through as [N, H W, C].
        shape = z.meta["val"].shape
        folded = len(shape) == 4 and all(isinstance(s, int) for s in shape[1:])
        if len(shape) > 3 and not folded:
            continue
        with builder.in_place_of(chain.last):
            x, residual = a["input"], chain.residual
            if folded:
                x = builder.call(aten.reshape.default, x, [-1, shape[1] * shape[2], x.meta["val"].shape[3]])
                if residual is not None:
                    residual = builder.call(aten.reshape.default, residual, [-1, shape[1] * shape[2], shape[3]])
            node = builder.call(
                bcos.linear_fused.default, x, a["weight"], None, a["bias"], None, None, residual,
                float(b), float(eps), chain.activation, False, False, False,
            )  # fmt: skip
            out = builder.call(operator.getitem, node, 0)
            if folded:
                out = builder.call(aten.reshape.default, out, [-1, *shape[1:]])
        _made_by(node, "fuse_linears", z, y, chain.last)
        _replace(captured, chain.last, out)
        count += 1
    return count


def fuse_layer_norms(captured: Captured) -> int:
    """LayerNorm over the last dimension: ``layer_norm``, which hands on its deviations and sums of squares."""
    builder, count = captured.builder, 0
    for node in list(builder.graph.nodes):
        if node.target is not aten.layer_norm.default or node not in captured.depends:
            continue
        a = bound_arguments(node)
        x: Any = a["input"]
        if len(a["normalized_shape"]) != 1 or x.meta["val"].ndim < 2 or not _by_image(captured, x):
            continue
        if any(isinstance(p, Node) and p in captured.depends for p in (a["weight"], a["bias"])):
            continue
        with builder.in_place_of(node):
            norm = builder.call(bcos.layer_norm.default, x, a["weight"], a["bias"], float(a["eps"]), False)
            out = builder.call(operator.getitem, norm, 0)
        _made_by(norm, "fuse_layer_norms", node)
        _replace(captured, node, out)
        count += 1
    return count


def _two(value: Any) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return values * 2 if len(values) == 1 else values


def fuse_pools(captured: Captured) -> int:
    """Pools as ops that hand on the map of sums of squares, and whose adjoints have epilogues."""
    builder, count = captured.builder, 0
    for node in list(builder.graph.nodes):
        out: Node | None = None
        if node not in captured.depends or not isinstance(node.target, torch._ops.OpOverload):
            continue
        a = bound_arguments(node)
        x: Any = a.get("self")
        if not _image(x) or not _by_image(captured, x):
            continue
        with builder.in_place_of(node):
            size = list(x.meta["val"].shape[2:])
            if node.target is aten.avg_pool2d.default and a["divisor_override"] is None:
                window = (_two(a["kernel_size"]), _two(a["stride"] or a["kernel_size"]), _two(a["padding"]))
                out = _average(builder, x, *window, a["ceil_mode"], a["count_include_pad"])
            elif node.target in (aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default):
                if list(a["output_size"]) == [1, 1]:
                    out = _average(builder, x, size, size, [0, 0], False, True)
            elif node.target is aten.mean.dim and sorted(d % 4 for d in a["dim"] or ()) == [2, 3]:
                out = _average(builder, x, size, size, [0, 0], False, True)
                if not a["keepdim"]:
                    out = builder.call(aten.squeeze.dims, out, [2, 3])
            elif node.target is aten.max_pool2d.default:
                window = (_two(a["kernel_size"]), _two(a["stride"] or a["kernel_size"]), _two(a["padding"]))
                pool = builder.call(
                    bcos.max_pool2d.default, x, *window, _two(a["dilation"]), a["ceil_mode"], False, False, 1
                )
                out = builder.call(operator.getitem, pool, 0)
        if out is not None:
            item: Any = out if out.target is not aten.squeeze.dims else out.args[0]
            _made_by(item.args[0], "fuse_pools", node)
            _replace(captured, node, out)
            count += 1
    return count


def _average(
    builder: GraphBuilder, x: Node, kernel: list[int], stride: list[int], padding: list[int], ceil: bool, count: bool
) -> Node:
    pool = builder.call(bcos.avg_pool2d.default, x, kernel, stride, padding, ceil, count, False, 1)
    return builder.call(operator.getitem, pool, 0)


def fuse_scaled_activations(captured: Captured) -> int:
    """``act(s x + t)`` that no convolution took (pre-activation networks): one pass with its map of squares."""
    builder, count = captured.builder, 0
    for node in list(builder.graph.nodes):
        if node.target is not aten.mul.Tensor or not _image(node) or node not in captured.depends:
            continue
        x = node.args[0] if node.args[0] in captured.depends else node.args[1]
        if not _image(x) or not _by_image(captured, x) or x.meta["val"].shape[1] != node.meta["val"].shape[1]:
            continue
        channels = int(node.meta["val"].shape[1])
        with builder.in_place_of(node):
            scale = _per_channel(captured, _constant_operand(captured, node, x), channels)
        if scale is None:
            continue
        chain = _follow(captured, node, channels, 1)
        if chain.activation == "none" or chain.residual is not None or chain.scale is not None:
            continue
        with builder.in_place_of(chain.last):
            shift = chain.shift if chain.shift is not None else builder.call(aten.zeros_like.default, scale)
            fused = builder.call(bcos.scale_act.default, x, scale, shift, chain.activation, False, 1)
            out = builder.call(operator.getitem, fused, 0)
        _made_by(fused, "fuse_scaled_activations", node, chain.last)
        fused.meta["no_shift"] = chain.shift is None
        _replace(captured, chain.last, out)
        count += 1
    return count


def prepare_stem(captured: Captured, six_channels: bool) -> int:
    """Encoding and normalisation of the image in one op, 8 channels wide, with its map of squares.

    The captured graph starts from the encoded image; afterwards from the image itself, [N, 3, H, W].
    """
    builder, encoded = captured.builder, captured.encoded
    like = encoded.meta["val"]
    image_value = like
    if six_channels:
        with builder.fake_mode:
            image_value = torch.empty((like.shape[0], 3, *like.shape[2:]), dtype=like.dtype, device=like.device)
    encoded.name = encoded.target = "image"
    encoded.meta["val"] = image_value
    first = next(n for n in builder.graph.nodes if n.op != "placeholder")
    normalised = _normalisation(captured)
    if normalised is None:
        if six_channels:
            with builder.in_place_of(first):
                inverted = builder.call(aten.rsub.Scalar, encoded, 1.0)
                both = builder.call(aten.cat.default, [encoded, inverted], 1)
            encoded.replace_all_uses_with(both, delete_user_cb=lambda user: user not in (inverted, both))
            captured.entry = both
        return 0
    sub, div = normalised
    channels = 6 if six_channels else 3
    with builder.in_place_of(div):
        mean = builder.call(aten.reshape.default, sub.args[1], [channels])
        std = builder.call(aten.reshape.default, div.args[1], [channels])
        stem = builder.call(bcos.encode_image.default, encoded, mean, std, six_channels, like.dtype)
        padded = builder.call(operator.getitem, stem, 0)
    _made_by(stem, "prepare_stem", sub, div)
    wide = padded.meta["val"].shape[1]
    narrow: Node | None = None
    for user in list(div.users):
        if _widen_consumer(builder, user, div, padded, int(wide)):
            continue
        if narrow is None:
            with builder.in_place_of(div):
                narrow = builder.call(aten.slice.Tensor, padded, 1, 0, channels)
        user.replace_input_with(div, narrow)
    captured.stem = stem
    return 1


def _normalisation(captured: Captured) -> tuple[Node, Node] | None:
    """``(encoded - mean) / std`` where nothing else reads the encoded image."""
    readers = [u for u in captured.encoded.users if u.target is not aten.sym_size.int]
    sub = readers[0] if len(readers) == 1 else None
    if sub is None or sub.target is not aten.sub.Tensor or sub.kwargs or sub.args[0] is not captured.encoded:
        return None
    div = _only_user(sub)
    if div is None or div.target is not aten.div.Tensor or div.args[0] is not sub:
        return None
    channels = captured.encoded.meta["val"].shape[1]
    for constant in (sub.args[1], div.args[1]):
        if not isinstance(constant, Node) or constant in captured.depends:
            return None
    # Its value was [N, 3 or 6, H, W]; the constants are per channel, in float32 at least.
    constants: Any = (sub.args[1], div.args[1])
    shapes = {tuple(c.meta["val"].shape) for c in constants}
    if len(shapes) != 1 or next(iter(shapes))[1:] != (1, 1) or channels not in (3, 6):
        return None
    return sub, div


def _widen_consumer(builder: GraphBuilder, user: Node, old: Node, padded: Node, wide: int) -> bool:
    """Let a convolution (or the padding before it) read the 8-channel image: its weights get zeros."""
    if user.target is bcos.conv2d_fused.default and user.args[0] is old and user.args[10] == 1:
        weight: Any = user.args[1]
        missing = wide - weight.meta["val"].shape[1]
        with builder.in_place_of(user):
            more = builder.call(aten.constant_pad_nd.default, weight, [0, 0, 0, 0, 0, missing])
        user.args = (padded, more, *user.args[2:])
        return True
    arguments: Any = user.args
    if user.target in (aten.pad.default, aten.constant_pad_nd.default) and len(arguments[1]) == 4:
        below = list(user.users)
        fused = all(u.target is bcos.conv2d_fused.default and u.args[10] == 1 for u in below)
        # Padded with another number, the channels that fill up to eight would enter the norm.
        if not fused or len(below) != 1 or bound_arguments(user)["value"]:
            return False
        with builder.in_place_of(user):
            new = builder.call(user.target, padded, *user.args[1:], **user.kwargs)
        return _widen_consumer(builder, below[0], user, new, wide)
    return False


# Where each producer returns its map, and its arguments (want_squares, groups or None for its own).
_MAPS: dict[Any, tuple[int, int, int | None]] = {
    bcos.conv2d_fused.default: (3, 16, None),
    bcos.max_pool2d.default: (2, 7, 8),
    bcos.avg_pool2d.default: (1, 6, 7),
    bcos.scale_act.default: (1, 4, 5),
}
# The same of rows [..., C], of which there is one sum each: (result, argument want_squares).
_ROW_MAPS: dict[Any, tuple[int, int]] = {bcos.layer_norm.default: (2, 4), bcos.linear_fused.default: (3, 12)}


def thread_squares(captured: Captured) -> int:
    """Give every B-cos convolution the map of sums of squares that the producer of its input writes beside it.

    Where the producer has none (a concatenation, a padding, a plain convolution), one op makes it, once for all
    consumers. Depthwise convolutions work their norms out themselves. Linear layers get the sums of their rows where
    the producer has them.
    """
    builder, count = captured.builder, 0
    made: dict[tuple[Node, int], Node] = {}
    for node in list(builder.graph.nodes):
        if node.target is bcos.linear_fused.default:
            x = node.args[0]
            producer = x.args[0] if x.target is operator.getitem and x.args[1] == 0 else x
            if producer.target in _ROW_MAPS:
                index, want = _ROW_MAPS[producer.target]
                node.args = (*node.args[:2], result(builder, producer, index, want), *node.args[3:])
                count += 1
            continue
        if node.target is not bcos.conv2d_fused.default or node.args[11] == 1:
            continue
        if _is_depthwise(node):
            continue
        x, groups = node.args[0], node.args[10]
        key = (x, groups)
        if key not in made:
            made[key] = _map_of(builder, x, groups)
        node.args = (*node.args[:2], made[key], *node.args[3:])
        count += 1
    return count


def _is_depthwise(node: Node) -> bool:
    """Whether a ``conv2d_fused`` has a group for each channel of its input, and several."""
    arguments: Any = node.args
    return bool(arguments[10] == arguments[0].meta["val"].shape[1] and arguments[10] != 1)


def _map_of(builder: GraphBuilder, x: Node, groups: int) -> Node:
    producer: Any = x.args[0] if x.target is operator.getitem and x.args[1] == 0 else x
    if producer.target is bcos.encode_image.default and groups == 1:
        return result(builder, producer, 1)
    if producer.target in _MAPS:
        index, want, by = _MAPS[producer.target]
        if by is None:
            # A depthwise convolution's map is of all its channels.
            own = 1 if _is_depthwise(producer) else producer.args[10]
        elif producer.args[want]:
            own = producer.args[by]
        else:
            set_arguments(builder, producer, {by: groups})
            own = groups
        if groups in (1, own):
            return result(builder, producer, index, want)
    with builder.graph.inserting_after(x):
        return builder.call(bcos.square_sum.default, x, groups)


def set_arguments(builder: GraphBuilder, node: Node, values: dict[int, Any]) -> None:
    """Change positional arguments of a node in place, and its fake value with them."""
    node.args = tuple(values.get(i, a) for i, a in enumerate(node.args))
    target: Any = node.target
    node.meta["val"] = builder.value(target, node.args, node.kwargs)
    for user in node.users:
        if user.target is operator.getitem:
            user.meta["val"] = node.meta["val"][user.args[1]]


def result(builder: GraphBuilder, node: Node, index: int, want: int | None = None) -> Node:
    """Result ``index`` of a node, asked for by setting its argument ``want``; taken off right behind it.

    Right behind it, since a tuple that is opened later keeps all of its results alive until then.
    """
    if want is not None and not node.args[want]:
        set_arguments(builder, node, {want: True})
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with builder.graph.inserting_after(node):
        item = builder.graph.call_function(operator.getitem, (node, index))
    item.meta.update({k: v for k, v in node.meta.items() if k in ("side", "nn_module_stack", "stack_trace")})
    item.meta["val"] = node.meta["val"][index]
    return item


# --- the explanation graph -------------------------------------------------------------------------------------------

# Where an adjoint op takes the epilogue's arguments: (multiplier, identity, gate, want_raw).
_EPILOGUE: dict[Any, tuple[int, int, int, int]] = {
    bcos.conv2d_transposed.default: (7, 8, 9, 10),
    bcos.linear_transposed.default: (2, 3, 4, 5),
    bcos.avg_pool2d_transposed.default: (7, 8, 9, 10),
    bcos.max_pool2d_transposed.default: (7, 8, 9, 10),
    bcos.transposed_epilogue.default: (1, 2, 3, 4),
}
_IDENTITY_ONLY: dict[Any, int] = {bcos.scale_act_transposed.default: 5, bcos.layer_norm_transposed.default: 3}


def _bare(node: Any) -> Node | None:
    """The adjoint op whose single, still epilogue-free result a node is."""
    if isinstance(node, Node) and node.target in _IDENTITY_ONLY and len(node.users) == 1:
        return node if node.args[_IDENTITY_ONLY[node.target]] is None else None
    if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != 0 or len(node.users) != 1:
        return None
    producer: Any = node.args[0]
    if producer.target not in _EPILOGUE or producer.target is bcos.transposed_epilogue.default:
        return None
    multiplier, _, gate, raw = _EPILOGUE[producer.target]
    plain = producer.args[multiplier] is None and producer.args[gate] is None and not producer.args[raw]
    return producer if plain and len(producer.users) == 1 else None


def _work(node: Node) -> int:
    """How much an adjoint op writes and computes, to choose which of two takes the other as its identity."""
    weight: Any = node.args[1] if len(node.args) > 1 else None
    is_gemm = node.target in (bcos.conv2d_transposed.default, bcos.linear_transposed.default)
    return int(weight.meta["val"].numel()) if is_gemm and isinstance(weight, Node) else 0


def fuse_identities(builder: GraphBuilder) -> int:
    """``T(g) + other`` becomes the adjoint op ``T`` with ``other`` as its identity."""
    count = 0
    for node in list(builder.graph.nodes):
        if (
            node.target is not aten.add.Tensor
            or node.meta.get("side") != "adjoint"
            or len(node.args) != 2
            or node.kwargs
        ):
            continue
        left, right = node.args
        if left is right or not all(isinstance(n, Node) and isinstance(n.meta["val"], torch.Tensor) for n in node.args):
            continue
        if left.meta["val"].shape != right.meta["val"].shape:
            continue
        options = [(_bare(n), n, o) for n, o in ((left, right), (right, left))]
        usable = [(t, n, o) for t, n, o in options if t is not None and _identity_free(t)]
        if not usable:
            continue
        producer, old, other = max(usable, key=lambda option: _work(option[0]))
        at = _EPILOGUE[producer.target][1] if producer.target in _EPILOGUE else _IDENTITY_ONLY[producer.target]
        args = tuple(other if i == at else a for i, a in enumerate(producer.args))
        with builder.in_place_of(node):
            target: Any = producer.target
            new = builder.call(target, *args)
            out = builder.call(operator.getitem, new, 0) if producer.target in _EPILOGUE else new
        _carry(new, producer, "fuse_identities", node)
        node.replace_all_uses_with(out)
        builder.graph.erase_node(node)
        if old is not producer:
            builder.graph.erase_node(old)
        builder.graph.erase_node(producer)
        count += 1
    return count


def _identity_free(node: Node) -> bool:
    at = _EPILOGUE[node.target][1] if node.target in _EPILOGUE else _IDENTITY_ONLY[node.target]
    return node.args[at] is None


def fuse_multipliers(builder: GraphBuilder) -> int:
    """An adjoint op followed by an epilogue takes over its multiplier, gate and un-multiplied result."""
    count = 0
    for node in list(builder.graph.nodes):
        if node.target is not bcos.transposed_epilogue.default or node.args[2] is not None:
            continue
        producer = _bare(node.args[0])
        if producer is None or producer.target not in _EPILOGUE:
            continue
        multiplier, _, gate, raw = _EPILOGUE[producer.target]
        taken = {multiplier: node.args[1], gate: node.args[3], raw: node.args[4]}
        args = tuple(taken.get(i, a) for i, a in enumerate(producer.args))
        with builder.in_place_of(node):
            target: Any = producer.target
            new = builder.call(target, *args)
        _carry(new, producer, "fuse_multipliers", node)
        old: Any = node.args[0]
        node.replace_all_uses_with(new)
        for dead in (node, old, producer):
            builder.graph.erase_node(dead)
        count += 1
    return count


def drop_copies(builder: GraphBuilder) -> int:
    """An epilogue that no adjoint op took over, without identity and gate: its second result is what it was given."""
    count = 0
    for node in list(builder.graph.nodes):
        if node.target is not bcos.transposed_epilogue.default:
            continue
        total, _, identity, gate, want_raw = node.args
        if identity is not None or gate is not None or not want_raw:
            continue
        for user in list(node.users):
            if user.args[1] == 1:
                user.replace_all_uses_with(total)
                builder.graph.erase_node(user)
        set_arguments(builder, node, {4: False})
        count += 1
    return count


def _carry(new: Node, old: Node, name: str, other: Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "side"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta["pass"] = name
    new.meta["fused_from"] = (*old.meta.get("fused_from", (str(old.target),)), str(other.target))


def fuse_contributions(builder: GraphBuilder) -> int:
    """The stem's transposed convolution with the weights, contributions and colours made of its result."""
    count = 0
    for node in list(builder.graph.nodes):
        if node.target is not bcos.image_contributions.default:
            continue
        grad, image, inverse_std, scale, want = node.args
        producer = _bare(grad)
        if producer is None or producer.target is not bcos.conv2d_transposed.default or not _identity_free(producer):
            continue
        g, weight, _, stride, padding, dilation, groups = producer.args[:7]
        if groups != 1:
            continue
        with builder.in_place_of(node):
            new = builder.call(
                bcos.conv2d_contributions.default, g, weight, image, inverse_std, stride, padding, dilation, scale, want
            )
        _carry(new, producer, "fuse_contributions", node)
        node.replace_all_uses_with(new)
        for dead in (node, grad, producer):
            builder.graph.erase_node(dead)
        count += 1
    return count

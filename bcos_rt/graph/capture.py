"""A network's forward pass as a flat graph of ATen ops (``torch.export``), with B-cos ops split into their parts."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from bcos_rt.errors import InvalidArgumentError, UnsupportedOpError
from bcos_rt.graph.attention import Attention, check_attention, lower_attention
from bcos_rt.nn.network import BcosNetwork

__all__ = ["Captured", "GraphBuilder", "bound_arguments", "capture", "eval_mode", "image_dependent", "module_of"]

aten = torch.ops.aten


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own flag restored outside."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


class _Encoded(nn.Module):
    def __init__(self, net: BcosNetwork, tokens: bool) -> None:
        super().__init__()
        self.net, self.tokens = net, tokens

    def forward(self, encoded: Tensor) -> Tensor:
        return self.net.tokens_encoded(encoded) if self.tokens else self.net.forward_encoded(encoded)


class GraphBuilder:
    """Appends nodes to a graph and works out their shapes on the way: every node gets a fake ``meta["val"]``."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.graph = Graph()
        self.fake_mode = fake_mode
        self.origin: Node | None = None  # the forward node new nodes are made for: they inherit its module stack
        self._side = "forward"

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Append ``target(*args, **kwargs)``; arguments are nodes or plain values."""
        return self._append(self.value(target, args, kwargs), target, args, kwargs)

    def value(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The fake value of a call."""
        values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        # The Python dispatcher keeps sizes symbolic where the C++ shape code would pin the batch (constant_pad_nd).
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            return target(*values[0], **values[1])

    @contextmanager
    def in_place_of(self, node: Node) -> Iterator[None]:
        """New nodes stand before ``node``, on its side of the graph and with its module stack."""
        side, origin = self._side, self.origin
        self._side, self.origin = node.meta.get("side", side), node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._side, self.origin = side, origin

    def call_like(self, like: Node, target: Callable[..., Any], *args: Any) -> Node:
        """:meth:`call` for an op whose result has ``like``'s shape and dtype: spares working them out."""
        return self._append(like.meta["val"], target, args, {})

    def _append(self, value: Any, target: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        node.meta["side"] = self._side
        if self.origin is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in self.origin.meta:
                    node.meta[key] = self.origin.meta[key]
        return node

    def placeholder(self, name: str, value: Any) -> Node:
        """Append an input with the given fake value."""
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        node.meta["side"] = self._side
        return node

    def begin_adjoint(self) -> None:
        """Nodes from here on belong to the adjoint (``meta["side"] == "adjoint"``)."""
        self._side = "adjoint"


@dataclass
class Captured:
    """A captured forward pass.

    Attributes:
        builder: the graph so far; its placeholders are the parameters, then ``encoded``.
        parameter_names: one name per parameter placeholder, as in ``net.named_parameters()``/``named_buffers()``.
        constants: values of the names that are neither parameter nor buffer.
        encoded: the image placeholder, [N, C, H, W] with a symbolic N.
        logits: the output node, [N, classes], or unit tokens [N, T, D] where those were captured.
        depends: forward nodes whose value depends on the image.
        stem: the op that encodes and normalises the image, once a fusion pass has made one.
        entry: the encoded image where a pass computes it in the graph: the adjoint ends there, else at ``encoded``.
    """

    builder: GraphBuilder
    parameter_names: tuple[str, ...]
    parameter_nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    encoded: Node
    logits: Node
    depends: set[Node]
    stem: Node | None = None
    entry: Node | None = None


def module_of(node: Node, unknown: str = "the network") -> str:
    """Name of the module a node came from: ``backbone.layer1.0.conv1``; ``unknown`` where it has none."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values() if entry[0]]
    return names[-1].removeprefix("net.") if names else unknown


def bound_arguments(node: Node) -> dict[str, Any]:
    """A node's arguments by the op schema's names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def _lower_conv2d(builder: GraphBuilder, a: Mapping[str, Any]) -> Node:
    x, weight = a["x"], a["weight"]
    geometry = (list(a["stride"]), list(a["padding"]), list(a["dilation"]))
    kernel = list(weight.meta["val"].shape[2:])
    z = builder.call(aten.conv2d.default, x, weight, a["bias"], *geometry, a["groups"])
    n = builder.call(torch.ops.bcos_rt.patch_norm.default, x, kernel, *geometry, a["groups"], a["eps"])
    m = builder.call(torch.ops.bcos_rt.dynamic_scale.default, z, n, a["b"], 1)
    return builder.call(aten.mul.Tensor, z, m)


def _lower_linear(builder: GraphBuilder, a: Mapping[str, Any]) -> Node:
    z = builder.call(aten.linear.default, a["x"], a["weight"], a["bias"])
    n = builder.call(torch.ops.bcos_rt.row_norm.default, a["x"], a["eps"])
    m = builder.call(torch.ops.bcos_rt.dynamic_scale.default, z, n, a["b"], -1)
    return builder.call(aten.mul.Tensor, z, m)


def _lower_view(builder: GraphBuilder, a: Mapping[str, Any]) -> Node:
    """A reshape: ops that are split into their parts may return other strides than the network's own view relies on."""
    return builder.call(aten.reshape.default, a["self"], a["size"])


def _lower_shaped_as(builder: GraphBuilder, a: Mapping[str, Any]) -> Node:
    """``view_as`` and ``reshape_as``; at most the batch is symbolic."""
    shape = [-1 if isinstance(size, torch.SymInt) else size for size in a["other"].meta["val"].shape]
    return builder.call(aten.reshape.default, a["self"], shape)


def _lower_average(builder: GraphBuilder, a: Mapping[str, Any]) -> Node:
    """``adaptive_avg_pool1d``: to one value it is the mean, other sizes stay."""
    if list(a["output_size"]) != [1]:
        return builder.call(aten.adaptive_avg_pool1d.default, a["self"], list(a["output_size"]))
    return builder.call(aten.mean.dim, a["self"], [-1], True)


def _lower_type_as(builder: GraphBuilder, a: Mapping[str, Any]) -> Node:
    """A cast; the dtypes of a captured network are known."""
    x, dtype = a["self"], a["other"].meta["val"].dtype
    return x if x.meta["val"].dtype == dtype else builder.call(aten._to_copy.default, x, dtype=dtype)


def _lower_flatten(builder: GraphBuilder, a: Mapping[str, Any]) -> Node:
    x = a["self"]
    shape = list(x.meta["val"].shape)
    start, end = a["start_dim"] % len(shape), a["end_dim"] % len(shape)
    merged = [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]]
    return builder.call(aten.reshape.default, x, [-1 if isinstance(size, torch.SymInt) else size for size in merged])


LOWERINGS: dict[Any, Callable[[GraphBuilder, Mapping[str, Any]], Node]] = {
    torch.ops.bcos_rt.conv2d.default: _lower_conv2d,
    torch.ops.bcos_rt.linear.default: _lower_linear,
    aten.flatten.using_ints: _lower_flatten,
    aten.type_as.default: _lower_type_as,
    aten.view.default: _lower_view,
    aten.view_as.default: _lower_shaped_as,
    aten.reshape_as.default: _lower_shaped_as,
    aten.adaptive_avg_pool1d.default: _lower_average,
    aten.scaled_dot_product_attention.default: lower_attention,
}


# Ops that take only the shape of their tensor: constants.
_SHAPE_ONLY = {
    aten.sym_size.int, aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default,
}  # fmt: skip
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)


@contextmanager
def _without_fake_cache() -> Iterator[None]:
    """Fake modes that are made inside work every result out, for as long as they live.

    A hit of torch's cache of fake results makes a tensor of symbolic sizes anew, which costs more than most ops' own
    shapes, and a miss makes it twice: without, a DenseNet's explanation graph is made in two thirds of the time.
    """
    import torch._dynamo.config  # where it is imported costs a second: not before it is needed

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


def _does_nothing(node: Node) -> bool:
    """Casts to the dtype a tensor has, and dropout in evaluation mode."""
    if node.target is aten.to.dtype:
        return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)  # type: ignore[union-attr]
    return node.target in _DROPOUTS and not bound_arguments(node)["train"]


def _functionalize(graph: Graph) -> bool:
    """Replace in-place ops (``relu_``, ``add_``) by their functional twins; False, and nothing changed, if not sure.

    Exact for a straight-line graph in which no mutated tensor has a view: later readers of the tensor read the op's
    result instead. It saves the second trace of ``run_decompositions({})``, half of the time of a capture.
    """
    mutating: list[tuple[Node, Any]] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node.target is operator.getitem:
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        if not node.target._schema.is_mutable:
            continue
        written = node.args[0]
        packet = getattr(aten, node.target._schema.name.removeprefix("aten::").removesuffix("_"), None)
        twin = getattr(packet, node.target._overloadname, None)
        if twin is None or not isinstance(written, Node) or written.op == "placeholder":
            return False
        inactive = twin in _DROPOUTS and not bound_arguments(node)["train"]  # writes nothing, views or not
        if not inactive and any(_is_view(n) for n in (written, *written.users)):
            return False
        mutating.append((node, twin))
    for node, twin in mutating:
        written = node.args[0]
        node.target = twin
        seen = False
        for other in graph.nodes:
            if seen and written in other.all_input_nodes:
                other.replace_input_with(written, node)
            seen = seen or other is node
    return True


def _is_view(node: Node) -> bool:
    """Whether an op may return its input's memory (its schema says so; an in-place op's result is no view here)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    schema = node.target._schema
    return not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def capture(
    net: BcosNetwork, image_size: tuple[int, int], *, tokens: bool = False, attention: Attention = "store"
) -> Captured:
    """Capture ``net.forward_encoded`` in evaluation mode for images of one size and any batch.

    B-cos ops become ``z``, norm, multiplier ``m`` and ``z * m``, so that the adjoint can hold ``m`` constant.

    Args:
        tokens: capture ``net.tokens_encoded`` instead, of a network with an embedding.
        attention: how the softmax of ``scaled_dot_product_attention`` is had in the adjoint; see
            :mod:`bcos_rt.graph.attention`. "store" leaves standard ops alone.

    Raises:
        UnsupportedOpError: ``torch.export`` could not capture the network; the message carries its reason.
        InvalidArgumentError: the network's own, of what it does not take; another name for ``attention``.
    """
    check_attention(attention)
    like = next(net.parameters(), net.encoding.mean)
    example = torch.rand(2, net.encoding.channels, *image_size, dtype=like.dtype, device=like.device)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    try:
        # Autocast around the call would be captured as casts; the graph is made for the network's own dtype.
        with eval_mode(net), torch.autocast(like.device.type, enabled=False), _without_fake_cache():
            program = torch.export.export(
                _Encoded(net, tokens).eval(), (example,), dynamic_shapes=({0: batch},), strict=False
            )
            if not _functionalize(program.graph):
                program = program.run_decompositions({})
    except InvalidArgumentError:
        raise  # the network itself says what it does not take, such as an image size
    except Exception as error:  # torch.export raises many kinds; the user needs its first line and the whole as cause
        size = f"{image_size[0]}x{image_size[1]}"
        refusal = _refusal(_Encoded(net, tokens), example)
        if refusal is not None:
            got = f"size {size}, on which the network fails ({_first_line(refusal)})"
            raise InvalidArgumentError("images", got, "a size that it takes") from refusal
        raise UnsupportedOpError(
            f"the network cannot be captured by torch.export for {size} images with a dynamic batch: "
            f"{_first_line(error)}"
        ) from error

    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    builder = GraphBuilder(next(v.fake_mode for v in values if hasattr(v, "fake_mode")))
    mapping: dict[Node, Node] = {}
    names: list[str] = []
    parameter_nodes: list[Node] = []
    constants: dict[str, Tensor] = {}
    encoded: Node | None = None
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            continue
        name = str(spec.target).removeprefix("net.")
        if spec.kind == InputKind.CONSTANT_TENSOR:
            name = f"constant:{name}"
            constants[name] = program.constants[str(spec.target)]
        mapping[node] = builder.placeholder(node.name, node.meta["val"])
        names.append(name)
        parameter_nodes.append(mapping[node])
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            encoded = mapping[node] = builder.placeholder("encoded", node.meta["val"])
    if encoded is None:
        raise UnsupportedOpError("the captured network does not use its image")

    images = encoded.meta["val"].shape[0].node.expr
    lowerings = LOWERINGS
    if attention != "store":
        chosen = functools.partial(lower_attention, choice=attention, batch=images)
        lowerings = {**LOWERINGS, aten.scaled_dot_product_attention.default: chosen}
    logits: Node | None = None
    for node in program.graph.nodes:
        if node.op == "call_function":
            builder.origin = node
            if node.target in lowerings:
                arguments = torch.fx.node.map_arg(bound_arguments(node), lambda n: mapping[n])
                mapping[node] = lowerings[node.target](builder, arguments)
            elif node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
                continue
            elif _does_nothing(node):
                mapping[node] = mapping[node.args[0]]
            else:
                mapping[node] = builder.graph.node_copy(node, lambda n: mapping[n])
                mapping[node].meta["side"] = "forward"
        elif node.op == "output":
            outputs = node.args[0]
            if len(outputs) != 1 or outputs[0].meta["val"].ndim != (3 if tokens else 2):
                expected = "unit tokens, [N, T, D]" if tokens else "logits, [N, classes]"
                raise UnsupportedOpError(f"the network must return one tensor of {expected}")
            logits = mapping[outputs[0]]
    builder.origin = None
    if logits is None:
        raise UnsupportedOpError("the captured network returns nothing")

    depends = image_dependent(builder.graph, encoded)
    return Captured(builder, tuple(names), tuple(parameter_nodes), constants, encoded, logits, depends)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _refusal(net: nn.Module, encoded: Tensor) -> Exception | None:
    """What a network raises for images by itself, without torch.export."""
    try:
        with eval_mode(net), torch.no_grad():
            net(encoded)
    except Exception as error:  # whatever its layers raise
        return error
    return None


def image_dependent(graph: Graph, image: Node) -> set[Node]:
    """The nodes whose value depends on the image."""
    depends: set[Node] = {image}
    for node in graph.nodes:
        if node.target not in _SHAPE_ONLY and any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    return depends

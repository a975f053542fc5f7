"""The source model as a graph of module calls (``torch.fx``), and what conversion needs to know about it.

Every model traces: a module whose forward cannot be followed symbolically becomes a leaf, one opaque call; in the worst
case that is the whole model and there is no graph (``Trace.graph`` is None).
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = [
    "Trace",
    "is_activation_call",
    "is_shape_query",
    "live_nodes",
    "owner_of",
    "timm_classes",
    "trace_model",
]

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def timm_classes(*names: str) -> tuple[type[nn.Module], ...]:
    """timm's layer classes of these names; empty when timm was never imported, as then no model can hold one."""
    found: list[type[nn.Module]] = []
    for module_name in ("timm.layers", "timm.layers.activations", "timm.layers.activations_me"):
        module = sys.modules.get(module_name)
        for name in names:
            cls = getattr(module, name, None)
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in found:
                found.append(cls)
    return tuple(found)


def is_torch_layer(module: nn.Module) -> bool:
    """Whether a module is (a subclass of) a layer of torch.nn, containers excluded."""
    return any(
        base.__module__.startswith(("torch.nn", "torch.ao.nn")) and base not in _CONTAINERS
        for base in type(module).__mro__
        if issubclass(base, nn.Module)
    )


# --- tracing ---------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What tracing found.

    Attributes:
        graph: Calls of leaf modules, named as in the model, and functions; one placeholder. None: nothing traced.
        opaque: Composite modules whose forward could not be followed, with the reason.
        mode_dependent: Whether the forward differs between train and eval mode in more than dropout, so that a
            recorded graph must not replace it.
        aliases: Every name of a module -> the name the graph uses (modules may be shared).
        constants: Tensors made in the forward, by the name the graph uses.
        calls: Call nodes of each leaf module by name.
    """

    graph: fx.Graph | None
    opaque: dict[str, str]
    mode_dependent: bool
    aliases: dict[str, str]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: dict[str, list[fx.Node]] = field(default_factory=dict)

    def calls_of(self, name: str) -> list[fx.Node] | None:
        """Calls of a module or of the leaf it is part of; None when the graph never calls it."""
        parts = name.split(".") if name else []
        for end in range(len(parts), -1, -1):
            nodes = self.calls.get(self.aliases.get(".".join(parts[:end]), ""))
            if nodes:
                return nodes
        return None


class _Wrapper(nn.Module):
    """Calls the model with the image alone: optional arguments of its forward keep their defaults."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.failed: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == "net":
            return False
        # torch.nn's own layers choose their path by self.training or by their arguments' types, subclasses with child
        # modules too (timm's BatchNormAct2d).
        return module_qualified_name in self.leaves or not any(m.children()) or is_torch_layer(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # The innermost module is noted first.
            self.failed.append(self.path_of_module(m))
            raise


def trace_model(model: nn.Module) -> Trace:
    """Trace a model's forward of one image tensor; train/eval modes are as before afterwards."""
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(m), name) for name, m in model.named_modules(remove_duplicate=False)}
    if not any(model.children()) or is_torch_layer(model):
        return Trace(None, {"": f"{type(model).__name__} is a single layer"}, False, aliases)
    modes = {m: m.training for m in model.modules()}
    leaves: set[str] = set()
    opaque: dict[str, str] = {}
    try:
        model.eval()
        constants: dict[str, torch.Tensor] = {}
        graph = _trace_with_leaves(model, leaves, opaque, constants)
        mode_dependent = False
        if graph is not None:
            model.train()
            other = _trace_with_leaves(model, set(leaves), {}, {})
            mode_dependent = other is None or _signature(other) != _signature(graph)
    finally:
        for module, mode in modes.items():
            module.training = mode
    trace = Trace(graph, opaque, mode_dependent, aliases, constants)
    for node in graph.nodes if graph is not None else ():
        if node.op == "call_module":
            trace.calls.setdefault(node.target, []).append(node)
    return trace


def _trace_with_leaves(
    model: nn.Module, leaves: set[str], opaque: dict[str, str], constants: dict[str, torch.Tensor]
) -> fx.Graph | None:
    """Trace, making the module at which tracing fails a leaf, until it succeeds; None when the model itself fails."""
    while True:
        tracer, wrapper = _Tracer(leaves), _Wrapper(model)
        try:
            graph = tracer.trace(wrapper)
        except Exception as error:
            culprit = next((name for name in tracer.failed if name not in leaves), "net")
            opaque[culprit.removeprefix("net").removeprefix(".")] = f"{type(error).__name__}: {error}".split("\n")[0]
            if culprit == "net":
                return None
            leaves.add(culprit)
            continue
        for node in graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and not target.startswith("net."):
                constants[target] = getattr(wrapper, target)
            elif node.op in ("call_module", "get_attr"):
                node.target = target.removeprefix("net.")
        return graph


DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
}


def dropout_arguments(node: fx.Node) -> tuple[Any, float]:
    """Input and probability of a functional dropout call."""
    source = node.args[0] if node.args else node.kwargs["input"]
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    return source, float(p)  # type: ignore[arg-type]


def _signature(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The graph as comparable values, without the training flag of dropout calls."""
    index = {node: i for i, node in enumerate(graph.nodes)}

    def plain(value: Any) -> str:
        return repr(fx.node.map_arg(value, lambda n: f"%{index[n]}"))

    rows: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in DROPOUTS:
            rows.append((node.op, node.target, plain(dropout_arguments(node))))
        else:
            rows.append((node.op, node.target, plain((node.args, dict(node.kwargs)))))
    return rows


def owner_of(node: fx.Node) -> str:
    """Name of the module in whose forward a node was recorded; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return str(names[-1]).removeprefix("net").removeprefix(".") if names else ""


# --- what a node computes --------------------------------------------------------------------------------------------

PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_"}
QUOTIENTS: set[Any] = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, torch.divide}
QUOTIENTS |= {"div", "div_", "true_divide", "divide"}
_MATMULS: set[Any] = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"}
_SUMS: set[Any] = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub"}
# Methods that take only the shape or type of their second tensor.
_AS: set[Any] = {"expand_as", "view_as", "reshape_as", "type_as"}
_SHAPES: set[Any] = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.numel, torch._assert}
_SHAPES |= {"size", "dim", "numel", "ndimension", "stride", "new_zeros", "new_ones", "new_empty", "new_full"}
_SQUASHING: set[Any] = {torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.softmax, F.softmax, torch.tanh, F.tanh}
_SQUASHING |= {torch.special.expit, torch.sigmoid_, torch.tanh_}
_SQUASHING |= {"sigmoid", "sigmoid_", "softmax", "tanh", "tanh_"}
_ACTIVATIONS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.prelu}
_ACTIVATIONS |= {torch.prelu, F.rrelu, F.rrelu_, F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.elu_, F.selu, F.selu_}
_ACTIVATIONS |= {F.celu, F.celu_, "relu", "relu_", "prelu"}
# What may stand between a gate's squashing function and the product: it only moves, pools or scales the gate.
_PASSING: set[Any] = {
    torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, torch.permute, torch.transpose, torch.mean, torch.sum,
    torch.chunk, torch.split, operator.getitem, F.interpolate, torch.broadcast_to, torch.unflatten,
    "reshape", "view", "view_as", "reshape_as", "expand", "expand_as", "unsqueeze", "unsqueeze_", "squeeze", "flatten",
    "permute", "transpose", "contiguous", "to", "type", "type_as", "float", "mean", "sum", "chunk", "split", "repeat",
    "unflatten", "clone", "detach",
}  # fmt: skip

_ACTIVATION_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.SELU,
    nn.CELU,
)  # fmt: skip
_TIMM_ACTIVATIONS = (
    "Swish", "SwishMe", "Mish", "MishMe", "HardSwish", "HardSwishMe", "HardMish", "HardMishMe", "GELU", "GELUTanh",
    "QuickGELU", "PReLU",
)  # fmt: skip
_SQUASHING_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Tanh)
_TIMM_SQUASHING = ("Sigmoid", "HardSigmoid", "HardSigmoidMe", "Tanh")
_PASSING_MODULES = (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten, nn.Upsample, nn.AdaptiveAvgPool2d)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is ReLU or one of its relatives (what ``activations="identity"`` removes)."""
    return isinstance(module, _ACTIVATION_MODULES + timm_classes(*_TIMM_ACTIVATIONS))


def is_activation_call(node: fx.Node) -> bool:
    """Whether a node is a functional ReLU or one of its relatives."""
    return node.op in ("call_function", "call_method") and node.target in _ACTIVATIONS


def is_shape_query(node: fx.Node) -> bool:
    """Whether a node reads an attribute of a tensor other than its values (shape, dtype, device)."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] not in ("T", "mT", "H", "mH", "data", "real")
    if node.op == "call_function" and node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_shape_query(node.args[0])
    if node.op in ("call_function", "call_method") and node.target in _SHAPES:
        return True
    # Arithmetic of sizes is a size.
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(is_shape_query(n) for n in inputs)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """Nodes whose values (not just shapes) a node uses."""
    if node.op == "call_method" and node.target in _AS:
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def image_dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on the pixels, not on the image's shape alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
            any(n in found for n in value_inputs(node)) and not is_shape_query(node) and node.op != "output"
        ):
            found.add(node)
    return found


def _is_call_of(node: fx.Node, modules: dict[str, nn.Module], classes: tuple[type[nn.Module], ...]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], classes)


def _gate_strength(node: fx.Node, modules: dict[str, nn.Module], depends: set[fx.Node]) -> int:
    """2 when the value ends in a sigmoid, softmax or tanh, 1 when it ends in an activation, else 0."""
    squashing = _SQUASHING_MODULES + timm_classes(*_TIMM_SQUASHING)
    while True:
        inputs = [n for n in value_inputs(node) if n in depends]
        if node.op == "call_module":
            if _is_call_of(node, modules, squashing):
                return 2
            if is_activation(modules[str(node.target)]):
                return 1
            passes = _is_call_of(node, modules, _PASSING_MODULES)
        elif node.op in ("call_function", "call_method"):
            if node.target in _SQUASHING:
                return 2
            if is_activation_call(node):
                return 1
            passes = node.target in _PASSING or node.target in _SUMS | PRODUCTS | QUOTIENTS
        else:
            return 0
        if not passes or len(inputs) != 1:
            return 0
        node = inputs[0]


def _linear_inputs(node: fx.Node, modules: dict[str, nn.Module], depends: set[fx.Node]) -> Iterator[fx.Node]:
    """Inputs in which a node is linear (others held constant); every one where that is not known."""
    inputs = [n for n in value_inputs(node) if n in depends]
    call = node.op in ("call_function", "call_method")
    if call and len(inputs) == 2 and (node.target in PRODUCTS or node.target in _MATMULS):
        strengths = [_gate_strength(n, modules, depends) for n in inputs]
        # Ambiguous products (both or neither a gate) are followed into both operands.
        if strengths[0] != strengths[1]:
            yield inputs[0 if strengths[0] < strengths[1] else 1]
            return
    elif call and len(inputs) == 2 and node.target in QUOTIENTS:
        yield inputs[0]
        return
    elif call and node.target is F.scaled_dot_product_attention:
        value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value")
        if isinstance(value, fx.Node):
            yield value
            return
    yield from inputs


def live_nodes(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Nodes through which the output is (held) linear in the image: all image-dependent ones but the gate branches.

    Walks from the output backwards. At a product of two image-dependent values the operand that ends in a sigmoid,
    softmax or tanh, or else in an activation, is a gate and not entered; a quotient is entered at its numerator,
    attention at its values.
    """
    depends = image_dependent(graph)
    output = next(n for n in graph.nodes if n.op == "output")
    live: set[fx.Node] = set()
    todo = [n for n in output.all_input_nodes if n in depends]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(_linear_inputs(node, modules, depends))
    return live


# --- the stem --------------------------------------------------------------------------------------------------------

# What keeps [x, -x] what it is: ops f with f(-x) = -f(x), channel by channel.
_ODD: set[Any] = {"contiguous", "to", "float", "double", "half", "clone", "type_as", F.interpolate, F.avg_pool2d}
_ODD_MODULES = (nn.Identity, nn.AvgPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)


def _is_odd(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _ODD_MODULES)
    if node.target is F.pad:
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return value in (None, 0)
    if node.target in PRODUCTS or node.target in QUOTIENTS:
        numbers = [isinstance(a, int | float) for a in node.args[:2]]
        return numbers == [False, True] or (numbers == [True, False] and node.target in PRODUCTS)
    return node.op in ("call_function", "call_method") and node.target in _ODD


def image_consumers(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """Nodes that take the image itself (or the image after ops that act on ``x`` and ``-x`` alike)."""
    image = {n for n in graph.nodes if n.op == "placeholder"}
    found: list[fx.Node] = []
    for node in graph.nodes:
        if any(n in image for n in node.all_input_nodes) and not is_shape_query(node):
            if _is_odd(node, modules):
                image.add(node)
            else:
                found.append(node)
    return found


def sole_input(node: fx.Node) -> fx.Node | None:
    """The input of a node that takes exactly one tensor (sizes aside), else None."""
    inputs: Sequence[fx.Node] = [n for n in node.all_input_nodes if not is_shape_query(n) and n.op != "get_attr"]
    return inputs[0] if len(inputs) == 1 else None

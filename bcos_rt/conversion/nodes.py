"""What the nodes of a traced model compute: activations, gates, pools, the path that is linear in the image."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = [
    "DROPOUTS",
    "attention_projections",
    "describe",
    "describe_node",
    "dropout_arguments",
    "erase_with_sizes",
    "first_linear",
    "global_average",
    "image_consumers",
    "image_dependent",
    "is_activation",
    "is_activation_call",
    "is_dropout",
    "is_flatten",
    "is_identity",
    "is_last_use",
    "is_layer_norm",
    "is_shape_query",
    "live_nodes",
    "loose_biases",
    "max_pool_options",
    "node_name",
    "out_of_place",
    "owner_of",
    "pools_channels_last",
    "returns_tensor",
    "single_use",
    "sole_input",
    "timm_classes",
    "value_inputs",
    "weights_read",
    "writes_to_input",
]


def timm_classes(*names: str) -> tuple[type[nn.Module], ...]:
    """timm's layer classes of these names; empty when timm was never imported, as then no model can hold one."""
    found: list[type[nn.Module]] = []
    for part in ("", ".activations", ".activations_me", ".adaptive_avgmax_pool"):
        module = sys.modules.get(f"timm.layers{part}")
        for name in names:
            cls = getattr(module, name, None)
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in found:
                found.append(cls)
    return tuple(found)


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


def owner_of(node: fx.Node) -> str:
    """Name of the module in whose forward a node was recorded; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return str(names[-1]).removeprefix("net").removeprefix(".") if names else ""


def returns_tensor(graph: fx.Graph) -> bool:
    """Whether a graph's output is the value of one node."""
    return isinstance(next(n for n in graph.nodes if n.op == "output").args[0], fx.Node)


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
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "itemsize", "nbytes"}
_SQUASHING: set[Any] = {torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.softmax, F.softmax, torch.tanh, F.tanh}
_SQUASHING |= {torch.special.expit, torch.sigmoid_, torch.tanh_}
_SQUASHING |= {"sigmoid", "sigmoid_", "softmax", "tanh", "tanh_"}
_SQUASHING |= {torch.linalg.vector_norm, torch.linalg.norm, torch.norm, "norm"}
_ACTIVATIONS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.prelu}
_ACTIVATIONS |= {torch.prelu, F.rrelu, F.rrelu_, F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.elu_, F.selu, F.selu_}
_ACTIVATIONS |= {F.celu, F.celu_, "relu", "relu_", "prelu"}
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}  # fmt: skip
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


def out_of_place(node: fx.Node) -> tuple[Any, dict[str, Any]] | None:
    """Target and keyword arguments of the same call that writes to no operand; None where it writes to none."""
    if node.op not in ("call_function", "call_method"):
        return None
    kwargs = dict(node.kwargs)
    if kwargs.get("inplace") is True:
        return node.target, {**kwargs, "inplace": False}
    if node.target in _OUT_OF_PLACE:
        return _OUT_OF_PLACE[node.target], kwargs
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    plain = name.removesuffix("_")
    homes = (torch.Tensor,) if node.op == "call_method" else (F, torch)
    home = next((home for home in homes if hasattr(home, plain)), None)
    if home is None:
        return None
    return plain if node.op == "call_method" else getattr(home, plain), kwargs


def is_last_use(node: fx.Node, operand: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node's result is used, and nothing that runs after it sees ``operand`` or what shares its memory."""
    order = list(node.graph.nodes)
    after = set(order[order.index(node) + 1 :])
    value: fx.Node | None = operand
    while value is not None:
        if not after.isdisjoint(value.users):
            return False
        value = sole_input(value) if _may_share_memory(value, modules) else None
    return bool(node.users)


def writes_to_input(module: nn.Module) -> bool:
    """Whether a module is told to write to its input (``nn.ReLU(inplace=True)``)."""
    return getattr(module, "inplace", False) is True


def _may_share_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node's result may lie in its input's memory."""
    if node.op == "call_module":
        return _is_call_of(node, modules, _PASSING_MODULES) or writes_to_input(modules[str(node.target)])
    return node.target in _PASSING or is_dropout(node, modules) or out_of_place(node) is not None


def is_shape_query(node: fx.Node) -> bool:
    """Whether a node reads an attribute of a tensor other than its values (shape, dtype, device)."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _ATTRIBUTES
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
    """2 when the value ends in a sigmoid, softmax, tanh or norm, 1 when it ends in an activation, else 0."""
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
        # A quotient of two such values is what its numerator is (a norm over the mean of norms).
        quotient = node.op != "call_module" and node.target in QUOTIENTS and len(inputs) == 2
        if not passes or (len(inputs) != 1 and not quotient):
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
    softmax, tanh or norm, or else in an activation, is a gate and not entered; a quotient is entered at its numerator,
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


# --- attention -------------------------------------------------------------------------------------------------------

_SOFTMAXES: set[Any] = {torch.softmax, F.softmax, "softmax"}


def attention_projections(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[str]:
    """Names of the linear layers that make the queries, keys and values of attention.

    Attention is ``scaled_dot_product_attention``, or a product with the result of a softmax of a product.
    """
    depends = image_dependent(graph)
    found: set[str] = set()
    for node in graph.nodes:
        operands: list[Any] = []
        if node.target is F.scaled_dot_product_attention:
            operands = [_argument(node, i, name, None) for i, name in enumerate(("query", "key", "value"))]
        elif node.op in ("call_function", "call_method") and node.target in _MATMULS and len(node.args) == 2:
            softmaxes = [_softmax_behind(n, modules, depends) for n in node.args]
            if [s is None for s in softmaxes].count(False) == 1:
                place = 0 if softmaxes[0] is not None else 1
                product = _product_behind(softmaxes[place], modules, depends)
                operands = [node.args[1 - place], *(product.args[:2] if product is not None else ())]
        for operand in operands:
            if isinstance(operand, fx.Node):
                found |= _projections_behind(operand, modules, depends)
    return found


def _walks_on(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node only moves, scales or normalises values of one tensor."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        norms = (nn.LayerNorm, nn.RMSNorm, *timm_classes("LayerNorm", "RmsNorm"))
        return isinstance(module, (*_PASSING_MODULES, *norms)) or next(module.parameters(), None) is None
    known = _PASSING | PRODUCTS | QUOTIENTS | _SUMS | _MASKS
    return node.op in ("call_function", "call_method") and node.target in known


_MASKS: set[Any] = {torch.masked_fill, "masked_fill", torch.unbind, "unbind", torch.cat, torch.stack, operator.neg}
_MASKS |= {F.dropout, torch.dropout, F.normalize, torch.where, "neg"}


def _softmax_behind(node: Any, modules: dict[str, nn.Module], depends: set[fx.Node]) -> fx.Node | None:
    while isinstance(node, fx.Node) and node in depends:
        if node.target in _SOFTMAXES or _is_call_of(node, modules, (nn.Softmax,)):
            return node
        inputs = [n for n in value_inputs(node) if n in depends]
        if len(inputs) != 1 or not _walks_on(node, modules):
            return None
        node = inputs[0]
    return None


def _product_behind(node: fx.Node | None, modules: dict[str, nn.Module], depends: set[fx.Node]) -> fx.Node | None:
    """The ``q k^T`` that a softmax is taken of."""
    while node is not None:
        inputs = [n for n in value_inputs(node) if n in depends]
        if node.op != "call_module" and node.target in _MATMULS:
            return node if len(inputs) == 2 else None
        is_softmax = node.target in _SOFTMAXES or _is_call_of(node, modules, (nn.Softmax,))
        if len(inputs) != 1 or not (is_softmax or _walks_on(node, modules)):
            return None
        node = inputs[0]
    return None


def _projections_behind(node: fx.Node, modules: dict[str, nn.Module], depends: set[fx.Node]) -> set[str]:
    """Linear layers whose results, moved and scaled (rotary embeddings add two of one layer's), are ``node``."""
    todo, seen, found = [node], set(), set()
    while todo:
        one = todo.pop()
        if one in seen or one not in depends:
            continue
        seen.add(one)
        if one.op == "call_module" and isinstance(modules[str(one.target)], nn.Linear):
            found.add(str(one.target))
        elif one.target is F.linear:
            weight = _argument(one, 1, "weight", None)
            name = str(weight.target).rpartition(".")[0] if isinstance(weight, fx.Node) else ""
            if isinstance(modules.get(name), nn.Linear):
                found.add(name)
        elif _walks_on(one, modules):
            todo.extend(value_inputs(one))
    # More than one layer: a sum in between was the residual stream, and nothing is the projection of this operand.
    return found if len(found) == 1 else set()


# --- layers whose weights the forward reads itself -------------------------------------------------------------------


def weights_read(graph: fx.Graph) -> set[str]:
    """Names of the modules whose ``weight`` a forward reads, as in ``F.linear(x, self.qkv.weight)``."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    return {name.rpartition(".")[0] for name in read if name.endswith(".weight")}


def loose_biases(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[str]:
    """Names of tensors that are added to a projection's result, as its bias is, without being a layer's own bias.

    ``F.linear(x, weight, torch.cat((q_bias, k_bias, v_bias)))``, and ``layer(x) + bias``.
    """
    depends = image_dependent(graph)
    found: set[str] = set()
    for node in graph.nodes:
        bias: Any = None
        if node.target in (F.linear, F.conv2d):
            bias = _argument(node, 2, "bias", None)
        elif node.op != "call_module" and node.target in _SUMS and len(node.args) == 2:
            projected, bias = node.args
            if not _is_projection(projected, modules):
                continue
        if isinstance(bias, fx.Node) and bias not in depends:
            found |= _tensors_behind(bias, node)
    layers = {name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {name for name in found if name.rpartition(".")[0] not in layers}


def _is_projection(node: Any, modules: dict[str, nn.Module]) -> bool:
    if not isinstance(node, fx.Node):
        return False
    return node.target in (F.linear, F.conv2d) or _is_call_of(node, modules, (nn.Linear, nn.Conv2d))


def _tensors_behind(value: fx.Node, user: fx.Node) -> set[str]:
    """Names of the tensors an expression is made of, where nothing else uses them."""
    names: set[str] = set()
    todo: list[tuple[fx.Node, fx.Node]] = [(value, user)]
    while todo:
        node, reader = todo.pop()
        if set(node.users) != {reader}:
            return set()
        if node.op == "get_attr":
            names.add(str(node.target))
        todo += [(source, node) for source in node.all_input_nodes]
    return names


# --- the stem --------------------------------------------------------------------------------------------------------

# What keeps [x, -x] what it is: ops f with f(-x) = -f(x), channel by channel.
_ODD: set[Any] = {"contiguous", "to", "float", "double", "half", "clone", "type_as", F.interpolate, F.avg_pool2d}
_ODD_MODULES = (nn.Identity, nn.AvgPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)


def _is_odd(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if is_dropout(node, modules):
        return True
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


def first_linear(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The call of a linear layer to which an image goes through shape operations alone, from its consumer ``node``."""
    while True:
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, nn.Linear):
                return node
            if next(module.parameters(), None) is not None:
                return None
        elif node.op not in ("call_function", "call_method") or node.target not in _PASSING:
            return None
        users = [user for user in node.users if not is_shape_query(user)]
        if len(users) != 1:
            return None
        node = users[0]


def sole_input(node: fx.Node) -> fx.Node | None:
    """The input of a node that takes exactly one tensor (sizes aside), else None."""
    inputs: Sequence[fx.Node] = [n for n in node.all_input_nodes if not is_shape_query(n) and n.op != "get_attr"]
    return inputs[0] if len(inputs) == 1 else None


# --- the classifier and the pools ------------------------------------------------------------------------------------


def describe(module: nn.Module) -> str:
    if any(module.children()):
        return type(module).__name__ + "(...)"
    return repr(module)


def describe_node(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return describe(modules[str(node.target)])
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    # F.max_pool2d and its like are anonymous dispatchers.
    return (node.name if target == "fn" else str(target)) + "()"


def node_name(node: fx.Node) -> str:
    """The module's name, or ``owner.node`` for a functional call."""
    if node.op == "call_module":
        return str(node.target)
    owner = owner_of(node)
    return f"{owner}.{node.name}" if owner else node.name


def single_use(node: fx.Node) -> bool:
    """Whether a node's values are used once (asking for its shape does not count)."""
    return sum(not is_shape_query(user) for user in node.users) == 1


def erase_with_sizes(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        erase_with_sizes(graph, user)
    graph.erase_node(node)


def is_identity(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.Identity)
    return node.op == "call_method" and node.target in ("contiguous", "clone")


def is_dropout(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.Dropout
    return node.op == "call_function" and node.target in (F.dropout, torch.dropout)


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_flatten(node: fx.Node, modules: dict[str, nn.Module], features: int | None) -> bool:
    """Whether a node turns [N, C, 1, 1] (or [N, C]) into [N, C]; ``features`` is C, None accepts any constant."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) in ((1, -1), (1, 3))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in (torch.flatten, "flatten"):
        return _argument(node, 1, "start_dim", 0) == 1 and _argument(node, 2, "end_dim", -1) in (-1, 3)
    if node.target in (torch.squeeze, "squeeze"):
        dims = _argument(node, 1, "dim", ())
        return set(dims if isinstance(dims, tuple | list) else (dims,)) <= {-1, -2, 2, 3}
    if node.target in (torch.reshape, "reshape", "view"):
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
        if len(sizes) != 2:
            return False
        batch: Any = sizes[0]
        channels: Any = sizes[1]
        if isinstance(batch, fx.Node):
            return channels == -1 or isinstance(channels, fx.Node) or _is_channels(channels, features)
        return batch == -1 and _is_channels(channels, features)
    if node.target is operator.getitem:
        rest = node.args[1]
        return isinstance(rest, tuple) and rest in (
            (slice(None), slice(None), 0, 0),
            (..., 0, 0),
        )
    return False


def _is_channels(size: object, features: int | None) -> bool:
    return isinstance(size, int) and (features is None or size == features)


def _pooled_dims(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[list[int], bool] | None:
    """The dimensions a node averages away, and whether they are gone after it; None when it is no average over all."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return ([2, 3], False) if module.output_size in (1, (1, 1), [1, 1]) else None
        if isinstance(module, timm_classes("FastAdaptiveAvgPool")):
            return [int(d) for d in module.dim], bool(module.flatten)  # type: ignore[union-attr]
        return None
    if node.target is F.adaptive_avg_pool2d:
        return ([2, 3], False) if _argument(node, 1, "output_size", None) in (1, (1, 1), [1, 1]) else None
    if node.op in ("call_function", "call_method") and node.target in (torch.mean, "mean"):
        dims = _argument(node, 1, "dim", ())
        given = list(dims) if isinstance(dims, tuple | list) else [dims]
        if given and all(type(d) is int for d in given):
            return given, not _argument(node, 2, "keepdim", False)
    return None


def pools_channels_last(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node averages all tokens [N, T, C], or is a layer that averages all places [N, H, W, C]."""
    pooled = _pooled_dims(node, modules)
    return pooled is not None and (pooled[0] in ([1], [-2]) or (node.op == "call_module" and pooled[0] == [1, 2]))


def global_average(node: fx.Node, modules: dict[str, nn.Module]) -> bool | None:
    """None when a node is no global average pool; else whether it returns [N, C]."""
    pooled = _pooled_dims(node, modules)
    if pooled is None:
        return None
    if pools_channels_last(node, modules) or sorted(d % 4 for d in pooled[0]) == [2, 3]:
        return pooled[1]
    return None


def is_layer_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a LayerNorm over the last dimension."""
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    known = type(module) is nn.LayerNorm or type(module) in timm_classes("LayerNorm")
    return known and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def max_pool_options(node: fx.Node, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """A max-pool's options by name; None when one of them is computed."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module":
        return {name: getattr(modules[str(node.target)], name) for name in names}
    defaults = (None, None, 0, 1, False, False)
    values = {name: _argument(node, i + 1, name, d) for i, (name, d) in enumerate(zip(names, defaults, strict=True))}
    if values["kernel_size"] is None or any(isinstance(v, fx.Node) for v in values.values()):
        return None
    # torch.max_pool2d takes an empty stride for "as the kernel".
    values["stride"] = values["stride"] or values["kernel_size"]
    if isinstance(values["dilation"], list):
        values["dilation"] = tuple(values["dilation"])
    return values

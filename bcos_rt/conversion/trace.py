"""The source model as a graph of module calls (``torch.fx``), and what conversion needs to know about it.

Every model traces: a module whose forward cannot be followed symbolically becomes a leaf, one opaque call; in the worst
case that is the whole model and there is no graph (``Trace.graph`` is None).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from bcos_rt.conversion.nodes import DROPOUTS, dropout_arguments
from bcos_rt.errors import InvalidTypeError
from bcos_rt.nn.attention import PROJECTIONS
from bcos_rt.nn.outputs import main_output

__all__ = ["Trace", "is_torch_layer", "trace_model"]

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def is_torch_layer(module: nn.Module) -> bool:
    """Whether a module is (a subclass of) a layer of torch.nn, containers excluded."""
    return any(
        base.__module__.startswith(("torch.nn", "torch.ao.nn")) and base not in _CONTAINERS
        for base in type(module).__mro__
        if issubclass(base, nn.Module)
    )


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
        recorded: Whether the graph is a record of one run (:mod:`bcos_rt.conversion.record`), with that image's sizes.
    """

    graph: fx.Graph | None
    opaque: dict[str, str]
    mode_dependent: bool
    aliases: dict[str, str]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: dict[str, list[fx.Node]] = field(default_factory=dict)
    recorded: bool = False

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
        output = self.net(x)
        try:
            return main_output(output)
        except InvalidTypeError:
            return output


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[str] | None = None) -> None:
        super().__init__()
        self.leaves = leaves or set()  # the default is for unpickling a rewritten network, which makes a tracer
        self.failed: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == "net":
            return False
        # torch.nn's own layers choose their path by self.training or by their arguments' types, subclasses with child
        # modules too (timm's BatchNormAct2d).
        is_ours = type(m) in PROJECTIONS
        return module_qualified_name in self.leaves or not any(m.children()) or is_torch_layer(m) or is_ours

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

"""A program: a flat graph from image and targets to named outputs, with the values of its constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from bcos_rt.graph.capture import module_of

__all__ = ["MemoryPlan", "Program", "Watched", "fold_constants", "memory_plan", "propagate"]


@dataclass
class Program:
    """A flat graph, the values of its constants, and what goes in and out.

    Attributes:
        graph: placeholders are the constants, then ``image``, then ``targets``; every node has a fake
            ``meta["val"]`` with a symbolic batch N (and K classes per image).
        constants: value of each constant placeholder.
        names: a name for each constant, for a reader.
        image: the image placeholder.
        targets: the placeholder of what is explained, class ids int64 [N(, K)] or text embeddings [N(, K), D]; None for
            a forward pass alone.
        outputs: node by output name.
    """

    graph: Graph
    constants: dict[Node, Tensor]
    names: dict[Node, str]
    image: Node
    targets: Node | None
    outputs: dict[str, Node] = field(default_factory=dict)
    _made: int = 0

    def add_constant(self, value: Tensor, name: str, fake_like: Node) -> Node:
        """A new constant placeholder with a fake value."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"added_constant_{self._made}")
        self._made += 1
        with fake_like.meta["val"].fake_mode:
            node.meta["val"] = torch.empty_strided(
                tuple(value.shape), value.stride(), dtype=value.dtype, device=value.device
            )
        self.constants[node] = value
        self.names[node] = self._free_name(name)
        return node

    def _free_name(self, name: str) -> str:
        used, candidate, n = set(self.names.values()), name, 1
        while candidate in used:
            n += 1
            candidate = f"{name}_{n}"
        return candidate

    def set_outputs(self, outputs: Mapping[str, Node]) -> None:
        """Choose the outputs; what only led to others is removed."""
        for node in list(self.graph.nodes):
            if node.op == "output":
                self.graph.erase_node(node)
        self.outputs = dict(outputs)
        self.graph.output(self.outputs)
        self.clean()

    def clean(self) -> None:
        """Remove dead nodes and constants nothing uses."""
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
        for node in [n for n in self.constants if not n.users]:
            del self.constants[node], self.names[node]
            self.graph.erase_node(node)

    def copy(self) -> Program:
        """A program of its own nodes, sharing the constants' memory."""
        graph, copies = Graph(), dict[Node, Node]()
        for node in self.graph.nodes:
            if node.op == "output":
                continue
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        outputs = {name: copies[node] for name, node in self.outputs.items()}
        graph.output(outputs)
        return Program(
            graph,
            {copies[node]: value for node, value in self.constants.items()},
            {copies[node]: name for node, name in self.names.items()},
            copies[self.image],
            None if self.targets is None else copies[self.targets],
            outputs,
            self._made,
        )

    def feed(self, image: Tensor, targets: Tensor | None) -> list[Tensor | None]:
        """What the graph's placeholders take, in their order."""
        given = {self.image: image, self.targets: targets}
        return [self.constants.get(n, given.get(n)) for n in self.graph.nodes if n.op == "placeholder"]

    def run(
        self, image: Tensor, targets: Tensor | None, watch: Callable[[Node, Any], None] | None = None
    ) -> dict[str, Tensor]:
        """Run in PyTorch, op by op; ``watch`` sees every node's value."""
        runner = Watched(GraphModule(torch.nn.Module(), self.graph), watch)
        with torch.no_grad():
            result: dict[str, Tensor] = runner.run(*self.feed(image, targets))
        return result


class Watched(Interpreter):
    """Runs a graph and shows every node's value."""

    def __init__(self, module: GraphModule, watch: Callable[[Node, Any], None] | None) -> None:
        super().__init__(module)
        self.watch = watch

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.watch is not None:
            self.watch(n, value)
        return value


def propagate(graph: Graph, fake_mode: FakeTensorMode) -> None:
    """Work every node's fake value out anew from its placeholders'."""

    def keep(node: Node, value: Any) -> None:
        if node.op == "call_function":
            node.meta["val"] = value

    feed = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
    runner = Watched(GraphModule(torch.nn.Module(), graph), keep)
    with fake_mode, enable_python_dispatcher(), torch.no_grad():
        runner.run(*feed)


def fold_constants(program: Program) -> None:
    """Evaluate, with the real parameters, everything that does not depend on image or targets."""
    known: dict[Node, Any] = dict(program.constants)
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not all(n in known for n in node.all_input_nodes):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)
    for node in list(program.graph.nodes):
        value = known.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if all(user in known for user in node.users):
            continue
        where = module_of(node, "")
        constant = program.add_constant(value.contiguous(), f"{where}.{node.name}" if where else node.name, node)
        node.replace_all_uses_with(constant)
    program.clean()
    _merge_equal_constants(program)


def _merge_equal_constants(program: Program) -> None:
    """One placeholder for constants of equal value: forward and adjoint then share theirs."""
    seen: dict[Any, list[Node]] = {}
    for node, value in list(program.constants.items()):
        key = (value.dtype, tuple(value.shape), float(value.double().sum()) if value.numel() else 0.0)
        for other in seen.setdefault(key, []):
            if torch.equal(program.constants[other], value):
                node.replace_all_uses_with(other)
                break
        else:
            seen[key].append(node)
    program.clean()


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What a program holds while it runs, every value freed after its last use.

    Attributes:
        peak_bytes: the largest sum of values alive at once, constants and inputs not counted.
        peak_node: the node at which it is reached.
        constant_bytes: the constants'.
        saved_bytes: values of the forward pass that wait for the adjoint at its first node.
    """

    peak_bytes: int
    peak_node: str
    constant_bytes: int
    saved_bytes: int


def memory_plan(program: Program, batch: int, classes: int = 1) -> MemoryPlan:
    """Peak bytes of a program run node by node for ``batch`` images and ``classes`` classes of each.

    A result that shares its input's memory (views) is counted with its input; a fused op's results each by itself.
    """
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    position = {node: i for i, node in enumerate(nodes)}
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    size: dict[Node, int] = {}
    dims = _dimensions(program, batch, classes)
    for i, node in enumerate(nodes):
        own = _is_view_of(node)
        owner[node] = owner.get(own, own) if own is not None and own in position else node
        if owner[node] is node and isinstance(node.meta["val"], Tensor) and own is None:
            size[node] = _bytes(node.meta["val"], dims)
        last[owner[node]] = max(last.get(owner[node], 0), i)
        for n in node.all_input_nodes:
            if n in owner:
                last[owner[n]] = max(last[owner[n]], i)
    for node in program.outputs.values():
        if node in owner:
            last[owner[node]] = len(nodes)
    live = peak = saved = 0
    peak_node = ""
    freed: dict[int, list[Node]] = {}
    for node, at in last.items():
        freed.setdefault(at, []).append(node)
    started = False
    for i, node in enumerate(nodes):
        if not started and node.meta.get("side") == "adjoint":
            started, saved = True, live
        live += size.get(node, 0)
        if live > peak:
            peak, peak_node = live, node.name
        live -= sum(size.get(n, 0) for n in freed.get(i, ()))
    constant_bytes = sum(v.numel() * v.element_size() for v in program.constants.values())
    return MemoryPlan(peak, peak_node, constant_bytes, saved)


def _is_view_of(node: Node) -> Node | None:
    """The node whose memory a result may share."""
    if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
        return node.args[0]  # type: ignore[return-value]
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        if not schema.is_mutable and any(r.alias_info is not None for r in schema.returns):
            return node.all_input_nodes[0] if node.all_input_nodes else None
    return None


def _dimensions(program: Program, batch: int, classes: int) -> dict[Any, int]:
    symbols: dict[Any, int] = {}
    size = program.image.meta["val"].shape[0]
    if isinstance(size, torch.SymInt):
        symbols[size.node.expr] = batch
    if program.targets is not None:
        shape = program.targets.meta["val"].shape
        if len(shape) > 1 and isinstance(shape[1], torch.SymInt):
            symbols[shape[1].node.expr] = classes
    return symbols


def _bytes(value: Tensor, dims: Mapping[Any, int]) -> int:
    sizes = [int(s.node.expr.subs(dims)) if isinstance(s, torch.SymInt) else s for s in value.shape]
    return math.prod(sizes) * value.element_size()

"""The graph that is exported: the explanation graph with its image input, constants folded, outputs chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic

from bcos_rt.export import fused
from bcos_rt.export.builder import module_of
from bcos_rt.graph import ExplanationGraph
from bcos_rt.graph.capture import Captured
from bcos_rt.nn.network import BcosNetwork

__all__ = ["OUTPUTS", "Program", "build_program"]

aten = torch.ops.aten
OUTPUTS = ("logits", "class_used", "weights", "contributions", "residual", "picture")


@dataclass
class Program:
    """A flat graph, the values of its constants, and what goes in and out.

    Attributes:
        graph: placeholders are the constants, then ``image``, then ``class_ids``.
        constants: value of each constant placeholder.
        names: a name for each constant, for the file's reader.
        outputs: node by output name, in the order of the file.
        seed: the one-hot seed of the adjoint; None for a forward pass alone.
        adjoint: the raw adjoint of the image, before any output is derived from it.
    """

    graph: Graph
    constants: dict[Node, Tensor]
    names: dict[Node, str]
    image: Node
    class_ids: Node | None
    outputs: dict[str, Node] = field(default_factory=dict)
    seed: Node | None = None
    adjoint: Node | None = None
    _made: int = 0

    def add_constant(self, value: Tensor, name: str, fake_like: Node) -> Node:
        """A new constant placeholder with a fake value."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"export_constant_{self._made}")
        self._made += 1
        with fake_like.meta["val"].fake_mode:
            node.meta["val"] = torch.empty(tuple(value.shape), dtype=value.dtype)
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
        live = set(self.graph.nodes)
        self.seed = self.seed if self.seed in live else None
        self.adjoint = self.adjoint if self.adjoint in live else None

    def run(
        self, image: Tensor, class_ids: Tensor | None, watch: Callable[[Node, Any], None] | None = None
    ) -> dict[str, Tensor]:
        """Run in PyTorch; ``watch`` sees every node's value."""
        module = GraphModule(torch.nn.Module(), self.graph)
        feed: list[Tensor | None] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                feed.append(self.constants.get(node, image if node is self.image else class_ids))
        runner = _Watched(module, watch)
        with torch.no_grad():
            result: dict[str, Tensor] = runner.run(*feed)
        return result


class _Watched(Interpreter):
    def __init__(self, module: GraphModule, watch: Callable[[Node, Any], None] | None) -> None:
        super().__init__(module)
        self.watch = watch

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.watch is not None:
            self.watch(n, value)
        return value


def build_program(
    source: ExplanationGraph | Captured,
    net: BcosNetwork,
    outputs: Sequence[str] = OUTPUTS,
) -> Program:
    """What is exported of an explanation graph, or of a captured forward pass; neither is changed.

    Args:
        net: the network it was made from, float32, on the CPU.
        outputs: names of the outputs wanted.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    if isinstance(source, Captured):
        graph.output(graph.graph_copy(source.builder.graph, copies))
        constants, names = source.constants, source.parameter_names
        results: dict[str, Node] = {"logits": copies[source.logits]}
        encoded, class_ids = copies[source.encoded], None
        parameter_nodes = [copies[n] for n in source.parameter_nodes]
    else:
        results = dict(graph.graph_copy(source.module.graph, copies))  # type: ignore[arg-type]
        graph.output(results)
        constants, names = source.constants, source.parameter_names
        *parameter_nodes, encoded, class_ids = [n for n in graph.nodes if n.op == "placeholder"]
        if source.multi:
            _free_classes(graph, encoded, class_ids)
    values: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
    values.update(net.named_buffers(remove_duplicate=False))
    parameters = [constants[name] if name in constants else values[name].detach() for name in names]
    program = Program(
        graph,
        dict(zip(parameter_nodes, parameters, strict=True)),
        dict(zip(parameter_nodes, names, strict=True)),
        encoded,
        class_ids,
    )
    if class_ids is not None:
        program.seed = next(n for n in graph.nodes if _is_seed(n))
        adjoint: Any = results["weights"]
        while adjoint.target is aten.reshape.default:
            adjoint = adjoint.args[0]
        program.adjoint = adjoint
    _add_image(program, net)
    if "picture" in outputs and "weights" in results:
        results["picture"] = _add_picture(program, results)
    program.set_outputs({name: results[name] for name in OUTPUTS if name in results and name in outputs})
    fold_constants(program)
    return program


def _free_classes(graph: Graph, encoded: Node, class_ids: Node) -> None:
    """Give the number of classes per image a symbol, and every node its shape in it, where it is a plain number."""
    like: Any = encoded.meta["val"]
    if not isinstance(class_ids.meta["val"].shape[1], int):
        return
    shapes, source = like.fake_mode.shape_env, ConstantSource("k")
    symbol = shapes.create_symbol(3, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    k = shapes.create_symintnode(symbol, hint=3, source=source)
    with like.fake_mode:
        class_ids.meta["val"] = torch.empty((like.shape[0], k), dtype=torch.int64)

    def keep(node: Node, value: Any) -> None:
        if node.op == "call_function":
            node.meta["val"] = value

    feed = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
    runner = _Watched(GraphModule(torch.nn.Module(), graph), keep)
    with like.fake_mode, enable_python_dispatcher(), torch.no_grad():
        runner.run(*feed)


def _is_seed(node: Node) -> bool:
    """The one-hot rows: the comparison of class ids with all classes, as numbers."""
    if node.target is not aten._to_copy.default or node.meta.get("side") != "adjoint":
        return False
    compared: Any = node.args[0]
    return compared.target is aten.eq.Tensor and node.meta["val"].is_floating_point()


def _add_image(program: Program, net: BcosNetwork) -> None:
    """Put the encoding ``[x, 1 - x]`` in front."""
    encoded = program.image
    encoded.target = encoded.name = "image"
    if not net.encoding.six_channels:
        return
    like = encoded.meta["val"]
    n, _, height, width = like.shape
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(first):
        encoding = program.graph.call_function(fused.encode_image, (encoded,))
    encoding.meta["val"] = like
    encoded.replace_all_uses_with(encoding, delete_user_cb=lambda user: user is not encoding)
    with like.fake_mode:
        encoded.meta["val"] = torch.empty((n, 3, height, width), dtype=like.dtype)


def _add_picture(program: Program, results: Mapping[str, Node]) -> Node:
    weights, contributions = results["weights"], results["contributions"]
    output = next(n for n in program.graph.nodes if n.op == "output")
    with program.graph.inserting_before(output):
        picture = program.graph.call_function(fused.colour_picture, (weights, contributions))
    like = weights.meta["val"]
    with like.fake_mode:
        picture.meta["val"] = torch.empty((*like.shape[:-3], *like.shape[-2:], 4), dtype=like.dtype)
    return picture


def fold_constants(program: Program) -> None:
    """Evaluate, with the real parameters, everything that does not depend on image or class ids."""
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
        where = module_of(node)
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

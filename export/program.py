"""The graph that is exported: the explanation graph with its image input, constants folded, outputs chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bcos_rt.export import fused
from bcos_rt.graph import ExplanationGraph
from bcos_rt.graph import program as graph_program
from bcos_rt.graph.capture import Captured
from bcos_rt.graph.program import fold_constants
from bcos_rt.nn.network import BcosNetwork

__all__ = ["OUTPUTS", "Program", "build_program"]

aten = torch.ops.aten
OUTPUTS = ("logits", "class_used", "weights", "contributions", "residual", "picture")


@dataclass
class Program(graph_program.Program):
    """The exported graph, with the two nodes the passes look for.

    Attributes:
        seed: the adjoint's first node, one-hot where classes are explained; None for a forward pass alone.
        adjoint: the raw adjoint of the image, before any output is derived from it.
    """

    seed: Node | None = None
    adjoint: Node | None = None

    def clean(self) -> None:
        """Remove dead nodes and constants nothing uses."""
        super().clean()
        live = set(self.graph.nodes)
        self.seed = self.seed if self.seed in live else None
        self.adjoint = self.adjoint if self.adjoint in live else None


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
        encoded, targets = copies[source.encoded], None
        parameter_nodes = [copies[n] for n in source.parameter_nodes]
    else:
        results = dict(graph.graph_copy(source.module.graph, copies))  # type: ignore[arg-type]
        graph.output(results)
        constants, names = source.constants, source.parameter_names
        *parameter_nodes, encoded, targets = [n for n in graph.nodes if n.op == "placeholder"]
    values: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
    values.update(net.named_buffers(remove_duplicate=False))
    parameters = [constants[name] if name in constants else values[name].detach() for name in names]
    program = Program(
        graph,
        dict(zip(parameter_nodes, parameters, strict=True)),
        dict(zip(parameter_nodes, names, strict=True)),
        encoded,
        targets,
    )
    if targets is not None:
        program.seed = next(n for n in graph.nodes if n.meta.get("seed"))
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

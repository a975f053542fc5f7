"""Small programs for tests: a function of tensors, traced into the fused ops that it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bcos_rt.graph.program import Program

__all__ = ["program_of"]


def program_of(function: Callable[..., Any], first: Tensor, constants: Sequence[Tensor] = ()) -> Program:
    """``function(first, *constants)`` as a program of fixed shapes whose image is ``first``.

    Outputs are named by their place; empty ones, which an op was not asked for, are left out.
    """

    def flat(*tensors: Tensor) -> list[Tensor]:
        out = function(*tensors)
        out = out if isinstance(out, tuple | list) else (out,)
        return [t for t in out if t.ndim != 1 or t.shape[0]]

    graph = make_fx(flat, tracing_mode="fake")(first, *constants).graph
    image, *rest = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(iter(reversed(graph.nodes)))
    outputs = {str(i): node for i, node in enumerate(output.args[0])}
    names = {node: node.name for node in rest}
    program = Program(graph, dict(zip(rest, constants, strict=True)), names, image, None)
    program.set_outputs(outputs)
    return program

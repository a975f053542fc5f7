"""A network as two programs of fused ops: its prediction alone, and its prediction with the explanation."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bcos_rt.graph.adjoint import Adjoint
from bcos_rt.graph.attention import Attention
from bcos_rt.graph.capture import Captured, capture
from bcos_rt.graph.fuse import fuse_adjoint, fuse_forward
from bcos_rt.graph.fused_rules import FUSED_RULES
from bcos_rt.graph.program import Program, fold_constants
from bcos_rt.graph.rules import RULES
from bcos_rt.graph.storage import store_adjoint_as, store_as
from bcos_rt.graph.texts import TokenPooling
from bcos_rt.nn.network import BcosNetwork

__all__ = ["FusedPrograms", "build_fused"]

aten = torch.ops.aten
bcos = torch.ops.bcos_rt


@dataclass(frozen=True)
class FusedPrograms:
    """Attributes:
    predict: image -> ``logits`` (of a network with an embedding: that); computes no multipliers.
    explain: image, class ids [N, K] (-1: the top class) -> ``logits`` [N, classes], ``class_used`` [N, K], ``weights``
        [N, K, C, H, W], ``contributions`` [N, K, H, W], ``residual`` [N, K], and if asked for ``colour`` [N K, 4, H,
        W] (the colour picture's terms, where the image has six channels).
    passes: how often each fusion pass changed something.
    """

    predict: Program
    explain: Program
    passes: dict[str, int]


def build_fused(
    net: BcosNetwork,
    image_size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    seed_scale: float = 1.0,
    colour: bool = False,
    forward_dtype: torch.dtype | None = None,
    pooling: TokenPooling | None = None,
    attention: Attention = "auto",
) -> FusedPrograms:
    """Capture a network, fuse its forward pass, derive the adjoint in fused ops, and fuse that.

    Args:
        net: captured in evaluation mode, in its own dtype (float32 or float64), with the weights it has now.
        image_size: (H, W) the programs are made for; batch and number of classes stay free.
        dtype: what activations, multipliers and layer weights are stored in; per-channel scales, norms and the
            explanation's outputs stay in the network's dtype.
        forward_dtype: what the forward pass is stored in, ``dtype`` then being the adjoint's; ``dtype`` or the
            network's dtype. None: ``dtype``.
        colour: whether the explanation has an output ``colour``.
        pooling: explain scores of texts, of a network with an embedding, with its tokens pooled like this; the
            prediction then is the embedding.
        attention: whether each layer's softmax is stored for the adjoint or made again there; "auto": whichever takes
            less memory. See :mod:`bcos_rt.graph.attention`.
        seed_scale: factor on the adjoint while it runs (half of |W| lies below fp16's smallest normal number).

    Raises:
        UnsupportedOpError: as :func:`bcos_rt.graph.build_explanation_graph`.
    """
    captured = capture(net, image_size, tokens=pooling is not None, attention=attention)
    six = net.encoding.six_channels
    passes = fuse_forward(captured, six)
    values: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
    values.update(net.named_buffers(remove_duplicate=False))
    # Copies: the network may be trained further.
    values = {name: values[name].detach().clone() for name in captured.parameter_names if name in values}

    def program(outputs: dict[str, Node], targets: Node | None, made: dict[str, Tensor]) -> Program:
        """The graph so far with other outputs, in nodes of its own."""
        given = {**captured.constants, **made}
        graph, copies = Graph(), dict[Node, Node]()
        for node in captured.builder.graph.nodes:
            if node.op != "output":
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        named = dict(zip(captured.parameter_nodes, captured.parameter_names, strict=True))
        named.update(constant_nodes)
        constants, names = {}, {}
        for node, name in named.items():
            constants[copies[node]] = given[name] if name in given else values[name]
            names[copies[node]] = name
        asked = None if targets is None else copies[targets]
        result = Program(graph, constants, names, copies[captured.encoded], asked)
        result.set_outputs({name: copies[node] for name, node in outputs.items()})
        fold_constants(result)
        if forward_dtype not in (None, dtype):
            if targets is not None:
                store_adjoint_as(result, dtype, copies[start])
        elif dtype != values_dtype:
            store_as(result, dtype, stored)
        return result

    stored: dict[int, tuple[Tensor, Tensor]] = {}
    values_dtype = captured.encoded.meta["val"].dtype
    constant_nodes: dict[Node, str] = {}
    predicted = captured.logits if pooling is None else captured.builder.call(aten.mean.dim, captured.logits, [1])
    predict = program({"logits": predicted}, None, {})

    adjoint = Adjoint(captured, multi=True)
    forward = list(captured.builder.graph.nodes)
    captured.builder.begin_adjoint()
    targets, told, seed = adjoint.begin(pooling)
    start = seed
    if seed_scale != 1:
        seed = adjoint.call(aten.mul.Scalar, seed, seed_scale)
    grad = adjoint.run({**RULES, **FUSED_RULES}, seed, forward)
    outputs = {**told, **_tail(adjoint, captured, grad, seed_scale, colour)}
    captured.builder.graph.output(outputs)
    passes.update(fuse_adjoint(captured.builder))
    output = next(iter(reversed(captured.builder.graph.nodes)))
    rewritten: Any = output.args[0]
    outputs = dict(rewritten)
    constant_nodes = {node: name for name, node in adjoint.constant_nodes.items()}
    explain = program(outputs, targets, adjoint.constants)
    return FusedPrograms(predict, explain, passes)


def _tail(adjoint: Adjoint, captured: Captured, grad: Node, seed_scale: float, colour: bool) -> dict[str, Node]:
    """Weights, contributions, residual and the picture's colours from the adjoint that arrived at the image."""
    call, outputs = adjoint.call, dict[str, Node]()
    image = captured.encoded
    back = 1 / seed_scale
    if captured.stem is not None:
        _, mean, std, six, _ = captured.stem.args
        inverse = call(aten.reciprocal.default, std)
        parts = call(bcos.image_contributions.default, grad, image, inverse, back, True)
        weights, contributions = (call(operator.getitem, parts, i) for i in range(2))
        if six and colour:
            outputs["colour"] = call(operator.getitem, parts, 2)
        # <grad, -mean / std> of the normalisation: the weights' pixel sums, negated, times the mean.
        sums = call(aten.sum.dim_IntList, weights, [2, 3])
        offset = call(aten.sum.dim_IntList, call(aten.mul.Tensor, sums, mean), [1])
        offset = call(aten.neg.default, offset)
    else:
        weights = grad if seed_scale == 1 else call(aten.mul.Scalar, grad, back)
        product = call(aten.mul.Tensor, weights, adjoint.saved(captured.entry or image))
        contributions = call(aten.sum.dim_IntList, product, [1])
        offset = None
    if adjoint.residuals:
        residual = adjoint.total(adjoint.residuals)
        residual = residual if seed_scale == 1 else call(aten.mul.Scalar, residual, back)
        residual = residual if offset is None else call(aten.add.Tensor, residual, offset)
    elif offset is not None:
        residual = offset
    else:
        residual = call(aten.mul.Scalar, call(aten.sum.dim_IntList, contributions, [-2, -1]), 0.0)
    channels, height, width = (int(s) for s in weights.meta["val"].shape[1:])
    lead = [adjoint.batch, adjoint.k]
    outputs["weights"] = adjoint.reshape(weights, [*lead, channels, height, width])
    outputs["contributions"] = adjoint.reshape(contributions, [*lead, height, width])
    outputs["residual"] = adjoint.reshape(residual, lead)
    return outputs

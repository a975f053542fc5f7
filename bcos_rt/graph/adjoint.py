"""The explanation graph: a captured forward pass and the transpose of its dynamic linear map, as ordinary nodes.

With every image-dependent factor held constant a network is one affine map of its encoded image x::

    logit_k = <W_k(x), x> + r_k

The adjoint walks the forward graph backwards from a one-hot seed; each op's rule (:mod:`bcos_rt.graph.rules`) sends
the adjoint of its output to the argument it is linear in. What arrives at the image is ``W_k``; what arrives at a
constant (bias, input mean, position embedding) adds ``<adjoint, constant>`` to the residual ``r_k``. The residual is
never computed as logit minus sum, so ``sum(W * x) + r = logit`` is a test of every rule on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bcos_rt.errors import UnsupportedOpError
from bcos_rt.graph.attention import Attention
from bcos_rt.graph.capture import Captured, capture, module_of
from bcos_rt.graph.symbols import CLASSES, symbolic_size
from bcos_rt.graph.texts import TokenPooling, text_seed
from bcos_rt.nn.network import BcosNetwork

__all__ = ["Adjoint", "ExplanationGraph", "build_explanation_graph", "class_seed"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ExplanationGraph:
    """Image and targets in; logits, W, contributions and residual out.

    Attributes:
        module: flat :class:`torch.fx.GraphModule` of ATen and ``bcos_rt`` ops; every node has a fake ``meta["val"]``
            with a symbolic batch and ``meta["side"]`` ("forward" or "adjoint").
        parameter_names: the first placeholders, as named in the network (or in :attr:`constants`). After them come
            ``encoded`` [N, C, H, W] and ``class_ids`` int64 [N], or [N, K] where :attr:`multi`; -1 is the top class. Of
            a graph that explains texts: ``text_embedding`` [N, D] or [N, K, D], of any norm.
        constants: lifted tensors that are neither parameter nor buffer.
        multi: whether each image has K classes: outputs then are [N, K, ...].
        classes: number of logits; of a graph that explains texts: of entries of an embedding, D.
        texts: whether texts are explained, not classes.

    The module returns a dict with ``logits`` [N, classes], ``class_used`` [N(, K)], ``weights`` [N(, K), C, H, W],
    ``contributions`` [N(, K), H, W] and ``residual`` [N(, K)]. Of texts, ``logits`` are the scores [N, K], and there is
    no ``class_used``.
    """

    module: GraphModule
    parameter_names: tuple[str, ...]
    constants: dict[str, Tensor]
    image_size: tuple[int, int]
    multi: bool
    classes: int
    texts: bool = False

    def parameters(self, net: BcosNetwork) -> list[Tensor]:
        """The network's present values for the parameter placeholders, in order."""
        values: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
        values.update(net.named_buffers(remove_duplicate=False))
        return [self.constants[n] if n in self.constants else values[n].detach() for n in self.parameter_names]

    def __call__(self, net: BcosNetwork, encoded: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Run the graph with the network's present parameters, without autograd and in the network's own dtype."""
        with torch.no_grad(), torch.autocast(encoded.device.type, enabled=False):
            result: dict[str, Tensor] = self.module(*self.parameters(net), encoded, targets)
        return result


class Adjoint:
    """What a rule sees: it emits nodes with :meth:`call` and passes adjoints on with :meth:`send`.

    An adjoint has the shape of its forward value, its batch being :attr:`rows` = N, or N * K for K classes of each
    image. A forward value used on the adjoint side goes through :meth:`saved`, which repeats it to those rows.
    """

    def __init__(self, captured: Captured, multi: bool) -> None:
        self.captured = captured
        self.builder = captured.builder
        self.multi = multi
        self.call = self.builder.call
        self.batch_symbol = captured.encoded.meta["val"].shape[0].node.expr
        self.grads: dict[Node, list[Node]] = {}
        self.output_grads: dict[Node, dict[int, Node]] = {}
        self.residuals: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self._saved: dict[Node, Node] = {}
        self.constant_nodes: dict[str, Node] = {}

    # Inputs and seed -----------------------------------------------------------------------------------------------

    def add_targets(self, name: str, tail: tuple[int, ...], dtype: torch.dtype) -> Node:
        """Append a placeholder after the image's, [N, *tail], or [N, K, *tail] where each image has K targets."""
        image = self.captured.encoded.meta["val"]
        fake = self.builder.fake_mode
        lead = [image.shape[0]]
        with fake:
            if self.multi:
                # A symbol of its own: a fake tensor's size may come out as a plain number.
                shapes: Any = fake.shape_env
                lead.append(symbolic_size(shapes, CLASSES))
            value = torch.empty((*lead, *tail), dtype=dtype, device=image.device)
        with self.builder.graph.inserting_after(self.captured.encoded):
            targets = self.builder.placeholder(name, value)
        self.batch = self.call(aten.sym_size.int, self.captured.encoded, 0)
        if self.multi:
            self.k = self.call(aten.sym_size.int, targets, 1)
            self.rows = self.call(operator.mul, self.batch, self.k)
        else:
            self.rows = self.batch
        return targets

    def begin(self, pooling: TokenPooling | None) -> tuple[Node, dict[str, Node], Node]:
        """What is explained: its placeholder, the outputs that say what came of it, and the seed of the adjoint.

        Args:
            pooling: None explains classes; else the captured tokens are explained, for texts.
        """
        logits = self.captured.logits
        if pooling is None:
            targets = self.add_targets("class_ids", (), torch.int64)
            used, seed = class_seed(self, targets)
            outputs = {"logits": logits, "class_used": used}
        else:
            value = logits.meta["val"]
            targets = self.add_targets("text_embedding", (int(value.shape[2]),), value.dtype)
            scores, seed = text_seed(self, targets, pooling)
            outputs = {"logits": scores}
        seed.meta["seed"] = True
        return targets, outputs, seed

    # Shapes --------------------------------------------------------------------------------------------------------

    def batch_dim(self, node: Node) -> tuple[int, int] | None:
        """(dimension, factor) where a forward value's size is ``factor * N``; None where it has no batch."""
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and self.batch_symbol in size.node.expr.free_symbols:
                factor = size.node.expr / self.batch_symbol
                if not factor.is_Integer:
                    raise UnsupportedOpError(f"{node.target} in {module_of(node)}: batch size {size} is not c * N")
                return dim, int(factor)
        return None

    def shape(self, node: Node) -> list[Any]:
        """A forward value's shape with its batch replaced by :attr:`rows`, as op arguments (ints and nodes)."""
        sizes: list[Any] = list(node.meta["val"].shape)
        found = self.batch_dim(node)
        if found is not None:
            dim, factor = found
            sizes[dim] = self.rows if factor == 1 else self.call(operator.mul, self.rows, factor)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                raise UnsupportedOpError(f"{node.target} in {module_of(node)}: dynamic size {size} beside the batch")
        return sizes

    def saved(self, node: Node) -> Node:
        """A forward value for use on the adjoint side: repeated K times along its batch where there are K classes."""
        found = self.batch_dim(node) if self.multi else None
        if found is None:
            return node
        if node not in self._saved:
            dim, factor = found
            if factor == 1:
                self._saved[node] = self.call(aten.repeat_interleave.self_int, node, self.k, dim)
            else:
                sizes = list(node.meta["val"].shape)
                split = [*sizes[:dim], self.batch, factor, *sizes[dim + 1 :]]
                wide = self.call(aten.view.default, self._contiguous(node), split)
                wide = self.call(aten.repeat_interleave.self_int, wide, self.k, dim)
                self._saved[node] = self.reshape(wide, self.shape(node))
        return self._saved[node]

    def _contiguous(self, node: Node) -> Node:
        return self.call(aten.clone.default, node, memory_format=torch.contiguous_format)

    def reshape(self, grad: Node, sizes: Sequence[Any]) -> Node:
        """``grad`` with another shape; a copy where its layout asks for one."""
        return self.call(aten.reshape.default, grad, list(sizes))

    def constant(self, name: str, value: Tensor) -> Node:
        """A constant tensor as a graph input (made once per name)."""
        if name not in self.constant_nodes:
            like = self.captured.encoded.meta["val"]
            value = value.to(device=like.device, dtype=like.dtype)
            self.constants[name] = value
            with self.builder.graph.inserting_before(self.captured.encoded), self.builder.fake_mode:
                fake = torch.empty(tuple(value.shape), dtype=value.dtype, device=value.device)
                self.constant_nodes[name] = self.builder.placeholder(f"constant_{len(self.constants)}", fake)
        return self.constant_nodes[name]

    # Passing adjoints on -------------------------------------------------------------------------------------------

    def depends(self, value: Any) -> bool:
        """Whether an argument's value depends on the image."""
        return isinstance(value, Node) and value in self.captured.depends

    def send(self, value: Any, grad: Node) -> None:
        """Pass an adjoint to a forward value; for a constant it goes to the residual. Shapes must be equal."""
        if self.depends(value):
            self.grads.setdefault(value, []).append(grad)
        else:
            self.add_residual(grad, value)

    def send_broadcast(self, value: Any, grad: Node) -> None:
        """:meth:`send` for an elementwise op's operand, which may have been broadcast to the output's shape."""
        if not self.depends(value):
            self.add_residual(grad, value)
            return
        sizes, given = list(grad.meta["val"].shape), list(value.meta["val"].shape)
        lead = len(sizes) - len(given)
        dims = list(range(lead)) + [i + lead for i, s in enumerate(given) if s == 1 and sizes[i + lead] != 1]
        if dims:
            grad = self.reshape(self.call(aten.sum.dim_IntList, grad, dims, True), self.shape(value))
        self.send(value, grad)

    def add_residual(self, grad: Node, constant: Any) -> None:
        """Add ``<grad, constant>``, per row, to the residual; the constant is a node or number that broadcasts."""
        if isinstance(constant, int | float):
            if constant == 0:
                return
            value: Any = constant
            sizes: list[Any] = []
        else:
            value = self.saved(constant)
            sizes = list(value.meta["val"].shape)
        shape = list(grad.meta["val"].shape)
        batch = next(i for i, s in enumerate(shape) if isinstance(s, torch.SymInt))
        lead = len(shape) - len(sizes)
        # Sum first what the constant does not vary along: a bias needs no product of image size.
        dims = [i for i in range(len(shape)) if i != batch and (i < lead or sizes[i - lead] == 1)]
        if dims:
            grad = self.call(aten.sum.dim_IntList, grad, dims, True)
        product = self.call(aten.mul.Tensor if isinstance(value, Node) else aten.mul.Scalar, grad, value)
        if batch != 0:
            product = self.call(aten.transpose.int, product, 0, batch)
        flat = self.reshape(product, [self.rows, -1])
        self.residuals.append(self.call(aten.sum.dim_IntList, flat, [1]))

    def fail(self, node: Node, why: str) -> UnsupportedOpError:
        """The error for a node no rule can treat."""
        return UnsupportedOpError(f"{node.target} in {module_of(node)}: {why}")

    # The walk ------------------------------------------------------------------------------------------------------

    def total(self, nodes: Sequence[Node]) -> Node:
        """Sum of adjoints that meet at one value."""
        result = nodes[0]
        for node in nodes[1:]:
            result = self.builder.call_like(result, aten.add.Tensor, result, node)
        return result

    def run(self, rules: dict[Any, Callable[[Adjoint, Node, Node], None]], seed: Node, forward: list[Node]) -> Node:
        """Walk ``forward`` backwards from the logits; returns the adjoint of the image."""
        self.grads[self.captured.logits] = [seed]
        end = self.captured.entry or self.captured.encoded
        for node in reversed(forward):
            if node is end:
                continue
            if node.target is operator.getitem and node in self.grads:
                producer: Any = node.args[0]
                index: Any = node.args[1]
                self.output_grads.setdefault(producer, {})[index] = self.total(self.grads.pop(node))
                continue
            if node in self.grads:
                grad = self.total(self.grads.pop(node))
            elif node in self.output_grads:
                grad = next(iter(self.output_grads[node].values()))
            else:
                continue
            if node.op != "call_function" or node.target not in rules:
                raise self.fail(
                    node,
                    "no dynamic-linear rule for this op, so the network cannot be explained through it. Add one with "
                    "@bcos_rt.graph.rule, or keep the op out of the path from image to logits.",
                )
            self.builder.origin = node
            rules[node.target](self, node, grad)
        self.builder.origin = None
        if end not in self.grads:
            raise UnsupportedOpError("the logits do not depend on the image through any dynamic-linear path")
        return self.total(self.grads.pop(end))


def class_seed(adjoint: Adjoint, class_ids: Node) -> tuple[Node, Node]:
    """The classes explained (-1 replaced by the top class), and the adjoint of the logits: a one-hot row for each."""
    call, logits, multi = adjoint.call, adjoint.captured.logits, adjoint.multi
    top = call(aten.argmax.default, logits, 1, multi)
    used = call(aten.where.self, call(aten.lt.Scalar, class_ids, 0), top, class_ids)
    flat = adjoint.reshape(used, [-1, 1])
    value = logits.meta["val"]
    classes = call(aten.arange.default, value.shape[1], dtype=torch.int64, device=value.device, pin_memory=False)
    return used, call(aten._to_copy.default, call(aten.eq.Tensor, flat, classes), dtype=value.dtype)


def build_explanation_graph(
    net: BcosNetwork,
    image_size: tuple[int, int],
    *,
    multi: bool = False,
    pooling: TokenPooling | None = None,
    attention: Attention = "store",
    rules: dict[Any, Callable[[Adjoint, Node, Node], None]] | None = None,
) -> ExplanationGraph:
    """Capture a network and append its adjoint.

    Args:
        net: the network; captured in evaluation mode, whatever mode it is in.
        image_size: (H, W) the graph is made for; the batch stays free.
        multi: explain K classes of each image with one forward pass.
        pooling: explain scores of texts, of a network with an embedding, with its tokens pooled like this.
        attention: "store" every layer's softmax (standard ops alone, as an exporter needs), "recompute" it in the
            adjoint, or "auto", whichever takes less memory; see :mod:`bcos_rt.graph.attention`.
        rules: a rule table in place of the registered one.

    Raises:
        UnsupportedOpError: an op on the path from image to logits has no rule (named with its module), or
            ``torch.export`` cannot capture the network.
    """
    from bcos_rt.graph.rules import RULES

    captured = capture(net, image_size, tokens=pooling is not None, attention=attention)
    adjoint = Adjoint(captured, multi)
    call = adjoint.call
    forward = list(captured.builder.graph.nodes)
    captured.builder.begin_adjoint()
    _, outputs, seed = adjoint.begin(pooling)

    weights = adjoint.run(RULES if rules is None else rules, seed, forward)
    encoded = captured.encoded
    if multi:
        _, channels, height, width = encoded.meta["val"].shape
        weights = adjoint.reshape(weights, [adjoint.batch, adjoint.k, channels, height, width])
        product = call(aten.mul.Tensor, weights, call(aten.unsqueeze.default, encoded, 1))
        contributions = call(aten.sum.dim_IntList, product, [2])
    else:
        contributions = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weights, encoded), [1])
    if adjoint.residuals:
        residual = adjoint.total(adjoint.residuals)
        if multi:
            residual = adjoint.reshape(residual, [adjoint.batch, adjoint.k])
    else:
        residual = call(aten.mul.Scalar, call(aten.sum.dim_IntList, contributions, [-2, -1]), 0.0)
    captured.builder.graph.output(
        {
            **outputs,
            "weights": weights,
            "contributions": contributions,
            "residual": residual,
        }
    )
    captured.builder.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    module = GraphModule(torch.nn.Module(), captured.builder.graph)
    constant_names = tuple(adjoint.constants)
    return ExplanationGraph(
        module,
        captured.parameter_names + constant_names,
        {**captured.constants, **adjoint.constants},
        image_size,
        multi,
        int(captured.logits.meta["val"].shape[-1]),
        pooling is not None,
    )

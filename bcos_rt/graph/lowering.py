"""What the lowerings of fused ops to ATen share: emitting nodes, constants made once, factors per image, epilogues."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bcos_rt.errors import UnsupportedOpError
from bcos_rt.graph.capture import GraphBuilder, module_of
from bcos_rt.graph.program import Program
from bcos_rt.kernels.reference import POWER_EPS

__all__ = ["LOWERINGS", "Call", "Lowering", "Results", "lowering"]

aten = torch.ops.aten
Call = Callable[..., Any]
Results = Node | tuple[Node | None, ...]

# Lowering of each fused op by its name: (lowering, the op's arguments by name) -> its result or results (None where one
# was not asked for).
LOWERINGS: dict[str, Callable[[Lowering, Mapping[str, Any]], Results]] = {}


def lowering(name: str) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """Register the lowering of ``torch.ops.bcos_rt.<name>``."""

    def register(function: Callable[..., Results]) -> Callable[..., Results]:
        LOWERINGS[name] = function
        return function

    return register


def _now(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A :attr:`Lowering.call` that computes instead of emitting a node."""
    with torch.no_grad():
        return target(*args, **kwargs)


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal (without a guard on symbolic ones)."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and a == b


@dataclass(frozen=True)
class Encoded:
    """An encoded image without its padding channels, for a first layer (oneDNN's time grows with every channel).

    Attributes:
        channels: [N, 3 or 6, H, W].
        mirrored: whether the whole is ``[channels, -channels]``, as with the means 1 - m and the deviations s of the
            inverted channels: a layer's response then is that of the weights ``w[:, :3] - w[:, 3:]`` to three channels.
    """

    channels: Node
    mirrored: bool


class Lowering:
    """Appends ATen nodes to a new program that will compute what ``source`` computes.

    Two values have a form of their own between lowered ops: the gate of a ReLU is a bool tensor of its output's shape
    instead of a bit mask (:attr:`gates`), and a max-pool's choice the flat position in the image that ATen uses
    instead of the place inside the window (:attr:`flat_positions`).

    Attributes:
        encoded: what encoded images, spatially padded or not, are made of.
        compiled: whether the graph goes to a compiler, which folds what it can into the loops that read it, or is run
            op by op, where that would be copies.
    """

    def __init__(self, source: Program, compiled: bool) -> None:
        value = source.image.meta["val"]
        self.source = source
        self.compiled = compiled
        self.builder = GraphBuilder(value.fake_mode)
        self.program = Program(self.builder.graph, {}, {}, source.image, None, {}, source._made)
        self.gates: set[Node] = set()
        self.flat_positions: set[Node] = set()
        self.encoded: dict[Node, Encoded] = {}
        self._origin: Node | None = None
        self._cache: dict[Any, Node] = {}

    # Emitting ------------------------------------------------------------------------------------------------------

    def begin(self, origin: Node) -> None:
        """Nodes from here on are made for ``origin``: they take its place in the network and its side."""
        self.builder.origin = self._origin = origin

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Append ``target(*args, **kwargs)``."""
        node = self.builder.call(target, *args, **kwargs)
        if self._origin is not None:
            node.meta["side"] = self._origin.meta.get("side", "forward")
        return node

    def once(self, key: tuple[Any, ...], make: Callable[[], Node]) -> Node:
        """What ``make`` emits, emitted once per key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def derived(self, node: Node, key: str, make: Callable[[Call, Any], Any]) -> Node:
        """``make(call, value)``, made once: of a constant as a new constant, of anything else as nodes."""

        def emit() -> Node:
            if node not in self.program.constants:
                result: Node = make(self.call, node)
                return result
            value = make(_now, self.program.constants[node])
            name = f"{self.program.names[node]}:{key}"
            return self.program.add_constant(value, name, self.program.image)

        return self.once(("derived", node, key), emit)

    def rearranged(self, weight: Node, key: str, make: Callable[[Tensor], Tensor]) -> Node | None:
        """``make(weight)`` as a constant of its own, made once; None where the weight is no constant."""
        if weight not in self.program.constants:
            return None
        return self.derived(weight, key, lambda _, value: make(value))

    def constant(self, value: Tensor, name: str) -> Node:
        """A tensor as a constant of the program; one for each name."""
        return self.once(("constant", name), lambda: self.program.add_constant(value, name, self.program.image))

    def fail(self, why: str) -> UnsupportedOpError:
        """The error for a node that cannot be lowered."""
        origin = self._origin
        where = "" if origin is None else f"{origin.target} in {module_of(origin)}: "
        return UnsupportedOpError(where + why)

    # Values --------------------------------------------------------------------------------------------------------

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """``x`` in another dtype; itself where it has it."""
        if x.meta["val"].dtype == dtype:
            return x
        # Not shared between forward pass and adjoint: a wide copy would wait in memory for the adjoint.
        side = None if self._origin is None else self._origin.meta.get("side")
        return self.once(("cast", x, dtype, side), lambda: self.call(aten._to_copy.default, x, dtype=dtype))

    def wide(self, x: Node) -> Node:
        """``x`` in the dtype that norms and epilogues are computed in: at least float32."""
        return self.cast(x, self.wide_dtype(x))

    @staticmethod
    def wide_dtype(x: Node) -> torch.dtype:
        return torch.promote_types(x.meta["val"].dtype, torch.float32)

    def per_channel(self, vector: Node, dtype: torch.dtype, image: bool) -> Node:
        """A parameter [C] as [C, 1, 1] for images, as it is for rows, in ``dtype``."""

        def make(call: Call, value: Any) -> Any:
            value = call(aten._to_copy.default, value, dtype=dtype)
            return call(aten.reshape.default, value, [-1, 1, 1]) if image else value

        return self.derived(vector, f"{dtype}{' spatial' if image else ''}", make)

    def size(self, x: Node, dim: int) -> Any:
        """A size as an op's argument: a number, or a node where it is symbolic."""
        value = x.meta["val"].shape[dim]
        if not isinstance(value, torch.SymInt):
            return value
        return self.once(("size", value.node.expr), lambda: self.call(aten.sym_size.int, x, dim))

    def per_row(self, op: Callable[[Node, Node], Node], rows: Node, factor: Node) -> Node:
        """``op(rows, factor)`` for rows [N K, ...] and the factor [N, ...] of each row's image, class fastest."""
        m, n = rows.meta["val"].shape[0], factor.meta["val"].shape[0]
        if _same(m, n):
            return op(rows, factor)
        if self.compiled:
            return op(rows, self.repeated(factor, rows))
        images, k, many = self._counts(factor, rows)
        rest = list(rows.meta["val"].shape[1:])
        spread = self.once(("spread", factor), lambda: self.call(aten.unsqueeze.default, factor, 1))
        split = self.once(("split", rows), lambda: self.call(aten.reshape.default, rows, [images, k, *rest]))
        return self.call(aten.reshape.default, op(split, spread), [many, *rest])

    def repeated(self, factor: Node, rows: Node) -> Node:
        """A factor [N, ...] repeated to N K rows, class fastest."""
        if _same(rows.meta["val"].shape[0], factor.meta["val"].shape[0]):
            return factor
        images, k, many = self._counts(factor, rows)
        rest = list(factor.meta["val"].shape[1:])

        def emit() -> Node:
            wide = self.call(aten.unsqueeze.default, factor, 1)
            wide = self.call(aten.expand.default, wide, [images, k, *rest])
            return self.call(aten.reshape.default, wide, [many, *rest])

        # As index arithmetic it costs nothing twice; as a copy it is kept for the next reader.
        return emit() if self.compiled else self.once(("repeated", factor), emit)

    def _counts(self, factor: Node, rows: Node) -> tuple[Any, Any, Any]:
        """N, K and N K as op arguments."""
        m, n = rows.meta["val"].shape[0], factor.meta["val"].shape[0]
        images, many = self.size(factor, 0), self.size(rows, 0)
        if isinstance(m, int) and isinstance(n, int):
            return images, m // n if n else 1, many
        # A -1 would be ambiguous for an empty batch.
        ids = self.program.targets
        return images, self.size(ids, 1) if ids is not None and ids.meta["val"].ndim == 2 else -1, many

    def realised(self, x: Node) -> Node:
        """An image or map in contiguous memory that a compiler does not work out anew for each of its readers.

        ``as_strided`` is what needs its operand in memory, in the layout that it names.
        """
        if x.target is aten.as_strided.default:
            return x
        x = self.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        return self.strided(x, [self.size(x, i) for i in range(4)])

    def strided(self, x: Node, shape: Sequence[Any]) -> Node:
        """Contiguous memory seen as a contiguous [N, C, H, W]; only N may be symbolic."""
        _, channels, height, width = shape
        strides = [channels * height * width, height * width, width, 1]
        return self.call(aten.as_strided.default, x, list(shape), strides)

    # Norms ---------------------------------------------------------------------------------------------------------

    def square_sum(self, x: Node, groups: int) -> Node:
        """Channel sums of squares per group, [N, C, H, W] -> [N, groups, H, W]: once for all that need x's.

        Whatever map a fused op was given is one of these, so the lowered graph makes it from ``x`` itself.
        """

        def emit() -> Node:
            wide = self.wide(x)
            squares = self.call(aten.mul.Tensor, wide, wide)
            channels, *size = x.meta["val"].shape[1:]
            if groups == channels:
                return squares
            if groups == 1:
                return self.call(aten.sum.dim_IntList, squares, [1], True)
            shape = [self.size(x, 0), groups, channels // groups, *size]
            return self.call(aten.sum.dim_IntList, self.call(aten.reshape.default, squares, shape), [2])

        return self.once(("square_sum", x, groups), emit)

    def box_sum(
        self,
        squares: Node,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Node:
        """Sum of a map [N, G, H, W] over each place of a window, zeros outside the image."""
        area = math.prod(kernel)
        if area == 1 and all(s == 1 for s in stride) and not any(padding):
            return squares
        if any(d != 1 for d in dilation) or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            groups, value = squares.meta["val"].shape[1], squares.meta["val"]
            ones = torch.ones(groups, 1, *kernel, dtype=value.dtype, device=value.device)
            name = f"ones of {groups} x {tuple(kernel)}, {value.dtype}"
            geometry = (list(stride), list(padding), list(dilation), groups)
            return self.call(aten.conv2d.default, squares, self.constant(ones, name), None, *geometry)
        if self.compiled and any(padding):
            # Without bounds to check, or counts to divide by, the window is a few plain loads.
            ph, pw = padding
            padded = self.call(aten.constant_pad_nd.default, squares, [pw, pw, ph, ph])
            squares, padding = self.realised(padded), (0, 0)
        # The sum itself: divided by 1.
        rest = (False, True, 1)
        if area > _LARGEST_WINDOW and min(kernel) > 1:
            # Rows first, then columns: far fewer numbers to add, and windows that a compiler unrolls.
            (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
            rows = self.call(aten.avg_pool2d.default, squares, [kh, 1], [sh, 1], [ph, 0], *rest)
            return self.call(aten.avg_pool2d.default, rows, [1, kw], [1, sw], [0, pw], *rest)
        return self.call(aten.avg_pool2d.default, squares, list(kernel), list(stride), list(padding), *rest)

    def inverse_patch_norm(
        self,
        x: Node,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        eps: float,
    ) -> Node:
        """``1 / sqrt(box_sum(sum_c x_c^2) + eps)``, [N, groups, H', W']: once for all layers of one geometry."""

        def emit() -> Node:
            box = self.box_sum(self.square_sum(x, groups), kernel, stride, padding, dilation)
            inverse = self.call(aten.rsqrt.default, self.call(aten.add.Scalar, box, eps))
            # Kept, one number a pixel: a compiler would work it out again for every few channels.
            return self.realised(inverse) if self.compiled and groups == 1 else inverse

        key = ("norm", x, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups, eps)
        return self.once(key, emit)

    def per_filter(self, values: Node, filters: int) -> Node:
        """A map [N, groups, H, W] repeated to the output channels of each group."""
        groups, *size = values.meta["val"].shape[1:]
        if groups in (1, filters):
            return values

        def emit() -> Node:
            wide = self.call(aten.unsqueeze.default, values, 2)
            wide = self.call(aten.expand.default, wide, [-1, -1, filters // groups, -1, -1])
            return self.call(aten.reshape.default, wide, [self.size(values, 0), filters, *size])

        return self.once(("per filter", values, filters), emit)

    def inverse_row_norm(self, x: Node, eps: float) -> Node:
        """``1 / (||x|| + eps)`` of the last dimension, [..., 1]."""

        def emit() -> Node:
            wide = self.wide(x)
            total = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, wide, wide), [-1], True)
            norm = self.call(aten.add.Scalar, self.call(aten.sqrt.default, total), eps)
            return self.call(aten.reciprocal.default, norm)

        return self.once(("row norm", x, eps), emit)

    # Epilogues -----------------------------------------------------------------------------------------------------

    def multiplier(self, z: Node, inverse_norm: Node, b: float) -> Node:
        """``(|z| / n)^(B-1)``; for B other than 2 the published ``(|z| / n + 1e-6)^(B-1)``. ``z`` is wide."""
        ratio = self.call(aten.mul.Tensor, self.call(aten.abs.default, z), inverse_norm)
        if b == 2:
            return ratio
        ratio = self.call(aten.add.Scalar, ratio, POWER_EPS)
        return self.call(aten.pow.Tensor_Scalar, ratio, b - 1)

    def gate(self, u: Node, activation: str) -> Node:
        """The gate ``g`` with ``act(u) = g u`` of an activation that is not a ReLU; ``u`` is wide."""
        call = self.call
        if activation == "relu6":
            share = call(aten.mul.Scalar, call(aten.reciprocal.default, call(aten.clamp.default, u, 6)), 6.0)
            return call(aten.where.ScalarOther, call(aten.gt.Scalar, u, 0), share, 0.0)
        if activation == "gelu":
            erf = call(aten.erf.default, call(aten.mul.Scalar, u, math.sqrt(0.5)))
            return call(aten.mul.Scalar, call(aten.add.Scalar, erf, 1.0), 0.5)
        if activation == "silu":
            return call(aten.sigmoid.default, u)
        if activation == "hardswish":
            lifted = call(aten.clamp.default, call(aten.add.Scalar, u, 3.0), 0.0, 6.0)
            return call(aten.mul.Scalar, lifted, 1 / 6)
        raise self.fail(f"no activation named {activation!r}")

    def activated(self, u: Node, activation: str) -> Node:
        """``act(u)``."""
        if activation == "none":
            return u
        if activation == "relu":
            return self.call(aten.relu.default, u)
        return self.call(aten.mul.Tensor, u, self.gate(u, activation))

    def epilogue(
        self,
        z: Node,
        inverse_norm: Node | None,
        a: Mapping[str, Any],
        late_bias: Node | None,
        dtype: torch.dtype,
        image: bool,
    ) -> tuple[Node, Node | None, Node | None]:
        """What follows ``z`` in a fused layer, in at least float32: ``y``, multiplier and gate in ``dtype``.

        Args:
            late_bias: a bias that the convolution did not add.
            a: the fused op's arguments.
        """
        call, activation = self.call, a["activation"]
        z = self.wide(z)
        wide = z.meta["val"].dtype
        if late_bias is not None:
            z = call(aten.add.Tensor, z, self.per_channel(late_bias, wide, image))
        slope = None if inverse_norm is None else self.multiplier(z, inverse_norm, a["b"])
        if a["scale"] is not None:
            scale = self.per_channel(a["scale"], wide, image)
            slope = scale if slope is None else call(aten.mul.Tensor, slope, scale)
        u = z if slope is None else call(aten.mul.Tensor, z, slope)
        if a["shift"] is not None:
            u = call(aten.add.Tensor, u, self.per_channel(a["shift"], wide, image))
        if a["residual"] is not None:
            u = call(aten.add.Tensor, u, self.wide(a["residual"]))
        gate: Node | None = None
        if activation == "relu":
            y = call(aten.relu.default, u)
            if a["want_multiplier"] or a["want_gate"]:
                gate = call(aten.gt.Scalar, u, 0)
                self.gates.add(gate)
        elif activation == "none":
            y = u
        else:
            gate = self.gate(u, activation)
            y = call(aten.mul.Tensor, u, gate)
        multiplier: Node | None = None
        if a["want_multiplier"]:
            full = slope is not None and slope.meta["val"].shape == u.meta["val"].shape
            multiplier = slope if full else self._spread(slope, u)
            if multiplier is not None and gate is not None:
                multiplier = self.gated(multiplier, gate)
            multiplier = None if multiplier is None else self.cast(multiplier, dtype)
        if gate is not None and gate not in self.gates:
            gate = self.cast(gate, dtype)
        return self.cast(y, dtype), multiplier, gate if a["want_gate"] else None

    def _spread(self, slope: Node | None, like: Node) -> Node:
        """A factor per channel, or 1, in the shape of ``like``."""
        ones = self.call(aten.ones_like.default, like)
        return ones if slope is None else self.call(aten.mul.Tensor, ones, slope)

    def gated(self, x: Node, gate: Node) -> Node:
        """``x * gate`` for a bool or floating-point gate."""
        if gate.meta["val"].dtype == torch.bool:
            return self.call(aten.where.ScalarOther, gate, x, 0.0)
        return self.call(aten.mul.Tensor, x, self.cast(gate, x.meta["val"].dtype))

    def transposed_epilogue(self, total: Node, a: Mapping[str, Any], dtype: torch.dtype) -> tuple[Node, Node | None]:
        """``G = total + identity``; ``(G multiplier, G gate)`` in ``dtype``, the second where it is asked for."""
        total = self.wide(total)
        wide = total.meta["val"].dtype
        if a["identity"] is not None:
            total = self.call(aten.add.Tensor, total, self.cast(a["identity"], wide))
        out = raw = total
        if a["multiplier"] is not None:
            out = self.per_row(lambda g, m: self.call(aten.mul.Tensor, g, self.cast(m, wide)), total, a["multiplier"])
        if a["want_raw"] and a["gate"] is not None:
            raw = self.per_row(self.gated, total, self._open_gate(a["gate"], total))
        return self.cast(out, dtype), self.cast(raw, dtype) if a["want_raw"] else None

    def _open_gate(self, gate: Node, total: Node) -> Node:
        """A bit mask that no lowered op made, as bools."""
        value = gate.meta["val"]
        if value.dtype != torch.uint8:
            return gate
        dim = 1 if total.meta["val"].ndim == 4 else total.meta["val"].ndim - 1
        channels, shape = total.meta["val"].shape[dim], list(value.shape)
        bits = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=value.device)
        bits = bits.reshape(8, *([1] * (len(shape) - 1 - dim)))
        wide = self.call(aten.unsqueeze.default, gate, dim + 1)
        wide = self.call(aten.bitwise_and.Tensor, wide, self.constant(bits, f"bits {tuple(bits.shape)}"))
        shape = [self.size(gate, i) for i in range(len(shape))]
        shape[dim] = 8 * int(value.shape[dim])
        wide = self.call(aten.reshape.default, self.call(aten.ne.Scalar, wide, 0), shape)
        return self.call(aten.slice.Tensor, wide, dim, 0, channels)


# The largest window that TorchInductor unrolls instead of calling a library.
_LARGEST_WINDOW = 25

"""What an op of the export table sees: it emits ONNX nodes and looks up the values of graph nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from bcos_rt.errors import UnsupportedOpError
from bcos_rt.export.functions import DOMAIN
from bcos_rt.graph.capture import module_of

__all__ = ["OnnxBuilder", "is_dynamic"]

Emitted = ir.Value | tuple[ir.Value, ...]

_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.FLOAT,  # the graph is exported in single precision
    torch.float16: ir.DataType.FLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}
INT64_MAX = (1 << 63) - 1


def is_dynamic(size: Any) -> bool:
    """Whether a size is only known when the file runs."""
    return not isinstance(size, int)


class OnnxBuilder:
    """Appends ONNX nodes and keeps which ONNX value stands for which graph node.

    In half precision a node's floating-point result is fp16, unless the node is in ``wide_nodes``: then it is fp32.
    Values that cross the border between the two are cast once. Ops that need more than fp16 inside take
    :meth:`widened` inputs and return :meth:`settled` results.

    Args:
        opset: version of the standard operator set.
        constants: values of the graph's constant nodes.
        half: whether floating-point values are fp16.
        wide_nodes: nodes whose results stay fp32 all the same.
        names: names for the constants, for the file's reader.
    """

    def __init__(
        self,
        opset: int,
        constants: Mapping[Node, Tensor],
        half: bool = False,
        wide_nodes: frozenset[Node] | set[Node] = frozenset(),
        names: Mapping[Node, str] | None = None,
    ) -> None:
        self.opset = opset
        self.constants = constants
        self.half = half
        self.wide_nodes = wide_nodes
        self.names = names or {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.functions: set[str] = set()
        self.values: dict[Node, Emitted] = {}
        self.current: Node | None = None
        self.cache: dict[Any, ir.Value] = {}
        self._counter = 0
        self._used_names: set[str] = set()
        self._outputs: set[str] = set()

    # Emission ------------------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append one ONNX node; returns its output value, or a tuple where there are several.

        Attributes that are None are left out; a missing optional input is None.
        """
        if domain == DOMAIN:
            self.functions.add(op_type)
        given = {k: v for k, v in attributes.items() if v is not None}
        self._counter += 1
        base = self.current.name if self.current is not None else "x"
        results = [ir.Value(name=self._unique(f"{base}/{op_type}")) for _ in range(outputs)]
        where = module_of(self.current, "") if self.current is not None else ""
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(given),
            outputs=results,
            name=self._unique(f"{where or 'net'}/{base}/{op_type}#"),
        )
        self.nodes.append(node)
        return results[0] if outputs == 1 else tuple(results)

    def call(self, function: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """Append a call of a model-local function (:mod:`bcos_rt.export.functions`)."""
        return self.op(function, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def _unique(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self._used_names:
            n += 1
            candidate = f"{name}_{n}"
        self._used_names.add(candidate)
        return candidate

    # Types ---------------------------------------------------------------------------------------------------------

    def in_half(self, node: Node | None = None) -> bool:
        """Whether a node's (default: the current node's) floating-point results are fp16."""
        node = self.current if node is None else node
        return self.half and node not in self.wide_nodes

    def float_type(self) -> ir.DataType:
        """The floating-point type of the current node's results."""
        return ir.DataType.FLOAT16 if self.in_half() else ir.DataType.FLOAT

    def data_type(self, dtype: torch.dtype) -> ir.DataType:
        """The ONNX type for a torch dtype at the current node."""
        return self.float_type() if dtype.is_floating_point else _DTYPES[dtype]

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """``Cast``, once per value and type."""
        key = ("cast", value, to)
        if key not in self.cache:
            self.cache[key] = self.op("Cast", value, to=int(to))
        return self.cache[key]

    def widened(self, value: ir.Value) -> ir.Value:
        """An operand of the current node in fp32."""
        return self.cast(value, ir.DataType.FLOAT) if self.in_half() else value

    def settled(self, value: ir.Value) -> ir.Value:
        """A result computed in fp32, in the type of the current node's results."""
        return self.cast(value, ir.DataType.FLOAT16) if self.in_half() else value

    # Constants -----------------------------------------------------------------------------------------------------

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant vector of int64."""
        return self._initializer("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def int_scalar(self, value: int) -> ir.Value:
        """A constant scalar of int64."""
        return self._initializer(f"int_{value}", np.array(value, dtype=np.int64))

    def scalar(
        self, value: float, dtype: torch.dtype = torch.float32, wide: bool = False, positive: bool = False
    ) -> ir.Value:
        """A constant scalar for use with values of a torch dtype at the current node (``wide``: in fp32).

        ``positive``: what the type would round to 0, or to a number that runtimes may flush to 0, becomes its smallest
        normal number.
        """
        if dtype == torch.bool:
            return self._initializer(f"bool_{bool(value)}", np.array(bool(value)))
        if not dtype.is_floating_point:
            return self.int_scalar(int(value))
        half = self.in_half() and not wide
        kind, name = (np.float16, "half") if half else (np.float32, "float")
        array = np.array(value, dtype=kind)
        if positive and 0 < value < float(np.finfo(kind).tiny):
            array, name = np.array(np.finfo(kind).tiny, dtype=kind), f"{name}_positive"
        return self._initializer(f"{name}_{value!r}", array)

    def tensor(self, value: Tensor, name: str, wide: bool = False) -> ir.Value:
        """A constant tensor made while emitting, in the current node's type (``wide``: fp32)."""
        array = value.detach().cpu()
        if array.is_floating_point():
            array = array.to(torch.float16 if self.in_half() and not wide else torch.float32)
            name = f"{name}/{'half' if self.in_half() and not wide else 'float'}"
        return self._initializer(name, array.contiguous().numpy())

    def _initializer(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        if name not in self.initializers:
            constant = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, const_value=constant, shape=ir.Shape(array.shape), type=ir.TensorType(constant.dtype)
            )
            self._used_names.add(name)
        return self.initializers[name]

    # Values of graph nodes -----------------------------------------------------------------------------------------

    def __getitem__(self, given: Any) -> ir.Value:
        """The value of a graph node in the current node's precision."""
        value = self.raw(given)
        if not isinstance(value, ir.Value):
            raise UnsupportedOpError(f"{given} has several results where one is expected")
        meta = given.meta.get("val")
        if not self.half or not isinstance(meta, Tensor) or not meta.is_floating_point() or given in self.constants:
            return value
        if self.in_half(given) != self.in_half():
            return self.cast(value, self.float_type())
        return value

    def raw(self, node: Node) -> Emitted:
        """What was emitted for a graph node; its constant, in the current node's precision."""
        if node in self.constants:
            return self._constant(node)
        return self.values[node]

    def _constant(self, node: Node) -> ir.Value:
        value = self.constants[node]
        name = self.names.get(node, node.name)
        if not value.is_floating_point():
            array = value.detach().cpu()
            return self._initializer(name, array.contiguous().numpy())
        half = self.in_half()
        array = value.detach().cpu().to(torch.float16 if half else torch.float32)
        return self._initializer(f"{name}/half" if half else name, array.contiguous().numpy())

    def operand(self, given: Any, dtype: torch.dtype) -> ir.Value:
        """An operand of an elementwise op that computes in ``dtype``: a node (cast where it differs) or a number."""
        if not isinstance(given, Node):
            return self.scalar(given, dtype)
        value = self[given]
        meta = given.meta["val"]
        if isinstance(meta, Tensor) and meta.dtype != dtype and self._kind(meta.dtype) != self._kind(dtype):
            return self.cast(value, self.data_type(dtype))
        return value

    @staticmethod
    def _kind(dtype: torch.dtype) -> Any:
        return "float" if dtype.is_floating_point else dtype

    def reserve(self, name: str) -> None:
        """Keep a name for an input or output."""
        self._used_names.add(name)

    def result(self, node: Node, name: str, dtype: ir.DataType) -> ir.Value:
        """The graph output for a node: its value under another name, fp32 where it is a number."""
        value = self.raw(node)
        if not isinstance(value, ir.Value):
            raise UnsupportedOpError(f"{node} has several results where one is expected")
        if dtype == ir.DataType.FLOAT and self.in_half(node):
            value = self.op("Cast", value, to=int(ir.DataType.FLOAT))
        elif value.producer() is None or value.name in self._outputs:  # an input, a constant or an output already
            value = self.op("Identity", value)
        value.name = name
        self._outputs.add(name)
        return value

    # Shapes --------------------------------------------------------------------------------------------------------

    def sizes(self, sizes: Sequence[Any]) -> ir.Value:
        """A shape vector from ints and graph nodes that hold sizes."""
        if all(isinstance(s, int) for s in sizes):
            return self.ints(list(sizes))
        parts = [self.ints([s]) if isinstance(s, int) else self[s] for s in sizes]
        result: ir.Value = self.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
        return result

    def reshape(self, value: ir.Value, shape: Sequence[Any], wanted: Sequence[Any] = ()) -> ir.Value:
        """``Reshape`` to a shape of ints and at most one symbol; with more, ``wanted`` says where they come from."""
        dynamic = [i for i, s in enumerate(shape) if is_dynamic(s)]
        if len(dynamic) <= 1:
            target = self.ints([-1 if is_dynamic(s) else int(s) for s in shape])
        elif len(wanted) == len(shape) and all(isinstance(s, int | Node) for s in wanted):
            target = self.sizes(wanted)
        else:
            raise UnsupportedOpError(f"reshape to {tuple(shape)}: several sizes are unknown until the file runs")
        result: ir.Value = self.op("Reshape", value, target)
        return result

    def size(self, value: ir.Value, dim: int) -> ir.Value:
        """One size of a value as an int64 vector of length 1."""
        key = ("size", value, dim)
        if key not in self.cache:
            self.cache[key] = self.op("Shape", value, start=dim, end=dim + 1)
        return self.cache[key]

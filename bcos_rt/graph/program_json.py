"""A program's graph as JSON and back: nodes in order, no code, no pickle.

Reading makes nodes of ops that are looked up by name in ``torch.ops.aten``, ``torch.ops.bcos_rt`` and a short list of
Python's operators; ops that write to their arguments or to files are refused, and so are names that would not be
identifiers in the code that :mod:`torch.fx` generates from a graph. It neither traces nor runs anything.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import Graph, Node

import bcos_rt.kernels.ops  # noqa: F401 (registers the ops that are looked up)
from bcos_rt.graph.capture import module_of
from bcos_rt.graph.program import Program
from bcos_rt.graph.symbols import Sizes, size_text, symbol_names

__all__ = ["DTYPES", "FormatError", "program_from_json", "program_to_json"]

Json = Any

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.bool,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}
_LAYOUTS = {"strided": torch.strided}
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.add, operator.floordiv, operator.getitem, operator.mod, operator.mul, operator.neg, operator.sub,
    )
}  # fmt: skip
_OPERATOR_NAMES = {function: name for name, function in _OPERATORS.items()}
_NAMESPACES = ("aten", "bcos_rt")
# Ops that reach beyond their arguments without saying so in their schema.
_REFUSED = ("aten.from_file.default", "aten._print.default", "aten.record_stream.default")
# What summaries and backends read of a node, beside its value and its module.
_TEXTS = ("side", "pass")


class FormatError(Exception):
    """A graph that cannot be written, or JSON that is none; the message says what and where."""


# --- writing ---------------------------------------------------------------------------------------------------------


def program_to_json(program: Program, constant_key: Callable[[Node], str]) -> Json:
    """What :func:`program_from_json` reads.

    Args:
        constant_key: the name that a constant's value is stored under.

    Raises:
        FormatError: an op, an argument or a size that the format has no form for.
    """
    names = symbol_names(program.image, program.targets)
    writer = _Writer(names, program.image.meta["val"].device)
    nodes = []
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        writer.index[node] = len(writer.index)
        try:
            nodes.append(_node_to_json(program, node, writer, constant_key))
        except ValueError as error:
            raise FormatError(f"node {node.name} ({node.target}): {error}") from error
    return {
        "nodes": nodes,
        "outputs": {name: writer.index[node] for name, node in program.outputs.items()},
        "constants_made": program._made,
    }


def _node_to_json(program: Program, node: Node, writer: _Writer, constant_key: Callable[[Node], str]) -> Json:
    if node.op == "placeholder":
        entry: dict[str, Json] = {"op": "placeholder", "name": node.name, "target": str(node.target)}
        if node in program.constants:
            entry |= {"is": "constant", "constant": constant_key(node), "label": program.names[node]}
        elif node in (program.image, program.targets):
            kind = "image" if node is program.image else _kind_of_targets(node.meta["val"])
            entry |= {"is": kind, "value": writer.value(node.meta["val"])}
        else:
            raise ValueError("a placeholder that is neither image nor targets nor a constant")
    elif node.op == "call_function":
        entry = {"op": "call", "name": node.name, "target": _target_name(node.target)}
        entry["args"] = [writer.argument(a) for a in node.args]
        if node.kwargs:
            entry["kwargs"] = {name: writer.argument(a) for name, a in node.kwargs.items()}
        if not _is_item(node):
            entry["value"] = writer.value(node.meta["val"])
    else:
        raise ValueError(f"a node of kind {node.op}")
    return entry | _about(node)


def _about(node: Node) -> dict[str, Json]:
    about: dict[str, Json] = {key: node.meta[key] for key in _TEXTS if isinstance(node.meta.get(key), str)}
    if node.meta.get("fused_from"):
        about["fused_from"] = [str(name) for name in node.meta["fused_from"]]
    module = module_of(node, "")
    return about | ({"module": module} if module else {})


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if target.namespace not in _NAMESPACES or target._schema.is_mutable or name in _REFUSED:
            raise ValueError("an op that is not a function of aten or bcos_rt")
        return name
    if target in _OPERATOR_NAMES:
        return _OPERATOR_NAMES[target]
    raise ValueError("neither an op of aten or bcos_rt nor one of Python's operators")


def _is_item(node: Node) -> bool:
    """Whether a node takes one result of an op with several: its value is that result's."""
    if node.target is not operator.getitem or not isinstance(node.args[0], Node) or type(node.args[1]) is not int:
        return False
    several = node.args[0].meta["val"]
    return isinstance(several, tuple | list) and 0 <= node.args[1] < len(several)


class _Writer:
    """JSON of arguments and values, nodes by their place in the list."""

    def __init__(self, names: Mapping[sympy.Symbol, str], device: torch.device) -> None:
        self.names, self.device = names, device
        self.index: dict[Node, int] = {}

    def argument(self, value: Any) -> Json:
        """An argument: JSON's own values as they are, everything else as an object of one tagged entry."""
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Node):
            return {"node": self.index[value]}
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": _name_in(DTYPES, value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.memory_format):
            return {"memory_format": _name_in(_MEMORY_FORMATS, value)}
        if isinstance(value, torch.layout):
            return {"layout": _name_in(_LAYOUTS, value)}
        if isinstance(value, tuple):
            return {"tuple": [self.argument(v) for v in value]}
        if isinstance(value, list):
            return [self.argument(v) for v in value]
        raise ValueError(f"an argument of type {type(value).__name__}")

    def value(self, value: Any) -> Json:
        """What a node yields: dtype, shape and strides of a tensor; a size; several of them."""
        if isinstance(value, Tensor):
            shape = [size_text(s, self.names) for s in value.shape]
            strides = [size_text(s, self.names) for s in value.stride()]
            entry: dict[str, Json] = {"dtype": _name_in(DTYPES, value.dtype), "shape": shape}
            if strides != [size_text(s, self.names) for s in _contiguous_strides(value.shape)]:
                entry["strides"] = strides
            if value.device != self.device:
                entry["device"] = str(value.device)
            return entry
        if isinstance(value, tuple | list):
            return [self.value(v) for v in value]
        if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            return {"size": size_text(value, self.names)}
        if value is None:
            return None
        raise ValueError(f"a value of type {type(value).__name__}")


def _contiguous_strides(shape: Any) -> list[Any]:
    strides: list[Any] = []
    step: Any = 1
    for size in reversed(shape):
        strides.append(step)
        # As torch counts, where an empty dimension is one of size 1.
        step = step * size if isinstance(size, torch.SymInt) or size > 1 else step
    return strides[::-1]


def _name_in(table: Mapping[str, Any], value: Any) -> str:
    for name, known in table.items():
        if known == value:
            return name
    raise ValueError(f"{value}, which the format has no name for")


# --- reading ---------------------------------------------------------------------------------------------------------


def program_from_json(
    data: Json, constants: Mapping[str, Tensor], saved: torch.device, device: torch.device
) -> Program:
    """The program of :func:`program_to_json`, with fake values in symbols N and K of its own.

    Args:
        constants: values by key, on ``device``.
        saved: the device it was written for, whose kind ``device`` takes the place of in arguments and values.

    Raises:
        FormatError: anything that :func:`program_to_json` does not write.
    """
    reader = _Reader(saved, device)
    graph = Graph()
    inputs = _Inputs()
    try:
        data = _of_type(data, dict, "a program")
        entries = _of_type(_entry(data, "nodes"), list, "nodes")
        for entry in entries:
            reader.nodes.append(_read_node(graph, reader, inputs, entry, constants))
        if inputs.image is None:
            raise FormatError("no node is the image")
        outputs = {name: reader.node(i) for name, i in _of_type(_entry(data, "outputs"), dict, "outputs").items()}
        for name, node in outputs.items():
            if not isinstance(node.meta["val"], Tensor):
                raise FormatError(f"output {name!r} is no tensor")
        made = _of_type(_entry(data, "constants_made"), int, "constants_made")
    except _UNREADABLE as error:
        raise FormatError(str(error)) from error
    reader.sizes.mode.cache_enabled = True
    graph.output(dict(outputs))
    return Program(graph, inputs.values, inputs.labels, inputs.image, inputs.targets, outputs, made)


# What making nodes and fake tensors of unsuitable numbers and names raises.
_UNREADABLE = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError)


@dataclass
class _Inputs:
    values: dict[Node, Tensor] = field(default_factory=dict)
    labels: dict[Node, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    image: Node | None = None
    targets: Node | None = None


def _read_node(graph: Graph, reader: _Reader, inputs: _Inputs, entry: Json, constants: Mapping[str, Tensor]) -> Node:
    where = f"node {len(reader.nodes)}"
    try:
        entry = _of_type(entry, dict, where)
        name = _identifier(_entry(entry, "name"))
        where = f"node {len(reader.nodes)} ({name})"
        kind = _entry(entry, "op")
        if kind == "placeholder":
            node = _placeholder(graph, reader, inputs, entry, name, constants)
        elif kind == "call":
            node = _call(graph, reader, entry, name)
        else:
            raise ValueError(f"of kind {kind!r}")
        if node.name != name:
            raise ValueError("the name is taken")
        _tell(node, entry)
    except _UNREADABLE as error:
        raise FormatError(f"{where}: {error}") from error
    return node


def _placeholder(
    graph: Graph,
    reader: _Reader,
    inputs: _Inputs,
    entry: dict[str, Json],
    name: str,
    constants: Mapping[str, Tensor],
) -> Node:
    target = _identifier(_entry(entry, "target"))
    if target in inputs.taken:
        raise ValueError(f"a second input {target}")
    inputs.taken.add(target)
    node = graph.create_node("placeholder", target, (), {}, name)
    kind = _entry(entry, "is")
    if kind == "constant":
        key = _of_type(_entry(entry, "constant"), str, "constant")
        if key not in constants:
            raise ValueError(f"its value {key!r} is missing")
        inputs.values[node] = constants[key]
        inputs.labels[node] = _of_type(_entry(entry, "label"), str, "label")
        node.meta["val"] = reader.like(constants[key])
    elif kind == "image" and inputs.image is None:
        inputs.image = node
        node.meta["val"] = _input_value(reader, entry, 4)
    elif kind in _TARGET_DIMENSIONS and inputs.targets is None:
        inputs.targets = node
        node.meta["val"] = _input_value(reader, entry, _TARGET_DIMENSIONS[kind])
        if _kind_of_targets(node.meta["val"]) != kind:
            raise ValueError(f"{kind} of dtype {node.meta['val'].dtype}")
    else:
        raise ValueError(f"an input of kind {kind!r}")
    return node


# What may be explained: class ids [N, K], text embeddings [N, K, D].
_TARGET_DIMENSIONS = {"class_ids": 2, "text_embedding": 3}


def _kind_of_targets(value: Tensor) -> str:
    return "text_embedding" if value.is_floating_point() else "class_ids"


def _input_value(reader: _Reader, entry: dict[str, Json], dimensions: int) -> Any:
    value = reader.value(_entry(entry, "value"))
    if not isinstance(value, Tensor) or value.ndim != dimensions:
        raise ValueError(f"an input that is not a tensor of {dimensions} dimensions")
    return value


def _call(graph: Graph, reader: _Reader, entry: dict[str, Json], name: str) -> Node:
    target = _target_of(_entry(entry, "target"))
    args = tuple(reader.argument(a) for a in _of_type(_entry(entry, "args"), list, "args"))
    given = _of_type(entry.get("kwargs", {}), dict, "kwargs")
    kwargs = {_identifier(name): reader.argument(a) for name, a in given.items()}
    if isinstance(target, torch._ops.OpOverload):
        known = [a.name for a in target._schema.arguments]
        if len(args) > len(known) or not set(kwargs) <= set(known[len(args) :]):
            raise ValueError(f"arguments that {target} does not take")
    node = graph.create_node("call_function", target, args, kwargs, name)
    if "value" in entry:
        node.meta["val"] = reader.value(entry["value"])
    elif _is_item(node):
        node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
    else:
        raise ValueError("no value")
    return node


def _target_of(name: Json) -> Callable[..., Any]:
    if isinstance(name, str) and name in _OPERATORS:
        return _OPERATORS[name]
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) == 3 and parts[0] in _NAMESPACES and all(part.isidentifier() for part in parts):
        op = getattr(getattr(getattr(torch.ops, parts[0]), parts[1], None), parts[2], None)
        if isinstance(op, torch._ops.OpOverload) and str(op) == name and name not in _REFUSED:
            if op._schema.is_mutable:
                raise ValueError(f"op {name} writes to its arguments")
            return op
    raise ValueError(f"unknown or refused op {name!r}")


def _tell(node: Node, entry: dict[str, Json]) -> None:
    for key in _TEXTS:
        if key in entry:
            node.meta[key] = _of_type(entry[key], str, key)
    if "fused_from" in entry:
        origins = _of_type(entry["fused_from"], list, "fused_from")
        node.meta["fused_from"] = tuple(_of_type(n, str, "fused_from") for n in origins)
    if "module" in entry:
        # As torch.export writes it: name and class; the class is not kept.
        node.meta["nn_module_stack"] = {"loaded": (_of_type(entry["module"], str, "module"), "")}


class _Reader:
    """Arguments and values of JSON; equal values of tensors share one fake tensor."""

    def __init__(self, saved: torch.device, device: torch.device) -> None:
        self.saved, self.device = saved, device
        self.sizes = Sizes()
        # Fake tensors of results that came before are kept for ops that come again; here none does, and a third of the
        # time would go into keeping them.
        self.sizes.mode.cache_enabled = False
        self.nodes: list[Node] = []
        self._fakes: dict[Any, Tensor] = {}

    def node(self, index: Json) -> Node:
        """A node that came before."""
        if type(index) is not int or not 0 <= index < len(self.nodes):
            raise ValueError(f"node {index!r} is none of those before it")
        return self.nodes[index]

    def argument(self, data: Json) -> Any:
        """See :meth:`_Writer.argument`."""
        if data is None or isinstance(data, bool | str | int | float):
            return data
        if isinstance(data, list):
            return [self.argument(v) for v in data]
        if isinstance(data, dict) and len(data) == 1:
            ((tag, content),) = data.items()
            if tag == "node":
                return self.node(content)
            if tag == "tuple":
                return tuple(self.argument(v) for v in _of_type(content, list, "a tuple"))
            if tag == "float" and content in ("inf", "-inf", "nan"):
                return float(content)
            if tag == "device":
                return self.placed(content)
            tables: dict[str, Mapping[str, Any]] = {
                "dtype": DTYPES, "memory_format": _MEMORY_FORMATS, "layout": _LAYOUTS
            }  # fmt: skip
            if tag in tables and isinstance(content, str) and content in tables[tag]:
                return tables[tag][content]
        raise ValueError(f"argument {str(data)[:80]!r}")

    def placed(self, text: Json) -> torch.device:
        """A device, the program's own for the one it was written for."""
        device = torch.device(_of_type(text, str, "device"))
        return self.device if device.type == self.saved.type else device

    def value(self, data: Json) -> Any:
        """See :meth:`_Writer.value`."""
        if data is None:
            return None
        if isinstance(data, list):
            return tuple(self.value(v) for v in data)
        data = _of_type(data, dict, "a value")
        if "size" in data:
            return self.sizes.read(data["size"])
        dtype = DTYPES.get(_of_type(_entry(data, "dtype"), str, "dtype"))
        if dtype is None:
            raise ValueError(f"dtype {data['dtype']!r}")
        shape = tuple(_of_type(_entry(data, "shape"), list, "shape"))
        strides = tuple(_of_type(data["strides"], list, "strides")) if "strides" in data else None
        device = self.placed(data["device"]) if "device" in data else self.device
        if strides is not None and len(strides) != len(shape):
            raise ValueError("other numbers of strides than of dimensions")
        return self._fake(dtype, shape, strides, device)

    def like(self, value: Tensor) -> Tensor:
        """The fake value of a constant."""
        return self._fake(value.dtype, tuple(value.shape), value.stride(), value.device)

    def _fake(self, dtype: torch.dtype, shape: Any, strides: Any, device: torch.device) -> Tensor:
        key = (dtype, shape, strides, device)
        if key not in self._fakes:
            sizes = [self.sizes.read(s) for s in shape]
            steps = _contiguous_strides(sizes) if strides is None else [self.sizes.read(s) for s in strides]
            with self.sizes.mode:
                self._fakes[key] = torch.empty_strided(sizes, steps, dtype=dtype, device=device)
        return self._fakes[key]


def _entry(data: dict[str, Json], name: str) -> Json:
    if name not in data:
        raise ValueError(f"no entry {name!r}")
    return data[name]


def _of_type(value: Json, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _identifier(name: Json) -> str:
    """A name that generated code may hold."""
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise ValueError(f"{str(name)[:80]!r} is not a name")
    return name

"""The two symbolic sizes of a program, N images and K classes of each: made, written as text and read back."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

__all__ = ["BATCH", "CLASSES", "Sizes", "size_text", "symbol_names", "symbolic_size"]

BATCH, CLASSES = "N", "K"
# Hints of different value, so that no two symbols are taken for one.
_HINTS = {BATCH: 2, CLASSES: 3}
_LONGEST = 200


def symbolic_size(shapes: ShapeEnv, name: str) -> torch.SymInt:
    """A new symbol: a size that may be anything."""
    source = ConstantSource(name)
    symbol = shapes.create_symbol(_HINTS[name], source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size: Any = shapes.create_symintnode(symbol, hint=_HINTS[name], source=source)
    return size  # type: ignore[no-any-return]


# --- as text ---------------------------------------------------------------------------------------------------------


def symbol_names(image: Node, targets: Node | None) -> dict[sympy.Symbol, str]:
    """``N`` and ``K`` by a program's symbols; a fixed size has none."""
    names: dict[sympy.Symbol, str] = {}
    pairs = ((image, 0, BATCH), (targets, 1, CLASSES))
    for node, dim, name in pairs:
        shape = () if node is None else node.meta["val"].shape
        size = shape[dim] if len(shape) > dim else None
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            names[size.node.expr] = name
    return names


def size_text(size: Any, names: Mapping[sympy.Symbol, str]) -> int | str:
    """A size as a number, or as an expression of N and K.

    Raises:
        ValueError: it depends on another symbol, or cannot be read back.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    if expression.is_Integer:
        return int(expression)
    strangers = expression.free_symbols - set(names)
    if strangers:
        raise ValueError(f"size {expression} depends on {', '.join(sorted(map(str, strangers)))}, not on N and K alone")
    text = str(expression.xreplace({old: sympy.Symbol(new, integer=True, positive=True) for old, new in names.items()}))
    _evaluate(_parsed(text), {name: _HINTS[name] for name in names.values()}, text)
    return text


class Sizes:
    """Reads what :func:`size_text` wrote, in symbols of its own; equal texts give one value.

    Attributes:
        mode: the fake mode whose shapes the symbols belong to.
    """

    def __init__(self) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes)
        self._symbols: dict[str, torch.SymInt] = {}
        self._values: dict[str, Any] = {}

    def read(self, text: Any) -> Any:
        """The size of a text, or the number itself.

        Raises:
            ValueError: neither; or another name than N and K; or an operation that sizes have no use for.
        """
        if isinstance(text, int) and not isinstance(text, bool):
            if not 0 <= text < 2**63:
                raise ValueError(f"a size of {text}")
            return text
        if not isinstance(text, str):
            raise ValueError(f"a size of {text!r}")
        if text not in self._values:
            parsed = _parsed(text)
            for name in {n.id for n in ast.walk(parsed) if isinstance(n, ast.Name)} & set(_HINTS):
                if name not in self._symbols:
                    self._symbols[name] = symbolic_size(self.shapes, name)
            self._values[text] = _evaluate(parsed, self._symbols, text)
        return self._values[text]


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"a size of {len(text)} characters")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"a size of {text!r}") from error


def _evaluate(node: ast.expr, values: Mapping[str, Any], text: str) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**63:
        return node.value
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, values, text)
    if isinstance(node, ast.BinOp):
        left = _evaluate(node.left, values, text)
        if isinstance(node.op, ast.Pow):
            power = _evaluate(node.right, values, text)
            if type(power) is int and 1 <= power <= 8:
                return math.prod([left] * power)
        elif type(node.op) in _BINARY:
            return _divided(_BINARY[type(node.op)], left, _evaluate(node.right, values, text), text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords and len(node.args) == 2:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            left, right = (_evaluate(a, values, text) for a in node.args)
            return _divided(function, left, right, text)
    raise ValueError(f"a size of {text!r}")


def _divided(function: Callable[[Any, Any], Any], left: Any, right: Any, text: str) -> Any:
    if function in (operator.floordiv, operator.mod) and type(right) is int and right == 0:
        raise ValueError(f"a size of {text!r}")
    return function(left, right)

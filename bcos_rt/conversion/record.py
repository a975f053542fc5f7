"""A model's forward as a graph, recorded while the model runs on an image.

Symbolic tracing (:mod:`bcos_rt.conversion.trace`) stops where Python looks at a tensor: comparisons of sizes, loops
over shapes, outputs in objects of their own. Running the model passes all of that. The graph has the same vocabulary
(calls of leaf modules, functions and methods) and says what every layer is for; the sizes in it are those of one image,
so that it cannot replace the forward.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from bcos_rt.conversion.nodes import is_activation
from bcos_rt.conversion.trace import Trace, is_torch_layer
from bcos_rt.nn.attention import PROJECTIONS
from bcos_rt.nn.outputs import image_sizes, main_output

__all__ = ["record", "same_answer", "shared_copy"]

# Tried where a model names no size of its own, the usual one first.
_USUAL_SIZES = ((224, 224), (256, 256), (384, 384), (64, 64), (32, 32))


def record(model: nn.Module, like: Trace) -> tuple[Trace, tuple[int, int]] | None:
    """Run a model in eval mode on an image and record its calls; the model is not changed.

    Args:
        model: Takes normalised images [N, 3, H, W].
        like: What symbolic tracing found in it.

    Returns:
        The graph (one placeholder, one output node; a tensor that is written through a view counts as unwritten) and
        the image's size (H, W); None where the model runs at none of the sizes tried, or returns no tensor.
    """
    for size in _sizes(model):
        try:
            graph = _run(model, size)
        except Exception:  # any model may fail in any way at a size that it does not take
            continue
        trace = Trace(graph, like.opaque, like.mode_dependent, like.aliases, recorded=True)
        for node in graph.nodes:
            if node.op == "call_module":
                trace.calls.setdefault(str(node.target), []).append(node)
        return trace, size
    return None


def same_answer(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models of the same parameters answer the same; False where one of them fails."""
    for size in _sizes(one):
        answers = []
        for model in (one, other):
            twin, image = shared_copy(model), _image(model, size)
            try:
                with torch.no_grad():
                    answers.append(main_output(twin(image)))
            except Exception:  # as above
                break
        if answers:
            return len(answers) == 2 and torch.allclose(answers[0], answers[1], rtol=1e-3, atol=1e-5)
    return False


def _sizes(model: nn.Module) -> list[tuple[int, int]]:
    own = image_sizes(model)
    return own + [size for size in _USUAL_SIZES if size not in own]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares parameters and buffers; what its forward keeps for itself stays in it."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).eval()


def _image(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """[2, 3, H, W]: a ramp."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    ramp = torch.linspace(-1, 1, 3 * size[0] * size[1], dtype=torch.float32).reshape(1, 3, *size)
    return torch.cat([ramp, -ramp]).to(like.device, like.dtype)


def _run(model: nn.Module, size: tuple[int, int]) -> fx.Graph:
    twin, image = shared_copy(model), _image(model, size)
    recorder = _Recorder(twin, image)
    with torch.no_grad(), recorder:
        result = twin(image)
    recorder.graph.output(recorder.known[main_output(result)])
    return recorder.graph


class _Recorder(TorchFunctionMode):
    """Appends every torch function that a model calls outside of its leaf modules to ``graph``.

    The model's forwards are replaced: it is used up.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.names = {module: name for name, module in model.named_modules()}
        self.tensors = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.known = WeakTensorKeyDictionary()  # a tensor -> the node that made, or last wrote, it
        self.known[image] = self.graph.placeholder("x")
        self.stack: list[nn.Module] = []
        self.inside_leaf = False
        for module, name in self.names.items():
            if name:
                module.forward = self._noted(module, module.forward)

    def _noted(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        leaf = _is_leaf(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside_leaf:
                return forward(*args, **kwargs)
            node = self._append("call_module", self.names[module], args, kwargs) if leaf else None
            self.stack.append(module)
            self.inside_leaf = leaf
            try:
                result = forward(*args, **kwargs)
            finally:
                self.stack.pop()
                self.inside_leaf = False
            if node is not None:
                self._made(result, node)
            return result

        return call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        writes = getattr(func, "__name__", "") == "__setitem__"
        if self.inside_leaf or not (writes or any(isinstance(v, Tensor) for v in _flat(result))):
            return result  # of shapes and types the graph says nothing
        op, target, extra = _vocabulary(func)
        node = self._append(op, target, (*args, *extra), kwargs)
        self._made(args[0] if writes else result, node)
        return result

    def _append(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, self._plain(args), self._plain(kwargs))
        node.meta["nn_module_stack"] = {self.names[m]: (self.names[m], type(m)) for m in self.stack}
        return node

    def _plain(self, value: Any) -> Any:
        """Tensors as nodes, containers of them as plain ones."""
        if isinstance(value, Tensor):
            if value not in self.known:
                self.known[value] = self.graph.get_attr(self.tensors.get(id(value), f"constant_{len(self.known)}"))
            return self.known[value]
        if isinstance(value, tuple | list):
            parts = [self._plain(part) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, dict):
            return {str(key): self._plain(entry) for key, entry in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._plain, (value.start, value.stop, value.step)))
        known = int | float | str | torch.dtype | torch.device | None
        return value if isinstance(value, known) or value is ... else repr(value)

    def _made(self, result: Any, node: fx.Node) -> None:
        """Note which node made a result; parts of a tuple (or of an output object) are items of it."""
        if isinstance(result, Tensor):
            self.known[result] = node
            return
        if not isinstance(result, tuple | list | dict):
            return
        for key, part in result.items() if isinstance(result, dict) else enumerate(result):
            if isinstance(part, Tensor | tuple | list | dict):
                self._made(part, self.graph.call_function(operator.getitem, (node, key)))


def _is_leaf(module: nn.Module) -> bool:
    """torch.nn's layers, ours, and what has parameters of its own and no parts; other forwards are looked into."""
    if is_torch_layer(module) or type(module) in PROJECTIONS or is_activation(module):
        return True
    return not any(module.children()) and (any(module._parameters) or any(module._buffers))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _vocabulary(func: Any) -> tuple[str, Any, tuple[Any, ...]]:
    """A torch function as symbolic tracing writes it: operation, target, and what its arguments lack."""
    if func is Tensor.__getitem__:
        return "call_function", operator.getitem, ()
    name = resolve_name(func) or getattr(func, "__name__", repr(func))
    if name.startswith("torch.Tensor."):
        method = name.split(".")[2]
        if name.endswith(".__get__"):
            return "call_function", getattr, (method,)
        # x + y arrives as add, 1 - x as __rsub__.
        return "call_method", method.strip("_") if method.startswith("__") else method, ()
    return "call_function", func, ()

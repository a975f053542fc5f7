"""Networks in the form that post-hoc methods work with, and what these methods find there.

captum's GuidedBackprop and DeepLift hook modules: an activation that is a function call, that serves twice or that
writes to its input is none to them, and they give other attributions without saying so. Where a network can be traced,
every activation becomes a module of its own here.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from bcos_rt.conversion.equivalence import evaluating
from bcos_rt.conversion.nodes import writes_to_input
from bcos_rt.errors import InvalidArgumentError, UnsupportedOpError, did_you_mean
from bcos_rt.explanation.explain import fingerprint
from bcos_rt.models.sources import classifier_name
from bcos_rt.nn.conventional import ConventionalNetwork, inner_network
from bcos_rt.nn.layers import BcosConv2d, BcosLinear
from bcos_rt.nn.network import BcosNetwork

__all__ = ["OwnActivation", "OwnReLU6", "Prepared", "activations_of", "last_map", "named_layer", "prepared", "seen"]


@dataclass
class Prepared:
    """A network in the form methods work with.

    Attributes:
        name: the source network's class, for messages.
        model: from what :func:`seen` says on to the logits; a copy in evaluation mode.
        known: what methods have found out about it, so that they need not look again.
    """

    name: str
    model: nn.Module
    known: dict[Any, Any] = field(default_factory=dict)


def seen(net: nn.Module, images: Tensor) -> tuple[Tensor, Prepared]:
    """The input as a method sees it, and the network from there on.

    The normalised image of a conventional network, the encoded image of a B-cos network.

    Raises:
        UnsupportedOpError: the network writes over a value that it reads again, which no copy with activations of their
            own does.
    """
    made = prepared(net)
    inputs = images
    if isinstance(net, BcosNetwork):
        inputs = net.encode(images)
    elif isinstance(net, ConventionalNetwork):
        inputs = (images - net.mean) / net.std
    if len(images) and "same function" not in made.known:
        _check_same(made, net, images[:1], inputs[:1])
        made.known["same function"] = True
    return inputs.detach(), made


# Of the largest logit. Other orders of summation stay far below, another function far above.
_SAME = 1e-3


def _check_same(made: Prepared, net: nn.Module, image: Tensor, inputs: Tensor) -> None:
    with torch.no_grad(), evaluating(net):
        expected, got = net(image), made.model(inputs)
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return
    difference = float((expected - got).abs().max()) / (float(expected.abs().max()) or 1.0)
    if difference > _SAME:
        raise UnsupportedOpError(
            f"{made.name}: with activations that do not write to their input it is another function (logits differ by "
            f"{difference:.0%} of the largest); it writes over a value and reads it again, which post-hoc methods "
            "cannot follow (use activations with inplace=False in the model)"
        )


# The last network that was prepared: methods are called many times with the same one.
_PREPARED: list[tuple[nn.Module, Any, Prepared]] = []


def prepared(net: nn.Module) -> Prepared:
    """A copy in evaluation mode in which every activation is a module of its own that writes to no other's memory.

    A network that cannot be traced keeps its modules, made not in place.
    """
    state = fingerprint(net)
    if _PREPARED and _PREPARED[0][0] is net and _PREPARED[0][1] == state:
        return _PREPARED[0][2]
    made = Prepared(type(inner_network(net)).__name__, _assembled(net, _own_activations))
    _PREPARED[:] = [(net, state, made)]
    return made


def _assembled(net: nn.Module, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The network from what :func:`seen` says on, its inner network copied in a certain way."""
    made = copied(inner_network(net))
    if isinstance(net, BcosNetwork):
        made = nn.Sequential(copy.deepcopy(net.encoding), made, copy.deepcopy(net.logit_layer))
    return made.eval().requires_grad_(False)


# --- activations as modules ------------------------------------------------------------------------------------------


class OwnActivation(nn.Module):
    """An elementwise function as a module, for those that captum has no module of."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OwnReLU6(nn.ReLU):
    """ReLU6 as what it is to guided backpropagation: a ReLU, which its class in torch is not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Inside B-cos layers there is nothing for hooks; their code depends on sizes.
        ours = type(m).__module__.startswith("bcos_rt.nn.") or isinstance(m, BcosConv2d | BcosLinear)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _own_memory(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose activations do not write to their input."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if writes_to_input(module):
            module.inplace = False  # type: ignore[assignment]
    return model


def _own_activations(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose activations are modules, one a call, not in place, as far as it can be traced."""
    model = _own_memory(model)
    try:
        graph = _Tracer().trace(model)
    except Exception:  # data-dependent control flow: tracing fails in as many ways as there are networks
        return model
    traced = fx.GraphModule(model, graph)
    count = 0
    for node in list(graph.nodes):
        own = _own_module(traced, node)
        if own is None:
            continue
        name = f"own_activation_{count}"
        count += 1
        traced.add_submodule(name, own)
        operand = node.args[0] if node.args else node.kwargs["input"]
        with graph.inserting_before(node):
            new = graph.call_module(name, (operand,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    traced.recompile()
    return traced


# Modules that captum's DeepLift knows by their exact class, and those it does not.
_KNOWN = (nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool2d, nn.Softmax)
_OTHERS = (
    nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.SELU, nn.CELU, nn.PReLU, nn.Softsign,
    nn.LogSigmoid,
)  # fmt: skip
# Functions by name, with the module whose arguments are theirs, or None: OwnActivation.
_FUNCTIONS: dict[str, Callable[..., nn.Module] | None] = {
    "relu": nn.ReLU, "relu6": OwnReLU6, "elu": nn.ELU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh, "softplus": nn.Softplus, "gelu": None, "silu": None, "hardswish": None, "hardsigmoid": None,
    "hardtanh": None, "mish": None, "selu": None, "celu": None, "softsign": None, "logsigmoid": None, "clamp": None,
    "clip": None, "clamp_min": None, "clamp_max": None, "softmax": nn.Softmax, "max_pool2d": nn.MaxPool2d,
}  # fmt: skip
_NAMES = {
    getattr(home, name + suffix): name
    for name in _FUNCTIONS
    for home in (torch, F)
    for suffix in ("", "_")
    if hasattr(home, name + suffix)
}
_POOL_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _own_module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """A module for what the node of an activation or a max-pool does; None for other nodes."""
    if node.op == "call_module":
        return _own_copy(traced.get_submodule(str(node.target)))
    name = _NAMES.get(node.target) if node.op == "call_function" else None
    if node.op == "call_method":
        name = str(node.target).removesuffix("_")
    operands = list(node.args) or [node.kwargs.get("input")]
    constants: list[Any] = operands[1:]
    options: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace", "_stacklevel")}
    # In a gate another operand depends on the image too.
    if name not in _FUNCTIONS or any(isinstance(value, fx.Node) for value in (*constants, *options.values())):
        return None
    made = _FUNCTIONS[name]
    if name == "max_pool2d":
        options = {**dict(zip(_POOL_ARGUMENTS, constants, strict=False)), **options}
        return nn.MaxPool2d(**options) if not options.get("return_indices") else None
    if name == "softmax":
        dim = options.pop("dim", constants[0] if constants else None)
        return nn.Softmax(dim) if isinstance(dim, int) and not options and len(constants) < 2 else None
    if name.startswith("cl") and _bounds(name, constants, options) == (0, None):
        return nn.ReLU()
    if made is not None:
        own = made(*constants, **options)
        if hasattr(own, "inplace"):
            own.inplace = False  # type: ignore[assignment]
        return own
    home = Tensor if node.op == "call_method" else torch if hasattr(torch, name) else F
    return OwnActivation(functools.partial(_call, getattr(home, name), tuple(constants), options), name)


def _own_copy(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.ReLU):
        return nn.ReLU()
    if isinstance(module, nn.ReLU6):
        return OwnReLU6()
    if type(module) in _KNOWN:
        return copy.deepcopy(module)
    if isinstance(module, _OTHERS):
        return OwnActivation(copy.deepcopy(module), type(module).__name__)
    return None


def _bounds(name: str, constants: Sequence[Any], options: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a call of clamp, clip, clamp_min or clamp_max holds its values between."""
    given = dict(zip(("max",) if name == "clamp_max" else ("min", "max"), constants, strict=False)) | dict(options)
    return given.get("min"), given.get("max")


def _call(function: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any], x: Tensor) -> Tensor:
    return function(x, *arguments, **options)


# --- what a network does ---------------------------------------------------------------------------------------------

_RELUS = ("relu", "relu_", "relu6")
# What stands where a ReLU could; gates (sigmoid, tanh) do not.
_RECTIFIERS = ("gelu", "silu", "hardswish", "mish", "elu", "elu_", "leaky_relu", "leaky_relu_", "selu", "celu", "prelu")
_ATTENTION = (
    "scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)  # fmt: skip
_POOLS = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d")
_CHANNELS_FIRST = (
    nn.Conv2d, nn.ConvTranspose2d, _BatchNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.PixelShuffle,
)  # fmt: skip
_PRODUCTS = ("bmm", "baddbmm", "matmul", "__matmul__", "einsum")


class _Calls(TorchFunctionMode):
    """Tells a function of every call of torch's functions and tensors' methods."""

    def __init__(self, tell: Callable[[str, tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tell(getattr(func, "__name__", ""), args, out)
        return out


class _Running:
    """Follows calls of modules.

    Attributes:
        depth: how many are under way.
        calls: how many there were.
    """

    def __init__(self) -> None:
        self.depth = self.calls = 0

    def follow(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def _enter(self, *_: object) -> None:
        self.depth += 1
        self.calls += 1

    def _leave(self, *_: object) -> None:
        self.depth -= 1


@torch.no_grad()
def activations_of(model: nn.Module, inputs: Tensor) -> tuple[int, int, Counter[str]]:
    """Calls of ReLUs that are modules, of ReLUs that are not, and of other rectifiers by name, for one input."""
    relus = _Running()
    functions: list[str] = []
    others: Counter[str] = Counter()
    handles = [h for module in model.modules() if isinstance(module, nn.ReLU) for h in relus.follow(module)]

    def tell(name: str, _args: tuple[Any, ...], _out: object) -> None:
        if name in _RELUS and not relus.depth:
            functions.append(name)
        elif name in _RECTIFIERS:
            others[name.removesuffix("_")] += 1

    try:
        with _Calls(tell):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return relus.calls, len(functions), others


@dataclass(frozen=True)
class _Map:
    """A module returned four dimensions with more than one place."""

    name: str
    module: nn.Module
    output: Tensor
    candidate: bool


@dataclass(frozen=True)
class _Pooled:
    """A map's last two dimensions were pooled."""

    operand: Tensor


@dataclass(frozen=True)
class _Tokens:
    """Something looked at several places at a time, or at tokens, or made one map of several."""

    name: str


def last_map(made: Prepared, inputs: Tensor, net: nn.Module) -> nn.Module:
    """The module whose map [N, C, H, W] of more than one place is the last before the classifier.

    Raises:
        UnsupportedOpError: there is none; attention, a layer of tokens or a sum with another map comes after it, so
            that the logits are not made from what it shows; or its dimensions are in another order.
    """
    events: list[_Map | _Pooled | _Tokens] = []
    with _watching(made.model, events, classifier_name(inner_network(net))):
        made.model(inputs)
    maps = [(i, event) for i, event in enumerate(events) if isinstance(event, _Map) and event.candidate]
    needed = "grad_cam needs a map [N, C, H, W] of more than one place that only pooling and a classifier follow"
    advice = "(the option layer= names another module)"
    if not maps:
        pixels = " x ".join(map(str, inputs.shape[2:]))
        raise UnsupportedOpError(f"{needed}; no module of {made.name} returns one for an image of {pixels} pixels")
    at, last = maps[-1]
    later = [event.name for event in events[at + 1 :] if isinstance(event, _Tokens)]
    if later:
        raise UnsupportedOpError(f"{needed}; in {made.name} {later[0]} follows the last one, {last.name!r} {advice}")
    if not _channels_first(events[: at + 1], last, [e.operand for e in events if isinstance(e, _Pooled)]):
        raise UnsupportedOpError(
            f"{needed}; the last output of {made.name} with four dimensions, {tuple(last.output.shape)} of "
            f"{last.name!r}, is not known to be one {advice}"
        )
    return last.module


def _channels_first(before: Sequence[object], last: _Map, pooled: Sequence[Tensor]) -> bool:
    """Whether a map is known to be [N, C, H, W]: its module says so, or one before it of the same shape, or a pool."""
    for event in reversed(before):
        if isinstance(event, _Map) and event.output.shape == last.output.shape:
            order = _order(event.module, event.output)
            if order is not None:
                return order
    return any(operand is last.output for operand in pooled)


def _order(module: nn.Module, output: Tensor) -> bool | None:
    """Whether a module's output is [N, C, H, W]; False where it is [N, H, W, C], None where its class says neither."""
    if isinstance(module, _CHANNELS_FIRST):
        return True
    if isinstance(module, nn.Linear):
        return False
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        # Subclasses that take maps turn them round and back.
        fits = [output.shape[dim] == module.normalized_shape[0] for dim in (1, 3)]
        return fits[0] if fits[0] != fits[1] else None
    return None


@contextmanager
def _watching(
    model: nn.Module, events: list[_Map | _Pooled | _Tokens], classifier: str | None
) -> Iterator[None]:  # fmt: skip
    """Note what runs, without gradients; inside the classifier nothing but its output's order counts."""
    handles: list[RemovableHandle] = []
    inside = _Running()

    def watch(name: str, module: nn.Module, is_classifier: bool) -> Callable[..., None]:
        def note(_module: nn.Module, given: tuple[Any, ...], out: object) -> None:
            if not is_classifier and isinstance(module, nn.Linear) and given and _is_tokens(given[0]):
                events.append(_Tokens("a linear layer of tokens"))
            if isinstance(out, Tensor) and _is_map(out):
                events.append(_Map(name, module, out, not is_classifier))

        return note

    def tell(name: str, args: tuple[Any, ...], out: object) -> None:
        operand = next((value for value in args if isinstance(value, Tensor)), None)
        if inside.depth or operand is None:
            return
        if name in _POOLS:
            events.append(_Pooled(operand))
        elif name in _ATTENTION:
            events.append(_Tokens("attention"))
        elif name == "softmax" and operand.ndim > 2:
            events.append(_Tokens("a softmax over places"))
        elif (name == "linear" and _is_tokens(operand)) or (name in _PRODUCTS and _is_tokens(out)):
            events.append(_Tokens(f"{name.strip('_')} of tokens"))
        elif _is_map(out) and sum(map(_is_map, _flat(args))) > 1:
            # Of an addition or concatenation, the last module's map is a part only.
            events.append(_Tokens(f"{name.strip('_')} of maps"))

    for name, module in model.named_modules():
        if any(True for _ in module.children()):
            continue
        is_classifier = classifier is not None and name.removeprefix("1.") == classifier
        if is_classifier:
            handles += inside.follow(module)
        handles.append(module.register_forward_hook(watch(name, module, is_classifier)))
    try:
        with torch.no_grad(), _Calls(tell):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] * value.shape[3] > 1


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """Arguments, those in lists too."""
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)


def _is_tokens(value: object) -> bool:
    """Whether a tensor has dimensions between the batch and the last one, with more than one place in them."""
    return isinstance(value, Tensor) and value.ndim > 2 and value.shape[1:-1].numel() > 1


def named_layer(net: nn.Module, name: str, inputs: Tensor) -> tuple[nn.Module, nn.Module]:
    """A copy of the network, and the module of that name in it, whose output must have four dimensions.

    Not the traced form, which has no modules of modules. A name is the source model's, or that in ``net``.

    Raises:
        InvalidArgumentError: no such module, or one that returns something else.
    """
    model = _assembled(net, _own_memory)
    inner = inner_network(net)
    own = model[1] if isinstance(net, BcosNetwork) and isinstance(model, nn.Sequential) else model
    found: dict[str, nn.Module] = {key: module for key, module in own.named_modules() if key}
    prefix = next((key for key, module in net.named_modules() if module is inner), "")
    if prefix and not any(key.startswith(f"{prefix}.") for key in found):
        name = name.removeprefix(f"{prefix}.")
    if name not in found:
        raise InvalidArgumentError("layer", repr(name), "a module's name", did_you_mean(name, found))
    shapes: dict[str, object] = {}

    def note(key: str, out: object) -> None:
        shapes[key] = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__

    within = {key: module for key, module in found.items() if f"{key}.".startswith(f"{name}.")}
    with ExitStack() as stack, torch.no_grad():
        for key, module in within.items():
            handle = module.register_forward_hook(lambda _module, _given, out, key=key: note(key, out))
            stack.callback(handle.remove)
        model(inputs)
    shape = shapes.get(name)
    if not isinstance(shape, tuple) or len(shape) != 4:
        got = f"{name!r}, which never ran" if shape is None else f"{name!r}, whose output is {shape}"
        hint = ""
        if shape is None and shapes:
            hint = f" (the forward was rewritten and calls the modules in it by themselves, {[*shapes][-1]!r} last)"
        raise InvalidArgumentError("layer", got, "a module that returns a map [N, C, H, W]", hint)
    return model, found[name]

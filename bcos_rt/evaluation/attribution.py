"""Attribution methods behind one interface: the network's own explanation, and post-hoc methods through captum.

Post-hoc methods see a network as the published evaluation shows it to them: from the normalised image of a conventional
network, or the encoded image ``[x, 1 - x]`` of a B-cos network, to the logits. What they attribute to the channels of a
pixel is summed.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bcos_rt.data import derived_seed
from bcos_rt.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedOpError,
    did_you_mean,
)
from bcos_rt.explanation.explain import explain, fingerprint
from bcos_rt.lazy import require
from bcos_rt.models.sources import classifier_name
from bcos_rt.nn.conventional import ConventionalNetwork, inner_network
from bcos_rt.nn.layers import BcosConv2d, BcosLinear
from bcos_rt.nn.network import BcosNetwork

__all__ = ["METHODS", "Method", "method"]

# (network, images [N, 3, H, W] in [0, 1], classes [N]) -> what each pixel is said to contribute, [N, H, W]. Those of
# method() also take classes [N, K], K of each image, and then give maps [N, K, H, W].
Method = Callable[[nn.Module, Tensor, Tensor], Tensor]
# As many pixels as 64 images of 224 x 224 have.
PIXELS = 64 * 224 * 224


def method(name: str, **options: Any) -> Method:
    """The attribution method of that name, a function of (network, images [N, 3, H, W] in [0, 1], classes).

    Classes are [N] int64 for maps [N, H, W], or [N, K] for maps [N, K, H, W] of K classes of each image; ``"bcos"``
    then needs one forward pass for all K, post-hoc methods look at each image K times.

    Args:
        name: ``"bcos"``, the contribution map of the network's own explanation; ``"saliency"``, ``"input_x_gradient"``,
            ``"integrated_gradients"`` (``n_steps``, 50, ``internal_batch_size``, images that the network sees at once,
            by default 64, and fewer where they are larger than 224 x 224), ``"guided_backprop"``, ``"deep_lift"``,
            ``"grad_cam"`` (``layer``, a module's name; by default the last one before the classifier that still has a
            map), ``"occlusion"`` (``window``, a seventh of the image's side, ``stride``, half the window);
            ``"random"``, noise, the floor.
        options: of the method.

    Raises:
        InvalidArgumentError: an unknown method or option.
        MissingDependencyError: captum (extra ``evaluate``) is not installed; when the method is used.
    """
    if name not in METHODS:
        raise InvalidArgumentError("method", repr(name), f"one of {', '.join(METHODS)}", did_you_mean(name, METHODS))
    function = METHODS[name]
    known = function.__kwdefaults__ or {}
    for option in options:
        if option not in known:
            raise InvalidArgumentError(
                "method",
                f"option {option!r} of {name!r}",
                ", ".join(known) or "no options",
                did_you_mean(option, known),
            )
    chosen: Method = functools.partial(function, **options)
    functools.update_wrapper(chosen, function)
    if function is not _bcos:
        chosen = _class_by_class(chosen)
    chosen.__name__ = name
    chosen.several_classes = True  # type: ignore[attr-defined]
    return chosen


def _class_by_class(function: Method) -> Method:
    """A method of one class an image that takes several too."""

    @functools.wraps(function)
    def attribute(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim != 2:
            return function(net, images, targets)
        k = targets.shape[1]
        maps = function(net, images.repeat_interleave(k, 0), targets.flatten())
        return maps.reshape(*targets.shape, *maps.shape[1:])

    return attribute


def _bcos(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    if not isinstance(net, BcosNetwork):
        raise InvalidTypeError(
            "net", type(net).__name__, "a B-cos network, for the method 'bcos'", " (try 'input_x_gradient')"
        )
    return explain(net, images, targets).contributions


def _random(net: nn.Module, images: Tensor, targets: Tensor, *, seed: int = 0) -> Tensor:
    # Other noise for other images, the same for the same ones.
    generator = torch.Generator().manual_seed(derived_seed(seed, int(1e6 * float(images.double().sum()))))
    return torch.rand(len(images), *images.shape[2:], generator=generator).to(images.device)


def _saliency(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    inputs, model = _seen(net, images)
    return _summed(_captum("Saliency")(model).attribute(inputs, targets))


def _input_x_gradient(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    inputs, model = _seen(net, images)
    return _summed(_captum("InputXGradient")(model).attribute(inputs, targets))


def _integrated_gradients(
    net: nn.Module, images: Tensor, targets: Tensor, *, n_steps: int = 50, internal_batch_size: int | None = None
) -> Tensor:
    """From a baseline of zeros, which is the mean image of a conventional network (Sundararajan et al. 2017)."""
    for name, value in (("n_steps", n_steps), ("internal_batch_size", internal_batch_size)):
        if value is not None and value < 1:
            raise InvalidArgumentError(name, value, "at least 1")
    inputs, model = _seen(net, images)
    height, width = images.shape[2:]
    at_once = internal_batch_size or max(1, min(64, PIXELS // (height * width)))
    gradients = _captum("IntegratedGradients")(model)
    # captum takes all its images at a time, whatever the size of its batches: it is given no more than fit.
    found = [
        gradients.attribute(part, target=classes, n_steps=n_steps, internal_batch_size=at_once)
        for part, classes in zip(inputs.split(at_once), targets.split(at_once), strict=True)  # type: ignore[no-untyped-call]
    ]
    return _summed(torch.cat(found))


def _guided_backprop(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    inputs, model = _seen(net, images)
    return _summed(_captum("GuidedBackprop")(model).attribute(inputs, targets))


def _deep_lift(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """From a baseline of zeros (Shrikumar et al. 2017, rescale rule)."""
    inputs, model = _seen(net, images)
    try:
        return _summed(_captum("DeepLift")(model).attribute(inputs, target=targets))
    except RuntimeError as error:
        if "used more than once" not in str(error):
            raise
        raise UnsupportedOpError(
            f"DeepLift needs every activation to be a module that is used once, and {type(net).__name__} could not be "
            f"rewritten so: {str(error).splitlines()[0]}"
        ) from error


def _grad_cam(net: nn.Module, images: Tensor, targets: Tensor, *, layer: str | None = None) -> Tensor:
    """Selvaraju et al. 2017: positive part, resized bilinearly to the image."""
    inputs, model = _seen(net, images)
    if layer is None:
        chosen = _last_map(model, inputs[:1], net)
    else:
        # Traced, a network has no modules of modules.
        model = _assembled(net, _own_memory)
        chosen = _named(model, layer)
    found = _captum("LayerGradCam")(model, chosen).attribute(inputs, targets, relu_attributions=True)
    resized = F.interpolate(found, images.shape[2:], mode="bilinear", align_corners=False)
    return _summed(resized)


def _occlusion(
    net: nn.Module, images: Tensor, targets: Tensor, *, window: int | None = None, stride: int | None = None,
    perturbations: int = 8,
) -> Tensor:  # fmt: skip
    """Zeiler & Fergus 2014: how much the logit falls when a square is replaced by zeros (the mean colour)."""
    inputs, model = _seen(net, images)
    side = window or max(1, min(images.shape[2:]) // 7)
    step = stride or max(1, side // 2)
    channels = inputs.shape[1]
    with torch.no_grad():
        found = _captum("Occlusion")(model).attribute(
            inputs, sliding_window_shapes=(channels, side, side), strides=(channels, step, step), target=targets,
            perturbations_per_eval=perturbations,
        )  # fmt: skip
    # A window covers all channels, and each of them is given its whole difference.
    mean: Tensor = found.mean(1).detach().to(images.dtype)
    return mean


def _summed(attributions: Tensor) -> Tensor:
    """Over channels."""
    return attributions.sum(1).detach()


METHODS: dict[str, Callable[..., Tensor]] = {
    "bcos": _bcos,
    "saliency": _saliency,
    "input_x_gradient": _input_x_gradient,
    "integrated_gradients": _integrated_gradients,
    "guided_backprop": _guided_backprop,
    "deep_lift": _deep_lift,
    "grad_cam": _grad_cam,
    "occlusion": _occlusion,
    "random": _random,
}


def _captum(name: str) -> Callable[..., Any]:
    made = getattr(require("captum.attr", "evaluate"), name)

    def quietly(*arguments: Any) -> Any:
        found = made(*arguments)
        attribute = found.attribute

        def call(*a: Any, **k: Any) -> Any:
            # captum says each time that it sets hooks, and that inputs now require gradients.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return attribute(*a, **k)

        found.attribute = call
        return found

    return quietly


# --- what a method sees ----------------------------------------------------------------------------------------------


def _seen(net: nn.Module, images: Tensor) -> tuple[Tensor, nn.Module]:
    """The input as the method sees it, and the network from there on, in a form that captum's hooks can work with."""
    model = _prepared(net)
    if isinstance(net, BcosNetwork):
        return net.encode(images).detach(), model
    if isinstance(net, ConventionalNetwork):
        return ((images - net.mean) / net.std).detach(), model
    return images.detach(), model


# The last network that was prepared: methods are called many times with the same one.
_PREPARED: list[tuple[nn.Module, Any, nn.Module]] = []


def _prepared(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode in which every activation is a module of its own that writes to no other's memory."""
    state = fingerprint(net)
    if _PREPARED and _PREPARED[0][0] is net and _PREPARED[0][1] == state:
        return _PREPARED[0][2]
    made = _assembled(net, _own_activations)
    _PREPARED[:] = [(net, state, made)]
    return made


def _assembled(net: nn.Module, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The network from what :func:`_seen` says on, its inner network copied in a certain way."""
    made = copied(inner_network(net))
    if isinstance(net, BcosNetwork):
        made = nn.Sequential(copy.deepcopy(net.encoding), made, copy.deepcopy(net.logit_layer))
    return made.eval().requires_grad_(False)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Inside B-cos layers there is nothing for hooks; their code depends on sizes.
        ours = type(m).__module__.startswith("bcos_rt.nn.") or isinstance(m, BcosConv2d | BcosLinear)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _own_memory(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose activations do not write to their input."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model


def _own_activations(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose ReLUs are ``nn.ReLU`` modules, one a call, not in place.

    A network that cannot be traced keeps its modules, made not in place; methods that need more say so themselves.
    """
    model = _own_memory(model)
    try:
        graph = _Tracer().trace(model)
    except Exception:  # data-dependent control flow: tracing fails in as many ways as there are networks
        return model
    traced = fx.GraphModule(model, graph)
    relus = (F.relu, torch.relu, torch.relu_, F.relu_)
    count = 0
    for node in list(graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        functional = node.op == "call_function" and node.target in relus
        as_method = node.op == "call_method" and node.target in ("relu", "relu_")
        if isinstance(module, nn.ReLU) or functional or as_method:
            name = f"own_relu_{count}"
            count += 1
            traced.add_submodule(name, nn.ReLU())
            with graph.inserting_before(node):
                new = graph.call_module(name, (node.args[0],))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    traced.recompile()
    return traced


def _named(model: nn.Module, name: str) -> nn.Module:
    whole: dict[str, nn.Module] = dict(model.named_modules())
    found = {key.removeprefix("1."): module for key, module in whole.items()} | whole
    if name not in found:
        raise InvalidArgumentError("layer", repr(name), "a module's name", did_you_mean(name, found))
    return found[name]


def _last_map(model: nn.Module, inputs: Tensor, net: nn.Module) -> nn.Module:
    """The module that ran last of those whose output is a map of more than one place, the classifier aside."""
    classifier = classifier_name(inner_network(net))
    seen: list[nn.Module] = []
    with _watching(model, seen, skip=classifier):
        model(inputs)
    if not seen:
        raise InvalidArgumentError("net", "no module with a map [N, C, H, W] as its output", "a network for grad_cam")
    return seen[-1]


@contextmanager
def _watching(model: nn.Module, seen: list[nn.Module], skip: str | None) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.children()) or (skip is not None and name.removeprefix("1.") == skip):
            continue

        def note(module: nn.Module, _inputs: object, out: object) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] * out.shape[3] > 1:
                seen.append(module)

        handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def named_methods(methods: Sequence[str | Method]) -> dict[str, Method]:
    """Methods by name, a function's own name where one is given; all of them take several classes an image."""
    found: dict[str, Method] = {}
    for entry in methods:
        name = entry if isinstance(entry, str) else getattr(entry, "__name__", "method")
        if name in found:
            raise InvalidArgumentError("methods", f"{name!r} twice", "methods of different names")
        made = method(entry) if isinstance(entry, str) else entry
        found[name] = made if getattr(made, "several_classes", False) else _class_by_class(made)
    if not found:
        raise InvalidArgumentError("methods", "none", "at least one method")
    return found


def methods_of(
    methods: Sequence[str | Method] | Mapping[str, Sequence[str | Method]], network: str
) -> dict[str, Method]:
    """A network's methods by name: those of all networks, or its own.

    Raises:
        InvalidArgumentError: no methods for this network, or what :func:`named_methods` refuses.
    """
    if not isinstance(methods, Mapping):
        return named_methods(methods)
    if network not in methods:
        raise InvalidArgumentError("methods", f"none for {network!r}", "methods of every network")
    return named_methods(methods[network])

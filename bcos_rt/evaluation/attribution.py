"""Attribution methods behind one interface: the network's own explanation, and post-hoc methods through captum.

Post-hoc methods see a network as the published evaluation shows it to them: from the normalised image of a conventional
network, or the encoded image ``[x, 1 - x]`` of a B-cos network, to the logits. What they attribute to the channels of a
pixel is summed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.data import derived_seed
from bcos_rt.errors import (
    BcosError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedOpError,
    did_you_mean,
)
from bcos_rt.evaluation.checks import check_count
from bcos_rt.evaluation.prepared import (
    OwnActivation,
    OwnReLU6,
    Prepared,
    activations_of,
    last_map,
    named_layer,
    seen,
)
from bcos_rt.explanation.explain import explain
from bcos_rt.lazy import require
from bcos_rt.nn.network import BcosNetwork

__all__ = ["METHODS", "Method", "method", "methods_of", "named_methods", "unsupported_methods"]

# (network, images [N, 3, H, W] in [0, 1], classes [N]) -> what each pixel is said to contribute, [N, H, W]. Those of
# method() also take classes [N, K], K of each image, and then give maps [N, K, H, W].
Method = Callable[[nn.Module, Tensor, Tensor], Tensor]
# As many pixels as 64 images of 224 x 224 have.
PIXELS = 64 * 224 * 224


def method(name: str, **options: Any) -> Method:
    """The attribution method of that name, a function of (network, images [N, 3, H, W] in [0, 1], classes).

    Classes are [N] int64 for maps [N, H, W], or [N, K] for maps [N, K, H, W] of K classes of each image; ``"bcos"`` and
    ``"occlusion"`` then need no more forward passes than for one, other methods look at each image K times.

    Args:
        name: ``"bcos"``, the contribution map of the network's own explanation; ``"gradient"``, with its sign;
            ``"saliency"``, its magnitude; ``"input_x_gradient"``, ``"integrated_gradients"`` (``n_steps``, 50,
            ``internal_batch_size``, images that the network sees at once, by default 64, and fewer where they are
            larger than 224 x 224), ``"guided_backprop"``, ``"deep_lift"``, ``"grad_cam"`` (``layer``, a module's name;
            by default the last one before the classifier that still has a map; ``resize``, ``"bilinear"`` or, as in
            B-cos v2's code, ``"nearest"``), ``"occlusion"`` (``window``, a seventh of the image's side, ``stride``,
            half the window); ``"random"``, noise, the floor.
        options: of the method.

    Raises:
        InvalidArgumentError: an unknown method or option.
        MissingDependencyError: captum (extra ``evaluate``) is not installed; when the method is used.
        UnsupportedOpError: the network has nothing the method could work with, see :func:`unsupported_methods`; when it
            is used.
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
    if function not in (_bcos, _occlusion):
        chosen = _class_by_class(chosen)
    chosen.__name__ = name
    chosen.several_classes = True  # type: ignore[attr-defined]
    if name in _CHECKS:
        chosen.check = functools.partial(_CHECKS[name], **options)  # type: ignore[attr-defined]
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
    _check_bcos(net, images)
    return explain(net, images, targets).contributions


def _check_bcos(net: nn.Module, _images: Tensor) -> None:
    if not isinstance(net, BcosNetwork):
        raise InvalidTypeError(
            "net", type(net).__name__, "a B-cos network, for the method 'bcos'", " (try 'input_x_gradient')"
        )


def _random(net: nn.Module, images: Tensor, targets: Tensor, *, seed: int = 0) -> Tensor:
    # Other noise for other images, the same for the same ones.
    generator = torch.Generator().manual_seed(derived_seed(seed, int(1e6 * float(images.double().sum()))))
    return torch.rand(len(images), *images.shape[2:], generator=generator).to(images.device)


def _gradient(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The gradient with its sign, B-cos v2's ``Grad``."""
    inputs, made = seen(net, images)
    return _summed(_of_image(net, _captum("Saliency")(made.model).attribute(inputs, targets, abs=False)))


def _saliency(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The gradient's magnitude (Simonyan et al. 2014)."""
    inputs, made = seen(net, images)
    return _summed(_captum("Saliency")(made.model).attribute(inputs, targets))


def _input_x_gradient(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    inputs, made = seen(net, images)
    return _summed(_captum("InputXGradient")(made.model).attribute(inputs, targets))


def _integrated_gradients(
    net: nn.Module, images: Tensor, targets: Tensor, *, n_steps: int = 50, internal_batch_size: int | None = None
) -> Tensor:
    """From a baseline of zeros, which is the mean image of a conventional network (Sundararajan et al. 2017)."""
    for name, value in (("n_steps", n_steps), ("internal_batch_size", internal_batch_size)):
        if value is not None:
            check_count(name, value)
    inputs, made = seen(net, images)
    height, width = images.shape[2:]
    at_once = internal_batch_size or max(1, min(64, PIXELS // (height * width)))
    gradients = _captum("IntegratedGradients")(made.model)
    # captum takes all its images at a time, whatever the size of its batches: it is given no more than fit.
    found = [
        gradients.attribute(part, target=classes, n_steps=n_steps, internal_batch_size=at_once)
        for part, classes in zip(inputs.split(at_once), targets.split(at_once), strict=True)  # type: ignore[no-untyped-call]
    ]
    return _summed(torch.cat(found))


def _guided_backprop(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Springenberg et al. 2015: at ReLUs nothing negative goes back."""
    inputs, made = seen(net, images)
    _needs_relus(made, inputs[:1])
    return _summed(_of_image(net, _captum("GuidedBackprop")(made.model).attribute(inputs, targets)))


def _check_guided(net: nn.Module, images: Tensor) -> None:
    inputs, made = seen(net, images[:1])
    _needs_relus(made, inputs)


def _needs_relus(made: Prepared, inputs: Tensor) -> None:
    """Refuse networks of which guided backpropagation is the plain gradient, and warn where it is so in part."""
    if "guided_backprop" not in made.known:
        made.known["guided_backprop"] = activations_of(made.model, inputs)
        modules, functions, others = made.known["guided_backprop"]
        if modules and not functions and others:
            warnings.warn(
                f"guided_backprop: {made.name} has other activations beside ReLUs, {', '.join(others)}; what goes back "
                "through these is the plain gradient",
                stacklevel=3,
            )
    modules, functions, others = made.known["guided_backprop"]
    if functions:
        raise UnsupportedOpError(
            f"guided_backprop needs every ReLU to be a module, and {made.name} calls functions and cannot be traced to "
            "be rewritten so: in parts this would be the plain gradient"
        )
    if not modules:
        instead = f", but {', '.join(others)}" if others else ""
        raise UnsupportedOpError(
            f"guided_backprop changes gradients at ReLUs, and {made.name} has none{instead}: this would be the plain "
            "gradient (the method 'gradient')"
        )


# DeepLift's sum may miss the difference of the logits by this share of it before we say so; rounding is far below.
DEEP_LIFT_SLACK = 0.01


def _deep_lift(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """From a baseline of zeros (Shrikumar et al. 2017, rescale rule)."""
    inputs, made = seen(net, images)
    lift = _captum("DeepLift")(made.model)
    _teach_deep_lift()
    try:
        found = lift.attribute(inputs, target=targets).detach()
    except RuntimeError as error:
        if "used more than once" not in str(error):
            raise
        raise UnsupportedOpError(
            f"DeepLift needs every activation to be a module that is used once, and {made.name} could not be "
            f"rewritten so: {str(error).splitlines()[0]}"
        ) from error
    if "deep_lift" not in made.known:
        made.known["deep_lift"] = missing = _missing_share(made, inputs, targets, found)
        if missing > DEEP_LIFT_SLACK:
            warnings.warn(
                f"deep_lift: attributions of {made.name} miss the logit's difference from the baseline's by "
                f"{missing:.0%} of it. captum's DeepLift has no rule for norms that depend on the image, for "
                "products, B-cos layers and functions that could not be rewritten as modules, and its rule for "
                "max-pools does not always add up",
                stacklevel=2,
            )
    return _summed(found)


@functools.cache
def _teach_deep_lift() -> None:
    """Have captum apply the rescale rule to our modules too: it holds for every function of one number."""
    rules = require("captum.attr._core.deep_lift", "evaluate")
    for module in (OwnActivation, OwnReLU6):
        rules.SUPPORTED_NON_LINEAR[module] = rules.nonlinear


@torch.no_grad()
def _missing_share(made: Prepared, inputs: Tensor, targets: Tensor, found: Tensor) -> float:
    """How far sums of attributions are from differences of logits, as a share of these."""
    logits, base = made.model(inputs), made.model(torch.zeros_like(inputs[:1]))
    difference = (logits - base).gather(1, targets[:, None])[:, 0].double()
    missing = (found.double().sum((1, 2, 3)) - difference).abs().sum()
    return float(missing / difference.abs().sum().clamp(min=torch.finfo(torch.float64).tiny))


def _grad_cam(
    net: nn.Module, images: Tensor, targets: Tensor, *, layer: str | None = None, resize: str = "bilinear"
) -> Tensor:
    """Selvaraju et al. 2017: positive part, resized to the image."""
    if resize not in ("bilinear", "nearest"):
        raise InvalidArgumentError("resize", repr(resize), "'bilinear' or 'nearest'")
    inputs, made = seen(net, images)
    model, chosen = _cam_layer(net, made, inputs[:1], layer)
    found = _captum("LayerGradCam")(model, chosen).attribute(inputs, targets, relu_attributions=True)
    corners = False if resize == "bilinear" else None
    resized = F.interpolate(found, images.shape[2:], mode=resize, align_corners=corners)
    return _summed(resized)


def _check_cam(net: nn.Module, images: Tensor, *, layer: str | None = None, **_: Any) -> None:
    inputs, made = seen(net, images[:1])
    _cam_layer(net, made, inputs, layer)


def _cam_layer(net: nn.Module, made: Prepared, inputs: Tensor, layer: str | None) -> tuple[nn.Module, nn.Module]:
    """The network and the module in it whose channels are weighted."""
    # Of another size of images, another layer may be the last with more than one place.
    key = ("grad_cam", layer, tuple(inputs.shape[2:]))
    if key not in made.known:
        found = (made.model, last_map(made, inputs, net)) if layer is None else named_layer(net, layer, inputs)
        made.known[key] = found
    model, chosen = made.known[key]
    return model, chosen


def _occlusion(
    net: nn.Module, images: Tensor, targets: Tensor, *, window: int | None = None, stride: int | None = None,
    perturbations: int = 8,
) -> Tensor:  # fmt: skip
    """Zeiler & Fergus 2014: how much the logit falls when a square is replaced by zeros (the mean colour).

    Of several classes an image too, from the same passes: what is seen through a window gives all logits.
    """
    smallest = min(images.shape[2:])
    side = max(1, smallest // 7) if window is None else window
    check_count("window", side)
    if side > smallest:
        raise InvalidArgumentError("window", side, f"at most {smallest} pixels, the image's shorter side")
    step = max(1, side // 2) if stride is None else stride
    check_count("stride", step)
    if step > side:
        raise InvalidArgumentError("stride", step, f"at most {side}, the window's side: each pixel is to be covered")
    check_count("perturbations", perturbations)
    inputs, made = seen(net, images)
    channels = inputs.shape[1]

    def logits_of(part: Tensor, classes: Tensor) -> Tensor:
        chosen: Tensor = made.model(part).gather(1, classes)
        return chosen

    with torch.no_grad():
        # captum gives maps of each number that the function returns: [N, K] of them, the classes of an image in a row.
        found = _captum("Occlusion")(logits_of).attribute(
            inputs, sliding_window_shapes=(channels, side, side), strides=(channels, step, step),
            additional_forward_args=(targets.reshape(len(targets), -1),), perturbations_per_eval=perturbations,
        )  # fmt: skip
    # A window covers all channels, and each of them is given its whole difference.
    mean: Tensor = found.mean(1).detach().to(images.dtype)
    return mean.reshape(*targets.shape, *images.shape[2:])


def _summed(attributions: Tensor) -> Tensor:
    """Over channels."""
    return attributions.sum(1).detach()


def _of_image(net: nn.Module, gradients: Tensor) -> Tensor:
    """Gradients of the encoded image ``[x, 1 - x]`` as those of x: what one half adds the other takes away.

    Their plain sum over channels is 0 wherever a first layer's filters are antisymmetric, as conversion makes them.
    """
    if isinstance(net, BcosNetwork) and net.encoding.six_channels:
        of_x, of_inverse = gradients.chunk(2, dim=1)
        return of_x - of_inverse
    return gradients


METHODS: dict[str, Callable[..., Tensor]] = {
    "bcos": _bcos,
    "gradient": _gradient,
    "saliency": _saliency,
    "input_x_gradient": _input_x_gradient,
    "integrated_gradients": _integrated_gradients,
    "guided_backprop": _guided_backprop,
    "deep_lift": _deep_lift,
    "grad_cam": _grad_cam,
    "occlusion": _occlusion,
    "random": _random,
}
# What a method refuses, without its work: (network, images, options of the method) -> nothing, or an error.
_CHECKS: dict[str, Callable[..., object]] = {
    "bcos": _check_bcos,
    "guided_backprop": _check_guided,
    "grad_cam": _check_cam,
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


def named_methods(methods: Sequence[str | Method]) -> dict[str, Method]:
    """Methods by name, a function's own name where one is given; all of them take several classes an image."""
    found: dict[str, Method] = {}
    if isinstance(methods, str):
        raise InvalidTypeError("methods", repr(methods), f"a sequence of methods, such as [{methods!r}]")
    for entry in methods:
        name = entry if isinstance(entry, str) else getattr(entry, "__name__", "method")
        if name in found:
            raise InvalidArgumentError("methods", f"{name!r} twice", "methods of different names")
        made = method(entry) if isinstance(entry, str) else entry
        found[name] = made if getattr(made, "several_classes", False) else _class_by_class(made)
    if not found:
        raise InvalidArgumentError("methods", "none", "at least one method")
    return found


def unsupported_methods(net: nn.Module, methods: Sequence[str | Method], images: Tensor) -> dict[str, str]:
    """Which methods refuse a network, and why: ``"grad_cam"`` without a map, ``"guided_backprop"`` without ReLUs.

    The others attribute something on it; a warning of theirs is given when they are used.

    Args:
        methods: names or functions.
        images: [N, 3, H, W] in [0, 1], of the size that the methods will see; one is enough.

    Returns:
        Reasons by the name of the method, in the order of ``methods``.
    """
    reasons: dict[str, str] = {}
    for name, made in named_methods(methods).items():
        check = getattr(made, "check", None)
        if check is None:
            continue
        try:
            check(net, images)
        except BcosError as error:
            reasons[name] = str(error)
    return reasons


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

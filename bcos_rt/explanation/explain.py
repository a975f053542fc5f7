"""``explain``: the dynamic linear summary of a network on given images."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bcos_rt.conversion import Recipe, bcosify
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.explanation.explanation import Explanation
from bcos_rt.graph import explanation_graph
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.network import BcosNetwork, check_range

__all__ = ["as_network", "class_ids_of", "encoded_images", "explain", "fingerprint", "is_multi"]

# Equivalent conversions of conventional models are kept while the model lives; nothing is stored in the model itself.
_EQUIVALENTS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, BcosNetwork]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def fingerprint(model: nn.Module) -> Any:
    """What differs, as far as can be seen cheaply, once a model's layers, options or values have changed."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    # A tensor's version does not count writes through .data; its sum shows those.
    sums = tuple(t.sum(dtype=torch.float64).item() for t in tensors)
    return repr(model), tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors), sums


def _equivalent(model: nn.Module) -> BcosNetwork:
    """A conventional model as an equivalent B = 1 network; kept until one of its tensors changes."""
    key = fingerprint(model)
    with _LOCK:
        kept = _EQUIVALENTS.get(model)
        if kept is None or kept[0] != key:
            kept = _EQUIVALENTS[model] = (key, _converted(model))
        return kept[1]


def _converted(model: nn.Module) -> BcosNetwork:
    if not isinstance(model, ConventionalNetwork):
        return bcosify(model, Recipe.equivalent())[0]
    # It normalises by itself, which a converted network does too: once is enough.
    mean, std = (tuple(v.flatten().tolist()) for v in (model.mean, model.std))
    return bcosify(model.model, Recipe.equivalent(mean=mean, std=std), class_names=model.class_names)[0]


def class_ids_of(targets: Any, images: int, classes: int, device: torch.device) -> Tensor:
    """Targets in any accepted form as int64 [N] or [N, K], -1 for the top class."""
    expected = f"None, an int, {images} ints (one per image) or [{images}, K] ints, each 0 to {classes - 1}"
    if targets is None:
        return torch.full((images,), -1, dtype=torch.int64, device=device)
    if isinstance(targets, Tensor):
        given = targets
    elif isinstance(targets, bool | str):
        raise InvalidTypeError("targets", repr(targets), expected)
    else:
        try:
            if isinstance(targets, Sequence) and targets and all(isinstance(t, Tensor) for t in targets):
                targets = torch.stack([t.cpu() for t in targets])
            elif isinstance(targets, Sequence) and targets and all(isinstance(t, np.ndarray) for t in targets):
                targets = np.stack(targets)
            given = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidTypeError("targets", repr(targets)[:80], expected) from error
    untyped = given.numel() == 0 and not isinstance(targets, Tensor)  # [] becomes a float tensor
    if not untyped and (given.dtype == torch.bool or given.is_floating_point() or given.is_complex()):
        raise InvalidTypeError("targets", f"values of dtype {given.dtype}", expected)
    given = given.to(device=device, dtype=torch.int64)
    if given.ndim == 0:
        given = given.expand(images)
    if given.ndim > 2 or given.shape[0] != images or (given.ndim == 2 and given.shape[1] == 0):
        raise InvalidArgumentError("targets", f"shape {tuple(given.shape)} for {images} images", expected)
    if given.numel() and (int(given.min()) < -1 or int(given.max()) >= classes):
        bad = int(given.min()) if int(given.min()) < -1 else int(given.max())
        raise InvalidArgumentError("targets", f"class {bad}", f"0 to {classes - 1}, or -1 for the top class")
    return given.contiguous()


def as_network(net: nn.Module) -> tuple[BcosNetwork, str]:
    """The B-cos network to explain, and what to call its explanations; any other classifier is converted first.

    Raises:
        InvalidTypeError: no module.
    """
    net = getattr(net, "_orig_mod", net)  # torch.compile's wrapper: the graph is captured from what it wraps
    if not isinstance(net, nn.Module):
        raise InvalidTypeError("net", type(net).__name__, "a BcosNetwork or another torch.nn.Module")
    if not isinstance(net, BcosNetwork):
        net = _equivalent(net)
    return net, "initial explanation" if net.recipe.b == 1 else "explanation"


def explain(
    net: nn.Module,
    images: Tensor,
    targets: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
) -> Explanation:
    """Explain a network's logits on a batch of images, exactly.

    The network is captured with ``torch.export`` (kept for further calls with that image size, any batch), and its
    dynamic linear map transposed op by op, without autograd: one forward pass, then one transposed pass per class. It
    is always the function of evaluation mode that is explained; nothing in the network changes.

    Args:
        net: a :class:`BcosNetwork`. Any other image classifier is first converted with :meth:`Recipe.equivalent`, so it
            too takes images in [0, 1]; what comes out is its *initial* explanation.
        images: [N, 3, H, W] in [0, 1], or [N, 6, H, W] already encoded as ``[x, 1 - x]``. Any size the network takes.
        targets: None for each image's top class; one int for all images; N ints; or [N, K] ints for K classes of each
            image at one forward pass. -1 stands for the top class.

    Raises:
        InvalidArgumentError, InvalidTypeError: unusable images or targets (named).
        UnsupportedOpError: an op without a dynamic-linear rule, named with its module.
    """
    net, label = as_network(net)
    encoded = encoded_images(net, images)
    n, channels, height, width = encoded.shape
    multi = is_multi(targets)
    graph = explanation_graph(net, (height, width), multi=multi)
    classes = graph.classes
    class_ids = class_ids_of(targets, n, classes, encoded.device)
    names = tuple(net.class_names) if net.class_names is not None and len(net.class_names) == classes else None
    if n == 0:
        lead = tuple(class_ids.shape)
        return Explanation(
            encoded.new_zeros(0, classes),
            class_ids,
            encoded.new_zeros(*lead, channels, height, width),
            encoded.new_zeros(*lead, height, width),
            encoded.new_zeros(*lead),
            encoded,
            names,
            label,
        )
    result = graph(net, encoded, class_ids)
    return Explanation(
        result["logits"],
        result["class_used"],
        result["weights"],
        result["contributions"],
        result["residual"],
        encoded,
        names,
        label,
    )


def encoded_images(net: BcosNetwork, images: Tensor) -> Tensor:
    """Checked images, encoded, on the network's device and of its dtype, [N, C, H, W].

    Raises:
        InvalidArgumentError, InvalidTypeError: unusable images.
    """
    like = next(net.parameters(), net.encoding.mean)
    encoded = net.encode(images)
    if encoded.device != like.device:
        raise InvalidArgumentError("images", f"on {encoded.device}", f"the network's device, {like.device}")
    if images.device.type != "cpu":
        check_range(images)
    if 0 in encoded.shape[2:]:
        raise InvalidArgumentError("images", f"shape {tuple(images.shape)}", "at least one pixel")
    return encoded.detach().to(like.dtype)


def is_multi(targets: Any) -> bool:
    if isinstance(targets, Tensor):
        return targets.ndim == 2
    if hasattr(targets, "ndim"):
        return int(targets.ndim) == 2
    return (
        isinstance(targets, Sequence)
        and len(targets) > 0
        and (isinstance(targets[0], Sequence) or getattr(targets[0], "ndim", 0) == 1)
        and not isinstance(targets, str)
    )

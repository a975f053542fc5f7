"""Calling an image model whose forward takes more than the image, or returns more than one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from bcos_rt.errors import InvalidTypeError

__all__ = ["image_sizes", "main_output", "takes_other_sizes", "with_options"]

# The entries of an output object that are the model's answer, the first that is there.
_ANSWERS = ("logits", "image_embeds", "pooler_output")
# An option of a transformer's forward: position embeddings are interpolated where the image has another size.
_INTERPOLATE = "interpolate_pos_encoding"


def main_output(output: Any) -> Tensor:
    """The logits (or embedding) in what a model returns: a tensor, or an object or mapping that holds them by name.

    Raises:
        InvalidTypeError: neither.
    """
    for value in _candidates(output):
        if isinstance(value, Tensor):
            return value
        if isinstance(value, fx.Proxy):  # the model is being traced
            proxy: Any = value
            return proxy  # type: ignore[no-any-return]
    expected = "a tensor of logits [N, classes], or an object with them as its attribute 'logits'"
    raise InvalidTypeError("model", f"an output of type {type(output).__name__}", expected)


def _candidates(output: Any) -> Iterator[Any]:
    yield output
    for name in _ANSWERS:
        yield output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def takes_other_sizes(model: nn.Module) -> bool:
    """Whether a model's forward has the option to interpolate its position embeddings to the image's size."""
    return _INTERPOLATE in inspect.signature(type(model).forward).parameters


def image_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """The sizes (H, W) of images that a model says it was made for, the likeliest first; empty where it says nothing.

    Read from a ``config`` or the model itself (``image_size``, ``img_size``) and timm's ``pretrained_cfg``.
    """
    patches = getattr(model, "patch_embed", None)
    config, pretrained = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    stated = [getattr(holder, name, None) for holder in (config, patches, model) for name in ("image_size", "img_size")]
    if isinstance(pretrained, Mapping):
        stated.append(tuple(pretrained.get("input_size") or ())[-2:])
    found: list[tuple[int, int]] = []
    for value in stated:
        pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
        if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair) and pair not in found:
            found.append(pair)
    return found


def with_options(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Keyword arguments for a model that :func:`takes_other_sizes`, given images [N, C, H, W]."""
    native = image_sizes(model)[:1]
    # At its own size a model adds its embeddings as they are, square or not.
    return {} if not native or tuple(images.shape[-2:]) == native[0] else {_INTERPOLATE: True}

"""Patch embeddings by a linear layer: which of its inputs is which pixel and channel.

A ViT that cuts the image into patches by shape operations and embeds them with a linear layer (SimpleViT) has an order
of its own for a patch's numbers. The weights for [x, 1 - x] must follow it. It is read off the model: an image
whose every value is its own position goes through, and what arrives at the linear layer says where it came from.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["widening"]


class _SeenError(Exception):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _arriving(model: nn.Module, linear: nn.Linear, image: Tensor) -> Tensor | None:
    """What ``linear`` is called with, [rows, features]; None where the model fails before, or never calls it."""

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _SeenError(arguments[0])

    handle = linear.register_forward_pre_hook(stop)
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(image)
    except _SeenError as seen:
        return seen.value.reshape(-1, seen.value.shape[-1])
    except Exception:  # any model may fail in any way at a size or a number of channels that it does not take
        return None
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return None


def _positions(model: nn.Module, linear: nn.Linear, channels: int, size: tuple[int, int]) -> Tensor | None:
    """[patches, features]: the position in a [channels, H, W] image each number comes from; None if it is no copy."""
    count = channels * size[0] * size[1]
    # Powers of two apart from a model's dtype, float32 counts exactly to 2**24.
    image = torch.arange(count, dtype=linear.weight.dtype, device=linear.weight.device).reshape(1, channels, *size)
    if not torch.equal(image.long().flatten(), torch.arange(count, device=image.device)):
        return None
    found = _arriving(model, linear, image)
    if found is None or found.numel() != count or not torch.equal(found.flatten().sort().values, image.flatten()):
        return None
    return found.long()


def widening(model: nn.Module, linear: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """How a patch embedding of three channels becomes one of six.

    Args:
        model: takes images [N, 3, H, W].
        linear: the layer that gets the patches' pixels, unchanged, in some order.

    Returns:
        ``(source, channel)``, both [2 * in_features]: the new weight's column j is ``w[:, source[j]]`` times a number
        of ``channel[j]``, the channel 0 ... 5 of ``[x, 1 - x]`` that arrives there.
        None where the layer gets something else than several patches of the image's numbers in another order, or where
        the model cannot take six channels.
    """
    side = math.isqrt(linear.in_features // 3)
    # Two sides that differ tell rows from columns; 224 for a model made for one size only.
    for size in ((2 * side, 3 * side), (2 * side, 2 * side), (224, 224)):
        three, six = _positions(model, linear, 3, size), _positions(model, linear, 6, size)
        if three is None or six is None or len(three) == 1 or len(three) != len(six):
            continue
        area = size[0] * size[1]
        # Position in the six-channel image -> position in the three-channel one of the same colour.
        same_colour = six % (3 * area)
        columns = torch.stack([torch.searchsorted(t.sort().values, s) for t, s in zip(three, same_colour, strict=True)])
        columns = columns.clamp(max=three.shape[1] - 1)
        source = torch.stack([t.argsort()[c] for t, c in zip(three, columns, strict=True)])
        channel = six // area
        matches = torch.equal(torch.gather(three, 1, source), same_colour)
        if matches and bool((source == source[0]).all()) and bool((channel == channel[0]).all()):
            return source[0], channel[0]
    return None

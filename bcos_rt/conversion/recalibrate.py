"""Recompute the norms' statistics: B-cos layers change the scale of every feature map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["recalibrate"]


def recalibrate(net: nn.Module, loader: Iterable[Any], momentum: float | None = None) -> None:
    """Recompute ``running_mean`` and ``running_var`` of every BatchNorm-like layer in one pass over images.

    The norms run on each batch's own statistics, as in training; everything else (dropout, stochastic depth) as in
    evaluation. A network without such layers is left as it is.

    Args:
        net: The network; its modes and the norms' momenta are as before afterwards.
        loader: Batches [N, 3, H, W] in [0, 1] (what ``net`` takes), or ``(images, labels, ...)`` tuples; a single
            tensor is one batch. Batches move to the network's device and dtype.
        momentum: ``None`` forgets the old statistics and averages over the batches, each counting the same; a number
            in (0, 1] updates the old statistics as training does. With one batch ``None`` equals 1.

    Raises:
        InvalidTypeError: ``net`` is no module, or a batch holds no tensor.
        InvalidArgumentError: a momentum outside (0, 1], an empty loader, or a batch with one value per channel where
            the network has a conventional BatchNorm. The statistics are as before then.
    """
    if not isinstance(net, nn.Module):
        raise InvalidTypeError("net", type(net).__name__, "a torch.nn.Module")
    if momentum is not None and not 0 < momentum <= 1:
        raise InvalidArgumentError("momentum", momentum, "a number in (0, 1], or None to average over the batches")
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    modes = {m: m.training for m in net.modules()}
    momenta = [m.momentum for m in norms]
    saved = [{name: buffer.clone() for name, buffer in m.named_buffers(recurse=False)} for m in norms]
    reference = next(net.parameters(), None)
    batches = 0
    net.eval()
    try:
        for norm in norms:
            # Not norm.train(): a norm's own dropout and activation stay in evaluation.
            norm.training = True
            norm.momentum = momentum
            if momentum is None:
                norm.reset_running_stats()
        with torch.no_grad():
            for images in _batches(loader):
                if reference is not None:
                    # Not the dtype of integers: the network rejects those, 0..255 would pass for a bright image.
                    dtype = reference.dtype if images.is_floating_point() else images.dtype
                    images = images.to(reference.device, dtype)
                net(images)
                batches += 1
        if batches == 0:
            raise InvalidArgumentError("loader", "no batch", "at least one batch of images")
    except BaseException as error:
        for norm, buffers in zip(norms, saved, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise InvalidArgumentError(
                "loader",
                f"a batch with one value per channel ({error})",
                "larger batches or images: a conventional BatchNorm has no variance there",
            ) from error
        raise
    finally:
        for norm, old in zip(norms, momenta, strict=True):
            norm.momentum = old
        for module, mode in modes.items():
            module.training = mode


def _batches(loader: Iterable[Any]) -> Iterator[Tensor]:
    if isinstance(loader, Tensor):
        loader = [loader]
    if not isinstance(loader, Iterable):
        raise InvalidTypeError("loader", type(loader).__name__, "an iterable of image batches, or one batch")
    for batch in loader:
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(images, Tensor):
            raise InvalidTypeError(
                "loader", f"a batch of type {type(batch).__name__}", "image tensors, or tuples of them"
            )
        if images.ndim == 4 and len(images) == 0:
            raise InvalidArgumentError("loader", "an empty batch", "batches of at least one image")
        yield images

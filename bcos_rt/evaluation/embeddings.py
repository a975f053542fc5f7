"""What an image tower makes of images: unit tokens and embeddings, whole data sets at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bcos_rt.data import loader, open_data, shard
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation.checks import example_tensor
from bcos_rt.explanation.text import require_embedding
from bcos_rt.graph.capture import eval_mode
from bcos_rt.nn.network import BcosNetwork, EmbeddingLayer

__all__ = ["Tell", "batches_of", "embeddings_of", "tokens_of"]

Tell = Callable[[str, int, int], None]


def tokens_of(net: nn.Module, images: Tensor) -> Tensor:
    """Unit tokens [N, T, D] of images [N, 3, H, W] in [0, 1]; T is 1 of a tower that pools.

    Args:
        net: a :class:`BcosNetwork` with an embedding, or any module that returns [N, D] or [N, T, D].
    """
    if isinstance(net, BcosNetwork):
        return net.tokens_encoded(net.encode(images))
    outputs = net(images)
    if not isinstance(outputs, Tensor) or outputs.ndim not in (2, 3):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InvalidArgumentError("net", f"an output {got}", "embeddings [N, D], or tokens [N, T, D]")
    return EmbeddingLayer().tokens(outputs)


def batches_of(
    net: nn.Module, data: Any, batch_size: int, workers: int, tell: Tell | None, what: str
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of data, in evaluation mode: indices, pixels [n, 3, H, W] where the network is, labels [n].

    Raises:
        InvalidArgumentError, InvalidTypeError: no image, no module, a B-cos network that returns logits.
    """
    if isinstance(net, BcosNetwork):
        require_embedding(net)
    elif not isinstance(net, nn.Module):
        raise InvalidTypeError("net", type(net).__name__, "a torch.nn.Module, an image tower")
    images = open_data(data)
    if len(images) == 0:
        raise InvalidArgumentError("data", "no image", "images with labels")
    like = example_tensor(net)
    with eval_mode(net):
        batches = shard(len(images), batch_size)
        for batch, (pixels, labels) in zip(batches, loader(images, batches, workers), strict=True):
            yield list(batch), pixels.to(like.device, like.dtype), labels
            if tell is not None:
                tell(what, batch[-1] + 1, len(images))


def embeddings_of(
    net: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    workers: int = 0,
    tell: Tell | None = None,
    what: str = "encoding",
) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] in float64, the means of unit tokens, and labels [N], of a data set.

    Args:
        net: see :func:`tokens_of`.
        data: what :func:`bcos_rt.data.open_data` takes.
        batch_size, workers: images at a time; processes that read them.
        tell: called with ``what``, images done and images in all.
    """
    rows: list[Tensor] = []
    labels_seen: list[Tensor] = []
    for _, pixels, labels in batches_of(net, data, batch_size, workers, tell, what):
        with torch.no_grad():
            rows.append(tokens_of(net, pixels).double().mean(1).cpu())
        labels_seen.append(labels)
    return torch.cat(rows), torch.cat(labels_seen)

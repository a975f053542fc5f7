"""Zero-shot classification: the class whose text fits an image best (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bcos_rt.data import open_data
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation.accuracy import Evaluation, judged
from bcos_rt.evaluation.checks import check_count, spread
from bcos_rt.evaluation.embeddings import Tell, batches_of, tokens_of
from bcos_rt.explanation.text import checked_texts, explain_text
from bcos_rt.graph import TokenPooling
from bcos_rt.nn.network import BcosNetwork

__all__ = ["pooled_cosines", "zero_shot"]


def zero_shot(
    net: nn.Module,
    data: Any,
    text_embeddings: Tensor,
    pooling: Literal["mean", "max", "cosine_power"] = "mean",
    *,
    power: float | None = None,
    logit_scale: float = 100.0,
    batch_size: int = 64,
    workers: int = 0,
    completeness_images: int = 256,
    bins: int = 15,
    tell: Tell | None = None,
) -> Evaluation:
    """Classify labelled images by the text embeddings of their classes.

    A class's logit is ``logit_scale`` times its pooled cosine, the score that :func:`bcos_rt.explain_text` explains.

    Args:
        net: an image tower: a :class:`bcos_rt.BcosNetwork` with an embedding, or any module that takes images [N, 3, H,
            W] in [0, 1] and returns embeddings [N, D] or tokens [N, T, D] of any norm (``loaded.conventional()``).
        data: what :func:`bcos_rt.data.open_data` takes.
        text_embeddings: [classes, D] in the order of the labels, of any norm:
            ``clip.encode_text(class_names, templates)``.
        pooling, power: as for :func:`bcos_rt.explain_text`.
        logit_scale: CLIP's, ``ClipModel.logit_scale``; it changes probabilities, not which class is first.
        batch_size, workers: images at a time; processes that read them.
        completeness_images: how many images are explained, each for its best text, spread evenly over the data; for
            B-cos networks. The errors are in logits.
        bins: of the calibration.
        tell: called with what is being done, images done and images in all.

    Raises:
        InvalidArgumentError, InvalidTypeError: unusable arguments, named; images without labels, or labels without a
            text.
    """
    how = TokenPooling.of(pooling, power)
    if isinstance(logit_scale, bool) or not isinstance(logit_scale, int | float):
        raise InvalidTypeError("logit_scale", repr(logit_scale), "a number > 0")
    if not 0 < logit_scale < float("inf"):
        raise InvalidArgumentError("logit_scale", logit_scale, "a finite number > 0")
    check_count("completeness_images", completeness_images, 0)
    rows: list[Tensor] = []
    labels_seen: list[Tensor] = []
    errors: list[Tensor] = []
    scales: list[Tensor] = []
    images = open_data(data)
    explained = spread(completeness_images, len(images))
    texts: Tensor | None = None
    for batch, pixels, labels in batches_of(net, images, batch_size, workers, tell, "evaluating"):
        with torch.no_grad():
            tokens = tokens_of(net, pixels)
            if texts is None:
                texts = checked_texts(text_embeddings, tokens.shape[-1], tokens.device).to(tokens.dtype)
            logits = logit_scale * pooled_cosines(tokens, texts, how).double()
        rows.append(logits.cpu())
        labels_seen.append(labels)
        if isinstance(net, BcosNetwork):
            for place in (i for i, index in enumerate(batch) if index in explained):
                best = texts[logits[place].argmax()][None]
                explanation = explain_text(net, pixels[place : place + 1], best, how.kind, power=power)
                errors.append(logit_scale * explanation.completeness_error()[:, 0].cpu())
                scales.append(logits[place].abs().amax()[None].cpu())
    return judged(torch.cat(rows), torch.cat(labels_seen), errors, scales, bins, [images.class_names])


def pooled_cosines(tokens: Tensor, texts: Tensor, pooling: TokenPooling) -> Tensor:
    """Scores [N, P] of unit tokens [N, T, D] with unit texts [P, D]; see :class:`TokenPooling`."""
    cosines = torch.matmul(texts, tokens.transpose(1, 2))
    if pooling.kind == "max":
        return cosines.amax(2)
    if pooling.kind == "cosine_power":
        cosines = cosines * cosines.abs() ** (pooling.power - 1)
    return cosines.mean(2)

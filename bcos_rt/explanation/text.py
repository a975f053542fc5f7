"""``explain_text``: what in an image speaks for a text, by an image tower of CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.explanation.explain import encoded_images
from bcos_rt.explanation.explanation import Explanation
from bcos_rt.graph import TokenPooling, explanation_graph
from bcos_rt.nn.network import BcosNetwork, EmbeddingLayer

__all__ = ["checked_texts", "explain_text", "named_texts", "require_embedding"]


def explain_text(
    net: BcosNetwork,
    images: Tensor,
    text_embeddings: Tensor,
    pooling: Literal["mean", "max", "cosine_power"] = "mean",
    *,
    power: float | None = None,
    prompts: Sequence[str] | None = None,
) -> Explanation:
    """Explain how well texts fit images, exactly: scores of an image tower's tokens.

    With ``t_i`` the unit tokens of an image (of a tower that pools: its one embedding) and ``e`` a unit text embedding,
    ``score = sum_i a_i <t_i, e>`` (B-cosification, Arya et al., NeurIPS 2024, arXiv 2411.00715, section 3.3; see
    :class:`bcos_rt.graph.TokenPooling`). Everything that depends on the image is held constant, the tokens' norms and
    the pooling weights ``a_i`` too, so that ``sum(contributions) + residual = score``. (The script published with the
    method normalises the tokens a second time and differentiates through that: its map is not a linear summary of the
    network and does not add up.)

    Args:
        net: a network with an embedding: ``bcosify(image_tower, Recipe.clip())``.
        images: [N, 3, H, W] in [0, 1], or [N, 6, H, W] already encoded as ``[x, 1 - x]``.
        text_embeddings: [P, D], floating point, of any norm: they are scaled to 1. P texts share one forward pass.
        pooling: of the cosines with all tokens: ``"mean"``, ``"max"``, or ``"cosine_power"``, where each cosine c
            counts ``|c|^(power - 1)`` times.
        power: of ``"cosine_power"``, at least 1.
        prompts: a name for each text, for pictures.

    Returns:
        An explanation with P classes, the texts: ``logits`` [N, P] are their scores in [-1, 1], ``target`` is
        0 ... P - 1 for each image, ``weights`` is [N, P, 6, H, W], and so on.

    Raises:
        InvalidArgumentError, InvalidTypeError: unusable arguments (named); a network that returns logits.
        UnsupportedOpError: an op without a dynamic-linear rule, named with its module.
    """
    how = TokenPooling.of(pooling, power)
    net = getattr(net, "_orig_mod", net)  # torch.compile's wrapper, as in explain()
    require_embedding(net)
    encoded = encoded_images(net, images)
    n, channels, height, width = encoded.shape
    graph = explanation_graph(net, (height, width), multi=True, pooling=how)
    texts = checked_texts(text_embeddings, graph.classes, encoded.device).to(encoded.dtype)
    count = texts.shape[0]
    names = named_texts(prompts, count)
    target = torch.arange(count, device=encoded.device).expand(n, count).contiguous()
    if n == 0:
        result = {
            "logits": encoded.new_zeros(0, count),
            "weights": encoded.new_zeros(0, count, channels, height, width),
            "contributions": encoded.new_zeros(0, count, height, width),
            "residual": encoded.new_zeros(0, count),
        }
    else:
        result = graph(net, encoded, texts.expand(n, *texts.shape).contiguous())
    return Explanation(
        result["logits"],
        target,
        result["weights"],
        result["contributions"],
        result["residual"],
        encoded,
        names,
        "initial explanation" if net.recipe.b == 1 else "explanation",
        "texts",
    )


def require_embedding(net: Any) -> None:
    """Raise unless a network's output is an embedding.

    Raises:
        InvalidTypeError: no network at all.
        InvalidArgumentError: a network that returns logits.
    """
    expected = "a BcosNetwork with an embedding, as bcosify(image_tower, Recipe.clip()) makes it"
    if not isinstance(net, BcosNetwork):
        hint = " (convert the image tower first)" if isinstance(net, nn.Module) else ""
        raise InvalidTypeError("net", type(net).__name__, expected, hint)
    if not isinstance(net.logit_layer, EmbeddingLayer):
        raise InvalidArgumentError("net", "a network that returns logits", expected)


def checked_texts(text_embeddings: Any, width: int, device: torch.device) -> Tensor:
    """Text embeddings [P, D], P > 0, finite and not zero, scaled to norm 1 in float64, on ``device``.

    Scaled here, before they get the network's dtype: a norm that is none in it would make scores wrong, or NaN.

    Raises:
        InvalidArgumentError, InvalidTypeError: anything else.
    """
    expected = f"a floating-point tensor [P, {width}], one row a text"
    if not isinstance(text_embeddings, Tensor) or not text_embeddings.is_floating_point():
        got = getattr(text_embeddings, "dtype", type(text_embeddings).__name__)
        raise InvalidTypeError("text_embeddings", str(got), expected)
    texts = text_embeddings.detach().double()
    if texts.ndim != 2 or texts.shape[0] == 0 or texts.shape[1] != width:
        hint = " (add a dimension: text_embeddings[None])" if tuple(texts.shape) == (width,) else ""
        raise InvalidArgumentError("text_embeddings", f"shape {tuple(texts.shape)}", expected, hint)
    norms = torch.linalg.vector_norm(texts, dim=1, keepdim=True)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise InvalidArgumentError("text_embeddings", "a row that is zero or not finite", "directions of texts")
    unit: Tensor = (texts / norms).to(device)
    return unit


def named_texts(prompts: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """One name a text, or None.

    Raises:
        InvalidArgumentError, InvalidTypeError: no sequence of strings, or not one for each text.
    """
    if prompts is None:
        return None
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise InvalidTypeError("prompts", repr(prompts)[:80], "a sequence of strings")
    if len(prompts) != count:
        raise InvalidArgumentError("prompts", f"{len(prompts)} prompts", f"one per text, {count}")
    return tuple(prompts)

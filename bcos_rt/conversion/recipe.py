"""The recipe: every difference between a conventional and a B-cos network, each a field of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, did_you_mean

__all__ = ["Recipe"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Recipe:
    """How :func:`bcos_rt.bcosify` turns a conventional network into a B-cos network.

    The defaults are the final CNN recipe of B-cosification (Arya et al., NeurIPS 2024, arXiv 2411.00715,
    section 3): six input channels, B = 2, un-normalised weights, no biases, uncentred BatchNorm, the stem's
    max-pool averaged, the head before the global pool, a logit bias of ``-log(classes - 1)``.

    Attributes:
        b: Exponent B of ``y = z * |cos|^(B-1)``; a float >= 1. ``1`` leaves a layer linear.
        input_encoding: ``"six_channel"`` feeds ``[x, 1 - x]`` and gives the first convolution the weights
            ``[w, -w] / 2``; ``"three_channel"`` leaves the input as it is.
        input_normalization: ``"source"`` normalises the input's channels as the source model's; ``"none"`` feeds
            ``[x, 1 - x]`` itself, whose halves add up to 1 instead of being each other's negative. The first
            convolution's weights are then ``[(1 - mean) w, -mean w] / std``, with which its result is the source's
            all the same, at the borders too.
        mean, std: Normalisation the source model was trained with, per RGB channel in [0, 1] units; the inverted
            channels get ``1 - mean`` and the same std. Six numbers are those of ``[x, 1 - x]`` channel by channel:
            six zeros and six ones for B-cos v2, which normalises nothing. ``None`` takes them from the model's own
            metadata, and ImageNet's where there is none.
        weight_norm: ``"none"`` keeps the weights as they are; ``"unit"`` scales every filter to norm 1
            (B-cos v2, arXiv 2306.10898).
        biases: ``"drop"`` removes every bias, of norms too; ``"keep"`` keeps them.
        batch_norm: ``"uncentered"`` divides by the standard deviation and subtracts nothing;
            ``"uncentered_folded"`` the same with the running mean folded into the bias, which leaves the function as
            it was (needs ``biases="keep"``); ``"keep"`` leaves BatchNorm as it is. LayerNorm and GroupNorm always
            keep their centring.
        activations: ``"keep"``, or ``"identity"`` to remove ReLU and its relatives from the network.
        stem_pool: ``"average"`` replaces the stem's max-pool by an average pool; ``"keep"`` leaves it.
        head: ``"before_pool"`` applies the classifier before the global average pool, to every place (as a 1x1
            convolution) or token. At B = 1 the two commute, unless a LayerNorm stands between them: behind a mean over
            tokens it moves with the classifier, as published for SimpleViT. ``"after_pool"`` keeps the order.
        logit_bias: ``"auto"`` is ``-log(classes - 1)``; a number; or ``None`` for no bias.
        logit_temperature: Divides the logits before the bias is added; ``None`` for 1.
        gates: ``"keep"`` leaves the branches that only compute a gate (squeeze-and-excite) as they are;
            ``"convert"`` makes B-cos layers of those too.
        attention: ``"linear"`` keeps attention's projections of queries, keys and values linear (their biases go with
            the others); ``"convert"`` treats them as any linear layer. Output projections are B-cos either way.
        attention_pool: of CLIP's ResNets. ``"keep"`` pools by attention; ``"tokens"`` returns the values of all places
            through the output projection, [N, T, D], without position embedding (dense CLIP, arXiv 2112.01071).
        output: ``"logits"``, or ``"embedding"``: what the model returns, [N, D] or tokens [N, T, D], scaled to norm 1
            and averaged over tokens. ``logit_bias`` and ``logit_temperature`` are of logits.
        keep: Glob patterns of module names that are left alone, e.g. ``("layer1.*", "fc")``.
    """

    b: float = 2.0
    input_encoding: Literal["six_channel", "three_channel"] = "six_channel"
    input_normalization: Literal["source", "none"] = "source"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    weight_norm: Literal["none", "unit"] = "none"
    biases: Literal["drop", "keep"] = "drop"
    batch_norm: Literal["uncentered", "uncentered_folded", "keep"] = "uncentered"
    activations: Literal["keep", "identity"] = "keep"
    stem_pool: Literal["average", "keep"] = "average"
    head: Literal["before_pool", "after_pool"] = "before_pool"
    logit_bias: float | Literal["auto"] | None = "auto"
    logit_temperature: float | None = None
    gates: Literal["keep", "convert"] = "keep"
    attention: Literal["linear", "convert"] = "linear"
    attention_pool: Literal["keep", "tokens"] = "keep"
    output: Literal["logits", "embedding"] = "logits"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_number("Recipe.b", self.b)
        if not (math.isfinite(self.b) and self.b >= 1):
            raise InvalidArgumentError("Recipe.b", self.b, "a finite number >= 1")
        object.__setattr__(self, "b", float(self.b))
        hints = get_type_hints(type(self))
        for field in fields(self):
            hint = hints[field.name]
            if get_origin(hint) is Literal and getattr(self, field.name) not in get_args(hint):
                got = getattr(self, field.name)
                raise InvalidArgumentError(
                    f"Recipe.{field.name}",
                    repr(got),
                    "one of " + ", ".join(map(repr, get_args(hint))),
                    did_you_mean(str(got), map(str, get_args(hint))),
                )
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, str) or not hasattr(value, "__iter__"):
                    raise InvalidTypeError(f"Recipe.{name}", repr(value), "three or six numbers, or None")
                value = tuple(float(v) for v in value)
                if len(value) not in (3, 6) or not all(map(math.isfinite, value)):
                    expected = "three finite numbers (R, G, B), or six for the channels [x, 1 - x]"
                    raise InvalidArgumentError(f"Recipe.{name}", value, expected)
                if len(value) == 6 and self.input_encoding != "six_channel":
                    raise InvalidArgumentError(f"Recipe.{name}", value, "three numbers (R, G, B) for three channels")
                if len(value) == 6 and self.input_normalization == "none":
                    expected = "three numbers (R, G, B), the source's, with input_normalization='none'"
                    raise InvalidArgumentError(f"Recipe.{name}", value, expected)
                if name == "std" and min(value) <= 0:
                    raise InvalidArgumentError("Recipe.std", value, "numbers > 0")
                object.__setattr__(self, name, value)
        if self.input_normalization == "none" and self.input_encoding != "six_channel":
            raise InvalidArgumentError(
                "Recipe.input_normalization",
                f"'none' with input_encoding={self.input_encoding!r}",
                "input_encoding='six_channel': without 1 - x, subtracting the mean needs a bias",
            )
        if self.logit_bias is not None and self.logit_bias != "auto":
            _require_number("Recipe.logit_bias", self.logit_bias, "a number, 'auto' or None")
            if not math.isfinite(self.logit_bias):
                raise InvalidArgumentError("Recipe.logit_bias", self.logit_bias, "a finite number, 'auto' or None")
        if self.logit_temperature is not None:
            _require_number("Recipe.logit_temperature", self.logit_temperature, "a number > 0 or None")
            if not (math.isfinite(self.logit_temperature) and self.logit_temperature > 0):
                raise InvalidArgumentError("Recipe.logit_temperature", self.logit_temperature, "a finite number > 0")
        if self.output == "embedding" and (self.logit_bias not in (None, "auto") or self.logit_temperature is not None):
            got = f"{self.logit_bias!r} and {self.logit_temperature!r} with output='embedding'"
            raise InvalidArgumentError("Recipe.logit_bias, logit_temperature", got, "None: there are no logits")
        if isinstance(self.keep, str) or not all(isinstance(p, str) for p in self.keep):
            raise InvalidTypeError("Recipe.keep", repr(self.keep), "a sequence of glob patterns (strings)")
        object.__setattr__(self, "keep", tuple(self.keep))
        if self.batch_norm == "uncentered_folded" and self.biases == "drop":
            raise InvalidArgumentError(
                "Recipe.batch_norm",
                "'uncentered_folded' with biases='drop'",
                "biases='keep' (the mean is folded into a bias), or batch_norm='uncentered'",
            )

    @classmethod
    def equivalent(cls, **changes: Any) -> Recipe:
        """Step 1 of the method: the same function as the source model, written as a B-cos network with B = 1.

        Biases, activations, pooling and head order are kept and BatchNorm's mean is folded into its bias.
        """
        defaults: dict[str, Any] = {
            "b": 1.0,
            "biases": "keep",
            "batch_norm": "uncentered_folded",
            "stem_pool": "keep",
            "head": "after_pool",
            "logit_bias": None,
        }
        return cls(**{**defaults, **changes})

    @classmethod
    def clip(cls, **changes: Any) -> Recipe:
        """For the image tower of a CLIP model (arXiv 2411.00715, section 3.3): unit tokens, un-pooled in its ResNets.

        Mean and std are those of OpenAI's models.
        """
        defaults: dict[str, Any] = {
            "mean": CLIP_MEAN, "std": CLIP_STD, "logit_bias": None, "attention_pool": "tokens", "output": "embedding",
        }  # fmt: skip
        return cls(**{**defaults, **changes})

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            name = sorted(unknown)[0]
            raise InvalidArgumentError(
                "Recipe.replace", name, "a field of Recipe", did_you_mean(name, [f.name for f in fields(self)])
            )
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; lists become tuples, an unknown field is an error naming it."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidArgumentError("Recipe", f"field {name!r}", "a known field", did_you_mean(name, known))
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)


def _require_number(argument: str, value: object, expected: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(argument, repr(value), expected)

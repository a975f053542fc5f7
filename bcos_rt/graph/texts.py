"""Scores of texts and the seed of their adjoint: cosines of an image's tokens with a text, pooled over tokens.

With unit tokens ``t_i`` and a unit text ``e`` (B-cosification, arXiv 2411.00715, section 3.3)::

    score = sum_i a_i <t_i, e>

where the pooling weights ``a_i`` are constant (``1 / T``), or depend on the image and are held constant as every other
factor is. So the adjoint of token i is ``a_i e``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.fx import Node

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, did_you_mean

if TYPE_CHECKING:
    from bcos_rt.graph.adjoint import Adjoint

__all__ = ["TokenPooling", "text_seed"]

aten = torch.ops.aten
Kind = Literal["mean", "max", "cosine_power"]


@dataclass(frozen=True)
class TokenPooling:
    """How the cosines ``c_i`` of T tokens become one score.

    Attributes:
        kind: ``"mean"``, ``a_i = 1 / T``; ``"max"``, the largest cosine (``a_i`` is 1 at one token, 0 elsewhere);
            ``"cosine_power"``, ``a_i = |c_i|^(power - 1) / T``: tokens that agree with the text count for more.
        power: of ``"cosine_power"``, at least 1, where it is the mean.
    """

    kind: Kind = "mean"
    power: float = 1.0

    @classmethod
    def of(cls, pooling: Any, power: Any = None) -> TokenPooling:
        """From the arguments of :func:`bcos_rt.explain_text`, checked.

        Raises:
            InvalidArgumentError, InvalidTypeError: an unknown pooling, or a power that does not go with it.
        """
        kinds = get_args(Kind)
        if pooling not in kinds:
            hint = did_you_mean(str(pooling), kinds)
            raise InvalidArgumentError("pooling", repr(pooling), "one of " + ", ".join(map(repr, kinds)), hint)
        if (power is not None) != (pooling == "cosine_power"):
            expected = "a number of at least 1" if power is None else "None"
            raise InvalidArgumentError("power", repr(power), f"{expected} with pooling={pooling!r}")
        if power is None:
            return cls(pooling)
        if isinstance(power, bool) or not isinstance(power, int | float):
            raise InvalidTypeError("power", repr(power), "a number of at least 1")
        if not 1 <= power < float("inf"):
            raise InvalidArgumentError("power", power, "a finite number of at least 1")
        return cls(pooling, float(power))


def text_seed(adjoint: Adjoint, texts: Node, pooling: TokenPooling) -> tuple[Node, Node]:
    """The scores [N, K] of texts [N, D] (K = 1) or [N, K, D], and the adjoint of the tokens, [N K, T, D].

    Texts are scaled to norm 1 here; the captured tokens have it already.
    """
    call, tokens = adjoint.call, adjoint.captured.logits
    _, count, width = tokens.meta["val"].shape
    dtype, device = tokens.meta["val"].dtype, tokens.meta["val"].device
    norm = call(aten.linalg_vector_norm.default, texts, 2, [-1], True)
    unit = call(aten.div.Tensor, texts, call(aten.clamp_min.default, norm, torch.finfo(dtype).tiny))
    if not adjoint.multi:
        unit = call(aten.unsqueeze.default, unit, 1)
    # [N, K, D] x [N, D, T]
    cosines = call(aten.matmul.default, unit, call(aten.transpose.int, tokens, 1, 2))
    if pooling.kind == "max":
        best = call(aten.argmax.default, cosines, 2, True)
        places = call(aten.arange.default, count, dtype=torch.int64, device=device, pin_memory=False)
        shares = call(aten._to_copy.default, call(aten.eq.Tensor, best, places), dtype=dtype)
    elif pooling.kind == "mean":
        shares = call(aten.full_like.default, cosines, 1 / count)
    else:
        powers = call(aten.pow.Tensor_Scalar, call(aten.abs.default, cosines), pooling.power - 1)
        shares = call(aten.mul.Scalar, powers, 1 / count)
    scores = call(aten.sum.dim_IntList, call(aten.mul.Tensor, cosines, shares), [2])
    rows = adjoint.reshape(shares, [adjoint.rows, count, 1])
    seed = call(aten.mul.Tensor, rows, adjoint.reshape(unit, [adjoint.rows, 1, width]))
    return scores, seed

"""Optimisers, their parameter groups, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from bcos_rt.errors import InvalidArgumentError, MissingDependencyError
from bcos_rt.nn.exponent import bcos_layers
from bcos_rt.training.recipe import TrainingRecipe

__all__ = ["clip_adaptively", "make_optimizers"]


def make_optimizers(net: nn.Module, recipe: TrainingRecipe, others: Sequence[nn.Parameter] = ()) -> list[Optimizer]:
    """The weights' optimiser, then, where B is learned, the exponents'.

    Args:
        others: parameters that are trained and are not the network's (a loss's own), without weight decay.

    Raises:
        InvalidArgumentError: nothing to train.
    """
    learned = [layer.b for layer in bcos_layers(net).values() if isinstance(layer.b, nn.Parameter)]
    known = {id(p) for p in learned}
    weights = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    if not weights:
        raise InvalidArgumentError("net", "no parameter that requires a gradient", "a network to train")
    # Scales and biases (one dimension or none) are not decayed: it would pull norms towards 0.
    decayed = weights if recipe.decay_all else [p for p in weights if p.ndim > 1]
    rest = [p for p in weights if not recipe.decay_all and p.ndim <= 1]
    parts: list[dict[str, Any]] = [{"params": decayed}, {"params": [*rest, *others], "weight_decay": 0.0}]
    groups = [part for part in parts if part["params"]]
    made: Optimizer
    if recipe.optimizer == "sgd":
        made = SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    else:
        kind = Adam if recipe.optimizer == "adam" else AdamW
        made = kind(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    return [made, SGD(learned, lr=recipe.b_lr)] if learned else [made]


def clip_adaptively(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Adaptive gradient clipping: a filter's gradient norm at most ``factor`` times the filter's (arXiv 2102.06171).

    Raises:
        MissingDependencyError: timm, whose implementation it is, is not installed.
    """
    try:
        from timm.utils.agc import adaptive_clip_grad
    except ImportError as error:
        raise MissingDependencyError("adaptive gradient clipping needs timm: pip install 'bcos-rt[train]'") from error
    with torch.no_grad():
        adaptive_clip_grad(list(parameters), clip_factor=factor)  # type: ignore[no-untyped-call]

"""Optimisers, their parameter groups, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from bcos_rt.errors import InvalidArgumentError, MissingDependencyError
from bcos_rt.nn.exponent import bcos_layers
from bcos_rt.training.recipe import TrainingRecipe
from bcos_rt.training.sharded import local, shared_like, whole

__all__ = ["clip_adaptively", "make_optimizers", "set_fused", "step_all"]


def make_optimizers(
    net: nn.Module, recipe: TrainingRecipe, others: Sequence[nn.Parameter] = (), fused: bool = False
) -> list[Optimizer]:
    """The weights' optimiser, then, where B is learned, the exponents'.

    Args:
        others: parameters that are trained and are not the network's (a loss's own), without weight decay.
        fused: torch's fused kernels, which :func:`step_all` needs to leave a step out without waiting for the device.

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
    optimizers: list[Optimizer] = [made, SGD(learned, lr=recipe.b_lr)] if learned else [made]
    for optimizer in optimizers:
        set_fused(optimizer, fused)
    return optimizers


def set_fused(optimizer: Optimizer, fused: bool) -> None:
    """Make an optimiser use torch's fused kernels or not; also one that was loaded from a file of the other kind.

    SGD's fused kernel takes no weights in shards: it is then the other one.
    """
    if isinstance(optimizer, SGD):
        fused = fused and not any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = (True, False) if fused else (None, None)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if fused else "cpu", torch.float32)
            # A fused SGD that leaves out its first step would leave its momentum uninitialised; from 0 it is the same.
            if fused and group.get("momentum") and state.get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def step_all(optimizers: Sequence[Optimizer], finite: Tensor) -> None:
    """One step of all optimisers, or of none where the gradients are not ``finite``, a boolean scalar.

    Fused optimisers find that out on the device; others wait for it.
    """
    for optimizer in optimizers:
        if optimizer.param_groups[0]["fused"]:
            # What torch's GradScaler tells fused optimisers.
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(finite):
            optimizer.step()


def clip_adaptively(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Adaptive gradient clipping: a filter's gradient norm at most ``factor`` times the filter's (arXiv 2102.06171).

    Raises:
        MissingDependencyError: timm, whose implementation it is, is not installed.
    """
    try:
        from timm.utils.agc import adaptive_clip_grad
    except ImportError as error:
        raise MissingDependencyError("adaptive gradient clipping needs timm: pip install 'bcos-rt[train]'") from error
    mine: list[nn.Parameter] = []
    gathered: list[tuple[DTensor, nn.Parameter]] = []
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor):
            mine.append(parameter)
        elif parameter.ndim > 1:  # the rows here are whole filters
            mine.append(_with_gradient(local(parameter), local(gradient)))
        else:  # one norm for all rows
            gathered.append((gradient, _with_gradient(whole(parameter), whole(gradient))))
    with torch.no_grad():
        adaptive_clip_grad([*mine, *(clipped for _, clipped in gathered)], clip_factor=factor)  # type: ignore[no-untyped-call]
        for gradient, clipped in gathered:
            gradient.copy_(shared_like(clipped.grad, gradient))


def _with_gradient(value: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value.detach(), requires_grad=False)
    parameter.grad = gradient
    return parameter

"""The exponent B of a network's layers: read, set, and learned during training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.nn.layers import BcosConv2d, BcosLinear

__all__ = ["bcos_layers", "exponents", "fix_exponents", "fixed_exponents", "learn_exponents", "set_exponents"]

BcosLayer = BcosConv2d | BcosLinear


def bcos_layers(net: nn.Module) -> dict[str, BcosLayer]:
    """The B-cos layers of a network by name, in its order."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, BcosConv2d | BcosLinear)}


def _number(b: float | nn.Parameter) -> float:
    return float(b.detach()) if isinstance(b, nn.Parameter) else float(b)


def exponents(net: nn.Module) -> dict[str, float]:
    """B of every B-cos layer by the layer's name."""
    return {name: _number(layer.b) for name, layer in bcos_layers(net).items()}


def set_exponents(net: nn.Module, b: Mapping[str, float]) -> None:
    """Give the layers named their B; a learned B becomes a number.

    Raises:
        InvalidArgumentError: a B below 1, or a name that is no B-cos layer.
    """
    layers = bcos_layers(net)
    for name, value in b.items():
        if name not in layers:
            raise InvalidArgumentError("b", f"a value for {name!r}", "names of B-cos layers")
        if not (math.isfinite(value) and value >= 1):
            raise InvalidArgumentError("b", value, "a finite number >= 1")
        layer = layers[name]
        layer._parameters.pop("b", None)
        layer.b = float(value)


def learn_exponents(net: nn.Module) -> list[nn.Parameter]:
    """Make B of every B-cos layer a parameter of its own (0-dimensional, float32) and return them.

    The layer then takes the general formula ``y = z (|z| / n + 1e-6)^(B-1)``, see :func:`bcos_rt.kernels.ops.conv2d`.
    """
    parameters = []
    for layer in bcos_layers(net).values():
        if not isinstance(layer.b, nn.Parameter):
            value = torch.tensor(_number(layer.b), dtype=torch.float32, device=layer.weight.device)
            layer.__dict__.pop("b", None)
            layer.register_parameter("b", nn.Parameter(value))
        parameters.append(layer.get_parameter("b"))
    return parameters


def fix_exponents(net: nn.Module) -> None:
    """Turn learned exponents back into numbers, at least 1."""
    learned = {name: layer for name, layer in bcos_layers(net).items() if isinstance(layer.b, nn.Parameter)}
    set_exponents(net, {name: max(1.0, _number(layer.b)) for name, layer in learned.items()})


@contextmanager
def fixed_exponents(net: nn.Module) -> Iterator[None]:
    """Inside, learned exponents are numbers: what explains and exports networks knows no other."""
    learned = {layer: layer.b for layer in bcos_layers(net).values() if isinstance(layer.b, nn.Parameter)}
    fix_exponents(net)
    try:
        yield
    finally:
        for layer, parameter in learned.items():
            layer.__dict__.pop("b", None)
            layer.register_parameter("b", parameter)

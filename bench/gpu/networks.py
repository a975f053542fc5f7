"""The layer shapes of B-cos networks: of every layer that conversion makes a B-cos layer, and of no other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify
from bcos_rt.errors import InvalidArgumentError, did_you_mean
from bcos_rt.nn import BcosConv2d, BcosLinear
from bench.gpu.cases import Shape
from bench.gpu.options import MODELS

__all__ = ["layer_shapes"]


def layer_shapes(model: str, batch: int, size: int) -> list[Shape]:
    """B-cos layers of a converted torchvision model in the order they run, seen in a forward pass without data.

    The stem's six channels are counted as eight: what the kernels get, and what is best for the others too.

    Raises:
        InvalidArgumentError: a model torchvision does not have.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if model not in names:
        raise InvalidArgumentError(
            "model", model, f"one of torchvision's, like {', '.join(MODELS)}", did_you_mean(model, names)
        )
    settings = {"image_size": size} if model.startswith("vit_") else {}
    net, _ = bcosify(torchvision.models.get_model(model, weights=None, **settings), Recipe())
    net = net.eval().to("meta")
    found: list[Shape] = []

    def seen(name: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, BcosConv2d):
            found.append(_convolution(model, name, module, x))
        elif isinstance(module, BcosLinear):
            tokens = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
            found.append(Shape(model, name, tuple(tokens.shape), tuple(module.weight.shape)))

    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: seen(name, m, args[0]) if args else None)
    with torch.no_grad():
        net(torch.empty(batch, 3, size, size, device="meta"))
    return found


def _convolution(model: str, name: str, module: Any, x: Tensor) -> Shape:
    n, c, h, w = x.shape
    o, per_group, *kernel = module.weight.shape
    if c == 6:
        c = per_group = 8
    return Shape(
        model, name, (n, c, h, w), (o, per_group, *kernel), tuple(module.stride), tuple(module.padding),
        tuple(module.dilation), module.groups,
    )  # fmt: skip

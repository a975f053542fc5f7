"""The layer shapes that are measured: every convolution and linear layer of a network."""

from __future__ import annotations

import math

from bcos_rt.kernels.static.shapes import layers
from bench.gpu.cases import Shape

__all__ = ["layer_shapes"]


def layer_shapes(model: str, batch: int, size: int) -> list[Shape]:
    """Convolutions and linear layers of a torchvision model in the order they run; the stem takes eight channels.

    Rows of a linear layer that are not [N, T, C] (a classifier's [N, C]) become that.

    Raises:
        InvalidArgumentError: a model that torchvision does not have, or an image that it cannot take.
    """
    found = []
    for layer in layers(model, batch, size):
        if not layer.gemm or layer.weight_shape is None:
            continue
        x = layer.input_shape
        if layer.kind == "linear" and len(x) != 3:
            x = (x[0], math.prod(x[1:-1]), x[-1])
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        found.append(Shape(model, layer.name, x, layer.weight_shape, *geometry))
    return found

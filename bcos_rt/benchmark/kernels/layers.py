"""The shapes that are swept: layers of known networks at 224 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bcos_rt.kernels.static.shapes import Layer

__all__ = ["Sweep", "convolution", "image", "label", "linear", "networks", "outputs", "pool"]

# network, input channels, side of the image, filters, kernel, stride; a network's stages from first to last.
_CONVOLUTIONS = (
    ("resnet18", 64, 56, 64, 3, 1),
    ("resnet18", 64, 56, 128, 3, 2),
    ("resnet18", 64, 56, 128, 1, 2),
    ("resnet18", 128, 28, 128, 3, 1),
    ("resnet18", 128, 28, 256, 3, 2),
    ("resnet18", 256, 14, 256, 3, 1),
    ("resnet18", 256, 14, 512, 3, 2),
    ("resnet18", 512, 7, 512, 3, 1),
    ("resnet50", 64, 56, 256, 1, 1),
    ("resnet50", 256, 56, 64, 1, 1),
    ("resnet50", 128, 56, 128, 3, 2),
    ("resnet50", 128, 28, 512, 1, 1),
    ("resnet50", 512, 28, 128, 1, 1),
    ("resnet50", 256, 14, 1024, 1, 1),
    ("resnet50", 1024, 14, 256, 1, 1),
    ("resnet50", 512, 7, 2048, 1, 1),
    ("resnet50", 2048, 7, 512, 1, 1),
    ("densenet121", 64, 56, 128, 1, 1),
    ("densenet121", 128, 56, 32, 3, 1),
    ("densenet121", 256, 28, 128, 1, 1),
    ("densenet121", 128, 28, 32, 3, 1),
    ("densenet121", 512, 14, 128, 1, 1),
    ("densenet121", 128, 14, 32, 3, 1),
    ("densenet121", 992, 7, 128, 1, 1),
    ("densenet121", 128, 7, 32, 3, 1),
    ("densenet121", 512, 28, 256, 1, 1),
)
# channels, side, kernel, stride of the depthwise layers of EfficientNet-Lite0.
_DEPTHWISE = (
    (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1), (240, 28, 3, 2),
    (480, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1), (672, 14, 5, 2), (1152, 7, 5, 1), (1152, 7, 3, 1),
)  # fmt: skip
# Channels and side of what DenseNet-121's norms normalise, in each of its blocks.
_NORMS = ((64, 56), (256, 56), (512, 28), (1024, 14), (1024, 7))


@dataclass(frozen=True)
class Sweep:
    """Layers by what is done with them.

    Attributes:
        stem: the first convolution.
        convolutions, depthwise, linears, max_pools, avg_pools: layers.
        epilogues: convolutions after which the epilogue is timed by itself.
        norms: images that a scale, a shift and an activation are applied to.
        pictures: network inputs [N, 3, H, W].
    """

    stem: tuple[Layer, ...]
    convolutions: tuple[Layer, ...]
    depthwise: tuple[Layer, ...]
    linears: tuple[Layer, ...]
    max_pools: tuple[Layer, ...]
    avg_pools: tuple[Layer, ...]
    epilogues: tuple[Layer, ...]
    norms: tuple[Layer, ...]
    pictures: tuple[Layer, ...]


def _out(side: int, kernel: int, stride: int, padding: int) -> int:
    return (side + 2 * padding - kernel) // stride + 1


def convolution(
    network: str, batch: int, channels: int, side: int, filters: int, kernel: int, stride: int = 1, groups: int = 1
) -> Layer:
    """A square convolution with padding ``kernel // 2``."""
    padding = kernel // 2
    out = _out(side, kernel, stride, padding)
    return Layer(
        network, "conv2d", (batch, channels, side, side), (filters, channels // groups, kernel, kernel),
        (batch, filters, out, out), (kernel, kernel), (stride, stride), (padding, padding), groups=groups,
    )  # fmt: skip


def linear(network: str, rows: int, channels: int, filters: int) -> Layer:
    """A linear layer on ``rows`` rows."""
    return Layer(network, "linear", (rows, channels), (filters, channels), (rows, filters))


def pool(
    network: str, kind: str, batch: int, channels: int, side: int, kernel: int, stride: int, padding: int = 0
) -> Layer:
    """A square "max_pool2d" or "avg_pool2d"."""
    out = _out(side, kernel, stride, padding)
    window = ((kernel, kernel), (stride, stride), (padding, padding))
    return Layer(network, kind, (batch, channels, side, side), None, (batch, channels, out, out), *window)


def image(network: str, batch: int, channels: int, side: int) -> Layer:
    """An image that is gone through value by value."""
    shape = (batch, channels, side, side)
    return Layer(network, "image", shape, None, shape)


def outputs(layers: Sequence[Layer]) -> list[Layer]:
    """What layers return, as images."""
    return [Layer(layer.name, "image", layer.output_shape, None, layer.output_shape) for layer in layers]


def networks(batch: int, encoded_channels: int) -> Sweep:
    """The networks' layers.

    Args:
        batch: images.
        encoded_channels: of the first convolution's input: 6, or 8 where the kernels want it padded.
    """
    dense = tuple(convolution(name, batch, *rest) for name, *rest in _CONVOLUTIONS)
    return Sweep(
        stem=(convolution("resnet18", batch, encoded_channels, 224, 64, 7, 2),),
        convolutions=dense,
        depthwise=tuple(
            convolution("efficientnet-lite0", batch, c, side, c, kernel, stride, groups=c)
            for c, side, kernel, stride in _DEPTHWISE
        ),
        linears=(
            linear("resnet18", batch, 512, 1000),
            linear("resnet50", batch, 2048, 1000),
            linear("vit_b_16", 197 * batch, 768, 3072),
            linear("vit_b_16", 197 * batch, 3072, 768),
        ),
        max_pools=(pool("resnet18", "max_pool2d", batch, 64, 112, 3, 2, 1),),
        avg_pools=(
            pool("densenet121", "avg_pool2d", batch, 128, 56, 2, 2),
            pool("densenet121", "avg_pool2d", batch, 512, 14, 2, 2),
            pool("resnet50", "avg_pool2d", batch, 2048, 7, 7, 7),
        ),
        epilogues=tuple(layer for layer in dense if layer.stride == (1, 1)),
        norms=tuple(image("densenet121", batch, *rest) for rest in _NORMS),
        pictures=(image("resnet18", batch, 3, 224),),
    )


def label(layer: Layer) -> str:
    """Short text without the batch: ``64x56x56 -> 128 3x3 s2``, ``768 -> 3072, 197 rows``, ``64x112x112 3x3 s2``."""
    if layer.kind == "linear":
        return f"{layer.input_shape[1]} -> {layer.output_shape[1]}, {layer.input_shape[0]} rows"
    text = "x".join(map(str, layer.input_shape[1:]))
    if layer.kind == "image":
        return text
    window = f"{layer.kernel[0]}x{layer.kernel[1]} s{layer.stride[0]}"
    if layer.depthwise:
        return f"{text} {window} depthwise"
    return f"{text} -> {layer.output_shape[1]} {window}" if layer.kind == "conv2d" else f"{text} {window}"

"""The B-cos network around a converted backbone: input encoding, backbone, logit layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.nn.outputs import main_output, takes_other_sizes, with_options

if TYPE_CHECKING:
    from bcos_rt.conversion.recipe import Recipe

__all__ = ["BcosNetwork", "EmbeddingLayer", "InputEncoding", "LogitLayer"]

# How far outside [0, 1] an image may lie before we say that it looks normalised (resizing overshoots a little).
RANGE_SLACK = 0.05


class InputEncoding(nn.Module):
    """``x`` in [0, 1] -> ``[x, 1 - x]`` (B-cos v2), and the source model's normalisation of those channels.

    The inverted channels have mean ``1 - mean`` and the same std, so that with first-layer weights ``[w, -w] / 2``
    the convolution's result is the source model's: ``((x-m) w - ((1-x) - (1-m)) w) / 2s = (x-m) w / s``.

    Args:
        mean, std: three numbers, RGB in [0, 1] units; six give those of the inverted channels too.
        six_channels: whether to append ``1 - x``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], six_channels: bool = True) -> None:
        super().__init__()
        self.six_channels = six_channels
        mean_, std_ = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        if six_channels:
            mean_ = mean_ if len(mean_) == 6 else torch.cat([mean_, 1 - mean_])
            std_ = std_ if len(std_) == 6 else torch.cat([std_, std_])
        # float64 until the network is cast: normalisation by float32-rounded constants is what the source does too.
        self.register_buffer("mean", mean_.to(torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", std_.to(torch.float32)[:, None, None], persistent=False)

    @property
    def channels(self) -> int:
        """Channels of an encoded image: 6 or 3."""
        return 6 if self.six_channels else 3

    def encode(self, images: Tensor) -> Tensor:
        """Check ``images`` and return them encoded, [N, 3 or 6, H, W] -> [N, channels, H, W], still in [0, 1].

        Raises:
            InvalidTypeError: not a floating-point tensor.
            InvalidArgumentError: not four dimensions, a wrong number of channels, or NaN.
        """
        if not isinstance(images, Tensor):
            raise InvalidTypeError("images", type(images).__name__, "a torch.Tensor [N, 3, H, W]")
        if images.layout != torch.strided:
            raise InvalidTypeError("images", f"layout {images.layout}", "a dense tensor", " (images.to_dense())")
        if not images.is_floating_point():
            raise InvalidTypeError(
                "images", f"dtype {images.dtype}", "a floating-point tensor in [0, 1]", " (divide a uint8 image by 255)"
            )
        if images.ndim != 4:
            hint = " (add a batch dimension: images[None])" if images.ndim == 3 else ""
            raise InvalidArgumentError("images", f"shape {tuple(images.shape)}", "[N, 3, H, W]", hint)
        channels = images.shape[1]
        if channels not in (3, self.channels):
            wanted = "3 (RGB), or 6 (already encoded [x, 1 - x])" if self.six_channels else "3 (RGB)"
            raise InvalidArgumentError("images", f"{channels} channels (shape {tuple(images.shape)})", wanted)
        if not torch.compiler.is_compiling() and images.device.type == "cpu":
            check_range(images)
        if self.six_channels and channels == 3:
            return torch.cat([images, 1 - images], dim=1)
        return images

    def forward(self, encoded: Tensor) -> Tensor:
        """Normalise an encoded image, [N, channels, H, W]."""
        return (encoded - self.mean.to(encoded.dtype)) / self.std.to(encoded.dtype)

    def extra_repr(self) -> str:
        return f"six_channels={self.six_channels}, mean={self.mean.flatten().tolist()}"


def check_range(images: Tensor) -> None:
    """Raise on NaN or infinity, warn when values lie outside [0, 1]: such images look normalised."""
    if images.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise InvalidArgumentError("images", "NaN or infinite values", "finite values in [0, 1]")
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        warnings.warn(
            f"images: values span [{low:.3g}, {high:.3g}], expected [0, 1]. A B-cos network encodes and normalises "
            "the image itself: leave out transforms.Normalize, and divide 0..255 images by 255.",
            stacklevel=4,
        )


class LogitLayer(nn.Module):
    """``logits / temperature + bias`` with fixed numbers (B-cos v2's logit layer)."""

    def __init__(self, bias: float | None = None, temperature: float | None = None) -> None:
        super().__init__()
        self.bias, self.temperature = bias, temperature

    def forward(self, logits: Tensor) -> Tensor:
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.bias is not None:
            logits = logits + self.bias
        return logits

    def extra_repr(self) -> str:
        return f"bias={self.bias}, temperature={self.temperature}"


class EmbeddingLayer(nn.Module):
    """An image tower's output as an embedding, [N, D]: tokens scaled to norm 1, then averaged.

    Its product with a text's unit embedding is the mean over tokens of ``cos(token, text)`` (B-cosification, arXiv
    2411.00715, section 3.3). A tower that returns [N, D] has one token.
    """

    def tokens(self, outputs: Tensor) -> Tensor:
        """[N, D] or [N, T, D] -> unit tokens [N, T, D]."""
        outputs = outputs if outputs.ndim == 3 else outputs[:, None]
        # A token of zeros stays one.
        tiny = torch.finfo(outputs.dtype).tiny
        norm: Tensor = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True)
        return outputs / norm.clamp_min(tiny)

    def forward(self, outputs: Tensor) -> Tensor:
        return self.tokens(outputs).mean(1)


def check_class_names(argument: str, names: object) -> None:
    """Refuse what is no sequence of strings, nor None."""
    if isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names):
        return
    if names is not None:
        raise InvalidTypeError(argument, repr(names)[:80], "a sequence of strings, or None")


class BcosNetwork(nn.Module):
    """A converted network: a 3-channel image in [0, 1] in, logits (or an image tower's embedding) out.

    Attributes:
        encoding: :class:`InputEncoding`.
        backbone: the converted model, with the source model's submodule names.
        logit_layer: :class:`LogitLayer`, or :class:`EmbeddingLayer` where ``recipe.output`` is ``"embedding"``.
        recipe: the :class:`bcos_rt.Recipe` it was made with.
        source: where the model came from, JSON-ready: ``{"kind": "timm", "name": ...}``.
        class_names: one name per logit, or None.
        classes: number of logits, where the source says it.
        image_size: side of the square images it was trained with, else of those its source was made for, in pixels;
            None where that is not known. It is what commands take by default; the network may take other sizes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        encoding: InputEncoding,
        logit_layer: LogitLayer | EmbeddingLayer,
        recipe: Recipe,
        source: Mapping[str, Any],
        class_names: Sequence[str] | None = None,
        image_size: int | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.encoding = encoding
        self.backbone = backbone
        self.logit_layer = logit_layer
        self.recipe = recipe
        self.source = dict(source)
        self.class_names = list(class_names) if class_names is not None else None
        self.image_size = image_size
        self.classes = classes
        self._takes_other_sizes = takes_other_sizes(backbone)

    def encode(self, images: Tensor) -> Tensor:
        """Checked and encoded images, what an explanation's weights multiply; see :meth:`InputEncoding.encode`."""
        return self.encoding.encode(images)

    def forward_encoded(self, encoded: Tensor) -> Tensor:
        """Logits [N, classes] of encoded images [N, 6, H, W] (or [N, 3, H, W] without the six-channel encoding)."""
        logits: Tensor = self.logit_layer(self._outputs(encoded))
        return logits

    def _outputs(self, encoded: Tensor) -> Tensor:
        """What the backbone answers: logits, an embedding or tokens."""
        images = self.encoding(encoded)
        options = with_options(self.backbone, images) if self._takes_other_sizes else {}
        return main_output(self.backbone(images, **options))

    def tokens_encoded(self, encoded: Tensor) -> Tensor:
        """Unit tokens [N, T, D] of encoded images, of a network with an embedding.

        Raises:
            InvalidArgumentError: the network returns logits.
        """
        if not isinstance(self.logit_layer, EmbeddingLayer):
            expected = "a network with an embedding, bcosify(image_tower, Recipe.clip())"
            raise InvalidArgumentError("net", "a network that returns logits", expected)
        return self.logit_layer.tokens(self._outputs(encoded))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, H, W] in [0, 1], or of already encoded ones [N, 6, H, W]."""
        return self.forward_encoded(self.encode(images))

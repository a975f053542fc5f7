"""A conventional classifier with its normalisation, so that it takes the images a B-cos network takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.nn.outputs import main_output, takes_other_sizes, with_options

__all__ = ["ConventionalNetwork", "inner_network"]


class ConventionalNetwork(nn.Module):
    """``model((x - mean) / std)`` for images x in [0, 1].

    Attributes:
        model: the classifier, with its own submodule names.
        mean, std: its normalisation, three numbers in RGB order.
        source: where it came from, as in :class:`bcos_rt.nn.network.BcosNetwork`.
        class_names: one name per logit, or None.
        image_size: side of the images it was trained with, else of those it was made for; None where not known.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        source: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InvalidTypeError("model", type(model).__name__, "a torch.nn.Module")
        for name, value in (("mean", mean), ("std", std)):
            if len(value) != 3:
                raise InvalidArgumentError(name, value, "three numbers (R, G, B)")
        if min(std) <= 0:
            raise InvalidArgumentError("std", std, "numbers > 0")
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)
        self.source = dict(source) if source is not None else {"kind": "module", "name": type(model).__name__}
        self.class_names = list(class_names) if class_names is not None else None
        self.image_size = image_size
        self._takes_other_sizes = takes_other_sizes(model)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, H, W] in [0, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InvalidArgumentError("images", f"shape {tuple(images.shape)}", "[N, 3, H, W]")
        options = with_options(self.model, images) if self._takes_other_sizes else {}
        return main_output(self.model((images - self.mean.to(images.dtype)) / self.std.to(images.dtype), **options))


def inner_network(net: nn.Module) -> nn.Module:
    """The network whose modules bear the source model's names, without what encodes or normalises images.

    A :class:`BcosNetwork`'s backbone, a :class:`ConventionalNetwork`'s model; any other network is its own.
    """
    if isinstance(net, BcosNetwork):
        return net.backbone
    return net.model if isinstance(net, ConventionalNetwork) else net

"""How far a converted network is from its source, measured on images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.nn.network import BcosNetwork, EmbeddingLayer
from bcos_rt.nn.outputs import main_output, takes_other_sizes, with_options

__all__ = ["EquivalenceResult", "check_equivalence", "evaluating"]


@dataclass(frozen=True)
class EquivalenceResult:
    """Difference between source and converted network.

    Attributes:
        max_relative_error: ``max |a - b| / max |a|`` over all logits, ``a`` the source's.
        top1_agreement: Share of images with the same top-1 class.
        images: How many images were compared.
    """

    max_relative_error: float
    top1_agreement: float
    images: int

    def within(self, tolerance: float = 1e-4) -> bool:
        """Whether the two are functionally equivalent: same top-1 everywhere, relative error below ``tolerance``."""
        return self.top1_agreement == 1.0 and self.max_relative_error < tolerance

    def __str__(self) -> str:
        return (
            f"difference from the source on {self.images} image{'' if self.images == 1 else 's'}: "
            f"max relative logit error {self.max_relative_error:.2e}, top-1 agreement {self.top1_agreement:.0%}"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode restored afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


def check_equivalence(source: nn.Module, net: BcosNetwork, images: Tensor) -> EquivalenceResult:
    """Run the source on normalised images and the converted network on the images, and compare their logits.

    Both run in eval mode; modes are restored.

    Args:
        source: The conventional model; takes normalised images [N, 3, H, W].
        net: The converted network.
        images: [N, 3, H, W] in [0, 1], N >= 1.

    Raises:
        InvalidTypeError: ``images`` is no floating-point tensor, or the source returns something else than a tensor.
        InvalidArgumentError: ``images`` has another shape.
    """
    net.encode(images)
    if images.shape[1] != 3 or len(images) == 0:
        raise InvalidArgumentError("images", f"shape {tuple(images.shape)}", "[N, 3, H, W] with N >= 1")
    reference = next(source.parameters(), images)
    images = images.to(reference.device, reference.dtype)
    # The source's normalisation is the recipe's: the network itself may do without.
    mean = images.new_tensor((net.recipe.mean or net.encoding.mean.flatten().tolist())[:3])[:, None, None]
    std = images.new_tensor((net.recipe.std or net.encoding.std.flatten().tolist())[:3])[:, None, None]
    with torch.no_grad(), evaluating(source), evaluating(net):
        images_in = (images - mean) / std
        options = with_options(source, images) if takes_other_sizes(source) else {}
        expected, got = main_output(source(images_in, **options)), net(images)
        if isinstance(net.logit_layer, EmbeddingLayer):  # an image tower's own output has any norm
            expected = net.logit_layer(expected)
    if expected.shape != got.shape:
        raise InvalidArgumentError("net", f"logits {tuple(got.shape)}", f"the source's {tuple(expected.shape)}")
    # A source that answers 0 everywhere has no scale of its own.
    scale = float(expected.abs().max()) or 1.0
    error = float((expected.double() - got.double()).abs().max()) / scale
    agreement = float((expected.flatten(1).argmax(1) == got.flatten(1).argmax(1)).double().mean())
    return EquivalenceResult(error, agreement, len(images))

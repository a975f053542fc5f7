"""What of a run does not go together, found before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.nn.exponent import exponents
from bcos_rt.nn.network import BcosNetwork, EmbeddingLayer
from bcos_rt.nn.norms import BatchNormUncentered2d
from bcos_rt.training.losses import check_label
from bcos_rt.training.recipe import TrainingRecipe

__all__ = [
    "check_bcos",
    "check_dtypes",
    "check_labelled",
    "check_labels",
    "check_metrics",
    "checked_output",
    "checked_pictures",
    "embeds",
    "learns_outputs",
    "naming_refusals",
]


def embeds(net: nn.Module, recipe: TrainingRecipe) -> bool:
    """Whether a network's output is an embedding, not logits: it says so, or its loss is one of embeddings alone."""
    if isinstance(net, BcosNetwork):
        return isinstance(net.logit_layer, EmbeddingLayer)
    taught = recipe.distillation
    return recipe.loss == "none" and taught is not None and not taught.logits and (taught.siglip + taught.embedding) > 0


def check_metrics(embedding: bool, recipe: TrainingRecipe, validated: bool, explained: bool) -> None:
    """Refuse what belongs to classes where there are embeddings, and the other way round."""
    if not embedding:
        if recipe.select == "cosine" and validated:
            raise InvalidArgumentError("recipe.select", "'cosine'", "'top1' or 'loss', for a network with logits")
        _check_select_loss(recipe, validated, "'top1'")
        return
    _check_select_loss(recipe, validated, "'cosine'")
    if recipe.loss != "none":
        expected = "'none' and a distillation, as of TrainingRecipe.clip(): the network returns an embedding"
        raise InvalidArgumentError("recipe.loss", repr(recipe.loss), expected)
    if recipe.mixing is not None:
        raise InvalidArgumentError("recipe.mixing", "mixed labels", "None: the network returns an embedding")
    if recipe.select == "top1" and validated:
        raise InvalidArgumentError("recipe.select", "'top1'", "'cosine' or 'loss': the network returns an embedding")
    if explained:
        raise InvalidArgumentError("explain_images", "images", "None: an embedding is explained for texts")


def learns_outputs(recipe: TrainingRecipe) -> bool:
    """Whether the loss is one of the network's outputs, not of its features alone."""
    taught = recipe.distillation
    return recipe.loss != "none" or (taught is not None and taught.logits + taught.siglip + taught.embedding > 0)


def _check_select_loss(recipe: TrainingRecipe, validated: bool, other: str) -> None:
    if recipe.select == "loss" and validated and not learns_outputs(recipe):
        got = "'loss' with a loss of features alone, which validation does not look at"
        raise InvalidArgumentError("recipe.select", got, other)


def check_labelled(argument: str, labels: Tensor | None, may_lack: bool) -> None:
    """Refuse images without labels before an epoch is spent, where the data knows without being read."""
    if labels is not None and len(labels) and not may_lack and bool((labels < 0).any()):
        expected = "labels, or a teacher" if argument == "validation" else "labels"
        hint = "" if argument == "validation" else " (or recipe.loss='none' with a distillation)"
        raise InvalidArgumentError(argument, "images without labels", expected, hint)


def check_labels(argument: str, labels: Tensor | None, classes: int) -> None:
    """Refuse labels without a logit before an epoch is spent, where the data knows them without being read."""
    if labels is not None and len(labels):
        check_label(int(labels.max()), classes, argument)


# How networks say that they do not take an image: an assertion, an index, a shape.
_REFUSALS = (AssertionError, IndexError, InvalidArgumentError, RuntimeError, TypeError, ValueError)


@contextmanager
def naming_refusals(argument: str, net: nn.Module, images: Tensor) -> Iterator[None]:
    """Inside, a network answers images [N, 3, H, W]: where it does not, ``argument`` is named, and their size."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        # Images that are not finite are another matter.
        if isinstance(error, InvalidArgumentError) and error.argument == "images":
            raise
        height, width = images.shape[2:]
        reason = str(error).partition("\n")[0] or type(error).__name__
        got = f"a {type(net).__name__} that does not take images of {height} x {width} pixels ({reason})"
        expected = "one that does"
        raise InvalidArgumentError(argument, got, expected, " (or another recipe.augmentation.size, --size)") from error


def check_dtypes(net: nn.Module, recipe: TrainingRecipe) -> None:
    """Refuse weights to be trained of another type than images come in; mixed precision keeps them in float32."""
    wanted = torch.float64 if recipe.precision == "64-true" else torch.float32
    for name, parameter in net.named_parameters():
        # What is frozen may be in half precision, and a single number goes with every type.
        if not parameter.requires_grad or parameter.ndim == 0 or not parameter.is_floating_point():
            continue
        if parameter.dtype != wanted:
            hint = ", or recipe.precision='64-true'" if parameter.dtype == torch.float64 else ""
            raise InvalidTypeError("net", f"{name} of {parameter.dtype}", f"{wanted} (net.float()){hint}")


def checked_output(output: object) -> Tensor:
    """What a network returned, as a tensor [N, classes] or [N, D]."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
    hint = "" if isinstance(output, Tensor) else " (a module around it can return them alone)"
    raise InvalidTypeError("net", f"an output of {got}", "logits [N, classes], or embeddings [N, D]", hint)


def check_bcos(net: nn.Module, recipe: TrainingRecipe, begun: bool) -> None:
    """Refuse what is of B-cos layers, or of their norms, where there are none; what a begun run has, it keeps."""
    if (
        recipe.sync_norms
        and not begun
        and not any(isinstance(module, BatchNormUncentered2d) for module in net.modules())
    ):
        got = f"True for a {type(net).__name__} without uncentred batch norms"
        raise InvalidArgumentError("recipe.sync_norms", got, "False: there is nothing to synchronise")
    found = exponents(net)
    if recipe.b_start is not None and found and not begun and all(b == recipe.b_start for b in found.values()):
        got = f"{recipe.b_start:g}, which is the network's own B"
        raise InvalidArgumentError("recipe.b_start", got, "a B to rise from, or None")
    if found:
        return
    for name, given, none in (("b_start", recipe.b_start, None), ("learn_b", recipe.learn_b, False)):
        if given != none:
            got = f"{given!r} for a {type(net).__name__} without B-cos layers"
            raise InvalidArgumentError(f"recipe.{name}", got, f"{none!r}: it has no B")


def checked_pictures(net: nn.Module, images: Tensor) -> Tensor:
    """Images to explain after every epoch, which only a B-cos network can, of a size and kind that it takes."""
    if not isinstance(net, BcosNetwork):
        raise InvalidArgumentError(
            "explain_images", f"images for a {type(net).__name__}", "None: it is no B-cos network"
        )
    if isinstance(images, Tensor) and len(images) == 0:
        raise InvalidArgumentError("explain_images", "no image", "at least one, or None")
    try:
        net.encode(images)
    except (InvalidArgumentError, InvalidTypeError) as error:
        raise type(error)("explain_images", error.got, error.expected) from error
    return images

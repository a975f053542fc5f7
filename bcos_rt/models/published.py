"""Checkpoints that the B-cos-v2 and B-cosification projects published.

Both hold only tensors, so the network is built here: the torchvision architecture or SimpleViT of that name, converted
with the project's recipe, and then filled strictly, every tensor of the file used and every tensor of the network
filled.

Their names differ from the source's: a B-cos layer keeps its weight in a submodule ``linear``; a CNN's classifier is a
1x1 convolution; B-cosification rebuilt each ``nn.Sequential`` of the CNNs from a list, so that its children have
numbers (``features.norm0`` is ``features.1``); and wrappers put ``model.`` in front, once or twice, and ``0.`` where
B-cos v2's SimpleViTs stand before their logit layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bcos_rt.conversion.recipe import Recipe
from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, did_you_mean
from bcos_rt.models.simple_vit import SIMPLE_VITS
from bcos_rt.models.sources import SIMPLE_VIT, LoadedModel, classifier_name, load_model
from bcos_rt.models.weights import describe_difference, load_strict, read_state_dict
from bcos_rt.nn.network import BcosNetwork

__all__ = ["Flavor", "ImportReport", "import_published", "published_recipe"]

Flavor = Literal["bcos_v2", "bcosification"]

# B-cos v2 models whose forward is not that of the torchvision model of the same name.
_OTHER_ARCHITECTURES = {
    "vgg": "its classifier is convolutions before the pool",
    "convnext": "its blocks have other norms and no permutations",
}


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        flavor: which project's conventions the checkpoint follows.
        architecture: the model name it was loaded into.
        keys: pairs (checkpoint key, key in ``net.backbone``), in the checkpoint's order; all loaded.
        reshaped: network keys whose tensor lost or gained trailing dimensions of size 1 (classifiers).
        ignored: checkpoint keys that are no part of the network asked for: the other copy of a running average.
    """

    flavor: Flavor
    architecture: str
    keys: tuple[tuple[str, str], ...]
    reshaped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.architecture} from a {self.flavor} checkpoint: {len(self.keys)} tensors loaded"
        text += f", {len(self.reshaped)} reshaped ({', '.join(self.reshaped)})" if self.reshaped else ""
        return text + (f", {len(self.ignored)} ignored" if self.ignored else "")


def published_recipe(flavor: Flavor, name: str = "torchvision:resnet18") -> Recipe:
    """The recipe of a project's published models.

    ``"bcosification"`` is the default :class:`Recipe`. ``"bcos_v2"`` (arXiv 2306.10898) was trained from scratch:
    filters of norm 1, no activations, and no normalisation of the input; its SimpleViTs classify the mean token.

    Args:
        name: the architecture, as in :func:`import_published`.
    """
    _check_flavor(flavor)
    if flavor == "bcosification":
        return Recipe()
    recipe = Recipe(mean=(0.0,) * 6, std=(1.0,) * 6, weight_norm="unit", activations="identity")
    return recipe.replace(head="after_pool") if _is_simple_vit(_full_name(name)) else recipe


def import_published(
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor],
    name: str,
    *,
    recipe: Recipe | None = None,
    class_names: Sequence[str] | None = None,
    flavor: Flavor | None = None,
    ema: bool = False,
) -> tuple[BcosNetwork, ImportReport]:
    """Build the network a published checkpoint belongs to, and load it.

    Args:
        checkpoint: a Lightning ``.ckpt``, a ``.pth`` or a ``.safetensors`` file, read without unpickling objects; or a
            state dict.
        name: the architecture, ``torchvision:resnet18`` or short ``resnet18``,
            ``simple_vit:simple_vit_ti_patch16_224`` or short ``simple_vit_ti_patch16_224``.
        recipe: how the network was made; None is :func:`published_recipe` of the flavor.
        class_names: one name per logit; None takes ImageNet's for 1,000 classes.
        flavor: None detects it: two ``model.`` before every key, or numbered Sequentials, are B-cosification; no
            ``model.`` is B-cos v2. Of a SimpleViT ``model.`` is B-cosification, ``0.`` behind it or alone B-cos v2.
        ema: take the running average of the weights (``ema.module.*``) instead of the weights themselves.

    Returns:
        The network in eval mode, and a report that lists every key.

    Raises:
        CheckpointError: an unreadable file; keys that do not fit the network, which the message lists; a flavor that
            cannot be told; running averages asked for and not there.
        InvalidArgumentError: an unknown architecture or flavor.
    """
    if flavor is not None:
        _check_flavor(flavor)
    if not isinstance(name, str):
        raise InvalidTypeError("name", type(name).__name__, "a string such as 'torchvision:resnet18'")
    if isinstance(checkpoint, Mapping):
        what = "the state dict"
        state = {str(key): value for key, value in checkpoint.items() if isinstance(value, Tensor)}
        if not state:
            raise InvalidArgumentError("checkpoint", "a mapping without tensors", "a state dict")
    elif isinstance(checkpoint, str | os.PathLike):
        what = os.fspath(checkpoint)
        state = read_state_dict(what)
    else:
        raise InvalidTypeError("checkpoint", type(checkpoint).__name__, "a file or a state dict")
    full_name = _full_name(name)
    _refuse_other_architectures(flavor, full_name, what)

    with torch.random.fork_rng(devices=[]):
        source = load_model(full_name, weights="random")
        bare, ignored, wrappers = _unwrapped(state, ema, what)
        in_sequential = _is_simple_vit(full_name) and all(key.startswith("0.") for key in bare)
        if in_sequential:
            bare = {key.removeprefix("0."): value for key, value in bare.items()}
        if flavor is not None:
            kind = flavor
        elif _is_simple_vit(full_name):
            kind = _detect_simple_vit(in_sequential, wrappers, what)
        else:
            kind = _detect(bare, wrappers, source.module, what)
        _refuse_other_architectures(kind, full_name, what)
        places = {key: _locate(source.module, key) for key in bare}
        source = _with_classes(source, full_name, bare, places)
        # Here and not above: conversion imports bcos_rt.models for names.
        from bcos_rt.conversion.convert import bcosify

        recipe = recipe if recipe is not None else published_recipe(kind, full_name)
        recipe = recipe.replace(mean=recipe.mean or source.mean, std=recipe.std or source.std)
        names = class_names if class_names is not None else source.class_names
        net, _ = bcosify(source.module, recipe, class_names=names)
    net.source, net.image_size = dict(source.source), source.input_size

    backbone = net.backbone
    target = backbone.state_dict()
    loaded: dict[str, Tensor] = {}
    keys: list[tuple[str, str]] = []
    reshaped: list[str] = []
    astray: dict[str, tuple[int, ...]] = {}
    for key, (original, tensor) in bare.items():
        place = places[key]
        if place is None or place in loaded or place not in target:
            # A second key for the same place may have the place's own name.
            astray[f"{original} (again)" if original in target else original] = tuple(tensor.shape)
            continue
        if tensor.shape != target[place].shape and _core(tensor.shape) == _core(target[place].shape):
            tensor = tensor.reshape(target[place].shape)
            reshaped.append(place)
        loaded[place] = tensor
        keys.append((original, place))
    difference = describe_difference(
        {k: tuple(v.shape) for k, v in target.items()}, {k: tuple(v.shape) for k, v in loaded.items()} | astray
    )
    if difference:
        raise CheckpointError(f"{what} does not fit {full_name} as a {kind} network: {difference}")
    load_strict(backbone, loaded, what)
    return net.eval(), ImportReport(kind, full_name, tuple(keys), tuple(reshaped), tuple(ignored))


def _full_name(name: str) -> str:
    """``name`` with its kind in front."""
    if ":" in name:
        return name
    return f"{SIMPLE_VIT}:{name}" if name in SIMPLE_VITS else f"torchvision:{name}"


def _is_simple_vit(full_name: str) -> bool:
    # Small ones for CIFAR are SimpleViTs too.
    return full_name.partition(":")[0] == SIMPLE_VIT or full_name.startswith("small:vit")


def _check_flavor(flavor: str) -> None:
    if flavor not in get_args(Flavor):
        known = get_args(Flavor)
        expected = " or ".join(map(repr, known))
        raise InvalidArgumentError("flavor", repr(flavor), expected, did_you_mean(str(flavor), known))


def _unwrapped(
    state: Mapping[str, Tensor], ema: bool, what: str
) -> tuple[dict[str, tuple[str, Tensor]], list[str], int]:
    """Keys without wrappers -> (original key, tensor); the keys left out; how many ``model.`` there were."""
    averages = {k: v for k, v in state.items() if k.startswith("ema.")}
    if ema:
        chosen = {k: v for k, v in averages.items() if k.startswith("ema.module.")}
        if not chosen:
            raise CheckpointError(f"{what} holds no running averages (no key starts with 'ema.module.'): leave ema out")
        bare = {k.removeprefix("ema.module."): (k, v) for k, v in chosen.items()}
        wrappers = 1  # ``ema.module`` stands where the trainer's ``model`` stands for the weights themselves
    else:
        chosen = {k: v for k, v in state.items() if k not in averages}
        bare = {k: (k, v) for k, v in chosen.items()}
        wrappers = 0
    stripped = True
    while stripped and bare:
        stripped = False
        for prefix in ("model.", "module.", "_orig_mod."):
            if all(k.startswith(prefix) for k in bare):
                bare = {k.removeprefix(prefix): v for k, v in bare.items()}
                wrappers += prefix == "model."
                stripped = True
    return bare, [k for k in state if k not in chosen], wrappers


def _detect(bare: Mapping[str, object], wrappers: int, module: nn.Module, what: str) -> Flavor:
    # Children that have names and were numbered: features.norm0 as features.1.
    renumbered = named = False
    for key in bare:
        place = _locate(module, key)
        if place is not None and not place.startswith("classifier"):
            written = [token for token in key.split(".") if token != "linear"]
            renumbered |= written != place.split(".")
            named |= _inside_named_sequential(module, written)
    if renumbered or wrappers >= 2:
        return "bcosification"
    if named or wrappers == 0:
        return "bcos_v2"
    raise CheckpointError(
        f"{what}: one 'model.' before every key fits a B-cos v2 trainer and a B-cosification model alike: "
        "give flavor='bcos_v2' or flavor='bcosification'"
    )


def _detect_simple_vit(in_sequential: bool, wrappers: int, what: str) -> Flavor:
    if in_sequential:
        return "bcos_v2"
    if wrappers:
        return "bcosification"
    raise CheckpointError(
        f"{what}: neither '0.' (B-cos v2) nor 'model.' (B-cosification) stands before every key: "
        "give flavor='bcos_v2' or flavor='bcosification'"
    )


def _inside_named_sequential(module: nn.Module, tokens: Sequence[str]) -> bool:
    """Whether a key goes through a child of a Sequential that has a name of its own and is called by it."""
    for token in tokens:
        child = module._modules.get(token)
        if child is None:
            return False
        if isinstance(module, nn.Sequential) and not token.isdigit():
            return True
        module = child
    return False


def _refuse_other_architectures(flavor: Flavor | None, name: str, what: str) -> None:
    if flavor != "bcos_v2":
        return
    for family, reason in _OTHER_ARCHITECTURES.items():
        if name.partition(":")[2].startswith(family):
            raise CheckpointError(f"{what}: B-cos v2's {family} is not torchvision's ({reason}); it cannot be imported")


def _locate(module: nn.Module, key: str) -> str | None:
    """The source model's name of the tensor that a checkpoint calls ``key``; None when there is none."""
    *path, leaf = key.split(".")
    names: list[str] = []
    for token in path:
        child = module._modules.get(token)
        name = token
        if child is None and token.isdigit() and isinstance(module, nn.Sequential) and int(token) < len(module):
            name, child = list(module.named_children())[int(token)]
        if child is None:
            if token == "linear" and isinstance(module, nn.Conv2d | nn.Linear):
                continue
            return None
        names.append(name)
        module = child
    if leaf not in module._parameters and leaf not in module._buffers:
        return None
    return ".".join([*names, leaf])


def _with_classes(
    source: LoadedModel,
    name: str,
    bare: Mapping[str, tuple[str, Tensor]],
    places: Mapping[str, str | None],
) -> LoadedModel:
    """The source rebuilt with the checkpoint's number of classes."""
    head = f"{classifier_name(source.module)}.weight"
    found = next((bare[key][1] for key, place in places.items() if place == head), None)
    if found is None or found.ndim == 0 or found.shape[0] == source.source["num_classes"]:
        return source
    return load_model(name, weights="random", num_classes=int(found.shape[0]))


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its trailing ones."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)

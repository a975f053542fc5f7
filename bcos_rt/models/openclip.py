"""CLIP models of open_clip by name: ``RN50``, ``ViT-B-16:TAG``. What :mod:`bcos_rt.models.clip` is made of."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bcos_rt.errors import BcosError, CheckpointError, InvalidArgumentError, did_you_mean
from bcos_rt.lazy import require
from bcos_rt.models.weights import load_strict, read_state_dict, strip_prefixes

__all__ = [
    "OPEN_CLIP",
    "ClipSource",
    "architecture_of",
    "build_clip",
    "clip_source",
    "known_clips",
    "rebuild_tower",
    "require_open_clip",
]

OPEN_CLIP = "open_clip"
Triple = tuple[float, float, float]
# Prefixes of names that open_clip reads configuration and weights by itself from.
_PLACES = ("hf-hub:", "local-dir:")
# Entries of OpenAI's files that are no weights.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
_ALTERNATIVES = "give weights=FILE, or weights='random' for an untrained network"


def require_open_clip() -> ModuleType:
    """The package open_clip.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return require("open_clip", "clip")


@dataclass(frozen=True)
class ClipSource:
    """A model's name, taken apart, and what is known of its weights.

    Attributes:
        model: open_clip's name of the architecture, or ``hf-hub:...`` or ``local-dir:...``.
        tag: which published weights; None where there are none, and for the latter two.
        quick_gelu: whether the activation is ``x * sigmoid(1.702 x)``, as of OpenAI's, instead of GELU.
        config: open_clip's configuration of the architecture.
    """

    model: str
    tag: str | None
    quick_gelu: bool
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Architecture and tag, as :func:`clip_source` takes it."""
        return self.model if self.tag is None else f"{self.model}:{self.tag}"

    def describe(self) -> dict[str, Any]:
        """JSON-ready, enough for :func:`rebuild_tower`."""
        width = int(self.config["embed_dim"])
        config = {"embed_dim": width, "quick_gelu": self.quick_gelu, "vision_cfg": self.config["vision_cfg"]}
        return {"kind": OPEN_CLIP, "name": self.name, "num_classes": width, "config": config}


def architecture_of(name: str) -> str:
    """A name without its tag."""
    return name if name.startswith(_PLACES) else name.partition(":")[0]


def clip_source(name: str, quick_gelu: bool | None = None) -> ClipSource:
    """Look a name up: ``RN50``, ``RN50:TAG``, ``hf-hub:ORG/REPO``, ``local-dir:FOLDER``.

    Without a tag it is ``openai`` where the model has that, else the first that open_clip lists.

    Args:
        quick_gelu: instead of what the tag says.

    Raises:
        InvalidArgumentError: an unknown model or tag, with the closest known ones.
        CheckpointError: a configuration that cannot be read.
        MissingDependencyError: open_clip is not installed.
    """
    open_clip = require_open_clip()
    if name.startswith(_PLACES):
        try:
            config = open_clip.get_model_config(name)
            return ClipSource(name, None, bool(config.get("quick_gelu")) or quick_gelu is True, config)
        except Exception as error:  # OSError, ValueError, and what the hub's client raises
            raise CheckpointError(
                f"open_clip:{name}: no open_clip_config.json could be read ({_line(error)})"
            ) from error
    model, _, tag = name.partition(":")
    config = open_clip.get_model_config(model)
    if config is None:
        raise InvalidArgumentError("name", repr(name), "a model of open_clip", did_you_mean(model, known_clips()))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag and tag not in tags:
        raise InvalidArgumentError("name", repr(name), f"a tag of {model}", did_you_mean(tag, tags))
    chosen = tag or ("openai" if "openai" in tags else next(iter(tags), None))
    quick = bool(config.get("quick_gelu", False))
    if chosen is not None:
        quick = quick or bool(open_clip.get_pretrained_cfg(model, chosen).get("quick_gelu", False))
    return ClipSource(model, chosen, quick if quick_gelu is None else quick_gelu, config)


def build_clip(source: ClipSource, weights: str | os.PathLike[str] | None) -> nn.Module:
    """The whole model in eval mode and float32, with its preprocessing noted on ``visual.preprocess_cfg``.

    Args:
        weights: None or ``"default"`` for the tag's, downloaded on first use; ``"random"``; or a file: a checkpoint of
            open_clip, a state dict, or one of OpenAI's TorchScript archives, loaded strictly.

    Raises:
        CheckpointError: weights that cannot be downloaded or read, or do not fit.
    """
    if weights is None or weights == "default":
        return _pretrained(source)
    module = _untrained(source)
    if weights != "random":
        _load_file(module, Path(weights))
    return module


def rebuild_tower(source: Mapping[str, Any]) -> nn.Module:
    """The image tower that :meth:`ClipSource.describe` describes, with random weights, from its configuration alone.

    Raises:
        CheckpointError: the configuration is missing or open_clip cannot build it.
    """
    open_clip = require_open_clip()
    config = dict(source.get("config") or {})
    try:
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        timm_name = vision.get("timm_model_name")
        if timm_name is not None and not importlib.import_module("timm").is_model(timm_name.partition(".")[0]):
            # timm would follow names of remote repositories.
            raise ValueError(f"{timm_name!r} is no model of timm")
        # The text tower is not needed: the smallest there is.
        text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
        module = open_clip.CLIP(config["embed_dim"], vision, text, quick_gelu=config["quick_gelu"])
    except Exception as error:  # a configuration is checked by whatever uses it
        name = f"open_clip:{source.get('name')}"
        raise CheckpointError(f"cannot rebuild {name} from its configuration ({_line(error)})") from error
    tower: nn.Module = module.visual
    return tower.eval()


def known_clips() -> list[str]:
    """The names of open_clip's models, without tags; empty where it is not installed. Does not import it.

    Models that a program adds with ``open_clip.add_model_config`` are among them once open_clip is imported.
    """
    found = importlib.util.find_spec("open_clip")
    if found is None:
        return []
    folders = [Path(place) / "model_configs" for place in found.submodule_search_locations or ()]
    names = {path.stem for folder in folders for path in folder.glob("*.json")}
    loaded = sys.modules.get("open_clip")
    return sorted(names | set(loaded.list_models() if loaded is not None else ()))


# --- details ---------------------------------------------------------------------------------------------------------


def _untrained(source: ClipSource) -> nn.Module:
    open_clip = require_open_clip()
    try:
        with _quiet():
            module: nn.Module = open_clip.create_model(
                source.model, load_weights=False, pretrained_text=False, force_quick_gelu=source.quick_gelu,
                quick_gelu=source.quick_gelu, force_preprocess_cfg=_preprocessing(source),
            )  # fmt: skip
    except Exception as error:  # a Hugging Face text tower whose configuration is not at hand; what a builder checks
        raise CheckpointError(f"open_clip could not build {source.name} ({_line(error)})") from error
    return module.eval()


def _pretrained(source: ClipSource) -> nn.Module:
    open_clip = require_open_clip()
    if source.tag is None and not source.model.startswith(_PLACES):
        raise CheckpointError(f"open_clip has no published weights for {source.model!r}: {_ALTERNATIVES}")
    try:
        with _quiet():
            # The first says so before open_clip compares with the tag, the second also when it is False.
            module: nn.Module = open_clip.create_model(
                source.model, pretrained=source.tag, force_quick_gelu=source.quick_gelu, quick_gelu=source.quick_gelu,
                require_pretrained=True,
            )  # fmt: skip
    except Exception as error:  # urllib's, the hub client's, torch's, each of its own kind
        raise CheckpointError(
            f"could not get the published weights of open_clip:{source.name} ({_line(error)}): {_ALTERNATIVES}"
        ) from error
    return module.eval()


def _preprocessing(source: ClipSource) -> dict[str, Any] | None:
    if source.tag is None:
        return None
    tag = require_open_clip().get_pretrained_cfg(source.model, source.tag)
    return {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}


def _load_file(module: nn.Module, path: Path) -> None:
    expected = module.state_dict()
    state = strip_prefixes(_read(path), expected)
    state = {key: value for key, value in state.items() if key not in _NOT_WEIGHTS}
    try:
        state = importlib.import_module("open_clip.convert").convert_state_dict(module, state)
        if "positional_embedding" in state and "positional_embedding" not in expected:
            old = importlib.import_module("open_clip.model")
            state = old.convert_to_custom_text_state_dict(state)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not weights of this CLIP model ({_line(error)})") from error
    for key in ("logit_scale", "logit_bias"):  # a number, or an array of one
        if key in state and key in expected and state[key].numel() == expected[key].numel():
            state[key] = state[key].reshape(expected[key].shape)
    load_strict(module, state, str(path))


def _read(path: Path) -> dict[str, Tensor]:
    """A file's tensors; of a TorchScript archive, as OpenAI published theirs, too."""
    if not _is_torchscript(path):
        return read_state_dict(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            archive = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return dict(archive.state_dict())
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or not a TorchScript archive ({_line(error)})") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip speaks through the root logger, and would give it a handler; what matters is raised."""
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def _line(error: BaseException) -> str:
    if isinstance(error, BcosError):
        return str(error)
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

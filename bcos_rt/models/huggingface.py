"""Image classifiers of Hugging Face transformers: ``hf:NAME`` on the hub, or ``hf:FOLDER`` from save_pretrained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bcos_rt.errors import CheckpointError, InvalidArgumentError, MissingDependencyError
from bcos_rt.lazy import require
from bcos_rt.models.weights import load_strict, read_state_dict, strip_prefixes
from bcos_rt.nn.outputs import image_sizes

__all__ = [
    "HF",
    "class_names_of",
    "image_size_of",
    "load_hf",
    "normalisation_of",
    "rebuild_hf",
    "require_transformers",
    "source_of",
]

HF = "hf"
Triple = tuple[float, float, float]


def require_transformers() -> ModuleType:
    """The package transformers.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return require("transformers", "huggingface")


def load_hf(name: str, weights: str | os.PathLike[str] | None, num_classes: int | None) -> tuple[nn.Module, bool]:
    """The model in eval mode and float32, and whether its classifier is new. Runs no remote code.

    Arguments as :func:`bcos_rt.models.load_model`'s.

    Raises:
        InvalidArgumentError: no image classifier of transformers.
        CheckpointError: no such repository, no network, or weights that do not fill the network.
        MissingDependencyError: transformers is not installed.
    """
    config = _config(name, num_classes)
    if weights is None or weights == "default":
        return _pretrained(name, config, num_classes)
    module = _build(config, name)
    if weights != "random":
        state = read_state_dict(Path(weights))
        load_strict(module, strip_prefixes(state, module.state_dict()), str(weights))
    return module.eval(), False


def rebuild_hf(source: Mapping[str, Any]) -> nn.Module:
    """The architecture that :func:`source_of` describes, with random weights, from its configuration alone.

    Raises:
        CheckpointError: the configuration is missing or not one that transformers knows.
    """
    values = dict(source.get("config") or {})
    try:
        config = require_transformers().AutoConfig.for_model(values.pop("model_type", None), **values)
        return _build(config, str(source.get("name")))
    except MissingDependencyError:
        raise
    except Exception as error:  # a configuration checks its own values, each in its own way
        raise CheckpointError(
            f"cannot rebuild hf:{source.get('name')} from its configuration ({_first_line(error)})"
        ) from error


def source_of(module: nn.Module, name: str) -> dict[str, Any]:
    """JSON-ready, enough for :func:`rebuild_hf`: kind, name, number of classes and configuration."""
    config: Any = module.config
    return {"kind": HF, "name": name, "num_classes": int(config.num_labels), "config": config.to_diff_dict()}


def class_names_of(module: nn.Module) -> tuple[str, ...] | None:
    """One name per logit, of ``config.id2label``; None where those are the default ``LABEL_0``, ``LABEL_1``, ..."""
    names: dict[int, str] = module.config.id2label  # type: ignore[union-attr, assignment]
    if sorted(names) != list(range(len(names))):
        return None
    ordered = tuple(str(names[i]) for i in range(len(names)))
    return None if ordered == tuple(f"LABEL_{i}" for i in range(len(names))) else ordered


def normalisation_of(name: str, *, download: bool = True) -> tuple[Triple, Triple] | None:
    """Mean and std of a model's image processor; None where it has none.

    Args:
        download: whether to ask the hub for what is neither a folder nor in the cache.
    """
    processor = _processor(name, download)
    if processor is None:
        return None
    if not getattr(processor, "do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        return None
    return _triple(mean), _triple(std)


def image_size_of(module: nn.Module, name: str) -> int:
    """The side of the images a model takes: its processor's, its configuration's, or 224."""
    processor = _processor(name, download=True)
    sizes = [getattr(processor, "crop_size", None)] if getattr(processor, "do_center_crop", False) else []
    for size in [*sizes, getattr(processor, "size", None)]:
        side = size if isinstance(size, int) else _entry(size, "height") or _entry(size, "shortest_edge")
        if isinstance(side, int) and side > 0:
            return side
    return next((height for height, _ in image_sizes(module)), 224)


# --- details ---------------------------------------------------------------------------------------------------------


def _config(name: str, num_classes: int | None) -> Any:
    options = {} if num_classes is None else {"num_labels": num_classes}
    try:
        return require_transformers().AutoConfig.from_pretrained(name, **options)
    except MissingDependencyError:
        raise
    except Exception as error:  # OSError of the hub, ValueError of an unknown model type, and what httpx raises
        raise _unreadable(name, error) from error


def _build(config: Any, name: str) -> nn.Module:
    auto = require_transformers().AutoModelForImageClassification
    if type(config) not in auto._model_mapping:
        got = f"{name!r}, a {getattr(config, 'model_type', 'model')}"
        raise InvalidArgumentError("name", got, "an image classifier of transformers")
    module: nn.Module = auto.from_config(config, dtype=torch.float32).eval()
    return module


def _pretrained(name: str, config: Any, num_classes: int | None) -> tuple[nn.Module, bool]:
    auto = require_transformers().AutoModelForImageClassification
    if type(config) not in auto._model_mapping:
        _build(config, name)  # says why not
    try:
        module, info = auto.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=num_classes is not None,
        )
    except Exception as error:  # as above, and safetensors' own
        raise _unreadable(name, error) from error
    # transformers would leave what a file lacks at random.
    new = {str(entry[0]) for entry in info["mismatched_keys"]} | set(info["missing_keys"])
    parts = {key.rpartition(".")[0] for key in new}
    if new and (num_classes is None or len(parts) > 1):
        hint = "" if len(parts) > 1 else "; num_classes=N makes a new classifier for weights without one"
        raise CheckpointError(f"hf:{name}: the weights lack {', '.join(sorted(new)[:5])} ({len(new)} in all){hint}")
    result: nn.Module = module.eval()
    return result, bool(new)


def _processor(name: str, download: bool) -> Any:
    """The image processor saved with a model, or None."""
    try:
        return require_transformers().AutoImageProcessor.from_pretrained(name, local_files_only=not download)
    except Exception:  # none is saved, or it cannot be read: the model is usable without
        return None


def _unreadable(name: str, error: Exception) -> CheckpointError:
    where = "a folder that save_pretrained wrote, or the name of a model on the hub and a network connection"
    if Path(name).is_dir():
        where = "a folder with config.json and weights, as save_pretrained writes"
    return CheckpointError(f"hf:{name}: could not be read ({_first_line(error)}); expected {where}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _entry(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _triple(values: Any) -> Triple:
    r, g, b = (float(v) for v in values)
    return r, g, b

"""Reading weights from files and loading them strictly.

Files are never unpickled freely: ``.safetensors`` holds only tensors, and everything else goes through
``torch.load(weights_only=True)``, which refuses a file that needs more than tensors and plain containers.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from bcos_rt.errors import CheckpointError, InvalidTypeError

__all__ = [
    "about_classifier",
    "classifier_metadata",
    "describe_difference",
    "is_file_of_weights",
    "load_strict",
    "read_state_dict",
    "read_torch_file",
    "strip_prefixes",
]

# Where training scripts put the weights inside the file they save, most specific first.
_NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights")
# What wrappers put in front of every key: Lightning modules, DataParallel, torch.compile.
_WRAPPER_PREFIXES = ("module.", "model.", "net.", "network.", "_orig_mod.")
_SHOWN = 5
# In the header of a .safetensors file of conventional weights, JSON: class names and the side of the images.
_CLASSIFIER = "bcos_rt.classifier"


def read_torch_file(path: Path) -> Any:
    """What a ``.pth``, ``.pt`` or ``.ckpt`` file holds, read with ``weights_only=True``.

    Raises:
        CheckpointError: missing, truncated or foreign file, or one that holds arbitrary Python objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: is a directory, expected a file of weights") from error
    except pickle.UnpicklingError as error:
        # torch raises this both for a pickle that needs other classes and for bytes that are no pickle at all.
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors, and unpickling those would run code from the file, so "
                "it is not read. Where you trust it, extract the weights first: "
                "torch.save(torch.load(file, weights_only=False)['state_dict'], 'weights.pth') "
                f"(torch said: {_first_line(error)})"
            ) from error
        # Not torch's whole message, which advises to run what is in the file.
        _, _, reason = str(error).partition("WeightsUnpickler error: ")
        said = f" ({reason.strip().splitlines()[0]})" if reason.strip() else ""
        raise CheckpointError(f"{path}: not a file of PyTorch weights{said}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: unreadable, truncated or not a file of weights ({_first_line(error)})"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name; a state dict nested under ``"state_dict"``, ``"model"``, ... is found.

    Args:
        path: ``.safetensors``, or anything :func:`torch.save` wrote.

    Raises:
        CheckpointError: see :func:`read_torch_file`; also when the file holds no tensors.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a safetensors file, or truncated ({_first_line(error)})") from error
    content = read_torch_file(path)
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        inner = next((content[k] for k in _NESTED_UNDER if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        found = ", ".join(map(repr, list(content)[:_SHOWN])) or "nothing"
        raise CheckpointError(f"{path}: holds no tensors, expected a state dict; found {found}")
    return state


def is_file_of_weights(weights: str | os.PathLike[str] | None) -> TypeGuard[str | os.PathLike[str]]:
    """Whether this stands for a file, not for published (None, ``"default"``) or ``"random"`` weights."""
    return weights is not None and weights not in ("default", "random")


def classifier_metadata(class_names: Sequence[str] | None, image_size: int | None) -> dict[str, str]:
    """What a ``.safetensors`` file of a classifier's weights says about it, for its header."""
    return {"format": "pt", _CLASSIFIER: json.dumps({"class_names": class_names, "image_size": image_size})}


def about_classifier(path: str | os.PathLike[str]) -> tuple[tuple[str, ...] | None, int | None]:
    """Class names and the side of the images that :func:`classifier_metadata` put there; None where it did not."""
    if Path(path).suffix.lower() != ".safetensors":
        return None, None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(_CLASSIFIER, "{}"))
    except (SafetensorError, OSError, ValueError):
        return None, None
    names, size = (about.get(key) if isinstance(about, dict) else None for key in ("class_names", "image_size"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        size = None
    return None if names is None else tuple(names), size


def strip_prefixes(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """``state`` without the wrapper prefixes (``module.``, ``model.``, ...) all its keys share.

    Nothing is stripped once any key is an expected one, so a model with a submodule called ``model`` is safe.
    """
    known = set(expected)
    stripped = dict(state)
    while stripped and not known & stripped.keys():
        prefix = next((p for p in _WRAPPER_PREFIXES if all(k.startswith(p) for k in stripped)), None)
        if prefix is None:
            return dict(state)
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return stripped


def describe_difference(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], optional: Iterable[str] = ()
) -> str:
    """What differs between two tables of tensor shapes, in words; empty when nothing does.

    Args:
        expected, found: shape by key.
        optional: keys that may be missing.
    """
    may_miss = set(optional)
    missing = [k for k in expected if k not in found and k not in may_miss]
    unexpected = [k for k in found if k not in expected]
    shapes = [
        f"{k} is {_shape(found[k])}, expected {_shape(expected[k])}"
        for k in expected
        if k in found and tuple(found[k]) != tuple(expected[k])
    ]
    parts = []
    for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            parts.append(f"{len(keys)} {label}: {', '.join(keys[:_SHOWN])}{more}")
    return "; ".join(parts)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load ``state`` into ``module``; every key must be there, once, in the right shape.

    Only BatchNorm's ``num_batches_tracked`` may be missing: old files do not have it and nothing in evaluation uses it.

    Args:
        what: the file or object the weights came from, for the message.

    Raises:
        CheckpointError: naming the keys that are missing, unexpected or of another shape, and how many there are.
    """
    if not isinstance(module, nn.Module):
        raise InvalidTypeError("module", type(module).__name__, "a torch.nn.Module")
    target = module.state_dict()
    optional = [k for k in target if k.rpartition(".")[2] == "num_batches_tracked"]
    difference = describe_difference(
        {k: tuple(v.shape) for k, v in target.items()}, {k: tuple(v.shape) for k, v in state.items()}, optional
    )
    if difference:
        raise CheckpointError(f"{what} does not fit {type(module).__name__}: {difference}")
    module.load_state_dict(dict(state), strict=False)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

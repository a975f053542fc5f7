"""Saving and loading B-cos networks: tensors as safetensors, everything else as JSON beside or inside them.

A checkpoint is a directory (``model.safetensors``, ``config.json``) or one ``.safetensors`` file with the same JSON in
its header. It holds the weights, the recipe and the name of the source model, no code: loading builds the source
architecture, converts it with the recipe, and fills in the weights.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bcos_rt.conversion import Recipe, bcosify
from bcos_rt.errors import BcosError, CheckpointError, InvalidArgumentError, InvalidTypeError
from bcos_rt.files import check_format, ordinary_mode, replacing
from bcos_rt.models import rebuild_source
from bcos_rt.models.weights import load_strict
from bcos_rt.nn.exponent import exponents, set_exponents
from bcos_rt.nn.network import BcosNetwork, check_class_names
from bcos_rt.packaged import located

__all__ = ["is_checkpoint", "load", "save"]

FORMAT = "bcos-rt"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# The entry of a single file's header that holds the JSON.
HEADER_KEY = "bcos_rt"
# Suffixes people give to files of weights: a directory of such a name would surprise them.
_FOREIGN_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pkl", ".json", ".npz", ".safetensor")


def save(net: BcosNetwork, path: str | os.PathLike[str]) -> Path:
    """Write a network: weights, recipe, source, class names and the side of its images.

    An error, or Ctrl-C, leaves the old checkpoint in place, and a file is the old one or the new one at any time. (A
    directory cannot be replaced in one step: for a moment, between two renames, there is none.)

    Args:
        net: the network, on any device and of any dtype.
        path: a name ending in ``.safetensors`` gives one file, any other name a directory. A checkpoint already
            there is replaced; parent folders are made.

    Returns:
        ``path``.

    Raises:
        InvalidTypeError: ``net`` is no :class:`BcosNetwork`, its class names are no strings.
        InvalidArgumentError: the path cannot be written, or is a directory that holds something else; a number of class
            names that is not the number of logits.
    """
    if not isinstance(net, BcosNetwork):
        raise InvalidTypeError("net", type(net).__name__, "a BcosNetwork", " (the first result of bcosify)")
    path = Path(path)
    state, config = _tensors(net), _config_of(net)
    try:
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".safetensors":
            if target.is_dir():
                raise InvalidArgumentError("path", f"{str(path)!r}, a directory", "a file name")
            with replacing(target) as temporary:
                save_file(state, temporary, metadata={"format": "pt", HEADER_KEY: json.dumps(config)})
        elif path.suffix.lower() in _FOREIGN_SUFFIXES:
            raise InvalidArgumentError("path", repr(str(path)), "a directory, or a file name ending in .safetensors")
        else:
            _check_replaceable(target, path)
            _write_directory(state, config, target)
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError("path", f"{str(path)!r} ({error})", "a path that can be written") from error
    return path


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> BcosNetwork:
    """Read a network that :func:`save` wrote, in eval mode, on the CPU.

    Args:
        path: the directory or the ``.safetensors`` file; ``packaged:NAME`` for a network that comes with the package
            (:mod:`bcos_rt.packaged`).
        model: the source architecture, with any weights, for a network made from a module of your own; a network made
            from a model name (``torchvision:...``, ``timm:...``) needs none. It is not modified.

    Raises:
        CheckpointError: no such file, not a checkpoint of this package, truncated, of another format version, made from
            a module that was not given, or one that does not fit: the message lists the keys that differ.
    """
    path = located(path)
    if model is not None and not isinstance(model, nn.Module):
        raise InvalidTypeError("model", type(model).__name__, "a torch.nn.Module (the source architecture) or None")
    checkpoint = _read(path)
    source = checkpoint.source
    if model is None:
        if source.get("kind") == "module":
            raise CheckpointError(
                f"{path}: was made from a module of your own, {source.get('name', 'unnamed')}, which a checkpoint does "
                "not hold: build that architecture and give it as model=..."
            )
        model = rebuild_source(source)
    try:
        # Layers are made before they are filled: that must not move the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            net, _ = bcosify(model, checkpoint.recipe, class_names=checkpoint.class_names)
    except BcosError as error:
        raise CheckpointError(f"{path}: {_name_of(source)} does not convert with its recipe: {error}") from error
    net.source, net.image_size = dict(source), checkpoint.image_size
    net.cpu()
    try:
        set_exponents(net, checkpoint.exponents)
    except InvalidArgumentError as error:
        raise CheckpointError(f"{path}: its exponents do not fit {_name_of(source)}: {error}") from error
    _match_dtypes(net, checkpoint.state)
    load_strict(net, checkpoint.state, f"{path} (made from {_name_of(source)})")
    return net.eval()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`save` seems to have written ``path``; reads no tensor."""
    path = Path(path)
    try:
        if path.is_dir():
            return _parse_config((path / CONFIG_NAME).read_text(encoding="utf-8"), path).get("format") == FORMAT
        return path.is_file() and HEADER_KEY in _header(path)
    except (OSError, ValueError):
        return False


# --- writing ---------------------------------------------------------------------------------------------------------


def _config_of(net: BcosNetwork) -> dict[str, Any]:
    from bcos_rt import __version__

    names = net.class_names
    check_class_names("net.class_names", names)
    if names is not None and net.classes is not None and len(names) != net.classes:
        raise InvalidArgumentError("net.class_names", f"{len(names)} names", f"one per logit, {net.classes}, or None")
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bcos_rt_version": __version__,
        "source": net.source,
        "recipe": net.recipe.to_dict(),
        "class_names": net.class_names,
    }
    if net.image_size is not None:
        config["image_size"] = net.image_size
    if other := {name: b for name, b in exponents(net).items() if b != net.recipe.b}:
        config["exponents"] = other  # learned, or in the middle of a schedule
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("net.source", f"{net.source!r} ({error})", "values that JSON can hold") from error
    return config


def _tensors(net: BcosNetwork) -> dict[str, Tensor]:
    """The state dict on the CPU, contiguous, no two tensors in the same memory (safetensors stores each by itself)."""
    state: dict[str, Tensor] = {}
    taken: set[int] = set()
    learned = {f"{name}.b" for name in exponents(net)}
    for key, value in net.state_dict().items():
        if key in learned:  # stands among the exponents
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key}: is a {type(value).__name__}; only tensors can be saved")
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        if value.numel() and (storage in taken or value.untyped_storage().nbytes() != value.nbytes):
            value = value.clone()
            storage = value.untyped_storage().data_ptr()
        taken.add(storage)
        state[key] = value
    return state


def _temporary(target: Path) -> Path:
    """A new name in the same folder, so that renaming stays within one file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def _check_replaceable(target: Path, path: Path) -> None:
    """Whether a directory may be replaced: it is empty, or a checkpoint and nothing else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InvalidArgumentError(
            "path", f"{str(path)!r}, an existing file", "a directory, or a file name ending in .safetensors"
        )
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [n for n in names if n not in (WEIGHTS_NAME, CONFIG_NAME)]
    if names and (foreign or not is_checkpoint(target)):
        raise InvalidArgumentError(
            "path",
            f"{str(path)!r}, a directory that holds {', '.join((foreign or names)[:3])}",
            "a new or empty directory, or a checkpoint to replace",
        )


def _write_directory(state: Mapping[str, Tensor], config: Mapping[str, Any], target: Path) -> None:
    temporary, old = _temporary(target), _temporary(target)
    try:
        temporary.mkdir()
        save_file(dict(state), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        ordinary_mode(temporary / WEIGHTS_NAME)
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # A directory cannot be renamed over a full one: the old one steps aside, and back if this fails.
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Checkpoint:
    state: dict[str, Tensor]
    recipe: Recipe
    source: dict[str, Any]
    class_names: list[str] | None
    exponents: dict[str, float]
    image_size: int | None


def _read(path: Path) -> _Checkpoint:
    if path.is_dir():
        weights = path / WEIGHTS_NAME
        for needed in (path / CONFIG_NAME, weights):
            if not needed.is_file():
                found = sorted(entry.name for entry in path.glob("*.safetensors") if entry.name != WEIGHTS_NAME)
                hint = f" (but {', '.join(found[:3])}: name one of them)" if found else ""
                raise CheckpointError(f"{path}: not a bcos-rt checkpoint, it holds no {needed.name}{hint}")
        try:
            text = (path / CONFIG_NAME).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path / CONFIG_NAME}: unreadable ({error})") from error
    else:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory")
        weights = path
        header = _header(path)
        if HEADER_KEY not in header:
            raise CheckpointError(
                f"{path}: a safetensors file that bcos_rt.save did not write; conventional weights go through "
                "bcosify(load_model(NAME, weights=FILE)), published B-cos weights through "
                "bcos_rt.models.import_published"
            )
        text = header[HEADER_KEY]
    config = _parse_config(text, path)
    check_format(path, config, FORMAT, FORMAT_VERSION, "checkpoint")
    recipe, source, names = config.get("recipe"), config.get("source"), config.get("class_names")
    if not isinstance(recipe, dict) or not isinstance(source, dict):
        raise CheckpointError(f"{path}: damaged, recipe or source is missing")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise CheckpointError(f"{path}: damaged, class_names is not a list of names")
    other = config.get("exponents", {})
    if not (isinstance(other, dict) and all(isinstance(b, int | float) for b in other.values())):
        raise CheckpointError(f"{path}: damaged, exponents is not a number by layer")
    side = config.get("image_size")
    if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
        raise CheckpointError(f"{path}: damaged, image_size is not a number of pixels")
    try:
        parsed = Recipe.from_dict(recipe)
    except (InvalidArgumentError, InvalidTypeError) as error:
        raise CheckpointError(f"{path}: its recipe is not one this version knows: {error}") from error
    try:
        with safe_open(weights, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{weights}: not a safetensors file, or truncated ({error})") from error
    return _Checkpoint(state, parsed, source, names, other, side)


def _header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({error})") from error


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a bcos-rt checkpoint, or damaged: its JSON does not parse ({error})"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a bcos-rt checkpoint, its JSON is a {type(config).__name__}")
    return config


def _match_dtypes(net: BcosNetwork, state: Mapping[str, Tensor]) -> None:
    """Give every tensor the dtype it was saved with; set in place, so that shared parameters stay shared."""
    for key, tensor in (*net.named_parameters(), *net.named_buffers()):
        if key in state and tensor.dtype != state[key].dtype:
            tensor.data = tensor.data.to(state[key].dtype)


def _name_of(source: Mapping[str, Any]) -> str:
    kind, name = source.get("kind"), source.get("name", "unnamed")
    return str(name) if kind in (None, "module", name) else f"{kind}:{name}"

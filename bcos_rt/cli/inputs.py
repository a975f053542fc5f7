"""What the commands share on the way in: networks by name or checkpoint, classes, photos, output paths."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bcos_rt.errors import InvalidArgumentError, did_you_mean
from bcos_rt.packaged import is_packaged

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bcos_rt.conversion import ConversionReport, Recipe
    from bcos_rt.models import LoadedModel
    from bcos_rt.models.clip import ClipModel
    from bcos_rt.nn.network import BcosNetwork

__all__ = [
    "Checkpoint",
    "Clip",
    "Device",
    "Json",
    "Model",
    "Network",
    "NumClasses",
    "Pooling",
    "Power",
    "Size",
    "Weights",
    "as_checkpoint",
    "check_beside_checkpoint",
    "check_classifier",
    "check_output",
    "check_photos",
    "check_writable_place",
    "chosen_device",
    "convert_source",
    "find_class",
    "has_embedding",
    "is_saved",
    "load_clip_network",
    "load_network",
    "load_photos",
    "load_source",
    "read_recipe_file",
]

DEFAULT_SIZE = 224
# Of small:NAME, where a checkpoint does not say it.
SMALL_SIZE = 32
# How many candidates an error message lists.
SHOWN = 5

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Pretrained model: torchvision:NAME, timm:NAME, hf:NAME, simple_vit:NAME, small:NAME or "
        "efficientnet-lite0.",
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        "--clip",
        metavar="NAME[:TAG]",
        help="A CLIP model of open_clip: RN50, ViT-B-16, ...; a tag says which of its published weights. Instead of "
        "--model, or beside the --checkpoint of an image tower.",
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        "--pooling",
        metavar="mean|max|cosine_power",
        help="How a text's cosines with the places of an image become its score. Default: mean.",
    ),
]
Power = Annotated[
    float | None, typer.Option("--power", help="Of --pooling cosine_power: a cosine c counts |c|^(POWER - 1) times.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="PATH",
        help="A saved B-cos network, instead of --model; or packaged:cifar10-resnet20, which comes with bcos-rt.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="FILE|random",
        help="Weights of --model or --clip: a .safetensors, .pth or .ckpt file, or 'random'. Default: the published "
        "weights.",
    ),
]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", min=1, help="Number of classes of --model. Default: its weights'.")
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size", "-s", min=1, help=f"Side of the image in pixels. Default: the model's own, {DEFAULT_SIZE} if unknown."
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to run; auto is a GPU where there is one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


@dataclass(frozen=True)
class Network:
    """A network ready to use.

    Attributes:
        net: in eval mode.
        converted: whether it was converted just now from a conventional model.
        input_size: side of the images it was trained for, in pixels.
        described: JSON-ready, where it came from.
    """

    net: BcosNetwork
    converted: bool
    input_size: int
    described: dict[str, Any]


def load_source(name: str, weights: str | None, num_classes: int | None) -> LoadedModel:
    """The conventional model behind ``--model``, ``--weights`` and ``--num-classes``."""
    from bcos_rt.models import load_model

    _check_weights(weights)
    return load_model(name, weights=weights, num_classes=num_classes)


def check_trained(source: LoadedModel, num_classes: int | None) -> None:
    """Refuse a model whose classifier is new, where its answers are asked for."""
    if source.new_classifier:
        got = f"{num_classes}, and weights of another number of classes"
        expected = "the weights' own number, or none: a new classifier is to be trained first"
        raise InvalidArgumentError("--num-classes", got, expected, " (bcos-rt finetune)")


def _check_weights(weights: str | None) -> None:
    from bcos_rt.models.weights import is_file_of_weights

    if is_file_of_weights(weights) and not Path(weights).is_file():
        raise InvalidArgumentError(
            "--weights", repr(weights), "an existing file, or 'random'", did_you_mean(str(weights), ["random"])
        )


def convert_source(
    source: LoadedModel, recipe: Recipe, verify_images: Tensor | None = None
) -> tuple[BcosNetwork, ConversionReport]:
    """:func:`bcos_rt.bcosify` of a loaded model; its normalisation and class names go with it."""
    from bcos_rt.conversion import bcosify

    # bcosify takes a LoadedModel as it takes a name, which its signature does not say.
    model: Any = source
    return bcosify(model, recipe, verify_images=verify_images)


def is_saved(model: str) -> bool:
    """Whether what stands for a model is a saved network: a path, or one that comes with the package."""
    from bcos_rt.models.sources import is_model_name

    # Whatever lies here under a model's name.
    return is_packaged(model) or (os.path.exists(model) and not is_model_name(model))


def as_checkpoint(model: str | None, checkpoint: Path | None) -> tuple[str | None, Path | None]:
    """``--model`` and ``--checkpoint``, where a saved network was given as a model: that as the checkpoint."""
    if model is not None and checkpoint is None and is_saved(model):
        return None, Path(model)
    return model, checkpoint


def load_network(
    model: str | None, checkpoint: Path | None, weights: str | None, num_classes: int | None = None
) -> Network:
    """The network behind ``--model`` or ``--checkpoint``; a conventional model is converted to an equivalent one.

    Raises:
        InvalidArgumentError: neither or both are given, or options that do not go together.
        CheckpointError: unreadable or unfitting weights.
    """
    model, checkpoint = as_checkpoint(model, checkpoint)
    if model is not None and checkpoint is not None:
        raise InvalidArgumentError("--model, --checkpoint", "both", "one of them")
    if checkpoint is not None:
        check_beside_checkpoint({"--weights": weights, "--num-classes": num_classes})
        from bcos_rt.checkpoint import load

        net = load(checkpoint)
        return Network(net.eval(), False, side_of(net), {"checkpoint": str(checkpoint), "source": dict(net.source)})

    if model is None:
        raise InvalidArgumentError("--model, --checkpoint", "neither", "one of them")
    check_classifier(model)
    from bcos_rt.conversion import Recipe

    source = load_source(model, weights, num_classes)
    check_trained(source, num_classes)
    net, _ = convert_source(source, Recipe.equivalent())
    return Network(net.eval(), True, source.input_size, {"model": model, "weights": weights, "source": source.source})


def check_beside_checkpoint(options: Mapping[str, object]) -> None:
    """Refuse options of ``--model`` beside a ``--checkpoint``; None is one that was not given."""
    for option, value in options.items():
        if value is not None:
            raise InvalidArgumentError(option, f"{value!r} with a checkpoint", "no such option: it has its own")


def load_clip_network(
    clip: str,
    checkpoint: Path | None,
    weights: str | None,
    *,
    model: str | None = None,
    num_classes: int | None = None,
) -> tuple[Network, ClipModel]:
    """The image tower and the CLIP model behind ``--clip``.

    The tower is that of ``--checkpoint``, else the model's own, converted to an equivalent one (B = 1).

    Args:
        model, num_classes: options that do not go with it, to be refused.

    Raises:
        InvalidArgumentError: options that do not go together, a checkpoint that returns logits.
        CheckpointError: unreadable or unfitting weights.
    """
    if model is not None:
        raise InvalidArgumentError("--clip, --model", "both", "one of them")
    if num_classes is not None:
        raise InvalidArgumentError(
            "--num-classes", f"{num_classes} with --clip", "no such option: texts are no classes"
        )
    _check_weights(weights)
    from bcos_rt.conversion import Recipe
    from bcos_rt.models.clip import load_clip

    net: BcosNetwork | None = None
    if checkpoint is not None:
        from bcos_rt.checkpoint import load

        net = load(checkpoint)
        if not has_embedding(net):
            expected = "an image tower, as `bcos-rt convert --model open_clip:NAME --recipe clip` saves it"
            raise InvalidArgumentError("--checkpoint", f"{str(checkpoint)!r}, which returns logits", expected)
    source = load_clip(clip, weights=weights)
    described = {"clip": source.name, "weights": weights, "source": source.image_tower.source}
    if net is not None:
        described |= {"checkpoint": str(checkpoint), "source": dict(net.source)}
        return Network(net.eval(), False, side_of(net), described), source
    net, _ = convert_source(source.image_tower, Recipe.equivalent(output="embedding"))
    return Network(net.eval(), True, source.image_tower.input_size, described), source


def check_classifier(model: str) -> None:
    """Refuse an image tower where a classifier is needed."""
    if model.startswith("open_clip:"):
        hint = f" (an image tower and texts: --clip {model.partition(':')[2]})"
        raise InvalidArgumentError("--model", repr(model), "a classifier", hint)


def has_embedding(net: BcosNetwork) -> bool:
    """Whether a network is an image tower, whose output is an embedding instead of logits."""
    from bcos_rt.nn.network import EmbeddingLayer

    return isinstance(net.logit_layer, EmbeddingLayer)


def side_of(net: BcosNetwork) -> int:
    """The side of the images that a loaded network was trained with, or its source made for, where it is known."""
    if net.image_size is not None:
        return net.image_size
    # Checkpoints of older versions do not say it.
    if net.source.get("kind") == "small":
        return SMALL_SIZE
    if net.source.get("kind") == "open_clip":
        side = net.source.get("config", {}).get("vision_cfg", {}).get("image_size", DEFAULT_SIZE)
        return int(max(side) if isinstance(side, list | tuple) else side)
    return DEFAULT_SIZE


def read_recipe_file(path: str) -> dict[str, Any]:
    """The object in a ``--recipe`` file.

    Raises:
        InvalidArgumentError: not readable, no JSON, or JSON that is no object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError("--recipe", f"{path!r} ({error})", "a readable JSON file") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError("--recipe", f"{path!r}, which holds a {type(values).__name__}", "a JSON object")
    return values


def find_class(wanted: str, names: Sequence[str] | None, classes: int) -> int:
    """The index of the class a user means: an index, a name, or a part of a name that only one class has.

    Names are compared without regard to case; ImageNet's synonyms (``"tabby, tabby cat"``) count as names each.

    Raises:
        InvalidArgumentError: no such class, or several.
    """
    wanted = wanted.strip()
    try:
        index = int(wanted) if wanted.lstrip("-").isdecimal() else None
    except ValueError:  # "--5", or more digits than Python reads
        index = None
    if index is not None:
        if not 0 <= index < classes:
            raise InvalidArgumentError("--class", index, f"an index from 0 to {classes - 1}, or a name")
        return index
    if names is None:
        raise InvalidArgumentError(
            "--class", repr(wanted), f"an index from 0 to {classes - 1}: the network has no class names"
        )
    key = wanted.casefold()
    synonyms = [{part.strip() for part in name.casefold().split(",")} | {name.casefold()} for name in names]
    found = [i for i, known in enumerate(synonyms) if key in known]
    if not found and key:
        found = [i for i, name in enumerate(names) if key in name.casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{i} {names[i]!r}" for i in found[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise InvalidArgumentError(
            "--class", f"{wanted!r}, which {len(found)} classes match", f"one class: {listed}{more}"
        )
    by_folded = {name.casefold(): name for name in names}
    hint = did_you_mean(key, by_folded)
    for folded, name in by_folded.items():
        hint = hint.replace(repr(folded), repr(name))
    raise InvalidArgumentError("--class", repr(wanted), "the name or index of one of the network's classes", hint)


def check_photos(photos: Sequence[Path]) -> None:
    """Refuse photos that are not there before any long work starts."""
    for photo in photos:
        if not photo.is_file():
            what = "a directory" if photo.is_dir() else "which does not exist"
            raise InvalidArgumentError("photo", f"{str(photo)!r}, {what}", "an image file")


def load_photos(photos: Sequence[Path], size: int) -> Tensor:
    """The photos as one batch, [N, 3, size, size] in [0, 1]."""
    import torch

    from bcos_rt.images import load_image

    return torch.stack([load_image(photo, size) for photo in photos])


def chosen_device(name: str) -> torch.device:
    """The device behind ``--device``.

    Raises:
        InvalidArgumentError: a name of none, or of one that is not there.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    known = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in known:
        missing = "" if gpus else " (PyTorch finds no GPU here)"
        raise InvalidArgumentError("--device", repr(name), f"one of {', '.join(known)}", missing)
    return torch.device(name)


def check_output(path: Path, suffixes: Sequence[str] = (), option: str = "--output") -> None:
    """Refuse a path that cannot be written before any long work starts; leaves nothing behind.

    Args:
        suffixes: the file name endings allowed; empty for any.

    Raises:
        InvalidArgumentError: a directory, a wrong ending, or a folder that is missing or not writable.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise InvalidArgumentError(option, repr(str(path)), "a file name ending in " + ", ".join(suffixes))
    if path.is_dir():
        raise InvalidArgumentError(option, f"{str(path)!r}, a directory", "a file name")
    try:
        # Asking for permission bits is not enough: a read-only mount has them too.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:40]}-"):
            pass
    except OSError as error:
        raise InvalidArgumentError(
            option, f"{str(path)!r} ({error.strerror})", "a file in a writable folder"
        ) from error


def check_writable_place(path: Path, option: str = "--output", folder: bool = False) -> None:
    """Like :func:`check_output` for a path whose parent folders will be made; ``folder``: that will be one itself."""
    if folder and path.exists() and not path.is_dir():
        raise InvalidArgumentError(option, f"{str(path)!r}, a file", "a folder, new or there already")
    place = path.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".bcos-rt-"):
            pass
    except OSError as error:
        raise InvalidArgumentError(
            option, f"{str(path)!r} ({error.strerror})", "a path in a writable folder"
        ) from error

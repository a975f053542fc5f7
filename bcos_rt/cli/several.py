"""What commands share that compare attribution methods: networks, methods that work on them, the device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bcos_rt.cli.inputs import as_checkpoint, check_classifier, check_trained, is_saved, load_network, load_source
from bcos_rt.errors import BcosError, InvalidArgumentError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bcos_rt.data.image_data import ImageData

__all__ = [
    "POST_HOC",
    "BatchSize",
    "Checkpoints",
    "Compared",
    "Convert",
    "Data",
    "Methods",
    "Models",
    "Split",
    "WeightsOfEach",
    "Workers",
    "check_methods",
    "common_side",
    "compared_networks",
    "methods_for",
    "numbered_for",
    "one_network",
    "warn_left_out",
]

# Of a conventional network, where no method is asked for.
POST_HOC = ("input_x_gradient", "integrated_gradients", "guided_backprop", "grad_cam")

Data = Annotated[
    str, typer.Option("--data", "-d", metavar="DATA", help="Images: a folder of class folders, tar files, hf:NAME.")
]
Split = Annotated[str, typer.Option(help="Which part of the data, where it has parts.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Convert = Annotated[
    bool, typer.Option("--convert", help="Convert --model to an equivalent B-cos network (B = 1) first.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Pretrained model: torchvision:NAME, timm:NAME, hf:NAME, simple_vit:NAME, small:NAME or "
        "efficientnet-lite0; may be repeated. convert:NAME converts this one to an equivalent B-cos network (B = 1).",
    ),
]
WeightsOfEach = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="FILE|random|default",
        help="Weights of --model; as often as --model where it is repeated. Default: the published weights.",
    ),
]
Checkpoints = Annotated[
    list[Path] | None,
    typer.Option("--checkpoint", "-c", metavar="PATH", help="A saved B-cos network; may be repeated."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="An attribution method; may be repeated. Networks are measured with those that work on them.",
    ),
]
CONVERT = "convert:"
# Of --weights: the published ones.
_PUBLISHED = "default"


@dataclass(frozen=True)
class Compared:
    """A network among others.

    Attributes:
        net: in evaluation mode, on its device.
        side: of the images it was made for, in pixels.
        described: JSON-ready, where it came from.
    """

    net: nn.Module
    side: int
    described: dict[str, Any]


def one_network(
    model: str | None, checkpoint: Path | None, weights: str | None, num_classes: int | None, convert: bool = False
) -> tuple[nn.Module, int, dict[str, Any]]:
    """The network, the side of its images, and what to call it: a checkpoint's, or a model's, as it is or converted."""
    model, checkpoint = as_checkpoint(model, checkpoint)
    if convert and checkpoint is not None:
        raise InvalidArgumentError("--convert", "a checkpoint", "a conventional --model to convert")
    if model is None or checkpoint is not None or convert:
        network = load_network(model, checkpoint, weights, num_classes)
        return network.net, network.input_size, network.described
    check_classifier(model)
    source = load_source(model, weights, num_classes)
    check_trained(source, num_classes)
    described = {"model": model, "weights": weights, "source": source.source}
    return source.conventional().eval(), source.input_size, described


def compared_networks(
    models: Sequence[str] | None,
    checkpoints: Sequence[Path] | None,
    weights: Sequence[str] | None,
    num_classes: int | None,
    convert: bool,
    device: torch.device,
) -> dict[str, Compared]:
    """The networks behind ``--checkpoint``, ``--model`` and the options of the latter, by name.

    Raises:
        InvalidArgumentError: none, options that do not go together, or a network twice.
    """
    named = list(models or ())
    if weights and not named:
        raise InvalidArgumentError("--weights", "no --model", "a conventional model it belongs to")
    if weights and len(weights) != len(named):
        raise InvalidArgumentError("--weights", f"{len(weights)} for {len(named)} models", "none, or one for each")
    of_each = []
    for model, given in zip(named, weights or (), strict=False):
        if not is_saved(model):
            of_each.append(given)
        elif given != _PUBLISHED:
            raise InvalidArgumentError("--weights", f"{given!r} for {model}", f"{_PUBLISHED!r}: it has its own")
    models = [model for model in named if not is_saved(model)]
    checkpoints = [*(checkpoints or ()), *(Path(model) for model in named if is_saved(model))]
    if not models and not checkpoints:
        raise InvalidArgumentError("--model, --checkpoint", "neither", "at least one of them")
    for option, asked in (("--convert", convert), ("--num-classes", num_classes)):
        if asked and not models:
            raise InvalidArgumentError(option, "no --model", "a conventional model it belongs to")
    found: dict[str, Compared] = {}

    def add(name: str, *arguments: Any) -> None:
        if name in found:
            raise InvalidArgumentError("--model, --checkpoint", f"{name!r} twice", "different networks")
        net, side, described = one_network(*arguments)
        found[name] = Compared(net.to(device), side, described)

    for called, path in zip(_short_names(checkpoints), checkpoints, strict=True):
        add(called, None, path, None, None)
    for i, model in enumerate(models):
        of = of_each[i] if of_each else None
        called = model if models.count(model) == 1 else f"{model} ({of or 'default'})"
        converted = convert or model.startswith(CONVERT)
        add(called, model.removeprefix(CONVERT), None, of, num_classes, converted)
    return found


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Ends of paths that tell them apart: runs call their checkpoints alike, best and last."""
    all_parts = [(*path.parent.parts, path.stem) for path in paths]
    names = []
    for parts in all_parts:
        lengths = range(1, len(parts))
        alone = (n for n in lengths if sum(other[-n:] == parts[-n:] for other in all_parts) == 1)
        names.append(str(Path(*parts[-next(alone, len(parts)) :])))
    return names


def check_methods(asked: Sequence[str] | None) -> None:
    """Refuse an unknown method before anything is loaded.

    Raises:
        InvalidArgumentError: there is none of that name.
    """
    from bcos_rt.evaluation import method

    for name in asked or ():
        method(name)


def common_side(networks: Mapping[str, Compared], size: int | None) -> int:
    """The side of the images for all networks: ``--size``, or their own where it is the same.

    Raises:
        InvalidArgumentError: networks made for images of different sizes.
    """
    sides = {name: network.side for name, network in networks.items()}
    if size is None and len(set(sides.values())) > 1:
        listed = ", ".join(f"{name} {side}" for name, side in sides.items())
        raise InvalidArgumentError(
            "--size", f"none, and networks for images of different sizes ({listed} pixels)", "one size for all of them"
        )
    return size or next(iter(sides.values()))


def numbered_for(networks: Mapping[str, Compared], images: ImageData) -> ImageData:
    """The images under the labels that all networks with class names have for them; others go along with those.

    Raises:
        InvalidArgumentError: classes are numbered in a way that cannot be followed, or in several.
    """
    from bcos_rt.data import renumbered
    from bcos_rt.data.splits import class_numbers

    known = [(name, names) for name, one in networks.items() if (names := getattr(one.net, "class_names", None))]
    if not known:
        return images
    (first, its), *others = known
    found = renumbered(images, its, "--data", f"{first} has it")
    numbers = class_numbers(images.class_names, its, "--data", f"{first} has it")
    for name, names in others:
        if class_numbers(images.class_names, names, "--data", f"{name} has it") != numbers:
            raise InvalidArgumentError(
                "--model, --checkpoint", f"{first} and {name}, which number the classes of --data differently",
                "networks that agree on them, or one at a time",
            )  # fmt: skip
    return found


def methods_for(
    networks: Mapping[str, Compared], asked: Sequence[str] | None, default: Sequence[str], side: int
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """The methods to measure each network with, and why others are left out for it.

    Args:
        asked: ``--method``; None for the default ones.
        default: for a B-cos network; for a conventional one :data:`POST_HOC` stands in the place of ``"bcos"``.
        side: of the images that methods will see, in pixels.

    Raises:
        InvalidArgumentError: none of them works on a network, or it takes no such images.
    """
    import torch

    from bcos_rt.evaluation import unsupported_methods
    from bcos_rt.evaluation.checks import example_tensor
    from bcos_rt.nn.network import BcosNetwork

    chosen: dict[str, list[str]] = {}
    left_out: dict[str, dict[str, str]] = {}
    for name, network in networks.items():
        bcos = isinstance(network.net, BcosNetwork)
        wanted = list(asked or default)
        if not bcos:
            # That a conventional network has no explanation of its own goes without saying.
            wanted = [entry for entry in wanted if entry != "bcos"]
            if not asked:
                wanted = [*POST_HOC, *(entry for entry in wanted if entry not in POST_HOC)]
            if not wanted:
                raise InvalidArgumentError("--method", "bcos alone", f"a post-hoc method for {name!r}")
        like = example_tensor(network.net)
        image = torch.full((1, 3, side, side), 0.5, dtype=like.dtype, device=like.device)
        _check_takes(name, network.net, image)
        reasons = unsupported_methods(network.net, wanted, image)
        chosen[name] = [entry for entry in wanted if entry not in reasons]
        if not chosen[name]:
            expected = f"a method that works on {name!r}"
            raise InvalidArgumentError("--method", ", ".join(wanted), expected, f" ({'; '.join(reasons.values())})")
        if reasons:
            left_out[name] = reasons
    return chosen, left_out


def warn_left_out(left_out: Mapping[str, Mapping[str, str]]) -> None:
    """Say which networks are not measured with which methods."""
    for network, reasons in left_out.items():
        for name, reason in reasons.items():
            warnings.warn(f"{network} is not measured with {name}: {reason}", stacklevel=2)


def _check_takes(network: str, net: nn.Module, image: torch.Tensor) -> None:
    """Refuse a size of images that a network does not take, before anything long begins."""
    import torch

    try:
        with torch.no_grad():
            net(image)
    except BcosError:
        raise
    except Exception as error:  # each network says it in its own way
        side = image.shape[-1]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidArgumentError(
            "--size, --variant",
            f"images of {side} x {side} pixels, which {network!r} does not take ({reason})",
            "a size it takes; of grids --variant strided shows it one image's size at a time",
        ) from error

"""``bcos-rt finetune`` and ``bcos-rt train``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bcos_rt.cli.convert import named_recipe
from bcos_rt.cli.inputs import (
    DEFAULT_SIZE,
    Checkpoint,
    Clip,
    Json,
    Model,
    Weights,
    check_beside_checkpoint,
    check_photos,
    check_writable_place,
    convert_source,
    has_embedding,
    load_photos,
    load_source,
    read_recipe_file,
    side_of,
)
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.errors import InvalidArgumentError, TrainingInterruptedError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from bcos_rt.nn.conventional import ConventionalNetwork
    from bcos_rt.nn.network import BcosNetwork
    from bcos_rt.training import TrainingRecipe

__all__ = ["finetune", "train"]

# What a shell reports of a process that SIGTERM ended.
TERMINATED = 143
# What JSON spells otherwise, as recipes are written in Python.
_PYTHONS = {"True": True, "False": False, "None": None}
# Of --conversion.
_DEFAULT = "default"
_HOW = "How"
_WHERE = "Where"

Data = Annotated[
    str,
    typer.Option(
        "--data", "-d", metavar="DATA", help="Training images: a folder of class folders, tar files, hf:NAME."
    ),
]
Validation = Annotated[
    str | None,
    typer.Option("--val", metavar="DATA", help="Validation images, of their split 'val' or 'test'. Default: none."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The run's folder.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", metavar="bcosify|clip|bcos|standard|FILE.json", help="Training recipe.", rich_help_panel=_HOW
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", rich_help_panel=_HOW,
        help="A field of the recipe, e.g. ema=0.999, agc=null or augmentation.size=32; may be repeated.",
    ),
]  # fmt: skip
NumClasses = Annotated[
    int | None,
    typer.Option(
        "--num-classes",
        min=1,
        help="Number of classes. Default: the data's where its classes have names, else those of --model.",
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option("--epochs", "-e", min=1, help="Passes over the data. Default: the recipe's.", rich_help_panel=_HOW),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", "-b", min=1, help="Images a step, over all processes. Default: the recipe's.",
        rich_help_panel=_HOW,
    )]  # fmt: skip
Rate = Annotated[
    float | None, typer.Option("--lr", min=0.0, help="Peak learning rate. Default: the recipe's.", rich_help_panel=_HOW)
]
Side = Annotated[
    int | None, typer.Option("--size", "-s", min=1, help="Side of the images. Default: the recipe's.",
                             rich_help_panel=_HOW)]  # fmt: skip
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in --output stopped.")]
Photos = Annotated[
    list[Path] | None, typer.Option("--explain", metavar="IMAGE", help="Explain this photo every epoch; repeatable.")
]
Devices = Annotated[str, typer.Option(help="Number of devices of each node, or 'auto'.", rich_help_panel=_WHERE)]
Nodes = Annotated[
    int, typer.Option("--num-nodes", min=1, help="Nodes; torchrun and SLURM say it themselves.", rich_help_panel=_WHERE)
]
Accelerator = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.", rich_help_panel=_WHERE)]
Strategy = Annotated[
    str, typer.Option(help="auto, ddp, or fsdp: weights and optimiser states shared out.", rich_help_panel=_WHERE)
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.", rich_help_panel=_WHERE)]


@dataclass(frozen=True)
class _Place:
    """Where a run takes place: the options under that heading."""

    accelerator: str
    devices: str
    strategy: str
    num_nodes: int
    workers: int

    @property
    def devices_as_given(self) -> int | str:
        return int(self.devices) if self.devices.isdecimal() else self.devices


def _is_silent() -> bool:
    """Whether another process speaks: the first of those that torchrun, SLURM or Fabric started."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return any(os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 0 for name in names)


def finetune(
    data: Data,
    output: Output,
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    clip: Clip = None,
    conversion: Annotated[
        str,
        typer.Option(
            metavar="default|clip|equivalent|FILE.json", help="How --model is converted, as in `bcos-rt convert`."
        ),
    ] = _DEFAULT,
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher",
            help="Distil from --model itself, before its conversion, as the recipe's distillation says "
            "(--set distillation.logits=0.5).",
        ),
    ] = False,
    val: Validation = None,
    recipe: RecipeOption = None,
    changes: Changes = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    size: Side = None,
    resume: Resume = False,
    photos: Photos = None,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    num_nodes: Nodes = 1,
    strategy: Strategy = "auto",
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Convert a pretrained model to a B-cos network and fine-tune it; or go on with a saved one.

    The image tower of --clip (or a --checkpoint of one) learns its embeddings anew from the tower before its
    conversion, on images that need no labels.

    Runs on several devices, and under torchrun and SLURM. Ctrl-C and SIGTERM save the state; --resume goes on.
    """
    chosen = _recipe(recipe or ("bcosify" if clip is None else "clip"), changes, epochs, batch_size, lr, size)
    if checkpoint is not None and model is None:
        converted = None if conversion == _DEFAULT else conversion
        # Beside --clip, --weights are the teacher's.
        own = {"--weights": weights if clip is None else None, "--num-classes": num_classes, "--conversion": converted}
        check_beside_checkpoint(own)
    elif checkpoint is None and teacher and clip is None and chosen.distillation is None:
        raise InvalidArgumentError(
            "--teacher", "a recipe without distillation", "one that says what is learned from it",
            " (--set distillation.logits=0.5, or a --recipe FILE with a distillation)",
        )  # fmt: skip

    if chosen.distillation is not None and not teacher and clip is None:
        got = "without --teacher, and a recipe with a distillation"
        expected = "--teacher, or a recipe without" if checkpoint is None else "--model and --teacher"
        raise InvalidArgumentError("--teacher", got, expected)

    def build(classes: int | None, names: Sequence[str] | None) -> tuple[nn.Module, nn.Module | None, dict[str, Any]]:
        from bcos_rt.checkpoint import load
        from bcos_rt.models.weights import is_file_of_weights

        if clip is not None:
            for option, given in (("--model", model), ("--num-classes", num_classes)):
                if given is not None:
                    raise InvalidArgumentError(f"--clip, {option}", "both", "one of them")
            return _clip_towers(clip, checkpoint, weights, conversion)
        if (model is None) == (checkpoint is None):
            raise InvalidArgumentError(
                "--model, --checkpoint", "both" if model is not None else "neither", "one of them"
            )
        if checkpoint is not None:
            if teacher:
                raise InvalidArgumentError("--teacher", "with --checkpoint", "--model, whose weights teach")
            net = load(checkpoint)
            if has_embedding(net):
                got = f"{str(checkpoint)!r}, an image tower"
                raise InvalidArgumentError("--checkpoint", got, "--clip NAME beside it, whose own tower teaches it")
            return net, None, {"checkpoint": str(checkpoint)}
        source = load_source(str(model), weights, _class_count(num_classes, classes))
        # Published names are not asked: the data may call the same classes otherwise.
        stated = source.class_names if is_file_of_weights(weights) else None
        if names is not None and stated is not None and set(names) != set(stated):
            # As many, and others: neither that classifier nor its names are the data's.
            source = source.for_other_classes()
        taught = chosen.distillation
        if teacher and source.new_classifier and taught is not None:
            got = "with weights of other classes, whose classifier is new"
            if names is None:
                raise InvalidArgumentError("--teacher", f"{got}, and --data without labels", "labelled --data")
            if taught.logits + taught.siglip + taught.embedding > 0:
                expected = "distillation of features alone (logits=0, features=1, modules=[...])"
                raise InvalidArgumentError("--teacher", got, expected)
        net, _ = convert_source(source, named_recipe(conversion, "--conversion"))
        if names is not None and net.class_names is None:
            net.class_names = list(names)
        teaching = source.conventional() if teacher else None
        return net, teaching, {"model": model, "weights": weights, "source": source.source}

    place = _Place(accelerator, devices, strategy, num_nodes, workers)
    _run("finetune", build, chosen, data, val, output, resume, photos, place, as_json)


def train(
    data: Data,
    output: Output,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="torchvision:NAME, timm:NAME or small:NAME.")
    ],
    num_classes: NumClasses = None,
    bcos: Annotated[
        bool, typer.Option("--bcos/--standard", help="The B-cos network of this architecture, or the conventional one.")
    ] = True,
    conversion: Annotated[
        str,
        typer.Option(
            metavar="default|bcos_v2|equivalent|FILE.json",
            help="Which B-cos network: as `bcos-rt convert` makes it; or 'bcos_v2', as B-cos v2's code trains from "
            "scratch: filters of norm 1, no activations, no normalisation.",
        ),
    ] = _DEFAULT,
    val: Validation = None,
    recipe: RecipeOption = None,
    changes: Changes = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    size: Side = None,
    resume: Resume = False,
    photos: Photos = None,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    num_nodes: Nodes = 1,
    strategy: Strategy = "auto",
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Train a network from random weights: a B-cos network, or with --standard the conventional one."""
    chosen = _recipe(recipe or ("bcos" if bcos else "standard"), changes, epochs, batch_size, lr, size)
    if chosen.distillation is not None:
        expected = "one without: nothing teaches a network from random weights (bcos-rt finetune --teacher)"
        raise InvalidArgumentError("--recipe, --set", "a recipe with a distillation", expected)
    if not bcos and conversion != _DEFAULT:
        raise InvalidArgumentError("--conversion", f"{conversion!r} with --standard", "--bcos, which it belongs to")

    def build(classes: int | None, names: Sequence[str] | None) -> tuple[nn.Module, None, dict[str, Any]]:
        import torch

        from bcos_rt.models import published_recipe

        torch.manual_seed(chosen.seed)
        source = load_source(model, "random", _class_count(num_classes, classes))
        if bcos:
            if conversion == "bcos_v2":
                how = published_recipe("bcos_v2", model)
            else:
                how = named_recipe(conversion, "--conversion", ("default", "bcos_v2", "equivalent"))
            net: BcosNetwork | ConventionalNetwork = convert_source(source, how)[0]
        else:
            net = source.conventional()
        # The data's classes: random weights know nothing of the source's.
        net.class_names = list(names) if names is not None else None
        return net, None, {"model": model, "source": source.source}

    place = _Place(accelerator, devices, strategy, num_nodes, workers)
    _run("train", build, chosen, data, val, output, resume, photos, place, as_json)


def _class_count(num_classes: int | None, classes: int | None) -> int | None:
    """Of the network's logits, which are to bear the names of the data's classes."""
    if num_classes is not None and classes is not None and num_classes != classes:
        raise InvalidArgumentError("--num-classes", f"{num_classes} with --data of {classes} classes", str(classes))
    return num_classes or classes


def _clip_towers(
    clip: str, checkpoint: Path | None, weights: str | None, conversion: str
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The student, converted or a checkpoint, and the tower as it was: its teacher."""
    from bcos_rt.checkpoint import load

    source = load_source(f"open_clip:{clip}", weights, None)
    about = {"clip": clip, "weights": weights, "source": source.source}
    if checkpoint is not None:
        net = load(checkpoint)
        if not has_embedding(net):
            raise InvalidArgumentError("--checkpoint", f"{str(checkpoint)!r}, which returns logits", "an image tower")
        return net, source.conventional(), {**about, "checkpoint": str(checkpoint)}
    net, _ = convert_source(source, named_recipe("clip" if conversion == _DEFAULT else conversion, "--conversion"))
    return net, source.conventional(), about


def _run(
    command: str,
    build: Any,
    chosen: TrainingRecipe,
    data: str,
    val: str | None,
    output: Path,
    resume: bool,
    photos: list[Path] | None,
    place: _Place,
    as_json: bool,
) -> None:
    def work(progress: Progress) -> Outcome:
        check_writable_place(output, folder=True)
        check_photos(photos or [])
        with progress.working("loading PyTorch"):
            import torch

            from bcos_rt.data import check_numbers, open_data
            from bcos_rt.nn.network import BcosNetwork
            from bcos_rt.training import finetune as fit
        with progress.working(f"looking at {data}"):
            images = open_data(data, split="train")
            validation = None if val is None else open_data(val, split="val")
            if validation is not None:
                check_numbers(validation.class_names, images.class_names, "--val", "the training data has it")
        with progress.working("building the network"):
            # All processes start with the same weights.
            torch.manual_seed(chosen.seed)
            names = images.class_names
            net, teacher, about = build(None if names is None else len(names), names)
            check_numbers(names, getattr(net, "class_names", None), "--data", "the network has it")
            side = chosen.augmentation.size or (side_of(net) if isinstance(net, BcosNetwork) else DEFAULT_SIZE)
        pictures = load_photos(photos, side) if photos else None
        result = fit(
            net, images, chosen, validation=validation, output=output, teacher=teacher, resume=resume,
            explain_images=pictures, accelerator=place.accelerator, devices=place.devices_as_given,
            strategy=place.strategy, num_nodes=place.num_nodes, workers=place.workers, console=progress.console,
            on_epoch=_teller(progress.console, chosen.epochs),
        )  # fmt: skip
        last = result.history[-1]
        described = {
            "command": command, "output": str(output), "network": about, "epochs": len(result.history), "last": last,
            "best": result.best,
        }  # fmt: skip
        return Outcome(described, lambda: [_table(result.history), Text(f"the run is in {output}", style="bold")])

    try:
        if _is_silent():
            work(Progress())
        else:
            run(work, as_json)
    except TrainingInterruptedError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(TERMINATED) from error


def _recipe(
    name: str, changes: list[str] | None, epochs: int | None, batch_size: int | None, lr: float | None, size: int | None
) -> TrainingRecipe:
    from bcos_rt.training import TrainingRecipe

    presets = {
        "bcosify": TrainingRecipe.bcosify, "clip": TrainingRecipe.clip, "bcos": TrainingRecipe.bcos,
        "standard": TrainingRecipe.standard,
    }  # fmt: skip
    if name in presets:
        recipe = presets[name]()
    elif Path(name).is_file():
        values = read_recipe_file(name)
        # A run's own recipe.json holds more than the recipe.
        recipe = TrainingRecipe.from_dict(values.get("recipe", values))
    else:
        expected = "'bcosify', 'clip', 'bcos', 'standard' or an existing JSON file"
        raise InvalidArgumentError("--recipe", repr(name), expected, did_you_mean(name, presets))
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "augmentation.size": size}
    given = {k: v for k, v in given.items() if v is not None}
    for change in changes or []:
        field, equals, text = change.partition("=")
        if not equals:
            raise InvalidArgumentError("--set", repr(change), "FIELD=VALUE")
        try:
            value = _PYTHONS[text] if text in _PYTHONS else json.loads(text)
        except ValueError:
            value = text
        given[field] = tuple(value) if isinstance(value, list) else value
    return recipe.replace(**given)


def _teller(console: Console, epochs: int) -> Callable[[dict[str, Any]], None]:
    """Prints a line an epoch, also where nobody watches a progress bar: on a terminal it stands above that."""
    began, done = time.perf_counter(), 0

    def tell(row: dict[str, Any]) -> None:
        nonlocal done
        done += 1  # by this process: a resumed run began with others
        left = (time.perf_counter() - began) / done * (epochs - row["epoch"])
        console.print(_line(row, epochs, left), highlight=False, markup=False, soft_wrap=True)

    return tell


def _line(row: dict[str, Any], epochs: int, left: float) -> str:
    """An epoch in a line; ``left`` in seconds."""

    def measured(part: str) -> str:
        if (top1 := row.get(f"{part}_top1")) is not None:
            return f" top-1 {top1:.2%}"
        cosine = row.get(f"{part}_cosine")
        return "" if cosine is None else f" cosine {cosine:.4f}"

    parts = [f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}{measured('train')}"]
    parts += [name + found for name, part in (("validation", "val"), ("average", "ema")) if (found := measured(part))]
    parts.append(f"lr {row['lr']:.3g}")
    if "images_per_s" in row:
        parts.append(f"{row['images_per_s']:.1f} images/s")
    parts.append(f"{timedelta(seconds=round(left))} left")
    return ", ".join(parts)


def _table(history: Sequence[dict[str, Any]]) -> Table:
    """The last epochs, one row each."""
    known = (
        "epoch", "lr", "b", "train_loss", "train_top1", "train_cosine", "val_loss", "val_top1", "val_cosine",
        "ema_top1", "ema_cosine", "seconds",
    )  # fmt: skip
    columns = [c for c in known if any(c in row for row in history)]
    table = Table(*(c.replace("_", " ") for c in columns))
    for row in history[-10:]:
        table.add_row(*("" if row.get(c) is None else f"{row[c]:.4g}" for c in columns))
    return table

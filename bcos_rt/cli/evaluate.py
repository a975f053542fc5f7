"""``bcos-rt evaluate`` and ``bcos-rt localise``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bcos_rt.cli.inputs import (
    Checkpoint,
    Clip,
    Device,
    Json,
    Model,
    NumClasses,
    Pooling,
    Power,
    Size,
    Weights,
    check_output,
    check_writable_place,
    chosen_device,
    has_embedding,
    load_clip_network,
)
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.cli.several import (
    BatchSize,
    Checkpoints,
    Convert,
    Data,
    Methods,
    Models,
    Split,
    WeightsOfEach,
    Workers,
    check_methods,
    common_side,
    compared_networks,
    methods_for,
    numbered_for,
    one_network,
    warn_left_out,
)
from bcos_rt.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from bcos_rt.data.image_data import ImageData
    from bcos_rt.evaluation import Evaluation
    from bcos_rt.models.clip import ClipModel

__all__ = ["evaluate", "localise"]

# ImageNet's names of class folders.
WORDNET = re.compile(r"n\d{8}")
_TOWERS = "Image towers"


def evaluate(
    data: Data,
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    convert: Convert = False,
    split: Split = "val",
    size: Size = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
    explained: Annotated[
        int | None,
        typer.Option(min=0, help="Images explained for the completeness error of a B-cos network. Default: 256."),
    ] = None,
    clip: Clip = None,
    zero_shot: Annotated[
        bool,
        typer.Option(
            "--zero-shot", help="With --clip: the class whose text fits an image best.", rich_help_panel=_TOWERS
        ),
    ] = False,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="TEXT",
            rich_help_panel=_TOWERS,
            help="A text of --zero-shot with {} for the class, e.g. 'a photo of a {}.'; repeatable. Default: the 80 of "
            "OpenAI's classifier of ImageNet.",
        ),
    ] = None,
    pooling: Pooling = None,
    power: Power = None,
    linear_probe: Annotated[
        bool,
        typer.Option(
            "--linear-probe",
            rich_help_panel=_TOWERS,
            help="With --clip, or an image tower's --checkpoint: logistic regression on its embeddings.",
        ),
    ] = False,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="DATA",
            help="What --linear-probe is fitted to. Default: the split 'train' of --data.",
            rich_help_panel=_TOWERS,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.png|FOLDER", help="Draw a reliability diagram; or a folder for all numbers."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy, calibration, and whether explanations add up, on labelled images.

    A --model is evaluated as it is, conventional, or with --convert as a B-cos network; a --checkpoint is one. So is
    the image tower of --clip, by --zero-shot or --linear-probe.
    """
    towers = zero_shot or linear_probe

    def work(progress: Progress) -> Outcome:
        _check_options(clip, checkpoint, zero_shot, linear_probe, templates, train, pooling, power)
        if output is not None:
            if output.suffix.lower() == ".png" and not output.is_dir():
                check_output(output)
            else:
                check_writable_place(output)
        with progress.working("loading the network"):
            place = chosen_device(device)
            from bcos_rt.data import open_data, renumbered
            from bcos_rt.evaluation import evaluate as measure
            from bcos_rt.evaluation.accuracy import check_place
            from bcos_rt.nn.network import BcosNetwork

            if output is not None:
                check_place(output, "--output")
            source: ClipModel | None = None
            if clip is not None:
                net, side, described, source = _clip_network(clip, checkpoint, weights, convert, model, num_classes)
            else:
                net, side, described = one_network(model, checkpoint, weights, num_classes, convert)
            _check_protocol(net, towers)
            if explained and (linear_probe or not isinstance(net, BcosNetwork)):
                got = f"{explained} with " + ("--linear-probe" if linear_probe else "a conventional network")
                raise InvalidArgumentError("--explained", got, "no --explained: there is no explanation of its own")
            count = 256 if explained is None else explained
            net = net.to(place)
        with progress.working(f"looking at {data}"):
            images = open_data(data, size=size or side, split=split)
            if not towers:
                images = renumbered(images, getattr(net, "class_names", None), "--data")
            others = _training_images(train, data, size or side, images) if linear_probe else None
        about: dict[str, Any] = {"command": "evaluate", "network": described, "data": data, "device": str(place)}
        with progress.bar() as tell:
            if others is not None:
                from bcos_rt.evaluation import linear_probe as fit

                probe = fit(net, others, images, batch_size=batch_size, workers=workers, tell=tell)
                found = probe.evaluation
                fitted = {"c": probe.c, "tried": probe.tried, "images": probe.images, "train": train or data}
                about |= {"protocol": "linear probe", "probe": fitted}
            elif source is not None:
                from bcos_rt.evaluation import zero_shot as classify

                names, texts = _class_texts(source, images, templates)
                found = classify(
                    net, images, texts, pooling or "mean",  # type: ignore[arg-type]
                    power=power, logit_scale=source.logit_scale, batch_size=batch_size, workers=workers,
                    completeness_images=count, tell=tell,
                )  # fmt: skip
                about |= {"protocol": "zero shot", "pooling": pooling or "mean", "power": power, "texts": list(names)}
            else:
                found = measure(
                    net, images, batch_size=batch_size, workers=workers, completeness_images=count, tell=tell
                )
        if output is not None:
            found.save(output, about)
        report = {**about, "results": found.to_dict()}

        def shown() -> list[Any]:
            return [_results(found), *([Text(f"wrote {output}")] if output is not None else [])]

        return Outcome(report, shown)

    run(work, as_json)


def localise(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Tables and pictures.")],
    checkpoints: Checkpoints = None,
    models: Models = None,
    weights: WeightsOfEach = None,
    num_classes: NumClasses = None,
    convert: Convert = False,
    methods: Methods = None,
    split: Split = "val",
    size: Size = None,
    grid: Annotated[int, typer.Option("--grid", min=2, help="Cells on a side.")] = 3,
    grids: Annotated[int, typer.Option("--grids", min=1, help="At most so many grids.")] = 250,
    smooth: Annotated[
        int | None, typer.Option(min=0, help="Window in pixels. Default: 15 at a cell of 224, in proportion.")
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least sigmoid of an image's logit.")] = 0.5,
    variant: Annotated[
        str, typer.Option(metavar="full|rescaled|strided|strided_padded", help="How networks see a grid.")
    ] = "full",
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Of the strided variants: pixels between windows. Default: half an image's side."),
    ] = None,
    same_grids: Annotated[
        bool,
        typer.Option(
            "--same-grids",
            help="The same grids for all, of images that every network classifies right and with confidence. "
            "Default: each network has its own, as published.",
        ),
    ] = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The grid pointing game: does an explanation of a class point at the image of that class?

    Default methods: bcos for B-cos networks, four post-hoc methods for conventional ones.
    """

    def work(progress: Progress) -> Outcome:
        check_writable_place(output, folder=True)
        if stride is not None and not variant.startswith("strided"):
            raise InvalidArgumentError("--stride", f"{stride} with --variant {variant}", "--variant strided")
        with progress.working("loading the networks"):
            place = chosen_device(device)
            from bcos_rt.data import open_data
            from bcos_rt.evaluation import grid_pointing_game
            from bcos_rt.evaluation.grid_pointing import check_variant

            check_variant(variant)
            check_methods(methods)
            networks = compared_networks(models, checkpoints, weights, num_classes, convert, place)
            side = common_side(networks, size)
            if variant == "rescaled" and grid > side:
                expected = f"at most {side}, the pixels of an image's side, for --variant rescaled"
                raise InvalidArgumentError("--grid", grid, expected)
            seen = {"full": grid * side, "rescaled": side // grid * grid}.get(variant, side)
            chosen, left_out = methods_for(networks, methods, ("bcos",), seen)
        warn_left_out(left_out)
        with progress.working(f"looking at {data}"):
            images = numbered_for(networks, open_data(data, size=side, split=split))
        nets = {name: network.net for name, network in networks.items()}
        with progress.bar() as tell:
            found = grid_pointing_game(
                nets, chosen, images, n=grid, grids=grids, smooth=smooth, confidence=confidence,
                variant=variant,  # type: ignore[arg-type]
                stride=stride, same_grids=True if same_grids else None, batch_size=batch_size, workers=workers,
                tell=tell,
            )  # fmt: skip
        found.save(output)
        rows = found.summary()

        def shown() -> list[Any]:
            table = Table("network", "method", "grids", "mean", "25 %", "median", "75 %")
            for row in rows:
                numbers = (f"{row[k]:.3f}" for k in ("mean", "q25", "median", "q75"))
                table.add_row(row["network"], row["method"], str(row["grids"]), *numbers)
            return [table, Text(f"chance is {1 / grid**2:.3f}; tables and pictures are in {output}")]

        about = {"command": "localise", "data": data, "output": str(output), "device": str(place), "results": rows}
        return Outcome({**about, "left_out": left_out}, shown)

    run(work, as_json)


def _results(found: Evaluation) -> Table:
    table = Table("figure", "value")
    table.add_row("images", str(found.images))
    table.add_row("top-1", f"{found.top1:.2%}")
    if found.top5 is not None:
        table.add_row("top-5", f"{found.top5:.2%}")
    table.add_row("negative log-likelihood", f"{found.loss:.4f}")
    table.add_row("calibration error, softmax; sigmoid", f"{found.softmax.error:.4f}; {found.sigmoid.error:.4f}")
    table.add_row(
        "mean confidence, softmax; sigmoid", f"{found.softmax.confidence:.4f}; {found.sigmoid.confidence:.4f}"
    )
    if found.completeness is not None:
        error = found.completeness
        values = "; ".join(f"{v:.1e}" for v in (error.mean, error.median, error.q90, error.q99, error.largest))
        table.add_row(
            "completeness error, mean; median; 90 %; 99 %; largest", f"{values} logits ({error.images} images)"
        )
    return table


def _check_options(
    clip: str | None,
    checkpoint: Path | None,
    zero_shot: bool,
    linear_probe: bool,
    templates: Sequence[str] | None,
    train: str | None,
    pooling: str | None,
    power: float | None,
) -> None:
    """Refuse options of image towers that do not go together, before anything is loaded."""
    if zero_shot and linear_probe:
        raise InvalidArgumentError("--zero-shot, --linear-probe", "both", "one of them")
    if zero_shot and clip is None:
        raise InvalidArgumentError("--zero-shot", "no --clip", "--clip NAME, the CLIP model whose text tower is used")
    if linear_probe and clip is None and checkpoint is None:
        raise InvalidArgumentError("--linear-probe", "no image tower", "--clip NAME, or the --checkpoint of one")
    if clip is not None and not zero_shot and not linear_probe:
        raise InvalidArgumentError("--clip", f"{clip!r} alone", "--zero-shot or --linear-probe beside it")
    for option, given in (("--template", templates), ("--pooling", pooling), ("--power", power)):
        if given and not zero_shot:
            raise InvalidArgumentError(option, "no --zero-shot", "--zero-shot, which it belongs to")
    if train is not None and not linear_probe:
        raise InvalidArgumentError("--train", "no --linear-probe", "--linear-probe, which it belongs to")
    if zero_shot:
        from bcos_rt.graph import TokenPooling

        TokenPooling.of(pooling or "mean", power)


def _check_protocol(net: nn.Module, towers: bool) -> None:
    from bcos_rt.nn.network import BcosNetwork

    if isinstance(net, BcosNetwork) and has_embedding(net) != towers:
        if towers:
            raise InvalidArgumentError("--linear-probe", "a network that returns logits", "an image tower")
        raise InvalidArgumentError("--checkpoint", "an image tower", "--clip and --zero-shot, or --linear-probe")


def _training_images(train: str | None, data: str, side: int, images: ImageData) -> ImageData:
    """The images of ``--train``, or of the split 'train' of ``--data``; not those that are measured."""
    import torch

    from bcos_rt.data import open_data

    found = open_data(data if train is None else train, size=side, split="train")
    if len(found) == 0:
        raise InvalidArgumentError("--train", "no image", "images with labels")
    if len(found) == len(images) and all(torch.equal(found[i][0], images[i][0]) for i in (0, len(images) - 1)):
        # Data without parts is taken whole for every split.
        raise InvalidArgumentError("--train", "the images that are measured", "others, to fit the classifier to")
    from bcos_rt.data import check_numbers

    check_numbers(images.class_names, found.class_names, "--data", "the training data has it")
    return found


def _class_texts(source: ClipModel, images: ImageData, templates: Sequence[str] | None) -> tuple[Sequence[str], Tensor]:
    """The classes as texts, and their embeddings [classes, D]."""
    from bcos_rt.models import imagenet_class_names
    from bcos_rt.models.clip import clip_imagenet_class_names, clip_imagenet_templates

    names: Sequence[str] | None = images.class_names
    if names is None:
        raise InvalidArgumentError("--data", "classes without names", "class folders, whose names --zero-shot reads")
    if tuple(names) == imagenet_class_names() or (len(names) == 1000 and all(WORDNET.fullmatch(n) for n in names)):
        names = clip_imagenet_class_names()
    else:
        names = [name.replace("_", " ") for name in names]
    return names, source.encode_text(names, templates or clip_imagenet_templates())


def _clip_network(
    clip: str,
    checkpoint: Path | None,
    weights: str | None,
    convert: bool,
    model: str | None,
    num_classes: int | None,
) -> tuple[nn.Module, int, dict[str, Any], ClipModel]:
    """An image tower, the side of its images, what to call it, and the CLIP model it belongs to."""
    if convert and checkpoint is not None:
        raise InvalidArgumentError("--convert", "a checkpoint", "a conventional tower to convert")
    network, source = load_clip_network(clip, checkpoint, weights, model=model, num_classes=num_classes)
    if checkpoint is not None or convert:
        return network.net, network.input_size, network.described, source
    return source.image_tower.conventional().eval(), network.input_size, network.described, source

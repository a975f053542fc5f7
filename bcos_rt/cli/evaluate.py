"""``bcos-rt evaluate`` and ``bcos-rt localise``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bcos_rt.cli.inputs import (
    Checkpoint,
    Json,
    Model,
    NumClasses,
    Size,
    Weights,
    check_output,
    check_writable_place,
    load_network,
    load_source,
)
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["evaluate", "localise"]

Data = Annotated[
    str, typer.Option("--data", "-d", metavar="DATA", help="Images: a folder of class folders, tar files, hf:NAME.")
]
Split = Annotated[str, typer.Option(help="Which part of the data, where it has parts.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Convert = Annotated[
    bool, typer.Option("--convert", help="Convert --model to an equivalent B-cos network (B = 1) first.")
]


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
    explained: Annotated[int, typer.Option(min=0, help="Images explained for the completeness error.")] = 256,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.png|FOLDER", help="Draw a reliability diagram; or a folder for all numbers."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy, calibration, and whether explanations add up, on labelled images.

    A --model is evaluated as it is, conventional, or with --convert as a B-cos network; a --checkpoint is one.
    """

    def work(progress: Progress) -> Outcome:
        if output is not None:
            if output.suffix.lower() == ".png" and not output.is_dir():
                check_output(output)
            else:
                check_writable_place(output)
        with progress.working("loading the network"):
            from bcos_rt.data import open_data
            from bcos_rt.evaluation import evaluate as measure
            from bcos_rt.evaluation.accuracy import check_place

            if output is not None:
                check_place(output, "--output")
            net, side, described = _network(model, checkpoint, weights, num_classes, convert)
        with progress.working(f"looking at {data}"):
            images = open_data(data, size=size or side, split=split)
        with progress.bar() as tell:
            found = measure(
                net, images, batch_size=batch_size, workers=workers, completeness_images=explained, tell=tell
            )
        about = {"command": "evaluate", "network": described, "data": data}
        if output is not None:
            found.save(output, about)
        report = {**about, "results": found.to_dict()}

        def shown() -> list[Any]:
            table = Table("figure", "value")
            table.add_row("images", str(found.images))
            table.add_row("top-1", f"{found.top1:.2%}")
            if found.top5 is not None:
                table.add_row("top-5", f"{found.top5:.2%}")
            table.add_row("negative log-likelihood", f"{found.loss:.4f}")
            table.add_row(
                "calibration error, softmax; sigmoid", f"{found.softmax.error:.4f}; {found.sigmoid.error:.4f}"
            )
            table.add_row(
                "mean confidence, softmax; sigmoid", f"{found.softmax.confidence:.4f}; {found.sigmoid.confidence:.4f}"
            )
            if found.completeness is not None:
                error = found.completeness
                values = "; ".join(f"{v:.1e}" for v in (error.mean, error.median, error.q90, error.q99, error.largest))
                table.add_row(
                    "completeness error, mean; median; 90 %; 99 %; largest", f"{values} logits ({error.images} images)"
                )
            return [table, *([Text(f"wrote {output}")] if output is not None else [])]

        return Outcome(report, shown)

    run(work, as_json)


def localise(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Tables and pictures.")],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", "-c", metavar="PATH", help="A saved B-cos network; may be repeated."),
    ] = None,
    model: Model = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    convert: Convert = False,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="An attribution method; may be repeated. Default: bcos for checkpoints, "
            "four post-hoc methods for --model. Networks are measured with those they know.",
        ),
    ] = None,
    split: Split = "val",
    size: Size = None,
    grid: Annotated[int, typer.Option("--grid", min=2, help="Cells on a side.")] = 3,
    grids: Annotated[int, typer.Option("--grids", min=1, help="At most so many grids.")] = 250,
    smooth: Annotated[
        int | None, typer.Option(min=0, help="Window in pixels. Default: 15 at a cell of 224, in proportion.")
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least sigmoid of an image's logit.")] = 0.5,
    variant: Annotated[str, typer.Option(metavar="full|rescaled|strided", help="How networks see a grid.")] = "full",
    same_grids: Annotated[
        bool,
        typer.Option(
            "--same-grids",
            help="The same grids for all, of images that every network classifies right and with confidence. "
            "Default: each network has its own, as published.",
        ),
    ] = False,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """The grid pointing game: does an explanation of a class point at the image of that class?"""

    def work(progress: Progress) -> Outcome:
        check_writable_place(output)
        if model is None and not checkpoints:
            raise InvalidArgumentError("--model, --checkpoint", "neither", "at least one of them")
        if convert and model is None:
            raise InvalidArgumentError("--convert", "no --model", "a conventional model to convert")
        with progress.working("loading the networks"):
            from bcos_rt.data import open_data
            from bcos_rt.evaluation import grid_pointing_game
            from bcos_rt.evaluation.attribution import method
            from bcos_rt.nn.network import BcosNetwork

            for name in methods or ():
                method(name)
            networks: dict[str, nn.Module] = {}
            sides = []
            for path in checkpoints or ():
                name = path.stem if path.stem not in networks else str(path)
                networks[name], side, _ = _network(None, path, None, None)
                sides.append(side)
            if model is not None:
                networks[model], side, _ = _network(model, None, weights, num_classes, convert)
                sides.append(side)
        chosen: dict[str, list[str]] = {}
        for name, net in networks.items():
            if isinstance(net, BcosNetwork):
                chosen[name] = list(methods or ("bcos",))
            else:
                standard = ("input_x_gradient", "integrated_gradients", "guided_backprop", "grad_cam")
                chosen[name] = [entry for entry in methods or standard if entry != "bcos"]
            if not chosen[name]:
                raise InvalidArgumentError("--method", "bcos alone", f"a post-hoc method for {name!r}")
        with progress.working(f"looking at {data}"):
            images = open_data(data, size=size or sides[0], split=split)
        with progress.bar() as tell:
            found = grid_pointing_game(
                networks, chosen, images, n=grid, grids=grids, smooth=smooth, confidence=confidence,
                variant=variant,  # type: ignore[arg-type]
                same_grids=True if same_grids else None, batch_size=batch_size, tell=tell,
            )  # fmt: skip
        found.save(output)
        rows = found.summary()

        def shown() -> list[Any]:
            table = Table("network", "method", "grids", "mean", "25 %", "median", "75 %")
            for row in rows:
                numbers = (f"{row[k]:.3f}" for k in ("mean", "q25", "median", "q75"))
                table.add_row(row["network"], row["method"], str(row["grids"]), *numbers)
            return [table, Text(f"chance is {1 / grid**2:.3f}; tables and pictures are in {output}")]

        return Outcome({"command": "localise", "data": data, "output": str(output), "results": rows}, shown)

    run(work, as_json)


def _network(
    model: str | None, checkpoint: Path | None, weights: str | None, num_classes: int | None, convert: bool = False
) -> tuple[nn.Module, int, dict[str, Any]]:
    """The network, the side of its images, and what to call it: a checkpoint's, or a model's, as it is or converted."""
    if convert and checkpoint is not None:
        raise InvalidArgumentError("--convert", "a checkpoint", "a conventional --model to convert")
    if model is None or checkpoint is not None or convert:
        network = load_network(model, checkpoint, weights, num_classes)
        return network.net, network.input_size, network.described
    source = load_source(model, weights, num_classes)
    described = {"model": model, "weights": weights, "source": source.source}
    return source.conventional().eval(), source.input_size, described

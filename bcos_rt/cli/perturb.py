"""``bcos-rt perturb`` and ``bcos-rt randomise``: do explanations follow what a network looks at and has learned?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bcos_rt.cli.inputs import (
    Checkpoint,
    Device,
    Json,
    Model,
    NumClasses,
    Size,
    Weights,
    check_writable_place,
    chosen_device,
)
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.cli.several import (
    Checkpoints,
    Convert,
    Data,
    Methods,
    Models,
    Split,
    WeightsOfEach,
    check_methods,
    common_side,
    compared_networks,
    methods_for,
    warn_left_out,
)
from bcos_rt.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from bcos_rt.data.image_data import ImageData

__all__ = ["perturb", "randomise"]

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A table, all numbers, a picture.")]


def perturb(
    data: Data,
    output: Output,
    checkpoints: Checkpoints = None,
    models: Models = None,
    weights: WeightsOfEach = None,
    num_classes: NumClasses = None,
    convert: Convert = False,
    methods: Methods = None,
    split: Split = "val",
    size: Size = None,
    images: Annotated[int, typer.Option("--images", min=1, help="At most so many, spread evenly over the data.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Points of a curve after its first.")] = 50,
    deletion: Annotated[
        str, typer.Option(metavar="mean|blur|R,G,B", help="What replaces deleted pixels; a colour is in [0, 1].")
    ] = "mean",
    insertion: Annotated[str, typer.Option(metavar="blur|mean|R,G,B", help="What pixels are inserted into.")] = "blur",
    score: Annotated[str, typer.Option(metavar="softmax|sigmoid|logit", help="Of the top class.")] = "softmax",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images explained at a time.")] = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Insertion and deletion: does the top class's score follow the pixels that an explanation says matter most?

    The area under a deletion curve should be small, under an insertion curve large. Labels are not used. Default
    methods: bcos for B-cos networks, four post-hoc methods for conventional ones, and random, the floor.
    """

    def work(progress: Progress) -> Outcome:
        check_writable_place(output, folder=True)
        with progress.working("loading the networks"):
            place = chosen_device(device)
            from bcos_rt.data import open_data
            from bcos_rt.evaluation import Perturbation, insertion_deletion

            options = Perturbation(
                steps=steps,
                deletion=_fill("--deletion", deletion),
                insertion=_fill("--insertion", insertion),
                score=score,  # type: ignore[arg-type]
            )
            check_methods(methods)
            networks = compared_networks(models, checkpoints, weights, num_classes, convert, place)
            side = common_side(networks, size)
            chosen, left_out = methods_for(networks, methods, ("bcos", "random"), side)
        warn_left_out(left_out)
        with progress.working(f"looking at {data}"):
            source = open_data(data, size=side, split=split)
        nets = {name: network.net for name, network in networks.items()}
        with progress.bar() as tell:
            found = insertion_deletion(
                nets, chosen, source, images=images, options=options, batch_size=batch_size, tell=tell
            )
        found.save(output)
        rows = found.summary()
        about = {"command": "perturb", "data": data, "output": str(output), "device": str(place), "results": rows}

        def shown() -> list[Any]:
            table = Table("network", "method", "images", "deletion", "insertion")
            for row in rows:
                areas = (_with_error(row[kind], row[f"{kind}_error"]) for kind in ("deletion", "insertion"))
                table.add_row(row["network"], row["method"], str(row["images"]), *areas)
            told = "areas under curves: of deletion small is good, of insertion large; compare methods on one network"
            return [table, Text(f"{told}; tables and pictures are in {output}")]

        return Outcome({**about, "left_out": left_out}, shown)

    run(work, as_json)


def randomise(
    data: Data,
    output: Output,
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    convert: Convert = False,
    methods: Methods = None,
    split: Split = "val",
    size: Size = None,
    images: Annotated[int, typer.Option("--images", min=1, help="At most so many, spread evenly over the data.")] = 16,
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage", metavar="MODULE", help="What is randomised, from head to stem; may be repeated. Default: all."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random parameters.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Randomised parameters: does an explanation change when the network forgets what it has learned?

    Parameters are replaced by random ones from the head to the stem, and maps of the top class compared with the
    trained network's by rank correlation, which should fall to 0. Labels are not used. Default methods: bcos, the
    gradient times the input and guided backpropagation for B-cos networks, four post-hoc methods for conventional ones.
    """

    def work(progress: Progress) -> Outcome:
        check_writable_place(output, folder=True)
        if model is not None and checkpoint is not None:
            raise InvalidArgumentError("--model, --checkpoint", "both", "one of them")
        with progress.working("loading the network"):
            place = chosen_device(device)
            from bcos_rt.data import open_data
            from bcos_rt.evaluation import parameter_randomisation

            check_methods(methods)
            networks = compared_networks(
                [model] if model is not None else None,
                [checkpoint] if checkpoint is not None else None,
                [weights] if weights is not None else None,
                num_classes,
                convert,
                place,
            )
            ((name, network),) = networks.items()
            side = common_side(networks, size)
            chosen, left_out = methods_for(networks, methods, ("bcos", "input_x_gradient", "guided_backprop"), side)
        warn_left_out(left_out)
        with progress.working(f"looking at {data}"):
            pixels = _some(open_data(data, size=side, split=split), images)
        from bcos_rt.evaluation.checks import example_tensor

        like = example_tensor(network.net)
        with progress.bar() as tell:
            found = parameter_randomisation(
                network.net, chosen[name], pixels.to(like.device, like.dtype), stages=stages, seed=seed, tell=tell
            )
        found.save(output)
        rows = found.summary()
        about = {
            "command": "randomise", "network": network.described, "data": data, "output": str(output),
            "device": str(place), "results": rows,
        }  # fmt: skip

        def shown() -> list[Any]:
            table = Table("randomised down to", *chosen[name])
            for stage in found.stages:
                values = (row["correlation"] for row in rows if row["stage"] == stage)
                table.add_row(stage, *(f"{value:.3f}" for value in values))
            told = f"rank correlations with the trained network's maps, means of {len(pixels)} images"
            return [table, Text(f"{told}; tables and pictures are in {output}")]

        return Outcome({**about, "left_out": left_out}, shown)

    run(work, as_json)


def _fill(option: str, text: str) -> Any:
    """``mean``, ``blur`` or a colour."""
    if text in ("mean", "blur"):
        return text
    try:
        colour = tuple(float(part) for part in text.split(","))
    except ValueError:
        colour = ()
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise InvalidArgumentError(option, repr(text), "'mean', 'blur' or R,G,B, three numbers in [0, 1]")
    return colour


def _some(source: ImageData, images: int) -> Tensor:
    """So many images, spread evenly over the data, [N, 3, S, S]."""
    import torch

    if len(source) == 0:
        raise InvalidArgumentError("--data", "no image", "images")
    count = min(images, len(source))
    return torch.stack([source[i * len(source) // count][0] for i in range(count)])


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"

"""``bcos-rt convert``: a pretrained model becomes a saved B-cos network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from bcos_rt.cli.inputs import (
    Json,
    NumClasses,
    Size,
    Weights,
    check_photos,
    check_writable_place,
    convert_source,
    load_photos,
    load_source,
    read_recipe_file,
)
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.errors import BcosError, InvalidArgumentError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from bcos_rt.conversion import Recipe

__all__ = ["convert", "named_recipe"]

# Largest relative logit error at which a B = 1 conversion counts as the same function.
EQUIVALENCE_TOLERANCE = 1e-4
_FIELDS = "Recipe fields (each overrides what --recipe says)"


def convert(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Where to save: a .safetensors file, or a directory's name."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="torchvision:NAME, timm:NAME, hf:NAME, open_clip:NAME, simple_vit:NAME or efficientnet-lite0.",
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="Photos to verify the conversion on.", show_default=False),
    ] = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            metavar="default|clip|equivalent|FILE.json",
            help="'default' is the published CNN recipe, 'clip' that of CLIP's image towers; 'equivalent' keeps the "
            "function as it is (B = 1).",
        ),
    ] = "default",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare with the source model, on the photos given or on made-up ones. Default: where the recipe "
            "promises the same function, and when photos are given.",
            show_default=False,
        ),
    ] = None,
    size: Size = None,
    b: Annotated[float | None, typer.Option("-b", "--b", help="Exponent B >= 1.", rich_help_panel=_FIELDS)] = None,
    input_encoding: Annotated[
        str | None,
        typer.Option(metavar="six_channel|three_channel", help=r"Feed \[x, 1 - x], or x.", rich_help_panel=_FIELDS),
    ] = None,
    input_normalization: Annotated[
        str | None,
        typer.Option(
            metavar="source|none",
            help=r"Normalise \[x, 1 - x] like the source's input, or not at all.",
            rich_help_panel=_FIELDS,
        ),
    ] = None,
    weight_norm: Annotated[
        str | None, typer.Option(metavar="none|unit", help="Scale of the filters.", rich_help_panel=_FIELDS)
    ] = None,
    biases: Annotated[
        str | None, typer.Option(metavar="drop|keep", help="Biases of layers and norms.", rich_help_panel=_FIELDS)
    ] = None,
    batch_norm: Annotated[
        str | None,
        typer.Option(metavar="uncentered|uncentered_folded|keep", help="BatchNorm.", rich_help_panel=_FIELDS),
    ] = None,
    activations: Annotated[
        str | None, typer.Option(metavar="keep|identity", help="ReLU and relatives.", rich_help_panel=_FIELDS)
    ] = None,
    stem_pool: Annotated[
        str | None, typer.Option(metavar="average|keep", help="The stem's max-pool.", rich_help_panel=_FIELDS)
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="before_pool|after_pool", help="Where the classifier stands.", rich_help_panel=_FIELDS),
    ] = None,
    logit_bias: Annotated[
        str | None,
        typer.Option(metavar="auto|none|NUMBER", help="'auto' is -log(classes - 1).", rich_help_panel=_FIELDS),
    ] = None,
    logit_temperature: Annotated[
        str | None, typer.Option(metavar="none|NUMBER", help="Divides the logits.", rich_help_panel=_FIELDS)
    ] = None,
    gates: Annotated[
        str | None,
        typer.Option(metavar="keep|convert", help="Squeeze-and-excite branches.", rich_help_panel=_FIELDS),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Module names to leave alone, e.g. 'layer1.*'.", rich_help_panel=_FIELDS),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Normalisation of the source.", rich_help_panel=_FIELDS)
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Normalisation of the source.", rich_help_panel=_FIELDS)
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a pretrained model into a B-cos network and save it.

    What was replaced, what was kept and why is printed as a table.
    """
    texts = {
        "b": b,
        "input_encoding": input_encoding,
        "input_normalization": input_normalization,
        "weight_norm": weight_norm,
        "biases": biases,
        "batch_norm": batch_norm,
        "activations": activations,
        "stem_pool": stem_pool,
        "head": head,
        "logit_bias": _number_or_word("--logit-bias", logit_bias, "auto"),
        "logit_temperature": _number_or_word("--logit-temperature", logit_temperature),
        "gates": gates,
        "keep": tuple(keep) if keep else None,
        "mean": _triple("--mean", mean),
        "std": _triple("--std", std),
    }
    changes = {name: value for name, value in texts.items() if value is not None}
    for name, given in (("logit_bias", logit_bias), ("logit_temperature", logit_temperature)):
        if given is not None:
            changes[name] = texts[name]
    photos = images or []
    if verify is False and photos:
        raise InvalidArgumentError("--no-verify", f"beside {str(photos[0])!r}", "no photographs: they are to verify on")

    def work(progress: Progress) -> Outcome:
        check_writable_place(output)
        check_photos(photos)
        with progress.working("loading PyTorch"):
            chosen = named_recipe(recipe).replace(**changes)
            from bcos_rt.checkpoint import save
        with progress.working(f"loading {model}"):
            source = load_source(model, weights, num_classes)
        promised = _promises_equivalence(chosen)
        check = verify if verify is not None else promised or bool(photos)
        side = size or source.input_size
        batch = _verification_images(photos, side) if check else None
        with progress.working("converting" + (" and verifying" if check else "")):
            net, report = convert_source(source, chosen, batch)
        if promised and report.equivalence is not None and not report.equivalence.within(EQUIVALENCE_TOLERANCE):
            raise BcosError(
                f"the converted network is not equivalent to its source, nothing was saved; {report.equivalence}. "
                "--no-verify saves it all the same."
            )
        with progress.working("saving"):
            saved = save(net, output)
        data = {
            "command": "convert",
            "output": str(saved),
            "model": model,
            "source": source.source,
            "recipe": net.recipe.to_dict(),
            "verified_on": None if batch is None else [str(p) for p in photos] or "made-up images",
            "report": report.to_dict(),
        }
        return Outcome(data, lambda: [report, Text(f"saved {saved}", style="bold")])

    run(work, as_json)


def named_recipe(
    text: str, option: str = "--recipe", names: Sequence[str] = ("default", "clip", "equivalent")
) -> Recipe:
    """The recipe behind an option that takes one of ``names`` or a file; of ``clip`` mean and std are the model's own.

    Raises:
        InvalidArgumentError: something else; the option is named.
    """
    from bcos_rt.conversion import Recipe

    if text not in names and not Path(text).is_file():
        expected = f"{', '.join(map(repr, names))} or an existing JSON file"
        raise InvalidArgumentError(option, repr(text), expected, did_you_mean(text, names))
    if text == "default":
        return Recipe()
    if text == "equivalent":
        return Recipe.equivalent()
    if text == "clip":
        return Recipe.clip(mean=None, std=None)
    return Recipe.from_dict(read_recipe_file(text))


def _promises_equivalence(recipe: Recipe) -> bool:
    """Whether a network converted by this recipe must compute what its source computes."""
    return (
        recipe.b == 1
        and recipe.weight_norm == "none"
        and recipe.biases == "keep"
        and recipe.batch_norm != "uncentered"
        and recipe.activations == "keep"
        and recipe.stem_pool == "keep"
        and recipe.logit_bias is None
        and recipe.logit_temperature is None
    )


def _verification_images(photos: list[Path], size: int) -> Tensor:
    """The photos as one batch, or four made-up ones: smooth random colours with a little noise."""
    import torch
    import torch.nn.functional as F

    if photos:
        return load_photos(photos, size)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 8, 8, generator=generator)
    noise = torch.rand(4, 3, size, size, generator=generator)
    return (0.8 * F.interpolate(coarse, (size, size), mode="bilinear") + 0.2 * noise).clamp(0, 1)


def _number_or_word(option: str, text: str | None, *words: str) -> Any:
    """``none`` as None, one of ``words`` as itself, else a number."""
    if text is None or text == "none":
        return None
    if text in words:
        return text
    try:
        return float(text)
    except ValueError:
        expected = " or ".join(["a number", "'none'", *map(repr, words)])
        raise InvalidArgumentError(option, repr(text), expected, did_you_mean(text, ["none", *words])) from None


def _triple(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidArgumentError(option, repr(text), "three numbers, e.g. 0.485,0.456,0.406") from None

"""``bcos-rt explain``: pictures of what in a photo speaks for a class, or for a text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bcos_rt.cli.inputs import (
    Checkpoint,
    Clip,
    Json,
    Model,
    NumClasses,
    Pooling,
    Power,
    Size,
    Weights,
    check_output,
    check_photos,
    find_class,
    has_embedding,
    load_clip_network,
    load_network,
)
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.errors import InvalidArgumentError

if TYPE_CHECKING:
    from bcos_rt.explanation import Explanation

__all__ = ["explain"]

SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".npz")


def explain(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Image files.", show_default=False)],
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    class_: Annotated[
        str | None,
        typer.Option(
            "--class",
            "-k",
            metavar="NAME|INDEX",
            help="The class to explain: an index, a name or a part of one. Default: the predicted class.",
        ),
    ] = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="Explain the K most probable classes.")] = None,
    clip: Clip = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", metavar="TEXT", help="A text to explain with --clip; repeatable."),
    ] = None,
    pooling: Pooling = None,
    power: Power = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A file (.png, .svg, .pdf, .jpg; .npz for the numbers); for several photos a directory, or a name "
            "with {name} in it, which stands for the photo's.",
        ),
    ] = "{name}_explanation.png",
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Explain what a network sees in photos, exactly.

    A conventional --model is first converted to an equivalent B-cos network (B = 1): what comes out is its initial
    explanation. A converted and fine-tuned network is given with --checkpoint. With --clip and --text it is explained
    what speaks for a text; the image tower may be a --checkpoint.
    """

    def work(progress: Progress) -> Outcome:
        if clip is not None or texts:
            for option, given in (("--class", class_), ("--top", top)):
                if given is not None:
                    raise InvalidArgumentError(
                        option, f"{given!r} with --clip or --text", "no class: texts are explained"
                    )
            return _explain_texts(
                progress, photos, clip, texts or [], pooling, power, checkpoint, weights, size, output,
                model=model, num_classes=num_classes,
            )  # fmt: skip
        for option, value in (("--pooling", pooling), ("--power", power)):
            if value is not None:
                raise InvalidArgumentError(option, f"{value!r} without --clip", "--clip NAME and --text TEXT beside it")
        if class_ is not None and top is not None:
            raise InvalidArgumentError("--class, --top", "both", "one of them")
        check_photos(photos)
        paths = plan_outputs(photos, output)
        for path in paths:
            check_output(path, SUFFIXES)
        with progress.working("loading the network"):
            import torch

            from bcos_rt.explanation import explain as explain_images
            from bcos_rt.images import load_image

            network = load_network(model, checkpoint, weights, num_classes)
        net = network.net
        if has_embedding(net):
            expected = "--clip NAME and --text TEXT beside it"
            raise InvalidArgumentError("--checkpoint", f"{str(checkpoint or model)!r}, an image tower", expected)
        side = size or network.input_size
        images = [load_image(photo, side) for photo in photos]
        # One forward pass says how many classes there are, so that a wrong class fails before the slow capture.
        with progress.working("predicting"), torch.no_grad():
            logits = torch.cat([net(image[None]) for image in images])
        classes = logits.shape[1]
        names = net.class_names if net.class_names is not None and len(net.class_names) == classes else None
        targets: Any = None
        if class_ is not None:
            targets = find_class(class_, names, classes)
        if top is not None:
            if top > classes:
                raise InvalidArgumentError("--top", top, f"at most {classes}, the number of classes")
            targets = logits.topk(top, dim=1).indices
        results = []
        label = "explanation"
        for i, image in enumerate(progress.track(images, "explaining")):
            each = targets[i : i + 1] if isinstance(targets, torch.Tensor) else targets
            explanation = explain_images(net, image[None], each)
            explanation.save(paths[i])
            label = explanation.label
            results.append({"photo": str(photos[i]), "output": str(paths[i]), **_numbers(explanation)})
        data = {"command": "explain", "network": network.described, "size": side, "label": label, "images": results}
        return Outcome(data, lambda: [_table(results), *_remarks(network.converted, label, paths)])

    run(work, as_json)


def _explain_texts(
    progress: Progress,
    photos: Sequence[Path],
    clip: str | None,
    texts: list[str],
    pooling: str | None,
    power: float | None,
    checkpoint: Path | None,
    weights: str | None,
    size: int | None,
    output: str,
    *,
    model: str | None,
    num_classes: int | None,
) -> Outcome:
    """What in each photo speaks for each text."""
    if clip is None:
        raise InvalidArgumentError("--text", "no --clip", "--clip NAME, the CLIP model whose text tower reads it")
    if not texts:
        raise InvalidArgumentError("--clip", "no --text", "at least one text to explain")
    check_photos(photos)
    paths = plan_outputs(photos, output)
    for path in paths:
        check_output(path, SUFFIXES)
    with progress.working("loading the network"):
        import torch

        from bcos_rt.explanation.text import explain_text
        from bcos_rt.graph import TokenPooling
        from bcos_rt.images import load_image

        how = TokenPooling.of(pooling or "mean", power)
        network, source = load_clip_network(clip, checkpoint, weights, model=model, num_classes=num_classes)
        side = size or network.input_size
        images = [load_image(photo, side) for photo in photos]
    with progress.working("encoding texts and photos"), torch.no_grad():
        embeddings = source.encode_text(texts)
        width = network.net(images[0][None]).shape[1]
    if width != source.width:
        got = f"an image tower with embeddings of {width} numbers"
        raise InvalidArgumentError("--checkpoint", got, f"{source.width}, as the texts of {source.name}")
    results = []
    label = "explanation"
    for i, image in enumerate(progress.track(images, "explaining")):
        explanation = explain_text(network.net, image[None], embeddings, how.kind, power=power, prompts=texts)
        explanation.save(paths[i])
        label = explanation.label
        results.append({"photo": str(photos[i]), "output": str(paths[i]), "texts": _text_numbers(explanation, texts)})
    data = {
        "command": "explain", "network": network.described, "size": side, "label": label, "pooling": how.kind,
        "power": power, "images": results,
    }  # fmt: skip
    said = (
        "score: the cosine of an image's places with the text, pooled; error: |sum(contributions) + residual - score|"
    )
    return Outcome(data, lambda: [_text_table(results), *_remarks(network.converted, label, paths, said)])


def plan_outputs(photos: Sequence[Path], output: str) -> list[Path]:
    """One output path per photo, all different; a directory is made where one is asked for.

    Raises:
        InvalidArgumentError: several photos for one file, or an output that would overwrite a photo.
    """
    if "{name}" in output:
        pattern = output
    elif output.endswith(("/", os.sep)) or Path(output).is_dir() or (len(photos) > 1 and not Path(output).suffix):
        try:
            Path(output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError("--output", f"{output!r} ({error.strerror})", "a writable directory") from error
        pattern = os.path.join(output, "{name}.png")
    elif len(photos) > 1:
        raise InvalidArgumentError(
            "--output", f"{output!r} for {len(photos)} photos", "a directory, or a name with {name} in it"
        )
    else:
        pattern = output
    paths: list[Path] = []
    for photo in photos:
        path, count = Path(pattern.replace("{name}", photo.stem)), 1
        while path in paths:
            count += 1
            path = Path(pattern.replace("{name}", f"{photo.stem}-{count}"))
        paths.append(path)
    originals = {photo.resolve() for photo in photos}
    for path in paths:
        if path.resolve() in originals:
            raise InvalidArgumentError("--output", f"{str(path)!r}, one of the photos", "another name")
    return paths


def _numbers(explanation: Explanation) -> dict[str, Any]:
    """What is said of one photo: the prediction, and for every class explained its logit and what adds up to it."""
    logits = explanation.logits[0].double()
    probabilities = logits.softmax(0)

    def described(index: int) -> dict[str, Any]:
        name = explanation.class_names[index] if explanation.class_names is not None else None
        return {
            "index": index,
            "name": name,
            "logit": float(logits[index]),
            "probability": float(probabilities[index]),
        }

    totals = explanation.contributions[0].double().sum((-2, -1)).reshape(-1).tolist()
    residuals = explanation.residual[0].reshape(-1).tolist()
    errors = explanation.completeness_error()[0].reshape(-1).tolist()
    indices = explanation.target[0].reshape(-1).tolist()
    rows = zip(indices, totals, residuals, errors, strict=True)
    return {
        "predicted": described(int(logits.argmax())),
        "classes": [
            {**described(index), "contributions_sum": total, "residual": residual, "completeness_error": error}
            for index, total, residual, error in rows
        ],
    }


def _text_numbers(explanation: Explanation, texts: Sequence[str]) -> list[dict[str, Any]]:
    """What is said of one photo: for every text its score and what adds up to it."""
    columns = (
        explanation.logits[0],
        explanation.contributions[0].double().sum((-2, -1)),
        explanation.residual[0],
        explanation.completeness_error()[0],
    )
    names = ("score", "contributions_sum", "residual", "completeness_error")
    rows = zip(texts, *(column.double().tolist() for column in columns), strict=True)
    return [{"prompt": text, **dict(zip(names, numbers, strict=True))} for text, *numbers in rows]


def _text_table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for column in ("photo", "text"):
        table.add_column(column, overflow="fold")
    for column in ("score", "from pixels", "residual", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        for i, entry in enumerate(result["texts"]):
            table.add_row(
                Text(Path(result["photo"]).name if i == 0 else ""),
                Text(entry["prompt"]),
                *(f"{entry[name]:.4f}" for name in ("score", "contributions_sum", "residual")),
                f"{entry['completeness_error']:.1e}",
            )
    return table


def _table(results: Sequence[dict[str, Any]]) -> Table:
    """Narrow enough for 80 columns, so without folders and outputs; those are listed below it."""
    table = Table()
    for column in ("photo", "predicted", "explained"):
        table.add_column(column, overflow="fold")
    for column in ("probability", "logit", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        for i, entry in enumerate(result["classes"]):
            first = i == 0
            table.add_row(
                Text(Path(result["photo"]).name if first else ""),
                Text(_title(result["predicted"]) if first else ""),
                Text(_title(entry)),
                f"{entry['probability']:.1%}",
                f"{entry['logit']:.4f}",
                f"{entry['completeness_error']:.1e}",
            )
    return table


def _title(entry: dict[str, Any]) -> str:
    return f"{entry['name']} ({entry['index']})" if entry["name"] is not None else f"class {entry['index']}"


_SAID = "probability: softmax of the logits; error: |sum(contributions) + residual - logit|, the completeness error"


def _remarks(converted: bool, label: str, paths: Sequence[Path], said: str = _SAID) -> list[Text]:
    remarks = [said]
    if converted:
        remarks.append(
            f"This is the {label}: of the model as it is, converted to an equivalent B-cos network (B = 1) that was "
            "not fine-tuned."
        )
    elif label != "explanation":
        remarks.append(f"This is the {label}: the network has B = 1.")
    return [Text(remark) for remark in (*remarks, *(f"wrote {path}" for path in paths))]

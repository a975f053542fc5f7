"""``bcos-rt export``: prediction and explanation as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
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
    load_clip_network,
    load_network,
    load_photos,
)
from bcos_rt.cli.output import Outcome, Progress, run
from bcos_rt.errors import InvalidArgumentError

__all__ = ["export"]


def export(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="Photos to verify on, besides random images.", show_default=False),
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    clip: Clip = None,
    pooling: Pooling = None,
    power: Power = None,
    size: Size = None,
    multi: Annotated[
        bool,
        typer.Option(
            "--multi", help="Several classes (or texts) of each image at one forward pass: class_ids is [N, K]."
        ),
    ] = False,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Logits only, no explanation.")] = False,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help="An output to keep, e.g. contributions; may be repeated. Default: all.",
        ),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="16-bit weights and activations; norms and sums stay 32-bit.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the file in onnxruntime and compare with PyTorch.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write prediction and explanation as one ONNX file.

    A conventional --model is first converted to an equivalent B-cos network (B = 1). The file of an image tower, that
    of --clip or a checkpoint, explains the texts whose embeddings it is given.
    """
    photos = images or []

    def work(progress: Progress) -> Outcome:
        check_output(output, (".onnx",))
        check_photos(photos)
        with progress.working("loading the network"):
            from bcos_rt.export import to_onnx

            if clip is None:
                network = load_network(model, checkpoint, weights, num_classes)
            elif checkpoint is not None:
                expected = "one of them: a checkpoint is exported without the text tower"
                raise InvalidArgumentError("--clip, --checkpoint", "both", expected)
            else:
                network, _ = load_clip_network(clip, None, weights, model=model, num_classes=num_classes)
        side = size or network.input_size
        batch = load_photos(photos, side) if photos else None
        with progress.working("exporting" + (" and verifying" if verify else "")):
            report = to_onnx(
                network.net,
                output,
                side,
                multi=multi,
                pooling=pooling,  # type: ignore[arg-type]
                power=power,
                outputs=outputs,
                forward_only=forward_only,
                precision="fp16" if fp16 else "fp32",
                verify=verify,
                verify_images=batch,
            )
        data = {"command": "export", "network": network.described, "output": str(output), "report": report.to_dict()}
        return Outcome(data, lambda: [report, Text(f"wrote {output}")])

    run(work, as_json)

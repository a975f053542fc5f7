"""``bcos-rt export``: prediction and explanation as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bcos_rt.cli.inputs import (
    Checkpoint,
    Json,
    Model,
    NumClasses,
    Size,
    Weights,
    check_output,
    check_photos,
    load_network,
    load_photos,
)
from bcos_rt.cli.output import Outcome, Progress, run

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
    size: Size = None,
    multi: Annotated[
        bool, typer.Option("--multi", help="class_ids is [N, K]: several classes of each image at one forward pass.")
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

    A conventional --model is first converted to an equivalent B-cos network (B = 1).
    """
    photos = images or []

    def work(progress: Progress) -> Outcome:
        check_output(output, (".onnx",))
        check_photos(photos)
        with progress.working("loading the network"):
            from bcos_rt.export import to_onnx

            network = load_network(model, checkpoint, weights, num_classes)
        side = size or network.input_size
        batch = load_photos(photos, side) if photos else None
        with progress.working("exporting" + (" and verifying" if verify else "")):
            report = to_onnx(
                network.net,
                output,
                side,
                multi=multi,
                outputs=outputs,
                forward_only=forward_only,
                precision="fp16" if fp16 else "fp32",
                verify=verify,
                verify_images=batch,
            )
        data = {"command": "export", "network": network.described, "output": str(output), "report": report.to_dict()}
        return Outcome(data, lambda: [report, Text(f"wrote {output}")])

    run(work, as_json)

"""``bcos-rt export``: prediction and explanation as one ONNX file."""

from __future__ import annotations

import os
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
    load_network,
)
from bcos_rt.cli.output import Outcome, Progress, run

__all__ = ["export"]


def export(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
    size: Size = None,
    multi: Annotated[
        bool, typer.Option("--multi", help="class_ids is [N, K]: several classes of each image at one forward pass.")
    ] = False,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Logits only, no explanation.")] = False,
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

    def work(progress: Progress) -> Outcome:
        check_output(output, (".onnx",))
        with progress.working("loading the network"):
            from bcos_rt.export import to_onnx

            network = load_network(model, checkpoint, weights, num_classes)
        side = size or network.input_size
        with progress.working("exporting" + (" and verifying" if verify else "")):
            report = to_onnx(
                network.net, output, image_size=side, multi=multi, forward_only=forward_only, fp16=fp16, verify=verify
            )
        data = {
            "command": "export",
            "network": network.described,
            "output": str(output),
            "bytes": os.path.getsize(output),
            "size": side,
        }
        return Outcome(data, lambda: [Text(str(report))])

    run(work, as_json)

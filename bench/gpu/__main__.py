"""``python -m bench.gpu``: see the package's description."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from bcos_rt.errors import InvalidArgumentError
from bench.gpu.options import EXIT_NO_GPU, MODELS, MODES, STAGES, Options

RESULTS = Path(__file__).resolve().parents[1] / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def main(
    stage: Annotated[list[str] | None, typer.Option(help=f"Only this stage; repeatable. {', '.join(STAGES)}.")] = None,
    minutes: Annotated[float, typer.Option(help="Time for everything; the benchmark takes what is left of it.")] = 8.0,
    output: Annotated[
        Path | None, typer.Option(help="Folder in which the GPU's folder is made. [default: bench/results]")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Networks. [default: {' '.join(MODELS)}]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32; repeatable. [default: bf16]")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MODES)}; repeatable. [default: all]")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Only this contender; repeatable.")] = None,
    batch: Annotated[int, typer.Option(help="Images.")] = 32,
    size: Annotated[int, typer.Option(help="Side of an image in pixels.")] = 224,
    onnx_python: Annotated[
        str, typer.Option(help="A Python with onnxruntime-gpu, which cannot live beside onnxruntime.")
    ] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is in the folder already.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether there is a GPU (exit code 3: none).")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Go through everything on the CPU at toy sizes, measuring nothing (--output)."),
    ] = False,
) -> None:
    """Check and measure everything on a GPU. Exit codes: 0 fine, 1 something failed, 2 wrong arguments, 3 no GPU."""
    if dry_run:
        # Read when a kernel is decorated: before anything imports one.
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.gpu.environment import folder_name, no_gpu

    missing = no_gpu()
    if check:
        typer.echo(f"no GPU: {missing}" if missing else f"GPU: {folder_name()}")
        raise typer.Exit(EXIT_NO_GPU if missing else 0)
    if missing and not dry_run:
        typer.echo(
            f"no GPU: {missing}. Nothing was run and nothing was written. "
            "`python -m bench.gpu --dry-run --output FOLDER` goes through the program without one.",
            err=True,
        )
        raise typer.Exit(EXIT_NO_GPU)
    from bench.gpu.program import in_subprocess, run

    if dry_run and output is None:
        raise typer.BadParameter("a dry run needs a folder of its own", param_hint="--output")
    folder = (output or RESULTS) / ("dry-run" if dry_run else folder_name())
    try:
        options = Options(
            folder=folder.resolve(),
            stages=tuple(stage) if stage else STAGES,
            minutes=minutes,
            models=tuple(model) if model else MODELS,
            # The interpreter computes bf16 wrongly (the tests repair it, this does not).
            dtypes=tuple(dtype) if dtype else (("fp32",) if dry_run else ("bf16",)),
            modes=tuple(mode) if mode else MODES,
            contenders=tuple(contender or ()),
            batch=batch,
            size=size,
            onnx_python=shutil.which(onnx_python) or onnx_python,
            dry_run=dry_run,
            resume=not fresh,
        )
    except InvalidArgumentError as error:
        raise typer.BadParameter(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    raise typer.Exit(run(options, in_subprocess))


if __name__ == "__main__":
    app()

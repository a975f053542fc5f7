"""The typer application: one command per module."""

from __future__ import annotations

from typing import Annotated

import typer

from bcos_rt.cli.bench import bench
from bcos_rt.cli.convert import convert
from bcos_rt.cli.doctor import doctor
from bcos_rt.cli.evaluate import evaluate, localise
from bcos_rt.cli.explain import explain
from bcos_rt.cli.export import export
from bcos_rt.cli.output import Command, CommandGroup
from bcos_rt.cli.perturb import perturb, randomise
from bcos_rt.cli.train import finetune, train

__all__ = ["app", "main"]

app = typer.Typer(
    name="bcos-rt",
    cls=CommandGroup,
    help="Networks that explain themselves, exactly: convert pretrained vision models, explain photos, write ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from bcos_rt import __version__

        typer.echo(f"bcos-rt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


for _command in (convert, explain, finetune, train, evaluate, localise, perturb, randomise, export, doctor):
    app.command(cls=Command)(_command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of ``bcos-rt`` and ``python -m bcos_rt``; ends the process."""
    app(prog_name="bcos-rt")

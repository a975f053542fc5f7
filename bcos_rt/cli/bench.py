"""``bcos-rt bench``: how long networks and single ops take on this machine."""

from __future__ import annotations

from typing import Any

import typer
import typer.core

from bcos_rt.cli.bench_kernels import kernels
from bcos_rt.cli.bench_network import network
from bcos_rt.cli.output import Command

__all__ = ["bench"]

# The command that is meant where none is named: `bcos-rt bench resnet18` is `bcos-rt bench network resnet18`.
DEFAULT_COMMAND = "network"


class _DefaultGroup(typer.core.TyperGroup):
    """A group in which the first word may also be an argument or option of the default command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command's name in front of a command line that names none and asks for no help."""
        if not args or not (args[0] in self.commands or args[0] in ctx.help_option_names):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=_DefaultGroup,
    help=f"Measure on this machine; without a command, `{DEFAULT_COMMAND}` is meant.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench.callback()
def _options() -> None:
    """Measure on this machine."""


bench.command(DEFAULT_COMMAND, cls=Command)(network)
bench.command("kernels", cls=Command)(kernels)

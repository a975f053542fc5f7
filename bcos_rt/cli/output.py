"""What a command says: results on stdout, everything else on stderr, one exit code for each kind of ending.

=====  ==============================================================
code   meaning
=====  ==============================================================
0      done
1      a bug or a failing machine; the traceback is on stderr. Or a comparison that was asked for found something slower
2      bad input: a wrong option, file, name or class
130    interrupted (Ctrl-C)
=====  ==============================================================
"""

from __future__ import annotations

import json
import math
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

import typer.core
from rich.console import Console, RenderableType
from rich.text import Text

from bcos_rt.errors import BcosError, InvalidArgumentError

__all__ = ["Command", "CommandGroup", "Outcome", "Progress", "run"]

# Lines of a table are not folded for a reader that is no terminal; it may be a file or another program.
PIPE_WIDTH = 160


@dataclass(frozen=True)
class Outcome:
    """A command's result in both forms.

    Attributes:
        data: JSON-ready, what ``--json`` prints.
        shown: makes what is printed otherwise.
    """

    data: Mapping[str, Any]
    shown: Callable[[], Sequence[RenderableType]]


class Progress:
    """Tells a waiting person what is going on, on stderr and only when that is a terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A spinner with ``text`` while the block runs."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(Text(text)):
            yield

    @contextmanager
    def bar(self) -> Iterator[Callable[[str, int, int], None]]:
        """A progress bar; the block calls what it is given with a text, steps done and steps in all."""
        if not self.console.is_terminal:
            yield lambda _text, _done, _total: None
            return
        from rich.progress import Progress as Bar

        with Bar(console=self.console, transient=True) as shown:
            task = shown.add_task("")
            yield lambda text, done, total: shown.update(task, description=text, completed=done, total=total)

    def track(self, items: Sequence[Any], text: str) -> Iterator[Any]:
        """Iterate with a progress bar; a single item gets a spinner."""
        if not self.console.is_terminal:
            yield from items
        elif len(items) == 1:
            with self.working(text):
                yield items[0]
        else:
            from rich.progress import track

            yield from track(items, description=text, console=self.console, transient=True)


def run(work: Callable[[Progress], Outcome], as_json: bool) -> None:
    """Do a command's work and print its outcome; stdout carries nothing else, whatever a library prints.

    Warnings go to stderr, one line each, and with ``as_json`` into the object's ``"warnings"`` too.
    """
    stdout = sys.stdout
    said: list[str] = []
    with redirect_stdout(sys.stderr), _plain_warnings(said):
        outcome = work(Progress())
    if as_json:
        print_json({**outcome.data, "warnings": said}, stdout)
        return
    console = Console(file=stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=stdout, highlight=False, width=PIPE_WIDTH)
    for part in outcome.shown():
        console.print(part)


def print_json(data: Mapping[str, Any], stream: TextIO) -> None:
    """Write one JSON object and a newline. JSON has no NaN and no infinity: null stands for them."""
    json.dump(_finite(data), stream, indent=2, allow_nan=False)
    stream.write("\n")
    stream.flush()


# Options that name the network. Other commands take several: a second one is no correction of the first.
_ONCE = ("--checkpoint", "--model", "--weights", "--clip")


class Command(typer.core.TyperCommand):
    """A command that takes one network where it is for one: none is left out in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does it.

        Raises:
            InvalidArgumentError: an option that names the one network is there twice.
        """
        rest = super().parse_args(ctx, list(args))
        given = [] if ctx.resilient_parsing else self.make_parser(ctx).parse_args(args=list(args))[2]
        for option, often in Counter(p for p in given if isinstance(p, typer.core.TyperOption)).items():
            if often > 1 and not option.multiple and option.opts[0] in _ONCE:
                raise InvalidArgumentError(option.opts[0], f"{often} values", "one")
        return rest


class CommandGroup(typer.core.TyperGroup):
    """The group of commands; turns every way of failing into a message and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and end the process, see the module's table of exit codes.

        ``standalone_mode=False`` is for embedding: nothing is caught.
        """
        args = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        as_json = "--json" in args[: args.index("--")] if "--" in args else "--json" in args
        try:
            # With --json a usage error must come out as JSON too, so typer may not print it.
            code = super().main(args, prog_name, complete_var, not as_json, windows_expand_args, **extra)
        except BcosError as error:
            _report(error, as_json)
            sys.exit(2)
        except KeyboardInterrupt as error:
            if str(error):
                print(error, file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if not _is_usage_error(error):
                traceback.print_exc()
                if as_json:
                    print_json({"error": {"type": type(error).__name__, "message": str(error)}}, sys.stdout)
                sys.exit(1)
            _report(error, as_json)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def _is_usage_error(error: Exception) -> bool:
    """Whether typer raised it for a wrong command line. Its class is click's in some versions and its own in others."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _report(error: Exception, as_json: bool) -> None:
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    print(f"error: {message}", file=sys.stderr)
    if not as_json:
        return
    details: dict[str, Any] = {"type": type(error).__name__, "message": message}
    for name in ("argument", "got", "expected"):
        if hasattr(error, name):
            details[name] = str(getattr(error, name))
    print_json({"error": details}, sys.stdout)


@contextmanager
def _plain_warnings(said: list[str]) -> Iterator[None]:
    """Warnings as ``warning: ...`` on stderr, without source lines, each once; also appended to ``said``."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = str(message)
        # Deprecations inside other packages are nothing a user of this command can act on.
        if not issubclass(category, UserWarning) or text in said:
            return
        said.append(text)
        print(f"warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value

"""Typed errors: each names the argument, what came, and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BcosError",
    "CheckpointError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "MissingDependencyError",
    "TrainingError",
    "TrainingInterruptedError",
    "UnsupportedOpError",
    "did_you_mean",
]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if not close:
        return ""
    return " (did you mean " + " or ".join(repr(c) for c in close) + "?)"


class BcosError(Exception):
    """Base of every error this package raises on purpose. It can be pickled: it may come from another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own would call the class with the message alone. A field may be anything, so it goes as text.
        return _restored, (type(self), str(self), {name: str(value) for name, value in vars(self).items()})


def _restored(kind: type[BcosError], message: str, fields: dict[str, str]) -> BcosError:
    error = kind.__new__(kind, message)
    vars(error).update(fields)
    return error


class InvalidArgumentError(BcosError, ValueError):
    """An argument has the right type and an unusable value."""

    def __init__(self, argument: str, got: object, expected: str, hint: str = "") -> None:
        self.argument, self.got, self.expected = argument, got, expected
        super().__init__(f"{argument}: got {got}, expected {expected}{hint}")


class InvalidTypeError(BcosError, TypeError):
    """An argument has the wrong type."""

    def __init__(self, argument: str, got: object, expected: str, hint: str = "") -> None:
        self.argument, self.got, self.expected = argument, got, expected
        super().__init__(f"{argument}: got {got}, expected {expected}{hint}")


class UnsupportedOpError(BcosError, ValueError):
    """A network holds an op that has no dynamic-linear rule; the message names op and module."""


class CheckpointError(BcosError, ValueError):
    """A checkpoint file is unreadable or does not fit the network."""


class MissingDependencyError(BcosError, ImportError):
    """An optional package is needed; the message says which extra installs it."""


class TrainingError(BcosError, RuntimeError):
    """Training cannot go on; the message names step and layer, and which checkpoint is kept."""


class TrainingInterruptedError(BcosError):
    """Training was asked to stop (SIGTERM) and has saved its state; the message says how to go on."""

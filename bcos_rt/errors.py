"""Typed errors: each names the argument, what came, and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
    """Base of every error this package raises on purpose."""


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

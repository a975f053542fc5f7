"""The error of a failed export."""

from __future__ import annotations

from bcos_rt.errors import BcosError

__all__ = ["ExportError"]


class ExportError(BcosError, RuntimeError):
    """A file was written that is invalid or does not compute what the network computes; it has been removed."""

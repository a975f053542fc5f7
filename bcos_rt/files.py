"""What writing files has in common."""

from __future__ import annotations

import os

__all__ = ["ordinary_mode"]


def ordinary_mode(path: str | os.PathLike[str]) -> None:
    """Give a file that was made private (temporary files are) the mode an ordinary new file has."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)

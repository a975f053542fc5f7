"""What reading and writing files has in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from bcos_rt.errors import CheckpointError

__all__ = ["check_format", "ordinary_mode"]


def ordinary_mode(path: str | os.PathLike[str]) -> None:
    """Give a file that was made private (temporary files are) the mode an ordinary new file has."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def check_format(path: str | os.PathLike[str], header: Mapping[str, Any], name: str, version: int, kind: str) -> None:
    """Raise where a file's header does not say ``format`` ``name`` and ``format_version`` ``version``.

    Args:
        kind: what such a file is called, for the message.

    Raises:
        CheckpointError: another kind of file, or another version.
    """
    if header.get("format") != name:
        raise CheckpointError(f"{path}: not a bcos-rt {kind} (format {header.get('format')!r})")
    found = header.get("format_version")
    if found != version:
        raise CheckpointError(
            f"{path}: format version {found!r}, this version of bcos-rt reads {version} "
            f"(the file was written by bcos-rt {header.get('bcos_rt_version', 'of unknown version')})"
        )

"""What reading and writing files has in common."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bcos_rt.errors import CheckpointError

__all__ = [
    "check_format",
    "ordinary_mode",
    "read_rows",
    "remove_leftovers",
    "replacing",
    "write_csv",
    "write_json",
    "write_text",
]


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


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write to; when the block ends well it takes ``path``'s place at once, else it is removed.

    A reader, or a kill, sees the old content or the new. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        ordinary_mode(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of :func:`replacing` ``path``; nothing else may be writing it."""
    path = Path(path)
    for left in path.parent.glob(f".{path.stem}-*{path.suffix}"):
        left.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file, see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write an object as JSON; what JSON does not know becomes its ``str``."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a CSV file with a header; None and missing values as nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: row.get(name) for name in columns})
    write_text(path, text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, all values as text; none if there is no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []

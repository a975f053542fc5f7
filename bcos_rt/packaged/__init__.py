"""Networks that come with the package: B-cosified and fine-tuned, small enough to be shipped.

``bcos_rt.load("packaged:NAME")`` loads one, and so does ``--checkpoint packaged:NAME`` on the command line. Each is a
checkpoint, NAME.safetensors, with NAME.json beside it: how it was trained and what was measured of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bcos_rt.errors import CheckpointError

__all__ = ["PREFIX", "about", "is_packaged", "located", "names"]

PREFIX = "packaged:"
FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The networks there are, without the prefix."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def about(name: str) -> dict[str, Any]:
    """How a network was trained and what was measured of it.

    Args:
        name: with or without ``packaged:``.

    Raises:
        CheckpointError: no such network.
    """
    described: dict[str, Any] = json.loads(_checkpoint(name).with_suffix(".json").read_text(encoding="utf-8"))
    return described


def is_packaged(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is the name of such a network, ``packaged:NAME``, whether there is one or not."""
    return os.fspath(path).startswith(PREFIX)


def located(path: str | os.PathLike[str]) -> Path:
    """The file behind ``packaged:NAME``; any other path is itself.

    Raises:
        CheckpointError: no such network.
    """
    return _checkpoint(os.fspath(path)) if is_packaged(path) else Path(path)


def _checkpoint(name: str) -> Path:
    name = name.removeprefix(PREFIX)
    if name not in names():
        raise CheckpointError(f"{PREFIX}{name}: no such network; the package holds {', '.join(names()) or 'none'}")
    return FOLDER / f"{name}.safetensors"

"""Names of a package that are imported on first use (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["imported_on_use"]


def imported_on_use(
    names: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``.

    Args:
        names: the package's ``globals()``; what was imported is kept there.
        homes: where each name lives, name -> module.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {names['__name__']!r} has no attribute {name!r}")
        names[name] = value = getattr(import_module(homes[name]), name)
        return value

    def listed() -> list[str]:
        return sorted({*names, *homes})

    return get, listed

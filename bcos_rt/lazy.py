"""Imports on first use: a package's own names (PEP 562), and packages that only some of it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from bcos_rt.errors import MissingDependencyError

__all__ = ["imported_on_use", "require"]


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` of a package that ``bcos-rt[extra]`` installs.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(f"{package} is not installed: pip install 'bcos-rt[{extra}]'") from error


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

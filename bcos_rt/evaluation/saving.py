"""What results of evaluations are written as: a table, all numbers, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bcos_rt.files import replacing, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_figure", "save_results"]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, see :func:`bcos_rt.files.replacing`."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def save_results(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
    figures: Mapping[str, Figure],
) -> None:
    """Write ``NAME + SUFFIX.png`` by suffix, ``NAME.npz`` (numbers as float32) and ``NAME.csv`` (one row or more).

    The table comes last: where it is, everything is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, figure in figures.items():
        save_figure(figure, folder / f"{name}{suffix}.png")
    with replacing(folder / f"{name}.npz") as temporary, open(temporary, "wb") as file:
        stored: dict[str, Any] = {
            key: values.astype(np.float32) if values.dtype.kind == "f" else values for key, values in arrays.items()
        }
        np.savez_compressed(file, **stored)
    write_csv(folder / f"{name}.csv", rows, list(rows[0]))

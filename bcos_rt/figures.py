"""What all matplotlib figures here have in common."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["folded", "without_math"]


def folded(text: str, letters: int) -> str:
    """A text in lines of so many letters, words that are longer in pieces: names of files fit a figure."""
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, letters))


def without_math(figure: Figure) -> Figure:
    """Show the names in a figure as they are: a ``$`` in one is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure

"""What all matplotlib figures here have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["without_math"]


def without_math(figure: Figure) -> Figure:
    """Show the names in a figure as they are: a ``$`` in one is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure

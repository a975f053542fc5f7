"""Explanations: dynamic linear weights, contribution maps, residuals and their pictures."""

from bcos_rt.explanation.explain import explain
from bcos_rt.explanation.explanation import Explanation
from bcos_rt.explanation.picture import colour_picture
from bcos_rt.explanation.text import explain_text

__all__ = ["Explanation", "colour_picture", "explain", "explain_text"]

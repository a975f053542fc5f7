"""Capture, dynamic-linear rules and the adjoint: a network as an explanation graph."""

from bcos_rt.graph.adjoint import Adjoint, ExplanationGraph, build_explanation_graph
from bcos_rt.graph.cache import explanation_graph
from bcos_rt.graph.rules import RULES, rule
from bcos_rt.graph.texts import TokenPooling

__all__ = [
    "RULES",
    "Adjoint",
    "ExplanationGraph",
    "TokenPooling",
    "build_explanation_graph",
    "explanation_graph",
    "rule",
]

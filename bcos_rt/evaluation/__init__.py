"""Evaluation: accuracy, calibration, completeness; attribution methods and the grid pointing game."""

from bcos_rt.evaluation.accuracy import Evaluation, evaluate
from bcos_rt.evaluation.attribution import METHODS, Method, method
from bcos_rt.evaluation.grid_pointing import GridPointing, grid_pointing_game

__all__ = ["METHODS", "Evaluation", "GridPointing", "Method", "evaluate", "grid_pointing_game", "method"]

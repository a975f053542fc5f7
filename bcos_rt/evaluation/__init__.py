"""Evaluation: accuracy, calibration, completeness; attribution methods, and what they are measured with."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bcos_rt.evaluation.accuracy import Evaluation, evaluate
from bcos_rt.evaluation.attribution import METHODS, Method, method
from bcos_rt.evaluation.grid_pointing import GridPointing, grid_pointing_game

if TYPE_CHECKING:
    from bcos_rt.evaluation.perturbation import (
        InsertionDeletion,
        Perturbation,
        PerturbationCurves,
        insertion_deletion,
        perturbation_curves,
    )
    from bcos_rt.evaluation.sanity import ParameterRandomisation, parameter_randomisation
    from bcos_rt.evaluation.with_captum import BcosAttribution
    from bcos_rt.evaluation.with_quantus import quantus_explain

__all__ = [
    "METHODS",
    "BcosAttribution",
    "Evaluation",
    "GridPointing",
    "InsertionDeletion",
    "Method",
    "ParameterRandomisation",
    "Perturbation",
    "PerturbationCurves",
    "evaluate",
    "grid_pointing_game",
    "insertion_deletion",
    "method",
    "parameter_randomisation",
    "perturbation_curves",
    "quantus_explain",
]

# Imported on first use (PEP 562): BcosAttribution is a class of captum's, which is an optional package.
_HOMES = {
    "BcosAttribution": "with_captum",
    "InsertionDeletion": "perturbation",
    "ParameterRandomisation": "sanity",
    "Perturbation": "perturbation",
    "PerturbationCurves": "perturbation",
    "insertion_deletion": "perturbation",
    "parameter_randomisation": "sanity",
    "perturbation_curves": "perturbation",
    "quantus_explain": "with_quantus",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"bcos_rt.evaluation.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

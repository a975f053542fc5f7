"""Evaluation: accuracy, calibration, completeness; attribution methods, and what they are measured with."""

from typing import TYPE_CHECKING

from bcos_rt.evaluation.accuracy import Evaluation, evaluate
from bcos_rt.evaluation.attribution import METHODS, Method, method, unsupported_methods
from bcos_rt.evaluation.grid_pointing import GridPointing, grid_pointing_game
from bcos_rt.lazy import imported_on_use

if TYPE_CHECKING:
    from bcos_rt.evaluation.linear_probe import LinearProbe, linear_probe
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
    from bcos_rt.evaluation.zero_shot import zero_shot

__all__ = [
    "METHODS",
    "BcosAttribution",
    "Evaluation",
    "GridPointing",
    "InsertionDeletion",
    "LinearProbe",
    "Method",
    "ParameterRandomisation",
    "Perturbation",
    "PerturbationCurves",
    "evaluate",
    "grid_pointing_game",
    "insertion_deletion",
    "linear_probe",
    "method",
    "parameter_randomisation",
    "perturbation_curves",
    "quantus_explain",
    "unsupported_methods",
    "zero_shot",
]

# Imported on first use: BcosAttribution is a class of captum's, which is an optional package.
_HOMES = {
    "BcosAttribution": "bcos_rt.evaluation.with_captum",
    "InsertionDeletion": "bcos_rt.evaluation.perturbation",
    "LinearProbe": "bcos_rt.evaluation.linear_probe",
    "ParameterRandomisation": "bcos_rt.evaluation.sanity",
    "Perturbation": "bcos_rt.evaluation.perturbation",
    "PerturbationCurves": "bcos_rt.evaluation.perturbation",
    "insertion_deletion": "bcos_rt.evaluation.perturbation",
    "linear_probe": "bcos_rt.evaluation.linear_probe",
    "parameter_randomisation": "bcos_rt.evaluation.sanity",
    "perturbation_curves": "bcos_rt.evaluation.perturbation",
    "quantus_explain": "bcos_rt.evaluation.with_quantus",
    "zero_shot": "bcos_rt.evaluation.zero_shot",
}

__getattr__, __dir__ = imported_on_use(globals(), _HOMES)

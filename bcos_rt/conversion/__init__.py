"""Conversion of conventional networks: the recipe, the conversion, its report, statistics."""

from bcos_rt.conversion.convert import bcosify
from bcos_rt.conversion.equivalence import EquivalenceResult, check_equivalence
from bcos_rt.conversion.recalibrate import recalibrate
from bcos_rt.conversion.recipe import Recipe
from bcos_rt.conversion.report import ConversionReport, LayerEntry, WeightsCopied

__all__ = [
    "ConversionReport",
    "EquivalenceResult",
    "LayerEntry",
    "Recipe",
    "WeightsCopied",
    "bcosify",
    "check_equivalence",
    "recalibrate",
]

"""bcos-rt: B-cos networks from pretrained vision models, with exact explanations.

>>> net, report = bcosify("torchvision:resnet18")       # a B-cos network, and what was changed
>>> explanation = explain(net, images)                   # images [N, 3, H, W] in [0, 1]
>>> explanation.save("explanation.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bcos_rt.lazy import imported_on_use

if TYPE_CHECKING:
    from bcos_rt.checkpoint import load, save
    from bcos_rt.conversion import ConversionReport, Recipe, bcosify
    from bcos_rt.conversion.recalibrate import recalibrate
    from bcos_rt.explanation import Explanation
    from bcos_rt.explanation.engine import Engine
    from bcos_rt.explanation.explain import explain
    from bcos_rt.explanation.text import explain_text
    from bcos_rt.nn.network import BcosNetwork
    from bcos_rt.training import TrainingRecipe, finetune

__all__ = [
    "BcosNetwork",
    "ConversionReport",
    "Engine",
    "Explanation",
    "Recipe",
    "TrainingRecipe",
    "bcosify",
    "explain",
    "explain_text",
    "finetune",
    "load",
    "recalibrate",
    "save",
]
__version__ = "0.1.0"

# Where each name lives. Imported on first use, so that `bcos-rt --help` need not wait for torch.
_HOMES = {
    "BcosNetwork": "bcos_rt.nn.network",
    "ConversionReport": "bcos_rt.conversion",
    "Engine": "bcos_rt.explanation.engine",
    "Explanation": "bcos_rt.explanation",
    "Recipe": "bcos_rt.conversion",
    "TrainingRecipe": "bcos_rt.training",
    "bcosify": "bcos_rt.conversion",
    "explain": "bcos_rt.explanation",
    "explain_text": "bcos_rt.explanation",
    "finetune": "bcos_rt.training",
    "load": "bcos_rt.checkpoint",
    "recalibrate": "bcos_rt.conversion",
    "save": "bcos_rt.checkpoint",
}

__getattr__, __dir__ = imported_on_use(globals(), _HOMES)

"""bcos-rt: B-cos networks from pretrained vision models, with exact explanations.

>>> net, report = bcosify("torchvision:resnet18")       # a B-cos network, and what was changed
>>> explanation = explain(net, images)                   # images [N, 3, H, W] in [0, 1]
>>> explanation.save("explanation.png")
"""

from bcos_rt.checkpoint import load, save
from bcos_rt.conversion import ConversionReport, Recipe, bcosify, recalibrate
from bcos_rt.explanation import Explanation, explain
from bcos_rt.nn.network import BcosNetwork

__all__ = [
    "BcosNetwork",
    "ConversionReport",
    "Explanation",
    "Recipe",
    "bcosify",
    "explain",
    "load",
    "recalibrate",
    "save",
]
__version__ = "0.1.0"

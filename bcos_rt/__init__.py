"""bcos-rt: B-cos networks from pretrained vision models, with exact explanations."""

from bcos_rt.conversion.recipe import Recipe
from bcos_rt.nn.network import BcosNetwork

__all__ = ["BcosNetwork", "Recipe"]
__version__ = "0.1.0"

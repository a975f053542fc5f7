"""B-cos layers. Each is a subclass of the torch layer it replaces and keeps that layer's parameter names."""

from bcos_rt.nn.layers import BcosConv2d, BcosLinear
from bcos_rt.nn.network import BcosNetwork, EmbeddingLayer, InputEncoding, LogitLayer
from bcos_rt.nn.norms import BatchNormUncentered2d

__all__ = [
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "BcosNetwork",
    "EmbeddingLayer",
    "InputEncoding",
    "LogitLayer",
]

"""A converted network in the layers of the PyPI package ``bcos``: the published implementation of the same function.

Un-normalised filters are what B-cosification (Arya et al., NeurIPS 2024) uses: its own layer is the package's with
``linear`` replaced by a plain convolution, and so is this one. Activations and pooling around the layers are the
network's own; norms are the package's, and attention is written out as in its transformers. The package has nothing for
ReLU6, whose derivative is not the gate that makes an explanation add up (clamp(x, 0, 6) / x, held constant): in
explanation mode that gate is detached, as the package's layers detach theirs. So are GELU's gate and the norms of
CLIP's tokens.
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bcos_rt.errors import InvalidArgumentError, MissingDependencyError
from bcos_rt.nn import BatchNormUncentered2d, BcosConv2d, BcosLinear, BcosNetwork
from bcos_rt.nn.network import EmbeddingLayer

__all__ = ["explanation_mode", "published_network"]


class _Padded(nn.Module):
    """A published convolution behind the padding that it does not know (TensorFlow's ``SAME``, one-sided)."""

    def __init__(self, ours: BcosConv2d, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that its parameters are not this module's.
        self.ours = (ours,)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        padded, _ = self.ours[0]._padded(x)
        return self.layer(padded)


class _DetachableReLU6(nn.Module):
    """ReLU6; in explanation mode linear with its gate held constant, in as few ops as that takes."""

    detach = False

    def set_explanation_mode(self, active: bool = True) -> None:
        self.detach = active

    def forward(self, x: Tensor) -> Tensor:
        if not self.detach:
            return F.relu6(x)
        return F.relu(x) * (6.0 / x.detach().clamp_min(6.0))


class _DetachableGELU(nn.Module):
    """GELU; in explanation mode x times its constant gate, the normal distribution function of x."""

    detach = False

    def set_explanation_mode(self, active: bool = True) -> None:
        self.detach = active

    def forward(self, x: Tensor) -> Tensor:
        if not self.detach:
            return F.gelu(x)
        return x * (0.5 * (1 + torch.erf(x.detach() * math.sqrt(0.5))))


class _DetachableAttention(nn.Module):
    """Attention as the published transformers have it: products and softmax; in explanation mode q, k are constant."""

    detach = False

    def set_explanation_mode(self, active: bool = True) -> None:
        self.detach = active

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.detach:
            q, k = q.detach(), k.detach()
        return (torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


class _DetachableEmbedding(EmbeddingLayer):
    """Unit tokens, averaged; in explanation mode their norms are constant."""

    detach = False

    def set_explanation_mode(self, active: bool = True) -> None:
        self.detach = active

    def tokens(self, outputs: Tensor) -> Tensor:
        outputs = outputs if outputs.ndim == 3 else outputs[:, None]
        norm = outputs.norm(dim=-1, keepdim=True)
        return outputs / (norm.detach() if self.detach else norm)


class _Normed(nn.Module):
    """The published BatchNorm and what timm puts behind it."""

    def __init__(self, norm: nn.Module, ours: BatchNormUncentered2d) -> None:
        super().__init__()
        self.norm, self.drop, self.act = norm, ours.drop, ours.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.norm(x)))


def published_network(net: BcosNetwork) -> BcosNetwork:
    """A copy of ``net`` in the published layers, sharing its parameters and buffers.

    Raises:
        MissingDependencyError: the package ``bcos`` is not installed.
        InvalidArgumentError: a layer the package has no counterpart of.
    """
    shared = {id(t): t for t in (*net.parameters(), *net.buffers())}
    published = copy.deepcopy(net, dict(shared))
    for name, module in list(published.named_modules()):
        # An activation inside a norm has gone with it into the published norm's wrapper, and is replaced there.
        replacement = _layer(name, module)
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(published.get_submodule(parent), child, replacement.train(module.training))
    if isinstance(published.backbone, fx.GraphModule):
        _attention(published.backbone)
    return published


def _attention(backbone: fx.GraphModule) -> None:
    """Calls of the fused attention in a rewritten forward pass become modules that know explanation mode."""
    for i, node in enumerate(backbone.graph.nodes):
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            if len(node.args) != 3 or node.kwargs:
                raise InvalidArgumentError("net", f"attention with options ({node.name})", "plain attention")
            name = f"published_attention_{i}"
            backbone.add_submodule(name, _DetachableAttention())
            node.op, node.target = "call_module", name
    backbone.recompile()


def explanation_mode(net: nn.Module, active: bool = True) -> None:
    """Detach the published layers' dynamic factors, so that autograd gives W; or undo it."""
    for module in net.modules():
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(active)


def _layer(name: str, module: nn.Module) -> nn.Module | None:
    layers = _package()
    if isinstance(module, BcosConv2d):
        return _convolution(name, module, layers)
    if isinstance(module, BcosLinear):
        if module.weight_norm != "none" or module.bias is not None:
            raise InvalidArgumentError("net", f"{name} with bias or unit norm", "layers of the default recipe")
        new = layers.BcosLinear(module.in_features, module.out_features, b=module.b, device="meta")
        new.linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        new.linear.weight = module.weight
        return new
    if type(module) is nn.LayerNorm:
        norm = layers.norms.DetachableLayerNorm(module.normalized_shape, eps=module.eps, device="meta")
        norm.weight = module.weight
        norm.register_parameter("bias", module.bias)
        return norm
    if isinstance(module, nn.GELU):
        return _DetachableGELU()
    if isinstance(module, EmbeddingLayer):
        return _DetachableEmbedding()
    if isinstance(module, nn.ReLU6):
        return _DetachableReLU6()
    if isinstance(module, BatchNormUncentered2d):
        norm = layers.norms.BatchNormUncentered2d(module.num_features, eps=module.eps, momentum=module.momentum)
        norm.weight, norm.bias = module.weight, module.bias
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(norm, key, getattr(module, key))
        return _Normed(norm, module) if module.has_post else norm
    return None


def _convolution(name: str, ours: BcosConv2d, layers: object) -> nn.Module:
    if ours.weight_norm != "none" or ours.bias is not None or max(ours.dilation) > 1:
        raise InvalidArgumentError("net", f"{name} with bias, unit norm or dilation", "layers of the default recipe")
    sides = ours._reversed_padding_repeated_twice
    outside = ours.tf_same_padding or ours.padding_mode != "zeros" or sides[0] != sides[1] or sides[2] != sides[3]
    padding = (0, 0) if outside else (sides[2], sides[0])
    shape = (ours.in_channels, ours.out_channels, ours.kernel_size, ours.stride, padding)
    new = layers.BcosConv2d(*shape, groups=ours.groups, b=ours.b, device="meta")  # type: ignore[attr-defined]
    new.linear = nn.Conv2d(*shape, groups=ours.groups, bias=False, device="meta")
    new.linear.weight = ours.weight
    return _Padded(ours, new) if outside else new


def _package() -> object:
    try:
        with warnings.catch_warnings():
            # It looks up folders of data sets that are not used here, and says that they are missing.
            warnings.simplefilter("ignore")
            import bcos.modules
            import bcos.modules.norms
    except ImportError as error:
        raise MissingDependencyError(
            f"the published layers are in a package that is missing: pip install bcos ({error})"
        ) from error
    return bcos.modules

"""An explanation by autograd that shares nothing with the rule table: the network is run with its factors detached.

Every function that has a gate, a norm or a multiplier is replaced while the network runs by the same function with that
factor detached; ordinary autograd then gives W.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bcos_rt.kernels import ops, reference


def _ratio(y, x, at_zero):
    zero = x == 0
    return torch.where(zero, torch.full_like(x, at_zero), y / torch.where(zero, torch.ones_like(x), x)).detach()


def _centred(x, dims, eps):
    mean = x.mean(dims, keepdim=True)
    rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    return (x - mean) * rstd.detach()


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention with constant weights, each written out as the definition has it."""
    assert dropout_p == 0
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = torch.einsum("...nd,...md->...nm", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.where(torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        scores = scores.where(attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("...nm,...md->...nd", weights.detach(), value)


class _Detached(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kwargs.pop("inplace", None)
        x = args[0] if args else kwargs.get("input")
        if func in (F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_):
            return x * (x > 0).to(x.dtype)
        if func in (F.relu6, F.hardtanh, F.hardtanh_):
            return x * _ratio(x.clamp(0, 6), x, 0.0)
        if func in (F.silu,):
            return x * torch.sigmoid(x).detach()
        if func in (F.hardswish,):
            return x * ((x + 3).clamp(0, 6) / 6).detach()
        if func in (F.gelu,):
            return x * (0.5 * (1 + torch.erf(x / math.sqrt(2)))).detach()
        if func in (F.sigmoid, torch.sigmoid, torch.Tensor.sigmoid, torch.Tensor.sigmoid_, F.hardsigmoid, torch.tanh):
            return func(*args).detach()
        if func in (F.elu, F.selu, F.celu, F.rrelu, torch.Tensor.tanh):
            return x * _ratio(func(*args, **kwargs), x, 1.0)
        if func is torch.linalg.vector_norm:
            return func(*args, **kwargs).detach()
        if func in (torch.softmax, F.softmax, torch.Tensor.softmax):
            return func(*args, **kwargs).detach()
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.rms_norm:
            given = dict(zip(("normalized_shape", "weight", "eps"), args[1:], strict=False)) | kwargs
            dims = tuple(range(-len(given["normalized_shape"]), 0))
            eps = given["eps"] if given["eps"] is not None else torch.finfo(x.dtype).eps
            y = x * (x.square().mean(dims, keepdim=True) + eps).rsqrt().detach()
            return y if given["weight"] is None else y * given["weight"]
        if func is F.glu:
            left, right = x.chunk(2, args[1] if len(args) > 1 else kwargs["dim"])
            return left * torch.sigmoid(right).detach()
        if func is F.instance_norm and kwargs["use_input_stats"]:
            scale, shift = kwargs["weight"][:, None, None], kwargs["bias"][:, None, None]
            return _centred(x, (2, 3), kwargs["eps"]) * scale + shift
        if func is F.layer_norm:
            shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            bias = args[3] if len(args) > 3 else kwargs.get("bias")
            eps = args[4] if len(args) > 4 else kwargs.get("eps", 1e-5)
            y = _centred(x, tuple(range(-len(shape), 0)), eps)
            y = y * weight if weight is not None else y
            return y + bias if bias is not None else y
        if func is F.group_norm:
            given = dict(zip(("num_groups", "weight", "bias", "eps"), args[1:], strict=False)) | kwargs
            groups, weight, bias = given["num_groups"], given.get("weight"), given.get("bias")
            eps = given.get("eps", 1e-5)
            y = _centred(x.reshape(x.shape[0], groups, -1), (2,), eps).reshape(x.shape)
            view = (1, -1) + (1,) * (x.ndim - 2)
            y = y * weight.view(view) if weight is not None else y
            return y + bias.view(view) if bias is not None else y
        return func(*args, **kwargs)


@contextmanager
def detached_factors():
    """Run networks with every dynamic factor detached."""
    conv2d, linear = ops.conv2d, ops.linear

    def detached_conv2d(x, w, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, b=2.0, eps=1e-6):
        z = F.conv2d(x, w, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
        if b == 1:
            return z
        n = reference.patch_norm(x, w.shape[2:], stride, padding, dilation, groups, eps)
        return z * reference.dynamic_scale(z, n, b).detach()

    def detached_linear(x, w, bias=None, b=2.0, eps=1e-12):
        z = F.linear(x, w, bias)
        return z if b == 1 else z * reference.dynamic_scale(z, reference.row_norm(x, eps), b, -1).detach()

    ops.conv2d, ops.linear = detached_conv2d, detached_linear
    try:
        with _Detached():
            yield
    finally:
        ops.conv2d, ops.linear = conv2d, linear


def oracle(net, encoded, targets):
    """(logits, W) of a B-cos network by autograd; targets [N]."""
    x = encoded.detach().clone().requires_grad_()
    with detached_factors():
        logits = net.forward_encoded(x)
    (weights,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), x)
    return logits.detach(), weights

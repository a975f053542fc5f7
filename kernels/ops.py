"""The ops of bcos-rt: schemas, shapes, autograd and dispatch. Layers call these and nothing below them.

``torch.ops.bcos_rt.conv2d`` and ``torch.ops.bcos_rt.linear`` are single nodes under ``torch.export`` and
``torch.compile``; the explanation graph splits them into the linear response, the norm (:func:`patch_norm`,
:func:`row_norm`) and the multiplier (:func:`dynamic_scale`), which are ops too, so that later passes recognise them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_rt.kernels import reference
from bcos_rt.kernels.reference import CONV_EPS, LINEAR_EPS

__all__ = ["CONV_EPS", "LINEAR_EPS", "conv2d", "dynamic_scale", "linear", "patch_norm", "row_norm"]


@torch.library.custom_op("bcos_rt::conv2d", mutates_args=())
def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float,
    eps: float,
) -> Tensor:
    return reference.conv2d(x, weight, bias, stride, padding, dilation, groups, b, eps)


@_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float,
    eps: float,
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *options = inputs
    ctx.options = options
    ctx.save_for_backward(x, weight, bias, output)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, y = ctx.saved_tensors
    stride, padding, dilation, groups, b, eps = ctx.options
    needs = ctx.needs_input_grad[:3]
    grads = reference.conv2d_backward(grad, x, weight, bias, y, stride, padding, dilation, groups, b, eps, needs)
    return (*grads, None, None, None, None, None, None)


_conv2d.register_autograd(_conv2d_backward, setup_context=_conv2d_setup)


@torch.library.custom_op("bcos_rt::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, b: float, eps: float) -> Tensor:
    return reference.linear(x, weight, bias, b, eps)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, b: float, eps: float) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *options = inputs
    ctx.options = options
    ctx.save_for_backward(x, weight, bias, output)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, y = ctx.saved_tensors
    b, eps = ctx.options
    return (*reference.linear_backward(grad, x, weight, bias, y, b, eps, ctx.needs_input_grad[:3]), None, None)


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("bcos_rt::patch_norm", mutates_args=())
def patch_norm(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    """Norm of every patch, [N, C, H, W] -> [N, groups, H', W'] (see :func:`reference.patch_norm`); inference only."""
    return _own(reference.patch_norm(x, kernel_size, stride, padding, dilation, groups, eps), x)


@patch_norm.register_fake
def _(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    return reference.patch_norm(x, kernel_size, stride, padding, dilation, groups, eps)


@torch.library.custom_op("bcos_rt::row_norm", mutates_args=())
def row_norm(x: Tensor, eps: float) -> Tensor:
    """Norm of the last dimension, [..., C] -> [..., 1] (see :func:`reference.row_norm`); inference only."""
    return reference.row_norm(x, eps)


@row_norm.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return reference.row_norm(x, eps)


@torch.library.custom_op("bcos_rt::dynamic_scale", mutates_args=())
def dynamic_scale(z: Tensor, n: Tensor, b: float, channel_dim: int) -> Tensor:
    """The multiplier ``m``, shape of ``z`` (see :func:`reference.dynamic_scale`); inference only."""
    return _own(reference.dynamic_scale(z, n, b, channel_dim), z)


@dynamic_scale.register_fake
def _(z: Tensor, n: Tensor, b: float, channel_dim: int) -> Tensor:
    return torch.empty_like(z)


def _own(out: Tensor, given: Tensor) -> Tensor:
    # An op must not return its own input.
    return out.clone() if out is given else out


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    b: float = 2.0,
    eps: float = CONV_EPS,
) -> Tensor:
    """B-cos 2-D convolution, ``y = z * (|z| / n)^(B-1)`` with ``z = conv(x, weight) + bias``.

    Args:
        x: [N, C, H, W], floating point.
        weight: [O, C / groups, kh, kw].
        bias: [O] or None; part of ``z``.
        b: B >= 1. At 1 this is the plain convolution and no norm is computed.

    Returns:
        [N, O, H', W'], differentiable in x, weight and bias.
    """
    if b == 1:
        return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    out: Tensor = _conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups, float(b), eps)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, b: float = 2.0, eps: float = LINEAR_EPS) -> Tensor:
    """B-cos linear layer over the last dimension: x [..., C], weight [O, C] -> [..., O]; see :func:`conv2d`."""
    if b == 1:
        return F.linear(x, weight, bias)
    out: Tensor = _linear(x, weight, bias, float(b), eps)
    return out

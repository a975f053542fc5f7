"""B-cos transforms in plain PyTorch, any float dtype, any device: what every faster kernel is compared with.

The B-cos transform of a patch ``x`` and a filter ``w`` (Böhle et al., CVPR 2022; without weight normalisation as
in Arya et al., NeurIPS 2024, arXiv 2411.00715, eq. 4)::

    z = w . x (+ bias)        n = ||x||        m = (|z| / n)^(B-1)        y = z * m

``m`` is the *dynamic scale*: with ``m`` held constant ``y`` is linear in ``x``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CONV_EPS",
    "LINEAR_EPS",
    "POWER_EPS",
    "conv2d",
    "conv2d_backward",
    "dynamic_scale",
    "linear",
    "linear_backward",
    "patch_norm",
    "row_norm",
]

# The published layers' stabilisers: under the root of the patch norm, added to the row norm, and inside the power of
# a fractional B. They are part of the function (checkpoints were trained with them).
CONV_EPS = 1e-6
LINEAR_EPS = 1e-12
POWER_EPS = 1e-6


def _norm_dtype(x: Tensor) -> torch.dtype:
    # fp16 squares overflow above 256 and lose everything below 1e-4; bf16 sums lose 16 bits. Norms live in fp32.
    return torch.promote_types(x.dtype, torch.float32)


def _patch_square_sum(
    squares: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Box sum of a [N, G, H, W] map over each kernel position, zeros outside the image."""
    if all(d == 1 for d in dilation) and all(2 * p <= k for p, k in zip(padding, kernel_size, strict=True)):
        area = kernel_size[0] * kernel_size[1]
        if area == 1 and all(s == 1 for s in stride) and not any(padding):
            return squares
        return F.avg_pool2d(squares, tuple(kernel_size), tuple(stride), tuple(padding)) * area
    ones = squares.new_ones(squares.shape[1], 1, *kernel_size)
    return F.conv2d(squares, ones, None, stride, padding, dilation, squares.shape[1])


def patch_norm(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float = CONV_EPS,
) -> Tensor:
    """Norm of every patch a convolution sees: ``sqrt(box_sum(sum_c x_c^2) + eps)``.

    Args:
        x: [N, C, H, W], C divisible by ``groups``.

    Returns:
        [N, groups, H', W'] in float32 (float64 for float64 input).
    """
    wide = x.to(_norm_dtype(x))
    squares = wide * wide
    if groups == 1:
        squares = squares.sum(1, keepdim=True)
    elif groups != x.shape[1]:
        squares = squares.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).sum(2)
    return (_patch_square_sum(squares, kernel_size, stride, padding, dilation) + eps).sqrt()


def row_norm(x: Tensor, eps: float = LINEAR_EPS) -> Tensor:
    """Norm of the last dimension, ``||x|| + eps``: [..., C] -> [..., 1] in float32 (float64 for float64 input)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_norm_dtype(x))
    return norm + eps


def _align(n: Tensor, z: Tensor, channel_dim: int) -> Tensor:
    """Repeat a per-group norm to the output channels of ``z`` (a norm of one group broadcasts by itself)."""
    groups = n.shape[channel_dim]
    if groups in (1, z.shape[channel_dim]):
        return n
    return n.repeat_interleave(z.shape[channel_dim] // groups, dim=channel_dim)


def dynamic_scale(z: Tensor, n: Tensor, b: float, channel_dim: int = 1) -> Tensor:
    """The multiplier ``m = (|z| / n)^(B-1)``; for B other than 1 and 2 the published ``(|z| / n + 1e-6)^(B-1)``.

    Args:
        z: the linear response, [N, O, H, W] or [..., O].
        n: its norm, broadcastable to ``z`` or with one entry per group along ``channel_dim``.

    Returns:
        ``m``, shape and dtype of ``z``.
    """
    if b == 1:
        return torch.ones_like(z)
    ratio = z.abs().to(n.dtype) / _align(n, z, channel_dim)
    if b != 2:
        ratio = (ratio + POWER_EPS).pow(b - 1)
    return ratio.to(z.dtype)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float,
    eps: float = CONV_EPS,
) -> Tensor:
    """B-cos convolution ``y = z * m``: x [N, C, H, W], weight [O, C / groups, kh, kw] -> [N, O, H', W']."""
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if b == 1:
        return z
    return z * dynamic_scale(z, patch_norm(x, weight.shape[2:], stride, padding, dilation, groups, eps), b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, b: float, eps: float = LINEAR_EPS) -> Tensor:
    """B-cos linear layer ``y = z * m``: x [..., C], weight [O, C] -> [..., O]."""
    z = F.linear(x, weight, bias)
    if b == 1:
        return z
    return z * dynamic_scale(z, row_norm(x, eps), b, -1)


def _recover_z(y: Tensor, n: Tensor, channel_dim: int) -> Tensor:
    """For B = 2, ``y = z |z| / n`` gives ``z = sign(y) sqrt(|y| n)``: no second convolution, nothing more stored."""
    return y.sign() * (y.abs().to(n.dtype) * _align(n, y, channel_dim)).sqrt().to(y.dtype)


def _grad_z_and_n(grad: Tensor, z: Tensor, n: Tensor, b: float, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``y = z (|z|/n + d)^(B-1)``, d = 0 for B = 2, differentiated as a whole.

    ``dy/dz = m (1 + (B-1) u / (u+d))`` and ``dy/dn = -(B-1) (z m / n) u / (u+d)`` with ``u = |z|/n``: both are finite
    at z = 0 for every B >= 1, where ``|cos|^(B-1)`` by itself has an infinite slope between B = 1 and 2.
    """
    wide = _align(n, z, channel_dim)
    u = z.abs().to(n.dtype) / wide
    if b == 2:
        m, slope = u, torch.ones_like(u)
    else:
        m, slope = (u + POWER_EPS).pow(b - 1), u / (u + POWER_EPS)
    grad_z = grad.to(n.dtype) * m * (1 + (b - 1) * slope)
    grad_n = -(b - 1) * grad.to(n.dtype) * z.to(n.dtype) * m * slope / wide
    groups = n.shape[channel_dim]
    if groups != z.shape[channel_dim]:
        dim = channel_dim % grad_n.ndim
        shape = grad_n.shape
        grad_n = grad_n.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :]).sum(dim + 1)
    return grad_z.to(z.dtype), grad_n


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv2d` for x, weight and bias, the gradient through the patch norm included."""
    grad_norm = None
    grad_z = grad
    if b != 1:
        n = patch_norm(x, weight.shape[2:], stride, padding, dilation, groups, eps)
        z = _recover_z(y, n, 1) if b == 2 else F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        grad_z, grad_n = _grad_z_and_n(grad, z, n, b, 1)
        if needs[0]:
            # n^2 = box(sum x^2) + eps, so dn/dx = x * box^T(grad_n / n).
            ones = grad_n.new_ones(groups, 1, *weight.shape[2:])
            extra = [
                x.shape[2 + i] - ((n.shape[2 + i] - 1) * stride[i] - 2 * padding[i])
                - dilation[i] * (weight.shape[2 + i] - 1) - 1
                for i in range(2)
            ]  # fmt: skip
            spread = F.conv_transpose2d(grad_n / n, ones, None, stride, padding, extra, groups, dilation)
            grad_norm = _align(spread, x, 1).to(x.dtype) * x
    grad_x, grad_w, grad_b = torch.ops.aten.convolution_backward(
        grad_z.contiguous(),
        x,
        weight,
        [weight.shape[0]] if bias is not None else None,
        list(stride),
        list(padding),
        list(dilation),
        False,
        [0, 0],
        groups,
        [needs[0], needs[1], needs[2] and bias is not None],
    )
    if grad_norm is not None:
        grad_x = grad_x + grad_norm
    return grad_x, grad_w, grad_b


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`linear` for x, weight and bias, the gradient through the row norm included."""
    grad_norm = None
    grad_z = grad
    if b != 1:
        n = row_norm(x, eps)
        z = _recover_z(y, n, -1) if b == 2 else F.linear(x, weight, bias)
        grad_z, grad_n = _grad_z_and_n(grad, z, n, b, -1)
        length = n - eps
        unit = torch.where(length > 0, x.to(n.dtype) / length, torch.zeros_like(n))
        grad_norm = (grad_n * unit).to(x.dtype)
    grad_x = grad_w = grad_b = None
    flat = grad_z.reshape(-1, weight.shape[0])
    if needs[0]:
        grad_x = F.linear(grad_z, weight.t())
        if grad_norm is not None:
            grad_x = grad_x + grad_norm
    if needs[1]:
        grad_w = flat.t() @ x.reshape(-1, weight.shape[1])
    if needs[2] and bias is not None:
        grad_b = flat.sum(0)
    return grad_x, grad_w, grad_b

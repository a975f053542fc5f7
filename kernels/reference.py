"""B-cos transforms in plain PyTorch, any float dtype, any device: what every faster kernel is compared with.

The B-cos transform of a patch ``x`` and a filter ``w`` (Böhle et al., CVPR 2022; without weight normalisation as
in Arya et al., NeurIPS 2024, arXiv 2411.00715, eq. 4)::

    z = w . x (+ bias)        n = ||x||        m = (|z| / n)^(B-1)        y = z * m

``m`` is the *dynamic scale*: with ``m`` held constant ``y`` is linear in ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "COLOUR_EPS",
    "CONV_EPS",
    "LINEAR_EPS",
    "MAP_COLUMNS",
    "POWER_EPS",
    "activation_gate",
    "attention",
    "attention_transposed",
    "channels_last",
    "conv2d",
    "conv2d_backward",
    "conv2d_contributions",
    "conv2d_fused",
    "conv2d_transposed",
    "dynamic_scale",
    "grad_response",
    "image_contributions",
    "linear",
    "linear_backward",
    "linear_fused",
    "linear_transposed",
    "map_entries",
    "norm_dtype",
    "output_padding",
    "output_size",
    "pack_mask",
    "patch_norm",
    "per_row",
    "row_norm",
    "square_response_grad",
    "square_row_response_grad",
    "square_sum",
    "transposed_rows",
    "unpack_mask",
]

# The published layers' stabilisers: under the root of the patch norm, added to the row norm, and inside the power of
# a fractional B. They are part of the function (checkpoints were trained with them).
CONV_EPS = 1e-6
LINEAR_EPS = 1e-12
POWER_EPS = 1e-6
# What the colour picture adds to its denominators, and its opacity where a contribution is negative.
COLOUR_EPS = 1e-12
# Channels that one entry of a sum-of-squares map written by a convolution is the sum of (within a group). Several
# entries, because a GPU program sees a part of the channels; a fixed number, because shapes must not depend on tiles.
MAP_COLUMNS = 64
# What may follow a layer inside one fused op; a GPU kernel knows them by their position here.
ACTIVATIONS = ("none", "relu", "relu6", "gelu", "silu", "hardswish")


def norm_dtype(x: Tensor) -> torch.dtype:
    """What norms and sums of ``x`` are computed in: at least float32."""
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
    wide = x.to(norm_dtype(x))
    squares = wide * wide
    if groups == 1:
        squares = squares.sum(1, keepdim=True)
    elif groups != x.shape[1]:
        squares = squares.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).sum(2)
    return (_patch_square_sum(squares, kernel_size, stride, padding, dilation) + eps).sqrt()


def row_norm(x: Tensor, eps: float = LINEAR_EPS) -> Tensor:
    """Norm of the last dimension, ``||x|| + eps``: [..., C] -> [..., 1] in float32 (float64 for float64 input)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=norm_dtype(x))
    return norm + eps


def output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Rows and columns of a convolution's result."""
    return [
        (input_size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]


def output_padding(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Rows and columns that a convolution's stride left over at the far edge: what its adjoint has to give back."""
    return [(input_size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) % stride[i] for i in range(2)]


def _align(n: Tensor, z: Tensor, channel_dim: int) -> Tensor:
    """Repeat a per-group norm to the output channels of ``z`` (a norm of one group broadcasts by itself)."""
    groups = n.shape[channel_dim]
    if groups in (1, z.shape[channel_dim]):
        return n
    return n.repeat_interleave(z.shape[channel_dim] // groups, dim=channel_dim)


def dynamic_scale(z: Tensor, n: Tensor, b: float | Tensor, channel_dim: int = 1) -> Tensor:
    """The multiplier ``m = (|z| / n)^(B-1)``; for B other than 1 and 2 the published ``(|z| / n + 1e-6)^(B-1)``.

    Args:
        z: the linear response, [N, O, H, W] or [..., O].
        n: its norm, broadcastable to ``z`` or with one entry per group along ``channel_dim``.

    Returns:
        ``m``, shape and dtype of ``z``.
    """
    general = isinstance(b, Tensor)
    if not general and b == 1:
        return torch.ones_like(z)
    ratio = z.abs().to(n.dtype) / _align(n, z, channel_dim)
    if general or b != 2:
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
    b: float | Tensor,
    eps: float = CONV_EPS,
) -> Tensor:
    """B-cos convolution ``y = z * m``: x [N, C, H, W], weight [O, C / groups, kh, kw] -> [N, O, H', W']."""
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if not isinstance(b, Tensor) and b == 1:
        return z
    return z * dynamic_scale(z, patch_norm(x, weight.shape[2:], stride, padding, dilation, groups, eps), b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, b: float | Tensor, eps: float = LINEAR_EPS) -> Tensor:
    """B-cos linear layer ``y = z * m``: x [..., C], weight [O, C] -> [..., O]."""
    z = F.linear(x, weight, bias)
    if not isinstance(b, Tensor) and b == 1:
        return z
    return z * dynamic_scale(z, row_norm(x, eps), b, -1)


def grad_response(
    grad: Tensor, z: Tensor, n: Tensor, b: float | Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``y = z (|z|/n + d)^(B-1)``, every B's but 1 and 2, differentiated as a whole.

    ``dy/dz = m (1 + (B-1) u / (u+d))``, ``dy/dn = -(B-1) (z m / n) u / (u+d)`` and ``dy/dB = z m log(u+d)`` with
    ``u = |z|/n``: all finite at z = 0 for every B >= 1, where ``|cos|^(B-1)`` by itself has an infinite slope between
    B = 1 and 2.

    Returns:
        grad_z like ``z``; grad_n like ``n``; grad_B, where B is a tensor (a learned B always takes the form with d).
    """
    wide = _align(n, z, channel_dim)
    u = z.abs().to(n.dtype) / wide
    grad_b = None
    m, slope = (u + POWER_EPS).pow(b - 1), u / (u + POWER_EPS)
    if isinstance(b, Tensor):
        grad_b = (grad.to(n.dtype) * z.to(n.dtype) * m * (u + POWER_EPS).log()).sum().to(b.dtype)
    grad_z = grad.to(n.dtype) * m * (1 + (b - 1) * slope)
    grad_n = -(b - 1) * grad.to(n.dtype) * z.to(n.dtype) * m * slope / wide
    groups = n.shape[channel_dim]
    if groups != z.shape[channel_dim]:
        dim = channel_dim % grad_n.ndim
        shape = grad_n.shape
        grad_n = grad_n.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :]).sum(dim + 1)
    return grad_z.to(z.dtype), grad_n, grad_b


def _square_response_grad(grad: Tensor, y: Tensor, n: Tensor, groups: int, channel_dim: int) -> tuple[Tensor, Tensor]:
    """:func:`grad_response` for B = 2 from ``y = z |z| / n`` itself: no second product, nothing more stored.

    ``dy/dz = 2 |z| / n = 2 sqrt(|y| / n)`` and ``dy/dn = -y / n``.

    Returns:
        grad_z like ``y``; grad_n / n like ``n``.
    """
    grad_z = (y.abs().to(n.dtype) / _align(n, y, channel_dim)).sqrt() * grad * 2
    dim, shape = channel_dim % y.ndim, y.shape
    products = grad.to(n.dtype) * y
    products = products.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :]).sum(dim + 1)
    return grad_z.to(y.dtype), -products / (n * n)


def square_response_grad(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """:func:`grad_response` of a convolution for B = 2: grad_z like ``y``; grad_n / n, [N, groups, H', W']."""
    n = patch_norm(x, kernel_size, stride, padding, dilation, groups, eps)
    return _square_response_grad(grad, y, n, groups, 1)


def square_row_response_grad(grad: Tensor, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`grad_response` of a linear layer for B = 2: grad_z like ``y``; grad_n / ||x||, [..., 1], 0 at x = 0."""
    n = row_norm(x, eps)
    grad_z, share = _square_response_grad(grad, y, n, 1, -1)
    return grad_z, _over_length(share * n, n, eps)


def _over_length(grad_n: Tensor, n: Tensor, eps: float) -> Tensor:
    """Of n = length + eps, d length/dx = x / length: what x is multiplied with, 0 at x = 0."""
    length = n - eps
    return torch.where(length > 0, grad_n / length, torch.zeros_like(n))


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
    b: float | Tensor,
    eps: float,
    needs: Sequence[bool],
    square_response: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv2d` for x, weight, bias and a tensor B, through the patch norm too.

    ``square_response`` takes the place of :func:`square_response_grad`.
    """
    spread = grad_exponent = None
    grad_z = grad
    if isinstance(b, Tensor) or b != 1:
        geometry = (weight.shape[2:], stride, padding, dilation, groups, eps)
        if isinstance(b, Tensor) or b != 2:
            n = patch_norm(x, *geometry)
            z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            grad_z, grad_n, grad_exponent = grad_response(grad, z, n, b, 1)
            share = grad_n / n
        else:
            grad_z, share = (square_response or square_response_grad)(grad, x, y, *geometry)
        if needs[0]:
            # n^2 = box(sum x^2) + eps, so dn/dx = x * box^T(grad_n / n).
            ones = share.new_ones(groups, 1, *weight.shape[2:])
            extra = output_padding(x.shape[2:], weight.shape[2:], stride, padding, dilation)
            spread = F.conv_transpose2d(share, ones, None, stride, padding, extra, groups, dilation)
    grad_x, grad_w, grad_b = torch.ops.aten.convolution_backward(
        grad_z,
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
    if spread is not None:
        grad_x = torch.addcmul(grad_x, _align(spread, x, 1), x).to(x.dtype)
    return grad_x, grad_w, grad_b, grad_exponent


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float | Tensor,
    eps: float,
    needs: Sequence[bool],
    square_response: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`linear` for x, weight, bias and a tensor B, through the row norm too.

    ``square_response`` takes the place of :func:`square_row_response_grad`.
    """
    spread = grad_exponent = None
    grad_z = grad
    if isinstance(b, Tensor) or b != 1:
        if isinstance(b, Tensor) or b != 2:
            n = row_norm(x, eps)
            grad_z, grad_n, grad_exponent = grad_response(grad, F.linear(x, weight, bias), n, b, -1)
            spread = _over_length(grad_n, n, eps)
        else:
            grad_z, spread = (square_response or square_row_response_grad)(grad, x, y, eps)
    grad_x = grad_w = grad_b = None
    flat = grad_z.reshape(-1, weight.shape[0])
    if needs[0]:
        grad_x = F.linear(grad_z, weight.t())
        if spread is not None:
            grad_x = torch.addcmul(grad_x, spread, x).to(x.dtype)
    if needs[1]:
        grad_w = flat.t() @ x.reshape(-1, weight.shape[1])
    if needs[2] and bias is not None:
        grad_b = flat.sum(0)
    return grad_x, grad_w, grad_b, grad_exponent


# --- the fused forms: the whole of what one kernel does, as the engines call it --------------------------------------


def activation_gate(u: Tensor, activation: str) -> Tensor:
    """Gate ``g`` with ``act(u) = g u``, shape and dtype of ``u``; 0 at 0 for the ReLUs."""
    if activation == "relu":
        return (u > 0).to(u.dtype)
    if activation == "relu6":
        return torch.where(u > 0, torch.where(u < 6, torch.ones_like(u), 6 / u), torch.zeros_like(u))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(u * math.sqrt(0.5)))
    if activation == "silu":
        return torch.sigmoid(u)
    if activation == "hardswish":
        return (u + 3).clamp(0, 6) / 6
    return torch.ones_like(u)


def pack_mask(on: Tensor) -> Tensor:
    """bool [..., C] -> uint8 [..., ceil(C / 8)]: bit i of byte j is channel 8 j + i."""
    bits = torch.unflatten(F.pad(on.to(torch.int32), (0, -on.shape[-1] % 8)), -1, (-1, 8))
    weights = torch.arange(8, device=on.device, dtype=torch.int32)
    return torch.bitwise_left_shift(bits, weights).sum(-1).to(torch.uint8)


def unpack_mask(packed: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`pack_mask`: uint8 [..., ceil(C / 8)] -> bool [..., C]."""
    bits = (packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten(-2)[..., :channels].bool()


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels-last memory, a copy only if it is not (torch's flag is ambiguous for C = 1 or 1 x 1)."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def map_entries(channels: int) -> int:
    """Entries of the sum-of-squares map for a group of ``channels``."""
    return -(-channels // MAP_COLUMNS)


def square_sum(x: Tensor, groups: int = 1) -> Tensor:
    """Channel sums of squares per group, [N, C, H, W] -> [N, groups, H, W] in float32 (float64 for float64 input)."""
    wide = x.to(norm_dtype(x))
    return channels_last(torch.unflatten(wide * wide, 1, (groups, x.shape[1] // groups)).sum(2))


def _epilogue(
    z: Tensor,
    n: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    b: float,
    activation: str,
    dtype: torch.dtype,
    wants: tuple[bool, bool, bool],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything after ``z``, channels in the last dimension; computed in ``z``'s dtype, rounded to ``dtype``."""
    s = torch.ones_like(z)
    if n is not None:
        s = z.abs() / n
        if b != 2:
            s = (s + POWER_EPS).pow(b - 1)
    if scale is not None:
        s = s * scale.to(z.dtype)
    u = z * s
    if shift is not None:
        u = u + shift.to(z.dtype)
    if residual is not None:
        u = u + residual.to(z.dtype)
    gate = activation_gate(u, activation)
    y = (u.relu() if activation == "relu" else u * gate).to(dtype)
    nothing = y.new_empty(0)
    want_multiplier, want_gate, want_squares = wants
    multiplier = (s * gate).to(dtype) if want_multiplier else nothing
    gate_out = nothing
    if want_gate and activation != "none":
        gate_out = pack_mask(u > 0) if activation == "relu" else gate.to(dtype)
    squares = nothing
    if want_squares:
        wide = y.to(norm_dtype(y))
        per_group = torch.unflatten(wide * wide, -1, (groups, y.shape[-1] // groups))
        padded = F.pad(per_group, (0, -per_group.shape[-1] % MAP_COLUMNS))
        squares = torch.unflatten(padded, -1, (-1, MAP_COLUMNS)).sum(-1).flatten(-2)
    return y, multiplier, gate_out, squares


def conv2d_fused(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    b: float = 2.0,
    eps: float = CONV_EPS,
    activation: str = "none",
    want_multiplier: bool = False,
    want_gate: bool = False,
    want_squares: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A convolution with its whole epilogue; see :func:`bcos_rt.kernels.ops.conv2d_fused`."""
    wide = norm_dtype(x)
    z = F.conv2d(
        x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), stride, padding, dilation, groups
    )
    n = None
    depthwise = groups == x.shape[1] and groups > 1
    if b != 1:
        if squares is None or squares.numel() == 0 or depthwise:
            box = square_sum(x, groups)
        else:
            box = torch.unflatten(squares.to(wide), 1, (groups, squares.shape[1] // groups)).sum(2)
        n = (_patch_square_sum(box, weight.shape[2:], stride, padding, dilation) + eps).sqrt()
        n = n.repeat_interleave(weight.shape[0] // groups, 1).permute(0, 2, 3, 1)
    outs = _epilogue(
        z.permute(0, 2, 3, 1).contiguous(), n, scale, shift,
        None if residual is None else residual.permute(0, 2, 3, 1), b, activation, x.dtype,
        (want_multiplier, want_gate, want_squares), 1 if depthwise else groups,
    )  # fmt: skip
    y, multiplier, gate, out_squares = (t.permute(0, 3, 1, 2) if t.ndim == 4 else t for t in outs)
    return y, multiplier, gate, out_squares


def linear_fused(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    b: float = 2.0,
    eps: float = LINEAR_EPS,
    activation: str = "none",
    want_multiplier: bool = False,
    want_gate: bool = False,
    want_squares: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A linear layer with its whole epilogue; see :func:`bcos_rt.kernels.ops.linear_fused`."""
    wide = norm_dtype(x)
    z = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    n = None
    if b != 1:
        if squares is None or squares.numel() == 0:
            n = row_norm(x, eps)
        else:
            n = squares.to(wide).sum(-1, keepdim=True).sqrt() + eps
    wants = (want_multiplier, want_gate, want_squares)
    return _epilogue(z, n, scale, shift, residual, b, activation, x.dtype, wants, 1)


def per_row(factor: Tensor, rows: int) -> Tensor:
    """A forward value repeated to the rows of an adjoint: K classes of each image, class fastest."""
    return factor if factor.shape[0] == rows else factor.repeat_interleave(rows // factor.shape[0], 0)


def transposed_rows(
    total: Tensor,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``G = total + identity``; ``(G * multiplier, G * gate)``, channels last in memory order; empty if not wanted.

    ``gate`` is a bit mask where its dtype is uint8. All arguments [..., C] with rows first.
    """
    if identity is not None:
        total = total + identity.to(total.dtype)
    out = total if multiplier is None else total * per_row(multiplier, total.shape[0]).to(total.dtype)
    raw = total.new_empty(0)
    if want_raw:
        raw = total
        if gate is not None:
            wide = unpack_mask(gate, total.shape[-1]) if gate.dtype == torch.uint8 else gate
            raw = total * per_row(wide, total.shape[0]).to(total.dtype)
        if raw is out:
            raw = raw.clone()
    return out.to(dtype), raw.to(dtype)


def conv2d_transposed(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
) -> tuple[Tensor, Tensor]:
    """The adjoint of a convolution with its epilogue; see :func:`bcos_rt.kernels.ops.conv2d_transposed`."""
    wide = norm_dtype(grad)
    total = _conv_adjoint(grad.to(wide), weight.to(wide), input_size, stride, padding, dilation, groups)

    def last(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.permute(0, 2, 3, 1)

    outs = transposed_rows(
        total.permute(0, 2, 3, 1).contiguous(), last(multiplier), last(identity), last(gate), want_raw, grad.dtype
    )
    out, raw = (t.permute(0, 3, 1, 2) if t.ndim == 4 else t for t in outs)
    return out, raw


def _conv_adjoint(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    extra = [
        input_size[i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i])
        - dilation[i] * (weight.shape[2 + i] - 1) - 1
        for i in range(2)
    ]  # fmt: skip
    # torch wants the extra rows below the stride; more are places that no patch covers: zeros.
    inside = [min(e, s - 1) for e, s in zip(extra, stride, strict=True)]
    out = F.conv_transpose2d(grad, weight, None, tuple(stride), tuple(padding), inside, groups, tuple(dilation))
    return F.pad(out, (0, extra[1] - inside[1], 0, extra[0] - inside[0]))


def linear_transposed(
    grad: Tensor,
    weight: Tensor,
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
) -> tuple[Tensor, Tensor]:
    """The adjoint of a linear layer with its epilogue; see :func:`bcos_rt.kernels.ops.linear_transposed`."""
    wide = norm_dtype(grad)
    total = grad.to(wide) @ weight.to(wide)
    return transposed_rows(total, multiplier, identity, gate, want_raw, grad.dtype)


def conv2d_contributions(
    grad: Tensor,
    weight: Tensor,
    image: Tensor,
    inverse_std: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    scale: float = 1.0,
    want_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The last step of an explanation; see :func:`bcos_rt.kernels.ops.conv2d_contributions`."""
    channels = inverse_std.numel()
    wide = norm_dtype(grad)
    total = _conv_adjoint(grad.to(wide), weight[:, :channels].to(wide), image.shape[2:], stride, padding, dilation, 1)
    weights, contributions, colour = image_contributions(total, image, inverse_std, scale, want_weights)
    return weights, contributions, colour


def image_contributions(
    grad: Tensor, image: Tensor, inverse_std: Tensor, scale: float = 1.0, want_weights: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """What an explanation is made of, from the adjoint of the normalised image; see :mod:`bcos_rt.kernels.ops`."""
    channels = inverse_std.numel()
    wide = norm_dtype(grad)
    weights = grad[:, :channels].to(wide) * (inverse_std.to(wide) * scale)[:, None, None]
    x = image.to(wide) / 255 if image.dtype == torch.uint8 else image.to(wide)
    encoded = torch.cat([x, 1 - x], 1) if channels == 6 else x
    contributions = (weights * per_row(encoded, grad.shape[0])).sum(1)
    colour = weights.new_empty(0)
    if channels == 6:
        # The per-pixel terms of the colour picture (bcos_rt/explanation/picture.py).
        direction = (weights / (weights.abs().amax(1, keepdim=True) + COLOUR_EPS)).clamp(min=0)
        rgb = direction[:, :3] / (direction[:, :3] + direction[:, 3:] + COLOUR_EPS)
        alpha = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
        alpha = torch.where(contributions[:, None] < 0, torch.full_like(alpha, COLOUR_EPS), alpha)
        colour = torch.cat([rgb, alpha], 1)
    return (weights.contiguous() if want_weights else weights.new_empty(0)), contributions, colour


# --- attention -------------------------------------------------------------------------------------------------------


def _attention_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``scale q k^T + mask``, [N, H, T, S] in at least float32."""
    wide = norm_dtype(query)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    return scores if mask is None else scores + mask.to(wide)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``out = P v`` with ``P = softmax(scale q k^T + mask)`` over the keys, and the softmax's log-sum-exp.

    Args:
        query: [N, H, T, D]. key: [N, H, S, D]. value: [N, H, S, E].
        mask: what is added to the scores, any floating point that broadcasts to [N, H, T, S]; -inf shuts a key out.

    Returns:
        out [N, H, T, E], in memory [N, T, H, E] (which is how the next layer reads it); lse [N, H, T] in float32
        (float64 for float64 input): ``P = exp(scale q k^T + mask - lse)``. Where every key is shut out, both are 0, and
        so is P (as in ``scaled_dot_product_attention``).
    """
    scores = _attention_scores(query, key, mask, scale)
    lse = scores.logsumexp(-1)
    lse = torch.where(lse == -math.inf, torch.zeros_like(lse), lse)
    out = (scores - lse[..., None]).exp() @ value.to(scores.dtype)
    return out.to(value.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_transposed(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The adjoint of :func:`attention` in its values, ``P^T grad``, the softmax held constant.

    Args:
        grad: [N K, H, T, E], K gradients of each image, the class fastest.
        query, key, mask, scale: as :func:`attention` had them. lse: what it returned.

    Returns:
        [N K, H, S, E], dtype of ``grad``.
    """
    probabilities = (_attention_scores(query, key, mask, scale) - lse[..., None]).exp()
    wide = torch.promote_types(norm_dtype(grad), probabilities.dtype)
    per_class = per_row(probabilities.to(wide), grad.shape[0])
    return (per_class.transpose(-2, -1) @ grad.to(wide)).to(grad.dtype)

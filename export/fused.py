"""Ops the export passes introduce. Each is its own definition in PyTorch, so a rewritten graph still runs there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "bcos_conv2d",
    "class_channel",
    "class_row",
    "colour_picture",
    "encode_image",
    "mean_patch_norm",
    "scale",
]


def encode_image(image: Tensor) -> Tensor:
    """``[x, 1 - x]``: [N, 3, H, W] -> [N, 6, H, W]."""
    return torch.cat([image, 1 - image], 1)


def scale(x: Tensor, factor: float) -> Tensor:
    """``x`` times a number (fp16's seed scaling; a node of its own, so that nothing folds it away)."""
    return x * factor


def class_channel(values: Tensor, class_ids: Tensor) -> Tensor:
    """The channel of each row's class: [R, classes, ...] and [R, 1] -> [R, 1, ...]."""
    rows = torch.arange(len(values), device=values.device)
    return values[rows, class_ids[:, 0]].unsqueeze(1)


def class_row(weight: Tensor, class_ids: Tensor) -> Tensor:
    """The weights of each row's class: [classes, I, ...] and [R, 1] -> [R, I, ...]."""
    return weight[class_ids[:, 0]]


def mean_patch_norm(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    """A patch's norm over the root of the kernel's area A: ``sqrt(box_mean(sum_c x_c^2) + eps)``, eps given over A."""
    n, _, height, width = x.shape
    squares = x.square().reshape(n, groups, -1, height, width).sum(2)
    ones = squares.new_full((groups, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]))
    mean = F.conv2d(squares, ones, None, tuple(stride), tuple(padding), tuple(dilation), groups)
    return (mean + eps).sqrt()


def bcos_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float,
    eps: float,
    delta: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """B-cos convolution whose weights hold the norm's scale and the kernel's area.

    ``y = z m``, ``m = (|z| / n + delta)^(B-1)``, ``n`` by :func:`mean_patch_norm`; with ``relu`` (B = 2 only) z is
    replaced by ``relu(z)``, which gives ``relu(y)`` and ``m`` times its gate.

    Returns:
        y and m, [N, O, H', W'].
    """
    z = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    n = mean_patch_norm(x, weight.shape[2:], stride, padding, dilation, groups, eps)
    if groups not in (1, z.shape[1]):
        n = n.repeat_interleave(z.shape[1] // groups, 1)
    if relu:
        z = z.relu()
    m = z.abs() / n
    if b != 2:
        m = (m + (delta if delta is not None else 0.0)) ** (b - 1)
    return z * m, m


def colour_picture(weights: Tensor, contributions: Tensor) -> Tensor:
    """The colour explanation of W [N(, K), 6, H, W] and its contributions [N(, K), H, W]: [N(, K), H, W, 4].

    That of :func:`bcos_rt.explanation.colour_picture` with its defaults (15 pixels, 99.5 %).
    """
    tiny = 1e-12
    w, c = weights.flatten(0, -4), contributions.flatten(0, -3)[:, None]
    positive = (w / (w.abs().amax(1, keepdim=True) + tiny)).clamp(min=0)
    colour = positive[:, :3] / (positive[:, :3] + positive[:, 3:] + tiny)
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    alpha = F.avg_pool2d(torch.where(c < 0, torch.full_like(norm, tiny), norm), 15, 1, 7)
    top = torch.quantile(alpha.flatten(1), 0.995, dim=1)[:, None, None, None]
    alpha = (alpha / top.clamp(min=torch.finfo(alpha.dtype).tiny)).clamp(0, 1)
    rgba = torch.cat([colour, alpha], 1).permute(0, 2, 3, 1)
    return rgba.reshape(*weights.shape[:-3], *rgba.shape[1:])

"""A residual block, forward and explained, and every op once: for CUDA graphs and for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bcos_rt.kernels import ops, reference

__all__ = ["Block", "every_op"]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=generator)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


class Block:
    """The first block of a ResNet's stage (stride 2, projection), with the explanation of K classes through it.

    ``run(kernels)`` returns [y, its map of squares, gradient of x], on ``device`` in ``dtype``; ``kernels`` has the
    fused ops as attributes (``bcos_rt.kernels.ops``, or ``reference`` for what they must compute).
    """

    def __init__(self, device: str, dtype: torch.dtype, channels: int = 16, size: int = 9, classes: int = 2) -> None:
        generator = torch.Generator().manual_seed(0)
        c, o = channels, 2 * channels
        half = (size + 1) // 2
        self.x = _normal(generator, 2, c, size, size).to(device, dtype)
        shapes = ((o, c, 3, 3), (o, o, 3, 3), (o, c, 1, 1))
        self.weights = [
            (_normal(generator, *shape) / (shape[1] * shape[2] * shape[3]) ** 0.5).to(device, dtype) for shape in shapes
        ]
        self.scales = [(1 + 0.5 * _normal(generator, o)).to(device) for _ in shapes]
        self.shifts = [(0.1 * _normal(generator, o)).to(device) for _ in shapes]
        self.grad = _normal(generator, 2 * classes, o, half, half).to(device, dtype)
        self.classes = classes

    def double(self) -> Block:
        """A copy in float64 on the CPU."""
        other = Block.__new__(Block)
        other.x, other.grad, other.classes = self.x.cpu().double(), self.grad.cpu().double(), self.classes
        for name in ("weights", "scales", "shifts"):
            setattr(other, name, [t.cpu().double() for t in getattr(self, name)])
        return other

    def run(self, kernels: Any = ops) -> list[Tensor]:
        """Forward and explanation."""
        first, second, projection = (
            {"scale": scale, "shift": shift} for scale, shift in zip(self.scales, self.shifts, strict=True)
        )
        w1, w2, wp = self.weights
        wants = {"want_multiplier": True, "want_gate": True, "want_squares": True}
        squares = kernels.square_sum(self.x)
        a, m1, _, a_squares = kernels.conv2d_fused(
            self.x, w1, squares, stride=(2, 2), padding=(1, 1), activation="relu", **first, **wants
        )
        p, mp, *_ = kernels.conv2d_fused(self.x, wp, squares, stride=(2, 2), want_multiplier=True, **projection)
        y, m2, gate, y_squares = kernels.conv2d_fused(
            a, w2, a_squares, residual=p, padding=(1, 1), activation="relu", **second, **wants
        )

        def per_class(value: Tensor) -> Tensor:
            return value.repeat_interleave(self.classes, 0)

        open_gate = reference.unpack_mask(gate.permute(0, 2, 3, 1), y.shape[1]).permute(0, 3, 1, 2)
        to_a, _ = kernels.conv2d_transposed(
            self.grad * per_class(m2), w2, a.shape[2:], (1, 1), (1, 1), (1, 1), 1, multiplier=m1
        )
        through_projection, _ = kernels.conv2d_transposed(
            self.grad * per_class(open_gate * mp), wp, self.x.shape[2:], (2, 2), (0, 0), (1, 1), 1
        )
        to_x, _ = kernels.conv2d_transposed(
            to_a, w1, self.x.shape[2:], (2, 2), (1, 1), (1, 1), 1, identity=through_projection
        )
        return [y, y_squares, to_x]


def every_op(device: str, dtype: torch.dtype, kernels: Any = ops) -> dict[str, Callable[[], Any]]:
    """Name -> a call of each op at sizes that divide no tile."""
    k = kernels
    g = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> Tensor:
        return _normal(g, *shape).to(device, dtype)

    def parameter(*shape: int) -> Tensor:
        return _normal(g, *shape).to(device)

    x, w, tokens, wl = tensor(2, 24, 7, 5), tensor(40, 24, 3, 3), tensor(2, 5, 24), tensor(40, 24)
    wg, wd = tensor(40, 6, 3, 3), tensor(24, 1, 3, 3)
    grad, grad_tokens = tensor(4, 40, 4, 3), tensor(4, 5, 40)
    scale, shift, one_per_channel = parameter(40), parameter(40), parameter(24)
    stride, padding, dilation = (2, 2), (1, 1), (1, 1)
    wants = {"want_multiplier": True, "want_gate": True, "want_squares": True}
    image = torch.rand(2, 3, 9, 7, generator=g).to(device)
    stem, six = tensor(16, 6, 3, 3), torch.full((6,), 0.5, device=device)

    def trained(op: Callable[..., Tensor], value: Tensor, weight: Tensor, **settings: Any) -> tuple[Tensor, ...]:
        value, weight = value.detach().requires_grad_(), weight.detach().requires_grad_()
        y = op(value, weight, **settings)
        return torch.autograd.grad(y, (value, weight), torch.ones_like(y))

    def pooled() -> Any:
        y, index, _ = k.max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), want_index=True, want_squares=True)
        return k.max_pool2d_transposed(y, index, x.shape[2:], (3, 3), (2, 2), (1, 1), (1, 1))

    def averaged() -> Any:
        y, _ = k.avg_pool2d(x, (3, 3), (2, 2), (1, 1), want_squares=True)
        return k.avg_pool2d_transposed(y, x.shape[2:], (3, 3), (2, 2), (1, 1), False, True)

    def layer_normed() -> Any:
        y, rstd, _ = k.layer_norm(tokens, one_per_channel, one_per_channel, 1e-6, want_squares=True)
        return k.layer_norm_transposed(y, rstd, one_per_channel)

    def group_normed() -> Any:
        y, rstd, _ = k.group_norm(x, 4, one_per_channel, one_per_channel, 1e-5, want_squares=True)
        return k.group_norm_transposed(y, rstd, one_per_channel, 4)

    def attended() -> Any:
        # Queries, keys and values as one projection gives them; two classes of each image; a mask for each head.
        query, key, value = tensor(2, 50, 3, 3, 24).permute(2, 0, 3, 1, 4).unbind(0)
        mask = parameter(3, 50, 50)
        out, lse = k.attention(query, key, value, mask, 0.2)
        back = k.attention_transposed(tensor(4, 50, 3, 24).transpose(1, 2), query, key, lse, mask, 0.2)
        return out, lse, back

    calls: dict[str, Callable[[], Any]] = {
        "attention": attended,
        "square_sum": lambda: k.square_sum(x, 4),
        "conv2d_fused grouped": lambda: k.conv2d_fused(
            x, wg, None, stride=stride, padding=padding, groups=4, activation="silu", **wants
        ),
        "conv2d_fused depthwise": lambda: k.conv2d_fused(
            x, wd, None, stride=stride, padding=padding, groups=24, activation="relu6", **wants
        ),
        "conv2d_transposed": lambda: k.conv2d_transposed(
            grad, w, (7, 5), stride, padding, dilation, 1, multiplier=x, identity=None, gate=x, want_raw=True
        ),
        "conv2d_transposed depthwise": lambda: k.conv2d_transposed(
            tensor(4, 24, 4, 3), wd, (7, 5), stride, padding, dilation, 24, multiplier=x
        ),
        "linear_transposed": lambda: k.linear_transposed(grad_tokens, wl, multiplier=tokens),
        "conv2d_contributions": lambda: k.conv2d_contributions(
            tensor(4, 16, 5, 4), stem, image, 1 / six, stride, padding, dilation, want_weights=True
        ),
        "encode_image": lambda: k.encode_image(image, six, six, dtype=dtype),
        "max_pool2d": pooled,
        "avg_pool2d": averaged,
        "scale_act": lambda: k.scale_act(x, one_per_channel, one_per_channel, "relu", want_squares=True),
        "scale_act_transposed": lambda: k.scale_act_transposed(x, x, one_per_channel, one_per_channel, "relu"),
        "layer_norm": layer_normed,
        "group_norm": group_normed,
        "conv2d, training": lambda: trained(k.conv2d, x, w, stride=stride, padding=padding),
        "linear, training": lambda: trained(k.linear, tokens, wl),
    }
    for activation in ("none", "relu", "relu6", "gelu", "silu", "hardswish"):
        for b in (1.0, 1.5, 2.0):
            settings: dict[str, Any] = {"scale": scale, "shift": shift, "activation": activation, "b": b, **wants}
            calls[f"conv2d_fused {activation} B={b}"] = partial(
                k.conv2d_fused, x, w, stride=stride, padding=padding, **settings
            )
            calls[f"linear_fused {activation} B={b}"] = partial(k.linear_fused, tokens, wl, **settings)
    return calls

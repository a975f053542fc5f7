"""A small residual network and its explanation written out in fused ops, as an engine would call them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify
from bcos_rt.kernels import ops

CLASSES = 2  # explained at one forward pass


class Residual(nn.Module):
    """Stem, max-pool, a block with a strided shortcut, a depthwise block, head: every kind of edge a fused op has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24)
        self.shortcut, self.norm3 = nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.norm4 = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        main = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        x = (main + self.norm3(self.shortcut(x))).relu()
        x = self.norm4(self.depthwise(x)).relu()
        return self.head(self.average(x).flatten(1))


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The B-cos network, B = 2, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    net, _ = bcosify(Residual(), Recipe(head="after_pool", stem_pool="keep", logit_bias=None))
    net = net.eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.to(dtype)


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    return (norm.weight * (norm.running_var + norm.eps).rsqrt()).detach().float()


def explain_fused(net: nn.Module, images: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Logits [N, 5], W [N * K, 6, H, W], contributions [N * K, H, W] and colours of ``targets`` [N, K]."""
    body = net.backbone
    weights = {name: m.weight.detach().to(dtype) for name, m in body.named_modules() if hasattr(m, "weight")}
    scales = {name: _scale(m) for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
    mean, std = net.encoding.mean.flatten().float(), net.encoding.std.flatten().float()
    one, same, two = (1, 1), (1, 1), (2, 2)

    x, squares = ops.encode_image(images, mean, std, True, dtype)
    stem = torch.nn.functional.pad(weights["stem"], (0, 0, 0, 0, 0, 2))
    y0, m0, _, _ = ops.conv2d_fused(
        x, stem, squares, scale=scales["norm"], stride=two, padding=(3, 3), activation="relu", want_multiplier=True
    )
    pooled, index, squares = ops.max_pool2d(y0, (3, 3), two, one, one, want_index=True, want_squares=True)
    y1, m1, _, squares1 = ops.conv2d_fused(
        pooled, weights["conv1"], squares, scale=scales["norm1"], stride=two, padding=same, activation="relu",
        want_multiplier=True, want_squares=True,
    )  # fmt: skip
    side, side_m, _, _ = ops.conv2d_fused(
        pooled, weights["shortcut"], squares, scale=scales["norm3"], stride=two, want_multiplier=True
    )
    y2, m2, gate, squares2 = ops.conv2d_fused(
        y1, weights["conv2"], squares1, scale=scales["norm2"], residual=side, padding=same, activation="relu",
        want_multiplier=True, want_gate=True, want_squares=True,
    )  # fmt: skip
    y3, m3, _, _ = ops.conv2d_fused(
        y2, weights["depthwise"], squares2, scale=scales["norm4"], padding=same, groups=24, activation="relu",
        want_multiplier=True,
    )  # fmt: skip
    size = tuple(y3.shape[2:])
    average, squares3 = ops.avg_pool2d(y3, size, size, (0, 0), want_squares=True)
    logits, head_m, _, _ = ops.linear_fused(
        average.flatten(1), weights["head"], squares3.flatten(1), want_multiplier=True
    )

    n, k = targets.shape
    seed = torch.zeros(n * k, 5, dtype=dtype, device=images.device)
    seed.scatter_(1, targets.reshape(-1, 1), 1)
    seed = seed * head_m.repeat_interleave(k, 0)
    grad, _ = ops.linear_transposed(seed, weights["head"])
    grad, _ = ops.avg_pool2d_transposed(grad[:, :, None, None], size, size, size, (0, 0), False, True, multiplier=m3)
    # Below the depthwise layer is a block's edge: m for its main branch, the gate for its shortcut.
    grad, raw = ops.conv2d_transposed(
        grad, weights["depthwise"], size, one, same, one, 24, multiplier=m2, gate=gate, want_raw=True
    )
    grad, _ = ops.conv2d_transposed(grad, weights["conv2"], size, one, same, one, 1, multiplier=m1)
    below = tuple(pooled.shape[2:])
    side_grad, _ = ops.conv2d_transposed(
        (raw.unflatten(0, (n, k)) * side_m[:, None]).flatten(0, 1), weights["shortcut"], below, two, (0, 0), one, 1
    )
    grad, _ = ops.conv2d_transposed(grad, weights["conv1"], below, two, same, one, 1, identity=side_grad)
    grad, _ = ops.max_pool2d_transposed(grad, index, y0.shape[2:], (3, 3), two, one, one, multiplier=m0)
    w, contributions, colour = ops.conv2d_contributions(
        grad, weights["stem"], images, 1 / std, two, (3, 3), one, 1.0, True
    )
    return logits, w, contributions, colour

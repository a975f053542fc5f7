"""Small networks with every kind of edge a fusion pass looks at, B-cosified, with statistics that are not initial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bcos_rt import BcosNetwork, Recipe, bcosify
from tests.kernels.chain import Residual


class Dense(nn.Module):
    """Pre-activation layers over a growing concatenation, a transition, max-pool at the stem (DenseNet's shape)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = (8, 12, 16)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, 1, 1, bias=False) for width in widths)
        self.norm1, self.transition = nn.BatchNorm2d(20), nn.Conv2d(20, 12, 1, bias=False)
        self.average = nn.AvgPool2d(2, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.pool(self.norm0(self.stem(x)).relu())]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(norm(torch.cat(features, 1)).relu()))
        x = self.average(self.transition(self.norm1(torch.cat(features, 1)).relu()))
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):
    """An asymmetric padding, depthwise and grouped layers, ReLU6, a linear bottleneck, a gate branch, a 1x1 head."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem, self.norm0 = nn.Conv2d(3, 12, 3, 2, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm1 = nn.Conv2d(12, 12, 5, 1, 2, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project, self.norm2 = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.grouped, self.norm3 = nn.Conv2d(12, 18, 3, 2, 2, dilation=2, groups=3, bias=False), nn.BatchNorm2d(18)
        self.hidden, self.head = nn.Linear(18, 7), nn.Linear(7, 4)
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm0(self.stem(self.pad(x))))
        y = nn.functional.relu6(self.norm1(self.depthwise(x)))
        y = y * torch.sigmoid(self.excite(self.squeeze(self.average(y)).relu()))
        x = x + self.norm2(self.project(y))
        x = nn.functional.hardswish(self.norm3(self.grouped(x)))
        return self.head(nn.functional.gelu(self.hidden(self.average(x).flatten(1))))


class Tokens(nn.Module):
    """Layer norms, attention with packed projections in both usual forms, an MLP on tokens and on windows of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.packed = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.up, self.down, self.head = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 5)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norms[2](x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.packed[0](self.norms[0](x)).chunk(3, -1))
        attended = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.projections[0](attended)
        q, k, v = self.packed[1](self.norms[1](x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.projections[1](attended)
        x = x + self.mlp(x)
        windows = x.reshape(-1, 4, 8)
        windows = windows + self.mlp(windows)
        return self.head(self.norms[3](windows.reshape(-1, x.shape[1], 8)).mean(1))


NETWORKS = {"residual": Residual, "dense": Dense, "inverted": Inverted, "tokens": Tokens}
RECIPES = {
    "default": Recipe(),
    "kept": Recipe(biases="keep", batch_norm="keep", stem_pool="keep", head="after_pool", b=1.5, logit_temperature=2.0),
    "plain": Recipe.equivalent(),
    "three channels": Recipe(input_encoding="three_channel", b=2.5),
}


def network(name: str, recipe: str = "default") -> BcosNetwork:
    """A network of :data:`NETWORKS`, seeded, float32."""
    torch.manual_seed(3)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    net, _ = bcosify(model, RECIPES[recipe])
    return net.eval()

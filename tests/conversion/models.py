"""Seeded source models of every supported architecture, and small networks with one oddity each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

# Smallest convenient image sizes; weights are random, the norms' statistics too.
MODELS = {
    "torchvision:resnet18": (64, 75),
    "torchvision:resnet34": (64, 64),
    "torchvision:resnet50": (64, 64),
    "torchvision:resnet101": (64, 64),
    "torchvision:resnext50_32x4d": (64, 64),
    "torchvision:wide_resnet50_2": (64, 64),
    "torchvision:densenet121": (64, 64),
    "torchvision:vgg11_bn": (64, 64),
    "torchvision:mobilenet_v2": (75, 64),
    "torchvision:efficientnet_b0": (64, 64),
    "torchvision:regnet_y_400mf": (64, 64),
    "torchvision:convnext_tiny": (64, 64),
    "timm:resnet18": (64, 64),
    "timm:resnet50": (64, 64),
    "timm:tf_efficientnet_lite0": (75, 64),
}


def build(name: str, classes: int = 11) -> nn.Module:
    """The named architecture with random weights and statistics, in eval mode."""
    kind, _, architecture = name.partition(":")
    torch.manual_seed(3)
    if kind == "timm":
        model: nn.Module = pytest.importorskip("timm").create_model(architecture, num_classes=classes)
    else:
        model = torchvision.models.get_model(architecture, num_classes=classes)
    return randomise(model)


def randomise(model: nn.Module) -> nn.Module:
    """Give norms statistics, scales and biases that are not 0 and 1; eval mode."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=g))
            elif name.endswith("running_mean"):
                value.copy_(0.3 * torch.randn(value.shape, generator=g))
            elif value.ndim == 1 and name.endswith("bias"):
                value.copy_(0.1 * torch.randn(value.shape, generator=g))
            elif value.ndim == 1:
                value.copy_(0.5 + torch.rand(value.shape, generator=g))
    return model.eval()


def images(size: tuple[int, int] = (32, 32), n: int = 2) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """conv, norm, ReLU, then ``middle``, then pool, flatten, dropout, linear; parts can be replaced."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.middle = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)
        for name, part in parts.items():
            setattr(self, name, part)

    def features(self, x: Tensor) -> Tensor:
        return self.middle(self.act(self.norm(self.conv(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(torch.flatten(self.pool(self.features(x)), 1)))


def with_forward(forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> nn.Module:
    """A :class:`Net` with another forward."""
    cls = type("CustomNet", (Net,), {"forward": forward})
    torch.manual_seed(0)
    return randomise(cls(**parts))


def net(**parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(**parts))


class Gate(nn.Module):
    """Squeeze-and-excite, written with functions."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.norm(self.reduce(x.mean((2, 3), keepdim=True)))))
        return torch.sigmoid(gate).expand_as(x) * x


class Branching(nn.Module):
    """A block that cannot be traced: its control flow depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y if y.sum() > 0 else y + 1

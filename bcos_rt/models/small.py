"""Small conventional networks for images of 32 x 32 pixels, ``small:NAME``; what an experiment on CPUs can train."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bcos_rt.models.simple_vit import SimpleViT

__all__ = ["SMALL_MEAN", "SMALL_NETWORKS", "SMALL_STD", "SmallResNet", "small_densenet", "small_resnet", "small_vit"]

# CIFAR-10's training images, RGB in [0, 1].
SMALL_MEAN = (0.4914, 0.4822, 0.4465)
SMALL_STD = (0.2470, 0.2435, 0.2616)


class _Block(nn.Module):
    """Two 3 x 3 convolutions and the shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(x)) + shortcut)
        return out


def _stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = _Block(channels_in, channels, stride)
    return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))


class SmallResNet(nn.Module):
    """The residual network for CIFAR of He et al. 2016 (arXiv 1512.03385, section 4.2), 6n + 2 layers.

    Shortcuts that change the shape are 1 x 1 convolutions with a norm (their option B), as in ImageNet's ResNets.

    Args:
        blocks: n, blocks in each of the three stages.
        width: channels of the first stage; doubled twice.
        num_classes: logits.
        stem_pool: a 3 x 3 max-pool of stride 2 behind the stem, as in ImageNet's ResNets.
    """

    def __init__(self, blocks: int = 3, width: int = 16, num_classes: int = 10, stem_pool: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_pool else None
        self.layer1 = _stage(blocks, width, width, 1)
        self.layer2 = _stage(blocks, width, 2 * width, 2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def small_resnet(blocks: int = 3, width: int = 16, stem_pool: bool = False) -> Callable[[int], nn.Module]:
    """A constructor of :class:`SmallResNet` by number of classes."""
    return lambda num_classes: SmallResNet(blocks, width, num_classes, stem_pool)


class _SmallDenseNet(torchvision.models.DenseNet):  # type: ignore[misc]
    """torchvision's DenseNet behind a 3 x 3 stem without pooling."""

    def __init__(self, growth: int, blocks: tuple[int, ...], num_classes: int) -> None:
        super().__init__(growth, blocks, 2 * growth, num_classes=num_classes)
        stem: OrderedDict[str, nn.Module] = OrderedDict(self.features.named_children())
        for name in ("norm0", "relu0", "pool0"):
            del stem[name]
        first = nn.Conv2d(3, 2 * growth, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(first.weight)
        stem["conv0"] = first
        self.features: nn.Sequential = nn.Sequential(stem)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        logits: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))
        return logits


def small_densenet(growth: int = 12, blocks: tuple[int, ...] = (2, 4, 6)) -> Callable[[int], nn.Module]:
    """A constructor of a DenseNet-BC (Huang et al. 2017, arXiv 1608.06993, section 3) for 32 x 32 pixels: by
    default 28 layers, like ImageNet's with more of them the smaller the map is."""
    return lambda num_classes: _SmallDenseNet(growth, blocks, num_classes)


def small_vit(depth: int = 6, dim: int = 96, conv_stem: tuple[int, ...] = ()) -> Callable[[int], nn.Module]:
    """A constructor of a :class:`SimpleViT` with 8 x 8 tokens of 32 x 32 pixels.

    Patches of 4 x 4 pixels; with ``conv_stem``, channels of two strided convolutions of which the last has ``dim``,
    each place of their result.
    """
    return lambda num_classes: SimpleViT(
        patch_size=1 if conv_stem else 4, dim=dim, depth=depth, heads=dim // 32, mlp_dim=2 * dim, conv_stem=conv_stem,
        num_classes=num_classes,
    )  # fmt: skip


SMALL_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": small_resnet(3, 16),
    "resnet20_pool": small_resnet(3, 16, stem_pool=True),
    "resnet20_w32": small_resnet(3, 32),
    "densenet28": small_densenet(12, (2, 4, 6)),
    "vit6": small_vit(6, 96),
    "vitc5": small_vit(5, 96, (48, 96)),
}

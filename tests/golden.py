"""Golden cases: the seeding and image rules of the shared golden files."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bcos_rt.models.simple_vit import SIMPLE_VITS
from tests.conftest import shared_dir

__all__ = ["SEEDS", "golden_images", "golden_model", "load_golden", "seeded", "seeded_values"]

SEEDS = {"resnet18": 11, "densenet121": 12, "simple_vit_ti_patch16_224": 14, "vitc_ti_patch1_14": 15}


def load_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``NAME.npz``; skips the test where the file is missing."""
    with np.load(shared_dir("golden", f"{name}.npz")) as data:
        return dict(data)


def seeded_values(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """New values for every floating-point entry, drawn from one generator in the order of the sorted keys."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for key in sorted(state):
        v = state[key]
        if not v.is_floating_point():
            continue
        if key.endswith("running_mean"):
            new = 0.1 * torch.randn(v.shape, generator=g)
        elif key.endswith("running_var"):
            new = 0.5 + torch.rand(v.shape, generator=g)
        elif v.ndim >= 2:
            new = torch.randn(v.shape, generator=g) * (2 / v[0].numel()) ** 0.5
        elif key.endswith("weight"):
            new = 0.5 + torch.rand(v.shape, generator=g)
        else:
            new = 0.1 * torch.randn(v.shape, generator=g)
        values[key] = new
    return values


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Overwrite a model's state by :func:`seeded_values`; returns the model in eval mode."""
    state = model.state_dict()
    state.update(seeded_values(state, seed))
    model.load_state_dict(state)
    return model.eval()


def golden_model(name: str) -> nn.Module:
    """The standard model of a golden case, seeded, in eval mode."""
    model = SIMPLE_VITS[name](1000) if name in SIMPLE_VITS else torchvision.models.get_model(name)
    return seeded(model, SEEDS[name])


def golden_images(seed: int) -> Tensor:
    """The two images [2, 3, 224, 224] in [0, 1] of a golden case."""
    g = torch.Generator().manual_seed(seed)
    lo = torch.rand(2, 3, 16, 16, generator=g)
    hi = torch.rand(2, 3, 224, 224, generator=g)
    return (0.8 * F.interpolate(lo, size=(224, 224), mode="bilinear", align_corners=False) + 0.2 * hi).clamp(0, 1)

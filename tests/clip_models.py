"""Tiny CLIP models of open_clip, seeded: a ModifiedResNet's and a VisionTransformer's."""

import json

import pytest
import torch

from tests.golden import seeded

SIZE = 64
WIDTH = 24
NAMES = {"resnet": "tiny-clip-resnet", "transformer": "tiny-clip-transformer"}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
_VISION = {
    "resnet": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "transformer": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
}


def register(folder):
    """Make the two known to open_clip."""
    open_clip = pytest.importorskip("open_clip")
    for kind, name in NAMES.items():
        config = {"embed_dim": WIDTH, "vision_cfg": _VISION[kind], "text_cfg": _TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return NAMES


def seeded_weights(name, folder, seed=5):
    """A file of weights for one of them, no tensor at a constant."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(seed)
    model = open_clip.create_model(name, load_weights=False)
    seeded(model.visual, seed)
    path = folder / f"{name}.pt"
    torch.save(model.state_dict(), path)
    return path

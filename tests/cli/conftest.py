"""Small seeded inputs, and the command run inside this process."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bcos_rt import Recipe, bcosify, save
from bcos_rt.cli import app
from bcos_rt.models import load_model

CLASSES = 6


class Invoked:
    """What a command line did: exit code, both streams."""

    def __init__(self, result):
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def bcos():
    """Run ``bcos-rt`` with these arguments."""

    def invoke(*arguments):
        return Invoked(CliRunner().invoke(app, [str(a) for a in arguments]))

    return invoke


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of seeded ResNet-18 weights for six classes."""
    torch.manual_seed(0)
    model = load_model("timm:resnet18", weights="random", num_classes=CLASSES).module
    # As built, every residual branch ends in a norm that multiplies by 0: nothing of an image would reach the logits.
    for key, value in model.state_dict().items():
        if key.endswith(("bn2.weight", "bn2.running_var")):
            value.uniform_(0.5, 1.5)
        elif key == "fc.weight":
            value.normal_()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def checkpoint(weights, tmp_path_factory):
    """A saved B-cos network (B = 2) with class names."""
    source = load_model("timm:resnet18", weights=weights)
    names = ["tabby, tabby cat", "tiger cat", "Egyptian cat", "espresso", "crane", "crane"]
    net, _ = bcosify(source, Recipe(), class_names=names)
    return save(net, tmp_path_factory.mktemp("checkpoint") / "net.safetensors")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two different photos of different shape."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    paths = []
    for name, size in (("one.png", (80, 70)), ("two.jpg", (70, 90))):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
        paths.append(folder / name)
    return paths

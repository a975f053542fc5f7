"""Networks that come with the package."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from bcos_rt import explain, load, packaged
from bcos_rt.errors import CheckpointError
from tests.conftest import shared_dir

NAME = "packaged:cifar10-resnet20"
MEGABYTE = 1_000_000


def test_each_is_small_and_described():
    assert "cifar10-resnet20" in packaged.names()
    for name in packaged.names():
        assert packaged.located(packaged.PREFIX + name).stat().st_size < 2 * MEGABYTE
        about = packaged.about(name)
        assert 0.5 < about["test_top1"] < 1
        assert all(command.startswith("python -m bench.cifar10 run ") for command in about["commands"])


def test_it_explains_completely():
    net = load(NAME)
    assert net.class_names[3] == "cat"
    explanation = explain(net, torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert float(explanation.completeness_error().max()) < 1e-5
    assert float(explanation.contributions.abs().max()) > 0


def test_it_is_as_accurate_as_its_description_says():
    images, labels = [], []
    net = load(NAME)
    with tarfile.open(shared_dir("data", "cifar10-jpeg.tar.gz")) as archive:
        for member in archive:
            path = Path(member.name)  # test/CLASS/NNNN.jpg
            if path.suffix == ".jpg" and path.parts[0] == "test" and int(path.stem) % 10 == 0:
                picture = archive.extractfile(member)
                images.append(pil_to_tensor(Image.open(io.BytesIO(picture.read()))).float() / 255)
                labels.append(net.class_names.index(path.parts[1]))
    assert len(images) == 1000
    with torch.no_grad():
        right = (net(torch.stack(images)).argmax(1) == torch.tensor(labels)).double().mean()
    # A tenth of the test images: three standard deviations of a share of 1000.
    assert abs(float(right) - packaged.about(NAME)["test_top1"]) < 3 * (0.25 / 1000) ** 0.5


def test_names_that_are_none():
    for call in (packaged.located, load, packaged.about):
        with pytest.raises(CheckpointError, match=r"packaged:nothing: no such network; the package holds .*resnet20"):
            call("packaged:nothing")
    assert packaged.located("a/b.safetensors") == Path("a/b.safetensors")
    # No way out of the folder.
    with pytest.raises(CheckpointError, match="no such network"):
        load("packaged:../packaged/cifar10-resnet20")

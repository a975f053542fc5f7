"""bcos-rt evaluate and localise, on a seeded network at 64 pixels; trained networks are in test_train.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bcos_rt import bcosify, save
from bcos_rt.cli.inputs import load_network
from bcos_rt.data import open_data
from bcos_rt.models import load_model
from tests.cli.conftest import CLASSES

SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images in each of six class folders."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for k in range(CLASSES):
        folder = root / f"class{k}"
        folder.mkdir()
        for i in range(3):
            coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture
def model(weights):
    return ("--model", "timm:resnet18", "--weights", weights, "--size", SIZE)


def test_a_conventional_model_as_it_is(bcos, model, weights, data):
    result = bcos("evaluate", *model, "--data", data, "--json")
    assert result.code == 0, result.err
    found = result.json["results"]
    assert (found["images"], found["classes"], found["completeness"]) == (18, CLASSES, None)
    source = load_model("timm:resnet18", weights=weights)
    items = [open_data(data, size=SIZE)[i] for i in range(18)]
    images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    with torch.no_grad():
        logits = source.module.eval()((images - mean) / std)
    assert labels.tolist() == [k for k in range(CLASSES) for _ in range(3)]
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    top5 = [int(labels[i]) in logits[i].topk(5).indices.tolist() for i in range(18)]
    assert found["top5"] == pytest.approx(sum(top5) / 18)


def test_a_converted_model_answers_the_same_and_explains(bcos, model, data):
    plain = bcos("evaluate", *model, "--data", data, "--json")
    result = bcos("evaluate", *model, "--data", data, "--convert", "--explained", 6, "--json")
    assert result.code == 0, result.err
    found = result.json["results"]
    assert found["top1"] == plain.json["results"]["top1"]
    assert found["loss"] == pytest.approx(plain.json["results"]["loss"], rel=1e-3)
    assert found["completeness"]["images"] == 6
    assert found["completeness"]["largest_relative"] < 1e-4


def test_what_a_person_reads(bcos, checkpoint, data, tmp_path):
    picture = tmp_path / "reliability.png"
    result = bcos(
        "evaluate", "-c", checkpoint, "--size", SIZE, "--data", data, "--explained", 2, "--batch-size", 5, "-o", picture
    )
    assert result.code == 0, result.err
    for text in ("top-1", "top-5", "negative log-likelihood", "calibration error", "completeness error", "2 images"):
        assert text in result.out
    assert "mean confidence" in result.out
    with Image.open(picture) as opened:
        assert opened.format == "PNG"


def test_a_folder_for_all_numbers(bcos, model, data, tmp_path):
    result = bcos("evaluate", *model, "--data", data, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written == {k: v for k, v in result.json.items() if k != "warnings"}
    with Image.open(tmp_path / "out" / "evaluation.png") as opened:
        assert opened.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model, --checkpoint: got neither"),
        (("-m", "timm:resnet18", "-c", "x"), "--model, --checkpoint: got both"),
        (("-c", "nothing.safetensors"), "no such file"),
        (("-c", "nothing.safetensors", "--convert"), "--convert"),
        (("-m", "timm:resnet18", "-o", "x.pdf"), "ending in .png"),
    ],
)
def test_bad_input_of_evaluate_is_named(bcos, data, arguments, message):
    result = bcos("evaluate", *arguments, "--data", data)
    assert (result.code, message in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gradcam"), "did you mean 'grad_cam'"),
        (("--method", "bcos"), "a post-hoc method for 'timm:resnet18'"),
        (("--smooth", 4), "smooth: got 4"),
        (("--variant", "half"), "variant: got 'half'"),
        # Six classes cannot fill nine cells.
        (("--method", "random"), "more than 9 classes"),
        (("--method", "bcos", "--convert"), "more than 9 classes"),
    ],
)
def test_bad_input_of_localise_is_named(bcos, model, data, tmp_path, arguments, message):
    result = bcos("localise", *model, "--data", data, "-o", tmp_path / "out", "--grid", 3, *arguments)
    assert (result.code, message in result.err) == (2, True), result.err
    assert not (tmp_path / "out").exists()


def test_localise_needs_a_network(bcos, data, tmp_path):
    result = bcos("localise", "--data", data, "-o", tmp_path / "out")
    assert (result.code, "neither" in result.err) == (2, True)
    result = bcos("localise", "-c", "x", "--convert", "--data", data, "-o", tmp_path / "out")
    assert (result.code, "--convert" in result.err) == (2, True)


def test_checkpoints_of_small_networks_take_small_images(checkpoint, tmp_path):
    net, _ = bcosify(load_model("small:resnet20", weights="random"))
    assert load_network(None, save(net, tmp_path / "small.safetensors"), None).input_size == 32
    assert load_network(None, checkpoint, None).input_size == 224


@pytest.mark.parametrize("command", ["evaluate", "localise"])
def test_help(bcos, command):
    result = bcos(command, "--help")
    assert result.code == 0
    for option in ("--data", "--convert", "--json"):
        assert option in result.out

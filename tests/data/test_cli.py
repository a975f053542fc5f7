"""bcos-rt train and finetune say what is wrong with the data in one line: exit code 2, no traceback."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bcos_rt import Recipe, bcosify, save
from bcos_rt.cli import app
from bcos_rt.data import check_numbers, open_data, renumbered
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.models import load_model

from .test_sources import png
from .test_splits import tar, tree

IMAGE = png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def photos(root: Path, *names: str) -> Path:
    tree(root, *names)
    for path in root.rglob("*.png"):
        path.write_bytes(IMAGE)
    return root


def message(*arguments: object) -> str:
    """What a refused command says; the line is all."""
    quick = ("--size", 16, "--set", "augmentation.crop=none", "--epochs", 1, "--batch-size", 2, "--accelerator", "cpu")
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, *quick)])
    assert result.exit_code == 2, result.stderr
    said = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert [line[:7] for line in said] == ["error: "], result.stderr
    return said[0]


@pytest.fixture
def train(tmp_path: Path) -> tuple[object, ...]:
    return ("train", "-m", "small:resnet20", "-o", tmp_path / "run", "--workers", 0)


def test_data_that_cannot_be_opened(train: tuple[object, ...], tmp_path: Path) -> None:
    halved = photos(tmp_path / "a", "train/cat/1.png", "train/dog/2.png")
    assert "split: got 'val' of" in message(*train, "--data", halved, "--val", halved)
    mixed = photos(tmp_path / "b", "train/cat/1.png", "more/cat/2.png")
    assert "with the folders more, train, expected" in message(*train, "--data", mixed)
    assert "which has files and no image among them" in message(*train, "--data", photos(tmp_path / "c", "cat/1.txt"))
    whole = tar(tmp_path / "d.tar", ("cat/1.png", "dog/2.png")).read_bytes()
    (tmp_path / "d.tar").write_bytes(whole[:1100])
    assert "d.tar' (" in message(*train, "--data", tmp_path / "d.tar")
    assert "(a damaged header" in message(*train, "--data", _damaged(tmp_path / "e.tar", whole))
    other = photos(tmp_path / "f", "dog/1.png")
    assert "--val: got 'dog' as class 0 of 1, expected class 1 of 2" in message(
        *train, "--data", halved, "--val", other
    )


def _damaged(path: Path, whole: bytes) -> Path:
    start = whole.index(b"dog/")
    path.write_bytes(whole[:start] + b"\xff" * 200 + whole[start + 200 :])
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read(workers: int, tmp_path: Path) -> None:
    data = photos(tmp_path / "a", "cat/1.png", "dog/2.png")
    (data / "dog" / "2.png").write_bytes(IMAGE[:50])
    said = message("train", "-m", "small:resnet20", "-o", tmp_path / "run", "--workers", workers, "--data", data)
    assert "dog/2.png', " in said


def test_labels_that_the_network_has_no_logit_for(train: tuple[object, ...], tmp_path: Path) -> None:
    samples = {f"{i}.{end}": data for i in range(2) for end, data in (("png", IMAGE), ("cls", b"%d" % (7 * i)))}
    data = tar(tmp_path / "a.tar", samples)
    (tmp_path / "mixing.json").write_text(json.dumps({"agc": None, "mixing": {"mixup": 0.5}}))
    for recipe in ("bcos", "standard", tmp_path / "mixing.json"):
        said = message(*train, "--data", data, "--num-classes", 4, "--recipe", recipe)
        assert "data: got label" in said
        assert "expected labels 0 to 3" in said


def test_classes_that_the_network_numbers_differently(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, _ = bcosify(
        load_model("small:resnet20", weights="random", num_classes=2), Recipe(), class_names=["dog", "cat"]
    )
    save(net, tmp_path / "net.safetensors")
    said = message(
        "finetune", "-c", tmp_path / "net.safetensors", "-o", tmp_path / "run", "--workers", 0,
        "--data", photos(tmp_path / "a", "cat/1.png", "dog/2.png"),
    )  # fmt: skip
    assert "--data: got 'cat' as class 0 of 2, expected class 1 of 2, as the network has it" in said


def test_numbers_of_classes() -> None:
    for names, others in (
        (None, ["cat"]),
        (["cat", "dog"], None),
        (["cat", "dog"], ["cat", "dog", "emu"]),
        (["n01", "n02"], ["cat", "dog"]),
        (["crane", "emu", "crane"], ["emus", "emu", "crane"]),
    ):
        check_numbers(names, others, "data", "the network has it")
    with pytest.raises(InvalidArgumentError, match="data: got 'emu' as class 1 of 2, expected class 2 of 3, as it is"):
        check_numbers(["cat", "emu"], ["cat", "dog", "emu"], "data", "it is")
    with pytest.raises(
        InvalidArgumentError, match=r"data: got 2 classes with other names \(n01, n02\), expected some of the 4 classes"
    ):
        check_numbers(["n01", "n02"], ["cat", "dog", "emu", "frog"], "data", "it is")


def test_labels_by_the_numbers_of_a_network() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = open_data((images, [0, 1, 1, -1]))
    data.class_names = ("cat", "dog")
    found = renumbered(data, ["dog", "emu", "cat"])
    assert [found[i][1] for i in range(4)] == [2, 0, 0, -1]
    assert found.labels is not None
    assert found.labels.tolist() == [2, 0, 0, -1]
    assert all(torch.equal(found[i][0], data[i][0]) for i in range(4))
    assert found.class_names == ("dog", "emu", "cat")
    for names in (None, ["cat", "dog", "emu"], ["n01", "n02"], ["cat", "emu"]):
        assert renumbered(data, names) is data
    for names in (["dog", "emu"], ["dog", "cat", "cat"]):
        with pytest.raises(InvalidArgumentError, match="data: got 'dog' as class 1 of 2, expected class 0 of "):
            renumbered(data, names)
    data.labels = torch.tensor([0, 1, 2, 0])
    with pytest.raises(InvalidArgumentError, match="label 2, expected labels of its 2 class names"):
        renumbered(data, ["dog", "cat"])


def test_an_empty_folder_stands_for_a_class_without_images(tmp_path: Path) -> None:
    data = photos(tmp_path / "a", "cat/1.png", "dog/2.png", "emu/3.png")
    validation = open_data(photos(tmp_path / "b", "cat/1.png", "dog/", "emu/3.png"))
    check_numbers(validation.class_names, open_data(data).class_names, "validation", "the training data has it")
    assert validation[1][1] == 2

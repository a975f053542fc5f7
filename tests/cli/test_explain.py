"""bcos-rt explain, on tiny seeded networks at 64 pixels."""

import numpy as np
import pytest
from PIL import Image

from bcos_rt.cli.explain import plan_outputs
from bcos_rt.cli.inputs import find_class
from bcos_rt.errors import InvalidArgumentError
from tests.cli.conftest import CLASSES

SIZE = 64


@pytest.fixture
def model(weights):
    """The options that name the seeded ResNet-18."""
    return ("--model", "timm:resnet18", "--weights", weights, "--size", SIZE)


def test_a_conventional_model_gives_its_initial_explanation(bcos, model, photos, tmp_path):
    out = tmp_path / "out.png"
    result = bcos("explain", photos[0], *model, "-o", out, "--json")
    assert result.code == 0, result.err
    data = result.json
    assert data["label"] == "initial explanation"
    assert data["size"] == SIZE
    assert data["network"]["source"] == {"kind": "timm", "name": "resnet18", "num_classes": CLASSES}
    (image,) = data["images"]
    (entry,) = image["classes"]
    assert entry["index"] == image["predicted"]["index"]
    assert 1 / CLASSES <= entry["probability"] <= 1
    assert entry["completeness_error"] < 1e-4
    assert entry["contributions_sum"] + entry["residual"] == pytest.approx(entry["logit"], abs=1e-4)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_what_a_person_reads(bcos, model, photos, tmp_path):
    result = bcos("explain", photos[0], *model, "--class", 2, "-o", tmp_path / "out.png")
    assert result.code == 0
    assert result.err == ""
    for text in ("class 2", "initial explanation", "completeness error", "probability", "out.png"):
        assert text in result.out


def test_the_numbers_are_explain_s(bcos, checkpoint, photos, tmp_path):
    import torch

    from bcos_rt import explain, load
    from bcos_rt.images import load_image

    result = bcos(
        "explain", photos[1], "-c", checkpoint, "-s", SIZE, "-k", "espresso", "-o", tmp_path / "o.npz", "--json"
    )
    data = result.json
    assert data["label"] == "explanation"
    expected = explain(load(checkpoint), load_image(photos[1], SIZE)[None], 3)
    (entry,) = data["images"][0]["classes"]
    assert (entry["index"], entry["name"]) == (3, "espresso")
    assert entry["logit"] == pytest.approx(float(expected.target_logit()[0]), rel=1e-5)
    assert entry["probability"] == pytest.approx(float(torch.softmax(expected.logits, 1)[0, 3]), rel=1e-4)
    with np.load(tmp_path / "o.npz") as stored:
        np.testing.assert_allclose(stored["contributions"], expected.contributions.numpy(), atol=1e-5)


def test_a_model_name_may_be_a_checkpoint_s_path(bcos, checkpoint, photos, tmp_path):
    result = bcos("explain", photos[0], "-m", checkpoint, "-s", SIZE, "-o", tmp_path / "o.png", "--json")
    assert result.code == 0, result.err
    assert result.json["network"]["checkpoint"] == str(checkpoint)


def test_top_k_classes(bcos, checkpoint, photos, tmp_path):
    result = bcos("explain", photos[0], "-c", checkpoint, "-s", SIZE, "--top", 3, "-o", tmp_path / "o.png", "--json")
    assert result.code == 0, result.err
    classes = result.json["images"][0]["classes"]
    probabilities = [entry["probability"] for entry in classes]
    assert len({entry["index"] for entry in classes}) == 3
    assert probabilities == sorted(probabilities, reverse=True)
    assert max(entry["completeness_error"] for entry in classes) < 1e-4


def test_several_photos_into_a_directory(bcos, checkpoint, photos, tmp_path):
    result = bcos("explain", *photos, "-c", checkpoint, "-s", SIZE, "-o", tmp_path / "new" / "folder", "--json")
    assert result.code == 0, result.err
    outputs = [image["output"] for image in result.json["images"]]
    assert outputs == [str(tmp_path / "new" / "folder" / name) for name in ("one.png", "two.png")]
    logits = {image["predicted"]["logit"] for image in result.json["images"]}
    assert len(logits) == 2
    for output in outputs:
        with Image.open(output) as picture:
            picture.verify()


def test_plan_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    a, b = Path("x/cat.png"), Path("y/cat.jpg")
    assert plan_outputs([a], "out.pdf") == [Path("out.pdf")]
    assert plan_outputs([a, b], "{name}-why.svg") == [Path("cat-why.svg"), Path("cat-2-why.svg")]
    assert plan_outputs([a, b], "made") == [Path("made/cat.png"), Path("made/cat-2.png")]
    assert plan_outputs([a], "made") == [Path("made/cat.png")]
    assert plan_outputs([a], "other/") == [Path("other/cat.png")]
    with pytest.raises(InvalidArgumentError, match="for 2 photos"):
        plan_outputs([a, b], "one.png")
    with pytest.raises(InvalidArgumentError, match="one of the photos"):
        plan_outputs([Path("cat.png")], "cat.png")


NAMES = ["tabby, tabby cat", "tiger cat", "Egyptian cat", "espresso", "crane", "crane"]


@pytest.mark.parametrize(
    ("wanted", "index"),
    [("0", 0), ("5", 5), ("tabby", 0), ("TABBY CAT", 0), ("tabby, tabby cat", 0), ("egypt", 2), (" espresso ", 3)],
)
def test_find_class(wanted, index):
    assert find_class(wanted, NAMES, 6) == index


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("6", "index from 0 to 5"),
        ("-1", "index from 0 to 5"),
        ("cat", "which 3 classes match.*0 'tabby, tabby cat', 1 'tiger cat', 2 'Egyptian cat'"),
        ("crane", "which 2 classes match.*4 'crane', 5 'crane'"),
        ("Expresso", "did you mean 'espresso'"),
        ("zebra", "name or index of one of the network's classes"),
        ("", "name or index"),
    ],
)
def test_find_class_refuses(wanted, message):
    with pytest.raises(InvalidArgumentError, match=message):
        find_class(wanted, NAMES, 6)


def test_find_class_without_names():
    assert find_class("3", None, 6) == 3
    with pytest.raises(InvalidArgumentError, match="has no class names"):
        find_class("cat", None, 6)


@pytest.fixture
def bad_image(tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"this is no image")
    return path


class TestBadInput:
    """Each is exit code 2, one message on stderr, nothing on stdout; with --json an error object."""

    @pytest.fixture
    def refused(self, bcos, tmp_path):
        def check(message, *arguments):
            arguments = [*arguments, *(() if "-o" in arguments else ("-o", tmp_path / "o.png"))]
            result = bcos("explain", *arguments)
            assert result.code == 2, result.err
            assert result.out == ""
            assert message in result.err
            assert "Traceback" not in result.err
            result = bcos("explain", *arguments, "--json")
            assert result.code == 2
            assert message in result.json["error"]["message"]
            assert not list(tmp_path.glob("o.*"))

        return check

    def test_photo_that_does_not_exist(self, refused, model, tmp_path):
        refused("nothing.jpg', which does not exist", tmp_path / "nothing.jpg", *model)

    def test_photo_that_is_a_directory(self, refused, model, tmp_path):
        refused("a directory", tmp_path, *model)

    def test_photo_that_is_no_image(self, refused, model, bad_image):
        refused("bad.jpg", bad_image, *model)

    def test_class(self, refused, checkpoint, photos):
        options = ("-c", checkpoint, "-s", SIZE)
        refused("did you mean 'espresso'?", photos[0], *options, "--class", "expresso")
        refused("an index from 0 to 5", photos[0], *options, "--class", "6")
        refused("which 3 classes match", photos[0], *options, "--class", "cat")

    def test_class_of_a_network_without_names(self, refused, model, photos):
        refused("the network has no class names", photos[0], *model, "--class", "cat")

    def test_top(self, refused, model, photos):
        refused("at most 6", photos[0], *model, "--top", "7")
        refused("--class, --top", photos[0], *model, "--top", "2", "--class", "1")

    def test_neither_model_nor_checkpoint_or_both(self, refused, photos, checkpoint):
        refused("neither", photos[0])
        refused("both", photos[0], "-m", "timm:resnet18", "-c", checkpoint)

    def test_checkpoint_with_weights(self, refused, photos, checkpoint, weights):
        refused("with a checkpoint", photos[0], "-c", checkpoint, "--weights", weights)

    def test_unknown_models(self, refused, photos):
        refused("did you mean", photos[0], "-m", "timm:resnet81", "-w", "random")
        refused("did you mean", photos[0], "-m", "resnet18", "-w", "random")

    def test_missing_weights(self, refused, photos, tmp_path):
        refused("an existing file", photos[0], "-m", "timm:resnet18", "-w", tmp_path / "none.pth")
        refused("did you mean 'random'", photos[0], "-m", "timm:resnet18", "-w", "rndom")

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_corrupt_weights(self, refused, photos, tmp_path, suffix):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(b"\x00\x01 truncated")
        refused(path.name, photos[0], "-m", "timm:resnet18", "-w", path)

    def test_weights_of_another_model(self, refused, photos, weights):
        refused("missing", photos[0], "-m", "timm:resnet34", "-w", weights)

    def test_missing_and_corrupt_checkpoints(self, refused, photos, tmp_path):
        refused("none.safetensors", photos[0], "-c", tmp_path / "none.safetensors")
        path = tmp_path / "broken.safetensors"
        path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
        refused("broken.safetensors", photos[0], "-c", path)

    def test_outputs_that_cannot_be_written(self, refused, model, photos, tmp_path):
        refused("writable folder", photos[0], *model, "-o", tmp_path / "no" / "folder" / "x.png")
        refused("ending in .png", photos[0], *model, "-o", tmp_path / "x.gif")
        refused("for 2 photos", *photos, *model, "-o", tmp_path / "x.png")
        file = tmp_path / "file"
        file.write_text("")
        refused("writable", photos[0], *model, "-o", f"{file}/x.png")
        refused("writable directory", *photos, *model, "-o", f"{file}/")

    def test_outputs_are_checked_before_the_model_is_loaded(self, bcos, photos, monkeypatch):
        import bcos_rt.models

        def load_model(*_, **__):
            raise AssertionError("loaded")

        monkeypatch.setattr(bcos_rt.models, "load_model", load_model)
        assert bcos("explain", photos[0], "-m", "timm:resnet18", "-o", "/nowhere/x.png").code == 2


def test_numbers_of_photo_formats(bcos, checkpoint, tmp_path):
    """Grayscale, CMYK, a palette and transparency are explained like any photo."""
    random = np.random.default_rng(1)
    gray = Image.fromarray(random.integers(0, 256, (70, 80), dtype=np.uint8))
    paths = []
    for mode, suffix in (("L", "png"), ("CMYK", "jpg"), ("P", "gif"), ("RGBA", "png")):
        paths.append(tmp_path / f"{mode}.{suffix}")
        gray.convert("RGB").convert(mode).save(paths[-1])
    result = bcos("explain", *paths, "-c", checkpoint, "-s", SIZE, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert len(list((tmp_path / "out").glob("*.png"))) == len(paths)
    assert max(image["classes"][0]["completeness_error"] for image in result.json["images"]) < 1e-4


@pytest.mark.parametrize("option", ["--checkpoint", "--model"])
def test_a_network_from_the_package(bcos, photos, tmp_path, option):
    name = "packaged:cifar10-resnet20"
    result = bcos("explain", photos[0], option, name, "-o", tmp_path / "out.png", "--json")
    assert result.code == 0, result.err
    assert result.json["network"]["checkpoint"] == name
    assert (tmp_path / "out.png").stat().st_size > 0

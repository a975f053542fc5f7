"""bcos-rt convert, on a seeded ResNet-18 at 64 pixels."""

import json

import pytest
import torch

from bcos_rt import Recipe, bcosify, load
from bcos_rt.cli.inputs import is_saved
from bcos_rt.models import load_model
from tests.cli.conftest import CLASSES


@pytest.fixture
def model(weights):
    return ("--model", "timm:resnet18", "--weights", weights, "--size", 64)


def test_default_recipe(bcos, model, weights, tmp_path):
    out = tmp_path / "net.safetensors"
    result = bcos("convert", *model, "-o", out, "--json")
    assert result.code == 0, result.err
    data = result.json
    assert data["output"] == str(out)
    assert data["report"]["equivalence"] is None
    assert data["report"]["weights_copied"]["complete"] is True
    net = load(out)
    assert net.recipe == Recipe(mean=net.recipe.mean, std=net.recipe.std)
    assert Recipe.from_dict(data["recipe"]) == net.recipe
    expected, _ = bcosify(load_model("timm:resnet18", weights=weights), Recipe())
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected.eval()(x))


def test_equivalent_recipe_is_verified(bcos, model, tmp_path):
    result = bcos("convert", *model, "-r", "equivalent", "-o", tmp_path / "net", "--json")
    assert result.code == 0, result.err
    assert result.json["verified_on"] == "made-up images"
    assert result.json["report"]["equivalence"]["max_relative_error"] < 1e-4
    assert result.json["report"]["equivalence"]["images"] == 4
    assert load(tmp_path / "net").recipe.b == 1


def test_verified_on_photos(bcos, model, photos, tmp_path):
    result = bcos("convert", *photos, *model, "-o", tmp_path / "net", "--json")
    assert result.code == 0, result.err
    assert result.json["verified_on"] == [str(p) for p in photos]
    assert result.json["report"]["equivalence"]["images"] == len(photos)
    # At B = 2 the network is another function, and is saved all the same.
    assert result.json["report"]["equivalence"]["max_relative_error"] > 1e-2


def test_photographs_are_to_verify_on(bcos, model, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    result = bcos("convert", tmp_path / "photo.png", *model, "--no-verify", "-o", tmp_path / "net")
    assert (result.code, "--no-verify: got beside" in result.err) == (2, True), result.err


def test_a_model_is_called_what_it_is_called(bcos, tmp_path, monkeypatch):
    """Whatever lies in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("small:resnet20", "efficientnet-lite0"):
        (tmp_path / name).mkdir()
        assert not is_saved(name)
    (tmp_path / "runs:old").mkdir()
    assert is_saved("runs:old")
    assert is_saved(str(tmp_path))


def test_no_verify(bcos, model, tmp_path):
    result = bcos("convert", *model, "-r", "equivalent", "--no-verify", "-o", tmp_path / "net", "--json")
    assert result.code == 0, result.err
    assert (result.json["verified_on"], result.json["report"]["equivalence"]) == (None, None)


def test_a_broken_equivalence_saves_nothing(bcos, model, tmp_path, monkeypatch):
    import bcos_rt.cli.convert

    monkeypatch.setattr(bcos_rt.cli.convert, "EQUIVALENCE_TOLERANCE", 1e-30)
    result = bcos("convert", *model, "-r", "equivalent", "-o", tmp_path / "net.safetensors")
    assert result.code == 2
    assert "not equivalent" in result.err
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_shown(bcos, model, tmp_path):
    result = bcos("convert", *model, "-o", tmp_path / "net.safetensors")
    assert result.code == 0, result.err
    for text in ("BcosConv2d", "BatchNormUncentered2d", "all accounted for", "saved", "net.safetensors"):
        assert text in result.out


def test_recipe_fields(bcos, model, tmp_path):
    options = {
        "-b": "1.5",
        "--weight-norm": "unit",
        "--biases": "keep",
        "--batch-norm": "keep",
        "--activations": "identity",
        "--stem-pool": "keep",
        "--head": "after_pool",
        "--logit-bias": "-3.5",
        "--logit-temperature": "2",
        "--gates": "convert",
        "--mean": "0.5,0.4,0.3",
        "--std": "0.25,0.26,0.27",
        "--input-encoding": "six_channel",
        "--input-normalization": "none",
    }
    flat = [part for pair in options.items() for part in pair]
    result = bcos("convert", *model, *flat, "--keep", "layer1.*", "--keep", "fc", "-o", tmp_path / "net", "--json")
    assert result.code == 0, result.err
    assert load(tmp_path / "net").recipe == Recipe(
        b=1.5,
        weight_norm="unit",
        biases="keep",
        batch_norm="keep",
        activations="identity",
        stem_pool="keep",
        head="after_pool",
        logit_bias=-3.5,
        logit_temperature=2.0,
        gates="convert",
        keep=("layer1.*", "fc"),
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.26, 0.27),
        input_normalization="none",
    )


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("none", None), ("0", 0.0)])
def test_logit_bias(bcos, model, tmp_path, text, value):
    result = bcos("convert", *model, "--logit-bias", text, "-o", tmp_path / "net", "--json")
    assert result.code == 0, result.err
    assert result.json["recipe"]["logit_bias"] == value


def test_recipe_of_a_file_and_an_option_over_it(bcos, model, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(Recipe(b=1.25, stem_pool="keep").to_dict()))
    result = bcos("convert", *model, "-r", path, "-b", "1.75", "-o", tmp_path / "net", "--json")
    assert result.code == 0, result.err
    assert (result.json["recipe"]["b"], result.json["recipe"]["stem_pool"]) == (1.75, "keep")


def test_random_weights_and_number_of_classes(bcos, tmp_path):
    options = ("-m", "timm:resnet18", "-w", "random", "--num-classes", CLASSES + 1)
    result = bcos("convert", *options, "-o", tmp_path / "net", "--json")
    assert result.code == 0, result.err
    assert load(tmp_path / "net")(torch.rand(1, 3, 64, 64)).shape == (1, CLASSES + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-b", "0.5"), "a finite number >= 1"),
        (("--biases", "kep"), "did you mean 'keep'"),
        (("--head", "first"), "before_pool"),
        (("--logit-bias", "nnoe"), "did you mean 'none'"),
        (("--logit-temperature", "warm"), "a number or 'none'"),
        (("--mean", "a,b"), "three numbers"),
        (("--mean", "0.1,0.2"), "three finite numbers"),
        (("--std", "0.1,0.2,0"), "numbers > 0"),
        (("--keep", "layer9"), "did you mean"),
        (("-r", "equivalentt"), "did you mean 'equivalent'"),
        (("-r", "equivalent", "--biases", "drop"), "uncentered_folded"),
        (("-o", "net.pth"), ".safetensors"),
        (("-o", "/proc/no/such/place"), "/proc/no/such/place"),
        (("nothing.png",), "does not exist"),
    ],
)
def test_bad_input(bcos, model, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    output = () if "-o" in options else ("-o", "net")
    result = bcos("convert", *model, *options, *output)
    assert (result.code, result.out) == (2, ""), result.err
    assert message in result.err
    assert "Traceback" not in result.err
    result = bcos("convert", *model, *options, *output, "--json")
    assert result.code == 2
    assert message in result.json["error"]["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"), [("{", "readable JSON"), ("[1]", "a JSON object"), ('{"bb": 2}', "did you mean 'b'")]
)
def test_bad_recipe_files(bcos, model, tmp_path, content, message):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    result = bcos("convert", *model, "-r", path, "-o", tmp_path / "net")
    assert result.code == 2
    assert message in result.err

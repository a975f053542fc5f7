"""bcos-rt export, on tiny seeded networks at 64 pixels."""

import numpy as np
import pytest
import torch

from bcos_rt import explain, load
from tests.cli.conftest import CLASSES

onnxruntime = pytest.importorskip("onnxruntime")
SIZE = 64


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_the_file_explains_like_pytorch(bcos, checkpoint, tmp_path):
    path = tmp_path / "net.onnx"
    result = bcos("export", "-c", checkpoint, "-o", path, "--size", SIZE, "--json")
    assert result.code == 0, result.err
    data = result.json
    assert data["output"] == str(path)
    assert data["report"]["bytes"] == path.stat().st_size
    assert data["report"]["image_size"] == [SIZE, SIZE]
    assert data["report"]["parity"]["differences"]["contributions"]["max_relative"] < 1e-3
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([4, -1])
    run = session(path)
    names = [output.name for output in run.get_outputs()]
    values = dict(zip(names, run.run(None, {"image": images.numpy(), "class_ids": ids.numpy()}), strict=True))
    expected = explain(load(checkpoint), images, ids)
    assert values["class_used"].tolist() == expected.target.tolist()
    np.testing.assert_allclose(values["logits"], expected.logits.numpy(), rtol=1e-3, atol=1e-4)
    scale = float(expected.contributions.abs().max())
    assert float(np.abs(values["contributions"] - expected.contributions.numpy()).max()) < 1e-3 * scale


def test_forward_only_and_what_a_person_reads(bcos, weights, tmp_path):
    path = tmp_path / "net.onnx"
    result = bcos("export", "-m", "timm:resnet18", "-w", weights, "-o", path, "-s", SIZE, "--forward-only")
    assert result.code == 0, result.err
    assert "net.onnx" in result.out
    assert [output.name for output in session(path).get_outputs()] == ["logits"]


def test_several_classes_of_each_image(bcos, checkpoint, tmp_path):
    path = tmp_path / "net.onnx"
    result = bcos("export", "-c", checkpoint, "-o", path, "-s", SIZE, "--multi", "--no-verify", "--json")
    assert result.code == 0, result.err
    images = np.random.default_rng(0).random((2, 3, SIZE, SIZE), dtype=np.float32)
    ids = np.array([[0, 1, 2], [3, -1, 5]])
    run = session(path)
    (contributions, logits) = run.run(["contributions", "logits"], {"image": images, "class_ids": ids})
    assert contributions.shape == (2, 3, SIZE, SIZE)
    assert logits.shape == (2, CLASSES)


def test_chosen_outputs_verified_on_photos(bcos, checkpoint, photos, tmp_path):
    path = tmp_path / "net.onnx"
    only = ("--only", "logits", "--only", "contributions")
    result = bcos("export", *photos, "-c", checkpoint, "-o", path, "-s", SIZE, *only, "--json")
    assert result.code == 0, result.err
    assert set(result.json["report"]["outputs"]) == {"logits", "contributions"}
    without = bcos("export", "-c", checkpoint, "-o", path, "-s", SIZE, *only, "--json").json
    assert result.json["report"]["parity"]["images"] > without["report"]["parity"]["images"]


def test_fp16(bcos, checkpoint, tmp_path):
    path = tmp_path / "net.onnx"
    result = bcos("export", "-c", checkpoint, "-o", path, "-s", SIZE, "--fp16", "--no-verify", "--json")
    assert result.code == 0, result.err
    assert result.json["report"]["precision"] == "fp16"
    assert result.json["report"]["parity"] is None
    parameters = sum(tensor.numel() for tensor in load(checkpoint).state_dict().values())
    assert path.stat().st_size < 3 * parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "net.pt"), "ending in .onnx"),
        (("-o", "no/folder/net.onnx"), "writable folder"),
        (("nothing.png",), "does not exist"),
        (("--forward-only", "--multi"), "multi"),
        (("--only", "contribution"), "did you mean 'contributions'"),
    ],
)
def test_bad_input(bcos, checkpoint, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    output = () if "-o" in options else ("-o", "net.onnx")
    result = bcos("export", "-c", checkpoint, "-s", SIZE, *options, *output)
    assert (result.code, result.out) == (2, ""), result.err
    assert message in result.err
    assert "Traceback" not in result.err
    result = bcos("export", "-c", checkpoint, "-s", SIZE, *options, *output, "--json")
    assert result.code == 2
    assert message in result.json["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_without_a_network(bcos, tmp_path):
    result = bcos("export", "-o", tmp_path / "net.onnx")
    assert result.code == 2
    assert "--model, --checkpoint: got neither" in result.err

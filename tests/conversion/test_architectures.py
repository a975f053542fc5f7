"""Every supported architecture: equivalence at B=1, and what the default recipe makes of it."""

import copy

import pytest
import torch
from torch import nn

from bcos_rt.conversion import Recipe, bcosify
from bcos_rt.nn import BatchNormUncentered2d, BcosConv2d, BcosLinear
from tests.conversion.models import MODELS, build, images
from tests.tolerances import TOLERANCES

# name -> (classifier, whether it moves before the pool, stem pool averaged)
EXPECTED = {
    "torchvision:resnet18": ("fc", True, "maxpool"),
    "torchvision:resnet34": ("fc", True, "maxpool"),
    "torchvision:resnet50": ("fc", True, "maxpool"),
    "torchvision:resnet101": ("fc", True, "maxpool"),
    "torchvision:resnext50_32x4d": ("fc", True, "maxpool"),
    "torchvision:wide_resnet50_2": ("fc", True, "maxpool"),
    "torchvision:densenet121": ("classifier", True, "features.pool0"),
    "torchvision:vgg11_bn": ("classifier.6", False, None),
    "torchvision:mobilenet_v2": ("classifier.1", True, None),
    "torchvision:efficientnet_b0": ("classifier.1", True, None),
    "torchvision:regnet_y_400mf": ("fc", True, None),
    "torchvision:convnext_tiny": ("classifier.2", False, None),
    "timm:resnet18": ("fc", True, "maxpool"),
    "timm:resnet50": ("fc", True, "maxpool"),
    "timm:tf_efficientnet_lite0": ("classifier", True, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_equivalence_and_default_recipe(name):
    source = build(name)
    before = copy.deepcopy(source.state_dict())
    x = images(MODELS[name])
    head, moved, pool = EXPECTED[name]
    for order in ("after_pool", "before_pool") if moved else ("after_pool",):
        net, report = bcosify(source, Recipe.equivalent(head=order), verify_images=x)
        assert report.equivalence.within(TOLERANCES["equivalence"]), (order, report.equivalence)
        assert report.weights_copied.complete
        assert report.weights_copied.widened == 1
        assert report.weights_copied.dropped == 0

    net, report = bcosify(source)
    assert report.weights_copied.complete
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in before.items()), "the source was modified"
    with torch.no_grad():
        logits = net(x[:1])
    assert logits.shape == (1, 11)
    assert logits.isfinite().all()

    assert isinstance(net.backbone.get_submodule(head), BcosConv2d if moved else BcosLinear)
    averaged = [e.name for e in report.entries if e.kind == "pool" and not e.kept]
    assert averaged == ([pool] if pool else [])
    if pool:
        assert isinstance(net.backbone.get_submodule(pool), nn.AvgPool2d)
    assert any(note.startswith(f"head: {head}") for note in report.notes) != moved

    gates = {e.name for e in report.kept if e.reason == "computes a gate only"}
    for module_name, module in net.backbone.named_modules():
        if module_name in gates:
            assert type(module) is nn.Conv2d
            assert module.bias is not None
        elif isinstance(module, nn.Conv2d | nn.Linear):
            assert isinstance(module, BcosConv2d | BcosLinear), module_name
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert module.bias is None
            assert isinstance(module, BatchNormUncentered2d) or not isinstance(module, nn.BatchNorm2d)
    squeeze_excite = {"torchvision:efficientnet_b0": 32, "torchvision:regnet_y_400mf": 32}
    assert len(gates) == squeeze_excite.get(name, 0)


def test_names_and_keys_are_the_source_models():
    source = build("torchvision:densenet121")
    net, _ = bcosify(source, Recipe.equivalent(head="before_pool"))
    assert set(net.backbone.state_dict()) == set(source.state_dict())
    norm = net.backbone.get_submodule("features.denseblock1.denselayer1.norm1")
    assert torch.equal(norm.running_var, source.get_submodule("features.denseblock1.denselayer1.norm1").running_var)


@pytest.mark.parametrize("name", ["torchvision:densenet121", "timm:tf_efficientnet_lite0"])
def test_functional_activations_are_removed(name):
    source = build(name)
    net, report = bcosify(source, Recipe.equivalent(activations="identity", stem_pool="average"))
    removed = [e for e in report.entries if e.kind == "activation" and not e.kept]
    expected = sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in source.modules())
    expected += 1 if "densenet" in name else 0  # the functional one before the pool
    assert len(removed) == expected
    # Without activations and at B=1 the network is affine.
    a, b = images(MODELS[name]).double().chunk(2)
    net = net.double()
    with torch.no_grad():
        middle, mean = net((a + b) / 2), (net(a) + net(b)) / 2
    torch.testing.assert_close(middle, mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:densenet121", "timm:tf_efficientnet_lite0"])
def test_result_copies_and_exports(name):
    net, _ = bcosify(build(name))
    x = images(MODELS[name], n=3)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin(x), net(x))
    assert set(twin.state_dict()) == set(net.state_dict())
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (images(MODELS[name]),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-6)

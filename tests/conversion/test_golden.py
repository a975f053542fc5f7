"""The published implementation's numbers: equivalent and B=2 logits, recalibrated variances."""

import numpy as np
import pytest
import torch

from bcos_rt.conversion import Recipe, bcosify, recalibrate
from tests.golden import SEEDS, golden_images, golden_model, load_golden
from tests.tolerances import TOLERANCES

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def relative_error(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.fixture(params=["resnet18", "densenet121"])
def case(request):
    golden = load_golden(request.param)
    seed = SEEDS[request.param]
    return golden, golden_model(request.param), golden_images(seed)


@pytest.fixture(scope="module", params=["simple_vit_ti_patch16_224", "vitc_ti_patch1_14"])
def vit(request):
    return load_golden(request.param), golden_model(request.param), golden_images(SEEDS[request.param])


def test_seeding_rule(case):
    golden, model, images = case
    with torch.no_grad():
        logits = model((images - MEAN) / STD)
    assert relative_error(logits.numpy(), golden["standard_logits"]) < 1e-5


@pytest.mark.parametrize("head", ["after_pool", "before_pool"])
def test_equivalent_logits(case, head):
    golden, model, images = case
    net, report = bcosify(model, Recipe.equivalent(head=head), verify_images=images)
    with torch.no_grad():
        assert relative_error(net(images).numpy(), golden["equivalent_logits"]) < TOLERANCES["equivalence"]
    assert report.equivalence.within(TOLERANCES["equivalence"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recalibrated_variances_and_logits(case, dtype):
    golden, model, images = case
    net, _ = bcosify(model, Recipe(logit_bias=None))
    net, images = net.to(dtype), images.to(dtype)
    recalibrate(net, [images])
    names = [key.removeprefix("running_var/") for key in golden if key.startswith("running_var/")]
    assert len(names) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    for name in names:
        expected = golden[f"running_var/{name}"]
        got = net.backbone.get_submodule(name).running_var.numpy()
        # A constant channel's variance is rounding noise, hence the absolute part.
        np.testing.assert_allclose(got, expected, rtol=TOLERANCES["running_var"], atol=1e-12, err_msg=name)
    with torch.no_grad():
        logits = net(images)
    assert relative_error(logits.numpy(), golden["logits"]) < TOLERANCES["logits_b2"]
    assert logits.argmax(1).tolist() == golden["top1"].tolist()


def test_simple_vits(vit):
    golden, model, images = vit
    with torch.no_grad():
        assert relative_error(model((images - MEAN) / STD).numpy(), golden["standard_logits"]) < 1e-5
    net, report = bcosify(model, Recipe.equivalent(), verify_images=images)
    with torch.no_grad():
        assert relative_error(net(images).numpy(), golden["equivalent_logits"]) < TOLERANCES["equivalence"]
    assert report.equivalence.within(TOLERANCES["equivalence"])
    net, report = bcosify(model, Recipe(logit_bias=None))
    assert report.weights_copied.complete
    assert report.weights_copied.widened == 1
    with torch.no_grad():
        logits = net(images)
    assert relative_error(logits.numpy(), golden["logits"]) < TOLERANCES["logits_b2"]
    assert logits.argmax(1).tolist() == golden["top1"].tolist()

"""Explanations against the numbers of the published implementation."""

import numpy as np
import pytest
import torch

from bcos_rt import Recipe, bcosify, explain
from tests.golden import SEEDS, golden_images, golden_model, load_golden


@pytest.fixture(scope="module", params=list(SEEDS))
def case(request):
    name = request.param
    golden = load_golden(name)
    net, _ = bcosify(golden_model(name), Recipe(logit_bias=None))
    for key, value in golden.items():
        if key.startswith("running_var/"):
            norm = net.backbone.get_submodule(key.removeprefix("running_var/"))
            norm.running_var.copy_(torch.from_numpy(value))
    return golden, net.eval(), golden_images(SEEDS[name])


def close(given, expected, tolerance):
    """Within a share of the array's largest magnitude."""
    difference = np.abs(given.numpy().astype(np.float64) - expected)
    assert difference.max() <= tolerance * np.abs(expected).max()


def test_top_class(case):
    golden, net, images = case
    result = explain(net, images)
    close(result.logits, golden["logits"], 1e-4)
    assert result.target.tolist() == golden["top1"].tolist()
    close(result.contributions, golden["contribution_map"], 1e-3)
    sample = result.weights.flatten()[torch.from_numpy(golden["weight_index"])]
    close(sample, golden["weight_sample"], 1e-3)
    np.testing.assert_allclose(result.weights.flatten(1).norm(dim=1).numpy(), golden["weight_norm"], rtol=1e-3)
    # No bias anywhere: what is left over is the input's mean (and a ViT's position embeddings), and it is computed, not
    # the difference.
    assert float(result.completeness_error().max()) <= 1e-4 * float(result.logits.abs().max())
    rgba = result.picture(smooth=15, alpha_percentile=99.5).numpy()
    assert float((np.abs(rgba - golden["rgba"].astype(np.float32)) > 2e-2).mean()) <= 1e-3


def test_chosen_classes(case):
    golden, net, images = case
    expected = golden["class_7_401_contribution_map"]
    close(explain(net, images, [7, 401]).contributions, expected, 1e-3)


@pytest.mark.parametrize("case", ["resnet18", "simple_vit_ti_patch16_224"], indirect=True)
def test_several_classes(case):
    golden, net, images = case
    several = explain(net, images, [[7, -1], [401, 3]])
    close(several.contributions[:, 0], golden["class_7_401_contribution_map"], 1e-3)
    close(several.contributions[0, 1], golden["contribution_map"][0], 1e-3)

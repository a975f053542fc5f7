"""What a program's values are stored in: the adjoint alone in 16 bits."""

from __future__ import annotations

import pytest
import torch

from bcos_rt import Recipe, bcosify
from bcos_rt.graph.adjoint import build_explanation_graph
from bcos_rt.graph.fused import build_fused
from tests.graph.networks import NETWORKS, network

aten = torch.ops.aten
bcos = torch.ops.bcos_rt
SIZE = (34, 30)
LAYERS = (bcos.conv2d_fused.default, bcos.linear_fused.default)
ADJOINTS = (bcos.conv2d_transposed.default, bcos.linear_transposed.default, bcos.conv2d_contributions.default)


def mixed(net):
    return build_fused(net, SIZE, torch.bfloat16, forward_dtype=torch.float32)


def similarity(a, b):
    return torch.nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1)).min()


@pytest.mark.parametrize("name", NETWORKS)
def test_an_adjoint_in_bfloat16_keeps_the_forward_pass(name):
    """Logits and classes bit for bit, and an explanation nearer to float32's than with bfloat16 throughout."""
    net, images = network(name), torch.rand(3, 3, *SIZE)
    ids = torch.tensor([[0, -1], [2, 1], [-1, 3]])
    full = build_fused(net, SIZE).explain.run(images, ids)
    half = build_fused(net, SIZE, torch.bfloat16).explain.run(images, ids)
    result = mixed(net).explain.run(images, ids)
    assert torch.equal(result["logits"], full["logits"])
    assert torch.equal(result["class_used"], full["class_used"])
    for key in ("weights", "contributions"):
        assert result[key].dtype == torch.float32
        assert 1 - similarity(result[key], full[key]) < 1e-4 < 1 - similarity(half[key], full[key])
    reference = build_explanation_graph(net, SIZE, multi=True)(net, net.encode(images), ids)
    largest = float(reference["logits"].abs().max()) + float(reference["residual"].abs().max())
    assert float((result["residual"] - reference["residual"]).abs().max()) < 0.02 * largest


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_stay_wide_and_their_adjoints_do_not(name):
    nodes = mixed(network(name)).explain.graph.nodes
    layers = [n for n in nodes if n.target in LAYERS]
    adjoints = [n for n in nodes if n.target in ADJOINTS]
    assert layers
    assert adjoints
    for node in layers:
        assert {a.meta["val"].dtype for a in node.args[:2]} == {torch.float32}
    for node in adjoints:
        assert {a.meta["val"].dtype for a in node.args[:2]} == {torch.bfloat16}


def test_each_forward_value_is_rounded_once_right_behind_its_layer():
    """So that the float32 multiplier need not wait for the adjoint."""
    nodes = list(mixed(network("residual")).explain.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    casts = [n for n in nodes if n.target is aten._to_copy.default and n.args[0] in place and "side" in n.args[0].meta]
    rounded = [n.args[0] for n in casts if n.args[0].meta["side"] == "forward"]
    assert len(rounded) == 6  # the multipliers of six layers
    assert len(set(rounded)) == len(rounded)
    for cast in casts[: len(rounded)]:
        assert place[cast] < min(i for n, i in place.items() if n.target in ADJOINTS)


def test_prediction_is_the_forward_dtype_s():
    predict = mixed(network("residual")).predict
    assert all(n.meta["val"].dtype != torch.bfloat16 for n in predict.constants)


def test_float16_gates_divide_by_what_float16_has():
    """The gate of a clamp at 0 divides by at least float32's smallest normal number, which float16 rounds to 0."""

    class Clamped(torch.nn.Module):
        def forward(self, x):
            return x.clamp(min=0)

    torch.manual_seed(0)
    source = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.AvgPool2d(2), Clamped(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    )  # fmt: skip
    net, _ = bcosify(source, Recipe())
    images, ids = torch.rand(2, 3, *SIZE), torch.tensor([[0], [3]])
    full = build_fused(net.eval(), SIZE).explain.run(images, ids)
    half = build_fused(net, SIZE, torch.float16).explain.run(images, ids)
    assert torch.isfinite(half["weights"]).all()
    assert 1 - similarity(half["weights"], full["weights"]) < 1e-2

"""Fusion passes: each makes the nodes it should, and the fused programs compute what the un-fused graph does."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from bcos_rt import bcosify
from bcos_rt.graph import build_explanation_graph
from bcos_rt.graph.capture import capture
from bcos_rt.graph.fuse import (
    fold_norms,
    fuse_convolutions,
    fuse_forward,
    fuse_pools,
    fuse_scaled_activations,
    nest_concatenations,
    prepare_stem,
    refresh,
    thread_squares,
)
from bcos_rt.graph.fused import build_fused
from bcos_rt.graph.program import memory_plan
from tests.graph.networks import NETWORKS, RECIPES, network
from tests.tolerances import TOLERANCES

aten = torch.ops.aten
bcos = torch.ops.bcos_rt
SIZE = (34, 30)
OUTPUTS = ("logits", "class_used", "weights", "contributions", "residual")


def targets(graph) -> list:
    return [n.target for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_programs_equal_the_unfused_graph(name, recipe):
    """Logits, W, contributions and residual of K = 2 classes of each of 3 images, in float64."""
    net = network(name, recipe).double()
    images = torch.rand(3, 3, *SIZE, dtype=torch.float64)
    ids = torch.tensor([[0, -1], [2, 1], [-1, 3]])
    reference = build_explanation_graph(net, SIZE, multi=True)(net, net.encode(images), ids)
    programs = build_fused(net, SIZE, torch.float64)
    result = programs.explain.run(images, ids)
    for key in OUTPUTS:
        limit = TOLERANCES["oracle64"] * float(reference[key].abs().max().clamp(min=1e-30))
        torch.testing.assert_close(result[key], reference[key], rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(programs.predict.run(images, None)["logits"], reference["logits"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("padding", [nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1), nn.ZeroPad2d((0, 1, 0, 1))])
def test_the_stem_behind_any_padding(padding):
    """The channels that fill the encoded image up to eight must not enter a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(padding, nn.Conv2d(3, 8, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.rand(1, 3, *SIZE))
    net = bcosify(model, RECIPES["three channels"])[0].eval().double()
    images, ids = torch.rand(2, 3, *SIZE, dtype=torch.float64), torch.tensor([[0], [1]])
    reference = build_explanation_graph(net, SIZE, multi=True)(net, net.encode(images), ids)
    result = build_fused(net, SIZE, torch.float64).explain.run(images, ids)
    for key in OUTPUTS:
        torch.testing.assert_close(result[key], reference[key], rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


def test_a_residual_network_is_fused_to_the_last_layer():
    programs = build_fused(network("residual"), SIZE)
    made = targets(programs.explain.graph)
    assert made.count(bcos.conv2d_fused.default) == 6  # with the head, a 1x1 convolution before the pool
    assert made.count(bcos.conv2d_transposed.default) == 5
    assert made.count(bcos.conv2d_contributions.default) == 1
    # Only the shortcut's multiplier, on the gradient that two branches share, is a pass by itself.
    assert made.count(bcos.transposed_epilogue.default) == 1
    unfused = {aten.conv2d.default, aten.conv_transpose2d.input, aten.relu.default, bcos.patch_norm.default}
    assert not unfused & set(made)


def test_predicting_saves_nothing_for_an_explanation():
    programs = build_fused(network("residual"), SIZE)
    for node in programs.predict.graph.nodes:
        if node.target is bcos.conv2d_fused.default:
            assert node.args[14:16] == (False, False)  # multiplier, gate
    explained = [n for n in programs.explain.graph.nodes if n.target is bcos.conv2d_fused.default]
    assert all(n.args[14] for n in explained)


def test_multipliers_are_saved_on_the_path_of_an_explanation_only():
    """A gate branch (squeeze and excite) is held constant: its convolutions save nothing."""
    programs = build_fused(network("inverted"), SIZE)
    gates = [n for n in programs.explain.graph.nodes if n.target is bcos.conv2d_fused.default and n.args[11] == 1]
    assert gates
    assert not any(n.args[14] or n.args[15] for n in gates)


def test_fold_norms_leaves_no_batch_norm():
    captured = capture(network("dense", "kept"), SIZE)
    assert aten.batch_norm.default in targets(captured.builder.graph)
    assert fold_norms(captured) == 5
    captured.builder.graph.eliminate_dead_code()
    assert aten.batch_norm.default not in [n.target for n in captured.builder.graph.nodes if n.users]


def test_concatenations_are_nested():
    captured = capture(network("dense"), SIZE)
    assert nest_concatenations(captured) == 3  # a single feature by itself, and two longer lists than the one before
    lengths = [len(n.args[0]) for n in captured.builder.graph.nodes if n.target is aten.cat.default and n.users]
    assert lengths == [2, 2, 2]


def test_convolutions_take_scale_residual_and_activation():
    captured = capture(network("residual"), SIZE)
    assert fuse_convolutions(captured) == 6
    fused = [n for n in captured.builder.graph.nodes if n.target is bcos.conv2d_fused.default]
    assert [n.args[13] for n in fused] == ["relu", "relu", "none", "relu", "relu", "none"]
    assert [n.args[6] is not None for n in fused] == [False, False, False, True, False, False]
    assert all(n.args[4] is not None for n in fused[:5])


def test_pools_and_scaled_activations():
    captured = capture(network("dense"), SIZE)
    nest_concatenations(captured)
    fuse_convolutions(captured)
    refresh(captured)
    assert fuse_pools(captured) == 3
    assert fuse_scaled_activations(captured) == 4


def test_layer_norms_hand_on_deviations_and_sums_of_squares():
    programs = build_fused(network("tokens"), (32, 28))
    made = targets(programs.explain.graph)
    # The norm of the windows is not taken: a row of it is no image's.
    assert made.count(bcos.layer_norm.default) == made.count(bcos.layer_norm_transposed.default) == 4
    assert made.count(aten.layer_norm.default) == 1
    linears = [n for n in programs.explain.graph.nodes if n.target is bcos.linear_fused.default]
    assert len(linears) == 5
    threaded = [n.args[2].args[0].target for n in linears if n.args[2] is not None]
    assert threaded == [bcos.layer_norm.default, bcos.linear_fused.default]


def test_of_a_packed_projection_only_the_values_are_multiplied():
    programs = build_fused(network("tokens"), (32, 28))
    products = [
        n for n in programs.explain.graph.nodes
        if n.target is aten.matmul.default and n.args[1] in programs.explain.constants
    ]  # fmt: skip
    # The windows' MLP, which is not fused, and the values of both packed projections.
    assert [tuple(n.args[1].meta["val"].shape) for n in products] == [(8, 20), (20, 8), (8, 8), (8, 8)]


def test_an_epilogue_copies_nothing():
    """What the residual and a B-cos layer share is read twice, not written twice."""
    programs = build_fused(network("tokens"), (32, 28))
    epilogues = [n for n in programs.explain.graph.nodes if n.target is bcos.transposed_epilogue.default]
    assert epilogues
    assert not any(n.args[4] for n in epilogues if n.args[2] is None and n.args[3] is None)


def test_the_stem_reads_the_image_and_maps_are_written_once():
    captured = capture(network("dense"), SIZE)
    counts = fuse_forward(captured, True)
    assert counts["prepare_stem"] == 1
    assert captured.encoded.meta["val"].shape[1] == 3
    nodes = list(captured.builder.graph.nodes)
    encode = [n for n in nodes if n.target is bcos.encode_image.default]
    stem = next(n for n in nodes if n.target is bcos.conv2d_fused.default)
    assert len(encode) == 1
    assert stem.args[1].meta["val"].shape[1] == 8
    # Every map comes from the op that wrote its image: none is summed by itself.
    assert bcos.square_sum.default not in targets(captured.builder.graph)
    for node in nodes:
        if node.target is bcos.conv2d_fused.default:
            assert node.args[2].target is operator.getitem
            assert node.args[2].args[0] is node.args[0].args[0]


def test_a_map_is_made_where_no_producer_writes_one():
    captured = capture(network("inverted"), SIZE)
    fuse_convolutions(captured)
    refresh(captured)
    prepare_stem(captured, True)
    assert thread_squares(captured) > 0
    made = [n for n in captured.builder.graph.nodes if n.target is bcos.square_sum.default]
    assert len({n.args for n in made}) == len(made)


def test_every_fused_node_knows_its_pass():
    programs = build_fused(network("dense"), SIZE)
    for node in programs.explain.graph.nodes:
        if node.target in (bcos.conv2d_fused.default, bcos.scale_act.default, bcos.encode_image.default):
            assert node.meta["pass"] in programs.passes
            assert node.meta["fused_from"]


def test_memory_grows_with_batch_and_classes_and_prediction_needs_less():
    programs = build_fused(network("residual"), SIZE)
    one, two = memory_plan(programs.explain, 1), memory_plan(programs.explain, 2)
    assert two.peak_bytes > 1.9 * one.peak_bytes
    assert memory_plan(programs.explain, 1, 4).peak_bytes > one.peak_bytes
    assert memory_plan(programs.explain, 1, 4).saved_bytes == one.saved_bytes
    alone = memory_plan(programs.predict, 1)
    assert alone.peak_bytes <= one.peak_bytes
    assert alone.saved_bytes == 0 < one.saved_bytes


def test_half_precision_keeps_scales_and_outputs_wide():
    programs = build_fused(network("residual"), SIZE, torch.bfloat16)
    for node in programs.explain.graph.nodes:
        if node.target is bcos.conv2d_fused.default:
            assert node.args[1].meta["val"].dtype == torch.bfloat16
            assert node.args[4] is None or node.args[4].meta["val"].dtype == torch.float32
    for name in ("logits", "weights", "contributions", "residual"):
        assert programs.explain.outputs[name].meta["val"].dtype == torch.float32
    images, ids = torch.rand(2, 3, *SIZE), torch.tensor([[0], [1]])
    net = network("residual")
    reference = build_explanation_graph(net, SIZE, multi=True)(net, net.encode(images), ids)
    result = programs.explain.run(images, ids)
    similar = torch.nn.functional.cosine_similarity(
        result["contributions"].flatten(1), reference["contributions"].flatten(1)
    )
    assert float(similar.min()) > 0.99

"""The rewrites change the form of a program and nothing it computes: compared in float64."""

import math

import pytest
import torch

pytest.importorskip("onnx_ir")

from bcos_rt import Recipe
from bcos_rt.export import fused
from bcos_rt.export.half import HEADROOM, scale_seed, wide_nodes
from bcos_rt.export.passes import fuse_bcos_convolutions, rewrite
from bcos_rt.export.program import OUTPUTS, build_program
from bcos_rt.graph import build_explanation_graph
from tests.export.harness import seeded_images, small_network
from tests.tolerances import TOLERANCES

SIZE = (32, 40)
RECIPES = {
    "published": Recipe(),
    "b1.5": Recipe(b=1.5),
    "b3": Recipe(b=3.0),
    "unit-norm": Recipe(weight_norm="unit"),
    "biases": Recipe(biases="keep"),
    "batch-norm": Recipe(biases="keep", batch_norm="keep"),
    "identity": Recipe(activations="identity", stem_pool="keep"),
    "equivalent": Recipe.equivalent(),
}
aten = torch.ops.aten


@pytest.fixture(scope="module", params=RECIPES)
def case(request):
    """(name, network in float64, its explanation graph)"""
    net = small_network(RECIPES[request.param], SIZE).double()
    return request.param, net, build_explanation_graph(net, SIZE)


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_rewritten_programs_compute_the_same(case):
    _, net, graph = case
    program = build_program(graph, net)
    images, ids = seeded_images(SIZE).double(), torch.tensor([3, -1, 0])
    assert program.image is not None
    before = program.run(images, ids)
    expected = graph(net, net.encode(images), ids)
    rewrite(program)
    after = program.run(images, ids)
    for name in OUTPUTS:
        scale = float(before[name].abs().max())
        assert scale > 0 or name == "residual", name
        tolerance = TOLERANCES["oracle64"] * max(scale, 1e-9)
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=tolerance)
        if name != "picture":
            torch.testing.assert_close(before[name], expected[name], rtol=0, atol=tolerance)


def test_what_was_rewritten(case):
    """No norm's scale is left in the forward pass, B-cos convolutions are one node, and every weight is there once."""
    name, net, graph = case
    program = build_program(graph, net)
    rewrite(program)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    layers = [n for n in nodes if n.target is fused.bcos_conv2d]
    # Six convolutions (two more compute the gate and stay plain), and with B-cos the head as a seventh; those with a
    # bias stay in pieces.
    assert len(layers) == {"equivalent": 0, "biases": 5, "batch-norm": 5}.get(name, 7)
    # The stem's ReLU and the dilated convolution's: the others follow a sum, or are no ReLU.
    relus = [n for n in layers if n.args[10]]
    assert len(relus) == (2 if name in ("published", "unit-norm") else 0)
    scaled = [
        n
        for n in nodes
        if n.target is aten.mul.Tensor and n.meta.get("side") != "adjoint"
        if any(m in program.constants and program.constants[m].numel() >= 16 for m in n.args)
    ]
    assert not scaled or name == "batch-norm"
    weights = [v.numel() for v in program.constants.values() if v.ndim in (2, 4) and v.numel() >= 32]
    source = [v.numel() for v in net.parameters() if v.ndim in (2, 4)]
    assert sorted(weights) == sorted(source)


def test_several_classes_of_each_image():
    net = small_network(Recipe(), SIZE).double()
    graph = build_explanation_graph(net, SIZE, multi=True)
    program = build_program(graph, net)
    images, ids = seeded_images(SIZE, 2).double(), torch.tensor([[3, -1, 0, 0], [1, 2, 6, -1]])
    assert rewrite(program)["ReLUs moved before the scaling"] == 2
    after = program.run(images, ids)
    expected = graph(net, net.encode(images), ids)
    for name in ("weights", "contributions", "residual", "class_used"):
        torch.testing.assert_close(after[name], expected[name], rtol=1e-9, atol=1e-12)
    assert after["picture"].shape == (2, 4, *SIZE, 4)
    assert not isinstance(program.outputs["weights"].meta["val"].shape[1], int)  # K is free


def test_a_value_seen_elsewhere_is_left_alone():
    """The norm's scale cannot go into the weights where something else reads the unscaled value."""
    net = small_network(Recipe(), SIZE)
    program = build_program(build_explanation_graph(net, SIZE), net)
    scale = next(n for n in program.graph.nodes if n.target is torch.ops.bcos_rt.dynamic_scale.default)
    product = next(u for u in scale.users if u.target is aten.mul.Tensor)
    output = next(n for n in program.graph.nodes if n.op == "output")
    program.outputs["raw"] = product
    output.args = (dict(program.outputs),)
    images, ids = seeded_images(SIZE), torch.tensor([0, 1, 2])
    before = program.run(images, ids)
    fuse_bcos_convolutions(program)
    after = program.run(images, ids)
    for name in ("raw", "logits", "weights"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-5 * float(before[name].abs().max()))


def test_left_out_outputs_take_their_nodes_along():
    net = small_network(Recipe(), SIZE)
    graph = build_explanation_graph(net, SIZE)
    everything, logits = build_program(graph, net), build_program(graph, net, ["logits"])
    assert aten.conv_transpose2d.input in targets(everything)
    assert aten.conv_transpose2d.input not in targets(logits)
    assert logits.adjoint is None
    assert list(logits.outputs) == ["logits"]
    # The graph itself is not changed by what is made of it.
    assert torch.ops.bcos_rt.patch_norm.default in [n.target for n in graph.module.graph.nodes]


@pytest.mark.parametrize("multi", [False, True])
def test_seed_scaling_changes_no_output(case, multi):
    _, net, graph = case
    if multi:
        graph = build_explanation_graph(net, SIZE, multi=True)
    program = build_program(graph, net)
    images, ids = seeded_images(SIZE, 2).double(), torch.tensor([[3, -1], [0, 0]] if multi else [3, -1])
    before = program.run(images, ids)
    # The top class of each image, as an export calibrates.
    factor = scale_seed(program, images, torch.full_like(ids, -1))
    assert factor > 1
    assert factor == 2 ** round(math.log2(factor))
    largest = []
    half = {n for n in program.graph.nodes if n.meta.get("side") == "adjoint"} - wide_nodes(program)

    def watch(node, value):
        if node in half and isinstance(value, torch.Tensor) and value.is_floating_point():
            largest.append(float(value.abs().max()))

    after = program.run(images, ids, watch)
    assert max(largest) <= torch.finfo(torch.float16).max / HEADROOM
    rewrite(program)
    for name, value in program.run(images, ids).items():
        scale = max(float(before[name].abs().max()), 1e-9)
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9 * scale)

"""Counts of bytes and operations: layers, fused plans and op-by-op counting, against numbers worked out by hand."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bcos_rt.errors import InvalidArgumentError, UnsupportedOpError
from bcos_rt.kernels.static.roofline import Kernel, OpCounter, plan, roofline, summary
from bcos_rt.kernels.static.shapes import capture, layers, trace
from bcos_rt.kernels.static.targets import TARGETS

# Batch, side, pixels.
N, S = 2, 8
P = N * S * S
BF16 = torch.bfloat16


def counted(function) -> list[Kernel]:
    with OpCounter() as counter:
        function()
    return counter.kernels


def only(kernels: list[Kernel], layer: str, op: str) -> Kernel:
    (found,) = (k for k in kernels if k.layer == layer and k.op == op)
    return found


def meta(*shape: int, dtype=BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Block(nn.Module):
    """Stem, one residual block with ReLUs, global pooling, head."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.conv(x))
        return self.head(x.mean((2, 3)))


def small(channels: int = 8):
    with torch.device("meta"):
        return trace(Block(channels).eval(), torch.empty(N, channels, S, S))


# Layers -----------------------------------------------------------------------------------------------------------


def test_layers_of_resnet50():
    found = layers("resnet50", 4)
    convs = [one for one in found if one.gemm]
    assert len(convs) == 54
    stem = found[0]
    assert (stem.name, stem.kind, stem.input_shape, stem.weight_shape) == (
        "conv1", "conv2d", (4, 8, 224, 224), (64, 8, 7, 7),
    )  # fmt: skip
    assert (stem.m, stem.n, stem.k, stem.stride, stem.padding) == (4 * 112 * 112, 64, 8 * 49, (2, 2), (3, 3))
    assert stem.followed_by == ("batch_norm", "relu")
    assert next(one for one in found if one.name == "layer1.1.conv3").followed_by == ("batch_norm", "add", "relu")
    assert (convs[-1].m, convs[-1].n, convs[-1].k) == (4, 1000, 2048)
    # 4.09 billion multiply-adds an image are known for three channels; five more add 64 * 5 * 49 * 112^2.
    assert sum(one.flops for one in found) / 8 == pytest.approx(4.089e9 + 64 * 5 * 49 * 112**2, rel=1e-3)


def test_layers_of_vit_and_groups():
    found = [one for one in layers("vit_b_16", 2) if one.name.startswith("encoder.layers.encoder_layer_3.")]
    assert [one.name.split("encoder_layer_3.")[1] for one in found] == [
        "ln_1", "self_attention.in_proj", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3",
    ]  # fmt: skip
    assert next((one.m, one.n, one.k) for one in found if one.gemm) == (2 * 197, 2304, 768)
    grouped = next(one for one in layers("resnext50_32x4d", 1) if one.groups == 32)
    assert (grouped.n, grouped.k) == (4, 36)
    assert grouped.flops == 2 * 56 * 56 * 128 * 36
    assert any(one.depthwise for one in layers("mobilenet_v2", 1))
    assert not grouped.depthwise


def test_layers_refuse():
    with pytest.raises(InvalidArgumentError, match=r"model: got 'resnet5'.*did you mean 'resnet50'"):
        layers("resnet5", 1)
    with pytest.raises(InvalidArgumentError, match="batch: got 0"):
        layers("resnet18", 0)


# Fused plans ------------------------------------------------------------------------------------------------------


def test_forward_plan_by_hand():
    kernels = plan(small(), N, S, BF16, explain=False)
    assert [(k.layer, k.op) for k in kernels] == [
        ("stem", "encode_image"), ("stem", "conv2d"), ("conv", "conv2d"), ("mean", "avg_pool2d"), ("head", "linear"),
    ]  # fmt: skip
    assert [(dict(k.read), dict(k.written)) for k in kernels] == [
        ({"image": P * 3 * 4}, {"x": P * 16, "squares": P * 4}),
        ({"x": P * 16, "weight": 16 * 72 * 2, "parameters": 128, "squares": P * 4}, {"y": P * 32, "squares": P * 4}),
        (
            {"x": P * 32, "weight": 16 * 144 * 2, "parameters": 128, "squares": P * 4, "residual": P * 32},
            {"y": P * 32},
        ),
        ({"x": P * 32}, {"y": N * 32, "squares": N * 4}),
        ({"x": N * 32, "weight": 320, "parameters": 80, "squares": N * 4}, {"y": N * 20}),
    ]
    assert [k.flops for k in kernels] == [0, 2 * P * 16 * 72, 2 * P * 16 * 144, 0, 2 * N * 160]


def test_explanation_plan_by_hand():
    kernels = plan(small(), N, S, BF16)
    forward = [k for k in kernels if not k.explanation]
    # Multipliers everywhere, a gate (bits) where the residual addition ends in a ReLU.
    assert only(forward, "stem", "conv2d").written == {"y": P * 32, "squares": P * 4, "multiplier": P * 32}
    assert only(forward, "conv", "conv2d").written == {"y": P * 32, "multiplier": P * 32, "gate": P * 2}
    back = [k for k in kernels if k.explanation]
    assert [(k.layer, k.op, dict(k.read), dict(k.written)) for k in back] == [
        ("head", "seed", {"multiplier": N * 20}, {"grad": N * 20}),
        ("head", "linear_transposed", {"grad": N * 20, "weight": 320}, {"grad": N * 32}),
        (
            "mean", "avg_pool2d_transposed",
            {"grad": N * 32, "multiplier": P * 32, "gate": P * 2}, {"grad": P * 32, "raw": P * 32},
        ),
        (
            "conv", "conv2d_transposed",
            {"grad": P * 32, "weight": 16 * 144 * 2, "identity": P * 32, "multiplier": P * 32}, {"grad": P * 32},
        ),
        (
            "stem", "conv2d_contributions",
            {"grad": P * 32, "weight": 16 * 72 * 2, "image": P * 12}, {"contributions": P * 4, "colour": P * 16},
        ),
    ]  # fmt: skip


def test_plain_plan_by_hand():
    kernels = plan(small(3), N, S, BF16, bcos=False)
    assert [(k.layer, k.op, dict(k.read), dict(k.written)) for k in kernels] == [
        ("stem", "conv2d", {"x": P * 6, "weight": 16 * 27 * 2, "parameters": 64}, {"y": P * 32, "multiplier": P * 2}),
        (
            "conv", "conv2d",
            {"x": P * 32, "weight": 16 * 144 * 2, "parameters": 64, "residual": P * 32},
            {"y": P * 32, "multiplier": P * 2},
        ),
        ("mean", "avg_pool2d", {"x": P * 32}, {"y": N * 32}),
        ("head", "linear", {"x": N * 32, "weight": 320, "parameters": 40}, {"y": N * 20}),
        ("head", "seed", {}, {"grad": N * 20}),
        ("head", "linear_transposed", {"grad": N * 20, "weight": 320}, {"grad": N * 32}),
        ("mean", "avg_pool2d_transposed", {"grad": N * 32, "multiplier": P * 2}, {"grad": P * 32}),
        (
            "conv", "conv2d_transposed",
            {"grad": P * 32, "weight": 16 * 144 * 2, "identity": P * 32, "multiplier": P * 2}, {"grad": P * 32},
        ),
        ("stem", "conv2d_transposed", {"grad": P * 32, "weight": 16 * 27 * 2}, {"grad": P * 6}),
    ]  # fmt: skip


def test_branch_that_ends_in_an_addition_is_multiplied_by_itself():
    kernels = plan(capture("resnet18", 1, 64), 1, 64, BF16)
    # Three blocks with a convolution in the identity branch; their main branch's multiplier has no epilogue.
    assert [k.layer for k in kernels if k.op == "multiply"] == [f"layer{i}.0.conv2" for i in (4, 3, 2)]
    assert sum(k.flops for k in kernels if k.explanation) == sum(k.flops for k in kernels if not k.explanation)


def test_vit_transposes_only_the_values():
    kernels = plan(capture("vit_b_16", 1), 1, 224, BF16)
    name = "encoder.layers.encoder_layer_5.self_attention"
    forward, back = only(kernels, f"{name}.in_proj", "linear"), only(kernels, f"{name}.in_proj", "linear_transposed")
    assert back.flops * 3 == forward.flops == 2 * 197 * 2304 * 768
    assert back.read["weight"] == 768 * 768 * 2
    assert only(kernels, name, "attention").flops == only(kernels, name, "attention_transposed").flops
    assert only(kernels, name, "attention").flops == 4 * 12 * 197 * 197 * 64


def test_operations_without_a_kernel_are_refused():
    with pytest.raises(UnsupportedOpError, match="roofline: cat"):
        plan(capture("squeezenet1_1", 1, 64), 1, 64, BF16)
    with pytest.raises(UnsupportedOpError, match="roofline"):
        plan(capture("mobilenet_v3_small", 1, 64), 1, 64, BF16)


# Op by op ---------------------------------------------------------------------------------------------------------


def test_counter_on_known_operations():
    a, b, w = meta(4, 6), meta(4, 6), meta(6, 5)
    (one,) = counted(lambda: a + b)
    assert (one.op, one.bytes, one.flops) == ("aten.add", 3 * 48, 0)
    (one,) = counted(lambda: a.relu_())
    assert one.bytes == 2 * 48
    (one,) = counted(lambda: a.add_(b))
    assert one.bytes == 3 * 48
    (one,) = counted(lambda: a * a)
    assert one.bytes == 2 * 48
    (one,) = counted(lambda: a @ w)
    assert (one.bytes, one.flops) == (48 + 60 + 40, 2 * 4 * 6 * 5)
    (one,) = counted(lambda: torch.zeros_like(a))
    assert one.bytes == 48
    (one,) = counted(lambda: a.copy_(b))
    assert one.bytes == 96
    # An expanded operand is read once.
    (one,) = counted(lambda: a + meta(1, 6).expand(4, 6))[-1:]
    assert one.bytes == 48 + 12 + 48


def test_counter_ignores_views_and_allocation():
    a = meta(4, 6)
    assert not counted(lambda: (a.view(24), a.t(), a[1:], a.unsqueeze(0).expand(3, 4, 6), a.detach()))
    assert not counted(lambda: (torch.empty_like(a), a.new_empty(3)))


def test_counter_of_a_convolution_and_its_gradient():
    x, w = meta(2, 8, 6, 6).requires_grad_(), meta(4, 8, 3, 3)
    with OpCounter() as counter:
        F.conv2d(x, w, padding=1).backward(meta(2, 4, 6, 6))
    forward = next(k for k in counter.kernels if k.op == "aten.convolution")
    back = next(k for k in counter.kernels if k.op == "aten.convolution_backward")
    x_bytes, w_bytes, y_bytes = 2 * 8 * 36 * 2, 4 * 8 * 9 * 2, 2 * 4 * 36 * 2
    assert forward.bytes == back.bytes == x_bytes + w_bytes + y_bytes
    assert forward.flops == back.flops == 2 * 2 * 36 * 4 * 72


def test_published_convolution_by_hand():
    bcos = pytest.importorskip("bcos.modules")
    with torch.device("meta"):
        net = bcos.BcosConv2d(8, 16, 3, padding=1).to(BF16)
    x = meta(N, 8, S, S)
    with torch.no_grad():
        kernels = counted(lambda: net(x))
    w, image, norm, y = 16 * 72 * 2, P * 16, P * 2, P * 32
    assert [(k.op.removeprefix("aten."), k.bytes) for k in kernels] == [
        ("linalg_vector_norm", w + 32), ("div", 2 * w + 32), ("convolution", image + w + y),
        ("pow", 2 * image), ("sum", image + norm), ("avg_pool2d", 2 * norm), ("mul", 2 * norm), ("add", 2 * norm),
        ("sqrt_", 2 * norm), ("abs", 2 * y), ("div", 2 * y + norm), ("mul", 3 * y),
    ]  # fmt: skip


# Whole networks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50():
    pytest.importorskip("bcos")
    return summary("resnet50", 32, "bf16")


def test_resnet50_forward_is_close_to_the_plain_network(resnet50):
    ratio = resnet50["ratios"]["fused/plain"]["forward"]
    assert 1 < ratio["bytes"] <= 1.15
    assert 1 < ratio["bound_ms"] <= 1.15


def test_resnet50_published_moves_several_times_more(resnet50):
    assert resnet50["ratios"]["published/fused"]["forward"]["bytes"] > 4
    assert resnet50["ratios"]["published/fused"]["explained"]["bytes"] > 2


def test_layers_add_up(resnet50):
    for part, way in (("fused_forward", "fused"), ("published_forward", "published"), ("plain_forward", "plain")):
        for what in ("bytes", "flops", "kernels"):
            assert sum(row[part][what] for row in resnet50["layers"]) == resnet50["totals"][way]["forward"][what]


def test_bound_is_the_slower_of_memory_and_arithmetic():
    target = TARGETS["sm_90"]
    moving = Kernel("", "", False, {"x": 3_350_000_000}, {}, 1)
    assert moving.milliseconds(target, "bf16") == pytest.approx(1.0)
    assert Kernel("", "", False, {"x": 1}, {}, 989_400_000_000).milliseconds(target, "bf16") == pytest.approx(1.0)


def test_command_prints_tables_json_and_writes_results(tmp_path):
    pytest.importorskip("bcos")
    stream = io.StringIO()
    roofline("resnet18", batch=1, stream=stream)
    assert "nothing was measured" in stream.getvalue()
    assert "layer4.1.conv2" in stream.getvalue()
    stream = io.StringIO()
    roofline("resnet18", batch=1, as_json=True, stream=stream)
    found = json.loads(stream.getvalue())
    assert found["model"] == "resnet18"
    assert found["measured"] is False
    roofline(["resnet18"], batch=1, out=tmp_path, stream=io.StringIO())
    assert json.loads((tmp_path / "roofline.json").read_text())[0] == found
    assert "## resnet18" in (tmp_path / "roofline.md").read_text()


def test_command_refuses():
    with pytest.raises(InvalidArgumentError, match=r"dtype: got 'bf17'.*did you mean 'bf16'"):
        roofline("resnet18", dtype="bf17")
    with pytest.raises(InvalidArgumentError, match="arch: got 'sm_9'"):
        roofline("resnet18", arch="sm_9")

"""Each rule against autograd in float64, one op (or one idiom) per network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bcos_rt import BcosNetwork, Recipe
from bcos_rt.errors import UnsupportedOpError
from bcos_rt.graph import RULES, build_explanation_graph, rule
from bcos_rt.nn import BatchNormUncentered2d, BcosConv2d, BcosLinear, InputEncoding, LogitLayer
from tests.oracle import oracle

SIZE = (13, 10)  # odd and unequal on purpose


class Body(nn.Module):
    """conv -> the op under test -> pooled linear head."""

    def __init__(self, function, channels=8, modules=None):
        super().__init__()
        self.function = function
        self.stem = nn.Conv2d(6, channels, 3, padding=1)
        self.parts = nn.ModuleDict(modules or {})
        self.head = nn.LazyLinear(5)

    def forward(self, x):
        x = self.function(self.parts, self.stem(x))
        return self.head(x.flatten(1))


def network(function, modules=None, channels=8, **kwargs):
    torch.manual_seed(3)
    body = Body(function, channels, modules)
    body(torch.rand(2, 6, *SIZE))
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 1)
    encoding = InputEncoding((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return BcosNetwork(body, encoding, LogitLayer(-1.5, 2.0), Recipe(), {}, **kwargs).double().eval()


def _response(x):
    """Global response normalisation's factor (ConvNeXt V2, arXiv 2301.00808, section 3)."""
    norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return norm / (norm.mean(1, keepdim=True) + 1e-6)


CASES = {
    "conv_stride": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 4, 3, 2, 1)),
    "conv_dilated": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 4, (3, 2), 2, (2, 1), dilation=(2, 3))),
    "conv_grouped": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 12, 3, 3, 0, groups=4)),
    "conv_depthwise": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 16, 5, 2, 2, groups=8)),
    "conv_same": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 4, 3, padding="same")),
    "conv_reflect": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")),
    "conv_replicate": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="replicate")),
    "bcos_b1": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, 2, 1, b=1)),
    "bcos_b1.5": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, 2, 1, b=1.5)),
    "bcos_b2": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, 2, 1, b=2)),
    "bcos_b2.5": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, 2, 1, b=2.5, bias=False)),
    "bcos_grouped": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, 2, 1, groups=2)),
    "bcos_depthwise": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 8, 3, 1, 1, groups=8)),
    "bcos_dilated": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, 1, 2, dilation=2)),
    "bcos_unit": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, weight_norm="unit")),
    "bcos_tf_same": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, 2, tf_same_padding=True)),
    "bcos_reflect": (lambda p, x: p["m"](x), lambda: BcosConv2d(8, 4, 3, padding=1, padding_mode="reflect")),
    "linear": (lambda p, x: p["m"](x.permute(0, 2, 3, 1)), lambda: nn.Linear(8, 3)),
    "linear_part": (lambda p, x: p["m"](x.permute(0, 2, 3, 1)).chunk(3, -1)[2], lambda: nn.Linear(8, 12)),
    "linear_part_of_part": (
        lambda p, x: p["m"](x.permute(0, 2, 3, 1)).chunk(3, -1)[1].chunk(2, -1)[1], lambda: nn.Linear(8, 12)
    ),
    "linear_parts_apart": (
        lambda p, x: p["m"](x.permute(0, 2, 3, 1))[..., 1::4] + p["m"](x.permute(0, 2, 3, 1))[..., 2:5],
        lambda: nn.Linear(8, 12),
    ),
    "linear_unbound": (
        lambda p, x: p["m"](x.permute(0, 2, 3, 1)).unflatten(-1, (3, 2, 2)).permute(3, 0, 4, 1, 2, 5).unbind(0)[2],
        lambda: nn.Linear(8, 12),
    ),
    "bcos_linear": (lambda p, x: p["m"](x.permute(0, 2, 3, 1)), lambda: BcosLinear(8, 3)),
    "bcos_linear_b1.5": (lambda p, x: p["m"](x.permute(0, 2, 3, 1)), lambda: BcosLinear(8, 3, b=1.5, bias=False)),
    "batch_norm": (lambda p, x: p["m"](x), lambda: nn.BatchNorm2d(8)),
    "batch_norm_plain": (lambda p, x: p["m"](x), lambda: nn.BatchNorm2d(8)),
    "batch_norm_uncentered": (lambda p, x: p["m"](x), lambda: BatchNormUncentered2d(8)),
    "layer_norm": (lambda p, x: p["m"](x.permute(0, 2, 3, 1)), lambda: nn.LayerNorm(8)),
    "layer_norm_2d": (lambda p, x: p["m"](x.permute(0, 2, 3, 1)), lambda: nn.LayerNorm((10, 8))),
    "layer_norm_plain": (lambda p, x: p["m"](x), lambda: nn.LayerNorm(10, elementwise_affine=False)),
    "group_norm": (lambda p, x: p["m"](x), lambda: nn.GroupNorm(4, 8)),
    "relu": (lambda p, x: F.relu(x), None),
    "relu_inplace": (lambda p, x: F.relu(x * 1.0, inplace=True), None),
    "relu6": (lambda p, x: F.relu6(4 * x), None),
    "gelu": (lambda p, x: F.gelu(x), None),
    "silu": (lambda p, x: F.silu(x), None),
    "hardswish": (lambda p, x: F.hardswish(3 * x), None),
    "avg_pool": (lambda p, x: F.avg_pool2d(x, 3, 2, 1), None),
    "avg_pool_ceil": (lambda p, x: F.avg_pool2d(x, 2, 2, 0, ceil_mode=True, count_include_pad=False), None),
    "max_pool": (lambda p, x: F.max_pool2d(x, 3, 2, 1), None),
    "max_pool_ceil": (lambda p, x: F.max_pool2d(x, 3, 2, 0, ceil_mode=True), None),
    "max_pool_dilated": (lambda p, x: F.max_pool2d(x, 2, 1, 1, 2), None),
    "adaptive_global": (lambda p, x: F.adaptive_avg_pool2d(x, 1), None),
    "adaptive_uneven": (lambda p, x: F.adaptive_avg_pool2d(x, (5, 3)), None),
    "adaptive_larger": (lambda p, x: F.adaptive_avg_pool2d(x, (16, 12)), None),
    "mean": (lambda p, x: x.mean((2, 3)), None),
    "mean_keepdim": (lambda p, x: x.mean((-2, -1), keepdim=True), None),
    "sum": (lambda p, x: x.sum(3), None),
    "cat": (lambda p, x: torch.cat([x, 2 * x, x[:, :3]], 1), None),
    "stack": (lambda p, x: torch.stack([x, -x], 2), None),
    "chunk": (lambda p, x: torch.cat([c * (i + 1) for i, c in enumerate(x.chunk(3, 1))], 1), None),
    "split_unused": (lambda p, x: x.split([3, 5], 1)[1], None),
    "unbind": (lambda p, x: x.unbind(1)[2] + 3 * x.unbind(1)[4], None),
    "slice_steps": (lambda p, x: torch.cat([x[:, :, 0::2, 1::3].flatten(1), x[:, :, 1::2].flatten(1)], 1), None),
    "select": (lambda p, x: x[:, 3] + x[:, -1], None),
    "pad_value": (lambda p, x: F.pad(x, (1, 2, 3, 0), value=0.7), None),
    "crop": (lambda p, x: F.pad(x, (-1, -2, 3, 0)), None),
    "roll": (lambda p, x: torch.roll(x, (2, -1), (2, 3)), None),
    "scalar_arithmetic": (lambda p, x: (1 - (x + 2) * 3 - 0.5) / 4, None),
    "subtract": (lambda p, x: torch.sub(x, x.mean((2, 3), keepdim=True), alpha=0.5), None),
    "rsub_tensor": (lambda p, x: p["m"].weight[:, :, 0, 0].t()[None, :, :1, None] - x, lambda: nn.Conv2d(8, 4, 1)),
    "broadcast_mul": (lambda p, x: x * p["m"].weight[:, 0, 0, 0][None, :, None, None], lambda: nn.Conv2d(1, 8, 1)),
    "squeeze_excite": (lambda p, x: x * p["m"](x.mean((2, 3), keepdim=True)).sigmoid(), lambda: nn.Conv2d(8, 8, 1)),
    "swish_by_hand": (lambda p, x: x * torch.sigmoid(x), None),
    "constant_matmul": (lambda p, x: p["m"].weight[:, :, 0, 0] @ x.flatten(2), lambda: nn.Conv2d(8, 4, 1)),
    "elu": (lambda p, x: F.elu(2 * x, 1.5), None),
    "selu": (lambda p, x: F.selu(2 * x), None),
    "celu": (lambda p, x: F.celu(2 * x, 0.7), None),
    "tanh": (lambda p, x: F.tanh(2 * x), None),
    "rrelu": (lambda p, x: F.rrelu(x), None),
    "glu": (lambda p, x: F.glu(x, 1), None),
    "maximum": (lambda p, x: torch.maximum(x[:, :4], 2 * x[:, 4:]) + torch.minimum(x[:, :4], x[:, 4:].relu()), None),
    "where": (lambda p, x: torch.where(x > 0.1, x, 0.3 * x[:, :1]) + torch.where(x > 0, x, 0.5), None),
    "masked_fill": (lambda p, x: x.masked_fill(x < 0.1, 0.7), None),
    "conv_transpose": (lambda p, x: p["m"](x), lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2)),
    "conv_transpose_dilated": (lambda p, x: p["m"](x), lambda: nn.ConvTranspose2d(8, 4, (3, 2), 1, 0, 1, dilation=2)),
    "conv_circular": (lambda p, x: p["m"](x), lambda: nn.Conv2d(8, 4, (3, 5), padding=(1, 2), padding_mode="circular")),
    "instance_norm": (lambda p, x: p["m"](x), lambda: nn.InstanceNorm2d(8, affine=True)),
    "instance_norm_running": (lambda p, x: p["m"](x), lambda: nn.InstanceNorm2d(8, track_running_stats=True)),
    "adaptive_max": (lambda p, x: F.adaptive_max_pool2d(x, (4, 3)), None),
    "adaptive_max_global": (lambda p, x: F.adaptive_max_pool2d(x, 1), None),
    "upsample_nearest": (lambda p, x: F.interpolate(x, scale_factor=1.7), None),
    "upsample_nearest_exact": (lambda p, x: F.interpolate(x, (9, 21), mode="nearest-exact"), None),
    "upsample_bilinear": (lambda p, x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear"), None),
    "upsample_corners": (lambda p, x: F.interpolate(x, (7, 23), mode="bilinear", align_corners=True), None),
    "upsample_twice": (lambda p, x: F.interpolate(F.interpolate(x, (7, 23), mode="bilinear"), (13, 10)), None),
    "upsample_bicubic": (lambda p, x: F.interpolate(x, (17, 8), mode="bicubic"), None),
    "filled_like": (lambda p, x: x * torch.full_like(x[:, :1], 1.5) + torch.ones_like(x) + x.new_zeros(1), None),
    "amax": (lambda p, x: x.amax((2, 3)), None),
    "amax_keepdim": (lambda p, x: x.amax(1, keepdim=True) + x.amin((1, 3), keepdim=True), None),
    "max_dim": (lambda p, x: x.max(1)[0] + x.min(1, keepdim=True)[0][:, 0], None),
    "flip": (lambda p, x: x.flip(3) * p["m"].weight[:, 0], lambda: nn.Conv2d(1, 8, SIZE)),
    "pixel_shuffle": (lambda p, x: F.pixel_shuffle(x, 2), None),
    "pixel_unshuffle": (lambda p, x: F.pixel_unshuffle(x[:, :, :12], 2), None),
    "channel_shuffle": (lambda p, x: F.channel_shuffle(x, 2), None),
    "repeat": (lambda p, x: x.repeat(1, 2, 3, 1), None),
    "repeat_interleave": (lambda p, x: x.repeat_interleave(3, 2), None),
    "index": (lambda p, x: x[:, [0, 2, 2, 5]], None),
    "index_select": (lambda p, x: x.index_select(2, torch.tensor([1, 4, 1])), None),
    "expand": (lambda p, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 4), None),
    "reshape_as": (lambda p, x: (x.flatten(2).reshape_as(x) * 2).view_as(x), None),
    "type_as": (lambda p, x: x.type_as(x) * torch.full((2,), 1.5, dtype=torch.float32)[:1].type_as(x), None),
    "adaptive_avg_pool1d": (lambda p, x: F.adaptive_avg_pool1d(x.flatten(2), 1).flatten(1), None),
    "response_norm": (lambda p, x: F.relu(x) * _response(F.relu(x)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule_matches_autograd(name):
    function, module = CASES[name]
    net = network(function, {"m": module()} if module else None)
    images = torch.rand(3, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    encoded = net.encode(images)
    targets = torch.tensor([1, 4, 0])
    result = build_explanation_graph(net, SIZE)(net, encoded, targets)
    logits, weights = oracle(net, encoded, targets)
    torch.testing.assert_close(result["logits"], logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result["weights"], weights, rtol=1e-9, atol=1e-9 * float(weights.abs().max()))
    total = result["contributions"].sum((1, 2)) + result["residual"]
    torch.testing.assert_close(total, logits.gather(1, targets[:, None])[:, 0], rtol=1e-9, atol=1e-9)


MULTI = ("bcos_grouped", "group_norm", "max_pool", "squeeze_excite", "adaptive_uneven", "adaptive_max", "index", "glu")
MULTI += ("where", "maximum", "amax", "max_dim", "upsample_bilinear", "channel_shuffle", "repeat", "instance_norm")


@pytest.mark.parametrize("name", MULTI)
def test_several_classes_share_one_forward(name):
    function, module = CASES[name]
    net = network(function, {"m": module()} if module else None)
    encoded = net.encode(torch.rand(2, 3, *SIZE, dtype=torch.float64))
    ids = torch.tensor([[3, -1, 0], [1, 2, 2]])
    many = build_explanation_graph(net, SIZE, multi=True)(net, encoded, ids)
    one = build_explanation_graph(net, SIZE)
    for k in range(3):
        single = one(net, encoded, ids[:, k])
        for key in ("class_used", "weights", "contributions", "residual"):
            torch.testing.assert_close(many[key][:, k], single[key], rtol=1e-12, atol=1e-14)


def test_a_corrupted_rule_breaks_completeness():
    """The residual is computed from constants, so a wrong transpose cannot hide in it."""
    net = network(CASES["conv_stride"][0], {"m": nn.Conv2d(8, 4, 3, 2, 1)})
    encoded = net.encode(torch.rand(2, 3, *SIZE, dtype=torch.float64))

    def wrong(adjoint, node, grad):
        RULES[torch.ops.aten.conv2d.default](adjoint, node, adjoint.call(torch.ops.aten.mul.Scalar, grad, 1.01))

    broken = {**RULES, torch.ops.aten.conv2d.default: wrong}
    ids = torch.tensor([1, 2])
    for rules, complete in ((RULES, True), (broken, False)):
        result = build_explanation_graph(net, SIZE, rules=rules)(net, encoded, ids)
        total = result["contributions"].sum((1, 2)) + result["residual"]
        error = (total - result["logits"].gather(1, ids[:, None])[:, 0]).abs().max()
        assert (float(error) < 1e-9) is complete


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda p, x: x * x.flip(3), "gate"),
        (lambda p, x: torch.cos(x), r"aten\.cos\.default in backbone"),
        (lambda p, x: torch.sigmoid(x), r"aten\.sigmoid\.default"),
        (lambda p, x: 1 / (x + 10), "reciprocal|div"),
        (lambda p, x: x.clamp(1, 2), "clamp"),
    ],
)
def test_ops_without_a_rule_are_named(function, match):
    with pytest.raises(UnsupportedOpError, match=match):
        build_explanation_graph(network(function), SIZE)


def test_a_user_can_add_a_rule():
    target = torch.ops.aten.cos.default
    try:

        @rule(target)
        def cos(adjoint, node, grad):
            x = node.args[0]
            gate = adjoint.call(torch.ops.aten.div.Tensor, node, x)
            adjoint.send(x, adjoint.call(torch.ops.aten.mul.Tensor, grad, adjoint.saved(gate)))

        net = network(lambda p, x: torch.cos(x))
        encoded = net.encode(torch.rand(2, 3, *SIZE, dtype=torch.float64))
        result = build_explanation_graph(net, SIZE)(net, encoded, torch.tensor([-1, -1]))
    finally:
        del RULES[target]
    total = result["contributions"].sum((1, 2)) + result["residual"]
    torch.testing.assert_close(total, result["logits"].amax(1), rtol=1e-9, atol=1e-9)


def test_batches_other_than_the_captured_one():
    net = network(CASES["bcos_b2"][0], {"m": BcosConv2d(8, 4, 3, 2, 1)})
    graph = build_explanation_graph(net, SIZE)
    encoded = net.encode(torch.rand(7, 3, *SIZE, dtype=torch.float64))
    together = graph(net, encoded, torch.full((7,), -1))
    for i in range(7):
        alone = graph(net, encoded[i : i + 1], torch.tensor([-1]))
        torch.testing.assert_close(together["weights"][i : i + 1], alone["weights"], rtol=1e-10, atol=1e-12)


class InPlace(nn.Module):
    """In-place ops on values that are read again, once through a view."""

    def __init__(self, view):
        super().__init__()
        self.view = view
        self.conv = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        y = x.flatten(2) if self.view else 2 * x
        x += 1
        F.relu_(x)
        z = x * 3
        z.mul_(0.5)
        return self.head((z + x).mean((2, 3)) + (y.mean(2) if self.view else y.mean((2, 3))))


@pytest.mark.parametrize("view", [False, True])
def test_in_place_ops(view):
    """With a view of a mutated value the capture falls back on PyTorch's functionalisation; both are right."""
    torch.manual_seed(0)
    encoding = InputEncoding((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    net = BcosNetwork(InPlace(view), encoding, LogitLayer(), Recipe(), {}).double().eval()
    encoded = net.encode(torch.rand(2, 3, *SIZE, dtype=torch.float64))
    targets = torch.tensor([1, 4])
    result = build_explanation_graph(net, SIZE)(net, encoded, targets)
    logits = net.forward_encoded(encoded).detach()
    torch.testing.assert_close(result["logits"], logits, rtol=1e-12, atol=1e-12)
    total = result["contributions"].sum((1, 2)) + result["residual"]
    torch.testing.assert_close(total, logits.gather(1, targets[:, None])[:, 0], rtol=1e-9, atol=1e-9)

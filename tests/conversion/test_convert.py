"""Each recipe field on small networks, networks with oddities, and bad input."""

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bcos_rt.conversion import Recipe, bcosify, check_equivalence
from bcos_rt.conversion.report import compare_weights
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.models.simple_vit import SimpleViT
from bcos_rt.nn import BatchNormUncentered2d, BcosConv2d, BcosLinear, BcosNetwork
from tests.conversion.models import Branching, Gate, images, net, randomise, with_forward
from tests.tolerances import TOLERANCES


def equivalent(source, **changes):
    """Convert at B=1, check that the function is the source's, return network and report."""
    network, report = bcosify(source, Recipe.equivalent(**changes), verify_images=images())
    assert report.equivalence.within(TOLERANCES["equivalence"]), report
    assert report.weights_copied.complete, report
    return network, report


def entries(report, kind):
    return {e.name: e for e in report.entries if e.kind == kind}


def head_note(report):
    return next((n for n in report.notes if n.startswith("head:")), None)


# --- the source stays, modes and identities carry over ---------------------------------------------------------------


def test_source_is_untouched():
    source = net()
    state, text = copy.deepcopy(source.state_dict()), repr(source)
    network, _ = bcosify(source, Recipe(activations="identity"))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    assert repr(source) == text
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.equivalent()])
def test_modes_and_requires_grad_carry_over(recipe):
    source = net().train()
    source.norm.eval()
    source.conv.weight.requires_grad_(False)
    network, _ = bcosify(source, recipe)
    assert network.training
    assert network.backbone.training
    assert not network.backbone.get_submodule("norm").training
    assert network.backbone.get_submodule("drop").training
    assert not network.backbone.get_submodule("conv").weight.requires_grad
    assert network.backbone.get_submodule("fc").weight.requires_grad
    network, _ = bcosify(net(), recipe)
    assert not any(m.training for m in network.modules())


def test_shared_modules_stay_shared():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    network, report = bcosify(net(middle=nn.Sequential(shared, nn.ReLU(), shared)), Recipe(head="after_pool"))
    first, second = network.backbone.get_submodule("middle.0"), network.backbone.get_submodule("middle.2")
    assert first is second
    assert isinstance(first, BcosConv2d)
    assert "middle.2" not in entries(report, "conv")
    equivalent(net(middle=nn.Sequential(shared, nn.ReLU(), shared)))


def test_dropout_follows_train_and_eval_in_a_rewritten_graph():
    def forward(self, x):
        x = self.pool(self.features(x)).flatten(1)
        return self.fc(F.dropout(x, 0.5, training=self.training))

    network, _ = bcosify(with_forward(forward), Recipe(b=1.0))
    assert isinstance(network.backbone, torch.fx.GraphModule)
    x = images()
    with torch.no_grad():
        assert torch.equal(network(x), network(x))
        network.train()
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))


def test_forward_that_depends_on_the_mode_is_not_rewritten():
    def forward(self, x):
        x = self.features(x)
        if self.training:
            x = x + 1
        return self.fc(self.pool(x).flatten(1))

    source = with_forward(forward)
    network, report = bcosify(source, Recipe.equivalent(head="before_pool", activations="identity"))
    assert not isinstance(network.backbone, torch.fx.GraphModule)
    assert "cannot be rewritten" in head_note(report)
    assert any("train and eval" in n for n in report.notes)


# --- input -----------------------------------------------------------------------------------------------------------


def test_first_convolution_is_widened():
    source = net()
    network, report = bcosify(source)
    w = source.conv.weight
    assert torch.equal(network.backbone.get_submodule("conv").weight, torch.cat([w, -w], 1) / 2)
    assert report.weights_copied.widened == 1
    network, report = equivalent(source, input_encoding="three_channel")
    assert torch.equal(network.backbone.get_submodule("conv").weight, w)
    assert report.weights_copied.widened == 0


def test_plain_input_with_the_first_weights_of_the_source_s_normalisation():
    recipe = {"input_normalization": "none", "mean": (0.2, 0.5, 0.7), "std": (0.3, 0.2, 0.4)}
    source = net(conv=nn.Conv2d(3, 8, 3, stride=2, padding=2))  # borders that see the padding's zeros alone
    network, report = equivalent(source, **recipe)
    w, m, s = source.conv.weight, torch.tensor(recipe["mean"]), torch.tensor(recipe["std"])
    x, inverse = (w * (f / s)[:, None, None] for f in (1 - m, -m))
    torch.testing.assert_close(network.backbone.get_submodule("conv").weight, torch.cat([x, inverse], 1))
    assert "[(1 - mean) w, -mean w]/std" in entries(report, "conv")["conv"].reason
    assert report.weights_copied.widened == 1
    assert torch.equal(network.encoding(network.encode(images())), torch.cat([images(), 1 - images()], 1))
    assert (network.recipe.mean, network.recipe.std) == (recipe["mean"], recipe["std"])
    equivalent(source, keep=("conv",), **recipe)
    equivalent(source, input_normalization="none")  # ImageNet's


def test_plain_input_of_a_linear_patch_embedding():
    torch.manual_seed(0)
    source = SimpleViT(patch_size=8, dim=16, depth=1, heads=2, mlp_dim=32, num_classes=3).eval()
    x = torch.rand(2, 3, 16, 24)
    network, report = bcosify(source, Recipe.equivalent(input_normalization="none"), verify_images=x)
    assert report.equivalence.within(TOLERANCES["equivalence"]), report
    assert report.weights_copied.complete
    assert report.weights_copied.widened == 1
    name = next(n for n, p in network.backbone.named_parameters() if p.shape == (16, 6 * 64))
    weight = network.backbone.get_parameter(name)
    wrong = weight.detach().clone()
    wrong[:, [0, 1]] = wrong[:, [0, 1]] * torch.tensor([1.1, 1.0])
    with torch.no_grad():
        weight.copy_(wrong)
    assert not check_equivalence(source, network, x).within(TOLERANCES["equivalence"])


def test_first_convolution_is_found_by_the_graph_not_by_order():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 3, 3, padding=1)
            self.stem = nn.Conv2d(3, 3, 3, padding=1)
            self.side = nn.Conv2d(3, 3, 1)
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc((self.body(F.relu(self.stem(x))) + self.side(x)).mean((2, 3)))

    network, _ = equivalent(Late())
    channels = {n: network.backbone.get_submodule(n).in_channels for n in ("body", "stem", "side")}
    assert channels == {"body": 3, "stem": 6, "side": 6}


def test_kept_first_convolution_is_widened_and_reported():
    network, report = equivalent(net(), keep=("conv",))
    conv = network.backbone.get_submodule("conv")
    assert type(conv) is nn.Conv2d
    assert conv.in_channels == 6
    assert "Recipe.keep" in entries(report, "conv")["conv"].reason


def test_six_channel_source_is_left():
    source = net(conv=nn.Conv2d(6, 8, 3, stride=2))
    network, report = bcosify(source)
    assert torch.equal(network.backbone.get_submodule("conv").weight, source.conv.weight)
    assert "six channels already" in entries(report, "input")["conv"].reason


def test_dropout_of_the_image_is_passed():
    source = nn.Sequential(nn.Dropout(0.0), net())
    network, _ = bcosify(source)
    conv = source[1].conv
    expected = torch.cat((conv.weight, -conv.weight), 1) / 2
    torch.testing.assert_close(network.backbone.get_submodule("1.conv").weight, expected)


def test_normalisation_comes_from_recipe_metadata_or_imagenet():
    source = net()
    network, report = bcosify(source)
    assert network.recipe.mean == (0.485, 0.456, 0.406)
    assert any("ImageNet" in n for n in report.notes)
    source.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    network, report = bcosify(source)
    torch.testing.assert_close(network.encoding.mean.flatten(), torch.tensor([0.5, 0.4, 0.3, 0.5, 0.6, 0.7]))
    assert network.recipe.std == (0.2, 0.2, 0.1)
    assert not any("ImageNet" in n for n in report.notes)
    network, _ = bcosify(source, Recipe(mean=(0.1, 0.2, 0.3)))
    assert network.recipe.mean == (0.1, 0.2, 0.3)
    assert network.recipe.std == (0.2, 0.2, 0.1)


def test_scaling_before_the_first_convolution_is_allowed_and_centring_is_not():
    equivalent(with_forward(lambda self, x: self.fc(self.pool(self.features(2 * x)).flatten(1))))
    centring = with_forward(lambda self, x: self.fc(self.pool(self.features(2 * x - 1)).flatten(1)))
    with pytest.raises(InvalidArgumentError, match=r"sub.*before the first convolution"):
        bcosify(centring)
    equivalent(centring, input_encoding="three_channel")


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding="same", dilation=2),
        nn.Conv2d(8, 8, 4, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, (3, 1), stride=(1, 2), padding=(1, 0), groups=4),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
    ],
)
def test_convolution_options(conv):
    network, _ = equivalent(net(middle=conv))
    new = network.backbone.middle
    assert isinstance(new, BcosConv2d)
    assert (new.stride, new.padding, new.dilation, new.groups) == (
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    assert new.padding_mode == conv.padding_mode
    network, _ = bcosify(net(middle=conv), Recipe(b=1.5, weight_norm="unit"))
    new = network.backbone.get_submodule("middle")
    assert (new.b, new.weight_norm, new.bias) == (1.5, "unit", None)


class Centred(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


class Plain(nn.Conv2d):
    """A subclass with the same forward."""


def test_subclasses_are_converted_unless_their_forward_differs():
    network, report = equivalent(net(middle=nn.Sequential(Centred(8, 8, 1), Plain(8, 8, 1))))
    assert type(network.backbone.middle[0]) is Centred
    assert type(network.backbone.middle[1]) is BcosConv2d
    assert "forward of its own" in entries(report, "conv")["middle.0"].reason
    parametrised = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
    network, report = equivalent(net(middle=parametrised))
    assert "parametrisation" in entries(report, "conv")["middle"].reason


def test_packed_attention_calls_its_output_projection():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.mlp = nn.Linear(8, 8)

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            tokens = self.mlp(self.attention(tokens, tokens, tokens)[0])
            return tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    source, calls = net(middle=Attention()), []
    source.middle.attention.register_forward_hook(lambda module, args, out: calls.append(module))
    equivalent(source)
    calls.clear()
    network, report = bcosify(source)
    attention = network.backbone.middle.attention
    network(images())
    assert calls == [attention]
    assert isinstance(attention.out_proj, BcosLinear)
    assert isinstance(network.backbone.middle.mlp, BcosLinear)
    assert attention.in_proj_bias is None
    assert torch.equal(attention.in_proj_weight, source.middle.attention.in_proj_weight)
    assert "stay linear" in entries(report, "other")["middle.attention"].reason
    assert report.weights_copied.complete


def test_hooks_stay():
    source, calls = net(), []
    source.conv.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    bcosify(source)[0](images())
    assert calls == [BcosConv2d]


# --- norms and biases ------------------------------------------------------------------------------------------------


def test_folded_mean_and_dropped_biases():
    source = net()
    network, _ = equivalent(source)
    norm, old = network.backbone.norm, source.norm
    assert isinstance(norm, BatchNormUncentered2d)
    expected = old.bias - old.running_mean * old.weight / torch.sqrt(old.running_var + old.eps)
    torch.testing.assert_close(norm.bias, expected)
    network, report = bcosify(source)
    assert network.backbone.get_submodule("norm").bias is None
    assert not [n for n, _ in network.named_parameters() if n.endswith("bias")]
    assert report.weights_copied.dropped == 3
    network, _ = bcosify(source, Recipe(batch_norm="keep"))
    norm = network.backbone.get_submodule("norm")
    assert type(norm) is nn.BatchNorm2d
    assert norm.bias is None
    network, _ = bcosify(source, Recipe(biases="keep"))
    assert torch.equal(network.backbone.get_submodule("norm").bias, old.bias)
    assert torch.equal(network.backbone.get_submodule("conv").bias, source.conv.bias)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        nn.BatchNorm2d(8, eps=0.1, momentum=None),
        nn.GroupNorm(2, 8),
        nn.GroupNorm(2, 8, affine=False),
        nn.LayerNorm([8, 16, 16]),
        nn.InstanceNorm2d(8, affine=True),
    ],
)
def test_norms(norm):
    network, report = equivalent(net(norm=norm))
    assert "norm" in entries(report, "norm")
    for recipe in (Recipe(), Recipe(batch_norm="keep")):
        network, report = bcosify(net(norm=norm), recipe)
        assert report.weights_copied.complete
        new = network.backbone.get_submodule("norm")
        assert getattr(new, "bias", None) is None
        with torch.no_grad():
            assert network(images()).isfinite().all()
            assert network.train()(images()).isfinite().all()


def test_variance_near_zero_and_dead_filters():
    source = net()
    source.norm.running_var[0] = 1e-12
    source.conv.weight.data[1] = 0
    source.norm.running_mean[0] = source.conv.bias[0].item()
    equivalent(source)
    for weight_norm in ("none", "unit"):
        network, _ = bcosify(source, Recipe(weight_norm=weight_norm))
        with torch.no_grad():
            assert network(images()).isfinite().all()


class NeedsBias(nn.GroupNorm):
    def forward(self, input):
        return (
            F.group_norm(input, self.num_groups, eps=self.eps) * self.weight[:, None, None] + self.bias[:, None, None]
        )


def test_norm_that_needs_its_bias_gets_a_frozen_zero():
    network, report = bcosify(net(norm=NeedsBias(2, 8)))
    bias = network.backbone.get_submodule("norm").bias
    assert not bias.any()
    assert not bias.requires_grad
    assert "zero and frozen" in entries(report, "norm")["norm"].reason
    assert report.weights_copied.complete


def test_norm_with_activation_inside():
    layers = pytest.importorskip("timm.layers")
    source = net(norm=layers.BatchNormAct2d(8, act_layer=nn.SiLU))
    network, _ = equivalent(source)
    assert isinstance(network.backbone.norm.act, nn.SiLU)
    network, report = bcosify(source, Recipe(activations="identity"))
    assert isinstance(network.backbone.get_submodule("norm"), BatchNormUncentered2d)
    assert isinstance(network.backbone.get_submodule("norm").act, nn.Identity)
    assert entries(report, "activation")["norm.act"].after == "Identity()"


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gate_branches_keep_everything():
    source = net(middle=nn.Sequential(nn.Conv2d(8, 8, 1), Gate()))
    network, report = bcosify(source, Recipe(activations="identity"))
    gate = network.backbone.get_submodule("middle.1.reduce")
    assert type(gate) is nn.Conv2d
    assert gate.bias is not None
    assert type(network.backbone.get_submodule("middle.1.norm")) is nn.BatchNorm2d
    assert isinstance(network.backbone.get_submodule("middle.0"), BcosConv2d)
    kept = {e.name: e.reason for e in report.kept if e.name.startswith("middle.1")}
    assert set(kept.values()) == {"computes a gate only"}
    assert set(kept) == {"middle.1.reduce", "middle.1.norm", "middle.1.expand", "middle.1.relu"}
    assert report.weights_copied.complete
    network, _ = bcosify(source, Recipe(gates="convert"))
    assert isinstance(network.backbone.get_submodule("middle.1.reduce"), BcosConv2d)
    equivalent(source)


def products(forward):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return forward(x, self.a(x), self.b(x))

    return Product()


@pytest.mark.parametrize(
    ("forward", "gates"),
    [
        (lambda x, a, b: a * torch.sigmoid(b), {"b"}),
        (lambda x, a, b: torch.tanh(a).mul(b), {"a"}),
        (lambda x, a, b: F.hardsigmoid(b).mean((2, 3), keepdim=True) * 2 * a, {"b"}),
        (lambda x, a, b: torch.softmax(a.flatten(1), 1).view(x.shape) * b, {"a"}),
        (lambda x, a, b: F.silu(a) * b, {"a"}),
        (lambda x, a, b: torch.sigmoid(a) * F.gelu(b), {"a"}),
        (lambda x, a, b: a * b, set()),
        (lambda x, a, b: torch.sigmoid(a) * torch.sigmoid(b), set()),
        (lambda x, a, b: a / (1 + b.abs()), {"b"}),
        (lambda x, a, b: a + b * torch.sigmoid(b), set()),
        (lambda x, a, b: x + torch.softmax(a @ b, -1) @ x, {"a", "b"}),
        (lambda x, a, b: F.scaled_dot_product_attention(a, b, x), {"a", "b"}),
    ],
)
def test_which_operand_is_the_gate(forward, gates):
    _, report = equivalent(net(middle=products(forward)))
    kept = {e.name for e in report.kept if e.reason == "computes a gate only" and e.kind == "conv"}
    assert kept == {f"middle.{g}" for g in gates}


def test_activation_shared_with_a_gate_is_removed_from_the_live_path_only():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 1), nn.ReLU()

        def forward(self, x):
            gate = torch.sigmoid(self.conv(self.act(x.mean((2, 3), keepdim=True))))
            return self.act(x) * gate

    network, report = bcosify(net(middle=Shared(), act=nn.Identity()), Recipe(activations="identity"))
    assert isinstance(network.backbone.get_submodule("middle.act"), nn.ReLU)
    calls = [n for n in network.backbone.graph.nodes if n.op == "call_module" and n.target == "middle.act"]
    assert len(calls) == 1
    assert sorted(e.kept for e in report.entries if e.kind == "activation") == [False, True]


# --- pools and activations -------------------------------------------------------------------------------------------


def test_stem_pool_rules():
    pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    network, _ = bcosify(net(middle=pool))
    new = network.backbone.get_submodule("middle")
    assert (new.kernel_size, new.stride, new.padding, new.ceil_mode) == (3, 2, 1, True)
    assert isinstance(new, nn.AvgPool2d)
    assert new.count_include_pad

    network, report = bcosify(net(middle=pool), Recipe(stem_pool="keep"))
    assert isinstance(network.backbone.get_submodule("middle"), nn.MaxPool2d)

    # Two pools: the first is the stem's, as the convolution before it has stride 2.
    _, report = bcosify(net(middle=nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2))))
    assert [(n, e.kept) for n, e in sorted(entries(report, "pool").items())] == [
        ("middle.0", False),
        ("middle.2", True),
    ]

    # Two pools after convolutions of stride 1, and a pool inside the body: kept, with the reason.
    plain = nn.Conv2d(3, 8, 3)
    _, report = bcosify(net(conv=plain, middle=nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2))))
    assert all(e.kept for e in entries(report, "pool").values())
    body = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(4)), nn.MaxPool2d(2))
    _, report = bcosify(net(middle=body))
    assert "not behind the stem" in entries(report, "pool")["middle.4"].reason


def test_functional_and_reused_stem_pools():
    def functional(self, x):
        return self.fc(self.pool(F.max_pool2d(self.features(x), 3, stride=2, padding=1)).flatten(1))

    network, report = bcosify(with_forward(functional), Recipe(head="after_pool"))
    pools = [m for m in network.backbone.modules() if isinstance(m, nn.AvgPool2d)]
    assert [(m.kernel_size, m.stride, m.padding) for m in pools] == [(3, 2, 1)]
    assert entries(report, "pool")["max_pool2d"].after.startswith("AvgPool2d")

    shared = nn.MaxPool2d(2)
    network, report = bcosify(net(middle=nn.Sequential(shared, nn.Conv2d(8, 8, 1), shared)))
    assert sorted(type(m).__name__ for m in network.backbone.modules() if "Pool" in type(m).__name__) == [
        "AdaptiveAvgPool2d",
        "AvgPool2d",
        "MaxPool2d",
    ]
    with torch.no_grad():
        assert network(images()).isfinite().all()


def test_stem_pool_directly_before_the_global_pool():
    def forward(self, x):
        return self.fc(self.pool(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)).flatten(1))

    network, report = bcosify(with_forward(forward), Recipe(activations="identity"))
    assert report.weights_copied.reshaped == 1
    assert {e.kind for e in report.replaced} >= {"head", "pool", "activation"}
    with torch.no_grad():
        assert network(images()).shape == (2, 5)


@pytest.mark.parametrize(
    "act", [nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(8), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ELU()]
)
def test_identity_activations(act):
    network, report = bcosify(net(act=act), Recipe(activations="identity"))
    assert isinstance(network.backbone.get_submodule("act"), nn.Identity)
    assert report.weights_copied.complete
    network, _ = bcosify(net(act=act), Recipe(activations="identity", keep=("act",)))
    assert type(network.backbone.get_submodule("act")) is type(act)


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.relu,
        F.gelu,
        F.silu,
        F.hardswish,
        F.leaky_relu,
        lambda x: x.relu(),
        lambda x: F.relu(x, inplace=True),
    ],
)
def test_functional_identity_activations(function):
    def forward(self, x):
        return self.fc(self.pool(function(self.norm(self.conv(x)))).flatten(1))

    source = with_forward(forward)
    network, _ = bcosify(source, Recipe.equivalent(activations="identity"))
    normalised = (images() - network.encoding.mean[:3]) / network.encoding.std[:3]
    with torch.no_grad():
        expected = source.fc(source.pool(source.norm(source.conv(normalised))).flatten(1))
        torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-5)
        kept, _ = bcosify(source, Recipe.equivalent(activations="identity", keep=("*",)))
        assert not torch.allclose(kept(images()), expected, atol=1e-3)


# --- head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.fc(torch.flatten(self.pool(self.features(x)), 1)),
        lambda self, x: self.fc(self.features(x).mean([2, 3])),
        lambda self, x: self.fc(self.features(x).mean((-2, -1), keepdim=True).flatten(start_dim=1)),
        lambda self, x: self.fc(torch.mean(self.features(x), dim=(2, 3))),
        lambda self, x: self.fc(self.drop(F.adaptive_avg_pool2d(self.features(x), (1, 1)).squeeze(-1).squeeze(-1))),
        lambda self, x: self.fc(F.dropout(F.adaptive_avg_pool2d(self.features(x), 1)[:, :, 0, 0], 0.2, self.training)),
        lambda self, x: (p := self.pool(self.features(x))) is not None and self.fc(p.view(p.size(0), -1)),
        lambda self, x: self.fc(self.pool(self.features(x)).reshape(-1, 8)),
        lambda self, x: self.fc(self.pool(self.features(x)).view(x.shape[0], 8)),
    ],
)
def test_head_moves_before_the_pool(forward):
    network, report = equivalent(with_forward(forward), head="before_pool")
    head = network.backbone.get_submodule("fc")
    assert isinstance(head, BcosConv2d)
    assert head.weight.shape == (5, 8, 1, 1)
    assert report.weights_copied.reshaped == 1
    assert head_note(report) is None
    order = [str(n.target) if n.op == "call_module" else n.name for n in network.backbone.graph.nodes]
    assert order.index("fc") < min(i for i, n in enumerate(order) if "pool" in n or "mean" in n)
    assert not network.backbone.training
    with torch.no_grad():
        assert network.train()(images()).shape == (2, 5)


def test_convolution_as_classifier_moves_too():
    forward = with_forward(lambda self, x: self.fc(self.pool(self.features(x))).flatten(1), fc=nn.Conv2d(8, 5, 1))
    network, report = equivalent(forward, head="before_pool")
    order = [n.target for n in network.backbone.graph.nodes]
    assert order.index("fc") < order.index("pool")
    assert head_note(report) is None
    assert bcosify(forward)[0].logit_layer.bias == pytest.approx(-math.log(4))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.fc(F.relu(self.pool(self.features(x)).flatten(1))), "relu() stands between it"),
        (lambda self, x: self.fc(F.adaptive_max_pool2d(self.features(x), 1).flatten(1)), "adaptive_max_pool2d"),
        (lambda self, x: (p := self.pool(self.features(x)).flatten(1)) is not None and self.fc(p) + p[:, :5], "head"),
        (lambda self, x: torch.softmax(self.fc(self.features(x).mean((2, 3))), 1), "head"),
        (lambda self, x: self.fc(self.features(x).mean((1, 2))[:, :8]), "no global average pool"),
        (lambda self, x: self.fc(self.features(x)[:, :, 0, 0]), "no global average pool"),
    ],
)
def test_head_stays_and_the_report_says_why(forward, reason):
    network, report = equivalent(with_forward(forward), head="before_pool")
    assert isinstance(network.backbone.fc, BcosLinear)
    assert reason in head_note(report)


def test_head_stays_when_kept_or_asked():
    network, report = bcosify(net(), Recipe(keep=("fc",)))
    assert type(network.backbone.fc) is nn.Linear
    assert "Recipe.keep" in head_note(report)
    network, report = bcosify(net(), Recipe(head="after_pool"))
    assert type(network.backbone.fc) is BcosLinear
    assert head_note(report) is None


# --- logits ----------------------------------------------------------------------------------------------------------


def test_logit_layer():
    assert bcosify(net())[0].logit_layer.bias == pytest.approx(-math.log(4))
    assert bcosify(net(), Recipe(logit_bias=None))[0].logit_layer.bias is None
    layer = bcosify(net(), Recipe(logit_bias=-2.5, logit_temperature=3.0))[0].logit_layer
    assert (layer.bias, layer.temperature) == (-2.5, 3.0)
    network, report = bcosify(net(fc=nn.Linear(8, 1)))
    assert network.logit_layer.bias is None
    assert any("undefined for 1 class" in n for n in report.notes)
    network, report = bcosify(net(fc=nn.Identity()))
    assert network.logit_layer.bias is None
    assert any("number of classes is unknown" in n for n in report.notes)
    assert "not that of one linear layer" in head_note(report)


class Twice(nn.Module):
    """Its first convolution is its second too."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(self.conv(torch.relu(self.conv(x))).mean((2, 3)))


class PatchesTwice(nn.Module):
    """Its patch embedding, of 2 x 2 pixels, is a layer of its blocks too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        n, c, h, w = x.shape
        patches = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
        return self.fc(self.embedding(torch.relu(self.embedding(patches))).mean(1))


@pytest.mark.parametrize(
    ("model", "what"),
    [(Twice(), "first convolution 'conv'"), (PatchesTwice(), "linear patch embedding 'embedding'")],
)
def test_a_first_layer_used_again_is_refused(model, what):
    with pytest.raises(InvalidArgumentError, match=rf"{what} used again.*three_channel"):
        bcosify(model, Recipe())
    converted, _ = bcosify(model, Recipe(input_encoding="three_channel"))
    assert converted.eval()(images()).shape == (len(images()), 5)


@pytest.mark.parametrize("names", ["abcde", list(range(5))])
def test_class_names_are_strings(names):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(InvalidTypeError, match="class_names"):
        bcosify(model, Recipe(), class_names=names)


def test_class_names():
    names = [f"class {i}" for i in range(5)]
    assert bcosify(net(), class_names=names)[0].class_names == names
    with pytest.raises(InvalidArgumentError, match="class_names: got 4 names, expected one per logit, 5"):
        bcosify(net(), class_names=names[:4])


# --- models that cannot be traced ------------------------------------------------------------------------------------


def test_untraceable_block_is_a_leaf_whose_layers_are_still_converted():
    network, report = equivalent(net(middle=Branching()), head="before_pool")
    assert isinstance(network.backbone.get_submodule("middle.conv"), BcosConv2d)
    assert isinstance(network.backbone.get_submodule("middle.norm"), BatchNormUncentered2d)
    assert isinstance(network.backbone.get_submodule("fc"), BcosConv2d)
    assert any(n.startswith("middle: symbolic tracing fails") for n in report.notes)


def test_untraceable_model_is_converted_layer_by_layer():
    def forward(self, x):
        x = self.pool(self.features(x)).flatten(1)
        return self.fc(x if x.sum() > 0 else x + 1)

    source = with_forward(forward, middle=nn.Sequential(nn.MaxPool2d(2), Gate()))
    network, report = equivalent(source, head="before_pool")
    assert type(network.backbone) is type(source)
    assert isinstance(network.backbone.fc, BcosLinear)
    assert any(n.startswith("the model: symbolic tracing fails") for n in report.notes)
    network, report = bcosify(source)
    assert network.logit_layer.bias == pytest.approx(-math.log(4))


def test_model_that_does_not_run_is_converted_layer_by_layer():
    def forward(self, x):
        if x.shape[-1] != 17:
            raise ValueError("takes images of 17 pixels")
        return self.fc(self.pool(self.features(x)).flatten(1))

    source = with_forward(forward, middle=nn.Sequential(nn.MaxPool2d(2), Gate()))
    network, report = bcosify(source)
    assert isinstance(network.backbone.fc, BcosLinear)
    assert network.logit_layer.bias == pytest.approx(-math.log(4))
    assert any(n.startswith("the model: its forward cannot be traced (TraceError") for n in report.notes)
    assert any("stem pool" in n for n in report.notes)


def test_optional_arguments_keep_their_defaults():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, scale=None, *, flag=True):
            x = self.net(x)
            return x if scale is None and flag else x * scale

    network, _ = equivalent(Optional(), head="before_pool")
    assert isinstance(network.backbone.get_submodule("net.fc"), BcosConv2d)


def test_constants_made_in_the_forward_stay():
    def forward(self, x):
        return self.fc(self.pool(self.features(x) * torch.arange(1.0, 9.0)[:, None, None]).flatten(1))

    network, _ = equivalent(with_forward(forward), head="before_pool")
    assert set(network.backbone.state_dict()) == set(with_forward(forward).state_dict())
    network.double()
    with torch.no_grad():
        assert network(images().double()).dtype == torch.float64


# --- keep ------------------------------------------------------------------------------------------------------------


def test_keep_patterns_cover_what_is_below():
    source = net(middle=nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 1)))
    network, report = bcosify(source, Recipe(keep=("middle.0",)))
    assert type(network.backbone.get_submodule("middle.0.0")) is nn.Conv2d
    assert network.backbone.get_submodule("middle.0.0").bias is not None
    assert type(network.backbone.get_submodule("middle.0.1")) is nn.BatchNorm2d
    assert isinstance(network.backbone.get_submodule("middle.1"), BcosConv2d)
    assert {e.name for e in report.kept if "Recipe.keep" in e.reason} == {"middle.0.0", "middle.0.1"}
    with pytest.raises(InvalidArgumentError, match=r"midle.*did you mean 'middle"):
        bcosify(source, Recipe(keep=("midle",)))


# --- report ----------------------------------------------------------------------------------------------------------


def test_report_formats():
    _, report = bcosify(net(), Recipe.equivalent(), verify_images=images())
    values = json.loads(json.dumps(report.to_dict()))
    assert values["model"] == "Net"
    assert values["equivalence"]["images"] == 2
    assert values["weights_copied"]["complete"]
    assert {e["name"] for e in values["entries"]} >= {"conv", "norm", "fc"}
    for text in (str(report), report.summary(), report.render(200)):
        assert "BcosConv2d" in text
        assert "max relative logit error" in text
        assert "all accounted for" in text


def test_report_finds_a_weight_that_was_not_copied():
    source = net()
    network, _ = bcosify(source, Recipe.equivalent())
    folded = {"norm.bias": network.backbone.norm.bias.detach().clone()}
    halves = torch.tensor([0.5] * 3 + [-0.5] * 3)
    good = compare_weights(source, network.backbone, lambda name: False, folded, halves, {})
    assert (good.complete, good.widened, good.folded) == (True, 1, 1)
    with torch.no_grad():
        network.backbone.fc.weight[0, 0] += 1e-3
        network.backbone.norm.bias[0] += 1e-3
    bad = compare_weights(source, network.backbone, lambda name: False, folded, halves, {})
    assert set(bad.unexplained) == {"fc.weight", "norm.bias"}
    del network.backbone.fc
    rest = compare_weights(source, network.backbone, lambda name: False, folded, 2 * halves, {})
    assert {"fc.bias", "conv.weight"} <= set(rest.unexplained)


def test_equivalence_sees_a_difference():
    source = net()
    network, report = bcosify(source, Recipe(), verify_images=images())
    assert not report.equivalence.within(1e-4)
    network, _ = bcosify(source, Recipe.equivalent())
    with torch.no_grad():
        network.backbone.fc.weight[0] += 0.1
    result = check_equivalence(source, network, images())
    assert result.max_relative_error > 1e-3


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: 3, InvalidTypeError, "model: got int"),
        (lambda: nn.Conv2d, InvalidTypeError, "instance, not the class"),
        (lambda: nn.DataParallel(net()), InvalidTypeError, "model.module"),
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1))), InvalidTypeError, "eager"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), InvalidArgumentError, "Flatten"),
        (lambda: nn.Sequential(nn.ReLU()), InvalidArgumentError, "ReLU"),
        (lambda: net(conv=nn.Conv2d(1, 8, 3)), InvalidArgumentError, "grayscale"),
        (lambda: net(conv=nn.Conv2d(4, 8, 3)), InvalidArgumentError, "4 input channels in 'conv'"),
        (lambda: net(conv=nn.Conv2d(3, 9, 3, groups=3), norm=nn.BatchNorm2d(9)), InvalidArgumentError, "groups=3"),
        (lambda: net(conv=Centred(3, 8, 3)), InvalidArgumentError, "three_channel"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), InvalidArgumentError, "lazy"),
        (lambda: "no-such:model", InvalidArgumentError, "no-such"),
    ],
)
def test_bad_models(model, error, message):
    with pytest.raises(error, match=message):
        bcosify(model())


def test_a_converted_network_is_not_converted_again():
    network, _ = bcosify(net())
    assert isinstance(network, BcosNetwork)
    with pytest.raises(InvalidTypeError, match="converted already"):
        bcosify(network)


def test_bad_recipe_and_images():
    with pytest.raises(InvalidTypeError, match="recipe: got dict"):
        bcosify(net(), {})
    with pytest.raises(InvalidArgumentError, match="images"):
        bcosify(net(), verify_images=images(n=0))
    with pytest.raises(InvalidTypeError, match="images"):
        bcosify(net(), verify_images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_normalization": "None"}, "'source', 'none'"),
        ({"input_normalization": "none", "input_encoding": "three_channel"}, "input_encoding='six_channel'"),
        ({"input_normalization": "none", "mean": (0.0,) * 6}, "three numbers"),
    ],
)
def test_bad_input_normalization(fields, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Recipe(**fields)


def test_single_layer_model_is_replaced_itself():
    source = randomise(nn.Sequential(nn.Conv2d(3, 4, 1)))[0]
    network, _ = equivalent(source)
    assert isinstance(network.backbone, BcosConv2d)


def test_a_rewritten_network_pickles():
    network = bcosify(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    )[0]
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(pickle.loads(pickle.dumps(network))(images), network(images), rtol=0, atol=0)


def test_a_module_that_cannot_be_copied_is_named():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.scaled = self.conv.weight * 2  # not a leaf, as torch.nn.utils.weight_norm leaves one

    with pytest.raises(InvalidArgumentError, match="model: got a Computed that cannot be copied"):
        bcosify(Computed())


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_a_logit_bias_is_finite(bias):
    with pytest.raises(InvalidArgumentError, match="logit_bias"):
        Recipe(logit_bias=bias)


# --- what writes to its input ----------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Layers whose outputs are written over: by a module, a function, a method, an operator."""

    def __init__(self, write=True):
        super().__init__()
        self.write = write
        self.convs = nn.ModuleList(nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6, 6))
        self.act, self.fc, self.last = nn.Hardswish(inplace=write), nn.Linear(6, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.0, inplace=write)

    def forward(self, x):
        x = self.act(self.convs[0](x))
        x = F.relu(self.convs[1](x), inplace=True) if self.write else F.relu(self.convs[1](x))
        x = self.convs[2](x).relu_() if self.write else self.convs[2](x).relu()
        y = self.convs[3](x)
        if self.write:
            y += x
        else:
            y = y + x
        return self.last(self.drop(self.fc(y.mean((2, 3)))))


@pytest.mark.parametrize("b", [1.5, 2.0])
@pytest.mark.parametrize("head", ["before_pool", "after_pool"])
def test_layers_whose_outputs_were_written_over_can_be_trained(b, head):
    """A B-cos layer's gradient is computed from its output."""
    torch.manual_seed(0)
    writing = InPlace()
    plain = InPlace(write=False)
    plain.load_state_dict(writing.state_dict())
    grads = []
    for source in (writing, plain):
        network = bcosify(source, Recipe(b=b, head=head))[0].train()
        network(images()).square().sum().backward()
        grads.append({name: p.grad for name, p in network.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, msg=name)
    assert writing.act.inplace, "the source stays as it was"


@pytest.mark.parametrize("how", ["method", "module", "twice", "behind a dropout"])
def test_a_value_that_is_read_again_is_still_written_over(how):
    """There, writing is what the forward means."""

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.act = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), nn.ReLU(inplace=True)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            y = self.conv(x)
            if how == "method":
                z = y.relu_()
            elif how == "module":
                z = self.act(y)
            elif how == "twice":
                z = self.act(y * 2) + self.act(y)
            else:
                z = self.act(self.drop(y))
            return self.fc((y + z).mean((2, 3)))

    torch.manual_seed(0)
    equivalent(Reading().eval(), head="before_pool")

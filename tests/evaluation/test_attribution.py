"""Attribution methods against direct computations in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.fx import Proxy

from bcos_rt import Recipe, bcosify, explain
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, UnsupportedOpError
from bcos_rt.evaluation import METHODS, method, unsupported_methods
from bcos_rt.models.small import SmallResNet, small_vit
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import exponents, set_exponents

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def resnet() -> ConventionalNetwork:
    """Its blocks call one in-place ReLU twice: what hooks stumble over."""
    torch.manual_seed(0)
    return ConventionalNetwork(SmallResNet(1, 4, 5), MEAN, STD).double().eval()


IMAGES = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 4, 2])


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None].double()) / torch.tensor(STD)[:, None, None].double()


def gradient(net: ConventionalNetwork) -> tuple[Tensor, Tensor]:
    """The normalised image, and the gradient of the target's logit in it."""
    x = normalised(IMAGES).requires_grad_()
    net.model(x).gather(1, TARGETS[:, None]).sum().backward()
    assert x.grad is not None
    return x.detach(), x.grad


def close(a: Tensor, b: Tensor) -> None:
    # MEAN and STD are float32 in the network.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_gradients() -> None:
    net = resnet()
    x, grad = gradient(net)
    close(method("saliency")(net, IMAGES, TARGETS), grad.abs().sum(1))
    close(method("input_x_gradient")(net, IMAGES, TARGETS), (x * grad).sum(1))


def test_integrated_gradients_add_up() -> None:
    net = resnet()
    found = method("integrated_gradients", n_steps=300)(net, IMAGES, TARGETS)
    with torch.no_grad():
        logits = net(IMAGES).gather(1, TARGETS[:, None])[:, 0]
        base = net.model(torch.zeros_like(IMAGES)).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(found.sum((1, 2)), logits - base, rtol=2e-2, atol=1e-2)


def test_deep_lift_adds_up() -> None:
    """Its defining property; it fails where one ReLU serves twice, or in place."""
    net = resnet()
    found = method("deep_lift")(net, IMAGES, TARGETS)
    with torch.no_grad():
        logits = net(IMAGES).gather(1, TARGETS[:, None])[:, 0]
        base = net.model(torch.zeros_like(IMAGES)).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(found.sum((1, 2)), logits - base, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["input_x_gradient", "grad_cam"])
def test_a_network_that_reads_what_it_wrote_over_is_refused(name: str) -> None:
    class Reads(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.act, self.fc = nn.Conv2d(3, 6, 3), nn.ReLU(inplace), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((self.act(x) + 2 * x).mean((2, 3)))

    for inplace in (True, False):
        net = ConventionalNetwork(Reads(inplace), MEAN, STD).double()
        if inplace:
            with pytest.raises(UnsupportedOpError, match=r"Reads.*writes over a value"):
                method(name)(net, IMAGES, TARGETS)
        elif name == "grad_cam":  # for another reason
            with pytest.raises(UnsupportedOpError, match="add of maps follows"):
                method(name)(net, IMAGES, TARGETS)
        else:
            assert method(name)(net, IMAGES, TARGETS).shape == (3, 16, 16)
        assert net.training  # its mode is as it was


def test_guided_backprop_stops_negative_gradients() -> None:
    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)  # type: ignore[attr-defined]
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            return grad.clamp(min=0) * (x > 0)

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Guided.apply(x)

    net = resnet()
    found = method("guided_backprop")(net, IMAGES, TARGETS)
    for module in list(net.model.modules()):
        if isinstance(getattr(module, "relu", None), nn.ReLU):
            module.relu = Act()
    close(found, gradient(net)[1].sum(1))


def test_grad_cam_by_hand() -> None:
    net = resnet()
    model = net.model
    assert isinstance(model, SmallResNet)
    x = normalised(IMAGES)
    x = model.relu(model.bn1(model.conv1(x)))
    features = model.layer3(model.layer2(model.layer1(x))).detach().requires_grad_()  # type: ignore[operator]
    logits = model.fc(features.mean((2, 3)))
    logits.gather(1, TARGETS[:, None]).sum().backward()
    assert features.grad is not None
    weights = features.grad.mean((2, 3), keepdim=True)
    small = (weights * features).sum(1, keepdim=True).clamp(min=0)
    expected = F.interpolate(small, (16, 16), mode="bilinear")[:, 0].detach()
    close(method("grad_cam")(net, IMAGES, TARGETS), expected)
    assert not torch.allclose(method("grad_cam", layer="layer1")(net, IMAGES, TARGETS), expected)
    with pytest.raises(InvalidArgumentError, match="did you mean 'layer1'"):
        method("grad_cam", layer="layr1")(net, IMAGES, TARGETS)


def test_grad_cam_takes_the_names_of_both_networks_and_says_where_there_is_no_map() -> None:
    net, _ = bcosify(resnet().model.float(), Recipe(mean=MEAN, std=STD))
    images = IMAGES.float()
    names = [key for key, _ in net.named_modules() if key.endswith("layer2.0.conv1")]
    assert names == ["backbone.layer2.0.conv1"]
    found = method("grad_cam", layer="layer2.0.conv1")(net, images, TARGETS)
    assert float(found.std()) > 0
    assert torch.equal(method("grad_cam", layer=names[0])(net, images, TARGETS), found)
    # The head was put before the pool: no block is called as a whole.
    with pytest.raises(InvalidArgumentError, match=r"'layer2', which never ran.* by themselves, 'layer2.\d.\w+' last"):
        method("grad_cam", layer="backbone.layer2")(net, images, TARGETS)
    conventional = resnet()
    expected = method("grad_cam", layer="layer2")(conventional, IMAGES, TARGETS)
    assert torch.equal(method("grad_cam", layer="model.layer2")(conventional, IMAGES, TARGETS), expected)


def test_occlusion_of_a_linear_network_is_its_contribution() -> None:
    net = ConventionalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2, bias=False))).double()
    images = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    weight = net.model[1].weight.detach()[1].reshape(3, 4, 4)  # type: ignore[index, union-attr]
    found = method("occlusion", window=1, stride=1)(net, images, torch.tensor([1]))
    torch.testing.assert_close(found, (weight * images[0]).sum(0)[None], rtol=1e-5, atol=1e-6)


def test_bcos_is_the_contribution_map_and_only_for_bcos_networks() -> None:
    net, _ = bcosify(resnet().model.float(), Recipe(mean=MEAN, std=STD))
    net.eval()
    images = IMAGES.float()
    torch.testing.assert_close(method("bcos")(net, images, TARGETS), explain(net, images, TARGETS).contributions)
    with pytest.raises(InvalidTypeError, match="input_x_gradient"):
        method("bcos")(resnet(), IMAGES, TARGETS)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "bcos"])
@pytest.mark.parametrize("kind", ["conventional", "bcos"])
def test_every_method_takes_both_kinds_and_changes_neither(name: str, kind: str) -> None:
    net: nn.Module = resnet().float()
    if kind == "bcos":
        net = bcosify(net.model, Recipe(mean=MEAN, std=STD))[0].eval()  # type: ignore[arg-type]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images = IMAGES.float()
    with torch.no_grad():
        logits = net(images)
    found = method(name)(net, images, TARGETS)
    assert found.shape == (3, 16, 16)
    assert bool(torch.isfinite(found).all())
    assert float(found.abs().max()) > 0
    assert not found.requires_grad
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(net(images), logits, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_changed_weights_are_seen() -> None:
    net = resnet()
    first = method("input_x_gradient")(net, IMAGES, TARGETS)
    with torch.no_grad():
        net.model.fc.weight.mul_(2)  # type: ignore[union-attr, operator]
    close(method("input_x_gradient")(net, IMAGES, TARGETS), 2 * first)


def test_a_changed_exponent_and_writes_through_data_are_seen() -> None:
    """Neither raises a tensor's version."""
    net, _ = bcosify(resnet().model.float(), Recipe(mean=MEAN, std=STD))
    images, saliency = IMAGES.float(), method("saliency")
    first = saliency(net.eval(), images, TARGETS)
    set_exponents(net, dict.fromkeys(exponents(net), 1.25))
    second = saliency(net, images, TARGETS)
    assert not torch.allclose(first, second)
    conventional = resnet()
    first = saliency(conventional, IMAGES, TARGETS)
    conventional.model.fc.weight.data.mul_(2)  # type: ignore[union-attr, operator]
    close(saliency(conventional, IMAGES, TARGETS), 2 * first)


SEVERAL = torch.tensor([[0, 1], [4, 4], [2, 3]])


@pytest.mark.parametrize("name", [n for n in METHODS if n != "random"])
def test_several_classes_of_each_image(name: str) -> None:
    net, _ = bcosify(resnet().model.float(), Recipe(mean=MEAN, std=STD))
    net.eval()
    images = IMAGES.float()
    found = method(name)(net, images, SEVERAL)
    assert found.shape == (3, 2, 16, 16)
    expected = torch.stack([method(name)(net, images, SEVERAL[:, k]) for k in range(2)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_several_classes_are_one_forward_pass_of_our_own_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = bcosify(resnet().model.float(), Recipe(mean=MEAN, std=STD))
    calls = []

    def counted(net: nn.Module, images: Tensor, targets: Tensor) -> object:
        calls.append((len(images), tuple(targets.shape)))
        return explain(net, images, targets)

    monkeypatch.setattr("bcos_rt.evaluation.attribution.explain", counted)
    method("bcos")(net.eval(), IMAGES.float(), SEVERAL)
    assert calls == [(3, (3, 2))]


def test_several_classes_of_occlusion_are_as_many_images_as_one() -> None:
    net = ConventionalNetwork(Counting(resnet().model), MEAN, STD).eval()
    seen = []
    # The first call also looks at how the network is made.
    for targets in (TARGETS, TARGETS, SEVERAL):
        method("occlusion")(net, IMAGES, targets)
        seen.append(sum(Counting.seen))
        Counting.seen.clear()
    assert seen[1] == seen[2] > len(IMAGES)


def test_integrated_gradients_take_50_steps() -> None:
    net = ConventionalNetwork(Counting(resnet().model), MEAN, STD).eval()
    seen = []
    # The first call also looks at how the network is made.
    for options in ({}, {}, {"n_steps": 7}):
        method("integrated_gradients", **options)(net, IMAGES, TARGETS)
        seen.append(sum(Counting.seen))
        Counting.seen.clear()
    assert seen[1:] == [50 * len(IMAGES), 7 * len(IMAGES)]


@pytest.mark.parametrize("at_once", [1, 2, 4, 64])
def test_integrated_gradients_see_no_more_images_at_once_than_told(at_once: int) -> None:
    net = ConventionalNetwork(Counting(resnet().model), MEAN, STD).eval()
    found = method("integrated_gradients", n_steps=5, internal_batch_size=at_once)(net, IMAGES, TARGETS)
    # Counted in a copy of the network: a list that copies share.
    assert max(Counting.seen) <= at_once
    torch.testing.assert_close(found, method("integrated_gradients", n_steps=5)(resnet(), IMAGES, TARGETS))
    Counting.seen.clear()


def test_integrated_gradients_of_large_images_take_few_at_once() -> None:
    net = ConventionalNetwork(Counting(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)))).eval()
    images = torch.rand(2, 3, 896, 896)  # 16 times 224 x 224
    method("integrated_gradients", n_steps=5)(net, images, torch.tensor([0, 1]))
    assert max(Counting.seen) == 4
    Counting.seen.clear()
    with pytest.raises(InvalidArgumentError, match="internal_batch_size: got 0"):
        method("integrated_gradients", internal_batch_size=0)(net, images, torch.tensor([0, 1]))


class Counting(nn.Module):
    """Notes the number of images of every call."""

    seen: list[int] = []  # noqa: RUF012 (of all copies)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        logits: Tensor = self.model(x)
        return logits

    @staticmethod
    def note(x: Tensor) -> None:
        if not isinstance(x, Proxy):  # tracing
            Counting.seen.append(len(x))
        else:
            raise TypeError("a network that cannot be traced keeps its code")


def test_unknown_methods_and_options_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="did you mean 'grad_cam'"):
        method("gradcam")
    with pytest.raises(InvalidArgumentError, match="did you mean 'n_steps'"):
        method("integrated_gradients", steps=3)


# --- what a method needs of a network --------------------------------------------------------------------------------


def logits_and_base(net: ConventionalNetwork, images: Tensor, targets: Tensor) -> Tensor:
    """How much the targets' logits differ from those of the mean image, [N]."""
    with torch.no_grad():
        difference = net(images) - net.model(torch.zeros_like(images))
    return difference.gather(1, targets[:, None])[:, 0]


class Functional(nn.Module):
    """A convolution, an activation that is a function call, pooling, a classifier."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.act = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), act

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.act(4 * self.conv(x)).mean((2, 3)))
        return logits


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "hardswish": F.hardswish, "mish": F.mish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3), "elu": F.elu, "tanh": torch.tanh, "method": lambda x: x.sigmoid(),
    "relu6": F.relu6, "clamp": lambda x: x.clamp(min=0), "bounded": lambda x: x.clamp(-0.5, max=0.5),
    "in place": lambda x: F.silu(x, inplace=True), "max_pool": lambda x: F.max_pool2d(x, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_deep_lift_adds_up_with_every_activation(name: str, recwarn: pytest.WarningsRecorder) -> None:
    net = ConventionalNetwork(Functional(ACTIVATIONS[name]), MEAN, STD).double().eval()
    found = method("deep_lift")(net, IMAGES, TARGETS)
    torch.testing.assert_close(found.sum((1, 2)), logits_and_base(net, IMAGES, TARGETS), rtol=1e-6, atol=1e-8)
    assert not [w for w in recwarn if "deep_lift" in str(w.message)]


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.ReLU6(), nn.PReLU(), nn.Hardswish(inplace=True)])
def test_deep_lift_adds_up_with_activation_modules_that_serve_twice(act: nn.Module) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.fc, self.act = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5), act

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.act(self.b(self.act(3 * self.a(x)))).mean((2, 3)))
            return logits

    net = ConventionalNetwork(Twice(), MEAN, STD).double().eval()
    found = method("deep_lift")(net, IMAGES, TARGETS)
    torch.testing.assert_close(found.sum((1, 2)), logits_and_base(net, IMAGES, TARGETS), rtol=1e-6, atol=1e-8)


def test_deep_lift_says_where_it_does_not_add_up() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            logits: Tensor = self.fc((x * (5 * x.flip(1)).sigmoid()).mean((2, 3)))
            return logits

    with pytest.warns(UserWarning, match="deep_lift: attributions of Gated miss the logit's difference .* by [0-9]+%"):
        method("deep_lift")(ConventionalNetwork(Gated()).double().eval(), IMAGES, TARGETS)


class Dynamic(nn.Module):
    """Cannot be traced: what runs depends on values."""

    def __init__(self, as_modules: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.act: Callable[[Tensor], Tensor] = nn.ReLU() if as_modules else torch.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        if float(x.sum()) < -1:
            x = 2 * x
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def plain_gradient(net: ConventionalNetwork) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    net(images).gather(1, TARGETS[:, None]).sum().backward()
    assert images.grad is not None
    return images.grad.sum(1)


def test_guided_backprop_is_never_the_plain_gradient_without_a_word() -> None:
    smooth = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(UnsupportedOpError, match="Sequential has none, but gelu"):
        method("guided_backprop")(ConventionalNetwork(smooth).double().eval(), IMAGES, TARGETS)
    with pytest.raises(UnsupportedOpError, match="Dynamic calls functions and cannot be traced"):
        method("guided_backprop")(ConventionalNetwork(Dynamic(as_modules=False)).double().eval(), IMAGES, TARGETS)
    net = ConventionalNetwork(Dynamic(as_modules=True)).double().eval()
    assert not torch.allclose(method("guided_backprop")(net, IMAGES, TARGETS), plain_gradient(net))
    mixed = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="beside ReLUs, silu"):
        method("guided_backprop")(ConventionalNetwork(mixed).double().eval(), IMAGES, TARGETS)


@pytest.mark.parametrize("act", [nn.ReLU6(inplace=True), F.relu6, lambda x: x.clamp_min(0)])
def test_guided_backprop_takes_what_is_a_relu_by_another_name(act: Callable[[Tensor], Tensor]) -> None:
    net = ConventionalNetwork(Functional(act)).double().eval()
    found = method("guided_backprop")(net, IMAGES, TARGETS)
    model = net.model
    assert isinstance(model, Functional)
    x = IMAGES.clone().requires_grad_()
    before = 4 * model.conv(x)
    after = act(before.clone()).detach().requires_grad_()
    model.fc(after.mean((2, 3))).gather(1, TARGETS[:, None]).sum().backward()
    inside = (before > 0) & ((before < 6) | (after > 6))
    assert after.grad is not None
    before.backward(after.grad.clamp(min=0) * inside)
    assert x.grad is not None
    close(found, x.grad.sum(1))
    assert not torch.allclose(found, plain_gradient(net))


def vit() -> ConventionalNetwork:
    torch.manual_seed(0)
    return ConventionalNetwork(small_vit(1, 32)(5)).eval()


class Residual(nn.Module):
    """Ends with an addition that is no module: the last module's map is one of two parts of what is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.norm(self.conv(x))).mean((2, 3)))


def cam_refused() -> dict[str, Callable[[], nn.Module]]:
    timm = pytest.importorskip("timm")
    swin = timm.models.swin_transformer.SwinTransformer
    return {
        "attention": lambda: timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5
        ),
        "multi_head": lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5),
        "ours": lambda: small_vit(1, 32)(5),
        "behind a stem": lambda: small_vit(1, 32, (8, 32))(5),
        "channels_last": lambda: swin(
            img_size=32, patch_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=5
        ),
        "channels_last_in_blocks": lambda: torchvision.models.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(12, None, 2)], num_classes=5
        ),
        "residual": Residual,
        "mixer": lambda: timm.models.mlp_mixer.MlpMixer(
            img_size=32, patch_size=8, embed_dim=16, num_blocks=1, num_classes=5
        ),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention", "in VisionTransformer attention follows"),
        ("multi_head", "in VisionTransformer (attention|a linear layer of tokens) follows"),
        ("ours", "no module of SimpleViT returns one|follows"),
        ("behind a stem", "in SimpleViT .* follows"),
        ("channels_last", r"\(1, 4, 4, 24\) of 'norm', is not known to be one"),
        ("channels_last_in_blocks", "in ConvNeXt add of maps follows the last one, 'features.1.1.block.5'"),
        ("residual", "in Residual add of maps follows the last one, 'norm'"),
        ("mixer", "in MlpMixer .* follows"),
    ],
)
def test_grad_cam_refuses_what_is_no_map(name: str, message: str) -> None:
    torch.manual_seed(0)
    net = ConventionalNetwork(cam_refused()[name]()).eval()
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(UnsupportedOpError, match=message):
        method("grad_cam")(net, images, torch.tensor([0, 1]))


def test_grad_cam_takes_a_named_layer_of_a_network_it_refuses() -> None:
    torch.manual_seed(0)
    net = ConventionalNetwork(cam_refused()["multi_head"]()).eval()
    images = torch.rand(2, 3, 32, 32)
    found = method("grad_cam", layer="conv_proj")(net, images, torch.tensor([0, 1]))
    assert found.shape == (2, 32, 32)
    with pytest.raises(InvalidArgumentError, match=r"layer: got 'encoder', whose output is \(1, 17, 16\)"):
        method("grad_cam", layer="encoder")(net, images, torch.tensor([0, 1]))
    net = ConventionalNetwork(cam_refused()["channels_last_in_blocks"]()).eval()
    assert float(method("grad_cam", layer="features")(net, images, torch.tensor([0, 1])).std()) > 0


@pytest.mark.parametrize("architecture", ["convnext", "attention first", "known by its pool"])
def test_grad_cam_takes_maps_behind_norms_and_attention(architecture: str) -> None:
    """Channels-last layers inside a block, and attention before the last map, are no reason to refuse."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    if architecture == "convnext":
        model = timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=5)
    elif architecture == "attention first":
        model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), MapAttention(8), nn.BatchNorm2d(8), nn.ReLU(), Pooled(8))
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), MapAttention(8), ChannelsFirst(), nn.AdaptiveAvgPool2d(1), Pooled(8)
        )
    found = method("grad_cam")(ConventionalNetwork(model).eval(), torch.rand(1, 3, 64, 64), torch.tensor([1]))
    assert found.shape == (1, 64, 64)


class MapAttention(nn.Module):
    """Attention among the places of a map [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed: Tensor = self.attention(tokens, tokens, tokens)[0]
        return mixed.transpose(1, 2).reshape(x.shape)


class ChannelsFirst(nn.Module):
    """Says nothing about the order of its output's dimensions: the pool behind it does."""

    def forward(self, x: Tensor) -> Tensor:
        # Not traced, or this would be a function call instead of a module.
        return x.transpose(2, 3)[..., :-1] if float(x.sum()) < float("inf") else x


class Pooled(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def test_what_refuses_a_network_can_be_asked() -> None:
    everything = [name for name in METHODS if name != "bcos"]
    images = torch.rand(2, 3, 32, 32)
    refused = unsupported_methods(vit(), ["bcos", *everything], images)
    assert list(refused) == ["bcos", "guided_backprop", "grad_cam"]
    assert "gelu" in refused["guided_backprop"]
    assert unsupported_methods(resnet(), everything, IMAGES) == {}
    bcos, _ = bcosify(resnet().model.float(), Recipe(mean=MEAN, std=STD))
    assert unsupported_methods(bcos.eval(), list(METHODS), images) == {}
    chosen = [method("grad_cam", layer="to_patch_embedding.patches"), lambda net, images, targets: images.sum(1)]
    assert unsupported_methods(vit(), chosen, images) == {}
    # The others work.
    for name in everything:
        if name not in refused:
            found = method(name)(vit(), images, torch.tensor([0, 1]))
            assert bool(torch.isfinite(found).all())


def test_the_gradient_has_its_sign() -> None:
    net = resnet()
    _, grad = gradient(net)
    close(method("gradient")(net, IMAGES, TARGETS), grad.sum(1))


def test_the_gradient_of_an_encoded_image_is_that_of_the_image() -> None:
    """A B-cos network sees [x, 1 - x]: of filters that are antisymmetric the two halves' gradients would cancel."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = bcosify(nn.Sequential(*layers, nn.Linear(8, 10)), Recipe())[0].double().eval()
    images = IMAGES.requires_grad_()
    (expected,) = torch.autograd.grad(net(images).gather(1, TARGETS[:, None]).sum(), images)
    found = method("gradient")(net, IMAGES, TARGETS)
    torch.testing.assert_close(found, expected.sum(1), rtol=1e-9, atol=1e-12)
    assert float(found.abs().max()) > 1e-6
    # Guided: as large as the gradient, no rounding; and the same in another batch.
    guided = method("guided_backprop")
    assert float(guided(net, IMAGES, TARGETS).abs().max()) > 1e-6
    single = guided(copy.deepcopy(net).float(), IMAGES.float(), TARGETS).double()
    assert float((single - guided(net, IMAGES, TARGETS)).abs().max() / single.abs().max()) < 1e-3


def test_grad_cam_resized_as_published() -> None:
    net = resnet()
    smooth, blocks = (method("grad_cam", resize=how)(net, IMAGES, TARGETS) for how in ("bilinear", "nearest"))
    # Four places a side: blocks of 4 x 4 pixels of one value.
    torch.testing.assert_close(blocks, blocks[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert not torch.allclose(smooth, blocks)
    with pytest.raises(InvalidArgumentError, match="resize: got 'cubic'"):
        method("grad_cam", resize="cubic")(net, IMAGES, TARGETS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: got 0"),
        ({"window": -1}, "window: got -1"),
        ({"window": 17}, "window: got 17, expected at most 16"),
        ({"stride": 0}, "stride: got 0"),
        ({"window": 4, "stride": 5}, "stride: got 5, expected at most 4"),
        ({"perturbations": 0}, "perturbations: got 0"),
    ],
)
def test_bad_windows_of_occlusion_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        method("occlusion", **options)(resnet(), IMAGES, TARGETS)

"""Attribution methods against direct computations in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from bcos_rt import Recipe, bcosify, explain
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation import METHODS, method
from bcos_rt.models.small import SmallResNet
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

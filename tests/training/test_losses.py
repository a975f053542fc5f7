"""Losses against their formulas written out, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from bcos_rt import Recipe, bcosify
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.models import load_model
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.training import Distillation
from bcos_rt.training.losses import (
    SigLip,
    Teaching,
    agreement,
    bce,
    distance_of_features,
    distance_of_logits,
    uniform_off_bce,
)


def written_out(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Binary cross-entropy, one number at a time."""
    total = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        for z, t in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-z))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / logits.numel()


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def test_bce(logits: torch.Tensor) -> None:
    hot = F.one_hot(LABELS, 5).double()
    assert float(bce(logits, LABELS)) == pytest.approx(written_out(logits, hot), rel=1e-12)
    assert float(bce(logits, LABELS, 0.1)) == pytest.approx(written_out(logits, hot * 0.9 + 0.02), rel=1e-12)
    mixed = 0.3 * hot + 0.7 * hot.flip(0)
    assert float(bce(logits, mixed)) == pytest.approx(written_out(logits, mixed), rel=1e-12)


def test_uniform_off_labels(logits: torch.Tensor) -> None:
    hot = F.one_hot(LABELS, 5).double()
    assert float(uniform_off_bce(logits, LABELS)) == pytest.approx(written_out(logits, hot.clamp(min=0.2)), rel=1e-12)
    expected = written_out(logits, hot.clamp(min=0.01))
    assert float(uniform_off_bce(logits, LABELS, 0.01)) == pytest.approx(expected, rel=1e-12)


def test_a_uniform_answer_is_stationary_for_the_wrong_classes() -> None:
    """What the off value is for: at logit -log(classes - 1) the wrong classes' gradient is 0."""
    logits = torch.full((1, 8), -math.log(7), dtype=torch.float64, requires_grad=True)
    uniform_off_bce(logits, torch.tensor([3])).backward()
    assert logits.grad is not None
    wrong = [i for i in range(8) if i != 3]
    assert float(logits.grad[0, wrong].abs().max()) < 1e-12
    assert float(logits.grad[0, 3]) < -0.05


def test_distance_of_logits(logits: torch.Tensor) -> None:
    other = logits.flip(0)
    p, q = torch.softmax(other / 2, 1), torch.softmax(logits / 2, 1)
    expected = 4 * float((p * (p.log() - q.log())).sum(1).mean())
    assert float(distance_of_logits(logits, other, "kl", 2.0)) == pytest.approx(expected, rel=1e-10)
    targets = torch.softmax(other, 1)
    assert float(distance_of_logits(logits, other, "bce")) == pytest.approx(written_out(logits, targets), rel=1e-12)
    assert float(distance_of_logits(logits, logits, "kl", 3.0)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InvalidArgumentError, match="teacher"):
        distance_of_logits(logits, logits[:, :4], "kl")


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 5, 6), (3, 6)])
def test_distance_of_features(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = float((ours - theirs).square().mean() / theirs.square().mean())
    assert float(distance_of_features(ours, theirs, "mse")) == pytest.approx(expected, rel=1e-12)
    # Scale does not matter to the cosine, and the same features are at distance 0.
    assert float(distance_of_features(3 * ours, ours, "cosine")) == pytest.approx(0, abs=1e-12)
    channel = 1 if len(shape) == 4 else -1
    by_place = (ours * theirs).sum(channel) / (ours.norm(dim=channel) * theirs.norm(dim=channel))
    assert float(distance_of_features(ours, theirs, "cosine")) == pytest.approx(float(1 - by_place.mean()), rel=1e-10)


def test_siglip() -> None:
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(4, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    loss = SigLip().double()
    expected = 0.0
    for i in range(4):
        for j in range(4):
            cosine = float(F.cosine_similarity(ours[i], theirs[j], dim=0))
            z = (1 if i == j else -1) * (10 * cosine - 10)
            expected += math.log1p(math.exp(-z))
    assert float(loss(ours, theirs).detach()) == pytest.approx(expected / 4, rel=1e-6)
    fixed = SigLip(learned=False).double()
    assert float(fixed(ours, theirs)) == pytest.approx(expected / 4, rel=1e-6)
    assert list(fixed.parameters()) == []
    assert len(list(loss.parameters())) == 2


def test_cosine_of_embeddings() -> None:
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(4, 5, generator=generator) for _ in range(2))
    teaching = Teaching(small_net(1), small_net(0), Distillation(logits=0.0, embedding=3.0))
    parts = teaching(ours, theirs)
    expected = 3 * sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(ours, theirs, strict=True)) / 4
    assert set(parts) == {"distill_embedding"}
    assert float(parts["distill_embedding"]) == pytest.approx(expected, rel=1e-5)
    assert float(teaching(7 * theirs, theirs)["distill_embedding"]) < 1e-6
    torch.testing.assert_close(agreement(ours, theirs), F.cosine_similarity(ours, theirs))
    with pytest.raises(InvalidArgumentError, match=r"teacher.*\(4, 6\).*\(4, 5\)"):
        agreement(ours, torch.ones(4, 6))


def small_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 4, 3, padding=1))
    model.add_module("act", nn.ReLU())
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.Linear(4, 5))
    return ConventionalNetwork(model)


def test_teaching_is_zero_for_the_teacher_itself_and_not_for_another() -> None:
    settings = Distillation(logits=1.0, features=2.0, modules=("stem", "act"))
    images = torch.rand(3, 3, 8, 8)
    for seed, same in ((0, True), (1, False)):
        student = small_net(seed)
        teaching = Teaching(student, small_net(0), settings)
        with teaching.watching() as seen:
            parts = teaching(student(images), teaching.teach(images), seen)
        assert set(parts) == {"distill_logits", "distill_features"}
        for value in parts.values():
            assert (abs(float(value.detach())) < 1e-6) is same
    assert not any(True for _ in teaching.parameters()), "the teacher's weights are not the loss's"


def test_features_have_gradients_for_the_student_alone() -> None:
    student, teacher = small_net(1), small_net(0)
    teaching = Teaching(student, teacher, Distillation(logits=0.0, features=1.0, modules=("stem",)))
    images = torch.rand(2, 3, 8, 8)
    with teaching.watching() as seen:
        parts = teaching(student(images), teaching.teach(images), seen)
    parts["distill_features"].backward()
    assert student.model.stem.weight.grad is not None  # type: ignore[union-attr, operator]
    assert float(student.model.stem.weight.grad.abs().max()) > 0  # type: ignore[union-attr, operator]
    assert all(p.grad is None for p in teacher.parameters())


def test_modules_that_are_not_there_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'layer9'.*a module of the student: stem, act"):
        Teaching(small_net(0), small_net(0), Distillation(features=1.0, modules=("layer9",)))


@pytest.mark.parametrize(
    ("model", "names", "side"),
    [
        # A stage that ends in a ReLU, called twice a block; one whose block is called itself; a norm before a ReLU.
        ("torchvision:resnet18", ("layer1", "layer2.0", "bn1", "layer4"), 64),
        # Stages of one block, and ones that end in the addition of a shortcut.
        ("timm:efficientnet_lite0", ("blocks.0", "blocks.1", "blocks.6", "blocks.2.0.conv_dw"), 64),
        ("torchvision:densenet121", ("features.denseblock1", "features.transition2"), 64),
    ],
)
def test_features_of_a_converted_network_are_those_of_the_source(model: str, names: tuple[str, ...], side: int) -> None:
    """At B = 1 the converted network computes what the source computes, and so do its stages."""
    torch.manual_seed(0)
    source = load_model(model, weights="random", num_classes=5)
    net, _ = bcosify(source, Recipe.equivalent())
    teacher = source.conventional()
    images = torch.rand(2, 3, side, side)
    teaching = Teaching(net.eval(), teacher, Distillation(logits=0.0, features=1.0, modules=names))
    with teaching.watching() as seen:
        loss = teaching(net(images), teaching.teach(images), seen)["distill_features"]
    assert set(seen["student"]) == set(names)
    modules, expected = dict(teacher.model.named_modules()), {}
    handles = [
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: expected.__setitem__(name, out.clone()))
        for name in names
    ]
    with torch.no_grad():
        teacher(images)
    for handle in handles:
        handle.remove()
    for name in names:
        for found in seen.values():
            assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))
    assert float(loss.detach()) < 1e-6
    loss.backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Doubled(nn.Module):
    """A block whose output goes into a multiplication, and a module that is never called."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x) + 1
            return out

    def __init__(self) -> None:
        super().__init__()
        self.block, self.spare, self.fc = self.Block(), nn.ReLU(), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc((self.block(x) * 2).mean((2, 3)))
        return out


def test_features_that_cannot_be_read_are_named() -> None:
    net, _ = bcosify(Doubled(), Recipe())
    teacher, images = ConventionalNetwork(Doubled()), torch.rand(2, 3, 4, 4)
    with pytest.raises(InvalidArgumentError, match="'block', whose output goes into mul in the student"):
        Teaching(net, teacher, Distillation(features=1.0, modules=("block",)))
    teaching = Teaching(teacher, teacher, Distillation(features=1.0, modules=("spare",)))
    with (
        teaching.watching() as seen,
        pytest.raises(InvalidArgumentError, match="'spare', which the student never calls"),
    ):
        teaching(teacher(images), teaching.teach(images), seen)

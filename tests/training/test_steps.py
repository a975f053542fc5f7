"""Every choice of a recipe against the same steps written out by hand, in float64, from the definitions."""

import copy
import csv
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify, finetune
from bcos_rt.data import Augmentation
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import exponents, learn_exponents
from bcos_rt.training import TrainingRecipe, trainer
from tests.training.worker import colours, convnet, network

CLASSES, BATCH, STEPS = 4, 8, 3  # images a step, steps an epoch
RATE = 0.02
PLAIN = TrainingRecipe(
    epochs=2, batch_size=BATCH, lr=RATE, schedule="constant", loss="bce", agc=None, augmentation=Augmentation.none(),
    precision="64-true",
)  # fmt: skip
# Outputs leave Fabric's wrapper as float32; what a feature changes must be far more.
SAME, OTHER = 1e-5, 1e-3


class Watched(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random images that note in which order they are read."""

    def __init__(self, count: int = BATCH * STEPS) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.rand(count, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.order.append(index)
        return self.images[index], int(self.labels[index])


def tiny() -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, CLASSES)
    )
    with torch.no_grad():
        net[1].bias.uniform_(-0.5, 0.5)  # a norm of 0 would be clipped like one of 1e-3
    return net


# --- the steps written out -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a recipe should mean: the rate of every step, the targets made of one-hot labels, the update."""

    rates: tuple[float, ...] = (RATE,) * 2 * STEPS
    targets: Callable[[Tensor], Tensor] = lambda hot: hot
    softmax: bool = False
    update: str = "adam"  # or "adamw", "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    decay: float = 0.0
    decays: Callable[[Tensor], bool] = lambda p: p.ndim > 1
    agc: float | None = None
    agc_of_b: bool = False
    clip: float | None = None
    clip_with_b: bool = False
    b_rate: float = 0.0


def loss_of(logits: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    targets = rule.targets((labels[:, None] == torch.arange(CLASSES)).double())
    if rule.softmax:
        return -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
    right, wrong = 1 / (1 + torch.exp(-logits)), 1 / (1 + torch.exp(logits))
    return -(targets * right.log() + (1 - targets) * wrong.log()).mean()


def clipped(parameter: Tensor, gradient: Tensor, factor: float) -> Tensor:
    """Brock et al. 2021 (arXiv 2102.06171), section 4, eps 1e-3: by rows, by filters, a vector as a whole."""
    rows = (parameter.detach().flatten(1), gradient.flatten(1)) if parameter.ndim > 1 else (parameter[None].detach(),
                                                                                            gradient[None])  # fmt: skip
    result = torch.stack([
        g * min(1.0, factor * max(float(w.norm()), 1e-3) / float(g.norm())) for w, g in zip(*rows, strict=True)
    ])  # fmt: skip
    return result.reshape(gradient.shape)


def written_out(net: nn.Module, data: Watched, batches: list[list[int]], rule: Rule) -> dict[str, Tensor]:
    """The network's state after these batches. Learned exponents are the parameters called ``b``."""
    net = copy.deepcopy(net).double().train()
    names = [name for name, _ in net.named_parameters()]
    exponent = {name: name.endswith(".b") for name in names}
    first = {name: torch.zeros((), dtype=torch.float64) for name in names}
    second = dict(first)
    for step, (batch, rate) in enumerate(zip(batches, rule.rates, strict=True)):
        parameters = dict(net.named_parameters())
        loss = loss_of(net(data.images[batch].double()), data.labels[batch], rule)
        gradients = dict(zip(names, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        if rule.agc is not None:
            for name in names:
                if not exponent[name]:
                    gradients[name] = clipped(parameters[name], gradients[name], rule.agc)
                elif rule.agc_of_b:
                    limit = rule.agc * float(parameters[name].detach())
                    gradients[name] = gradients[name].clamp(-limit, limit)
        if rule.clip is not None:
            counted = [g for name, g in gradients.items() if rule.clip_with_b or not exponent[name]]
            norm = math.sqrt(sum(float(g.square().sum()) for g in counted))
            for name in names:
                if rule.clip_with_b or not exponent[name]:
                    gradients[name] = gradients[name] * min(1.0, rule.clip / norm)
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name]
                if exponent[name]:
                    p.copy_((p - rule.b_rate * g).clamp(min=1))
                    continue
                decay = rule.decay if rule.decays(p) else 0.0
                if rule.update == "adamw":
                    p.mul_(1 - rate * decay)
                else:
                    g = g + decay * p
                if rule.update == "sgd":
                    first[name] = rule.momentum * first[name] + g
                    p.sub_(rate * first[name])
                    continue
                one, two = rule.betas
                first[name] = one * first[name] + (1 - one) * g
                second[name] = two * second[name] + (1 - two) * g * g
                mean, square = first[name] / (1 - one ** (step + 1)), second[name] / (1 - two ** (step + 1))
                p.sub_(rate * mean / (square.sqrt() + 1e-8))
    return {name: value.detach() for name, value in net.state_dict().items()}


def trained(net: nn.Module, recipe: TrainingRecipe) -> tuple[Watched, list[list[int]], trainer.TrainingResult]:
    """The data, the batches that were read, and what came of them."""
    data = Watched()
    result = finetune(net, data, recipe, accelerator="cpu")
    order = data.order[-recipe.epochs * len(data) :]  # one is read to look at it
    epochs = [order[i : i + len(data)] for i in range(0, len(order), len(data))]
    assert all(sorted(epoch) == list(range(len(data))) for epoch in epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    return data, [order[i : i + BATCH] for i in range(0, len(order), BATCH)], result


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its largest element."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())


# --- the recipes -----------------------------------------------------------------------------------------------------


def raised(low: float) -> Callable[[Tensor], Tensor]:
    return lambda hot: torch.where(hot > low, hot, low)


def smoothed(share: float) -> Callable[[Tensor], Tensor]:
    return lambda hot: torch.where(hot == 1, 1 - share + share / CLASSES, share / CLASSES)


def rates(*parts: float) -> tuple[float, ...]:
    return tuple(RATE * part for part in parts)


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


ALL: Callable[[Tensor], bool] = lambda p: True  # noqa: E731
NONE: Callable[[Tensor], Tensor] = lambda hot: hot  # noqa: E731
SGD = {"optimizer": "sgd", "lr": 0.2}
STEEP = {"rates": (0.2,) * 6, "update": "sgd"}
WARM_EPOCH = {"schedule": "cosine", "warmup_epochs": 1.0, "warmup_factor": 0.25, "epochs": 4}

# name -> (the recipe's fields, the rule they should mean, how the rule would differ without them)
CASES: dict[str, tuple[dict[str, Any], Rule, list[dict[str, Any]]]] = {
    "adam": ({}, Rule(), [{"update": "adamw", "decay": 0.5}, {"update": "sgd"}]),
    "uniform off": (
        {"loss": "uniform_off_bce"},
        Rule(targets=raised(1 / CLASSES)),
        [{"targets": NONE}, {"targets": smoothed(1 / CLASSES)}],
    ),
    "off value": (
        {"loss": "uniform_off_bce", "off_value": 0.1},
        Rule(targets=raised(0.1)),
        [{"targets": NONE}, {"targets": raised(1 / CLASSES)}],
    ),
    "smoothing": ({"smoothing": 0.3}, Rule(targets=smoothed(0.3)), [{"targets": NONE}, {"targets": raised(0.3)}]),
    "cross-entropy": ({"loss": "cross_entropy"}, Rule(softmax=True), [{"softmax": False}]),
    "smoothed cross-entropy": (
        {"loss": "cross_entropy", "smoothing": 0.3},
        Rule(softmax=True, targets=smoothed(0.3)),
        [{"targets": NONE}],
    ),
    "betas": ({"betas": (0.5, 0.9)}, Rule(betas=(0.5, 0.9)), [{"betas": (0.9, 0.9)}, {"betas": (0.5, 0.999)}]),
    "adam with decay": (
        {"weight_decay": 0.5},
        Rule(decay=0.5),
        [{"decay": 0.0}, {"update": "adamw"}, {"decays": ALL}],
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.5, "betas": (0.8, 0.95)},
        Rule(update="adamw", decay=0.5, betas=(0.8, 0.95)),
        [{"update": "adam"}, {"decay": 0.0}, {"decays": ALL}, {"betas": (0.9, 0.999)}],
    ),
    "adamw on all": (
        {"optimizer": "adamw", "weight_decay": 0.5, "decay_all": True},
        Rule(update="adamw", decay=0.5, decays=ALL),
        [{"update": "adam"}, {"decay": 0.0}, {"decays": lambda p: p.ndim > 1}],
    ),
    "sgd": (
        {**SGD, "momentum": 0.7, "weight_decay": 0.1},
        Rule(**STEEP, momentum=0.7, decay=0.1),
        [{"momentum": 0.0}, {"momentum": 0.9}, {"decay": 0.0}, {"decays": ALL}],
    ),
    "cosine by step": (
        {"schedule": "cosine", "min_lr": RATE / 10},
        Rule(rates=rates(*(0.1 + 0.9 * cosine(i / 6) for i in range(6)))),
        [{"rates": rates(1, 1, 1, 1, 1, 1)}, {"rates": rates(*(cosine(i / 6) for i in range(6)))}],
    ),
    "cosine by epoch": (
        {"schedule": "cosine", "step_schedule": False},
        Rule(rates=rates(1, 1, 1, 0.5, 0.5, 0.5)),
        [{"rates": rates(1, 1, 1, 1, 1, 1)}, {"rates": rates(*(cosine(i / 6) for i in range(6)))}],
    ),
    "warm-up and cosine by step": (
        {"schedule": "cosine", "warmup_steps": 2, "warmup_factor": 0.1},
        Rule(rates=rates(0.1, 0.55, 1, cosine(1 / 4), 0.5, cosine(3 / 4))),
        [
            {"rates": rates(1, 1, 1, 1, 1, 1)},
            {"rates": rates(*(cosine(i / 6) for i in range(6)))},
            {"rates": rates(0.1, 0.55, 1, 1, 1, 1)},
        ],
    ),
    "warm-up of an epoch by step": (
        WARM_EPOCH,
        Rule(rates=rates(0.25, 0.5, 0.75, *(cosine(i / 9) for i in range(9)))),
        [{"rates": rates(*(cosine(i / 12) for i in range(12)))}],
    ),
    "warm-up and cosine by epoch": (
        {**WARM_EPOCH, "step_schedule": False},
        Rule(rates=rates(*(part for part in (0.25, 1, 0.75, 0.25) for _ in range(3)))),
        [{"rates": (RATE,) * 12}, {"rates": rates(0.25, 0.5, 0.75, *(cosine(i / 9) for i in range(9)))}],
    ),
    "constant warm-up": (
        {"warmup_epochs": 1.0, "warmup": "constant", "warmup_factor": 0.2},
        Rule(rates=rates(0.2, 0.2, 0.2, 1, 1, 1)),
        [{"rates": rates(1, 1, 1, 1, 1, 1)}, {"rates": rates(0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1, 1, 1)}],
    ),
    "clip norm": ({**SGD, "clip_norm": 0.05}, Rule(**STEEP, clip=0.05), [{"clip": None}]),
    "adaptive clipping": ({**SGD, "agc": 0.02}, Rule(**STEEP, agc=0.02), [{"agc": None}, {"agc": 0.01}]),
    "both clips": (
        {**SGD, "agc": 0.05, "clip_norm": 0.05},
        Rule(**STEEP, agc=0.05, clip=0.05),
        [{"agc": None}, {"clip": None}],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_written_out(name: str) -> None:
    changes, rule, others = CASES[name]
    net = tiny()
    start = copy.deepcopy(net)
    data, batches, result = trained(net, PLAIN.replace(**changes))
    found = dict(net.state_dict())
    assert distance(found, written_out(start, data, batches, rule)) < SAME
    for other in others:
        assert distance(found, written_out(start, data, batches, dataclasses.replace(rule, **other))) > OTHER, other
    assert [row["lr"] for row in result.history] == pytest.approx(rule.rates[STEPS - 1 :: STEPS], rel=1e-12)


def test_train_loss_is_the_mean_of_the_steps_losses() -> None:
    """At rate 0 all steps see the same weights; norms take their statistics from the batch."""
    net = tiny()
    data, batches, result = trained(net, PLAIN.replace(lr=0.0, loss="uniform_off_bce"))
    plain = tiny().double()
    rule = Rule(targets=raised(1 / CLASSES))
    with torch.no_grad():
        losses = [float(loss_of(plain(data.images[b].double()), data.labels[b], rule)) for b in batches]
    assert [row["train_loss"] for row in result.history] == pytest.approx(
        [sum(losses[:STEPS]) / STEPS, sum(losses[STEPS:]) / STEPS], rel=1e-6
    )


# --- a learned B -----------------------------------------------------------------------------------------------------

LEARNED = {**SGD, "learn_b": True, "b_lr": 2.0}
B_STEPS = {**STEEP, "b_rate": 2.0}


@pytest.mark.parametrize(
    ("changes", "rule", "others"),
    [
        (LEARNED, Rule(**B_STEPS), [{"b_rate": 0.2}, {"agc": 0.01}]),
        ({**LEARNED, "weight_decay": 0.5}, Rule(**B_STEPS, decay=0.5), [{"decay": 0.0}]),
        ({**LEARNED, "agc": 0.002}, Rule(**B_STEPS, agc=0.002), [{"agc": None}, {"agc_of_b": True}]),
        ({**LEARNED, "clip_norm": 0.02}, Rule(**B_STEPS, clip=0.02), [{"clip": None}, {"clip_with_b": True}]),
    ],
    ids=["plain", "decay", "adaptive clipping", "clip norm"],
)
def test_a_learned_b_has_steps_of_its_own(changes: dict[str, Any], rule: Rule, others: list[dict[str, Any]]) -> None:
    """Constant rate, no momentum, no decay; neither of the clips limits its gradient or counts it."""
    net, _ = bcosify(tiny(), Recipe(b=1.5, mean=(0, 0, 0), std=(1, 1, 1)))
    start = copy.deepcopy(net)
    learn_exponents(start)
    data, batches, _ = trained(net, PLAIN.replace(**changes, schedule="cosine"))
    falling = tuple(0.2 * cosine(i / 6) for i in range(6))

    def expected(rule: Rule) -> dict[str, Tensor]:
        return written_out(start, data, batches, dataclasses.replace(rule, rates=falling))

    found = dict(net.state_dict())
    found |= {f"{name}.b": torch.tensor(b, dtype=torch.float64) for name, b in exponents(net).items()}
    assert distance(found, expected(rule)) < SAME
    for other in others:
        assert distance(found, expected(dataclasses.replace(rule, **other))) > OTHER, other


# --- when it is validated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "when"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_validation_in_every_so_many_epochs_and_the_last(every: int, when: list[int], tmp_path: Path) -> None:
    validation = Watched(6)
    reads: list[int] = []
    result = finetune(
        tiny(), Watched(), PLAIN.replace(epochs=5, validate_every=every, ema=0.5, loss="bce"), accelerator="cpu",
        validation=validation, output=tmp_path / "run", on_epoch=lambda _: reads.append(len(validation.order)),
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    for name in ("val_loss", "val_top1", "ema_loss", "ema_top1"):
        assert [int(row["epoch"]) for row in rows if row[name]] == when, name
        assert [row["epoch"] for row in result.history if name in row] == when, name
    assert all(row["train_loss"] for row in rows)
    assert result.best is not None
    assert result.best["epoch"] in when
    # The network and its average, 6 images each; nothing is read, and thrown away, in between.
    before = [reads[0] - 12 * (1 in when), *reads]
    assert [b - a for a, b in zip(before, reads, strict=False)] == [12 * (epoch in when) for epoch in range(1, 6)]


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, lambda: ConventionalNetwork(convnet())], ids=["b-cos", "conventional"])
def test_fp16_autocast_with_loss_scaling(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric itself has no fp16 on the CPU (it takes bf16 instead), torch has: its plugin is made for the CPU here."""
    recipe = TrainingRecipe(
        epochs=1, batch_size=16, optimizer="sgd", lr=0.05, augmentation=Augmentation.none(), log_every=1
    )
    plain, half = make(), make()
    start = {k: v.clone() for k, v in plain.state_dict().items()}
    finetune(plain, colours(32), recipe, accelerator="cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    monkeypatch.setattr(trainer, "make_fabric", lambda *_: Fabric(accelerator="cpu", devices=1, plugins=[plugin]))
    types: list[torch.dtype] = []
    layer = next(m for m in half.modules() if isinstance(m, nn.Conv2d) or type(m).__name__ == "BcosConv2d")
    layer.register_forward_hook(lambda *a: types.append(a[2].dtype))
    finetune(half, colours(32), recipe.replace(precision="16-mixed"))
    assert types == [torch.float16] * 2
    assert scaler.get_scale() == 4096, "it doubles after each of two steps that were finite"
    moved = 0.0
    for name, value in half.state_dict().items():
        assert value.dtype == start[name].dtype
        expected = plain.state_dict()[name].double()
        step = float((expected - start[name]).norm())
        if value.is_floating_point() and step > 0:
            assert float((value - expected).norm()) < 0.05 * step, name
            moved += step
    assert moved > 0.01

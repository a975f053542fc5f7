"""Losses, gradients and weights that are not finite: the run ends, step and layer named, and nothing bad is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bcos_rt import finetune
from bcos_rt.data import Augmentation
from bcos_rt.errors import InvalidArgumentError, TrainingError
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.training import Distillation, TrainingRecipe, trainer
from bcos_rt.training.finite import all_finite
from bcos_rt.training.optim import make_optimizers, set_fused, step_all
from tests.training.worker import colours, convnet

# Four steps an epoch of 64 images.
PLAIN = TrainingRecipe(
    epochs=3, batch_size=16, lr=5e-3, loss="cross_entropy", agc=None, augmentation=Augmentation.none(), log_every=1
)


class _Bad(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


class Later(nn.Module):
    """From a training batch on, infinite, or with a gradient that is NaN."""

    def __init__(self, first: int, kind: str) -> None:
        super().__init__()
        self.first, self.kind, self.calls = first, kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls < self.first:
            return x
        return x / 0 if self.kind == "output" else _Bad.apply(x)


def broken(first: int, kind: str) -> ConventionalNetwork:
    source = convnet()
    source.insert(3, Later(first, kind))
    return ConventionalNetwork(source)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is trained on as a GPU is: fused optimisers, numbers read every ``log_every`` steps."""
    monkeypatch.setattr(trainer, "FUSED_DEVICES", ("cpu",))


def test_a_gradient_that_is_not_finite_changes_and_saves_nothing(tmp_path: Path) -> None:
    """In the last step of the first epoch: nothing else would be computed before the epoch is saved."""
    net = broken(4, "gradient")
    with pytest.raises(
        TrainingError,
        match=r"the gradient is not finite in epoch 1, step 4 of 4; first not finite: the gradient at the output of "
        r"model\.2 \(ReLU\); nothing was saved",
    ):
        finetune(net, colours(64), PLAIN, validation=colours(16), output=tmp_path / "run")
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock", "recipe.json", "steps.csv", "tensorboard"}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("output", r"the output of model\.3 \(Later\)"),
        ("gradient", r"the gradient at the output of model\.2 \(ReLU\)"),
    ],
)
@pytest.mark.parametrize(("first", "log_every"), [(6, 50), (8, 1)])
def test_step_and_layer_are_right_where_numbers_are_read_later(
    first: int, kind: str, place: str, log_every: int, tmp_path: Path
) -> None:
    message = rf"epoch 2, step {first - 4} of 4; first not finite: {place}; .* is that of the end of epoch 1"
    with pytest.raises(TrainingError, match=message):
        finetune(broken(first, kind), colours(64), PLAIN.replace(log_every=log_every), output=tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["epoch"] == 1
    assert all(bool(torch.isfinite(v).all()) for v in state["model"].values() if v.is_floating_point())


@pytest.mark.parametrize(("first", "optimizer"), [(1, "sgd"), (6, "adam"), (6, "sgd")])
def test_weights_stay_those_before_the_bad_step(
    first: int, optimizer: str, on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though later steps follow before anybody looks. The same as where every step is looked at."""
    nets = []
    recipe = PLAIN.replace(optimizer=optimizer, log_every=50, weight_decay=0.1)
    for devices in (("cpu",), ()):
        monkeypatch.setattr(trainer, "FUSED_DEVICES", devices)
        nets.append(broken(first, "output"))
        with pytest.raises(TrainingError):
            finetune(nets[-1], colours(64), recipe)
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_close(one, two, rtol=1e-5, atol=1e-7)
    if first == 1:
        for one, two in zip(nets[0].parameters(), broken(1, "output").parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.usefixtures("on_device")
def test_a_batch_is_read_again_with_its_mixing_and_a_bad_image_is_named() -> None:
    images, labels = colours(64)
    pixels = images.float() / 255

    class Data(torch.utils.data.Dataset[tuple[Tensor, int]]):
        """One image becomes NaN after it has been looked at, and is in one batch of an epoch."""

        read = 0

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.read += 1
            return pixels[index] * (torch.nan if index == 7 and self.read > 64 else 1), int(labels[index])

    with pytest.raises(TrainingError, match=r"epoch [12], step [1-4] of 4; first not finite: the images"):
        finetune(ConventionalNetwork(convnet()), Data(), PLAIN.replace(log_every=50))


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    """Gradients are finite, the update is not: in the last step before saving."""
    net = ConventionalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    recipe = PLAIN.replace(epochs=1, batch_size=64, optimizer="sgd", lr=1e30, weight_decay=1e30, schedule="constant")
    with pytest.raises(TrainingError, match=r"model\.1\.weight is not finite after epoch 1, step 1 of 1; nothing was"):
        finetune(net, colours(64), recipe, output=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.pt")) + list((tmp_path / "run").glob("*.safetensors"))


def test_an_infinity_of_the_networks_own_is_none_of_ours(tmp_path: Path) -> None:
    source = convnet()
    source.register_buffer("mask", torch.full((3,), -torch.inf))
    finetune(ConventionalNetwork(source), colours(16), PLAIN.replace(epochs=1), output=tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").exists()


def test_a_validation_loss_that_is_not_finite_is_never_the_best() -> None:
    class Once(nn.Module):
        """NaN in the first evaluation."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += not self.training
            return x * torch.nan if self.calls == 1 and not self.training else x

    source = convnet()
    source.append(Once())
    result = finetune(ConventionalNetwork(source), colours(48), PLAIN.replace(select="loss"), validation=colours(16))
    losses = [row["val_loss"] for row in result.history]
    assert losses[0] != losses[0]
    assert result.best is not None
    assert result.best["val_loss"] == min(losses[1:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_all_finite(bad: float) -> None:
    tensors = [torch.full((3, 2), 3e38), torch.zeros(()), torch.ones(5, dtype=torch.float64)]
    assert bool(all_finite(tensors)), "their squares overflow, they do not"
    tensors[0][1, 1] = bad
    assert not bool(all_finite(tensors))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_state_of_the_other_kind_of_optimiser_goes_on(optimizer: str) -> None:
    """Saved on a CPU and loaded on a GPU, or the other way round."""
    recipe = PLAIN.replace(optimizer=optimizer, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 3, generator=generator) for _ in range(6)]
    found = []
    for kinds in ((False, False), (False, True), (True, False)):
        layer = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            layer.weight.fill_(0.5)
        state: dict[str, Any] | None = None
        for fused in kinds:
            (made,) = make_optimizers(layer, recipe, fused=fused)
            if state is not None:
                made.load_state_dict(state)
                set_fused(made, fused)
            for i in range(3):
                layer.weight.grad = gradients[i + 3 * (state is not None)].clone()
                step_all([made], torch.tensor(i != 1))
            state = made.state_dict()
        found.append(layer.weight.detach().clone())
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-5, atol=1e-6)


# --- what else may not be finite -------------------------------------------------------------------------------------


def test_running_statistics_are_those_before_the_step() -> None:
    """So that a second try with a smaller learning rate begins with numbers."""
    net = broken(3, "output")
    with pytest.raises(TrainingError, match="step 3"):
        finetune(net, colours(64), PLAIN)
    assert all(bool(b.isfinite().all()) for b in net.buffers())
    assert not torch.equal(net.get_buffer("model.1.running_var"), torch.ones(8)), "two steps were seen"


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.1.running_var", torch.nan), ("model.0.weight", torch.nan), ("model.0.weight", torch.inf)],
)
def test_a_network_that_is_not_finite_is_refused(name: str, value: float) -> None:
    net = ConventionalNetwork(convnet())
    with torch.no_grad():
        net.state_dict()[name].view(-1)[0] = value
    with pytest.raises(InvalidArgumentError, match=rf"net: got {name}, which is not finite"):
        finetune(net, colours(64), PLAIN)


class Steep(nn.Module):
    """The identity, with a gradient whose square is more than float32 has."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 1e24)
        return x


def test_an_optimisers_moments_are_looked_at(tmp_path: Path) -> None:
    """Adam's second moment would stay infinite, and its weights where they are."""
    source = convnet()
    source.insert(3, Steep())
    with pytest.raises(TrainingError, match=r"the optimiser's exp_avg_sq of model\.0\.weight is not finite"):
        finetune(ConventionalNetwork(source), colours(64), PLAIN, output=tmp_path / "run")
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_teacher_that_is_not_finite_is_named() -> None:
    teacher = ConventionalNetwork(convnet())
    nn.init.constant_(teacher.model[8].bias, torch.nan)
    recipe = PLAIN.replace(loss="none", distillation=Distillation())
    with pytest.raises(TrainingError, match="first not finite: the teacher's output"):
        finetune(ConventionalNetwork(convnet()), colours(64), recipe, teacher=teacher)


def test_the_average_of_what_has_none_is_a_copy() -> None:
    """torch's average of integers rounds down; of infinities it is no number."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.arange(5000))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mask.clamp(min=0)

    source = convnet()
    source.append(Positions())
    net = ConventionalNetwork(source)
    result = finetune(net, colours(64), PLAIN.replace(ema=0.9), validation=colours(16))
    assert result.averaged is not None
    for name in ("model.9.index", "model.9.mask", "model.1.num_batches_tracked"):
        assert torch.equal(result.averaged.get_buffer(name), net.get_buffer(name)), name
    variance = "model.1.running_var"
    assert not torch.equal(result.averaged.get_buffer(variance), net.get_buffer(variance))

"""Schedules against torch's schedulers, and at their ends."""

import math

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, SequentialLR

from bcos_rt.training import TrainingRecipe
from bcos_rt.training.schedules import Schedule


def of_torch(make: object, steps: int, lr: float = 0.3) -> list[float]:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine() -> None:
    schedule = Schedule(TrainingRecipe(epochs=4, lr=0.3, min_lr=0.01), 5)
    expected = of_torch(lambda o: CosineAnnealingLR(o, 20, 0.01), 20)
    assert [schedule.lr(i) for i in range(20)] == pytest.approx(expected, rel=1e-9)
    assert schedule.lr(20) == pytest.approx(0.01)


def test_cosine_by_epoch_is_constant_within_one() -> None:
    schedule = Schedule(TrainingRecipe(epochs=4, lr=0.3, step_schedule=False), 5)
    expected = of_torch(lambda o: CosineAnnealingLR(o, 4), 4)
    assert [schedule.lr(i) for i in range(20)] == pytest.approx([v for v in expected for _ in range(5)], rel=1e-9)


@pytest.mark.parametrize("warmup", ["linear", "constant"])
@pytest.mark.parametrize("unit", [{"warmup_epochs": 2.0}, {"warmup_steps": 10}])
def test_warm_up(warmup: str, unit: dict[str, float]) -> None:
    recipe = TrainingRecipe(epochs=6, lr=0.3, warmup=warmup, warmup_factor=0.1, **unit)  # type: ignore[arg-type]
    first = {
        "linear": lambda o: LinearLR(o, 0.1, total_iters=10),
        "constant": lambda o: ConstantLR(o, 0.1, total_iters=10),
    }[warmup]
    expected = of_torch(lambda o: SequentialLR(o, [first(o), CosineAnnealingLR(o, 20)], [10]), 30)
    assert [Schedule(recipe, 5).lr(i) for i in range(30)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("factor", [1, 2])
def test_restarts(factor: int) -> None:
    recipe = TrainingRecipe(
        epochs=12, lr=0.3, schedule="cosine_restarts", restart_epochs=2.0, restart_factor=float(factor)
    )
    expected = of_torch(lambda o: CosineAnnealingWarmRestarts(o, 10, factor), 60)
    assert [Schedule(recipe, 5).lr(i) for i in range(60)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("epochs", "steps"), [(0.4, 100), (0.1, 10), (0.3, 10), (1 / 3, 9)])
def test_periods_of_parts_of_epochs_begin_at_the_peak(epochs: float, steps: int) -> None:
    """Sums of 0.1 and the like are not exact: no period's first step is at the end of the one before."""
    recipe = TrainingRecipe(epochs=30, lr=0.3, schedule="cosine_restarts", restart_epochs=epochs)
    period = round(epochs * steps)
    found = [Schedule(recipe, steps).lr(i) for i in range(30 * steps)]
    assert found[::period] == pytest.approx([0.3] * len(found[::period]), rel=1e-6)


def test_b_rises_to_the_layers_own() -> None:
    schedule = Schedule(TrainingRecipe(b_start=1.0, b_epochs=2.0), 10)
    assert [schedule.b(i, 2.5) for i in (0, 10, 20, 99)] == pytest.approx([1.0, 1.75, 2.5, 2.5])
    assert Schedule(TrainingRecipe(), 10).b(0, 2.5) == 2.5


def test_biases_fall_to_exactly_zero() -> None:
    schedule = Schedule(TrainingRecipe(bias_decay_epochs=1.5), 10)
    scales = [schedule.bias_scale(i) for i in range(30)]
    assert scales[0] == 1.0
    assert scales[15] == 0.0
    assert math.isclose(scales[5], 2 / 3)
    assert scales == sorted(scales, reverse=True)
    assert Schedule(TrainingRecipe(), 10).bias_scale(1000) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": 5.0}, "the learning rate never reaches lr: 5 epochs of warm-up, in a run of 3"),
        ({"warmup_epochs": 3.0}, "the learning rate never reaches lr: 3 epochs of warm-up, in a run of 3"),
        ({"warmup_epochs": 2.5, "step_schedule": False}, "the learning rate never reaches lr: 2.5 epochs of warm-up"),
        ({"warmup_steps": 40}, "the learning rate never reaches lr: 4 epochs of warm-up, in a run of 3"),
        ({"b_start": 1.0, "b_epochs": 3.5}, "B does not reach the network's own: 3.5 epochs of b_epochs, in a run"),
        ({"bias_decay_epochs": 4.0}, "biases do not reach 0: 4 epochs of bias_decay_epochs, in a run of 3"),
    ],
)
def test_what_a_run_is_too_short_for(changes: dict[str, float], message: str) -> None:
    (found,) = Schedule(TrainingRecipe(epochs=3, **changes), 10).unfinished()  # type: ignore[arg-type]
    assert found.startswith(message)


def test_what_a_run_is_just_long_enough_for() -> None:
    recipe = TrainingRecipe(epochs=3, warmup_steps=29, b_start=1.0, b_epochs=3.0, bias_decay_epochs=3.0)
    assert Schedule(recipe, 10).unfinished() == []

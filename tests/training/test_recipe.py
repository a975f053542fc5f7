"""The training recipe: what it refuses, and that it survives JSON."""

import json
import math
from typing import Any

import numpy as np
import pytest

from bcos_rt.data.augment import Augmentation, Mixing
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.training import Distillation, TrainingRecipe
from bcos_rt.training.schedules import Schedule


@pytest.mark.parametrize(
    "recipe",
    [
        TrainingRecipe(),
        TrainingRecipe.standard(ema=0.99, mixing=Mixing(mixup=0.2)),
        TrainingRecipe.bcos(distillation=Distillation(features=0.5, modules=("layer1", "layer2")), betas=(0.8, 0.9)),
    ],
)
def test_recipe_survives_json(recipe: TrainingRecipe) -> None:
    assert TrainingRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_replace_reaches_into_parts() -> None:
    changes = {"epochs": 3, "augmentation.size": 48, "distillation.temperature": 2.0, "distillation.logits": 3.0}
    recipe = TrainingRecipe().replace(**changes)
    assert (recipe.epochs, recipe.augmentation.size) == (3, 48)
    assert recipe.distillation == Distillation(temperature=2.0, logits=3.0)
    # A part that cannot do without the field that is given, and one as a file or a command line has it.
    assert TrainingRecipe().replace(**{"mixing.mixup": 0.5}).mixing == Mixing(mixup=0.5)
    assert TrainingRecipe().replace(mixing={"mixup": 0.5}).mixing == Mixing(mixup=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "TrainingRecipe.epochs: got 0, expected at least 1"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"lr": -1.0}, "TrainingRecipe.lr"),
        ({"lr": float("nan")}, "TrainingRecipe.lr"),
        ({"ema": 1.5}, "TrainingRecipe.ema: got 1.5, expected a number from 0 to 1"),
        ({"b_start": 0.5}, "TrainingRecipe.b_start"),
        ({"betas": (0.9, 1.0)}, "TrainingRecipe.betas"),
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "give one of the two"),
        ({"warmup": "constant"}, r"TrainingRecipe\.warmup: got 'constant' without a warm-up, expected 'linear', or"),
        ({"warmup_factor": 0.1}, r"TrainingRecipe\.warmup_factor: got 0\.1 without a warm-up"),
        ({"loss": "none"}, "a loss, or a distillation"),
        ({"accumulate": 9, "batch_size": 8}, "TrainingRecipe.accumulate"),
        ({"learn_b": True, "b_start": 1.0, "b_epochs": 1.0}, "None beside learn_b"),
        ({"b_start": 1.0}, "TrainingRecipe.b_epochs"),
        ({"b_epochs": 2.0}, "TrainingRecipe.b_epochs"),
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"distillation.logit": 1.0}, "did you mean 'logits'"),
        ({"lr.x": 1.0}, "lr has none"),
        ({"mixing": {"mixupp": 1.0}}, "did you mean 'mixup'"),
        ({"warmup_steps": 5, "step_schedule": False}, r"TrainingRecipe\.warmup_steps: got 5 with step_schedule=False"),
        ({"smoothing": 0.1}, r"smoothing: got 0\.1 with loss='uniform_off_bce', .*expected 0\.0, or loss 'bce'"),
        ({"loss": "bce", "off_value": 0.1}, r"TrainingRecipe\.off_value"),
        ({"schedule": "constant", "min_lr": 0.1}, r"TrainingRecipe\.min_lr"),
        ({"restart_epochs": 3.0}, r"TrainingRecipe\.restart_epochs"),
        ({"momentum": 0.5}, r"TrainingRecipe\.momentum"),
        ({"optimizer": "sgd", "betas": (0.5, 0.9)}, r"TrainingRecipe\.betas"),
        ({"b_lr": 0.1}, r"TrainingRecipe\.b_lr: got 0\.1 with learn_b=False"),
        ({"distillation": {"temperature": 2.0, "logit_loss": "mse"}}, r"Distillation\.temperature"),
        ({"distillation": {"modules": ("layer1",)}}, r"Distillation\.modules: got \('layer1',\) with features=0"),
        ({"distillation": {"feature_loss": "mse"}}, r"Distillation\.feature_loss: got 'mse' with features=0"),
        ({"distillation": {"logits": 0, "embedding": 1, "logit_loss": "mse"}}, r"Distillation\.logit_loss"),
        ({"ema": 1}, r"TrainingRecipe\.ema: got 1, expected a number < 1"),
        ({"augmentation": "none", "augmentation.size": 32}, r"TrainingRecipe\.augmentation: got 'none', expected Aug"),
        ({"distillation": 3, "distillation.logits": 3}, r"TrainingRecipe\.distillation: got 3, expected Distillation"),
    ],
)
def test_bad_values_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=message):
        TrainingRecipe().replace(**changes)


@pytest.mark.parametrize("name", ["step_schedule", "learn_b", "channels_last", "decay_all", "sync_norms"])
@pytest.mark.parametrize("value", ["False", 0, None])
def test_only_true_and_false_are_either(name: str, value: object) -> None:
    with pytest.raises(InvalidTypeError, match=rf"TrainingRecipe\.{name}: got .*, expected True or False"):
        TrainingRecipe(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("betas", [0.9, None, ("a", "b"), "ab"])
def test_betas_of_another_type(betas: object) -> None:
    with pytest.raises(InvalidTypeError, match=r"TrainingRecipe\.betas"):
        TrainingRecipe(betas=betas)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{"padding": 2.5}, {"padding": float("inf")}, {"magnitude": 9.5}, {"magnitude": 31}, {"scale": 0.5},
     {"ratio": None}, {"scale": ("a", 1)}, {"ratio": (2, 1)}, {"magnitude": 20}, {"padding": 9},
     {"scale": (0.5, 1), "crop": "padded"}],
)  # fmt: skip
def test_bad_augmentations_are_named(changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(InvalidArgumentError, match=rf"Augmentation\.{name}"):
        Augmentation(**changes)


def test_wrong_types_are_named() -> None:
    with pytest.raises(InvalidTypeError, match=r"TrainingRecipe\.epochs: got 1\.5"):
        TrainingRecipe(epochs=1.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match=r"TrainingRecipe\.lr"):
        TrainingRecipe(lr="fast")  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match=r"TrainingRecipe\.mixing: got 0\.5, expected Mixing or None"):
        TrainingRecipe(mixing=0.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match=r"TrainingRecipe\.augmentation: got None, expected Augmentation"):
        TrainingRecipe(augmentation=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match=r"Distillation\.modules"):
        Distillation(modules="layer1")  # type: ignore[arg-type]


def test_distillation_needs_something_to_do() -> None:
    with pytest.raises(InvalidArgumentError, match="all weights 0"):
        Distillation(logits=0.0)
    with pytest.raises(InvalidArgumentError, match="module names"):
        Distillation(features=1.0)


def test_numbers_of_others_are_pythons_own() -> None:
    """What torch loads from a state file again, and what its distributions take."""
    recipe = TrainingRecipe(
        lr=np.float64(0.1), weight_decay=1, betas=(0, np.float64(0.9)), agc=None, mixing=Mixing(cutmix=1),
        augmentation=Augmentation(flip=1, scale=(np.float64(0.5), 1)), distillation=Distillation(logits=1),
    )  # fmt: skip
    settings = (recipe, recipe.mixing, recipe.augmentation, recipe.distillation)
    assert recipe.mixing is not None
    assert recipe.distillation is not None
    numbers = [recipe.lr, recipe.weight_decay, *recipe.betas, recipe.mixing.cutmix, recipe.augmentation.flip,
               *recipe.augmentation.scale, recipe.distillation.logits]  # fmt: skip
    assert {type(number) for number in numbers} == {float}
    assert recipe.agc is None
    assert all(type(value) is not np.float64 for one in settings for value in vars(one).values())


def test_unknown_fields_of_a_file_are_named() -> None:
    with pytest.raises(InvalidTypeError, match="TrainingRecipe: got list, expected a mapping"):
        TrainingRecipe.from_dict([1])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="did you mean 'schedule'"):
        TrainingRecipe.from_dict({"shedule": "cosine"})
    with pytest.raises(InvalidArgumentError, match=r"TrainingRecipe\.augmentation: got field 'sizes'"):
        TrainingRecipe.from_dict({"augmentation": {"sizes": 3}})


def test_from_scratch_is_b_cos_v2s_imagenet_training() -> None:
    """Its loss, and its rate at some epochs: linear from a hundredth over 5 epochs, then half a cosine over 85."""
    recipe = TrainingRecipe.bcos()
    assert (recipe.loss, recipe.optimizer, recipe.agc, recipe.epochs, recipe.batch_size, recipe.weight_decay) == (
        "uniform_off_bce", "adam", 0.01, 90, 256, 0.0,
    )  # fmt: skip
    schedule = Schedule(recipe, 10)
    by_epoch = [[schedule.lr(10 * epoch + i) for i in range(10)] for epoch in range(90)]
    assert all(len(set(rates)) == 1 for rates in by_epoch)
    rates = [one[0] for one in by_epoch]
    assert rates[:6] == pytest.approx([1e-5, 2.08e-4, 4.06e-4, 6.04e-4, 8.02e-4, 1e-3])
    assert rates[5 + 17] == pytest.approx(1e-3 * (1 + math.cos(math.pi / 5)) / 2)

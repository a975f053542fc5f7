"""What changes while a network trains, each as a function of the step alone: resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bcos_rt.training.recipe import TrainingRecipe

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate, B and bias scale by step.

    Attributes:
        recipe: the training recipe.
        steps_per_epoch: optimiser steps.
    """

    recipe: TrainingRecipe
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., at a peak of ``recipe.lr``.

        Cosine: ``min + (lr - min) (1 + cos(pi t / T)) / 2`` over the T steps (epochs, without ``step_schedule``) that
        the warm-up leaves.
        """
        recipe = self.recipe
        unit = 1 if recipe.step_schedule else self.steps_per_epoch
        now = step // unit
        warm = self._warm(unit)
        if now < warm:
            start = recipe.warmup_factor
            return recipe.lr * (start + (1 - start) * now / warm if recipe.warmup == "linear" else start)
        if recipe.schedule == "constant":
            return recipe.lr
        total = recipe.epochs * self.steps_per_epoch / unit - warm
        share = (now - warm) / total if total > 0 else 0.0
        if recipe.schedule == "cosine_restarts":
            share = _share_of_period(
                (now - warm) * unit / self.steps_per_epoch, recipe.restart_epochs, recipe.restart_factor
            )
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def b(self, step: int, target: float) -> float:
        """B of a layer whose own is ``target``: from ``b_start`` linearly to ``target`` over ``b_epochs``."""
        if self.recipe.b_start is None:
            return target
        return self.recipe.b_start + (target - self.recipe.b_start) * self._progress(step, self.recipe.b_epochs)

    def bias_scale(self, step: int) -> float:
        """What biases are multiplied with, relative to their undecayed value: 1 falling linearly to 0."""
        if self.recipe.bias_decay_epochs is None:
            return 1.0
        return 1.0 - self._progress(step, self.recipe.bias_decay_epochs)

    def unfinished(self) -> list[str]:
        """What the run is too short for, in words: it ends within its warm-up, its B's rise or its biases' fall."""
        recipe = self.recipe
        unit = 1 if recipe.step_schedule else self.steps_per_epoch
        # B and biases are those after the last step, the learning rate is that of it.
        warms = (recipe.epochs * self.steps_per_epoch - 1) // unit < self._warm(unit)
        warm, decay = self._warm(self.steps_per_epoch), recipe.bias_decay_epochs or 0.0
        reached = {
            "the learning rate never reaches lr": ("warm-up", warm, warms),
            "B does not reach the network's own": ("b_epochs", recipe.b_epochs, recipe.b_epochs > recipe.epochs),
            "biases do not reach 0": ("bias_decay_epochs", decay, decay > recipe.epochs),
        }
        return [
            f"{consequence}: {length:g} epochs of {name}, in a run of {recipe.epochs}"
            for consequence, (name, length, short) in reached.items()
            if short
        ]

    def _warm(self, unit: int) -> float:
        """The warm-up's length in units of so many steps."""
        return (self.recipe.warmup_steps or self.recipe.warmup_epochs * self.steps_per_epoch) / unit

    def _progress(self, step: int, epochs: float) -> float:
        length = epochs * self.steps_per_epoch
        return 1.0 if step >= length else step / length


def _share_of_period(epoch: float, first: float, factor: float) -> float:
    length = first
    # Fractions of epochs have rounding errors; a period's first step is not the last of the one before.
    while epoch >= length * (1 - 1e-9):
        epoch = max(epoch - length, 0.0)
        length *= factor
    return epoch / length

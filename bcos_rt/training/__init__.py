"""Training: :func:`finetune`, its recipe, losses and schedules."""

from bcos_rt.training.recipe import Distillation, TrainingRecipe
from bcos_rt.training.trainer import TrainingResult, finetune

__all__ = ["Distillation", "TrainingRecipe", "TrainingResult", "finetune"]

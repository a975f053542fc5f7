"""Every training run of the experiment: which network, how converted, how trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bcos_rt.conversion import Recipe
from bcos_rt.data import Augmentation
from bcos_rt.models import published_recipe
from bcos_rt.training import TrainingRecipe

__all__ = ["EPOCHS", "STUDY_EPOCHS", "Run", "runs"]

EPOCHS = 12
STUDY_EPOCHS = 3
BATCH = 128
_COMMON: dict[str, Any] = {
    "epochs": EPOCHS, "batch_size": BATCH, "augmentation": Augmentation.cifar(), "log_every": 50,
}  # fmt: skip
# One recipe a kind, chosen before the runs that count and the same for all networks and seeds.
STANDARD = TrainingRecipe.standard(**_COMMON, weight_decay=5e-4, warmup_epochs=1.0)
# Transformers are not trained by SGD (arXiv 2205.01580).
STANDARD_VIT = STANDARD.replace(optimizer="adamw", lr=1e-3, weight_decay=0.05)
# As B-cos v2 on CIFAR-10, not on ImageNet: plain BCE, no warm-up, no clipping.
SCRATCH = TrainingRecipe.bcos(**_COMMON, lr=1e-3, loss="bce", agc=None, warmup_epochs=0.0, step_schedule=True)
COSIFIED = TrainingRecipe.bcosify(**_COMMON, lr=1e-3, loss="bce", agc=None)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        network: a name of :data:`bcos_rt.models.small.SMALL_NETWORKS`.
        kind: ``"standard"``, the conventional network; ``"bcos"``, the B-cos network from random weights, as B-cos v2
            makes it (filters of norm 1, no activations); ``"bcosified"``, the B-cos network from the standard run's
            weights.
        seed: of weights, order and augmentation.
        recipe: how it is trained.
        conversion: how it is made a B-cos network.
        variant: name of a study's design choice, "" outside the study.
    """

    network: str
    kind: str
    seed: int
    recipe: TrainingRecipe
    conversion: Recipe = field(default_factory=Recipe)
    variant: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join([self.network, self.kind, *([self.variant] if self.variant else []), f"seed{self.seed}"])

    @property
    def source(self) -> str | None:
        """Name of the run whose weights it begins with."""
        return f"{self.network}-standard-seed{self.seed}" if self.kind == "bcosified" else None


# Each changes one choice of the method (arXiv 2411.00715, section 3) and leaves the others as published.
STUDY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({}, {}),
    "biases": ({"biases": "keep"}, {}),
    "biases_decayed": ({"biases": "keep"}, {"bias_decay_epochs": STUDY_EPOCHS / 2}),
    "b1": ({"b": 1.0}, {}),
    "b1.5": ({"b": 1.5}, {}),
    "b_scheduled": ({}, {"b_start": 1.0, "b_epochs": STUDY_EPOCHS / 2}),
    "b_learned": ({"b": 1.5}, {"learn_b": True, "b_lr": 0.05}),
    "no_activation": ({"activations": "identity"}, {}),
    "batch_norm_kept": ({"batch_norm": "keep"}, {}),
    "batch_norm_kept_biases": ({"batch_norm": "keep", "biases": "keep"}, {}),
    "norm_folded": ({"batch_norm": "uncentered_folded", "biases": "keep"}, {}),
    "unit_weights": ({"weight_norm": "unit"}, {}),
    "head_after_pool": ({"head": "after_pool"}, {}),
    "three_channels": ({"input_encoding": "three_channel"}, {}),
    # As B-cos v2: its halves add up to 1. Normalised, one is the negative of the other.
    "plain_input": ({"input_normalization": "none"}, {}),
    "no_logit_bias": ({"logit_bias": None}, {}),
}
# Of a ResNet-20 with the max-pool behind its stem that ImageNet's ResNets have.
POOL_STUDY: dict[str, dict[str, Any]] = {"stem_pool_average": {}, "stem_pool_keep": {"stem_pool": "keep"}}


def runs() -> list[Run]:
    """All runs, in the order in which they are done; a run comes after the one whose weights it needs."""
    made: list[Run] = []
    for network, seeds in (("resnet20", (0, 1)), ("densenet28", (0,)), ("vit6", (0,)), ("vitc5", (0,))):
        vit = network.startswith("vit")
        scratch = published_recipe("bcos_v2", f"small:{network}")
        for seed in seeds:
            made += [
                Run(network, "standard", seed, (STANDARD_VIT if vit else STANDARD).replace(seed=seed)),
                Run(network, "bcosified", seed, COSIFIED.replace(seed=seed)),
                Run(network, "bcos", seed, SCRATCH.replace(seed=seed), scratch),
            ]
    short = COSIFIED.replace(epochs=STUDY_EPOCHS)
    study = [
        Run("resnet20", "bcosified", 0, short.replace(**training), Recipe(**conversion), variant)
        for variant, (conversion, training) in STUDY.items()
    ]
    pool = [Run("resnet20_pool", "standard", 0, STANDARD.replace(seed=0))] + [
        Run("resnet20_pool", "bcosified", 0, short, Recipe(**conversion), variant)
        for variant, conversion in POOL_STUDY.items()
    ]
    # The study after the ResNet's seeds, before the slower networks.
    return made[:6] + study + pool + made[6:]

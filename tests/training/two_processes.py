"""What one process of several does in :mod:`tests.training.test_processes`; it writes what it found as JSON."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from bcos_rt import finetune
from bcos_rt.data import Augmentation
from bcos_rt.errors import TrainingError
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.training import Distillation, TrainingRecipe, trainer
from tests.training.worker import colours, convnet

PLAIN = TrainingRecipe(
    epochs=2, batch_size=16, lr=5e-3, loss="cross_entropy", agc=None, augmentation=Augmentation.none(), log_every=50
)


def tower(seed: int) -> ConventionalNetwork:
    torch.manual_seed(seed)
    return ConventionalNetwork(nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten()))


def siglip() -> dict[str, float]:
    """Learned scale and bias after training. Pairs are a process's own, so their gradients differ."""
    kept: list[nn.Module] = []

    class Kept(trainer.Teaching):
        def __init__(self, *arguments: nn.Module) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            kept.append(self)

    original, trainer.Teaching = trainer.Teaching, Kept  # type: ignore[misc]
    try:
        recipe = PLAIN.replace(
            loss="none", select="cosine", optimizer="sgd", lr=0.05, distillation=Distillation(logits=0.0, siglip=1.0)
        )
        net = tower(0)
        finetune(net, (colours(64)[0], None), recipe, teacher=tower(1), accelerator="cpu")
    finally:
        trainer.Teaching = original  # type: ignore[misc]
    loss = kept[0].siglip
    assert isinstance(loss, nn.Module)
    weights = sum(float(p.detach().double().sum()) for p in net.parameters())
    return {"scale": float(loss.scale), "bias": float(loss.bias), "weights": weights}  # type: ignore[arg-type]


def few_to_validate() -> list[dict[str, float]]:
    """One image: the second process has none. The network has buffers, and six classes."""
    source = convnet()
    source[-1] = nn.Linear(12, 6)
    images, labels = colours(1, seed=1)
    result = finetune(
        ConventionalNetwork(source), colours(32), PLAIN.replace(ema=0.5), validation=(images, labels), accelerator="cpu"
    )
    return [{k: v for k, v in row.items() if k.startswith(("val", "ema"))} for row in result.history]


def bad_in_one_process(rank: int) -> str:
    """Infinite in the second process alone, from the second step on; numbers are read at the end of an epoch."""

    class Later(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return x / 0 if rank == 1 and self.calls >= 2 else x

    source = convnet()
    source.insert(3, Later())
    try:
        finetune(ConventionalNetwork(source), colours(64), PLAIN, accelerator="cpu")
    except TrainingError as error:
        return str(error)
    return "nothing"


def main() -> None:
    import os

    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    found = {
        "siglip": siglip(), "few": few_to_validate(), "bad": bad_in_one_process(rank),
        "world": torch.distributed.get_world_size(),
    }  # fmt: skip
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

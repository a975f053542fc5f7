"""The data and networks of the trainer's tests, and a run in a process of its own (killed, or one of several)."""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify, finetune
from bcos_rt.data import Augmentation
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.training import TrainingRecipe

__all__ = ["colours", "convnet", "network"]


def colours(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images, uint8 [N, 3, 16, 16], in which one of three channels is brighter: the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randint(0, 160, (count, 3, 16, 16), generator=generator)
    images[torch.arange(count), labels] += 60
    return images.to(torch.uint8), labels


def convnet() -> nn.Sequential:
    """A conventional network small enough to train in a test."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def network(b: float = 2.0) -> BcosNetwork:
    """The B-cos network of :func:`convnet`."""
    return bcosify(convnet(), Recipe(b=b, mean=(0, 0, 0), std=(1, 1, 1)))[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--slow", type=float, default=0.0, help="Seconds to wait after the second epoch's row.")
    parser.add_argument("--sync", action="store_true")
    chosen = parser.parse_args()
    recipe = TrainingRecipe(
        epochs=4, batch_size=16, lr=5e-3, loss="bce", log_every=1, sync_norms=chosen.sync,
        augmentation=Augmentation(size=16, crop="padded", padding=2, flip=0.5),
    )  # fmt: skip

    class Slow(torch.utils.data.Dataset[tuple[Tensor, int]]):
        """Waits at the start of the third epoch, for the test that kills this process there."""

        def __init__(self) -> None:
            self.images, self.labels = colours(48)
            self.read = 0

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.read += 1
            if chosen.slow and self.read > 2 * 48 + 20:
                time.sleep(chosen.slow)
            return self.images[index].float() / 255, int(self.labels[index])

    finetune(
        network(), Slow(), recipe, validation=colours(24, seed=1), output=chosen.output, resume=True, accelerator="cpu"
    )


if __name__ == "__main__":
    main()

"""What one process of several does in :mod:`tests.training.test_processes`; it writes what it found as JSON."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify, finetune
from bcos_rt.data import Augmentation
from bcos_rt.errors import TrainingError, TrainingInterruptedError
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.training import Distillation, TrainingRecipe, TrainingResult, launch, trainer
from bcos_rt.training.sharded import local
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


def bad_in_one_process(rank: int, strategy: str) -> tuple[str, list[float]]:
    """Infinite in the second process alone, from the second step on; numbers are read at the end of an epoch.

    What was said, and the network: as after the first step.
    """

    class Later(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return x / 0 if rank == 1 and self.calls >= 2 else x

    source = convnet()
    source.insert(3, Later())
    net, said = ConventionalNetwork(source), "nothing"
    try:
        finetune(net, colours(64), PLAIN, accelerator="cpu", strategy=strategy)
    except TrainingError as error:
        said = str(error)
    return said, [float(p.detach().double().sum()) for p in net.parameters()]


class Centred(nn.Module):
    """A running mean that is not saved, used in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            return x
        return x - self.mean[:, None, None]


def taught(strategy: str) -> dict[str, list[float]]:
    """Distilled from features alone, behind which there is another layer; channels last, with running statistics."""

    def net(seed: int) -> ConventionalNetwork:
        torch.manual_seed(seed)
        layers = (
            nn.Conv2d(3, 6, 3, 2),
            nn.BatchNorm2d(6),
            Centred(),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, 2),
            nn.Conv2d(4, 4, 1),
        )
        made = ConventionalNetwork(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        return made.to(memory_format=torch.channels_last)

    recipe = PLAIN.replace(
        loss="none", ema=0.7, distillation=Distillation(logits=0.0, features=1.0, modules=("4",)), channels_last=True
    )
    result = finetune(
        net(0),
        colours(64),
        recipe,
        teacher=net(1),
        validation=colours(21, seed=1),
        accelerator="cpu",
        strategy=strategy,
    )
    assert result.averaged is not None
    nets = [result.net, result.averaged]
    return {
        "weights": [float(p.detach().double().sum()) for one in nets for p in one.parameters()],
        "buffers": [float(b.double().sum()) for one in nets for b in one.buffers()],
        "losses": [float(row["train_loss"]) for row in result.history],
        "agreement": [float(row["val_top1"]) for row in result.history],
    }


# What looks at weights, gradients or optimiser states: clipping by filter, decay, averages, a learned B (a scalar,
# without rows), biases that fade.
SHARDED = TrainingRecipe(
    epochs=2, batch_size=16, lr=5e-3, loss="bce", optimizer="adamw", weight_decay=0.05, agc=0.05, ema=0.8,
    learn_b=True, b_lr=0.5, bias_decay_epochs=1.5, accumulate=2, sync_norms=True,
    augmentation=Augmentation.none(), log_every=1,
)  # fmt: skip


def biased() -> BcosNetwork:
    """A B-cos network with biases and filters that do not divide by two; in every process another."""
    torch.manual_seed(5 + int(os.environ["SLURM_PROCID"]))
    source = nn.Sequential(
        nn.Conv2d(3, 7, 3, 2, 1), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    return bcosify(source, Recipe(b=1.5, biases="keep", mean=(0, 0, 0), std=(1, 1, 1)))[0]


def run(folder: Path, **arguments: Any) -> TrainingResult:
    """A run of :data:`SHARDED`."""
    images = colours(1)[0].float() / 255
    return finetune(
        biased(), colours(64), SHARDED, validation=colours(20, seed=1), output=folder, accelerator="cpu",
        explain_images=images, **arguments,
    )  # fmt: skip


def numbers_of(net: nn.Module | None) -> list[float]:
    """Sums of a network's tensors."""
    assert net is not None
    return [float(value.double().sum()) for value in net.state_dict().values()]


def sharded(folder: Path) -> dict[str, Any]:
    """What a process holds in a run with shards, of how much, and what it returns."""
    held: list[tuple[int, int]] = []

    def share_out(net: nn.Module, device: torch.device) -> nn.Module:
        net = original(net, device)
        held.append((sum(local(p).numel() for p in net.parameters()), sum(p.numel() for p in net.parameters())))
        return net

    original = trainer.share_out
    trainer.share_out = launch.share_out = share_out
    try:
        result = run(folder, strategy="fsdp")
    finally:
        trainer.share_out = launch.share_out = original
    return {"held": held, "net": numbers_of(result.net), "averaged": numbers_of(result.averaged)}


def clipped(strategy: str) -> list[float]:
    """Clipped as a whole in every step; Adam would not see by how much. As on a GPU, where ``strategy`` says so."""
    before, trainer.FUSED_DEVICES = trainer.FUSED_DEVICES, ("cpu",) if "fused" in strategy else ()
    recipe = PLAIN.replace(loss="bce", optimizer="sgd", lr=0.1, clip_norm=0.02, ema=0.9, sync_norms=True)
    try:
        result = finetune(biased(), colours(64), recipe, accelerator="cpu", strategy=strategy.split()[0])
    finally:
        trainer.FUSED_DEVICES = before
    return numbers_of(result.net) + numbers_of(result.averaged)


def sharded_and_stopped(folder: Path) -> bool:
    """Whether a run of :data:`SHARDED` stops, with shards, that is told to at the end of its first epoch."""
    try:
        run(folder, strategy="fsdp", on_epoch=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    except TrainingInterruptedError:
        return True
    return False


def main() -> None:
    rank = int(os.environ["SLURM_PROCID"])
    folder = Path(sys.argv[1])
    found = {
        "siglip": siglip(), "few": few_to_validate(), "world": torch.distributed.get_world_size(),
        "bad": {strategy: bad_in_one_process(rank, strategy) for strategy in ("ddp", "fsdp")},
        "clipped": {strategy: clipped(strategy) for strategy in ("ddp", "fsdp", "fsdp fused")},
        "taught": {strategy: taught(strategy) for strategy in ("ddp", "fsdp")},
        "sharded": sharded(folder / "fsdp"), "stopped": sharded_and_stopped(folder / "resumed"),
    }  # fmt: skip
    run(folder / "ddp", strategy="ddp")
    if rank == 0:
        shutil.copytree(folder / "resumed", folder / "with_ddp")
    torch.distributed.barrier()
    run(folder / "resumed", strategy="fsdp", resume=True)
    run(folder / "with_ddp", strategy="ddp", resume=True)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

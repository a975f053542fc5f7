"""Grid pointing of one trained network: its own explanation, or post-hoc methods on the conventional one."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from bcos_rt.evaluation import grid_pointing_game, unsupported_methods
from bcos_rt.evaluation.grid_pointing import Variant
from bench.cifar10.plan import Run

__all__ = ["COSTLY", "is_localised", "localise_run", "methods_for"]

SIDE = 3
# A transformer's grid is seen in 25 windows.
GRIDS, GRIDS_VIT = 250, 100
# Of the costly game, and of a transformer's on whole grids.
FEWER, FEWER_COSTLY_VIT = 5, 10
# The study asks only how good the network's own explanation is.
METHODS = {
    "standard": ("gradient", "input_x_gradient", "guided_backprop", "deep_lift", "grad_cam", "random"),
    "bcos": ("bcos", "input_x_gradient", "grad_cam"),
    "bcosified": ("bcos", "input_x_gradient", "grad_cam"),
}
# Of the conventional network too, hundreds of passes a cell: on fewer grids, in a file of their own.
COSTLY = ("integrated_gradients", "occlusion")


def _is_vit(run: Run) -> bool:
    return run.network.startswith("vit")


def methods_for(run: Run, net: nn.Module, side: int) -> list[str]:
    """The methods to play with, without those that refuse the network (Grad-CAM of transformers)."""
    if run.variant:
        return ["bcos"]
    # DeepLIFT's rules do not cover attention: its contributions do not add up there.
    wanted = [m for m in METHODS[run.kind] if not (m == "deep_lift" and _is_vit(run))]
    seen = side if _is_vit(run) else SIDE * side
    refused = unsupported_methods(net, wanted, torch.zeros(1, 3, seen, seen))
    return [method for method in wanted if method not in refused]


def _second(run: Run, target: Path) -> Path | None:
    """Where a run's other game lies: costly methods on a conventional network, a transformer's own on whole grids."""
    name = "costly" if run.kind == "standard" else "whole" if _is_vit(run) else None
    return None if name is None else target.with_stem(f"{target.stem}_{name}")


def is_localised(run: Run, target: Path) -> bool:
    """Whether there is nothing left to play."""
    other = _second(run, target)
    return target.exists() and (other is None or other.exists())


def localise_run(
    run: Run, net: nn.Module, images: tuple[Tensor, Tensor], target: Path, grids: int | None = None
) -> None:
    """Play 3 x 3 grids with the test images and write ``target`` and its picture.

    A transformer sees the grid as in B-cosification's code, in windows of an image's size: on the whole grid it has
    nine times the tokens that its attention was trained with. How its own explanation does there lies beside it
    (``_whole``).
    """
    side = images[0].shape[-1]
    vit, costly = _is_vit(run), run.kind == "standard"
    if grids is None:
        grids = GRIDS_VIT if vit else GRIDS
    fewer = -(-grids // (FEWER_COSTLY_VIT if vit and costly else FEWER))
    # Methods, grids, file, variant.
    usual: Variant = "strided_padded" if vit else "full"
    games: list[tuple[list[str], int, Path, Variant]] = [(methods_for(run, net, side), grids, target, usual)]
    if (other := _second(run, target)) is not None:
        games.append((list(COSTLY), fewer, other, usual) if costly else (["bcos"], fewer, other, "full"))
    with Progress(transient=True) as bar:
        task = bar.add_task(run.name)
        for methods, count, path, variant in games:
            if path.exists():
                continue
            result = grid_pointing_game(
                {run.name: net}, methods, images, n=SIDE, grids=count, variant=variant,
                tell=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
            )  # fmt: skip
            # The example shows images of the data set, which are not this project's to publish.
            result.save(path.parent, path.stem, example=False)

"""Grid pointing of one trained network: its own explanation, or post-hoc methods on the conventional one."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress
from torch import Tensor, nn

from bcos_rt.evaluation import grid_pointing_game
from bench.cifar10.plan import Run

__all__ = ["localise_run"]

# The study asks only how good the network's own explanation is.
METHODS = {
    "standard": (
        "input_x_gradient", "integrated_gradients", "guided_backprop", "deep_lift", "grad_cam", "occlusion", "random",
    ),
    "bcos": ("bcos", "input_x_gradient", "grad_cam"),
    "bcosified": ("bcos", "input_x_gradient", "grad_cam"),
}  # fmt: skip


def localise_run(run: Run, net: nn.Module, images: tuple[Tensor, Tensor], target: Path, grids: int) -> None:
    """Play 3 x 3 grids with the test images and write ``target`` and its picture."""
    methods = ("bcos",) if run.variant else METHODS[run.kind]
    with Progress(transient=True) as bar:
        task = bar.add_task(run.name)
        result = grid_pointing_game(
            {run.name: net}, methods, images, n=3, grids=grids,
            tell=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
        )  # fmt: skip
    result.save(target.parent, target.stem)

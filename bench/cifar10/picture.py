"""One row of the table as a picture: learning curves, and where explanations point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bcos_rt.evaluation.saving import save_figure
from bcos_rt.files import read_rows
from bench.cifar10.table import epoch_of_passing

__all__ = ["draw"]

NAMES = {"standard": "conventional", "bcos": "B-cos, from scratch", "bcosified": "B-cosified"}
# What the results pages call the methods of `bcos-rt localise`.
METHODS = {
    "bcos": "its own", "grad_cam": "Grad- CAM", "deep_lift": "Deep LIFT", "guided_backprop": "guided back- prop.",
    "integrated_gradients": "int. gradi- ents",
}  # fmt: skip
COLOURS = {"standard": "0.5", "bcos": "tab:orange", "bcosified": "tab:blue"}


def draw(network: str, seed: int, logs: Path, target: Path) -> None:
    """Write the picture of a network's three runs, those of them that have logs."""
    folders = {kind: logs / f"{network}-{kind}-seed{seed}" for kind in NAMES}
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    curves, boxes = figure.subplots(1, 2, width_ratios=(1, 1.9))
    _curves(curves, folders)
    _boxes(boxes, folders)
    figure.suptitle(f"{network}, CIFAR-10, seed {seed}", fontsize=11)
    save_figure(figure, target)


def _curves(axes: Axes, folders: dict[str, Path]) -> None:
    rows = {kind: read_rows(folder / "metrics.csv") for kind, folder in folders.items()}
    for kind, history in rows.items():
        axes.plot([int(row["epoch"]) for row in history], [100 * float(row["val_top1"]) for row in history],
                  color=COLOURS[kind], label=NAMES[kind], marker=".")  # fmt: skip
    if rows["bcos"] and rows["bcosified"]:
        final = float(rows["bcos"][-1]["val_top1"])
        axes.axhline(100 * final, color=COLOURS["bcos"], linestyle="--", linewidth=0.8)
        if (passed := epoch_of_passing(rows["bcosified"], final)) is not None:
            axes.axvline(passed, color=COLOURS["bcosified"], linestyle="--", linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=9)


def _boxes(axes: Axes, folders: dict[str, Path]) -> None:
    """Quartiles, whiskers at 5 and 95 %, the best method of each network first; the dashed line is chance."""
    shares: list[np.ndarray] = []
    labels: list[str] = []
    colours: list[str] = []
    for kind in ("bcosified", "bcos", "standard"):
        found: dict[str, np.ndarray] = {}
        for path in (folders[kind] / name for name in ("localisation.npz", "localisation_costly.npz")):
            if path.exists():
                with np.load(path) as arrays:
                    found |= {key.rpartition("/")[2]: values for key, values in arrays.items()}
        for method, values in sorted(found.items(), key=lambda item: -item[1].mean()):
            shares.append(values)
            labels.append(METHODS.get(method, method.replace("_", " ")).replace(" ", "\n"))
            colours.append(COLOURS[kind])
    if shares:
        drawn = axes.boxplot(
            shares, whis=(5, 95), showfliers=False, widths=0.6, patch_artist=True, medianprops={"color": "black"}
        )
        for box, colour in zip(drawn["boxes"], colours, strict=True):
            box.set(facecolor=colour, alpha=0.5)
        axes.set_xticks(range(1, len(labels) + 1), labels, fontsize=8)
        of = [
            Patch(facecolor=c, alpha=0.5, edgecolor="black", label=NAMES[k]) for k, c in COLOURS.items() if c in colours
        ]
        axes.legend(handles=of, title="maps of", fontsize=9, title_fontsize=9, loc="upper right")
    axes.axhline(1 / 9, color="grey", linestyle="--", linewidth=0.8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("positive contributions in the right cell of 3 x 3")

"""What the networks made from 500 photographs point at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from bcos_rt import BcosNetwork, explain
from bcos_rt.evaluation import method
from bcos_rt.evaluation.saving import save_figure

__all__ = ["draw", "draw_explained"]

# Of the maps, as the grid pointing game smooths them at 224 pixels.
_SMOOTHED = 15


def _smoothed(maps: Tensor) -> np.ndarray:
    pooled: np.ndarray = F.avg_pool2d(maps[:, None].float(), _SMOOTHED, 1, _SMOOTHED // 2)[:, 0].numpy()
    return pooled


def draw(
    columns: Mapping[str, tuple[nn.Module, str]], images: Tensor, classes: Tensor, names: Sequence[str], target: Path
) -> None:
    """Write a row of maps for each image, without it: a column is a network and a method that explains its class.

    Args:
        columns: by title.
        images: [N, 3, H, W] in [0, 1].
        classes: [N], the classes explained; ``names`` are theirs.
    """
    figure = Figure(figsize=(2.1 * len(columns) + 1, 2.1 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (title, (net, name)) in enumerate(columns.items()):
        maps = _smoothed(method(name)(net, images, classes))
        with torch.no_grad():
            found = net(images).softmax(1)
        for row, (values, probabilities) in enumerate(zip(maps, found, strict=True)):
            place, wanted = axes[row][column], int(classes[row])
            limit = float(np.abs(values).max()) or 1.0
            place.imshow(values, cmap="seismic", vmin=-limit, vmax=limit)
            place.set_xticks([])
            place.set_yticks([])
            rank = int((probabilities > probabilities[wanted]).sum()) + 1
            if rank > 1:
                place.set_xlabel(f"rank {rank}", fontsize=8)
            if column == 0:
                place.set_ylabel(names[row], fontsize=8)
            if row == 0:
                place.set_title(title, fontsize=9)
    save_figure(figure, target)


def draw_explained(net: BcosNetwork, images: Tensor, target: Path) -> None:
    """Write a column for each image [N, 3, H, W]: it, the explanation of its prediction, and the contribution map."""
    explanation = explain(net, images)
    probabilities = explanation.logits.softmax(1).amax(1)
    maps = _smoothed(explanation.contributions)
    figure = Figure(figsize=(2.4 * len(images), 7.4), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for column, (image, picture, values) in enumerate(zip(images, explanation.picture(), maps, strict=True)):
        photograph, colours, contributions = axes[:, column]
        photograph.imshow(image.permute(1, 2, 0).numpy())
        name = explanation.class_name(int(explanation.target[column]))
        photograph.set_title(f"predicted: {name} ({float(probabilities[column]):.0%})", fontsize=9)
        colours.imshow(picture.numpy())
        limit = float(np.abs(values).max()) or 1.0
        contributions.imshow(values, cmap="bwr", vmin=-limit, vmax=limit)
    for row, label in enumerate(("photograph", "explanation", "contributions")):
        axes[row, 0].set_ylabel(label, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    save_figure(figure, target)

"""The grid pointing game: does an explanation of a class point at the image of that class?

Images of n x n distinct classes, each classified right and with confidence by itself, are put together to one image. An
explanation of each class should then lie in its cell. Measured is the share of its positive part that does (CoDA Nets,
Böhle et al. 2021, arXiv 2104.00032, section 4.2; B-cos networks, arXiv 2205.10268 and 2306.10898). What decides a
number is as in the published code of B-cos v2, see :func:`choose_images` and :func:`grids_of`, and the variants of
:func:`grid_pointing_game` for where it is not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from bcos_rt.data import ImageData, loader, open_data, shard
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, did_you_mean
from bcos_rt.evaluation.attribution import Method, methods_of
from bcos_rt.evaluation.checks import check_count, checked_maps, example_tensor, is_number, logits_of
from bcos_rt.evaluation.saving import save_results
from bcos_rt.figures import folded, without_math
from bcos_rt.graph.capture import eval_mode
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.network import BcosNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "GridPointing",
    "check_variant",
    "choose_images",
    "confident_for_all",
    "confident_images",
    "grid_pointing_game",
    "grids_of",
    "share_in_cells",
    "smoothing_for",
    "tiled",
]

Variant = Literal["full", "rescaled", "strided", "strided_padded"]
VARIANTS = ("full", "rescaled", "strided", "strided_padded")
# The published window is 15 pixels where a cell has 224.
SMOOTH, SMOOTH_AT = 15, 224


@dataclass(frozen=True)
class GridPointing:
    """Results of :func:`grid_pointing_game`.

    Attributes:
        shares: (network, method) -> share inside the right cell of every explanation, [grids * n * n] in [0, 1].
        n: cells on a side.
        variant, smooth: as measured.
        judges: network -> the networks that classify all images of its grids right and with confidence.
        example: one grid image [3, nS, nS] and the first class's map of each (network, method), for a picture.
        empty: (network, method) -> how many of the maps have no positive part, as where it is smaller than the
            network's numbers can be. They count as 0.
    """

    shares: dict[tuple[str, str], np.ndarray]
    n: int
    variant: str
    smooth: int
    example: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    judges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    empty: dict[tuple[str, str], int] = field(default_factory=dict)

    def summary(self) -> list[dict[str, Any]]:
        """A row a network and method: mean and quartiles of the shares."""
        rows = []
        for (network, name), values in self.shares.items():
            judges = self.judges.get(network, (network,))
            low, middle, high = np.percentile(values, [25, 50, 75])
            rows.append({
                "network": network, "method": name, "n": self.n, "variant": self.variant, "smooth": self.smooth,
                "grids": len(values) // self.n**2, "mean": float(values.mean()), "q25": float(low),
                "median": float(middle), "q75": float(high), "empty": self.empty.get((network, name), 0),
                "images_of": " + ".join(judges),
            })  # fmt: skip
        return rows

    def save(self, folder: str | os.PathLike[str], name: str = "localisation", example: bool = True) -> Path:
        """Write ``NAME.csv`` (the summary), ``NAME.npz`` (all shares), ``NAME.png`` and ``NAME_example.png``.

        Args:
            example: whether the last is written, which shows images of the data.
        """
        folder = Path(folder)
        arrays = {f"{network}/{method}": values for (network, method), values in self.shares.items()}
        figures = {"": self.plot(), **({"_example": self.plot_example()} if example else {})}
        save_results(folder, name, self.summary(), arrays, figures)
        return folder

    def plot(self) -> Figure:
        """A box plot as in the paper: quartiles, whiskers at 5 and 95 %, the dashed line is chance, 1 / n^2."""
        from matplotlib.figure import Figure

        networks = list(dict.fromkeys(network for network, _ in self.shares))
        counts = [sum(1 for a, _ in self.shares if a == network) for network in networks]
        # A title of ten letters a line takes an inch.
        widths = [max(2, count) for count in counts]
        figure = Figure(figsize=(1.5 + 0.95 * sum(widths), 4.2), layout="constrained")
        axes = figure.subplots(1, len(networks), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axis, network, width in zip(axes, networks, widths, strict=True):
            chosen = {name: values for (a, name), values in self.shares.items() if a == network}
            axis.boxplot(list(chosen.values()), whis=(5, 95), showfliers=False, showmeans=True, widths=0.6)
            axis.set_xticks(range(1, len(chosen) + 1), [n.replace("_", "\n") for n in chosen], fontsize=8)
            axis.axhline(1 / self.n**2, color="grey", linestyle="--", linewidth=0.8)
            axis.set_title(folded(network, 10 * width), fontsize=10)
            axis.set_ylim(0, 1.02)
        axes[0].set_ylabel(f"share inside the right cell, {self.n} x {self.n}")
        return without_math(figure)

    def plot_example(self) -> Figure:
        """A grid of each network's, and every method's map of the class in the first cell."""
        from matplotlib.figure import Figure

        columns = len(self.example) + len({network for network, _ in self.example})
        figure = Figure(figsize=(3 * columns, 3.2), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        free = iter(axes)
        shown: set[str] = set()
        for (network, name), (image, values) in self.example.items():
            # Networks may have grids of their own: a map stands beside the grid it explains.
            if network not in shown:
                shown.add(network)
                axis = next(free)
                axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
                axis.set_title(folded(f"a grid of {network}", 36), fontsize=9)
            axis = next(free)
            limit = float(np.percentile(values.abs().numpy(), 99.5)) or 1.0
            axis.imshow(values.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
            axis.set_title(folded(f"{network}: {name}\nof the top left class", 36), fontsize=9)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
        return without_math(figure)


def smoothing_for(cell: int) -> int:
    """The odd window that is to a cell of this side what 15 pixels are to 224."""
    return 2 * round((SMOOTH * cell / SMOOTH_AT - 1) / 2) + 1


@torch.no_grad()
def confident_images(
    net: nn.Module, data: Dataset[tuple[Tensor, int]], *, batch_size: int = 64, workers: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> dict[int, list[tuple[int, float]]]:  # fmt: skip
    """The images that a network classifies right: class -> (index, logit of the class), the surest first."""
    like = example_tensor(net)
    found: list[tuple[int, int, float]] = []
    batches = shard(len(data), batch_size)  # type: ignore[arg-type]
    classes = 0
    for batch, (images, labels) in zip(batches, loader(data, batches, workers), strict=True):
        logits = logits_of(net, images.to(like.device, like.dtype), batch[0])
        classes = logits.shape[1]
        top = logits.max(1)
        for index, label, predicted, logit in zip(
            batch, labels.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        ):
            if label == predicted:
                found.append((label, index, logit))
        if tell is not None:
            tell(batch[-1] + 1, len(data))  # type: ignore[arg-type]
    by_class: dict[int, list[tuple[int, float]]] = {k: [] for k in range(classes)}
    for label, index, logit in found:
        by_class[label].append((index, logit))
    # Stable: images of the same logit stay in the data's order.
    return {k: sorted(v, key=lambda entry: entry[1], reverse=True) for k, v in by_class.items()}


def confident_for_all(
    found: Sequence[Mapping[int, Sequence[tuple[int, float]]]],
) -> dict[int, list[tuple[int, float]]]:
    """The images that every network classifies right, as :func:`confident_images` gives them for each.

    Their confidence is the least sure network's logit, so that a bound on it is a bound for every network.
    """
    least: dict[int, list[tuple[int, float]]] = {}
    for k, entries in found[0].items():
        others = [dict(by_class.get(k, ())) for by_class in found[1:]]
        common = [
            (index, min(logit, *(other[index] for other in others)) if others else logit)
            for index, logit in entries
            if all(index in other for other in others)
        ]
        least[k] = sorted(sorted(common), key=lambda entry: entry[1], reverse=True)
    return least


def is_sure(logit: float, confidence: float) -> bool:
    """Whether a logit's sigmoid is over ``confidence``."""
    return 1 / (1 + math.exp(-min(max(logit, -700), 700))) > confidence


def choose_images(
    by_class: Mapping[int, Sequence[tuple[int, float]]], cells: int, confidence: float = 0.5
) -> list[int]:
    """Indices in blocks of ``cells`` distinct classes, each class's images from the surest on.

    As published: while more than ``cells`` classes (more, not as many) have an unused image whose logit's sigmoid is
    over ``confidence``, draw ``cells`` of them with NumPy's legacy generator, seed 42, and take the next image of each.
    Where there are just as many from the start, which the published rule has no grid for, all of them are taken.
    """
    classes = np.array(list(by_class))
    used = dict.fromkeys(by_class, 0)

    def usable(k: int) -> bool:
        images = by_class[k]
        return used[k] < len(images) and is_sure(images[used[k]][1], confidence)

    mask = np.array([usable(k) for k in by_class], dtype=bool)
    position = {k: i for i, k in enumerate(by_class)}
    generator = np.random.RandomState(42)
    chosen: list[int] = []
    least = cells if mask.sum() == cells else cells + 1
    while mask.sum() >= least:
        for k in generator.choice(classes[mask], size=cells, replace=False).tolist():
            chosen.append(by_class[k][used[k]][0])
            used[k] += 1
            mask[position[k]] = usable(k)
    return chosen


def grids_of(
    chosen: Sequence[int], labels: Callable[[int], int], cells: int, count: int, published_offsets: bool = True
) -> list[list[int]]:
    """Indices of the images of each grid: the next ones of the list whose classes are not in the grid yet.

    Args:
        published_offsets: the published code leaves out one image of the list between grids (its offset is one too
            far), so that grids do not coincide with the blocks of the list. Numbers hardly change; False uses the
            blocks as they are.
    """
    grids: list[list[int]] = []
    at = 0
    while len(grids) < count:
        grid: list[int] = []
        seen: set[int] = set()
        while len(grid) < cells:
            if at >= len(chosen):
                return grids
            label = labels(chosen[at])
            if label not in seen:
                grid.append(chosen[at])
                seen.add(label)
            at += 1
        grids.append(grid)
        at += int(published_offsets)
    return grids


def share_in_cells(maps: Tensor, n: int, smooth: int = 0) -> Tensor:
    """Where the positive part of maps lies: [M, nS, nS] -> [M, n * n] in reading order, rows that sum to 1 or are 0.

    Args:
        smooth: odd side of a window over which maps are averaged first (zeros outside count); 0 for none.
    """
    values = maps[:, None]
    if smooth:
        values = F.avg_pool2d(values, smooth, stride=1, padding=(smooth - 1) // 2)
    values = values.clamp(min=0)
    side = (maps.shape[1] // n, maps.shape[2] // n)
    by_cell = F.avg_pool2d(values.double(), side, stride=side).flatten(1)
    total = by_cell.sum(1, keepdim=True)
    return torch.where(total > 0, by_cell / total.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(by_cell))


def tiled(images: Tensor, n: int) -> Tensor:
    """[n * n, C, S, S] -> [C, nS, nS], column by column as published: image i is in row i % n, column i // n."""
    c, h, w = images.shape[1:]
    return images.reshape(n, n, c, h, w).permute(2, 1, 3, 0, 4).reshape(c, n * h, n * w)


def _map(apply: Method, name: str, net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """A method's maps [N, K, H, W], finite: anything else would be scored as nothing, or in the wrong cells."""
    return checked_maps(apply(net, images, targets), name, (*targets.shape, *images.shape[2:]))


def _of_windows(
    apply: Method, name: str, net: nn.Module, images: Tensor, targets: Tensor, side: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Sums [N, K, H, W] of the maps of windows of ``side`` pixels, ``stride`` apart, and how many cover each pixel.

    The last windows lie at the image's edge, closer to the others where the stride does not fit.
    """
    height, width = images.shape[2:]
    total = images.new_zeros(*targets.shape, height, width)
    count = images.new_zeros(height, width)
    for top in (*range(0, height - side, stride), height - side):
        for left in (*range(0, width - side, stride), width - side):
            part = (..., slice(top, top + side), slice(left, left + side))
            total[part] += _map(apply, name, net, images[part], targets)
            count[part] += 1
    return total, count


def _strided(
    apply: Method, name: str, net: nn.Module, images: Tensor, targets: Tensor, side: int, stride: int
) -> Tensor:
    """Maps [N, K, H, W] of windows, averaged where they overlap."""
    total, count = _of_windows(apply, name, net, images, targets, side, stride)
    return total / count


def _strided_padded(
    apply: Method, name: str, net: nn.Module, images: Tensor, targets: Tensor, side: int, stride: int
) -> Tensor:
    """Maps [N, K, H, W] as B-cosification's code makes them: the sum of those of windows of the padded grid.

    Its grids are what the network's dataset gives: a conventional network's normalised, a B-cos network's encoded as
    ``[x, 1 - x]``. ``side - stride`` zeros are put around *those*, so outside there is a conventional network's mean
    colour, and nothing in any of a B-cos network's six channels, which no colour gives.
    """
    padding = side - stride
    if isinstance(net, BcosNetwork):
        images = net.encode(images)
    outside = net.mean.to(images.dtype) if isinstance(net, ConventionalNetwork) else images.new_zeros(())
    height, width = (length + 2 * padding for length in images.shape[2:])
    padded = outside.expand(*images.shape[:2], height, width).clone()
    inside = (..., slice(padding, height - padding), slice(padding, width - padding))
    padded[inside] = images
    return _of_windows(apply, name, net, padded, targets, side, stride)[0][inside]


def check_variant(variant: str) -> None:
    """Refuse a variant that :func:`grid_pointing_game` does not know.

    Raises:
        InvalidArgumentError: an unknown one.
    """
    if variant not in VARIANTS:
        expected = f"one of {', '.join(VARIANTS)}"
        raise InvalidArgumentError("variant", repr(variant), expected, did_you_mean(variant, VARIANTS))


def grid_pointing_game(
    networks: Mapping[str, nn.Module],
    methods: Sequence[str | Method] | Mapping[str, Sequence[str | Method]],
    data: Any,
    *,
    n: int = 3,
    grids: int = 250,
    smooth: int | None = None,
    confidence: float = 0.5,
    variant: Variant = "full",
    stride: int | None = None,
    same_grids: str | Literal[True] | None = None,
    published_offsets: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    tell: Callable[[str, int, int], None] | None = None,
) -> GridPointing:
    """Play the grid pointing game.

    Args:
        networks: by name; each takes images [N, 3, H, W] in [0, 1] of a cell's size and, for ``variant="full"``, of n
            times that size, as convolutional networks do.
        methods: names or functions (see :mod:`bcos_rt.evaluation.attribution`), for all networks or by network.
        data: what :func:`bcos_rt.data.open_data` takes; images of one square size, with labels.
        n: cells on a side.
        grids: at most so many; fewer where there are not enough sure images.
        smooth: window in pixels, see :func:`share_in_cells`; None for 15 at a cell of 224, in proportion else.
        confidence: least sigmoid of an image's logit.
        variant: ``"full"``: the grid is n times an image's size. ``"rescaled"``: images are shrunk first, so that the
            grid has an image's size (to the next multiple of n below). ``"strided"``: the network sees windows of an
            image's size, ``stride`` apart (default: half a window), whose maps are averaged where they overlap; for
            networks that take no other size. ``"strided_padded"``: the same as B-cosification's code has it: zeros are
            put around the (normalised or encoded) grid, so that all pixels are in as many windows, and maps are
            summed. A function as a method then sees a B-cos network's windows encoded, with six channels.
        stride: of both strided variants, at most an image's side; of the second a divisor of it.
        same_grids: None gives each network grids of the images that itself classifies right and with confidence, as
            published. True gives all networks the same grids, of images that every one of them does; a name the same
            grids of that network's images, whatever the others make of them.
        published_offsets: see :func:`grids_of`.
        batch_size, workers: images at a time while the sure ones are looked for; processes that read them.
        tell: called with what is being done, steps done and steps in all.

    Raises:
        InvalidArgumentError: unusable arguments; no grid can be made for a network (named); logits or maps that are not
            finite, or maps of another size than the grid.
        UnsupportedOpError: a method that refuses a network, see
            :func:`~bcos_rt.evaluation.attribution.unsupported_methods`.
    """
    for argument, value, least in (("n", n, 2), ("grids", grids, 1), ("batch_size", batch_size, 1)):
        check_count(argument, value, least)
    if not isinstance(networks, Mapping):
        raise InvalidTypeError("networks", type(networks).__name__, "networks by name, such as {'mine': net}")
    if not networks:
        raise InvalidArgumentError("networks", "none", "at least one network")
    for name, net in networks.items():
        if not isinstance(net, nn.Module):
            raise InvalidTypeError(f"networks[{name!r}]", type(net).__name__, "a torch.nn.Module")
    if not is_number(confidence) or not 0 <= confidence < 1:
        raise InvalidArgumentError("confidence", repr(confidence), "a number in [0, 1)")
    check_variant(variant)
    if same_grids is not None and same_grids is not True and same_grids not in networks:
        raise InvalidArgumentError("same_grids", repr(same_grids), f"True, None or one of {', '.join(networks)}")
    if stride is not None and not variant.startswith("strided"):
        raise InvalidArgumentError("stride", stride, f"None for variant={variant!r}, which has no windows")
    images = open_data(data)
    side = _square(images)
    cell = side // n if variant == "rescaled" else side
    if cell == 0:
        raise InvalidArgumentError("n", n, f"at most {side}, the pixels of an image's side, for variant='rescaled'")
    window = smoothing_for(cell) if smooth is None else smooth
    if window and (window < 0 or window % 2 == 0):
        raise InvalidArgumentError("smooth", smooth, "an odd number of pixels, or 0 for none")
    step = max(1, side // 2) if stride is None else stride
    if not 1 <= step <= side:
        raise InvalidArgumentError("stride", stride, f"1 to {side}, the side of a window")
    if variant == "strided_padded" and side % step:
        raise InvalidArgumentError("stride", step, f"a divisor of {side}, so that all pixels are in as many windows")
    own = {name: methods_of(methods, name) for name in networks}
    shares: dict[tuple[str, str], np.ndarray] = {}
    example: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    judges: dict[str, tuple[str, ...]] = {}
    empty: dict[tuple[str, str], int] = {}
    # Image i of a grid is in row i % n and column i // n, see tiled().
    places = torch.arange(n * n).reshape(n, n).T.flatten()

    def sure_images(name: str) -> dict[int, list[tuple[int, float]]]:
        with eval_mode(networks[name]):
            return confident_images(
                networks[name], images, batch_size=batch_size, workers=workers,
                tell=None if tell is None else lambda done, of: tell(f"{name}: confidences", done, of),
            )  # fmt: skip

    def grids_for(*names: str) -> list[list[int]]:
        by_class = confident_for_all([sure_images(name) for name in names])
        chosen = choose_images(by_class, n * n, confidence)
        labels = {index: k for k, entries in by_class.items() for index, _ in entries}
        made = grids_of(chosen, lambda index: labels[index], n * n, grids, published_offsets)
        if not made:
            sure = sum(1 for entries in by_class.values() if entries and is_sure(entries[0][1], confidence))
            right = f"right for {' and '.join(map(repr, names))} with a confidence > {confidence}"
            raise InvalidArgumentError("data", f"{sure} classes with an image {right}", f"at least {n * n}")
        return made

    sharing = tuple(networks) if same_grids is True else (same_grids,) if same_grids is not None else None
    shared = grids_for(*sharing) if sharing is not None else None
    for network, net in networks.items():
        judges[network] = sharing or (network,)
        chosen = shared if shared is not None else grids_for(network)
        like = example_tensor(net)
        for name, apply in own[network].items():
            found: list[np.ndarray] = []
            for i, indices in enumerate(chosen):
                items = [images[j] for j in indices]
                cells = torch.stack([image for image, _ in items]).to(like.device, like.dtype)
                if variant == "rescaled":
                    cells = F.interpolate(cells, (cell, cell), mode="bilinear", antialias=True).clamp(0, 1)
                # All classes of the grid, in one forward pass where the method can.
                targets = torch.tensor([[label for _, label in items]], device=like.device)
                grid = tiled(cells, n)
                with eval_mode(net):
                    if variant == "strided":
                        maps = _strided(apply, name, net, grid[None], targets, side, step)[0]
                    elif variant == "strided_padded":
                        maps = _strided_padded(apply, name, net, grid[None], targets, side, step)[0]
                    else:
                        maps = _map(apply, name, net, grid[None], targets)[0]
                inside = share_in_cells(maps, n, window).cpu()
                found.append(inside.gather(1, places[:, None])[:, 0].numpy())
                empty[network, name] = empty.get((network, name), 0) + int((inside.sum(1) == 0).sum())
                if i == 0:
                    example[network, name] = (grid.float().cpu(), maps[0].float().cpu())
                if tell is not None:
                    tell(f"{network}: {name}", i + 1, len(chosen))
            shares[network, name] = np.concatenate(found)
    return GridPointing(shares, n, variant, window, example, judges, empty)


def _square(images: ImageData) -> int:
    if len(images) == 0:
        raise InvalidArgumentError("data", "no image", "images with labels")
    height, width = images[0][0].shape[-2:]
    if height != width:
        raise InvalidArgumentError("data", f"images of {height} x {width} pixels", "square images", " (give a size)")
    return int(height)

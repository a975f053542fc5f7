"""Insertion and deletion: does a class's probability follow the pixels that an explanation says matter most?

Pixels are replaced in the order of their attribution, the highest first (RISE, Petsiuk et al. 2018, arXiv 1806.07421,
section 4.2). *Deletion* replaces the image's by a fill: a good explanation's curve falls early, its area is small.
*Insertion* puts the image's into a fill: a good explanation's curve rises early, its area is large.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bcos_rt.data import open_data
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation.attribution import Method, methods_of
from bcos_rt.evaluation.checks import (
    check_count,
    checked_logits,
    checked_maps,
    example_tensor,
    is_number,
    logits_of,
    spread,
)
from bcos_rt.evaluation.saving import save_results
from bcos_rt.explanation.explain import class_ids_of
from bcos_rt.figures import folded, without_math
from bcos_rt.graph.capture import eval_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["InsertionDeletion", "Perturbation", "PerturbationCurves", "insertion_deletion", "perturbation_curves"]

# What stands where a pixel was: the image blurred, the image's mean colour, or one RGB colour in [0, 1].
Fill = Literal["blur", "mean"] | tuple[float, float, float]
Score = Literal["softmax", "sigmoid", "logit"]
# RISE blurs with 11 pixels and a standard deviation of 5 where images have 224. The tails of its Gaussian are folded
# back into the window, and zeros lie outside of its (normalised) images; ours is cut off, and images are mirrored.
BLUR, BLUR_AT = 5.0, 224


@dataclass(frozen=True)
class Perturbation:
    """How pixels are replaced.

    Attributes:
        steps: how many times the network is asked after the first; each step replaces the same share of the pixels.
            RISE replaces 224 pixels a step, which is 224 steps at 224 x 224.
        deletion, insertion: what replaces the pixels of one image, and what the other begins with: ``"blur"``, the
            image blurred; ``"mean"``, its own mean colour; or an RGB colour in [0, 1], e.g. ``(0, 0, 0)``. RISE deletes
            to the data set's mean colour; the image's own is the same for networks of any normalisation.
        score: of the class: ``"softmax"``, ``"sigmoid"`` (what a B-cos network's binary cross-entropy trains) or
            ``"logit"``.
        blur_sigma: standard deviation of the blur in pixels; None for 5 at images of 224 pixels, in proportion else.
        batch_size: perturbed images that the network sees at a time.
    """

    steps: int = 50
    deletion: Fill = "mean"
    insertion: Fill = "blur"
    score: Score = "softmax"
    blur_sigma: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            check_count(f"Perturbation.{name}", value)
        for name, fill in (("deletion", self.deletion), ("insertion", self.insertion)):
            colour = (
                isinstance(fill, tuple)
                and len(fill) == 3
                and all(is_number(value) and 0 <= value <= 1 for value in fill)
            )
            if not colour and not (isinstance(fill, str) and fill in ("blur", "mean")):
                raise InvalidArgumentError(
                    f"Perturbation.{name}", repr(fill), "'blur', 'mean' or three numbers in [0, 1] (R, G, B)"
                )
        if self.score not in ("softmax", "sigmoid", "logit"):
            raise InvalidArgumentError("Perturbation.score", repr(self.score), "'softmax', 'sigmoid' or 'logit'")
        sigma = self.blur_sigma
        if sigma is not None and not (is_number(sigma) and math.isfinite(sigma) and sigma > 0):
            raise InvalidArgumentError("Perturbation.blur_sigma", repr(sigma), "a number > 0, or None")


@dataclass(frozen=True)
class PerturbationCurves:
    """The class's score while pixels are replaced, float64.

    Attributes:
        fractions: [steps + 1], the share of pixels replaced, from 0 to 1.
        deletion: [N, steps + 1], from the image to the fill.
        insertion: [N, steps + 1], from the fill to the image.
    """

    fractions: Tensor
    deletion: Tensor
    insertion: Tensor

    def deletion_area(self) -> Tensor:
        """Area under each deletion curve by the trapezoidal rule, [N]; small is good."""
        return torch.trapezoid(self.deletion, self.fractions, dim=1)

    def insertion_area(self) -> Tensor:
        """Area under each insertion curve by the trapezoidal rule, [N]; large is good."""
        return torch.trapezoid(self.insertion, self.fractions, dim=1)


@dataclass(frozen=True)
class InsertionDeletion:
    """Results of :func:`insertion_deletion`.

    Attributes:
        curves: (network, method) -> the curves of all images.
        options: as measured.
    """

    curves: dict[tuple[str, str], PerturbationCurves]
    options: Perturbation

    def summary(self) -> list[dict[str, Any]]:
        """A row a network and method: mean areas over the images, and the standard errors of these means."""
        rows = []
        for (network, name), found in self.curves.items():
            row: dict[str, Any] = {
                "network": network, "method": name, "images": len(found.deletion), "score": self.options.score,
                "steps": self.options.steps,
            }  # fmt: skip
            for kind, areas in (("deletion", found.deletion_area()), ("insertion", found.insertion_area())):
                row[kind] = float(areas.mean())
                row[f"{kind}_error"] = float(areas.std() / math.sqrt(len(areas))) if len(areas) > 1 else None
            rows.append(row)
        return rows

    def save(self, folder: str | os.PathLike[str], name: str = "perturbation") -> Path:
        """Write ``NAME.csv`` (the summary), ``NAME.npz`` (all curves) and ``NAME.png`` (their means)."""
        folder = Path(folder)
        arrays = {
            f"{network}/{method}/{kind}": getattr(found, kind).numpy()
            for (network, method), found in self.curves.items()
            for kind in ("fractions", "deletion", "insertion")
        }
        save_results(folder, name, self.summary(), arrays, {"": self.plot()})
        return folder

    def plot(self) -> Figure:
        """Mean curves; in the legend their areas."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, kind in zip(axes, ("deletion", "insertion"), strict=True):
            for (network, name), found in self.curves.items():
                mean = getattr(found, kind).mean(0)
                area = float(torch.trapezoid(mean, found.fractions))
                axis.plot(found.fractions.numpy(), mean.numpy(), label=folded(f"{network}: {name} ({area:.3f})", 50))
            axis.set_title(f"{kind} ({'small' if kind == 'deletion' else 'large'} areas are good)", fontsize=10)
            axis.set_xlabel("share of pixels replaced")
            axis.legend(fontsize=7)
        axes[0].set_ylabel(f"{self.options.score} of the class")
        return without_math(figure)


def filled(images: Tensor, fill: Fill, blur_sigma: float | None = None) -> Tensor:
    """What replaces the pixels of images [N, 3, H, W], of the same shape; see :class:`Perturbation`."""
    if isinstance(fill, tuple):
        return images.new_tensor(fill)[:, None, None].expand_as(images)
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    from torchvision.transforms.functional import gaussian_blur

    shorter = min(images.shape[2:])
    sigma = BLUR * shorter / BLUR_AT if blur_sigma is None else blur_sigma
    # Published: 11 pixels for a standard deviation of 5. What lies outside is mirrored, so it must fit once.
    radius = min(max(1, round(sigma)), shorter - 1)
    blurred: Tensor = gaussian_blur(images, [2 * radius + 1] * 2, [sigma, sigma])
    return blurred


@torch.no_grad()
def perturbation_curves(
    net: nn.Module, images: Tensor, targets: Any, maps: Tensor, options: Perturbation | None = None
) -> PerturbationCurves:
    """Delete and insert pixels in the order of an attribution.

    Pixels of the same attribution go in reading order: a map without any preference is not one in random order.

    Args:
        net: takes images [N, 3, H, W] in [0, 1] and returns logits [N, classes]; used in evaluation mode, and left in
            the mode it was in.
        images: [N, 3, H, W] in [0, 1], on the network's device.
        targets: one class an image: None for the top class of each, an int, or N ints.
        maps: [N, H, W], the attribution of each image's class.
        options: see :class:`Perturbation`.

    Raises:
        InvalidTypeError: ``net`` is no module.
        InvalidArgumentError: images, targets or maps that do not fit; logits that are not finite; more steps than
            pixels.
    """
    options = options or Perturbation()
    if not isinstance(net, nn.Module):
        raise InvalidTypeError("net", type(net).__name__, "a torch.nn.Module")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise InvalidArgumentError("images", f"shape {tuple(images.shape)}", "[N, 3, H, W], at least one pixel")
    n, _, height, width = images.shape
    if tuple(maps.shape) != (n, height, width):
        raise InvalidArgumentError("maps", f"shape {tuple(maps.shape)}", f"({n}, {height}, {width}), as the images")
    if not bool(torch.isfinite(maps).all()):
        raise InvalidArgumentError("maps", "NaN or infinite values", "finite attributions")
    pixels = height * width
    if options.steps > pixels:
        raise InvalidArgumentError("Perturbation.steps", options.steps, f"at most {pixels}, the number of pixels")
    with eval_mode(net):
        logits = checked_logits(torch.cat([net(part) for part in images.split(options.batch_size)]))  # type: ignore[no-untyped-call]
        classes = class_ids_of(targets, n, logits.shape[1], images.device)
        if classes.ndim != 1:
            raise InvalidArgumentError("targets", f"shape {tuple(classes.shape)}", f"one class an image, [{n}]")
        classes = torch.where(classes < 0, logits.argmax(1), classes)
        order = maps.reshape(n, pixels).double().argsort(dim=1, descending=True, stable=True).to(images.device)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=order.device).expand_as(order))
        replaced = torch.tensor(
            [round(step * pixels / options.steps) for step in range(options.steps + 1)], device=rank.device
        )

        def curve(before: Tensor, after: Tensor) -> Tensor:
            """The score while pixels of ``before`` become those of ``after``."""
            scores = []
            # Every pair of an image and a step, as many at a time as the network is given.
            for part in torch.arange(n * len(replaced), device=rank.device).split(options.batch_size):  # type: ignore[no-untyped-call]
                image, step = part // len(replaced), part % len(replaced)
                done = (rank[image] < replaced[step][:, None]).reshape(-1, 1, height, width)
                asked = net(torch.where(done, after[image], before[image]))
                scores.append(_score(asked, classes[image], options.score))
            return torch.cat(scores).reshape(n, len(replaced)).cpu()

        deletion = curve(images, filled(images, options.deletion, options.blur_sigma))
        insertion = curve(filled(images, options.insertion, options.blur_sigma), images)
    return PerturbationCurves(replaced.double().cpu() / pixels, deletion, insertion)


def _score(logits: Tensor, classes: Tensor, score: Score) -> Tensor:
    values = logits.double()
    if score == "softmax":
        values = values.softmax(1)
    elif score == "sigmoid":
        values = values.sigmoid()
    return values.gather(1, classes[:, None])[:, 0]


def insertion_deletion(
    networks: Mapping[str, nn.Module],
    methods: Sequence[str | Method] | Mapping[str, Sequence[str | Method]],
    data: Any,
    *,
    images: int = 100,
    options: Perturbation | None = None,
    batch_size: int = 8,
    tell: Callable[[str, int, int], None] | None = None,
) -> InsertionDeletion:
    """Insertion and deletion of every network's top classes, for every method.

    Args:
        networks: by name; each takes images [N, 3, H, W] in [0, 1].
        methods: names or functions (see :mod:`bcos_rt.evaluation.attribution`), for all networks or by network.
        data: what :func:`bcos_rt.data.open_data` takes; images of one size. Labels are not used.
        images: at most so many, spread evenly over the data; the same for all networks.
        options: see :class:`Perturbation`.
        batch_size: images that are explained at a time.
        tell: called with what is being done, images done and images in all.

    Raises:
        InvalidArgumentError: no network, no method, no image, images of several sizes, numbers below 1, logits or maps
            that are not finite, or maps of another size than the images.
    """
    options = options or Perturbation()
    if not networks:
        raise InvalidArgumentError("networks", "none", "at least one network")
    check_count("images", images)
    check_count("batch_size", batch_size)
    source = open_data(data)
    if len(source) == 0:
        raise InvalidArgumentError("data", "no image", "images")
    count = min(images, len(source))
    chosen = sorted(spread(count, len(source)))
    curves: dict[tuple[str, str], PerturbationCurves] = {}
    for network, net in networks.items():
        like = example_tensor(net)
        with eval_mode(net):
            for name, apply in methods_of(methods, network).items():
                parts = []
                for start in range(0, count, batch_size):
                    indices = chosen[start : start + batch_size]
                    read = [source[i][0] for i in indices]
                    if len({tuple(image.shape) for image in read}) > 1:
                        raise InvalidArgumentError("data", "images of several sizes", "one size", " (give a size)")
                    batch = torch.stack(read).to(like.device, like.dtype)
                    with torch.no_grad():
                        top = logits_of(net, batch, start, network).argmax(1)
                    maps = checked_maps(apply(net, batch, top), name, (len(batch), *batch.shape[2:]))
                    parts.append(perturbation_curves(net, batch, top, maps, options))
                    if tell is not None:
                        tell(f"{network}: {name}", start + len(indices), count)
                curves[network, name] = PerturbationCurves(
                    parts[0].fractions,
                    torch.cat([part.deletion for part in parts]),
                    torch.cat([part.insertion for part in parts]),
                )
    return InsertionDeletion(curves, options)

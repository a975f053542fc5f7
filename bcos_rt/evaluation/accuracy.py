"""How often a network is right, how well it knows that, and whether its explanations add up."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.data import loader, open_data, shard
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation.checks import check_count, checked_logits, example_tensor, logits_of, spread
from bcos_rt.evaluation.saving import save_figure
from bcos_rt.explanation.explain import explain
from bcos_rt.figures import without_math
from bcos_rt.files import write_csv, write_json
from bcos_rt.graph.capture import eval_mode
from bcos_rt.nn.network import BcosNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Calibration", "Completeness", "Evaluation", "check_place", "evaluate", "judged", "reliability"]

_FOREIGN_SUFFIXES = (".pdf", ".svg", ".jpg", ".jpeg", ".npz", ".csv", ".json", ".txt", ".html", ".gif", ".webp")


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width (Guo et al. 2017, arXiv 1706.04599).

    Attributes:
        error: expected calibration error, ``sum_b n_b / N |accuracy_b - confidence_b|``.
        confidence: mean over all images; above the accuracy where a network is surer than it is right.
        counts, confidences, accuracies: by bin; 0 for an empty one.
    """

    error: float
    confidence: float
    counts: tuple[int, ...]
    confidences: tuple[float, ...]
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Completeness:
    """``|sum(contributions) + residual - logit|`` of the top class, over images.

    Attributes:
        images: how many were explained.
        mean, median, q90, q99, largest: in logits; q90 is what 90 % of the images do not exceed.
        largest_relative: the largest over the largest magnitude of the image's logits.
    """

    images: int
    mean: float
    median: float
    q90: float
    q99: float
    largest: float
    largest_relative: float


@dataclass(frozen=True)
class Evaluation:
    """Results of :func:`evaluate`.

    Attributes:
        images, classes: numbers of them.
        top1, top5: shares of right answers; top5 None for up to five classes.
        loss: mean negative log-likelihood of the softmax.
        softmax, sigmoid: calibration of the top class's probability by the one and the other. A B-cos network is
            trained with binary cross-entropy: its probabilities are sigmoids.
        per_class: share of right answers by class, None for a class without images.
        completeness: of B-cos networks' explanations.
        class_names: the data's, or else the network's, where these are as many; else None.
    """

    images: int
    classes: int
    top1: float
    top5: float | None
    loss: float
    softmax: Calibration
    sigmoid: Calibration
    per_class: tuple[float | None, ...]
    completeness: Completeness | None
    class_names: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def plot(self) -> Figure:
        """Reliability diagrams: accuracy over confidence; bars on the diagonal are calibrated."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.4, 4), layout="constrained")
        for axis, (name, found) in zip(
            figure.subplots(1, 2, sharey=True), (("softmax", self.softmax), ("sigmoid", self.sigmoid)), strict=True
        ):
            width = 1 / len(found.counts)
            total = sum(found.counts)
            shades = [0.25 + 0.75 * count / max(found.counts) for count in found.counts]
            for i, (accuracy, shade) in enumerate(zip(found.accuracies, shades, strict=True)):
                axis.bar((i + 0.5) * width, accuracy, width * 0.92, color="tab:blue", alpha=shade)
            axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=0.8)
            axis.set_title(f"{name}: calibration error {found.error:.3f} ({total} images)", fontsize=10)
            axis.set_xlabel("confidence (darker: more images)")
        figure.axes[0].set_ylabel("accuracy")
        return without_math(figure)

    def summary(self) -> dict[str, Any]:
        """The numbers of the whole data set in a flat row, blank where there are none."""
        row: dict[str, Any] = {name: getattr(self, name) for name in ("images", "classes", "top1", "top5", "loss")}
        for name, found in (("softmax", self.softmax), ("sigmoid", self.sigmoid)):
            row |= {f"{name}_confidence": found.confidence, f"{name}_calibration_error": found.error}
        for field in dataclasses.fields(Completeness):
            value = None if self.completeness is None else getattr(self.completeness, field.name)
            row[f"completeness_{field.name}"] = value
        return row

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
        """Write :meth:`plot` where ``path`` ends in .png, else everything into a folder.

        The folder, made where it is missing, gets ``evaluation.json`` (all fields), ``evaluation.csv``
        (:meth:`summary`), ``evaluation_classes.csv`` (accuracy by class, with the names that are known) and
        ``evaluation.png``.

        Args:
            about: what else the JSON shall hold, before the results.

        Raises:
            InvalidArgumentError: a path of another ending, or a file where a folder is meant.
        """
        path = Path(path)
        check_place(path, "path")
        if path.suffix.lower() == ".png" and not path.is_dir():
            save_figure(self.plot(), path)
            return path
        row = self.summary()
        write_json(path / "evaluation.json", {**(about or {}), "results": self.to_dict()})
        write_csv(path / "evaluation.csv", [row], list(row))
        names = self.class_names or ("",) * self.classes
        classes = (
            {"class": k, "name": name, "top1": share}
            for k, (name, share) in enumerate(zip(names, self.per_class, strict=True))
        )
        write_csv(path / "evaluation_classes.csv", classes, ("class", "name", "top1"))
        save_figure(self.plot(), path / "evaluation.png")
        return path


def check_place(path: Path, argument: str) -> None:
    """Refuse a path that :meth:`Evaluation.save` does not write to.

    Raises:
        InvalidArgumentError: a path of another ending, or a file where a folder is meant.
    """
    if path.is_dir() or path.suffix.lower() == ".png":
        return
    # Folders may have dots in their names; what looks like another kind of file is more likely meant as one.
    if path.suffix.lower() in _FOREIGN_SUFFIXES or path.exists():
        raise InvalidArgumentError(argument, repr(str(path)), "a file name ending in .png, or a folder")


def reliability(confidences: Tensor, right: Tensor, bins: int = 15) -> Calibration:
    """Calibration of confidences [N] in [0, 1] with right [N] bool."""
    check_count("bins", bins)
    confidences, hits = confidences.double(), right.double()
    # Bins are (low, high]; 0 falls into the first.
    index = (torch.ceil(confidences * bins) - 1).clamp(0, bins - 1).long()
    counts = torch.bincount(index, minlength=bins)
    safe = counts.clamp(min=1)
    confidence = torch.bincount(index, confidences, minlength=bins) / safe
    accuracy = torch.bincount(index, hits, minlength=bins) / safe
    error = float((counts * (accuracy - confidence).abs()).sum() / max(1, len(confidences)))
    mean = float(confidences.mean()) if len(confidences) else 0.0
    return Calibration(error, mean, tuple(counts.tolist()), tuple(confidence.tolist()), tuple(accuracy.tolist()))


def evaluate(
    net: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    workers: int = 0,
    completeness_images: int = 256,
    bins: int = 15,
    tell: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a classifier on labelled images.

    Args:
        net: takes images [N, 3, H, W] in [0, 1] and returns logits [N, classes]; used in evaluation mode on the device
            it is on, and left in the mode it was in.
        data: what :func:`bcos_rt.data.open_data` takes.
        batch_size, workers: images at a time; processes that read them.
        completeness_images: how many images are explained, spread evenly over the data; for B-cos networks.
        bins: of the calibration.
        tell: called with what is being done, images done and images in all.

    Raises:
        InvalidTypeError: ``net`` is no module.
        InvalidArgumentError: no image, images without labels, labels that the network has no logit for, an output that
            is no logits [N, classes], or logits that are not finite; the first such image is named.
    """
    if not isinstance(net, nn.Module):
        raise InvalidTypeError("net", type(net).__name__, "a torch.nn.Module")
    for name, value, least in (("batch_size", batch_size, 1), ("completeness_images", completeness_images, 0),
                               ("bins", bins, 1)):  # fmt: skip
        check_count(name, value, least)
    images = open_data(data)
    if len(images) == 0:
        raise InvalidArgumentError("data", "no image", "images with labels")
    like = example_tensor(net)
    explained = spread(completeness_images, len(images))
    rows: list[Tensor] = []
    labels_seen: list[Tensor] = []
    errors: list[Tensor] = []
    scales: list[Tensor] = []
    with eval_mode(net):
        batches = shard(len(images), batch_size)
        for batch, (pixels, labels) in zip(batches, loader(images, batches, workers), strict=True):
            pixels = pixels.to(like.device, like.dtype)
            with torch.no_grad():
                rows.append(logits_of(net, pixels, batch[0]).double().cpu())
            labels_seen.append(labels)
            chosen = [i for i, index in enumerate(batch) if index in explained]
            if isinstance(net, BcosNetwork) and chosen:
                explanation = explain(net, pixels[chosen])
                errors.append(explanation.completeness_error().cpu())
                scales.append(explanation.logits.double().abs().amax(1).cpu())
            if tell is not None:
                tell("evaluating", batch[-1] + 1, len(images))
    names = (images.class_names, getattr(net, "class_names", None))
    return judged(torch.cat(rows), torch.cat(labels_seen), errors, scales, bins, names)


def judged(
    logits: Tensor,
    truth: Tensor,
    errors: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
    bins: int = 15,
    names: Iterable[Sequence[str] | None] = (),
) -> Evaluation:
    """The results of logits [N, classes] for labels ``truth`` [N].

    Args:
        errors, scales: of explained images, in parts: their completeness errors, and the largest magnitudes of logits.
        bins: of the calibration.
        names: what the classes may be called; the first list counts that has a name for each.

    Raises:
        InvalidArgumentError: images without labels, labels without a logit, or logits that are not finite.
    """
    count, classes = checked_logits(logits).shape
    if int(truth.min()) < 0:
        raise InvalidArgumentError("data", "images without labels", "labels")
    if int(truth.max()) >= classes:
        raise InvalidArgumentError(
            "data", f"label {int(truth.max())}", f"labels 0 to {classes - 1}, as the network has"
        )
    top = logits.topk(min(5, classes), 1).indices == truth[:, None]
    right = top[:, 0]
    per_class: list[float | None] = []
    for k in range(classes):
        mine = truth == k
        per_class.append(float(right[mine].double().mean()) if bool(mine.any()) else None)
    completeness = None
    if errors:
        error = torch.cat(list(errors))
        relative = error / torch.cat(list(scales)).clamp(min=torch.finfo(torch.float64).tiny)
        median, q90, q99, largest = (float(error.quantile(q)) for q in (0.5, 0.9, 0.99, 1.0))
        mean, relatively = float(error.mean()), float(relative.max())
        completeness = Completeness(len(error), mean, median, q90, q99, largest, relatively)
    return Evaluation(
        images=count,
        classes=classes,
        top1=float(right.double().mean()),
        top5=float(top.any(1).double().mean()) if classes > 5 else None,
        loss=float(F.cross_entropy(logits, truth)),
        softmax=reliability(torch.softmax(logits, 1).amax(1), right, bins),
        sigmoid=reliability(torch.sigmoid(logits.amax(1)), right, bins),
        per_class=tuple(per_class),
        completeness=completeness,
        class_names=next((tuple(known) for known in names if known is not None and len(known) == classes), None),
    )

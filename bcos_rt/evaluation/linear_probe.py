"""Linear probes: logistic regression on a tower's frozen embeddings (Radford et al. 2021, appendix A.3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bcos_rt.data import open_data
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation.accuracy import Evaluation, judged
from bcos_rt.evaluation.embeddings import Tell, embeddings_of
from bcos_rt.lazy import require

__all__ = ["LinearProbe", "linear_probe"]

# Of the search for C: first every second decade, then halved around the best so far, down to eight steps a decade.
COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINEST = 1 / 8
# The log-probability of a class that no training image has.
NEVER = -1000.0


@dataclass(frozen=True)
class LinearProbe:
    """Results of :func:`linear_probe`.

    Attributes:
        c: inverse strength of the L2 penalty, as chosen or given.
        tried: every C and the share of held-out images that it got right, by C; empty where C was given.
        images: how many the final classifier was fitted to.
        evaluation: of the validation data.
    """

    c: float
    tried: tuple[tuple[float, float], ...]
    images: int
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)


def linear_probe(
    net: nn.Module,
    train: Any,
    validation: Any,
    *,
    c: float | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    max_iter: int = 1000,
    batch_size: int = 64,
    workers: int = 0,
    bins: int = 15,
    tell: Tell | None = None,
) -> LinearProbe:
    """Fit logistic regression (L-BFGS) to an image tower's embeddings of ``train``, and measure it on ``validation``.

    C is chosen as for CLIP, on a share of the training images: seven values from 1e-6 to 1e6, then, around the best,
    in steps halved to an eighth of a decade. The classifier is then fitted to all of them. Embeddings are the means of
    unit tokens, those of a conventional tower scaled to norm 1.

    Args:
        net: an image tower, as for :func:`bcos_rt.evaluation.zero_shot`.
        train, validation: what :func:`bcos_rt.data.open_data` takes, with labels.
        c: given, nothing is searched.
        held_out: share of the training images that C is chosen on, of every class alike where classes are large enough.
        seed: of what is held out.
        max_iter: of L-BFGS.
        batch_size, workers: images at a time; processes that read them.
        bins: of the calibration.
        tell: called with what is being done, steps done and steps in all.

    Raises:
        InvalidArgumentError, InvalidTypeError: unusable arguments, named; images without labels, one class alone.
        MissingDependencyError: scikit-learn (extra ``evaluate``) is not installed.
    """
    _check_number("c", c, 0, np.inf)
    _check_number("held_out", held_out, 0, 1)
    linear = require("sklearn.linear_model", "evaluate")
    selection = require("sklearn.model_selection", "evaluate")
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "tell": tell}
    x, labels = _numbers("train", *embeddings_of(net, train, what="encoding training images", **options))
    seen = open_data(validation)
    x_seen, truth = _numbers("validation", *embeddings_of(net, seen, what="encoding images", **options))
    if len(np.unique(labels)) < 2:
        raise InvalidArgumentError("train", "images of one class", "at least two classes")

    def fitted(inverse: float, features: np.ndarray, classes: np.ndarray) -> Any:
        return linear.LogisticRegression(C=inverse, max_iter=max_iter).fit(features, classes)

    tried: dict[float, float] = {}
    if c is None:
        # A class must be on both sides: where one has a single image they cannot all be.
        counts = np.unique(labels, return_counts=True)[1]
        enough = counts.min() >= 2 and round(held_out * len(labels)) >= len(counts)
        parts = selection.train_test_split(
            np.arange(len(labels)), test_size=held_out, random_state=seed, stratify=labels if enough else None
        )
        fit, held = parts
        if len(np.unique(labels[fit])) < 2:
            raise InvalidArgumentError(
                "train", f"{len(labels)} images", "more of them, to choose C on some", " (or c=)"
            )

        def measured(exponent: float) -> float:
            if exponent not in tried:
                model = fitted(10**exponent, x[fit], labels[fit])
                tried[exponent] = float((model.predict(x[held]) == labels[held]).mean())
                if tell is not None:
                    tell("choosing C", len(tried), len(COARSE) + 8)
            return tried[exponent]

        c = 10 ** _best(measured)
    model = fitted(float(c), x, labels)
    logits = np.full((len(truth), int(max(labels.max(), truth.max())) + 1), NEVER)
    logits[:, model.classes_] = model.predict_log_proba(x_seen).clip(min=NEVER)
    evaluation = judged(torch.from_numpy(logits), torch.from_numpy(truth), bins=bins, names=[seen.class_names])
    listed = tuple((10**exponent, share) for exponent, share in sorted(tried.items()))
    return LinearProbe(float(c), listed, len(labels), evaluation)


def _best(measured: Any) -> float:
    """The exponent with the largest measure; of equals the smallest."""

    def best(exponents: Any) -> float:
        ordered: float = max(sorted(exponents), key=measured)
        return ordered

    centre, step = best(COARSE), 1.0
    while step >= FINEST:
        centre = best((centre - step, centre, centre + step))
        step /= 2
    return centre


def _numbers(argument: str, embeddings: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if int(labels.min()) < 0:
        raise InvalidArgumentError(argument, "images without labels", "labels")
    return embeddings.numpy(), labels.numpy()


def _check_number(argument: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(argument, repr(value), "a number")
    if not low < value < high:
        raise InvalidArgumentError(
            argument, value, f"a number above {low:g}" + (f" and below {high:g}" if high < np.inf else "")
        )

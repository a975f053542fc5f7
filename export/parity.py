"""The comparison of an exported file with PyTorch, part of every export."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bcos_rt.export.errors import ExportError

__all__ = ["Difference", "Parity", "Tolerances", "random_images", "verify"]

# How much further from float64 than PyTorch's float32 a file may be, and by how much that may widen a tolerance.
OWN_ROUNDING = 2.0
MOST_WIDENING = 20.0
# Below this, float32 numbers have lost their precision to underflow: there is nothing to compare.
UNDERFLOW = 2.0**-126 / 2.0**-23


@dataclass(frozen=True)
class Tolerances:
    """How far a file may be from PyTorch.

    Attributes:
        logits: largest difference of logits and residual, relative to the largest logit.
        weights: the same of W and contributions, relative to their largest value; None where single switches of ReLU
            or max-pool may flip between two ways of rounding (B = 1, fp16): then the next ones count instead.
        weights_l2, weights_cosine: relative L2 error and cosine of W and contributions, of the median image.
        flipped_l2, flipped_cosine: the same of every image. A switch that flips moves one image's W by up to a few per
            cent, as float32 PyTorch is moved from float64 by it; a wrong graph moves all images.
        completeness: largest ``|sum(contributions) + residual - logit|`` of the file itself, relative to the largest
            logit; a flip does not touch it.
        picture: largest difference of a colour value, which the share ``picture_share`` of values may miss.
    """

    logits: float = 1e-4
    weights: float | None = 1e-3
    weights_l2: float = 1e-2
    weights_cosine: float = 0.9999
    flipped_l2: float = 0.1
    flipped_cosine: float = 0.995
    completeness: float = 1e-3
    picture: float = 2e-2
    picture_share: float = 1e-2

    @classmethod
    def of(cls, b: float, precision: str) -> Tolerances:
        """The tolerances for a network with this B exported in this precision."""
        if precision == "fp16":
            return cls(
                logits=2e-2,
                weights=None,
                weights_l2=0.2,
                weights_cosine=0.98,
                flipped_l2=0.5,
                flipped_cosine=0.9,
                completeness=5e-2,
                picture=0.1,
                picture_share=0.2,
            )
        return cls() if b > 1 else cls(weights=None, picture_share=0.05)


@dataclass(frozen=True)
class Difference:
    """One output against PyTorch's, the worst of all runs.

    Attributes:
        max_abs: largest absolute difference.
        max_relative: the same, relative to the largest value.
        l2, cosine: relative L2 error and cosine of the worst image (not for logits and residual).
        median_l2, median_cosine: the same of the median image.
        share: for the picture: share of values that differ by more than its tolerance.
    """

    max_abs: float
    max_relative: float
    l2: float | None = None
    cosine: float | None = None
    share: float | None = None
    median_l2: float | None = None
    median_cosine: float | None = None


@dataclass(frozen=True)
class Parity:
    """How a file compares with PyTorch.

    Attributes:
        runtime: onnxruntime's version and providers.
        images: how many images were compared.
        differences: one entry per output.
        completeness_error: largest ``|sum(contributions) + residual - logit|`` of the file's own outputs, in logits;
            None where one of them was left out.
        torch_ms, onnx_ms: median time for one image, in milliseconds, of the unfused PyTorch graph and of the file, each
            with its own default threads.
        own_rounding: None, or, where float32 was not enough to tell, PyTorch float32's difference from float64; then
            ``differences`` are the file's from float64 too.
    """

    runtime: str
    images: int
    differences: dict[str, Difference]
    completeness_error: float | None
    torch_ms: float
    onnx_ms: float
    own_rounding: dict[str, Difference] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each line of a report."""
        rows = []
        for name, d in self.differences.items():
            text = f"largest difference {d.max_abs:.1e} ({d.max_relative:.1e} of the largest value)"
            if d.l2 is not None and d.cosine is not None:
                text += f", L2 {d.l2:.1e}, cosine {d.cosine:.7f}"
            if d.share is not None:
                text += f", {d.share:.2%} of values differ visibly"
            rows.append((name, text))
        if self.completeness_error is not None:
            rows.append(("completeness", f"|sum(contributions) + residual - logit| <= {self.completeness_error:.1e}"))
        rows.append(("one image", f"PyTorch {self.torch_ms:.1f} ms, {self.runtime} {self.onnx_ms:.1f} ms"))
        return rows


def random_images(image_size: tuple[int, int], count: int, seed: int = 0) -> Tensor:
    """Images in [0, 1] with coarse and fine structure, [count, 3, H, W]; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    fine = torch.rand(count, 3, *image_size, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, image_size, mode="bilinear", align_corners=False)
    return (0.7 * smooth + 0.3 * fine).clamp(0, 1)


Reference = Callable[[Tensor, Tensor | None], Mapping[str, Tensor]]
Arrays = Mapping[str, "np.ndarray[Any, Any]"]
Run = tuple[Tensor, Tensor | None, Arrays]


def verify(
    path: Path,
    reference: Reference,
    truth: Callable[[], Reference],
    *,
    classes: int,
    image_size: tuple[int, int],
    multi: bool,
    forward_only: bool,
    images: Tensor | None,
    tolerances: Tolerances,
) -> Parity:
    """Run the file in onnxruntime on the CPU, with its default optimisations, beside PyTorch.

    Random images alone and in a batch of three with mixed class ids (one of them -1), and ``images`` in batches of four.

    A network at B = 2 squares its activations in every layer, and doubles their relative errors: a deep one may be
    further from itself, in PyTorch's own float32, than the tolerances allow. So a file that misses them is compared
    with PyTorch in float64; it must then be within :data:`OWN_ROUNDING` times PyTorch float32's distance from there.

    Args:
        reference: ``(image, class_ids)`` to outputs by name, in float32; ``class_ids`` is None for a forward pass alone.
        truth: makes the same in float64; called only where it is needed.

    Raises:
        ExportError: the file does not run, or an output is further from PyTorch's than the tolerances allow.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise ExportError(f"onnxruntime does not load the file: {error}") from error
    batches = [random_images(image_size, 1, 1), random_images(image_size, 3, 2)]
    if images is not None:
        batches += list(images.split(4))

    runs: list[Run] = []
    for batch in batches:
        ids = None if forward_only else _class_ids(len(batch), classes, multi)
        given = _run(session, batch, ids)
        if ids is not None and "class_used" in given:
            ids = _settle_ties(given["class_used"], ids, reference(batch, ids)["logits"], tolerances)
        runs.append((batch, ids, given))
    worst = _compare(runs, reference, tolerances)
    wrong = _complaints(worst, tolerances)
    own: dict[str, Difference] | None = None
    if wrong:
        exact = truth()
        names = list(worst)
        torch_runs = [(x, ids, _arrays(reference(x, ids), names)) for x, ids, _ in runs]
        own = _compare(torch_runs, exact, tolerances)
        worst = _compare(runs, exact, tolerances)
        wrong = [w for w in _complaints(worst, tolerances, own)]
    if wrong:
        raise ExportError("the file does not compute what PyTorch computes: " + "; ".join(wrong))
    one, one_id = batches[0], (None if forward_only else _class_ids(1, classes, multi))
    return Parity(
        f"onnxruntime {onnxruntime.__version__}",
        sum(map(len, batches)),
        worst,
        _median_ms(lambda: reference(one, one_id)),
        _median_ms(lambda: _run(session, one, one_id)),
        own,
    )


def _arrays(values: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: values[name].numpy() for name in names}


def _compare(runs: Iterable[Run], reference: Reference, tolerances: Tolerances) -> dict[str, Difference]:
    worst: dict[str, Difference] = {}
    for batch, ids, given in runs:
        expected = reference(batch, ids)
        for name, value in given.items():
            found = _difference(name, value, expected[name].numpy(), tolerances)
            worst[name] = _worse(worst.get(name), found)
    return worst


def _class_ids(count: int, classes: int, multi: bool) -> Tensor:
    """Different class ids for a batch, every second one -1 (the top class); [count, 2] for K classes."""
    ids = torch.tensor([-1 if i % 2 else (i * (classes // 2 + 1)) % classes for i in range(count)])
    return torch.stack([ids, torch.full_like(ids, classes - 1)], 1) if multi else ids


def _settle_ties(used: np.ndarray[Any, Any], ids: Tensor, logits: Tensor, tolerances: Tolerances) -> Tensor:
    """The class ids with -1 replaced by the class the file chose, which must be a top class but for rounding."""
    chosen = torch.from_numpy(used)
    asked = torch.where(ids < 0, chosen, ids)
    if not torch.equal(asked, chosen):
        raise ExportError(f"class_used is {used.tolist()} where {ids.tolist()} were asked for")
    columns = chosen.reshape(len(logits), -1)
    gap = logits.amax(1, keepdim=True) - logits.gather(1, columns)
    slack = 2 * tolerances.logits * float(logits.abs().max())
    if bool(((ids < 0).reshape(columns.shape) & (gap > slack)).any()):
        raise ExportError(f"class_used is {used.tolist()} for class ids {ids.tolist()}: not the top classes")
    return chosen


def _run(session: Any, batch: Tensor, ids: Tensor | None) -> dict[str, np.ndarray[Any, Any]]:
    names = [o.name for o in session.get_outputs()]
    feed = {"image": batch.numpy()}
    if ids is not None:
        feed["class_ids"] = ids.numpy()
    try:
        values = session.run(names, feed)
    except Exception as error:
        raise ExportError(f"onnxruntime does not run the file: {error}") from error
    return dict(zip(names, values, strict=True))


def _incompleteness(given: Mapping[str, Any]) -> tuple[float, float]:
    """Largest ``|sum(contributions) + residual - logit|`` of a batch: in logits, and relative to the largest logit."""
    used = given["class_used"].reshape(len(given["logits"]), -1)
    logits = given["logits"].astype(np.float64)
    total = given["contributions"].astype(np.float64).sum((-2, -1)) + given["residual"].astype(np.float64)
    gap = np.abs(total.reshape(used.shape) - np.take_along_axis(logits, used, 1)).max()
    return float(gap), float(gap) / max(float(np.abs(logits).max()), 1e-30)


def _difference(
    name: str, given: Any, expected: Any, tolerances: Tolerances
) -> tuple[Difference, list[tuple[float, float]]]:
    """The difference of a batch, and for W and contributions the relative L2 error and cosine of each image."""
    if given.shape != expected.shape:
        raise ExportError(f"{name} has shape {given.shape}, PyTorch's has {expected.shape}")
    if not np.isfinite(given).all():
        raise ExportError(f"{name} has values that are not finite")
    given, expected = given.astype(np.float64), expected.astype(np.float64)
    gap = np.abs(given - expected)
    max_abs = float(gap.max())
    relative = max_abs / max(float(np.abs(expected).max()), UNDERFLOW)
    if name == "picture":
        return Difference(max_abs, relative, share=float((gap > tolerances.picture).mean())), []
    if name not in ("weights", "contributions"):
        return Difference(max_abs, relative), []
    errors, cosines = [], []
    for mine, true in zip(given.reshape(len(given), -1), expected.reshape(len(given), -1), strict=True):
        norm, other = float(np.linalg.norm(true)), float(np.linalg.norm(mine))
        if max(norm, other) <= UNDERFLOW:  # a dead network explains nothing, and both say so
            errors.append(0.0)
            cosines.append(1.0)
            continue
        norm, other = max(norm, UNDERFLOW), max(other, UNDERFLOW)
        errors.append(float(np.linalg.norm(mine - true)) / norm)
        cosines.append(float(mine @ true) / norm / other)
    return Difference(max_abs, relative, l2=max(errors), cosine=min(cosines)), list(zip(errors, cosines, strict=True))


def _worse(a: Difference | None, b: Difference) -> Difference:
    if a is None:
        return b

    def pick(x: float | None, y: float | None, choose: Callable[[float, float], float]) -> float | None:
        return None if x is None or y is None else choose(x, y)

    return Difference(
        max(a.max_abs, b.max_abs),
        max(a.max_relative, b.max_relative),
        pick(a.l2, b.l2, max),
        pick(a.cosine, b.cosine, min),
        pick(a.share, b.share, max),
    )


def _complaints(
    differences: Mapping[str, Difference], tolerances: Tolerances, own: Mapping[str, Difference] | None = None
) -> list[str]:
    """What is outside the tolerances, which ``own``, PyTorch float32's rounding, may widen."""

    def allowed(limit: float, rounding: float | None) -> float:
        return limit if rounding is None else min(max(limit, OWN_ROUNDING * rounding), MOST_WIDENING * limit)

    wrong = []
    for name, d in differences.items():
        o = own[name] if own is not None else None
        if name == "class_used":
            continue
        if name in ("logits", "residual"):
            # A residual is a sum of terms that nearly cancel, so it gets more than the logits.
            limit = tolerances.logits if name == "logits" else 10 * tolerances.logits
            limit = allowed(limit, o and o.max_relative)
            if not d.max_relative <= limit:
                wrong.append(f"{name} differs by {d.max_relative:.1e} of its largest value (allowed: {limit:.1e})")
        elif name == "picture":
            limit = allowed(tolerances.picture_share, o and o.share)
            if d.share is not None and not d.share <= limit:
                wrong.append(f"picture: {d.share:.2%} of values differ by more than {tolerances.picture:g}")
        elif tolerances.weights is not None:
            limit = allowed(tolerances.weights, o and o.max_relative)
            if not d.max_relative <= limit:
                wrong.append(f"{name} differs by {d.max_relative:.1e} of its largest value (allowed: {limit:.1e})")
        elif d.l2 is not None and d.cosine is not None:
            limit = allowed(tolerances.weights_l2, o and o.l2)
            angle = allowed(1 - tolerances.weights_cosine, None if o is None or o.cosine is None else 1 - o.cosine)
            if not (d.l2 <= limit and 1 - d.cosine <= angle):
                wrong.append(f"{name}: relative L2 error {d.l2:.1e} (allowed: {limit:.1e}), cosine {d.cosine:.6f}")
    return wrong


def _median_ms(function: Callable[[], Any], runs: int = 5) -> float:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 3)

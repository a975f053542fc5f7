"""The comparison of an exported file with PyTorch, part of every export."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bcos_rt.export.errors import ExportError

__all__ = ["Difference", "Parity", "Tolerances", "random_images", "verify"]


@dataclass(frozen=True)
class Tolerances:
    """How far a file may be from PyTorch.

    Attributes:
        logits: largest difference of logits and residual, relative to the largest logit.
        weights: the same of W and contributions, relative to their largest value; None where single switches of ReLU
            or max-pool may flip between two ways of rounding (B = 1, fp16): then the next two count instead.
        weights_l2: relative L2 error of W and contributions, per image.
        weights_cosine: their least cosine.
        picture: largest difference of a colour value, which the share ``picture_share`` of values may miss.
    """

    logits: float = 1e-4
    weights: float | None = 1e-3
    weights_l2: float = 1e-2
    weights_cosine: float = 0.9999
    picture: float = 2e-2
    picture_share: float = 1e-2

    @classmethod
    def of(cls, b: float, precision: str) -> Tolerances:
        """The tolerances for a network with this B exported in this precision."""
        if precision == "fp16":
            return cls(logits=2e-2, weights=None, weights_l2=0.2, weights_cosine=0.98, picture=0.1, picture_share=0.2)
        return cls() if b > 1 else cls(weights=None, picture_share=0.05)


@dataclass(frozen=True)
class Difference:
    """One output against PyTorch's, the worst of all runs.

    Attributes:
        max_abs: largest absolute difference.
        max_relative: the same, relative to the largest value.
        l2, cosine: relative L2 error and cosine, of the worst image (not for logits and residual).
        share: for the picture: share of values that differ by more than its tolerance.
    """

    max_abs: float
    max_relative: float
    l2: float | None = None
    cosine: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Parity:
    """How a file compares with PyTorch.

    Attributes:
        runtime: onnxruntime's version and providers.
        images: how many images were compared.
        differences: one entry per output.
        torch_ms, onnx_ms: median time for one image, in milliseconds, of the unfused PyTorch graph and of the file, each
            with its own default threads.
    """

    runtime: str
    images: int
    differences: dict[str, Difference]
    torch_ms: float
    onnx_ms: float

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


def verify(
    path: Path,
    reference: Reference,
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

    Args:
        reference: ``(image, class_ids)`` to outputs by name; ``class_ids`` is None for a forward pass alone.

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

    worst: dict[str, Difference] = {}
    for batch in batches:
        ids = None if forward_only else _class_ids(len(batch), classes, multi)
        given = _run(session, batch, ids)
        if ids is not None and "class_used" in given:
            ids = _settle_ties(given["class_used"], ids, reference(batch, ids)["logits"], tolerances)
        expected = reference(batch, ids)
        for name, value in given.items():
            found = _difference(name, value, expected[name].numpy(), tolerances)
            worst[name] = _worse(worst.get(name), found)
    _check(worst, tolerances)
    one, one_id = batches[0], (None if forward_only else _class_ids(1, classes, multi))
    return Parity(
        f"onnxruntime {onnxruntime.__version__}",
        sum(map(len, batches)),
        worst,
        _median_ms(lambda: reference(one, one_id)),
        _median_ms(lambda: _run(session, one, one_id)),
    )


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


def _difference(name: str, given: Any, expected: Any, tolerances: Tolerances) -> Difference:
    if given.shape != expected.shape:
        raise ExportError(f"{name} has shape {given.shape}, PyTorch's has {expected.shape}")
    if not np.isfinite(given).all():
        raise ExportError(f"{name} has values that are not finite")
    given, expected = given.astype(np.float64), expected.astype(np.float64)
    gap = np.abs(given - expected)
    largest = float(np.abs(expected).max())
    max_abs = float(gap.max())
    relative = max_abs / largest if largest else (0.0 if max_abs == 0 else float("inf"))
    if name == "picture":
        return Difference(max_abs, relative, share=float((gap > tolerances.picture).mean()))
    if name not in ("weights", "contributions"):
        return Difference(max_abs, relative)
    errors, cosines = [], []
    for mine, true in zip(given.reshape(len(given), -1), expected.reshape(len(given), -1), strict=True):
        norm, other = float(np.linalg.norm(true)), float(np.linalg.norm(mine))
        if norm == 0 or other == 0:  # a dead network explains nothing: both must say so
            errors.append(0.0 if norm == other else float("inf"))
            cosines.append(1.0 if norm == other else 0.0)
            continue
        errors.append(float(np.linalg.norm(mine - true)) / norm)
        cosines.append(float(mine @ true) / norm / other)
    return Difference(max_abs, relative, l2=max(errors), cosine=min(cosines))


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


def _check(differences: Mapping[str, Difference], tolerances: Tolerances) -> None:
    wrong = []
    for name, d in differences.items():
        if name == "class_used":
            continue
        if name in ("logits", "residual"):
            # A residual is a sum of many terms that nearly cancel, so it is held to the size of W's tolerance.
            limit = tolerances.logits if name == "logits" else 10 * tolerances.logits
            if not d.max_relative <= limit:
                wrong.append(f"{name} differs by {d.max_relative:.1e} of its largest value (allowed: {limit:g})")
        elif name == "picture":
            if d.share is not None and not d.share <= tolerances.picture_share:
                wrong.append(f"picture: {d.share:.2%} of values differ by more than {tolerances.picture:g}")
        elif tolerances.weights is not None:
            if not d.max_relative <= tolerances.weights:
                wrong.append(f"{name} differs by {d.max_relative:.1e} of its largest value ({tolerances.weights:g})")
        elif d.l2 is not None and d.cosine is not None:
            if not (d.l2 <= tolerances.weights_l2 and d.cosine >= tolerances.weights_cosine):
                wrong.append(f"{name}: relative L2 error {d.l2:.1e}, cosine {d.cosine:.6f}")
    if wrong:
        raise ExportError("the file does not compute what PyTorch computes: " + "; ".join(wrong))


def _median_ms(function: Callable[[], Any], runs: int = 5) -> float:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 3)

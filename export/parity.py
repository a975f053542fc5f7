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
        logits: largest difference of the logits, relative to the largest logit; the residual, a sum of terms that
            nearly cancel, may differ by ten times as much, and where switches may flip by ``flipped_l2``.
        weights: largest difference of W and contributions, relative to their largest value; None where single switches
            of ReLU or max-pool may flip between two ways of rounding (B = 1, fp16): then the next four count instead.
        weights_l2, weights_cosine: relative L2 error and cosine of W and contributions, per image.
        flipped_l2, flipped_cosine: what fewer than half of the images may have instead. A switch that flips moves one
            image's W by up to a few per cent, and moves float32 PyTorch from float64 as far; a wrong graph moves all.
        completeness: largest ``|sum(contributions) + residual - logit|`` of the file by itself, relative to the largest
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
                completeness=1e-2,
                picture=0.1,
                picture_share=0.2,
            )
        return cls() if b > 1 else cls(weights=None, picture_share=0.05)


@dataclass(frozen=True)
class Difference:
    """One output against PyTorch's, over all runs.

    Attributes:
        max_abs: largest absolute difference.
        max_relative: the same, relative to the largest value; of the residual what is beyond the logits' tolerance.
        l2, cosine: W and contributions: relative L2 error and cosine of the worst image.
        median_l2, median_cosine: the same of the median image.
        share: picture: share of values that differ by more than its tolerance.
    """

    max_abs: float
    max_relative: float
    l2: float | None = None
    cosine: float | None = None
    median_l2: float | None = None
    median_cosine: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Parity:
    """How a file compares with PyTorch.

    Attributes:
        runtime: onnxruntime's version.
        images: how many images were compared.
        differences: one entry per output.
        completeness_error: largest ``|sum(contributions) + residual - logit|`` of the file's own outputs, in logits;
            None where one of them was left out.
        torch_ms, onnx_ms: median time for one image, in milliseconds, of the unfused PyTorch graph and of the file,
            each with its own default threads.
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
            if name == "class_used":
                continue
            text = f"largest difference {d.max_abs:.1e} ({d.max_relative:.1e} of the largest value)"
            if d.l2 is not None and d.cosine is not None:
                text += f", L2 {d.l2:.1e}, cosine {d.cosine:.7f}"
            if d.share is not None:
                text += f", {d.share:.2%} of values differ visibly"
            if self.own_rounding is not None:
                text += f"; from float64, where PyTorch float32 differs by {self.own_rounding[name].max_relative:.1e}"
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
Run = tuple[Tensor, Tensor | None, Arrays]  # images, class ids, the outputs to compare


def verify(
    path: Path,
    reference: Reference,
    truth: Callable[[], Reference],
    *,
    image_size: tuple[int, int],
    targets: Callable[[int], Tensor] | None,
    images: Tensor | None,
    tolerances: Tolerances,
) -> Parity:
    """Run the file in onnxruntime on the CPU, with its default optimisations, beside PyTorch.

    Random images alone and in a batch of three with mixed class ids (one of them -1), and ``images`` by fours.

    A network at B = 2 squares its activations in every layer, which doubles their relative errors: a deep one may be
    further from itself, in PyTorch's own float32, than the tolerances allow. So a file that misses them is compared
    with PyTorch in float64; it must then be within :data:`OWN_ROUNDING` times PyTorch float32's distance from there.

    Args:
        reference: ``(image, targets)`` to outputs by name, in float32; targets are None for a forward pass alone.
        truth: makes the same in float64; called only where it is needed.
        targets: what to explain of so many images, :func:`some_class_ids` or :func:`some_texts`; None for a forward
            pass alone.

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
        batches += [images[i : i + 4] for i in range(0, len(images), 4)]

    runs: list[Run] = []
    expected: list[Mapping[str, Tensor]] = []
    for batch in batches:
        ids = None if targets is None else targets(len(batch))
        given, wanted = _run(session, batch, ids), reference(batch, ids)
        if ids is not None and "class_used" in given:
            ids = _settle_ties(given["class_used"], ids, wanted["logits"], tolerances)
            if not torch.equal(ids, wanted["class_used"]):
                wanted = reference(batch, ids)
        runs.append((batch, ids, given))
        expected.append(wanted)
    incomplete, wrong = _completeness(runs, tolerances)
    differences = _compare(runs, expected, tolerances)
    own: dict[str, Difference] | None = None
    if _complaints(differences, tolerances):
        exact = truth()
        exactly = [exact(batch, ids) for batch, ids, _ in runs]
        in_torch = [
            (batch, ids, {name: wanted[name].numpy() for name in differences})
            for (batch, ids, _), wanted in zip(runs, expected, strict=True)
        ]
        own = _compare(in_torch, exactly, tolerances)
        differences = _compare(runs, exactly, tolerances)
        wrong += _complaints(differences, tolerances, own)
    if wrong:
        raise ExportError("the file does not compute what PyTorch computes: " + "; ".join(wrong))
    one, one_id = batches[0], (None if targets is None else targets(1))
    return Parity(
        f"onnxruntime {onnxruntime.__version__}",
        sum(map(len, batches)),
        differences,
        incomplete,
        _median_ms(lambda: reference(one, one_id)),
        _median_ms(lambda: _run(session, one, one_id)),
        own,
    )


def some_class_ids(count: int, classes: int, multi: bool) -> Tensor:
    """Different class ids for a batch, every second one -1 (the top class); [count, 2] for K classes."""
    ids = torch.tensor([-1 if i % 2 else (i * (classes // 2 + 1)) % classes for i in range(count)])
    return torch.stack([ids, torch.full_like(ids, classes - 1)], 1) if multi else ids


def some_texts(count: int, width: int, multi: bool, seed: int = 0) -> Tensor:
    """Different embeddings for a batch, [count, width], of different norms; [count, 2, width] for K texts."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(count, 2, width, generator=generator) * torch.tensor([1.0, 3.0])[:, None]
    return texts if multi else texts[:, 1]


def _settle_ties(used: np.ndarray[Any, Any], ids: Tensor, logits: Tensor, tolerances: Tolerances) -> Tensor:
    """The class ids with -1 replaced by the class the file chose, which must be a top class but for rounding."""
    chosen = torch.from_numpy(used)
    asked = torch.where(ids < 0, chosen, ids)
    if not torch.equal(asked, chosen):
        raise ExportError(f"class_used is {used.tolist()} where {ids.tolist()} were asked for")
    columns = chosen.reshape(len(logits), -1)
    gap = logits.amax(1, keepdim=True) - logits.gather(1, columns)
    slack = 2 * MOST_WIDENING * tolerances.logits * float(logits.abs().max())
    if bool(((ids < 0).reshape(columns.shape) & (gap > slack)).any()):
        raise ExportError(f"class_used is {used.tolist()} for class ids {ids.tolist()}: not the top classes")
    return chosen


def _run(session: Any, batch: Tensor, ids: Tensor | None) -> dict[str, np.ndarray[Any, Any]]:
    names = [o.name for o in session.get_outputs()]
    feed = {"image": batch.numpy()}
    if ids is not None:
        feed["text_embedding" if ids.is_floating_point() else "class_ids"] = ids.numpy()
    try:
        values = session.run(names, feed)
    except Exception as error:
        raise ExportError(f"onnxruntime does not run the file: {error}") from error
    return dict(zip(names, values, strict=True))


class _Tally:
    """The difference of one output, gathered over batches."""

    def __init__(self, name: str, tolerances: Tolerances) -> None:
        self.name, self.visible = name, tolerances.picture
        self.max_abs = self.max_relative = 0.0
        self.share: list[float] = []
        self.l2: list[float] = []
        self.cosine: list[float] = []

    def add(self, given: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], rounding: float) -> None:
        """``rounding``: what a difference may be in any case."""
        if given.shape != expected.shape:
            raise ExportError(f"{self.name} has shape {given.shape}, PyTorch's has {expected.shape}")
        if not np.isfinite(given).all():
            raise ExportError(f"{self.name} has values that are not finite")
        given, expected = given.astype(np.float64), expected.astype(np.float64)
        gap = np.abs(given - expected)
        self.max_abs = max(self.max_abs, float(gap.max()))
        beyond = max(float(gap.max()) - rounding, 0.0)
        self.max_relative = max(self.max_relative, beyond / max(float(np.abs(expected).max()), UNDERFLOW))
        if self.name == "picture":
            self.share.append(float((gap > self.visible).mean()))
        if self.name in ("weights", "contributions"):
            for mine, true in zip(given.reshape(len(given), -1), expected.reshape(len(given), -1), strict=True):
                norms = [float(np.linalg.norm(v)) for v in (mine, true)]
                dead = max(norms) <= UNDERFLOW  # a network that explains nothing, and both say so
                mine_norm, true_norm = (max(n, UNDERFLOW) for n in norms)
                self.l2.append(0.0 if dead else float(np.linalg.norm(mine - true)) / true_norm)
                self.cosine.append(1.0 if dead else float(mine @ true) / mine_norm / true_norm)

    def difference(self) -> Difference:
        share = max(self.share) if self.share else None
        if not self.l2:
            return Difference(self.max_abs, self.max_relative, share=share)
        return Difference(
            self.max_abs,
            self.max_relative,
            l2=max(self.l2),
            cosine=min(self.cosine),
            median_l2=statistics.median_high(self.l2),
            median_cosine=statistics.median_low(self.cosine),
        )


def _compare(
    runs: Iterable[Run], expected: Iterable[Mapping[str, Tensor]], tolerances: Tolerances
) -> dict[str, Difference]:
    tallies: dict[str, _Tally] = {}
    for (_, _, given), wanted in zip(runs, expected, strict=True):
        # A residual is part of a logit, and may be nothing but that logit's rounding.
        rounding = tolerances.logits * float(wanted["logits"].abs().max())
        for name, value in given.items():
            mine = rounding if name == "residual" else 0.0
            tallies.setdefault(name, _Tally(name, tolerances)).add(value, wanted[name].numpy(), mine)
    return {name: tally.difference() for name, tally in tallies.items()}


def _completeness(runs: Iterable[Run], tolerances: Tolerances) -> tuple[float | None, list[str]]:
    """Largest ``|sum(contributions) + residual - logit|`` in logits, and what is wrong with it."""
    worst: float | None = None
    wrong = []
    for _, ids, given in runs:
        if ids is None or not {"logits", "contributions", "residual"} <= set(given):
            continue
        texts = ids.is_floating_point()
        if not texts and bool((ids < 0).any()):
            continue
        logits = given["logits"].astype(np.float64)
        total = given["contributions"].astype(np.float64).sum((-2, -1)) + given["residual"].astype(np.float64)
        explained = logits if texts else np.take_along_axis(logits, ids.numpy().reshape(len(logits), -1), 1)
        gap = float(np.abs(total.reshape(explained.shape) - explained).max())
        worst = gap if worst is None else max(worst, gap)
        if not gap <= tolerances.completeness * max(float(np.abs(logits).max()), UNDERFLOW):
            wrong.append(f"contributions and residual miss their logit by {gap:.1e}")
    return worst, wrong


def _complaints(
    differences: Mapping[str, Difference], tolerances: Tolerances, own: Mapping[str, Difference] | None = None
) -> list[str]:
    """What is outside the tolerances, which ``own``, PyTorch float32's rounding, may widen."""
    wrong = []
    for name, d in differences.items():
        rounding = Difference(0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0) if own is None else own[name]
        if name in ("logits", "residual"):
            limit = tolerances.logits * (1 if name == "logits" else 10)
            if name == "residual" and tolerances.weights is None:
                limit = tolerances.flipped_l2  # it moves with W where a switch flips; completeness holds it
            limit = _allowed(limit, rounding.max_relative)
            if not d.max_relative <= limit:
                wrong.append(f"{name} differs by {d.max_relative:.1e} of its largest value (allowed: {limit:.1e})")
        elif name == "picture" and d.share is not None:
            limit = _allowed(tolerances.picture_share, rounding.share)
            if not d.share <= limit:
                wrong.append(f"picture: {d.share:.2%} of values differ by more than {tolerances.picture:g}")
        elif name in ("weights", "contributions") and tolerances.weights is not None:
            limit = _allowed(tolerances.weights, rounding.max_relative)
            if not d.max_relative <= limit:
                wrong.append(f"{name} differs by {d.max_relative:.1e} of its largest value (allowed: {limit:.1e})")
        elif name in ("weights", "contributions"):
            # All images within the tolerance; after float64 has been asked, half of them, and no other far from it.
            typical = (d.l2, d.cosine) if own is None else (d.median_l2, d.median_cosine)
            wrong += _turned(name, typical, tolerances.weights_l2, tolerances.weights_cosine, rounding)
            if not wrong:
                worst = (d.l2, d.cosine)
                wrong += _turned(name, worst, tolerances.flipped_l2, tolerances.flipped_cosine, rounding)
    return wrong


def _allowed(limit: float, rounding: float | None) -> float:
    return min(max(limit, OWN_ROUNDING * (rounding or 0.0)), MOST_WIDENING * limit)


def _turned(
    name: str, found: tuple[float | None, float | None], l2: float, cosine: float, rounding: Difference
) -> list[str]:
    if found[0] is None or found[1] is None:
        return []
    own_turn = 0.0 if rounding.cosine is None else 1 - rounding.cosine
    most, turn = _allowed(l2, rounding.l2), _allowed(1 - cosine, own_turn)
    if found[0] <= most and 1 - found[1] <= turn:
        return []
    return [f"{name}: relative L2 error {found[0]:.1e} (allowed: {most:.1e}), cosine {found[1]:.6f}"]


def _median_ms(function: Callable[[], Any], runs: int = 3) -> float:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 3)

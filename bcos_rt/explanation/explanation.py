"""What :func:`bcos_rt.explain` returns."""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.explanation.picture import colour_picture
from bcos_rt.figures import without_math
from bcos_rt.files import ordinary_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Explanation"]


@dataclass(frozen=True)
class Explanation:
    """The dynamic linear summary of a network on N images, for one class each or K classes each.

    ``logits[target] = (weights * images).sum() + residual`` exactly, up to rounding; see
    :meth:`completeness_error`.

    Attributes:
        logits: [N, classes].
        target: [N] or [N, K] int64, the classes explained.
        weights: [N(, K), 6, H, W], W: what the encoded image is multiplied with ([N(, K), 3, H, W] for a network
            without the six-channel encoding).
        contributions: [N(, K), H, W], ``sum_c W_c x_c`` per pixel, in logits.
        residual: [N(, K)], what does not come from pixels: biases, input mean, position embeddings, logit bias.
        images: [N, 6, H, W], the encoded images ``[x, 1 - x]`` in [0, 1].
        class_names: one name per class, or None.
        label: what to call it in pictures, e.g. "initial explanation" for a network that was not fine-tuned.
        of: "classes", or "texts": then logits are scores of texts (no softmax makes probabilities of them), and
            ``class_names`` the prompts.
    """

    logits: Tensor
    target: Tensor
    weights: Tensor
    contributions: Tensor
    residual: Tensor
    images: Tensor
    class_names: tuple[str, ...] | None = None
    label: str = "explanation"
    of: Literal["classes", "texts"] = "classes"

    def __len__(self) -> int:
        return self.logits.shape[0]

    def target_logit(self) -> Tensor:
        """The logits of the explained classes, [N] or [N, K]."""
        if self.target.ndim == 2:
            return self.logits.gather(1, self.target)
        return self.logits.gather(1, self.target[:, None])[:, 0]

    def completeness_error(self) -> Tensor:
        """``|sum(contributions) + residual - logit|`` in logits, [N] or [N, K]; the sum is taken in float64."""
        total = self.contributions.double().sum((-2, -1)) + self.residual.double()
        return (total - self.target_logit().double()).abs()

    def picture(self, smooth: int = 15, alpha_percentile: float = 99.5) -> Tensor:
        """The colour explanation, [N(, K), H, W, 4] in [0, 1]; see :func:`colour_picture`."""
        if self.weights.ndim == 4:
            return colour_picture(self.images, self.weights, smooth, alpha_percentile)
        n, k = self.weights.shape[:2]
        rgba = colour_picture(self.images.repeat_interleave(k, 0), self.weights.flatten(0, 1), smooth, alpha_percentile)
        return rgba.reshape(n, k, *rgba.shape[1:])

    def class_name(self, index: int) -> str:
        """The class's name or the prompt, or ``class 7`` or ``text 7`` where there are no names."""
        if self.class_names is not None:
            return self.class_names[index]
        return f"text {index}" if self.of == "texts" else f"class {index}"

    def plot(self, indices: Sequence[int] | None = None, smooth: int = 15, alpha_percentile: float = 99.5) -> Figure:
        """A matplotlib figure: per image and class the image, the colour explanation and the contribution map.

        Args:
            indices: which of the N images; default all (a figure of many images is slow and tall).
            smooth, alpha_percentile: as for :meth:`picture`.

        Contribution maps share one symmetric scale per row: red speaks for the class, blue against it.

        Raises:
            InvalidArgumentError, InvalidTypeError: ``indices`` of no image, or that are no integers.
        """
        from matplotlib.figure import Figure

        chosen = self._chosen(indices)
        single = self.target.ndim == 1
        targets = (self.target[:, None] if single else self.target).cpu()
        rgba = self.picture(smooth, alpha_percentile) if self.weights.shape[-3] == 6 else None
        k = targets.shape[1]
        columns = 3 if rgba is not None else 2
        figure = Figure(figsize=(3.4 * columns + 0.6, 3.5 * len(chosen) * k), layout="constrained")
        axes = figure.subplots(len(chosen) * k, columns, squeeze=False)
        logits = self.target_logit().cpu().reshape(len(self), k)
        probabilities = torch.softmax(self.logits.double(), 1).cpu()
        for row, (i, j) in enumerate((i, j) for i in chosen for j in range(k)):
            image = self.images[i, :3].permute(1, 2, 0).clamp(0, 1).cpu().float().numpy()
            contributions = (self.contributions[i] if single else self.contributions[i, j]).cpu().float().numpy()
            index = int(targets[i, j])
            axes[row, 0].imshow(image)
            best = int(self.logits[i].argmax())
            if self.of == "texts":
                said = f"fits best: {_short(self.class_name(best))}"
            else:
                said = f"predicted: {_short(self.class_name(best))} ({probabilities[i, best]:.0%})"
            axes[row, 0].set_title(f"image\n{said}")
            if rgba is not None:
                picture = (rgba[i] if single else rgba[i, j]).cpu().float().numpy()
                axes[row, 1].imshow(np.ones_like(image))
                axes[row, 1].imshow(picture)
                axes[row, 1].set_title(f"{self.label}\nof “{_short(self.class_name(index))}”")
            axis = axes[row, -1]
            limit = float(np.percentile(np.abs(contributions), 99.5)) or 1.0
            mesh = axis.imshow(contributions, cmap="bwr", vmin=-limit, vmax=limit)
            value = f"score {float(logits[i, j]):.3f}" if self.of == "texts" else f"logit {float(logits[i, j]):.2f}"
            axis.set_title(f"contributions to {value}\n(red: for, blue: against)")
            figure.colorbar(mesh, ax=axis, shrink=0.8, format="%.3g")
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.title.set_fontsize(10)
        return without_math(figure)

    def _chosen(self, indices: Sequence[int] | None) -> list[int]:
        """Which of the images, by numbers from 0 or, as in Python, from -1."""
        if indices is None:
            chosen = list(range(len(self)))
        else:
            if not isinstance(indices, Sequence | np.ndarray | Tensor) or isinstance(indices, str):
                raise InvalidTypeError("indices", repr(indices), "a sequence of integers, or None")
            try:
                chosen = [operator.index(i) for i in indices if not isinstance(i, bool | np.bool_)]
            except TypeError as error:
                raise InvalidTypeError("indices", repr(indices), "a sequence of integers, or None") from error
            if len(chosen) != len(indices):
                raise InvalidTypeError("indices", repr(indices), "a sequence of integers, not of truth values")
            for i in chosen:
                if not -len(self) <= i < len(self):
                    raise InvalidArgumentError("indices", i, f"from {-len(self)} to {len(self) - 1}")
        if not chosen:
            raise InvalidArgumentError("indices", "no image", "at least one image to plot")
        return chosen

    def save(self, path: str | os.PathLike[str], indices: Sequence[int] | None = None, dpi: int = 110) -> Path:
        """Write :meth:`plot` as a picture (.png, .svg, .pdf, .jpg), or the numbers as ``.npz``; atomically.

        Args:
            path: the file; its folder is there.
            indices: which of the N images; default all.
            dpi: pixels an inch of a picture.

        Half-precision numbers are written as float32.

        Raises:
            InvalidArgumentError: an unknown suffix, a folder that does not exist or cannot be written, no such image, a
                ``dpi`` of 0 or less.
            InvalidTypeError: ``indices`` that are no integers.
        """
        path = Path(path)
        chosen = self._chosen(indices)
        if isinstance(dpi, bool) or not isinstance(dpi, int | float) or not dpi > 0:
            raise InvalidArgumentError("dpi", repr(dpi), "a number > 0")
        suffixes = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".npz")
        if path.suffix.lower() not in suffixes:
            raise InvalidArgumentError("path", repr(str(path)), "a file name ending in " + ", ".join(suffixes))
        if path.is_dir():
            raise InvalidArgumentError("path", f"{str(path)!r}, a directory", "a file name")
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        except OSError as error:
            raise InvalidArgumentError("path", f"{str(path)!r} ({error.strerror})", "a writable folder") from error
        try:
            with os.fdopen(handle, "wb") as file:
                if path.suffix.lower() == ".npz":
                    arrays = {
                        name: _as_numpy(getattr(self, name)[chosen])
                        for name in ("logits", "target", "weights", "contributions", "residual", "images")
                    }
                    np.savez_compressed(file, **arrays)
                else:
                    self.plot(chosen).savefig(file, dpi=dpi, format=path.suffix[1:].lower())
            ordinary_mode(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


def _as_numpy(values: Tensor) -> Any:
    half = values.dtype in (torch.float16, torch.bfloat16)
    return (values.float() if half else values).cpu().numpy()


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"

"""Plots of the tables: time by contender, and how cost grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bcos_rt.evaluation.saving import save_figure

__all__ = ["bars", "growth"]

Row = Mapping[str, str]
# Distinct without colour vision too (Okabe and Ito): ours, published, plain.
OURS, PUBLISHED, PLAIN = "#0072B2", "#D55E00", "#999999"


def _colour(contender: str) -> str:
    return PUBLISHED if contender.startswith("published") else PLAIN if contender.startswith("plain") else OURS


def bars(rows: Sequence[Row], path: Path, threads: int, title: str) -> None:
    """One panel a network and batch: every contender's median with its quartiles; forward pale, explanation full."""
    mine = [r for r in rows if int(r["threads"]) == threads and r["status"] == "ok"]
    cells = list(dict.fromkeys((r["network"], int(r["batch"])) for r in mine))
    networks, batches = list(dict.fromkeys(n for n, _ in cells)), sorted({b for _, b in cells})
    shape = (max(1, len(networks)), max(1, len(batches)))
    figure, axes = plt.subplots(*shape, figsize=(6.5 * shape[1], 4.2 * shape[0]), squeeze=False)
    for i, network in enumerate(networks):
        for j, batch in enumerate(batches):
            here = [r for r in mine if (r["network"], int(r["batch"])) == (network, batch)]
            here.sort(key=lambda r: (r["mode"], -float(r["median_ms"])))
            axis = axes[i, j]
            if not here:
                axis.set_axis_off()
                continue
            middle = [float(r["median_ms"]) for r in here]
            low = [m - float(r["q1_ms"]) for m, r in zip(middle, here, strict=True)]
            high = [float(r["q3_ms"]) - m for m, r in zip(middle, here, strict=True)]
            bar = axis.barh(
                [f"{r['contender']}, {r['mode']}" for r in here], middle, xerr=(low, high),
                color=[_colour(r["contender"]) for r in here],
            )  # fmt: skip
            for patch, r in zip(bar, here, strict=True):
                patch.set_alpha(0.5 if r["mode"] == "forward" else 1.0)
            axis.bar_label(bar, labels=[f" {m:.1f}" for m in middle], fontsize=7)
            axis.set_title(f"{network}, batch {batch}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
            axis.set_xlabel("ms")
            axis.tick_params(labelsize=7)
            axis.margins(x=0.12)
    whose = (("ours", OURS), ("published", PUBLISHED), ("plain", PLAIN))
    legend = [Patch(facecolor=colour, label=name) for name, colour in whose]
    legend += [Patch(facecolor="black", alpha=alpha, label=name) for name, alpha in (("forward", 0.5), ("explain", 1))]
    axes[0, -1].legend(handles=legend, fontsize=7, loc="upper right")
    _save(figure, path, title)


def growth(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time over batch, image side and classes per image: one line a contender and mode."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8))
    panels = (
        ("batch", {"size": 224, "classes": 1}),
        ("size", {"batch": 1, "classes": 1}),
        ("classes", {"batch": 1, "size": 224}),
    )
    for axis, (column, fixed) in zip(axes, panels, strict=True):
        here = [r for r in rows if r["status"] == "ok" and all(int(r[k]) == v for k, v in fixed.items())]
        for contender, mode in dict.fromkeys((r["contender"], r["mode"]) for r in here):
            line = sorted(
                (int(r[column]), float(r["median_ms"]))
                for r in here
                if (r["contender"], r["mode"]) == (contender, mode)
            )
            style = "--" if mode == "forward" else "-"
            marker = "o" if contender != "plain_onnx" else "s"
            axis.plot(
                *zip(*line, strict=True), style, marker=marker, color=_colour(contender), label=f"{contender}, {mode}"
            )
        axis.set_xlabel(
            {"batch": "images", "size": "side of an image, pixels", "classes": "classes of each image"}[column]
        )
        axis.set_ylabel("ms")
        axis.set_ylim(bottom=0)
        if here:
            axis.legend(fontsize=7, handlelength=4)
    _save(figure, path, title)


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    save_figure(figure, path)
    plt.close(figure)

"""Plots of ``layers.csv``: sums per network, and every layer against the measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["roofline_plot", "totals_plot"]

# Distinct without colour vision too (Okabe and Ito); one contender keeps its colour in all plots.
COLOURS = {
    "bcos_rt": "#0072B2",
    "bcos_rt+multiplier": "#56B4E9",
    "plain": "#999999",
    "plain_fused": "#444444",
    "cudnn_graph": "#009E73",
    "cudnn_graph+norm": "#F0E442",
    "published": "#D55E00",
    "published_compiled": "#CC79A7",
}
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
LABELS = {
    "bcos_rt": "bcos-rt",
    "bcos_rt+multiplier": "bcos-rt, multiplier stored",
    "plain": "no B-cos: conv, BatchNorm, ReLU (cuDNN, eager)",
    "plain_fused": "no B-cos: cuDNN's fused conv + ReLU",
    "cudnn_graph": "B-cos fused by cuDNN, norm given",
    "cudnn_graph+norm": "B-cos fused by cuDNN, norm by PyTorch",
    "published": "published layer, eager",
    "published_compiled": "published layer, torch.compile",
}


def totals_plot(totals: Sequence[Mapping[str, Any]], path: Path, gpu: str, dry_run: bool = False) -> None:
    """One panel per network and mode: each contender's time relative to ours, over the layers that both have."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in totals:
        if row["contender"] != "bcos_rt":
            groups.setdefault((row["model"], row["dtype"], row["mode"]), []).append(row)
    figure, axes = plt.subplots(max(1, len(groups)), 1, figsize=(8, 0.9 + 2.1 * max(1, len(groups))), squeeze=False)
    for axis, ((model, dtype, mode), rows) in zip(axes[:, 0], groups.items(), strict=False):
        rows = sorted(rows, key=lambda r: r["times_bcos_rt"])
        axis.barh(
            [f"{LABELS.get(r['contender'], r['contender'])} ({r['layers']} layers)" for r in rows],
            [r["times_bcos_rt"] for r in rows],
            color=[COLOURS.get(r["contender"], "#777777") for r in rows],
        )
        axis.axvline(1.0, color=COLOURS["bcos_rt"], linewidth=2)
        axis.set_title(f"{model}, {dtype}, {mode}", fontsize=10)
        axis.tick_params(labelsize=8)
        for i, row in enumerate(rows):
            axis.text(row["times_bcos_rt"], i, f" {row['times_bcos_rt']:.2f}", va="center", fontsize=8, bbox=BEHIND)
        axis.margins(x=0.12)
    axes[-1, 0].set_xlabel("time relative to bcos-rt on the same layers (1: equal, more: slower)", fontsize=8)
    if not groups:
        axes[0, 0].text(0.5, 0.5, "nothing was measured", ha="center")
    _finish(figure, path, gpu, dry_run)


def roofline_plot(
    rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any], path: Path, gpu: str, dry_run: bool = False
) -> None:
    """Every forward measurement: TFLOP/s over FLOP per byte, under the measured copy and matrix-product ceilings."""
    figure, axis = plt.subplots(figsize=(8, 5.5))
    measured = [r for r in rows if r["status"] == "ok" and r["mode"] == "forward" and r["tflops"] not in (None, "")]
    for name, colour in COLOURS.items():
        mine = [r for r in measured if r["contender"] == name]
        if mine:
            axis.scatter(
                [float(r["flops"]) / float(r["bytes"]) for r in mine], [float(r["tflops"]) for r in mine],
                s=16, color=colour, label=LABELS[name], alpha=0.8,
            )  # fmt: skip
    copy = ceilings.get("copy_gbps")
    for dtype, peak in ceilings.get("gemm_tflops", {}).items():
        if measured and copy and peak and not dry_run:
            low, high = (f(float(r["flops"]) / float(r["bytes"]) for r in measured) for f in (min, max))
            knee = peak * 1e3 / copy
            points = sorted({low / 1.5, knee, high * 1.5})
            axis.plot(
                points, [min(peak, p * copy / 1e3) for p in points], color="black", linewidth=1,
                label=f"measured: {copy:.0f} GB/s, {peak:.0f} TFLOP/s ({dtype})",
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte that must be moved")
    axis.set_ylabel("TFLOP/s")
    axis.set_title("Forward, one point per layer shape")
    if measured:
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, "nothing was measured", ha="center", transform=axis.transAxes)
    _finish(figure, path, gpu, dry_run)


def _finish(figure: Figure, path: Path, gpu: str, dry_run: bool) -> None:
    figure.suptitle(f"dry run on a CPU: no times ({gpu})" if dry_run else gpu, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)
    plt.close(figure)

"""The table of `docs/microbenchmarks.md`, from the rows that `bcos-rt bench kernels` measured.

    python -m bench.kernels [bench/results/kernels/cpu.csv]

Medians over the rows of an op, of the speedup over PyTorch also the least and the greatest.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bcos_rt.files import read_rows
from bench.logs import ROOT

__all__ = ["FILE", "table"]

FILE = ROOT / "bench" / "results" / "kernels" / "cpu.csv"
_HEAD = "| op | rows |" + "".join(
    f" {dtype}: GB/s, of copy | GFLOP/s, of GEMM | speedup{over} |"
    for dtype, over in (("fp32", " over PyTorch"), ("bf16", ""))
)


def _cells(rows: Sequence[dict[str, str]]) -> list[str]:
    numbers = {
        name: [float(row[name]) for row in rows] for name in ("gb_s", "share_copy", "gflop_s", "share_gemm", "speedup")
    }
    middle = {name: statistics.median(values) for name, values in numbers.items()}
    speedup = f"{middle['speedup']:.1f}"
    if len(rows) > 1:
        speedup += f" ({min(numbers['speedup']):.1f} to {max(numbers['speedup']):.1f})"
    return [
        f"{middle['gb_s']:.3g}, {100 * middle['share_copy']:.0f} %",
        f"{middle['gflop_s']:.3g}, {100 * middle['share_gemm']:.0f} %",
        speedup,
    ]


def table(file: Path = FILE) -> str:
    """A Markdown table, the ops in the file's order."""
    rows = read_rows(file)
    out = [_HEAD, "|---" * (_HEAD.count("|") - 1) + "|"]
    for op in dict.fromkeys(row["op"] for row in rows):
        cells: list[str] = []
        for dtype in ("fp32", "bf16"):
            mine = [row for row in rows if row["op"] == op and row["dtype"] == dtype]
            cells += _cells(mine)
        out.append("| " + " | ".join([f"`{op}`", str(len(mine)), *cells]) + " |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE))

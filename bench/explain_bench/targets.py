"""The targets of the fused engine, from the tables alone: each figure's value in every setting, and whether it is met.

Ratios of times are taken round by round between contenders of one session; a figure is met only where every network
that was measured meets it. "Best plain" is the fastest plain forward pass of the same session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bcos_rt.benchmark.comparison import OK, paired_ratio
from bcos_rt.benchmark.contender import EXPLAIN, FORWARD, TRAIN
from bench.explain_bench.networks import CLIP, NETWORKS, TRANSFORMERS

__all__ = ["Figure", "best_plain", "figures", "markdown"]

Row = Mapping[str, str]
# Transformers and CLIP's tower have targets of their own where two numbers stand.
PLAIN = ("plain_eager", "plain_compiled", "plain_onnx")


@dataclass(frozen=True)
class Figure:
    """One figure in one setting.

    Attributes:
        figure, network, batch: which.
        value: ours over theirs; None where a row it needs is missing or failed.
        low, high: quartiles of the rounds' ratios; the value, or None, where there are no rounds (memory; cosines).
        target: at most this (for "cosine", at least).
        met: None where there is no value.
        note: which rows were compared.
    """

    figure: str
    network: str
    batch: int
    value: float | None
    low: float | None
    high: float | None
    target: float
    met: bool | None
    note: str


class _Cell:
    """The rows of one network, batch and number of threads."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {(r["contender"], r["mode"]): r for r in rows if r["status"] == OK and r["round_ms"]}

    def get(self, contender: str, mode: str) -> Row | None:
        return self.rows.get((contender, mode))

    def best(self, contenders: Iterable[str], mode: str) -> Row | None:
        found = [r for c in contenders if (r := self.get(c, mode)) is not None]
        return min(found, key=lambda r: float(r["median_ms"]), default=None)


def best_plain(rows: Sequence[Row]) -> Row | None:
    """The fastest plain forward pass among rows of one session."""
    return _Cell(rows).best(PLAIN, FORWARD)


def _rounds(row: Row) -> list[float]:
    return [float(v) for v in row["round_ms"].split()]


def _times(ours: Row | None, theirs: Row | None) -> tuple[float, float, float] | None:
    if ours is None or theirs is None or ours["session"] != theirs["session"]:
        return None
    low, middle, high = paired_ratio(_rounds(ours), _rounds(theirs))
    return middle, low, high


def _column(name: str) -> Callable[[Row | None, Row | None], tuple[float, float, float] | None]:
    def ratio(ours: Row | None, theirs: Row | None) -> tuple[float, float, float] | None:
        if ours is None or theirs is None or not ours[name] or not theirs[name] or float(theirs[name]) <= 0:
            return None
        value = float(ours[name]) / float(theirs[name])
        return value, value, value

    return ratio


def figures(
    main: Sequence[Row],
    training: Sequence[Row] = (),
    photographs: Sequence[Row] = (),
    *,
    ours: str = "native",
    threads: int = 2,
    size: int = 224,
) -> list[Figure]:
    """Every figure of the table in every setting that was measured.

    Args:
        main, training: rows of ``main.csv`` and ``training.csv``.
        photographs: rows of ``photographs.csv``: network, photographs, cosine_min, cosine_median.
        ours: the engine's backend; its bf16 rows are ``{ours}_bf16`` and ``{ours}_mixed``.
        threads, size: of the settings looked at.
    """
    out: list[Figure] = []
    for (network, batch), cell in _cells(main, threads, size).items():
        plain = cell.best(PLAIN, FORWARD)
        explained, half = cell.get(ours, EXPLAIN), cell.get(f"{ours}_bf16", EXPLAIN)
        mixed = cell.get(f"{ours}_mixed", EXPLAIN)
        published, compiled = cell.get("published", EXPLAIN), cell.get("published_compiled", EXPLAIN)
        onnx, plain_onnx = cell.get("onnx", EXPLAIN), cell.get("plain_onnx", FORWARD)
        many, attends = batch >= 8, network in (*TRANSFORMERS, CLIP)
        wanted: list[tuple[str, Row | None, Row | None, float, Any]] = [
            ("forward / best plain forward", cell.get(ours, FORWARD), plain, 1.10, _times),
            ("forward+explanation / best plain forward", explained, plain, 2.4 if attends else 2.2, _times),
            ("forward+explanation / published", explained, published, 0.6 if attends else 0.7 if many else 0.4, _times),
            ("forward+explanation / published, compiled", explained, compiled, 0.85, _times),
            ("bf16 forward+explanation / best plain fp32 forward", half, plain, 1.5 if many else 1.9, _times),
            ("the same, only the adjoint in bf16", mixed, plain, 1.5 if many else 1.9, _times),
            ("peak memory / published", explained, published, 0.5, _column("memory_mib")),
            ("ONNX forward+explanation / plain ONNX forward", onnx, plain_onnx, 2.2, _times),
        ]  # fmt: skip
        out += [_figure(name, network, batch, a, b, target, ratio) for name, a, b, target, ratio in wanted]
    for (network, batch), cell in _cells(training, threads, size).items():
        a, b = cell.get("training_ours", TRAIN), cell.get("training_published", TRAIN)
        out.append(_figure("training step, time / published", network, batch, a, b, 0.8, _times))
        out.append(_figure("saved activations, bytes / published", network, batch, a, b, 0.5, _column("saved_mib")))
    for row in photographs:
        low, middle = float(row["cosine_min"]), float(row["cosine_median"])
        note = f"smallest of {row['photographs']} photographs; median {middle:.4f}"
        name = "bf16 contribution maps, cosine"
        if row.get("forward") == "float32":
            name = "contribution maps with only the adjoint in bf16, cosine"
        out.append(Figure(name, row["network"], 1, low, None, None, 0.99, low >= 0.99, note))
    return out


def _cells(rows: Sequence[Row], threads: int, size: int) -> dict[tuple[str, int], _Cell]:
    grouped: dict[tuple[str, int], list[Row]] = {}
    for r in rows:
        if int(r["threads"]) == threads and int(r["size"]) == size and int(r["classes"]) == 1:
            grouped.setdefault((r["network"], int(r["batch"])), []).append(r)
    return {key: _Cell(mine) for key, mine in grouped.items()}


def _figure(
    name: str, network: str, batch: int, ours: Row | None, theirs: Row | None, target: float, ratio: Any
) -> Figure:
    found = ratio(ours, theirs)
    if found is None:
        return Figure(name, network, batch, None, None, None, target, None, "not measured")
    value, low, high = found
    return Figure(name, network, batch, value, low, high, target, value <= target, f"against {theirs['contender']}")


def markdown(found: Sequence[Figure]) -> str:
    """A table for a results page; a cell is the value and, in brackets, the quartiles of the rounds' ratios."""
    lines = ["| figure | network | batch | ours | target | met | against |", "|---|---|---|---|---|---|---|"]
    order = list(dict.fromkeys(f.figure for f in found))
    rank = {name: i for i, name in enumerate((*NETWORKS, *TRANSFORMERS, CLIP))}
    for f in sorted(found, key=lambda f: (order.index(f.figure), rank.get(f.network, len(rank)), f.network, f.batch)):
        value = "not measured" if f.value is None else f"{f.value:.3f}"
        if f.value is not None and f.low is not None and f.low != f.high:
            value += f" ({f.low:.3f} to {f.high:.3f})"
        sign, met = ("≥" if "cosine" in f.figure else "≤"), {True: "yes", False: "**no**", None: ""}[f.met]
        note = f.note.removeprefix("against ")
        lines.append(f"| {f.figure} | {f.network} | {f.batch} | {value} | {sign} {f.target} | {met} | {note} |")
    return "\n".join(lines) + "\n"


def as_json(found: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures, JSON-ready."""
    return [asdict(f) for f in found]

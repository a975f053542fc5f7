"""What is measured, most important first: settings (cells) and the contenders of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bcos_rt.benchmark.comparison import Entry, Plan
from bcos_rt.benchmark.contender import EXPLAIN, FORWARD, TRAIN
from bench.explain_bench.networks import NETWORKS

__all__ = ["ENTRIES", "SLOW", "Cell", "growth_cells", "main_cells", "training_cells"]

_OURS = "bcos_rt.benchmark.contenders:"
_THEIRS = "bench.explain_bench.contenders:"
_BOTH = (FORWARD, EXPLAIN)

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("native", f"{_OURS}EngineContender", _BOTH, {"backend": "native"}),
        Entry("native_bf16", f"{_OURS}EngineContender", _BOTH, {"backend": "native", "dtype": "bfloat16"}),
        # The forward pass in float32, its adjoint in bfloat16.
        Entry(
            "native_mixed",
            f"{_OURS}EngineContender",
            (EXPLAIN,),
            {"backend": "native", "dtype": "bfloat16", "forward_dtype": "float32"},
        ),
        Entry("inductor", f"{_OURS}EngineContender", _BOTH, {"backend": "inductor"}),
        Entry("inductor_bf16", f"{_OURS}EngineContender", _BOTH, {"backend": "inductor", "dtype": "bfloat16"}),
        Entry("eager", f"{_OURS}EngineContender", _BOTH, {"backend": "eager"}),
        Entry("native_loaded", f"{_OURS}LoadedEngineContender", _BOTH, {"backend": "native"}),
        Entry("onnx", f"{_OURS}OnnxContender", _BOTH, {"file": "bcos"}),
        Entry("published", f"{_THEIRS}Published", _BOTH),
        Entry("published_compiled", f"{_THEIRS}Published", _BOTH, {"compiled": "autograd"}),
        Entry("published_grad", f"{_THEIRS}Published", (EXPLAIN,), {"compiled": "grad"}),
        Entry("plain_eager", f"{_OURS}PlainContender", _BOTH),
        Entry("plain_compiled", f"{_OURS}PlainContender", (FORWARD,), {"compiled": True}),
        Entry("plain_onnx", f"{_OURS}OnnxContender", (FORWARD,), {"file": "plain"}),
        Entry("training_ours", f"{_THEIRS}Training", (TRAIN,), {"layers": "ours"}),
        Entry("training_published", f"{_THEIRS}Training", (TRAIN,), {"layers": "published"}),
    )
}

# Every figure of the table but two needs only these; the best plain forward needs plain_compiled, which compiles fast.
QUICK = ("native", "native_bf16", "native_mixed", "onnx", "published", "plain_eager", "plain_compiled", "plain_onnx")
# Compile for a minute or more a setting.
SLOW = ("inductor", "inductor_bf16", "published_compiled", "published_grad")
FULL = (*QUICK, "eager", "published_compiled")
GROWTH = ("native", "published", "plain_eager", "plain_onnx")


@dataclass(frozen=True)
class Cell:
    """One comparison: a setting of one network and who meets in it."""

    network: str
    batch: int
    threads: int
    contenders: tuple[str, ...]
    modes: tuple[str, ...] = _BOTH
    size: int = 224
    classes: int = 1
    memory: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies it in a table."""
        return tuple(str(v) for v in (self.network, self.batch, self.size, self.classes, self.threads))

    def rows(self) -> set[tuple[str, str]]:
        """(contender, mode) of the rows that it makes."""
        return {(name, mode) for name in self.contenders for mode in self.modes if mode in ENTRIES[name].modes}


def main_cells(
    networks: Sequence[str] = NETWORKS,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (2, 1),
    size: int = 224,
    quick: bool = False,
    contenders: Sequence[str] = (),
) -> list[Cell]:
    """The main matrix: two threads before one. What compiles for minutes meets the others on two threads alone.

    The engine's own compiled backend, which takes longest to get ready, only on the smallest batch; who wants more
    (``inductor_bf16``, ``published_grad``, ``native_loaded``) names the contenders.
    """
    cells = []
    for count in threads:
        most = count == max(threads)
        for network in networks:
            for batch in batches:
                standard = (*FULL, "inductor") if batch == min(batches) else FULL
                chosen = tuple(contenders) or (standard if most and not quick else QUICK)
                cells.append(Cell(network, batch, count, chosen, size=size, memory=most and not quick))
        if quick:
            break
    return cells


def growth_cells(network: str = "resnet18", threads: int = 2, quick: bool = False) -> list[Cell]:
    """How cost grows with the batch, the image's side, and the classes explained of each image."""
    batches, sizes, classes = (1, 2, 4, 8, 16, 32), (128, 192, 256, 320, 384, 448, 512), (2, 3, 5, 10)
    if quick:
        batches, sizes, classes = batches[::2], sizes[::3], classes[::3]
    cells = [Cell(network, n, threads, GROWTH) for n in batches]
    cells += [Cell(network, 1, threads, GROWTH, size=size) for size in sizes]
    several = tuple(name for name in GROWTH if name != "plain_onnx")
    return cells + [Cell(network, 1, threads, several, modes=(EXPLAIN,), classes=k) for k in classes]


def training_cells(
    networks: Sequence[str] = NETWORKS, batches: Sequence[int] = (8,), threads: int = 2, size: int = 224
) -> list[Cell]:
    """A training step of ours and of the published layers."""
    both = ("training_ours", "training_published")
    return [Cell(n, b, threads, both, modes=(TRAIN,), size=size) for n in networks for b in batches]


def plan(cell: Cell, quick: bool = False) -> Plan:
    """How long a cell is timed: an even number of rounds would favour nobody, but an odd one has a middle."""
    if cell.contenders == GROWTH or cell.classes > 1:
        return Plan(rounds=7, least_rounds=3, seconds=12.0)
    if TRAIN in cell.modes:
        return Plan(rounds=9, least_rounds=5, seconds=40.0)
    return Plan(rounds=9, least_rounds=3, seconds=20.0) if quick else Plan(rounds=15, least_rounds=5, seconds=30.0)


def expected_seconds(cell: Cell, quick: bool = False) -> float:
    """A rough guess for a progress bar, of two cores: timing, preparing, memory."""
    weight = {"resnet18": 1.0, "resnet50": 1.8, "densenet121": 3.5}.get(cell.network, 1.8)
    compiling = sum(40.0 * weight for name in cell.contenders if name in SLOW)
    preparing = sum(4.0 + 3.0 * weight for name in cell.contenders if name not in SLOW)
    memory = 1.3 * preparing if cell.memory else 0.0
    return plan(cell, quick).seconds + compiling + preparing + memory

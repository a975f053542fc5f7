"""Results as a table: one row a contender, mode and setting; a CSV file that is whole at any moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bcos_rt.benchmark.comparison import OK, Measured, quartiles
from bcos_rt.benchmark.contender import Setting
from bcos_rt.benchmark.memory import MIB
from bcos_rt.files import read_rows, write_csv, write_json, write_text

__all__ = ["COLUMNS", "memory_columns", "read_rows", "row_of", "write_json", "write_rows", "write_text"]

COLUMNS = (
    "network", "batch", "size", "classes", "threads", "mode", "contender", "status",
    # Milliseconds of a call; a round's value is the median of its calls.
    "median_ms", "q1_ms", "q3_ms", "min_ms", "rounds", "calls", "round_ms",
    # Seconds: imports and weights; building or compiling; the first call.
    "load_s", "build_s", "first_s",
    # MiB above the weights (and imports): peak of running; the same counted from ready to run; peak of getting ready.
    "memory_mib", "working_mib", "preparing_mib",
    "error_logits", "error_weights", "error_map", "cosine_map", "other_class",
    "saved_mib", "session", "commit", "sources", "date", "note",
)  # fmt: skip


def row_of(network: str, setting: Setting, measured: Measured, session: Mapping[str, str]) -> dict[str, Any]:
    """A row; times only where there are any.

    Args:
        session: columns that say in which run it was measured: "session", "commit", "sources", "date".
    """
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "network": network,
        "batch": setting.batch,
        "size": setting.size,
        "classes": setting.classes,
        "threads": setting.threads,
        "mode": measured.mode,
        "contender": measured.entry.name,
        "status": measured.status,
        "note": measured.note,
        "load_s": measured.load_s,
        "build_s": measured.build_s,
        "first_s": measured.first_s,
        **session,
        **measured.differences,
        **{k: v for k, v in measured.facts.items() if k in COLUMNS},
        **memory_columns(measured.memory),
    }
    if measured.rounds and measured.status == OK:
        low, middle, high = (1e3 * v for v in quartiles(measured.rounds))
        row |= {
            "median_ms": middle,
            "q1_ms": low,
            "q3_ms": high,
            "min_ms": 1e3 * min(measured.rounds),
            "rounds": len(measured.rounds),
            "calls": measured.calls,
            "round_ms": " ".join(f"{1e3 * v:.5g}" for v in measured.rounds),
        }
    return row


def memory_columns(memory: Mapping[str, Any]) -> dict[str, float]:
    """The columns of what the worker said about its memory; none where it could not say it."""
    loaded, ready, running = (memory.get(k) for k in ("loaded", "ready", "peak_running"))
    if loaded is None or ready is None or running is None or not memory.get("separate"):
        return {}
    return {
        "memory_mib": (running - loaded) / MIB,
        "working_mib": (running - ready) / MIB,
        "preparing_mib": (memory["peak_preparing"] - loaded) / MIB,
    }


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Write a CSV file with a header; floats with five digits, None as nothing."""
    write_csv(path, ({name: _cell(row.get(name)) for name in columns} for row in rows), columns)


def _cell(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value

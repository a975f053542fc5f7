"""Where the time of one image goes: every step of the native backend's programs, timed by itself."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node

from bcos_rt import Engine
from bcos_rt.benchmark.subject import made_up_images
from bcos_rt.graph.backends import native
from bcos_rt.graph.capture import module_of
from bench.explain_bench.networks import subject

__all__ = ["COLUMNS", "by_kind", "rows_of"]

COLUMNS = ("network", "program", "threads", "dtype", "step", "kind", "module", "shape", "median_ms", "share")


class _Timed(Interpreter):
    """Runs a graph node by node and notes how long each took."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.times: dict[Node, list[float]] = defaultdict(list)

    def run_node(self, n: Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        self.times[n].append(time.perf_counter() - start)
        return result


def rows_of(
    network: str, threads: int, dtype: str = "float32", size: int = 224, calls: int = 15
) -> list[dict[str, Any]]:
    """A row for each step of predicting and of explaining one image: the median of ``calls`` runs, in ms.

    Running node by node costs some microseconds a step, so the sum is a little more than an engine takes.
    """
    torch.set_num_threads(threads)
    engine = Engine(subject(network).net, (size, size), dtype=getattr(torch, dtype), backend="native")
    image = made_up_images(1, size)
    rows = []
    for name, program in (("predict", engine.programs.predict), ("explain", engine.programs.explain)):
        module, constants = native.lowered(program)
        given = [*constants, image, *([torch.tensor([[-1]])] if name == "explain" else [])]
        timed = _Timed(module)
        with torch.inference_mode():
            for _ in range(calls + 3):
                timed.run(*given)
        medians = {n: 1e3 * statistics.median(t[3:]) for n, t in timed.times.items() if n.op == "call_function"}
        total = sum(medians.values())
        for node, value in medians.items():
            rows.append(
                {
                    "network": network, "program": name, "threads": threads, "dtype": dtype, "step": node.name,
                    "kind": _kind(node), "module": module_of(node), "shape": _shape(node), "median_ms": value,
                    "share": value / total,
                }
            )  # fmt: skip
    return rows


def by_kind(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Milliseconds by (network, program) and kind of step, largest first."""
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        sums[row["network"], row["program"]][row["kind"]] += row["median_ms"]
    return {key: dict(sorted(kinds.items(), key=lambda item: -item[1])) for key, kinds in sums.items()}


def _kind(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    if not name.startswith("step_"):
        return "getitem" if name == "getitem" else f"aten {name.partition('.')[0]}"
    kind = name.removeprefix("step_").rstrip("0123456789").rstrip("_").removesuffix("_default")
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    weight = node.meta.get("weight_shape")
    if weight is None or len(weight) == 1:
        return kind
    if len(weight) == 2:
        return f"{kind} linear"
    return f"{kind} {'depthwise ' if weight[1] == 1 and first.shape[1] > 1 else ''}{weight[2]}x{weight[3]}"


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(value, torch.Tensor):
        return ""
    return "x".join(str(s) if isinstance(s, int) else "1" for s in value.shape)

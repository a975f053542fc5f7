"""Peak memory and time of explanations with stored and with recomputed softmaxes, on one thread.

    python bench/attention.py [--sizes 112 224 384] [--batch 8] [--calls 3] [--output bench/results/attention.json]

A seeded ``vit_small_patch16_224`` of timm, B-cosified, at several image sizes, explained for one and for three classes
of each image. ``graph`` is what :func:`bcos_rt.explain` runs, the whole batch at once; ``engine`` is the native engine,
which takes two images at a time; each size and path has a process of its own. The peak is the most memory that the
process held during one call, less what it held before it. Calls that are timed take turns, stored and recomputed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bcos_rt import Engine, Recipe, bcosify
from bcos_rt.benchmark import machine, memory
from bcos_rt.files import write_json
from bcos_rt.graph import explanation_graph
from bcos_rt.graph.attention import Attention

NETWORK = "vit_small_patch16_224"
PATHS = ("graph", "engine")
CHOICES: tuple[Attention, ...] = ("store", "recompute")


def prepared(path: str, size: int) -> dict[Attention, Callable[[torch.Tensor, torch.Tensor], object]]:
    """By choice of attention: an explanation of images, for class ids [N, K]."""
    import timm

    torch.manual_seed(0)
    net = bcosify(timm.create_model(NETWORK, img_size=size), Recipe())[0].eval()

    def made(choice: Attention) -> Callable[[torch.Tensor, torch.Tensor], object]:
        if path == "engine":
            return Engine(net, (size, size), backend="native", attention=choice).explain
        graph = explanation_graph(net, (size, size), multi=True, attention=choice)
        return lambda images, ids: graph(net, net.encode(images), ids)

    return {choice: made(choice) for choice in CHOICES}


def measured(path: str, size: int, batch: int, calls: int) -> list[dict[str, Any]]:
    """What one process finds out."""
    torch.set_num_threads(1)
    explainers = prepared(path, size)
    images = torch.rand(batch, 3, size, size)
    rows: list[dict[str, Any]] = []
    for classes in (1, 3):
        ids = torch.arange(batch * classes).reshape(batch, classes) % 1000
        seconds: dict[str, list[float]] = {choice: [] for choice in explainers}
        peaks: dict[str, list[float]] = {choice: [] for choice in explainers}
        for explain in explainers.values():
            explain(images[:2], ids[:2])
        for _ in range(calls):
            for choice, explain in explainers.items():
                memory.trim()
                before = memory.resident()
                reset = memory.reset_peak()
                start = time.perf_counter()
                explain(images, ids)
                seconds[choice].append(time.perf_counter() - start)
                peak = memory.peak()
                if reset and before is not None and peak is not None:
                    peaks[choice].append((peak - before) / memory.MIB)
        rows += [
            {
                "path": path,
                "pixels": size,
                "tokens": (size // 16) ** 2 + 1,
                "classes": classes,
                "attention": choice,
                "peak_mib": round(max(peaks[choice]), 1) if peaks[choice] else None,
                "seconds": round(statistics.median(seconds[choice]), 3),
            }
            for choice in explainers
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 224, 384])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path, default=Path("bench/results/attention.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        path, size = arguments.one
        print(json.dumps(measured(path, int(size), arguments.batch, arguments.calls)))
        return
    about = {
        "command": f"python bench/attention.py --sizes {' '.join(map(str, arguments.sizes))} "
        f"--batch {arguments.batch} --calls {arguments.calls}",
        "machine": machine.describe(),
        "network": f"timm {NETWORK}, seeded, B-cosified, float32",
        "batch": arguments.batch,
        "threads": 1,
        "note": arguments.note,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for size in arguments.sizes:
        for path in PATHS:
            command = [sys.executable, __file__, "--one", path, str(size)]
            command += ["--batch", str(arguments.batch), "--calls", str(arguments.calls)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            rows += found
            print(*found, sep="\n", flush=True)
            # After every process: what was measured stays.
            write_json(arguments.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()

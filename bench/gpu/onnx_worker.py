"""Runs in a Python with onnxruntime-gpu, and imports nothing else of this project (nor torch).

    python bench/gpu/onnx_worker.py JOB.json

The job names the files, the provider, and a .npz of inputs and expected outputs; the answer is one JSON object on the
last line of the output.
"""

from __future__ import annotations

import collections
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MISSING = 5  # exit code: there is no such provider here


def main() -> int:
    """Run the job of the command line; the exit code is 0, or MISSING."""
    job = json.loads(Path(sys.argv[1]).read_text())
    provider = job["provider"]
    try:
        import onnxruntime
    except ImportError as error:
        return _missing(f"no onnxruntime in {sys.executable}: {error}")
    if provider not in onnxruntime.get_available_providers():
        return _missing(
            f"onnxruntime {onnxruntime.__version__} in {sys.executable} was built without {provider} "
            f"(it has {', '.join(onnxruntime.get_available_providers())})"
        )
    if provider == "CUDAExecutionProvider" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    answer: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "files": {}}
    with np.load(job["arrays"]) as arrays:
        data = dict(arrays)
    for name, path in job["files"].items():
        answer["files"][name] = _one(onnxruntime, path, provider, data, name, job["runs"])
    print(json.dumps(answer))
    return 0


def _missing(reason: str) -> int:
    print(json.dumps({"missing": reason}))
    return MISSING


def _one(onnxruntime: Any, path: str, provider: str, data: dict[str, Any], name: str, runs: int) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(path).with_suffix(""))
    providers = [provider] + (["CPUExecutionProvider"] if provider != "CPUExecutionProvider" else [])
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    if session.get_providers()[0] != provider:
        # onnxruntime falls back without a word when the provider's libraries do not load.
        raise RuntimeError(f"asked for {provider}, the session has {session.get_providers()}")
    feed = {i.name: data[i.name] for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    results = dict(zip(outputs, session.run(outputs, feed), strict=True))
    errors = {
        key: float(np.abs(value - data[f"{name}.{key}"]).max() / np.abs(data[f"{name}.{key}"]).max())
        for key, value in results.items()
        if f"{name}.{key}" in data
    }
    return {
        "providers": session.get_providers(),
        "errors": errors,
        "nodes": _nodes_by_provider(session.end_profiling()),
        # Profiling costs time, so a second session is measured.
        "ms": _median_ms(onnxruntime, path, providers, feed, outputs, runs),
    }


def _nodes_by_provider(profile: str) -> dict[str, dict[str, int]]:
    """Provider -> op -> how many nodes ran there."""
    counts: dict[str, collections.Counter[str]] = {}
    for event in json.loads(Path(profile).read_text()):
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time") and "provider" in arguments:
            counts.setdefault(arguments["provider"], collections.Counter())[arguments.get("op_name", "?")] += 1
    return {provider: dict(counter) for provider, counter in counts.items()}


def _median_ms(
    onnxruntime: Any, path: str, providers: list[str], feed: dict[str, Any], outputs: list[str], runs: int
) -> float:
    """Median of ``runs`` calls, inputs and outputs staying on the device."""
    session = onnxruntime.InferenceSession(path, providers=providers)
    device = "cuda" if providers[0] == "CUDAExecutionProvider" else "cpu"
    binding = session.io_binding()
    for key, value in feed.items():
        binding.bind_ortvalue_input(key, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
    for key in outputs:
        binding.bind_output(key, device, 0)
    times = []
    for run in range(runs + 3):
        binding.synchronize_inputs()
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if run >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())

"""The stages, each a function from options and a deadline (of ``time.monotonic``) to an outcome."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bcos_rt.kernels import ops, reference
from bench.gpu import benchmark, environment
from bench.gpu.cases import DTYPES, TOY_SHAPES, Shape, merge, ordered
from bench.gpu.contenders import CONTENDERS
from bench.gpu.exercise import Block, every_op
from bench.gpu.files import read_json, read_rows, write_json
from bench.gpu.options import FAILED, PASSED, SKIPPED, TIMEOUT, Options, Outcome
from bench.gpu.timing import CallCounter, DeviceTimer, Timer, captured

__all__ = ["RUN", "run_command"]

ROOT = Path(__file__).resolve().parents[2]
TOY_TESTS = "tests/kernels/test_tune.py"


def run_command(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environ: Mapping[str, str] | None = None,
    *,
    progress: Path | None = None,
    patience: float = math.inf,
) -> int | None:
    """Run in the repository's root, output into ``log``; the exit code, or None if it was ended.

    It is ended after ``seconds``, or once the file ``progress`` has not changed for ``patience`` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        # Its own session, so that ending it ends its children (test processes) with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            env=dict(os.environ if environ is None else environ), start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + max(0.1, seconds)
        changed, seen = time.monotonic(), _changed(progress)
        try:
            while time.monotonic() < end and time.monotonic() < changed + patience:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(max(0.01, min(1.0, end - time.monotonic())))
                if _changed(progress) != seen:
                    changed, seen = time.monotonic(), _changed(progress)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _changed(path: Path | None) -> int:
    try:
        return path.stat().st_mtime_ns if path is not None else 0
    except OSError:
        return 0


def _device_environ(options: Options) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join(x for x in (str(ROOT), environ.get("PYTHONPATH", "")) if x)
    if options.dry_run:
        return environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return environ | {"BCOS_RT_TEST_DEVICE": "cuda"}


def _backend(device: str) -> ops.Backend:
    """On a CPU the ops would compute the reference; a dry run is to go through the kernels, in the interpreter."""
    from bcos_rt.kernels.triton.launch import interpreting

    return "triton" if device == "cpu" and interpreting() else "auto"


def _tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


# --- environment ------------------------------------------------------------------------------------------------------


def describe(options: Options, deadline: float) -> Outcome:
    """``environment.json``."""
    found = environment.describe() | {"dry_run": options.dry_run}
    write_json(options.folder / "environment.json", found)
    packages = found["packages"]
    return Outcome(
        PASSED,
        f"{found['gpu'].get('name', 'no GPU')}, torch {packages.get('torch')}, triton {packages.get('triton')}, "
        f"cuDNN {found['cudnn']}",
    )


# --- correctness ------------------------------------------------------------------------------------------------------


def correctness(options: Options, deadline: float) -> Outcome:
    """The kernels' tests on the device (dry run: one small test file); an empty run is a failure."""
    report, log = options.folder / "correctness.xml", options.folder / "logs" / "correctness.txt"
    report.unlink(missing_ok=True)
    tests = [TOY_TESTS] if options.dry_run else ["tests/triton", "tests/kernels"]
    missing = [t for t in tests if not (ROOT / t).exists()]
    if missing:
        return Outcome(FAILED, f"there is no {' and no '.join(missing)}")
    command = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}",
        *_parallel(options), *tests,
    ]  # fmt: skip
    code = run_command(command, log, deadline - time.monotonic(), _device_environ(options))
    if code is None:
        counts = _counts_of_log(log)
        failed = counts.get("FAILED", 0) + counts.get("ERROR", 0)
        message = f"ended at its time limit after {counts.get('PASSED', 0)} passed, {failed} failed"
        return Outcome(FAILED if failed else TIMEOUT, message, {"counts": counts, "log": str(log)})
    counts = _counts_of_report(report)
    message = ", ".join(f"{v} {k}" for k, v in counts.items()) or "no report"
    if code != 0 or counts.get("failed", 1):
        return Outcome(FAILED, f"{message} (pytest exited {code})", {"counts": counts, "tail": _tail(log)})
    if not counts["passed"]:
        return Outcome(FAILED, f"{message}: no test ran on the device", {"counts": counts, "tail": _tail(log)})
    return Outcome(PASSED, message, {"counts": counts})


def _parallel(options: Options) -> list[str]:
    """Processes for pytest: the kernels' compilation is most of the time, and it is the CPU's."""
    import importlib.util

    if options.dry_run or importlib.util.find_spec("xdist") is None:
        return ["-p", "no:xdist"] if importlib.util.find_spec("xdist") else []
    return ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]


def _counts_of_report(report: Path) -> dict[str, int]:
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return {}
    total = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def _counts_of_log(log: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in log.read_text(errors="replace").splitlines():
        found = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line) if "::" in line else None
        if found:
            counts[found[1]] = counts.get(found[1], 0) + 1
    return counts


# --- CUDA graph -------------------------------------------------------------------------------------------------------


def graph(options: Options, deadline: float) -> Outcome:
    """A residual block's ops in a CUDA graph: new inputs, one replay, and the results of eager calls on them.

    In a dry run nothing is captured; the block, in the interpreter, is still compared with float64.
    """
    details: dict[str, Any] = {}
    worst = ""
    for name in options.dtypes:
        dtype = DTYPES[name]
        block = Block(options.device, dtype)
        expected = block.double().run(reference)
        with ops.use_backend(_backend(options.device)):
            eager = block.run()
        limit = benchmark.limit_of(dtype, ours=True)
        errors = [benchmark.error_of(a.cpu(), e) for a, e in zip(eager, expected, strict=True)]
        entry: dict[str, Any] = {"error_to_float64": errors, "limit": limit}
        # Three kernels behind each other: rounding adds up.
        if not max(errors) <= 3 * limit:
            worst = f"{name}: eager differs from float64 by {max(errors):.2g}"
        if not options.dry_run:
            results: list[torch.Tensor] = []

            def once(block: Block = block, results: list[torch.Tensor] = results) -> None:
                results[:] = block.run()

            recorded = captured(once)
            block.x.copy_(torch.randn_like(block.x))
            block.grad.copy_(torch.randn_like(block.grad))
            recorded.replay()
            torch.cuda.synchronize()
            again = block.run()
            entry["replay_to_eager"] = [benchmark.error_of(a, e) for a, e in zip(results, again, strict=True)]
            entry["replay_equals_eager"] = all(torch.equal(a, e) for a, e in zip(results, again, strict=True))
            if not max(entry["replay_to_eager"]) <= limit:
                worst = f"{name}: the replay differs from eager by {max(entry['replay_to_eager']):.2g}"
        details[name] = entry
    if worst:
        return Outcome(FAILED, worst, details)
    return Outcome(PASSED, "block agrees with float64" + ("" if options.dry_run else "; replay equals eager"), details)


# --- onnxruntime ------------------------------------------------------------------------------------------------------


def onnx(options: Options, deadline: float) -> Outcome:
    """A converted ResNet-18 as ONNX file, in onnxruntime's CUDA provider (dry run: its CPU provider, 32 pixels)."""
    from bench.gpu.onnx_worker import MISSING

    python = options.onnx_python or sys.executable
    if shutil.which(python) is None:
        return Outcome(SKIPPED, f"there is no Python at {python} (--onnx-python): onnxruntime-gpu was not run")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, limits = _exported(folder, 32 if options.dry_run else options.size)
        job = {
            "files": files,
            "arrays": str(folder / "arrays.npz"),
            "provider": "CPUExecutionProvider" if options.dry_run else "CUDAExecutionProvider",
            "runs": 1 if options.dry_run else 30,
        }
        write_json(folder / "job.json", job)
        log = options.folder / "logs" / "onnx.txt"
        worker = str(Path(__file__).with_name("onnx_worker.py"))
        code = run_command(
            [python, worker, str(folder / "job.json")], log, deadline - time.monotonic(), _library_environ()
        )
    if code is None:
        return Outcome(TIMEOUT, "onnxruntime did not finish in time", {"tail": _tail(log)})
    answer = _last_json(log)
    if code == MISSING:
        return Outcome(SKIPPED, answer.get("missing", "no such provider"))
    if code != 0 or "files" not in answer:
        return Outcome(FAILED, f"onnxruntime's process exited {code}", {"tail": _tail(log)})
    if options.dry_run:
        for entry in answer["files"].values():
            entry["ms"] = None
    problems = [
        f"{file}.{key}: {error:.2g} > {limits[key]:.2g}"
        for file, entry in answer["files"].items()
        for key, error in entry["errors"].items()
        if not error <= limits[key]
    ]
    if problems:
        return Outcome(FAILED, "; ".join(problems), answer)
    times = ", ".join(f"{file} {entry['ms']:.2f} ms" for file, entry in answer["files"].items() if entry["ms"])
    return Outcome(PASSED, f"agrees with PyTorch; {times or 'not timed'}", answer)


def _exported(folder: Path, size: int) -> tuple[dict[str, str], dict[str, float]]:
    import numpy as np
    import torchvision

    from bcos_rt import Recipe, bcosify, explain, recalibrate
    from bcos_rt.export import to_onnx
    from tests.tolerances import TOLERANCES

    torch.manual_seed(0)
    net, _ = bcosify(torchvision.models.resnet18(), Recipe())
    recalibrate(net, [torch.rand(4, 3, size, size)])
    net.eval()
    images = torch.rand(1, 3, size, size)
    files = {"explanation": str(folder / "explanation.onnx"), "forward": str(folder / "forward.onnx")}
    outputs = ["logits", "weights", "contributions"]
    to_onnx(net, files["explanation"], image_size=size, outputs=outputs, verify=False)
    to_onnx(net, files["forward"], image_size=size, forward_only=True, verify=False)
    result = explain(net, images)
    logits = result.logits.detach().numpy()
    np.savez(
        folder / "arrays.npz",
        **{
            "image": images.numpy(),
            "class_ids": np.array([-1]),
            "explanation.logits": logits,
            "forward.logits": logits,
            "explanation.weights": _single(result.weights),
            "explanation.contributions": _single(result.contributions),
        },
    )
    limits = dict.fromkeys(("weights", "contributions"), TOLERANCES["weights_b2"])
    return files, limits | {"logits": TOLERANCES["onnx_logits"]}


def _single(value: torch.Tensor) -> Any:
    return value.detach().numpy()


def _library_environ() -> dict[str, str]:
    """The other Python brings onnxruntime-gpu alone: CUDA's and cuDNN's libraries are those that torch brought here."""
    folders = []
    with contextlib.suppress(ImportError):
        import nvidia

        folders = sorted({str(p.parent) for base in nvidia.__path__ for p in Path(base).rglob("lib*.so*")})
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    paths = [*folders, environ.get("LD_LIBRARY_PATH", "")]
    return environ | {"LD_LIBRARY_PATH": os.pathsep.join(p for p in paths if p)}


def _last_json(log: Path) -> dict[str, Any]:
    for line in reversed(log.read_text(errors="replace").splitlines()):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                return value
    return {}


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


def sanitizer(options: Options, deadline: float) -> Outcome:
    """memcheck over :func:`every_op`, each allocation made by CUDA itself so that its bounds are known."""
    log = options.folder / "logs" / "sanitizer.txt"
    command = [sys.executable, "-m", "bench.gpu.worker", "--exercise", options.device, *options.dtypes]
    environ = _device_environ(options) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if options.dry_run:
        code = run_command(command, log, deadline - time.monotonic(), environ)
    else:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return Outcome(SKIPPED, "compute-sanitizer is not on the PATH")
        checked = [tool, "--tool", "memcheck", "--error-exitcode", "99", "--target-processes", "all", *command]
        code = run_command(checked, log, deadline - time.monotonic(), environ)
    text = log.read_text(errors="replace")
    ran = [line.removeprefix("done: ") for line in text.splitlines() if line.startswith("done: ")]
    summary = next((line for line in reversed(text.splitlines()) if "ERROR SUMMARY" in line), "").strip("= ")
    details = {"ops": ran, "summary": summary}
    if code is None:
        found = len(re.findall(r"Invalid __|Misaligned|out of bounds", text))
        status = FAILED if found else TIMEOUT
        return Outcome(status, f"ended at its time limit after {len(ran)} ops, {found} errors", details)
    if code != 0:
        return Outcome(FAILED, summary or f"exited {code}", details | {"tail": _tail(log)})
    return Outcome(PASSED, f"{len(ran)} ops; {summary or 'without the tool (dry run)'}", details)


def exercise(device: str, dtypes: Sequence[str]) -> int:
    """Call every op once in each dtype, each followed by a line that says so; 1 if one raised."""
    failed = 0
    for name in dtypes:
        calls: dict[str, Callable[[], Any]] = {"block": Block(device, DTYPES[name]).run} | every_op(
            device, DTYPES[name]
        )
        for op, call in calls.items():
            try:
                with ops.use_backend(_backend(device)):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
                print(f"done: {op} {name}", flush=True)
            except Exception as error:
                failed = 1
                print(f"failed: {op} {name}: {type(error).__name__}: {error}", flush=True)
    return failed


# --- benchmark --------------------------------------------------------------------------------------------------------


def shapes_of(options: Options) -> list[Shape]:
    """Layer shapes of the asked models, most important first."""
    if options.dry_run:
        return ordered(merge(s for s in TOY_SHAPES if s.model in options.models))
    from bench.gpu.networks import layer_shapes

    return ordered([s for model in options.models for s in merge(layer_shapes(model, options.batch, options.size))])


def run_benchmark(options: Options, deadline: float, timer: Timer | None = None) -> Outcome:
    """``layers.csv``, and sums per network in the summary."""
    path = options.folder / "layers.csv"
    found = environment.describe()
    mark = environment.fingerprint(found) | {"batch": options.batch, "size": options.size, "dry_run": options.dry_run}
    previous = read_json(options.folder / "measured_with.json")
    resume = options.resume and previous.get("mark") == json.loads(json.dumps(mark, default=str))
    if not resume:
        previous = {}
        path.unlink(missing_ok=True)
    table = benchmark.Table(path, resume)
    torch.backends.cudnn.benchmark = not options.dry_run  # cuDNN tries its algorithms: the others at their best
    if timer is None:
        timer = CallCounter() if options.dry_run else DeviceTimer()
    if set(previous.get("ceilings", {}).get("gemm_tflops", {})) >= set(options.dtypes):
        ceilings = benchmark.Ceilings(**previous["ceilings"])
    elif options.dry_run:
        ceilings = benchmark.measure_ceilings(timer, options.dtypes, options.device, side=8, copy_mb=1)
    else:
        ceilings = benchmark.measure_ceilings(timer, options.dtypes, options.device)
    known = {"copy_gbps": ceilings.copy_gbps, "gemm_tflops": dict(ceilings.gemm_tflops)}
    known = {} if options.dry_run else known
    write_json(options.folder / "measured_with.json", {"mark": mark, "ceilings": known})
    shapes = shapes_of(options)
    chosen = [c for c in CONTENDERS if not options.contenders or c.name in options.contenders]
    works = benchmark.work_list(shapes, options.dtypes, options.modes, chosen)
    with ops.use_backend(_backend(options.device)):
        result = benchmark.measure(
            works, table, timer, ceilings, options.device, deadline=deadline, dry_run=options.dry_run
        )
    details = result | {
        "ceilings": known,
        "totals": benchmark.totals(table.rows.values()),
        "contenders": {c.name: c.note for c in chosen},
    }
    message = f"{len(works) - result['left']} of {len(works)} measurements made"
    if result["failures"]:
        return Outcome(FAILED, f"{message}; {len(result['failures'])} of our own failed", details)
    return Outcome(PASSED, message, details)


# --- plots ------------------------------------------------------------------------------------------------------------


def plots(options: Options, deadline: float) -> Outcome:
    """``totals.png`` and ``roofline.png`` from whatever ``layers.csv`` holds."""
    from bench.gpu.plots import roofline_plot, totals_plot

    rows = read_rows(options.folder / "layers.csv")
    if not rows:
        return Outcome(SKIPPED, "layers.csv has no rows")
    gpu = read_json(options.folder / "environment.json").get("gpu", {}).get("name", "no GPU")
    dry = any(row["dry_run"] == "True" for row in rows)
    totals_plot(benchmark.totals(rows), options.folder / "totals.png", gpu, dry)
    ceilings = read_json(options.folder / "measured_with.json").get("ceilings", {})
    roofline_plot(rows, ceilings, options.folder / "roofline.png", gpu, dry)
    return Outcome(PASSED, "totals.png, roofline.png")


RUN: dict[str, Callable[[Options, float], Outcome]] = {
    "environment": describe,
    "correctness": correctness,
    "graph": graph,
    "onnx": onnx,
    "benchmark": run_benchmark,
    "sanitizer": sanitizer,
    "plots": plots,
}

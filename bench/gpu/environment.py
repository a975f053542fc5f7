"""What the machine and the software are: everything a reader of the numbers may ask."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "fingerprint", "folder_name", "no_gpu"]

ROOT = Path(__file__).resolve().parents[2]

_PACKAGES = (
    "torch", "triton", "numpy", "torchvision", "timm", "bcos", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu",
    "nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "matplotlib", "pytest",
)  # fmt: skip

_SMI = (
    "name", "driver_version", "vbios_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "clocks.applications.graphics", "power.draw", "power.limit", "temperature.gpu", "memory.total", "persistence_mode",
    "compute_mode", "mig.mode.current", "ecc.mode.current", "pcie.link.gen.current", "pcie.link.width.current",
)  # fmt: skip


def no_gpu() -> str:
    """Why nothing can be run here; empty where torch sees a GPU."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for the CPU"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"


def folder_name() -> str:
    """The GPU's name as a folder: ``nvidia-h100-80gb-hbm3``."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _smi() -> dict[str, str]:
    # Field by field: an older driver answers nothing at all if one of many is unknown to it.
    whole = _output("nvidia-smi", "-i", "0", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader")
    values = [v.strip() for v in whole.split(",")]
    if len(values) == len(_SMI):
        return dict(zip(_SMI, values, strict=True))
    return {f: _output("nvidia-smi", "-i", "0", f"--query-gpu={f}", "--format=csv,noheader") for f in _SMI}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _commit() -> dict[str, Any]:
    return {
        "commit": _output("git", "rev-parse", "HEAD") or None,
        "changed_files": [x[3:] for x in _output("git", "status", "--porcelain", "-uno").splitlines()],
    }


def _sources() -> str:
    """A hash of everything that is measured and of what measures it, committed or not."""
    digest = hashlib.sha256()
    for folder in ("kernels", "bench/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def describe() -> dict[str, Any]:
    """GPU, driver, clocks, CPU, versions, commit."""
    gpu: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        gpu = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": total,
            "free_bytes": free,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "count": torch.cuda.device_count(),
            "nvidia_smi": _smi(),
        }
    return {
        "gpu": gpu,
        "cpu": {"model": _cpu(), "cores": os.cpu_count()},
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "packages": {p: v for p in _PACKAGES if (v := _version(p)) is not None},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "compute_sanitizer": shutil.which("compute-sanitizer"),
        "git": _commit(),
        "sources_sha256": _sources(),
    }


def fingerprint(environment: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for measurements of two runs to stand in one table."""
    gpu = environment.get("gpu", {})
    packages = environment.get("packages", {})
    return {
        "gpu": gpu.get("name"),
        "driver": gpu.get("nvidia_smi", {}).get("driver_version"),
        "packages": {p: packages.get(p) for p in ("torch", "triton", "bcos", "nvidia-cudnn-frontend")},
        "cudnn": environment.get("cudnn"),
        "sources": environment.get("sources_sha256"),
    }

"""What the machine and the software are: what a reader of times may ask."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["available_cores", "cpu_model", "describe"]

_PACKAGES = ("bcos-rt", "torch", "torchvision", "timm", "numpy", "onnx", "onnx-ir", "onnxruntime", "bcos", "triton")
# Of a processor's flags, those that decide which kernels run.
_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "sve",
)  # fmt: skip
_VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "TORCH", "ATEN_", "MALLOC_", "LD_PRELOAD")


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def cpu_model() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level} {kind.lower()}"] = size
    return found


def _memory() -> str:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                return f"{int(line.split()[1]) / 2**20:.1f} GiB"
    except OSError:
        pass
    return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Processor, memory, system, versions, variables that libraries read; JSON-ready. Imports torch."""
    import torch

    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return {
        "cpu": {
            "model": cpu_model(),
            "family_model_stepping": "/".join(_cpuinfo(k) for k in ("cpu family", "model", "stepping")),
            "cores": os.cpu_count(),
            "available_cores": available_cores(),
            "flags": [f for f in _FLAGS if f in flags],
            "caches": _caches(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "memory": _memory(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "packages": {p: v for p in _PACKAGES if (v := _version(p)) is not None} | {"torch": str(torch.__version__)},
        "torch_build": " ".join(torch.__config__.show().split()),
        # Not where a cache lies: PyTorch sets that itself, and it changes no time.
        "variables": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES) and not k.endswith("_DIR")
        },
    }

"""A process's memory: what it holds now, and the most it held since the peak was last reset."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

__all__ = ["MIB", "peak", "reset_peak", "resident", "trim"]

MIB = 1 << 20


def _status(key: str) -> int | None:
    """A line of ``/proc/self/status`` in bytes; None where there is no such file."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident() -> int | None:
    """Bytes of this process that are in memory now; None on systems without ``/proc``."""
    return _status("VmRSS")


def peak() -> int | None:
    """The most bytes in memory at once since the start, or since :func:`reset_peak` where that works."""
    value = _status("VmHWM")
    if value is None and sys.platform != "win32":
        import resource

        # Kilobytes on Linux, bytes on macOS.
        value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return value


def reset_peak() -> bool:
    """Make :func:`peak` start again from what is held now; whether the system could (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Give memory that nothing uses back to the system, so that :func:`resident` counts what is in use."""
    gc.collect()
    # Without glibc the number holds what the allocator keeps.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)

"""Runs kept as CUDA graphs, one for each shape of the inputs: launching a network's kernels one by one takes longer
than most of them run.

:class:`Captures` keeps the books (which shapes, in which order, who waits for whom) and knows nothing of CUDA;
:class:`CudaGraphs` is the little that does, and the tests put something else in its place. The rules they keep:

* A captured graph reads and writes the same addresses at every replay. Inputs are copied into tensors of its own,
  outputs are cloned before anyone else may replay.
* Graphs share one memory pool, which CUDA allows if no two are replayed at a time and none reads another's results
  (PyTorch's notes on CUDA semantics, "Sharing memory across captures"). A lock orders the calls; on the device each
  waits for the event that the one before it recorded, whatever streams they came from.
* All work of a call is put on the caller's current stream, so what the caller does next there comes after it.
* One capture at a time in a process. Others' allocations do not end it (``capture_error_mode="thread_local"``).
* The first call with a shape runs as it is: Triton compiles and loads kernels then, which a capture must not, and a
  shape that comes once is not worth a capture.

:class:`CudaGraphs` has never met a GPU: it was written from the documentation and PyTorch's sources.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Captures", "CudaGraphs", "Graphs", "Outputs", "Replay"]

Outputs = dict[str, Tensor]
Run = Callable[..., Outputs]

# First runs and captures, of all engines of a process: Triton's loading of a kernel is not safe in several threads, and
# CUDA allows one capture at a time.
_FIRST_RUN = threading.RLock()
_SHAPES_REMEMBERED = 4096
_WARM_UPS = 2


class Replay(Protocol):
    """A captured run."""

    def replay(self) -> None:
        """Put it on the current stream."""

    def release(self) -> None:
        """Give its memory back; nothing may be running."""


class Graphs(Protocol):
    """What a device can do. All methods are called under a lock of :class:`Captures`, but for :meth:`busy`."""

    def busy(self) -> bool:
        """Whether the caller is capturing a graph itself, so that nothing may be captured or replayed here."""

    def turn(self) -> AbstractContextManager[None]:
        """Work put on the current stream inside comes after that of the turn before."""

    def capture(self, run: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        """A replay of ``run``, and where it leaves its results each time."""

    def wait(self) -> None:
        """Return once every turn's work is done."""


@dataclass
class _Captured:
    replay: Replay
    inputs: tuple[Tensor, ...]
    outputs: Outputs


class Captures:
    """Captured runs of one device, at most ``limit``; the least recently used goes first. Thread-safe.

    Args:
        graphs: the device; None where nothing can be captured (then every call just runs).
        limit: captured shapes of all functions together.
        capture_at: the call with a shape at which it is captured.
    """

    def __init__(self, graphs: Graphs | None, limit: int = 16, capture_at: int = 2) -> None:
        self._graphs = graphs
        self._limit, self.capture_at = limit, capture_at
        self._lock = threading.RLock()
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        # Calls so far of shapes that are not captured; None where that failed.
        self._calls: OrderedDict[Any, int | None] = OrderedDict()
        self._owners = itertools.count()

    def owner(self) -> int:
        """A name for a function, to be given with its calls."""
        return next(self._owners)

    def __len__(self) -> int:
        return len(self._captured)

    def call(self, owner: int, run: Run, inputs: tuple[Tensor, ...]) -> Outputs:
        """``run(*inputs)``, replayed where these shapes were captured; the results belong to the caller."""
        graphs = self._graphs
        if graphs is None or graphs.busy() or any(t.numel() == 0 for t in inputs):
            return run(*inputs)
        key = (owner, tuple((t.dtype, tuple(t.shape)) for t in inputs))
        with self._lock:
            captured = self._captured.get(key)
            if captured is None:
                first, wanted = self._count(key)
                if first:
                    with _FIRST_RUN:
                        return run(*inputs)
                if wanted:
                    captured = self._capture(graphs, key, run, inputs)
            if captured is not None:
                self._captured.move_to_end(key)
                with graphs.turn():
                    for own, given in zip(captured.inputs, inputs, strict=True):
                        own.copy_(given)
                    captured.replay.replay()
                    return {name: value.clone() for name, value in captured.outputs.items()}
        return run(*inputs)

    def clear(self) -> None:
        """Release every captured run."""
        with self._lock:
            self._shrink(0)

    def __del__(self) -> None:
        # Memory that a replay still uses must not go back before it is done. At exit nothing is left to ask.
        with contextlib.suppress(Exception):
            self._shrink(0)

    def _count(self, key: Any) -> tuple[bool, bool]:
        """Whether this is the shape's first call, and whether it is to be captured now."""
        calls = self._calls.get(key, 0)
        if calls is None:
            return False, False
        self._calls[key] = calls + 1
        self._calls.move_to_end(key)
        while len(self._calls) > _SHAPES_REMEMBERED:
            self._calls.popitem(last=False)
        return calls == 0 and self.capture_at > 1, calls + 1 >= self.capture_at

    def _capture(self, graphs: Graphs, key: Any, run: Run, inputs: tuple[Tensor, ...]) -> _Captured | None:
        """Capture a shape; None where that cannot be."""
        self._shrink(self._limit - 1)
        # A caller's inference mode must not make tensors here that others cannot write to.
        with torch.inference_mode(False), torch.no_grad():
            own = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in inputs)
            try:
                with _FIRST_RUN:
                    replay, outputs = graphs.capture(lambda: run(*own))
            except torch.OutOfMemoryError:
                # The other graphs' memory is worth less than this call.
                self._shrink(0)
                return None
            except Exception as error:  # what cannot be captured is told by many kinds of errors
                self._calls[key] = None
                shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
                warnings.warn(
                    f"inputs {shapes}: the network cannot be captured as a CUDA graph and runs kernel by kernel "
                    f"({_chain(error)})",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return None
        self._calls.pop(key, None)
        self._captured[key] = _Captured(replay, own, outputs)
        return self._captured[key]

    def _shrink(self, count: int) -> None:
        """Release the least recently used until ``count`` are left."""
        if self._graphs is None or len(self._captured) <= max(count, 0):
            return
        self._graphs.wait()
        while len(self._captured) > max(count, 0):
            _, old = self._captured.popitem(last=False)
            old.outputs.clear()
            old.replay.release()


def _chain(error: BaseException | None) -> str:
    """Errors, each with the one it came of: ending a capture that failed raises another."""
    parts = []
    while error is not None:
        parts.append(f"{type(error).__name__}: {error}"[:200])
        error = error.__context__
    return "; after ".join(parts[:3])


# --- CUDA ------------------------------------------------------------------------------------------------------------


class _Pool:
    """A memory pool and how many graphs live in it: its handle may not be used again once there are none."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.graphs = 0


class _CudaReplay:
    def __init__(self, graph: torch.cuda.CUDAGraph, pool: _Pool) -> None:
        self._graph, self._pool = graph, pool
        pool.graphs += 1

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        self._graph.reset()
        self._pool.graphs -= 1


class CudaGraphs:
    """:class:`Graphs` of a CUDA (or ROCm) device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: _Pool | None = None
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def busy(self) -> bool:
        """See :class:`Graphs`."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """See :class:`Graphs`."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def capture(self, run: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        """See :class:`Graphs`. Warms up and captures on a stream of its own, always the same, as the pool wants it."""
        with torch.cuda.device(self.device):
            if self._pool is None or self._pool.graphs == 0:
                self._pool = _Pool()
            pool, side, caller = self._pool, self._side, torch.cuda.current_stream(self.device)
            side.wait_stream(caller)
            # This context leaves the caller's stream current whatever happens: a failed capture's own does not.
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(graph, pool=pool.handle, stream=side, capture_error_mode="thread_local"):
                        outputs = run()
                except BaseException:
                    # Neither is known to be in order now.
                    self._pool, self._side = None, torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                    raise
            caller.wait_stream(side)
        return _CudaReplay(graph, pool), outputs

    def wait(self) -> None:
        """See :class:`Graphs`."""
        self._done.synchronize()

"""Which tile configuration a matrix-multiplying kernel is launched with.

:func:`pick` reads a fixed table by (architecture, op, shape class): every entry is compiled ahead of time, spills
nothing, and leaves the B-cos main loop as long as the plain one, so a launch costs no search and no surprise.

Autotuning is opt-in. Inside ``with autotuning():`` launchers hand :func:`autotune` a function that runs the kernel with
a given configuration; the fastest becomes the choice for that exact problem on that architecture, in front of the
table, until :func:`clear`. :func:`save` and :func:`load` keep such choices in a JSON file, and the environment variable
``BCOS_RT_TUNE`` names one that is loaded at the first launch.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from bcos_rt.errors import InvalidArgumentError, did_you_mean
from bcos_rt.files import ordinary_mode
from bcos_rt.kernels.triton import launch
from bcos_rt.kernels.triton.launch import TRITON_TYPES, Config

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "FAMILIES",
    "OPS",
    "SHAPE_CLASSES",
    "Problem",
    "Tuned",
    "autotune",
    "autotuning",
    "autotuning_enabled",
    "candidates",
    "choose",
    "clear",
    "family",
    "load",
    "pick",
    "save",
    "shape_class",
    "table",
    "tuned",
]

OPS = ("conv2d", "linear", "conv2d_transposed", "linear_transposed", "grad_weight")
FAMILIES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
ENVIRONMENT_VARIABLE = "BCOS_RT_TUNE"

# "few": so few rows (a classifier's batch) that the weights are all the traffic; "small": too few 128 x 128 tiles for
# most of the multiprocessors; "narrow": at most 64 output columns; "wide": everything else.
SHAPE_CLASSES = ("wide", "narrow", "small", "few")
_FEW_ROWS = 32
# Below this share of multiprocessors with work, half as large a tile gains more than its traffic costs.
_ENOUGH = 0.6

# Multiprocessors (compute units) of the architecture's data-centre or largest desktop part.
_UNITS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}

_INTERPRETER = Config(32, 32, 32)

# rows, columns, sum of a tile, warps, stages; 16-bit operands and fp32 (three tf32 products on NVIDIA: twice the
# bytes and three operand pairs in registers, hence smaller tiles). Limits that shaped it: 163 KB of shared memory per
# multiprocessor on sm_80, 227 on sm_90 and sm_100, 99 on sm_120, 64 on gfx942, where two stages are what its pipeliner
# wants; the fullest epilogue (residual, multiplier, gate and squares at once) must fit the registers too.
_Row = tuple[int, int, int, int, int]
_TABLE: dict[str, dict[int, dict[str, _Row]]] = {
    "sm_80": {
        16: {"wide": (128, 128, 64, 8, 3), "narrow": (64, 64, 64, 8, 3), "small": (64, 128, 64, 4, 3)},
        32: {"wide": (64, 128, 32, 8, 3), "narrow": (64, 64, 32, 8, 3), "small": (64, 64, 16, 4, 4)},
    },
    "sm_90": {
        16: {"wide": (128, 128, 64, 8, 3), "narrow": (256, 64, 64, 8, 3), "small": (64, 128, 64, 4, 4)},
        32: {"wide": (128, 64, 32, 8, 3), "narrow": (128, 64, 32, 8, 3), "small": (64, 64, 32, 4, 3)},
    },
    "sm_100": {
        16: {"wide": (128, 128, 32, 8, 4), "narrow": (256, 64, 64, 8, 3), "small": (64, 64, 64, 4, 4)},
        32: {"wide": (128, 64, 32, 8, 3), "narrow": (128, 64, 32, 8, 3), "small": (64, 64, 32, 4, 3)},
    },
    "sm_120": {
        16: {"wide": (128, 128, 32, 8, 3), "narrow": (256, 64, 32, 8, 3), "small": (64, 128, 32, 4, 3)},
        32: {"wide": (64, 128, 32, 8, 2), "narrow": (64, 64, 16, 4, 3), "small": (64, 64, 16, 4, 3)},
    },
    "gfx942": {
        16: {"wide": (128, 128, 64, 8, 2), "narrow": (128, 64, 64, 4, 2), "small": (64, 64, 64, 4, 2)},
        32: {"wide": (128, 128, 32, 8, 2), "narrow": (128, 64, 32, 4, 2), "small": (64, 64, 32, 4, 2)},
    },
}
_FEW: dict[str, dict[int, _Row]] = {
    "sm_80": {16: (32, 32, 128, 4, 3), 32: (32, 32, 32, 4, 4)},
    "sm_90": {16: (32, 32, 64, 4, 4), 32: (32, 32, 32, 4, 4)},
    "sm_100": {16: (32, 32, 64, 4, 4), 32: (32, 32, 32, 4, 4)},
    "sm_120": {16: (32, 32, 64, 4, 4), 32: (32, 32, 32, 4, 4)},
    "gfx942": {16: (32, 32, 64, 4, 2), 32: (32, 32, 32, 4, 2)},
}
# Where one op needs something else than the others.
_EXCEPTIONS: dict[tuple[str, str, int, str], _Row] = {}

# Tried by the autotuner and ranked by the static plan, beside the table's own.
_MORE: dict[str, dict[int, tuple[_Row, ...]]] = {
    "sm_80": {16: ((128, 128, 32, 8, 4), (128, 64, 32, 8, 4)), 32: ((128, 64, 32, 8, 2),)},
    "sm_90": {16: ((128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (64, 64, 64, 4, 4)), 32: ((128, 128, 16, 8, 3),)},
    "sm_100": {16: ((256, 128, 64, 8, 3), (128, 128, 64, 8, 3)), 32: ((128, 128, 32, 8, 2),)},
    "sm_120": {16: ((128, 128, 64, 8, 2), (64, 64, 64, 4, 3)), 32: ((128, 64, 32, 8, 2),)},
    "gfx942": {16: ((256, 128, 32, 8, 2), (128, 128, 32, 4, 2)), 32: ((128, 128, 16, 4, 2),)},
}


def family(arch: str) -> str:
    """Architecture of :data:`FAMILIES` whose entries serve ``arch``.

    A GPU without entries gets those of the nearest relative that asks for no more shared memory than it has: sm_87
    those of sm_80, sm_86 and sm_89 those of sm_120, sm_10x and sm_11x those of sm_100, every AMD architecture those of
    gfx942. Anything unknown, and NVIDIA before sm_80, gets sm_120's, the most modest of NVIDIA's.
    """
    if arch in FAMILIES:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    number = arch.removeprefix("sm_").rstrip("af")
    if number == "87":
        return "sm_80"
    if len(number) == 3 and number[:2] in ("10", "11"):
        return "sm_100"
    return "sm_120"


def shape_class(m: int, n: int, arch: str = "sm_90", op: str = "conv2d") -> str:
    """Shape class, one of :data:`SHAPE_CLASSES`, of an output of ``m`` rows and ``n`` columns."""
    if m <= _FEW_ROWS:
        return "few"
    # A weight's gradient is never "small": its long sums are split until there are programs enough.
    if op != "grad_weight" and -(-m // 128) * -(-n // 128) < _ENOUGH * _UNITS[family(arch)]:
        return "small"
    return "narrow" if n <= 64 else "wide"


def table(op: str, arch: str, dtype: torch.dtype) -> dict[str, Config]:
    """The built-in table's configuration for every shape class.

    Raises:
        InvalidArgumentError: no such op.
    """
    if op not in OPS:
        raise InvalidArgumentError("op", repr(op), " or ".join(map(repr, OPS)), did_you_mean(op, OPS))
    return dict(_table(op, family(arch), _bits(dtype)))


@cache
def _table(op: str, place: str, bits: int) -> Mapping[str, Config]:
    rows = {**_TABLE[place][bits], "few": _FEW[place][bits]}
    return {name: Config(*_EXCEPTIONS.get((place, op, bits, name), rows[name])) for name in SHAPE_CLASSES}


def candidates(op: str, arch: str, m: int, n: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """What :func:`autotune` tries: the table's choice first, then its other entries and a few larger tiles."""
    own = table(op, arch, dtype)
    more = (Config(*row) for row in _MORE[family(arch)][_bits(dtype)])
    return tuple(dict.fromkeys((own[shape_class(m, n, arch, op)], *own.values(), *more)))


def pick(op: str, arch: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """Configuration for ``op``, one of :data:`OPS`: what was tuned or loaded for this very problem, else the table's.

    Args:
        arch: "sm_90", "gfx942", ... or "interpreter"; see :func:`family` for one without entries.
        m, n, k: rows and columns of the output (per group), length of the sum.
        dtype: storage type of the operands.

    Raises:
        InvalidArgumentError: no such op, or the file ``BCOS_RT_TUNE`` names cannot be used.
    """
    if arch == "interpreter":
        return _INTERPRETER
    _load_environment()
    if _tuned:
        found = _tuned.get(Problem(op, arch, m, n, k, TRITON_TYPES[dtype]))
        if found is not None:
            return found.config
    return table(op, arch, dtype)[shape_class(m, n, arch, op)]


def _bits(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 16


@dataclass(frozen=True, order=True)
class Problem:
    """What a tuned configuration is for: op, architecture, output rows and columns, length of the sum, "bf16" etc."""

    op: str
    arch: str
    m: int
    n: int
    k: int
    dtype: str


@dataclass(frozen=True)
class Tuned:
    """A measured winner and its time in milliseconds."""

    config: Config
    milliseconds: float


_tuned: dict[Problem, Tuned] = {}
_lock = threading.RLock()
_environment_read = False
# A count, not a context variable: backward passes run in autograd's own threads.
_enabled = 0


@contextmanager
def autotuning() -> Iterator[None]:
    """Launches inside measure :func:`candidates` for every problem not tuned yet, and use the fastest from then on.

    The first call of each shape is slow (seconds: it compiles and times). Afterwards leave the block: the choices stay.
    """
    global _enabled
    with _lock:
        _enabled += 1
    try:
        yield
    finally:
        with _lock:
            _enabled -= 1


def autotuning_enabled() -> bool:
    """Whether anyone is inside :func:`autotuning`, in whatever thread."""
    return _enabled > 0


def choose(op: str, run: Callable[[Config], object], arch: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """The launchers' way in: :func:`autotune` inside :func:`autotuning`, else :func:`pick`."""
    if autotuning_enabled():
        return autotune(op, run, arch, m, n, k, dtype)
    return pick(op, arch, m, n, k, dtype)


def autotune(
    op: str,
    run: Callable[[Config], object],
    arch: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """Measure ``run(config)`` for each of :func:`candidates` and remember the fastest for :func:`pick`.

    A candidate that cannot be compiled or launched (it needs more registers or shared memory than there are) is passed
    over. Where nothing can be measured (the interpreter, a recording, a CUDA graph being captured) and where the
    problem was tuned or loaded before, this is :func:`pick`.

    Args:
        run: launches the kernel with a configuration, on the same tensors each time; must be repeatable.
        timer: milliseconds of a function; by default the median of ``triton.testing.do_bench``.

    Raises:
        TritonError: the last failure, where every candidate failed.
    """
    problem = Problem(op, arch, m, n, k, TRITON_TYPES[dtype])
    _load_environment()
    if arch == "interpreter" or problem in _tuned or not _measurable():
        return pick(op, arch, m, n, k, dtype)
    measure = timer or _median
    with _lock:
        best: Tuned | None = None
        failure: Exception | None = None
        for config in candidates(op, arch, m, n, dtype):
            try:
                milliseconds = measure(lambda config=config: run(config))  # type: ignore[misc]
            except (TritonError, RuntimeError) as error:
                if not _unusable(error):
                    raise
                failure = error
                continue
            if best is None or milliseconds < best.milliseconds:
                best = Tuned(config, milliseconds)
        if best is None:
            raise failure if failure is not None else RuntimeError(f"no candidate for {problem}")
        _tuned[problem] = best
    return best.config


def _measurable() -> bool:
    if launch._recorder.get() is not None:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _median(function: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(function, return_mode="median"))


def _unusable(error: Exception) -> bool:
    """Whether it speaks against one configuration only. Anything else (an illegal access, say) must not be hidden."""
    if isinstance(error, TritonError):
        return True
    message = str(error).lower()
    return "passmanager::run failed" in message or "out of resource" in message or "too many resources" in message


def tuned() -> Mapping[Problem, Tuned]:
    """What was tuned or loaded so far, a copy."""
    _load_environment()
    return dict(_tuned)


def clear() -> None:
    """Forget what was tuned and loaded; the table alone decides again."""
    global _environment_read
    with _lock:
        _tuned.clear()
        _environment_read = True


_FORMAT = "bcos-rt tile configurations"
_VERSION = 1


def save(path: str | os.PathLike[str]) -> Path:
    """Write everything tuned or loaded so far as JSON, for :func:`load`; an existing file is replaced in one step.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    entries = [
        {**asdict(problem), "config": asdict(found.config), "milliseconds": found.milliseconds}
        for problem, found in sorted(tuned().items(), key=lambda item: item[0])
    ]
    content = {"format": _FORMAT, "version": _VERSION, "triton": triton.__version__, "entries": entries}
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            ordinary_mode(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidArgumentError("path", f"{str(path)!r} ({error})", "a path that can be written") from error
    return Path(path)


def load(path: str | os.PathLike[str]) -> int:
    """Read a file of :func:`save`; its entries come before the table and before equal ones tuned earlier.

    Returns:
        How many entries it held.

    Raises:
        InvalidArgumentError: no such file, or not one of these; names the file and the key. Nothing is taken from it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError("path", f"{str(path)!r} ({error})", "a readable file") from error
    except ValueError as error:
        raise InvalidArgumentError("path", f"{str(path)!r} ({error})", "a JSON file written by tune.save") from error
    entries = _Reader(str(path)).entries(content)
    with _lock:
        _tuned.update(entries)
    return len(entries)


def _load_environment() -> None:
    global _environment_read
    if _environment_read:
        return
    with _lock:
        path = os.environ.get(ENVIRONMENT_VARIABLE)
        if path and not _environment_read:
            load(path)
        _environment_read = True


@dataclass(frozen=True)
class _Reader:
    """Turns a file's JSON into entries, or says which key of which file is wrong."""

    path: str

    def entries(self, content: object) -> dict[Problem, Tuned]:
        top = self._mapping(content, "the file")
        if top.get("format") != _FORMAT:
            raise self._wrong("format", top.get("format"), repr(_FORMAT))
        if top.get("version") != _VERSION:
            raise self._wrong("version", top.get("version"), f"{_VERSION}, the one this release writes")
        listed = top.get("entries")
        if not isinstance(listed, list):
            raise self._wrong("entries", listed, "a list")
        return dict(self._entry(entry, f"entries[{i}]") for i, entry in enumerate(listed))

    def _entry(self, value: object, key: str) -> tuple[Problem, Tuned]:
        entry = self._mapping(value, key)
        problem = Problem(
            op=self._one_of(entry, key, "op", OPS),
            arch=self._arch(entry, key),
            m=self._integer(entry, key, "m"),
            n=self._integer(entry, key, "n"),
            k=self._integer(entry, key, "k"),
            dtype=self._one_of(entry, key, "dtype", ("fp16", "bf16", "fp32")),
        )
        config = self._mapping(entry.get("config"), f"{key}.config")
        sizes = {f.name: self._integer(config, f"{key}.config", f.name) for f in fields(Config)}
        for name in ("block_m", "block_n", "block_k", "num_warps"):
            least = 1 if name == "num_warps" else 16
            if sizes[name] < least or sizes[name] & (sizes[name] - 1):
                raise self._wrong(f"{key}.config.{name}", sizes[name], f"a power of two, at least {least}")
        milliseconds = entry.get("milliseconds")
        if isinstance(milliseconds, bool) or not isinstance(milliseconds, int | float) or not milliseconds >= 0:
            raise self._wrong(f"{key}.milliseconds", milliseconds, "a time in milliseconds")
        return problem, Tuned(Config(**sizes), float(milliseconds))

    def _mapping(self, value: object, key: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def _arch(self, entry: Mapping[str, Any], key: str) -> str:
        value = entry.get("arch")
        if not isinstance(value, str) or not value.startswith(("sm_", "gfx")):
            raise self._wrong(f"{key}.arch", value, "an architecture such as 'sm_90'")
        return value

    def _one_of(self, entry: Mapping[str, Any], key: str, name: str, known: tuple[str, ...]) -> str:
        value = entry.get(name)
        if not isinstance(value, str) or value not in known:
            hint = did_you_mean(value, known) if isinstance(value, str) else ""
            raise self._wrong(f"{key}.{name}", value, " or ".join(map(repr, known)), hint)
        return value

    def _integer(self, entry: Mapping[str, Any], key: str, name: str) -> int:
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(f"{key}.{name}", value, "a positive integer")
        return value

    def _wrong(self, key: str, value: object, expected: str, hint: str = "") -> InvalidArgumentError:
        return InvalidArgumentError(key, f"{value!r} in {self.path!r}", expected, hint)

"""What was compiled, kept in the repository (docs/kernels.json), so that not every check need compile everything.

One launch a line: what it is, a key of everything its code depends on, and its analysis. A key that matches says that
the numbers are those a compiler would give again; :func:`look_up` has the compiler give some of them again, and all
that have no key. Numbers at their default (no spills, no tensor memory, ...) are left out.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.static.cases import Case
from bcos_rt.kernels.static.compile import CACHE, Analysis, NarrowAccess, analyse_all, cache_key
from bcos_rt.kernels.static.disassembly import KINDS
from bcos_rt.kernels.triton.launch import Launch

__all__ = ["RENEW", "Difference", "LookUp", "Recorded", "key", "look_up", "read", "row", "sample", "text"]

RENEW = "python -m bcos_rt.kernels.static report"

# Of 64: among some thousand launches two share a key with a probability of 1e-13.
_KEY_DIGITS = 16


@dataclass(frozen=True)
class Recorded:
    """One line of the file.

    Attributes:
        key: of the launch, see :func:`key`. arch: its target.
        what: kernel, target, tile, type and variant, for messages.
        analysis: what the compiler made of it.
    """

    key: str
    arch: str
    what: str
    analysis: Analysis


@dataclass(frozen=True)
class Difference:
    """A recorded launch of which a compiler now makes something else; ``fields``: name -> (recorded, compiled)."""

    what: str
    fields: Mapping[str, tuple[Any, Any]]

    def __str__(self) -> str:
        numbers = "; ".join(f"{name}: recorded {was}, compiled {now}" for name, (was, now) in self.fields.items())
        return f"{self.what}: {numbers}"


@dataclass(frozen=True)
class LookUp:
    """Analyses of launches, most of them recorded ones.

    Attributes:
        analyses: by key, of all launches asked for; compiled ones take precedence over recorded ones.
        compiled: how many were compiled (or taken from the cache of compiled ones); sampled: of these, recorded ones.
        differences: recorded launches that compile to something else.
        missing: launches that are not recorded; obsolete: recorded ones that nothing launches.
    """

    analyses: Mapping[str, Analysis]
    compiled: int
    sampled: int
    differences: Sequence[Difference]
    missing: Sequence[str]
    obsolete: Sequence[str]


def key(launch: Launch, arch: str) -> str:
    """16 digits that stand for all that the analysis depends on, the same on every machine.

    That is: Triton's version, the source of the kernel with all it calls, the launch, the target, and the source of
    the analysis; no path, date or Python version.
    """
    return cache_key(launch, arch)[:_KEY_DIGITS]


def row(case: Case, analysis: Analysis) -> dict[str, Any]:
    """A JSON-ready object of one launch; ``compared_with`` is the key of its plain convolution."""
    launch = case.launch
    out: dict[str, Any] = {"kernel": launch.name, "variant": case.variant, "arch": case.arch}
    out |= {"config": str(launch.config), "dtype": launch.dtype}
    out |= {name: True for name in ("gemm", "plain") if getattr(launch, name)}
    out |= {f.name: value for f in fields(Analysis) if (value := getattr(analysis, f.name)) != _default(f)}
    if analysis.loop is not None:
        out["loop"] = {kind: number for kind, number in analysis.loop.items() if number}
    if analysis.narrow:
        out["narrow"] = [asdict(narrow) for narrow in analysis.narrow]
    out["key"] = key(launch, case.arch)
    if case.plain is not None:
        out["compared_with"] = key(case.plain, case.arch)
    return out


def _default(field: Any) -> Any:
    return None if field.default is MISSING else field.default


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The file: a list with one object per line."""
    content = ",\n".join(json.dumps(one) for one in rows)
    return f"[\n{content}\n]\n"


def read(path: Path) -> dict[str, Recorded]:
    """Recorded launches by key, in the file's order.

    Raises:
        InvalidArgumentError: no such file, or not one that :func:`text` made.
    """
    expected = f"a file that `{RENEW}` wrote"
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError("recorded", f"{path} ({error.strerror})", expected) from error
    except ValueError as error:
        raise InvalidArgumentError("recorded", f"{path} ({error})", expected) from error
    if not isinstance(lines, list) or not lines:
        raise InvalidArgumentError("recorded", f"{path} (no list of launches)", expected)
    found: dict[str, Recorded] = {}
    for number, line in enumerate(lines, start=1):
        try:
            one = _recorded(line)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError("recorded", f"{path} (launch {number}: {_said(error)})", expected) from error
        if one.key in found:
            raise InvalidArgumentError("recorded", f"{path} (launch {number}: {one.key} for the second time)", expected)
        found[one.key] = one
    return found


_ABOUT = ("kernel", "arch", "config", "dtype", "variant")
_ABOUT_TOO = ("key", "gemm", "plain", "compared_with")


def _recorded(line: Any) -> Recorded:
    if not isinstance(line, dict):
        raise TypeError("no object")
    if not re.fullmatch(rf"[0-9a-f]{{{_KEY_DIGITS}}}", str(line["key"])):
        raise ValueError(f"key {line['key']!r}")
    about = {name: str(line[name]) for name in _ABOUT}
    numbers = {name: value for name, value in line.items() if name not in (*_ABOUT, *_ABOUT_TOO)}
    known = {f.name: _default(f) for f in fields(Analysis)}
    for name, value in numbers.items():
        if name not in known:
            raise ValueError(f"unknown field {name!r}")
        kind = type(known[name])
        # A float may have come out as a whole number; a bool is no number.
        fits = type(value) is kind or (kind is float and type(value) is int)
        if name not in ("loop", "narrow") and not fits:
            raise TypeError(f"{name} {value!r}")
    if "loop" in numbers:
        numbers["loop"] = _loop(numbers["loop"])
    numbers["narrow"] = tuple(NarrowAccess(**narrow) for narrow in numbers.get("narrow", ()))
    return Recorded(line["key"], line["arch"], _what(**about), Analysis(**numbers))


def _loop(counts: Any) -> dict[str, int]:
    if not isinstance(counts, dict) or not set(counts) <= set(KINDS) or {type(n) for n in counts.values()} - {int}:
        raise TypeError(f"loop {counts!r}")
    return {kind: counts.get(kind, 0) for kind in KINDS}


def _said(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _what(kernel: str, arch: str, config: str, dtype: str, variant: str) -> str:
    return f"{kernel} {arch} {config} {dtype} ({variant})"


def _of(case: Case) -> str:
    return _what(case.launch.name, case.arch, str(case.launch.config), case.launch.dtype, case.variant)


def sample(cases: Sequence[Case], seed: int) -> list[Case]:
    """One launch of every kernel for every target; the same ones for the same seed."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.launch.name, case.arch), []).append(case)
    draw = random.Random(seed)
    return [draw.choice(groups[name]) for name in sorted(groups)]


def look_up(
    cases: Sequence[Case],
    recorded: Mapping[str, Recorded],
    seed: int,
    folder: Path = CACHE,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> LookUp:
    """Analyses of ``cases`` and their plain convolutions: the recorded ones, and compiled ones of the others.

    Compiled as well are a :func:`sample` of the recorded launches, and all whose recorded compilation failed (it may
    have been for want of memory). See :func:`compile.analyse_all` for the other arguments.
    """
    launches: dict[str, tuple[Launch, str]] = {}
    names: dict[str, str] = {}
    for case in cases:
        launches[key(case.launch, case.arch)] = (case.launch, case.arch)
        names[key(case.launch, case.arch)] = _of(case)
    for case in cases:
        if case.plain is not None and (plain := key(case.plain, case.arch)) not in launches:
            launches[plain] = (case.plain, case.arch)
            names[plain] = f"{_of(case)}, its plain convolution"
    missing = [one for one in launches if one not in recorded]
    kept = [case for case in cases if key(case.launch, case.arch) in recorded]
    again = {key(case.launch, case.arch) for case in sample(kept, seed)}
    again |= {one for one in launches if one in recorded and recorded[one].analysis.error}
    wanted = [one for one in launches if one in again or one not in recorded]
    compiled = dict(zip(wanted, analyse_all([launches[one] for one in wanted], folder, workers, progress), strict=True))
    differences = [
        Difference(names[one], different)
        for one in wanted
        if one in again and (different := _different(recorded[one].analysis, compiled[one]))
    ]
    return LookUp(
        analyses={one: compiled[one] if one in compiled else recorded[one].analysis for one in launches},
        compiled=len(wanted),
        sampled=len(again),
        differences=differences,
        missing=[names[one] for one in missing],
        obsolete=[line.what for one, line in recorded.items() if one not in launches],
    )


def _different(was: Analysis, now: Analysis) -> dict[str, tuple[Any, Any]]:
    pairs = {f.name: (getattr(was, f.name), getattr(now, f.name)) for f in fields(Analysis)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

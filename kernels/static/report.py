"""What the compiled kernels must fulfil, and the pages that say what they are like: docs/kernels.md, docs/kernels.json.

Rules, for every launch of :mod:`cases`:

* *compiles* for its target;
* *spills*: nothing spilled, no private memory;
* *tensor cores*: matrix instructions in the main loop of every kernel that multiplies matrices;
* *vectors*: operand and output tiles with aligned channels move 16 bytes at a time;
* *loop*: the main loop of a B-cos or transposed kernel is at most 1.03 times as long as that of the plain convolution
  built from the same source with the same tile, type and target, rounded up to whole instructions (for as many matrix
  instructions, should a compiler unroll only one of the two). Register copies and waits do not count: the same source
  has 0, 8 or 16 of them from one epilogue to the next, plain or not.

Where a target makes a rule impossible, :data:`EXCEPTIONS` says so and why; an entry that nothing needs fails too.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import triton

from bcos_rt.files import write_text
from bcos_rt.kernels.static import record
from bcos_rt.kernels.static.cases import Case
from bcos_rt.kernels.static.compile import CACHE, Analysis
from bcos_rt.kernels.static.disassembly import KINDS
from bcos_rt.kernels.static.targets import TARGETS

__all__ = [
    "EXCEPTIONS",
    "LOOP_LIMIT",
    "RULES",
    "KnownException",
    "Result",
    "Violation",
    "compile_cases",
    "judged",
    "rows",
    "stale",
    "violations",
    "write_report",
]

LOOP_LIMIT = 1.03

RULES = ("compiles", "spills", "tensor cores", "vectors", "loop")


@dataclass(frozen=True)
class KnownException:
    """A rule that cannot hold somewhere; names may have wildcards (``fnmatch``)."""

    rule: str
    kernel: str
    arch: str
    dtype: str
    variant: str
    reason: str

    def covers(self, violation: Violation) -> bool:
        return self.rule == violation.rule and all(
            fnmatchcase(getattr(violation, name), getattr(self, name))
            for name in ("kernel", "arch", "dtype", "variant")
        )


EXCEPTIONS: tuple[KnownException, ...] = (
    KnownException(
        "loop", "*_transposed", "sm_100", "fp32", "*, training",
        "4 to 7 % more address instructions where the epilogue adds the norm's gradient; the explanation's variants of "
        "the same loop are within the limit",
    ),
    KnownException(
        "loop", "conv2d_transposed", "sm_120", "bf16", "3x3, 8 groups", "4 of 98 instructions, addresses of two strides"
    ),
    KnownException(
        "loop", "linear_transposed", "gfx942", "fp32", "tokens, identity, multiplier, raw with gate",
        "3 scalar instructions more in a loop of 57, which issue beside the vector ones",
    ),
    KnownException(
        "spills", "conv2d", "gfx942", "fp32", "7x7 stem, stride 2",
        "6 scalar registers kept in lanes of a vector register; no memory is touched (0 bytes of private memory)",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Violation:
    """A launch that breaks a rule of :data:`RULES`, and how."""

    kernel: str
    arch: str
    config: str
    dtype: str
    variant: str
    rule: str
    what: str


@dataclass(frozen=True)
class Result:
    """A case and what was compiled; ``plain`` is the analysis of the case's plain convolution."""

    case: Case
    analysis: Analysis
    plain: Analysis | None

    def broken(self) -> list[Violation]:
        """Rules this launch breaks."""
        launch, found = self.case.launch, self.analysis
        if found.error:
            return [self._violation("compiles", found.error)]
        out = []
        if found.spills or found.stack_bytes:
            out.append(self._violation("spills", f"{found.spills} spills, {found.stack_bytes} bytes of private memory"))
        if launch.gemm and not found.loop_instructions:
            where = "only outside loops" if found.mma_instructions else "nowhere"
            out.append(self._violation("tensor cores", f"matrix instructions {where}"))
        if launch.vector_operands:
            for narrow in found.narrow:
                got = f"{narrow.size}-byte" if narrow.size else "no"
                out.append(
                    self._violation(
                        "vectors", f"{got} {narrow.direction}s at {narrow.place}, not {narrow.expected}-byte"
                    )
                )
            if not found.tile_loads or not found.tile_stores:
                out.append(self._violation("vectors", "no load or no store of a tile found to check"))
        ratio = self.loop_ratio
        if self.plain is not None and ratio is not None and self._loop_too_long(ratio):
            what = f"main loop of {found.loop_instructions} instructions, plain {self.plain.loop_instructions}"
            out.append(self._violation("loop", f"{what}: {ratio:.3f} x"))
        return out

    @property
    def loop_ratio(self) -> float | None:
        """Length of the main loop over the plain convolution's, for the same number of matrix instructions.

        The number differs where a compiler unrolls one loop and not the other. None where there is nothing to compare.
        """
        found, plain = self.analysis, self.plain
        if plain is None or not plain.loop_instructions or not found.loop_instructions:
            return None
        steps = (found.loop or {}).get("mma", 1) / (plain.loop or {}).get("mma", 1)
        return found.loop_instructions / (plain.loop_instructions * steps)

    def _loop_too_long(self, ratio: float) -> bool:
        # Rounded up to whole instructions: three per cent of a short loop is less than one.
        plain = self.analysis.loop_instructions / ratio
        return self.analysis.loop_instructions > plain + math.ceil((LOOP_LIMIT - 1) * plain - 1e-9)

    def _violation(self, rule: str, what: str) -> Violation:
        launch = self.case.launch
        return Violation(launch.name, self.case.arch, str(launch.config), launch.dtype, self.case.variant, rule, what)


def compile_cases(
    found: Sequence[Case],
    folder: Path = CACHE,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Result]:
    """Compile and analyse every case; see :func:`compile.analyse_all` for the arguments."""
    return judged(found, record.look_up(found, {}, 0, folder, workers, progress).analyses)


def judged(found: Sequence[Case], analyses: Mapping[str, Analysis]) -> list[Result]:
    """Results of cases, from the analyses of their launches and plain convolutions by :func:`record.key`."""
    return [
        Result(
            case,
            analyses[record.key(case.launch, case.arch)],
            None if case.plain is None else analyses[record.key(case.plain, case.arch)],
        )
        for case in found
    ]


def violations(
    results: Iterable[Result], exceptions: Sequence[KnownException] = EXCEPTIONS
) -> tuple[list[Violation], dict[KnownException, list[Violation]]]:
    """Broken rules that no exception covers, and those that one does, by exception."""
    failed: list[Violation] = []
    excused: dict[KnownException, list[Violation]] = {exception: [] for exception in exceptions}
    for result in results:
        for violation in result.broken():
            for exception in exceptions:
                if exception.covers(violation):
                    excused[exception].append(violation)
                    break
            else:
                failed.append(violation)
    return failed, excused


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One JSON-ready object per compiled launch, see :func:`record.row`."""
    return [record.row(result.case, result.analysis) for result in results]


def write_report(results: Sequence[Result], folder: Path = Path("docs")) -> tuple[Path, Path]:
    """Write ``kernels.md`` and ``kernels.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "kernels.md", folder / "kernels.json"
    write_text(data, record.text(rows(results)))
    write_text(page, _page(results))
    return page, data


def stale(results: Sequence[Result], data: Path) -> list[str]:
    """Which of ``data`` (kernels.json) and the page beside it are not what :func:`write_report` makes of ``results``.

    Their text is compared, so that descriptions, order, rules and exceptions are held to the source as well.
    """
    wanted = {data: record.text(rows(results)), data.with_suffix(".md"): _page(results)}
    return [str(path) for path, text in wanted.items() if not path.is_file() or path.read_bytes() != text.encode()]


def _versions() -> str:
    tools = []
    for name in ("ptxas", "ptxas_blackwell"):
        tool = getattr(triton.knobs.nvidia, name, None)
        if tool is None:
            continue
        said = subprocess.run([tool.path, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"V(\d+\.\d+\.\d+)", said)
        tools.append(f"{Path(tool.path).name} {version.group(1) if version else 'of unknown version'}")
    return f"Triton {triton.__version__} ({', '.join(tools)}; AMD: the LLVM inside Triton)"


def _page(results: Sequence[Result]) -> str:
    failed, excused = violations(results)
    archs = [arch for arch in TARGETS if any(r.case.arch == arch for r in results)]
    lines = [
        "# The kernels as compiled",
        "",
        f"What {_versions()}",
        f"makes of the Triton kernels, ahead of time: {len(results)} launches, as the launchers ask for them, for",
        f"{', '.join(archs)}. **Nothing here ran on a GPU**: these are numbers of compilers and",
        "disassemblers, not measurements. `loop` counts the machine instructions of the main loop, `plain` those of",
        "the plain convolution built from the same source, with the same tile, type and target, without B-cos.",
        "Register copies and waits are listed (`copy`, `wait`) and not counted: compilers put them in as it happens.",
        "",
        "Made by `python -m bcos_rt.kernels.static report`, which needs no GPU; do not edit. Every launch is an object",
        "in [kernels.json](kernels.json): numbers that are 0 are left out, `compared_with` is the `key` of its plain",
        "convolution. `make kernels` fails if a rule below is broken, or if these files are not what the source gives:",
        "it compiles the launches whose code changed, and of every kernel one more for each target.",
        "",
        "## Rules",
        "",
        "| rule | launches it is asked of | broken | known exceptions |",
        "| --- | ---: | ---: | ---: |",
    ]
    for rule, (text, asked) in _RULE_TEXTS.items():
        broken = sum(v.rule == rule for v in failed)
        known = sum(v.rule == rule for vs in excused.values() for v in vs)
        lines.append(f"| {text} | {sum(map(asked, results))} | {broken} | {known} |")
    if any(excused.values()):
        lines += ["", "Known exceptions:", ""]
        lines += [
            f"- {e.rule}, `{e.kernel}` on {e.arch}, {e.dtype}, {e.variant} ({len(vs)} launches): {e.reason}"
            for e, vs in excused.items()
            if vs
        ]
    if failed:
        lines += ["", "Broken:", ""]
        lines += [f"- {v.rule}: `{v.kernel}` {v.arch} {v.config} {v.dtype} ({v.variant}): {v.what}" for v in failed]
    lines += _main_loops(results, archs)
    lines += ["", "## Each kernel", ""]
    lines += [
        "Smallest to largest over all launches of a kernel for one target and type. Occupancy: resident warps as a",
        "part of those the multiprocessor has room for.",
    ]
    for name in dict.fromkeys(r.case.launch.name for r in results):
        lines += _kernel_section(name, [r for r in results if r.case.launch.name == name and not r.case.launch.plain])
    lines += [
        "",
        "## Targets",
        "",
        "| arch | device | multiprocessors | clock GHz | memory GB/s | bf16 TFLOP/s | source |",
    ]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for arch in archs:
        t = TARGETS[arch]
        lines.append(
            f"| {arch} | {t.device} | {t.multiprocessors} | {t.clock_ghz} | {t.bandwidth_gb_s:.0f} "
            f"| {t.tflops['bf16']} | {t.source} |"
        )
    return "\n".join(lines) + "\n"


_RULE_TEXTS: dict[str, tuple[str, Callable[[Result], bool]]] = {
    "compiles": ("compiles for its target", lambda r: True),
    "spills": ("no spilled registers, no private memory", lambda r: True),
    "tensor cores": ("matrix instructions in the main loop", lambda r: r.case.launch.gemm),
    "vectors": ("16-byte loads and stores of operand and output tiles", lambda r: r.case.launch.vector_operands),
    "loop": (f"main loop at most {LOOP_LIMIT} x the plain convolution's", lambda r: r.plain is not None),
}


def _main_loops(results: Sequence[Result], archs: Sequence[str]) -> list[str]:
    """One table per target: the main loop, by kind, of each kernel's first variant at its first tile."""
    lines = ["", "## Main loops", "", "Each kernel's fullest epilogue at the table's tile for large problems."]
    kinds = [k for k in KINDS if any((r.analysis.loop or {}).get(k) for r in results)]
    for arch in archs:
        lines += ["", f"### {arch} ({TARGETS[arch].device})", ""]
        lines += [f"| kernel | type | tile | loop | plain | {' | '.join(kinds)} |"]
        lines += [f"| --- | --- | --- | ---: | ---: |{' ---: |' * len(kinds)}"]
        shown = set()
        for r in results:
            launch = r.case.launch
            key = (launch.name, r.case.variant.split(",")[0], launch.dtype)
            if r.case.arch != arch or r.plain is None or key in shown or "all outputs" not in r.case.variant + _also(r):
                continue
            shown.add(key)
            counts = " | ".join(str((r.analysis.loop or {}).get(kind, 0)) for kind in kinds)
            lines.append(
                f"| {launch.name}, {key[1]} | {launch.dtype} | {launch.config} | {r.analysis.loop_instructions} "
                f"| {r.plain.loop_instructions} | {counts} |"
            )
    return lines


def _also(result: Result) -> str:
    # The transposed kernels' fullest epilogue writes the raw gradient too.
    return "all outputs" if "raw with" in result.case.variant else ""


def _kernel_section(name: str, results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    variants = dict.fromkeys(r.case.variant for r in results)
    lines = ["", f"### {name}", "", f"{len(results)} launches: {'; '.join(variants)}.", ""]
    lines += ["| arch | type | registers | spills | shared KB | occupancy | loop / plain, at most |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for arch, dtype in dict.fromkeys((r.case.arch, r.case.launch.dtype) for r in results):
        here = [r for r in results if (r.case.arch, r.case.launch.dtype) == (arch, dtype) and not r.analysis.error]
        if not here:
            continue
        ratios = [ratio for r in here if (ratio := r.loop_ratio) is not None]
        registers = _range([r.analysis.registers for r in here], "{}")
        shared = _range([r.analysis.shared_bytes / 1024 for r in here], "{:.0f}")
        occupancy = _range([100 * r.analysis.occupancy for r in here], "{:.0f}")
        lines.append(
            f"| {arch} | {dtype} | {registers} | {max(r.analysis.spills for r in here)} | {shared} | {occupancy} % "
            f"| {f'{max(ratios):.3f}' if ratios else '-'} |"
        )
    return lines


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"

"""Compiles recorded launches ahead of time and says what came out, without a GPU; results are kept on disk.

Two caches, both below one folder (``build/kernels`` by default): Triton's own, and the analysed results as JSON, keyed
by Triton's version, the kernel's source with all it calls, the launch, the target and the source of the analysis.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.static import disassembly
from bcos_rt.kernels.static.targets import TARGETS
from bcos_rt.kernels.triton.launch import Launch, interpreting

__all__ = [
    "CACHE",
    "VECTOR_BYTES",
    "Analysis",
    "NarrowAccess",
    "analyse",
    "analyse_all",
    "cache_key",
    "compile_launch",
    "narrow_accesses",
    "operand_tiles",
]

CACHE = Path("build/kernels")

# Bytes of the widest load or store of one thread that is asked for.
VECTOR_BYTES = 16
_STORAGE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class NarrowAccess:
    """A load or store of an operand or output tile in smaller pieces than it could be.

    Attributes:
        direction: "load" or "store"; place: "file.py:line:column" of the kernel.
        size: bytes per access; 0 if no access was found at that place. expected: bytes it could be.
    """

    direction: str
    place: str
    size: int
    expected: int


@dataclass(frozen=True)
class Analysis:
    """What the compiler made of one launch.

    Attributes:
        registers: per thread; on AMD all vector registers, accumulation registers included.
        spills: what did not fit the registers: on NVIDIA loads and stores of local memory in the code, on AMD spilled
            vector and scalar registers (scalar ones go to lanes of vector registers, not to memory).
        stack_bytes: private memory per thread.
        shared_bytes: per block. tensor_columns: of Blackwell's tensor memory, per block.
        blocks_per_sm, occupancy: resident blocks, and their warps as a part of what there is room for.
        instructions: of the whole kernel. mma_instructions: matrix instructions in it.
        loop_instructions: of the main loop, without register copies and waits, 0 if no loop has matrix instructions;
            loop: all of them by kind.
        narrow: operand and output tiles not moved 16 bytes at a time, where a thread has that many.
        tile_loads, tile_stores: places in the source where such a tile is loaded or stored.
        error: why it did not compile; everything else is 0 then.
    """

    registers: int = 0
    spills: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_columns: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    instructions: int = 0
    mma_instructions: int = 0
    loop_instructions: int = 0
    loop: Mapping[str, int] | None = None
    narrow: tuple[NarrowAccess, ...] = ()
    tile_loads: int = 0
    tile_stores: int = 0
    error: str = ""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Analysis:
        known = {f.name: value[f.name] for f in fields(Analysis)}
        return Analysis(**{**known, "narrow": tuple(NarrowAccess(**n) for n in value["narrow"])})


def compile_launch(launch: Launch, arch: str, **options: Any) -> Any:
    """Triton's compiled kernel for ``launch``, for a GPU that need not be there.

    Args:
        options: compiler options instead of the launch's, such as ``maxnreg``.

    Raises:
        RuntimeError: Triton's interpreter is on, which cannot compile.
    """
    if interpreting():
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1; unset it")
    names = launch.function.arg_names
    constants = {(i,): launch.constants[name] for i, name in enumerate(names) if launch.types[name] == "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in launch.aligned}
    return triton.compile(
        ASTSource(launch.function, dict(launch.types), constants, attributes),
        target=_target(arch).triton_target(),
        options={**launch.options, **options},
    )


def _target(arch: str) -> Any:
    if arch not in TARGETS:
        raise InvalidArgumentError("arch", repr(arch), " or ".join(map(repr, TARGETS)))
    return TARGETS[arch]


def analyse(launch: Launch, arch: str, **options: Any) -> Analysis:
    """Compile ``launch`` for ``arch`` and read the result.

    A compiler's refusal is a result too (``error``), so that one kernel's does not hide the others'.
    """
    try:
        kernel = compile_launch(launch, arch, **options)
    except (RuntimeError, triton.TritonError) as error:
        cause = error.__cause__ or error
        return Analysis(error=f"{type(cause).__name__}: {' '.join(str(cause).split())[-400:]}")
    target = _target(arch)
    if target.nvidia:
        usage, listing = _disassemble(kernel.asm["cubin"])
        code = disassembly.read_sass(listing)
        registers, stack = _resources(usage)
        spills = sum(instruction.kind == "local" for instruction in code)
        memory = disassembly.accesses(kernel.asm["ptx"])
    else:
        text = kernel.asm["amdgcn"]
        code = disassembly.read_gcn(text)
        numbers = _gcn_metadata(text)
        registers, stack = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
        spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
        memory = disassembly.accesses(text)
    shared = int(kernel.metadata.shared)
    columns = int(getattr(kernel.metadata, "tmem_size", 0) or 0)
    blocks = target.blocks_per_sm(registers, shared, launch.config.num_warps)
    if columns:
        blocks = min(blocks, 512 // columns)
    loop = disassembly.main_loop(code)
    tiles = operand_tiles(disassembly.tile_accesses(kernel.asm["ttgir"]), launch.dtype)
    threads = launch.config.num_warps * target.warp_size
    return Analysis(
        registers=registers,
        spills=spills,
        stack_bytes=stack,
        shared_bytes=shared,
        tensor_columns=columns,
        blocks_per_sm=blocks,
        occupancy=round(blocks * launch.config.num_warps / target.max_warps, 3),
        instructions=len(code),
        mma_instructions=sum(instruction.kind == "mma" for instruction in code),
        loop_instructions=sum(instruction.kind not in disassembly.IDLE_KINDS for instruction in loop),
        loop=disassembly.count_kinds(loop),
        narrow=narrow_accesses(tiles, memory, threads),
        tile_loads=len({tile.place for tile in tiles if tile.direction == "load"}),
        tile_stores=len({tile.place for tile in tiles if tile.direction == "store"}),
    )


def operand_tiles(tiles: Iterable[disassembly.TileAccess], dtype: str) -> list[disassembly.TileAccess]:
    """The accesses that are to operands and outputs: to two-dimensional tiles of the storage type.

    Bit masks, indices and maps of squares are of other types, and per-channel vectors have one dimension. Only where no
    tile of the storage type is stored at all, as in a weight gradient, are fp32 tiles the output.
    """
    found = list(tiles)
    stored = {t.element for t in found if t.direction == "store"}
    output = dtype if dtype in stored else "fp32"
    return [t for t in found if t.element == (output if t.direction == "store" else dtype)]


def narrow_accesses(
    tiles: Iterable[disassembly.TileAccess], memory: Sequence[disassembly.Access], threads: int
) -> tuple[NarrowAccess, ...]:
    """Tiles that are not moved 16 bytes at a time, or by all that a thread has of them if that is less."""
    found: dict[tuple[str, str], NarrowAccess] = {}
    for tile in tiles:
        element = _STORAGE_BYTES[tile.element]
        expected = max(min(VECTOR_BYTES, tile.elements * element // threads), element)
        sizes = [a.size for a in memory if a.place == tile.place and a.direction == tile.direction]
        size = min(sizes, default=0)
        if size < expected:
            found[tile.direction, tile.place] = NarrowAccess(tile.direction, tile.place, size, expected)
    return tuple(found.values())


def _resources(usage: str) -> tuple[int, int]:
    """Registers and stack bytes from ``cuobjdump -res-usage``; the most of any function in it."""
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {usage[-200:]!r}")
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def _gcn_metadata(text: str) -> dict[str, int]:
    """Counts from the metadata at the end of AMD assembly."""
    wanted = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    numbers = {name: int(n) for name, n in re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", text, re.M) if name in wanted}
    if missing := sorted(set(wanted) - set(numbers)):
        raise RuntimeError(f"no {', '.join(missing)} in the metadata of the AMD assembly")
    return numbers


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, from NVIDIA's tools inside Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = triton.knobs.nvidia
        usage, listing = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ((tools.cuobjdump.path, "-res-usage"), (tools.nvdisasm.path, "-c"))
        )
    return usage, listing


@cache
def _own_source() -> str:
    here = Path(__file__).parent
    text = b"".join((here / name).read_bytes() for name in ("compile.py", "disassembly.py", "targets.py"))
    return hashlib.sha256(text).hexdigest()


def cache_key(launch: Launch, arch: str, options: Mapping[str, Any] | None = None) -> str:
    """Equal if and only if a stored result of this launch for ``arch`` can stand for a new one."""
    parts = (
        triton.__version__,
        _own_source(),
        launch.function.cache_key,
        repr(launch.key),
        launch.dtype,
        arch,
        sorted((options or {}).items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Job:
    """A launch as another process can receive it: the kernel by name."""

    launch: Launch
    module: str
    name: str
    arch: str

    @staticmethod
    def of(launch: Launch, arch: str) -> _Job:
        kernel = launch.function
        bare = replace(launch, function=None)
        return _Job(bare, kernel.__module__, kernel.__name__, arch)

    def run(self) -> Analysis:
        kernel = getattr(importlib.import_module(self.module), self.name)
        return analyse(replace(self.launch, function=kernel), self.arch)


def _start(triton_cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = triton_cache


def _run(job: _Job) -> tuple[Analysis, float]:
    started = time.monotonic()
    return job.run(), time.monotonic() - started


def analyse_all(
    launches: Sequence[tuple[Launch, str]],
    folder: Path = CACHE,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Analysis]:
    """:func:`analyse` of every (launch, arch), in parallel processes, from the cache where it can.

    Args:
        folder: where both caches are.
        workers: processes; by default as many as there are processors.
        progress: called with (done, all, name of the one just done).

    Raises:
        InvalidArgumentError: ``workers`` below 1.
    """
    count = os.cpu_count() or 1 if workers is None else workers
    if count < 1:
        raise InvalidArgumentError("workers", count, "at least 1")
    if interpreting():
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1; unset it")
    results: dict[str, Analysis] = {}
    keys = [cache_key(launch, arch) for launch, arch in launches]
    missing: dict[str, _Job] = {}
    analysed = folder / "analysed"
    analysed.mkdir(parents=True, exist_ok=True)
    for key, (launch, arch) in zip(keys, launches, strict=True):
        if key in results or key in missing:
            continue
        stored = _read(analysed / f"{key}.json")
        if stored is None:
            missing[key] = _Job.of(launch, arch)
        else:
            results[key] = stored
    done, total = len(results), len(results) + len(missing)
    if progress is not None:
        progress(done, total, "")
    if missing:
        # Spawned, not forked: torch has threads.
        with ProcessPoolExecutor(
            min(count, len(missing)), get_context("spawn"), _start, (str((folder / "triton").resolve()),)
        ) as pool:
            pending = {pool.submit(_run, job): key for key, job in missing.items()}
            for future in as_completed(pending):
                key = pending[future]
                results[key], seconds = future.result()
                # A refusal may be this machine's (no memory, no disk): it is tried again.
                if not results[key].error:
                    _write(analysed / f"{key}.json", results[key])
                done += 1
                if progress is not None:
                    job = missing[key]
                    progress(done, total, f"{job.launch.name} {job.arch} {job.launch.dtype} {seconds:.1f} s")
    return [results[key] for key in keys]


def _read(path: Path) -> Analysis | None:
    try:
        return Analysis.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        # Cut off by a full disk or a kill: compile again.
        return None


def _write(path: Path, analysis: Analysis) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(analysis)), encoding="utf-8")
    os.replace(temporary, path)

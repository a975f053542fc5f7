"""How a kernel is launched: tile configuration, target architecture, and a recorder that launches nothing.

Launchers describe a launch once, to :func:`launch`. On a GPU (or in Triton's interpreter) it runs; inside
:func:`recording` it is written down instead, with the types and specialisations Triton would see, so that the
ahead-of-time compile job builds exactly what the launchers ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = [
    "TRITON_TYPES",
    "Config",
    "Launch",
    "compiler_options",
    "current_arch",
    "interpreting",
    "launch",
    "recording",
]

TRITON_TYPES: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True, order=True)
class Config:
    """One launch configuration.

    Attributes:
        block_m, block_n, block_k: tile of the output (rows, columns) and of the reduction; 0 where a kernel has none.
        num_warps: warps (of 32 threads; on AMD wavefronts of 64) per program.
        num_stages: depth of the software pipeline of the main loop.
        group_m: row tiles that run side by side before the next column tile, so that they share operands in L2.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    group_m: int = 8

    def __str__(self) -> str:
        k = f"x{self.block_k}" if self.block_k else ""
        return f"{self.block_m}x{self.block_n}{k} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class Launch:
    """What :func:`launch` was asked for, as Triton's compiler wants it.

    Attributes:
        name: the kernel's name in reports.
        function: the ``@triton.jit`` function.
        grid: programs along up to three axes.
        types: argument name -> ``"*bf16"``, ``"i32"``, ``"fp32"`` or ``"constexpr"``.
        constants: value of every argument that is ``constexpr`` (an int equal to 1 becomes one, as Triton does).
        aligned: arguments known to be multiples of 16 (tensors: their address).
        config: the tile configuration.
        dtype: storage type of the operands, ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        gemm: whether its main loop multiplies matrices (tensor cores must show up in it).
        vector_operands: whether operands and results are aligned so that 128-bit accesses are expected.
        plain: whether this is the plain convolution built from the same source, what the others are compared with.
        options: compiler options; see :func:`compiler_options`.
    """

    name: str
    function: Any
    grid: tuple[int, ...]
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    config: Config
    dtype: str
    gemm: bool
    vector_operands: bool
    plain: bool
    options: Mapping[str, int]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two launches that compile to the same code."""
        return (
            self.name,
            tuple(sorted(self.types.items())),
            tuple(sorted((k, str(v)) for k, v in self.constants.items())),
            tuple(sorted(self.aligned)),
            self.config,
            tuple(sorted(self.options.items())),
        )


@dataclass
class _Recorder:
    arch: str
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[_Recorder | None] = ContextVar("bcos_rt_recorder", default=None)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` when they were imported)."""
    return bool(triton.knobs.runtime.interpret)


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Record launches for ``arch`` ("sm_90", "gfx942", ...) instead of running them; tensors may be on ``meta``."""
    recorder = _Recorder(arch)
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def current_arch(device: torch.device) -> str:
    """Architecture a launch is for: the recorder's, the device's, or ``"interpreter"``."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.arch
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def compiler_options(config: Config, arch: str) -> dict[str, int]:
    """Options of Triton's compiler for one launch.

    Left alone, ptxas saves registers for the sake of occupancy and pays by computing addresses anew inside the main
    loop (242 instructions instead of 150 for one tile on sm_120), or by spilling. A tile's occupancy is the table's
    decision, so a kernel gets the registers it wants, up to what its warps can share. (AMD's compiler has no such
    option.)
    """
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if arch.startswith("sm_"):
        options["maxnreg"] = min(255, 65536 // (32 * config.num_warps))
    return options


def launch(
    name: str,
    function: Any,
    grid: tuple[int, ...],
    config: Config,
    arguments: Mapping[str, Any],
    *,
    gemm: bool = False,
    vector_operands: bool = False,
    plain: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Launch ``function`` on ``grid``; ``arguments`` by name, tile sizes included. An empty grid launches nothing.

    Raises:
        RuntimeError: a tensor on the CPU outside Triton's interpreter.
    """
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        options = compiler_options(config, recorder.arch)
        recorder.launches.append(
            _describe(name, function, grid, config, arguments, gemm, vector_operands, plain, dtype, options)
        )
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if interpreting():
        function[grid](**arguments)
        return
    if device.type != "cuda":
        raise RuntimeError(
            f"kernel {name!r}: tensors are on {device}; Triton kernels need a GPU (or TRITON_INTERPRET=1, for tests)"
        )
    with torch.cuda.device(device):
        function[grid](**arguments, **compiler_options(config, current_arch(device)))


def _describe(
    name: str,
    function: Any,
    grid: tuple[int, ...],
    config: Config,
    arguments: Mapping[str, Any],
    gemm: bool,
    vector_operands: bool,
    plain: bool,
    dtype: torch.dtype | None,
    options: Mapping[str, int],
) -> Launch:
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: set[str] = set()
    for parameter in function.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[parameter.name] = "*" + TRITON_TYPES[value.dtype]
            # The allocator aligns to 512 bytes; what matters is where in its storage a view starts.
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.add(parameter.name)
            dtype = dtype or value.dtype
        elif isinstance(value, bool):
            types[parameter.name] = "i1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                types[parameter.name], constants[parameter.name] = "constexpr", 1
            else:
                types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned.add(parameter.name)
        else:
            types[parameter.name] = "fp32"
    storage = TRITON_TYPES[dtype] if dtype is not None else "fp32"
    return Launch(
        name,
        function,
        grid,
        types,
        constants,
        frozenset(aligned),
        config,
        storage,
        gemm,
        vector_operands,
        plain,
        options,
    )

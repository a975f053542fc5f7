"""Which tile a layer should take, reasoned out from the compiled code: an estimate, nothing here is measured.

For every matrix-multiplying layer of a model and every candidate tile, :func:`estimate` combines what the compiler says
(registers, spills, shared memory, instructions of the main loop) with what the hardware can do::

    resident = programs one multiprocessor holds at once (registers, shared memory + 1 KB, warps)
    waves    = programs / (multiprocessors * resident)
    load     = programs the busiest multiprocessor runs in all
    step     = max(issue slots, MMA, L2 traffic) of one program and one step of its main loop
    time     = max((load * (steps * step + rest) + ceil(waves) * latency) / clock, bytes / bandwidth)

with issue slots = warps * instructions / issue rate, MMA = multiply-adds / tensor-core rate, L2 traffic = operand
bytes / L2 rate, and rest the issue slots outside the loop. Candidates are ranked by: no spills, then time. That decides
between tiles; it does not predict times: cache hits, bank conflicts, clocks under load and the host are left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError, did_you_mean
from bcos_rt.kernels.static.compile import Analysis, analyse_all
from bcos_rt.kernels.static.targets import TARGETS, Target
from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.launch import TRITON_TYPES, Config, Launch, recording

__all__ = [
    "Compiled",
    "Estimate",
    "LayerPlan",
    "LayerShape",
    "Problem",
    "compile_all",
    "estimate",
    "model_layers",
    "plan",
    "plan_layers",
    "rank",
    "resident_programs",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Two estimates this close are not told apart: the model leaves out effects of this size.
CLOSE = 0.05

NOTE = "estimates from compiled code and data sheets; nothing was measured"


# Per multiprocessor and clock: instructions of a warp that start (a wavefront takes an AMD SIMD four clocks),
# bytes that come from the L2 cache; and columns of Blackwell's tensor memory.
_ISSUE_NVIDIA, _ISSUE_AMD = 4, 1
_L2_BYTES = 64
_TENSOR_COLUMNS = 512
# Clocks from asking for a tile in device memory to having it, once per wave; deeper pipelines do not shorten it.
_LATENCY = 1000


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel at one tile.

    Attributes:
        registers: per thread; ``spills``: bytes (AMD: registers) that did not fit.
        shared: bytes of shared memory; ``tensor_columns``: columns of tensor memory.
        loop: instructions of the main loop, per step of ``block_k`` and warp; ``rest``: all others.
        error: why it does not compile.
    """

    registers: int
    spills: int
    shared: int
    loop: float
    rest: int
    tensor_columns: int = 0
    error: str = ""


@dataclass(frozen=True)
class Problem:
    """One GEMM-like launch: ``groups`` outputs of m rows and n columns, sums of length k.

    Attributes:
        steps: steps of the main loop for a configuration (a kernel place's channels are cut by themselves).
        bytes: device memory that must be read or written at least once.
    """

    op: str
    m: int
    n: int
    k: int
    groups: int
    dtype: torch.dtype
    places: int
    bytes: int

    def steps(self, config: Config) -> int:
        """Steps of the main loop: each of the kernel's places takes its channels in tiles of ``block_k``."""
        return self.places * math.ceil(self.k / self.places / config.block_k)

    def programs(self, config: Config) -> int:
        """Programs of the launch."""
        return math.ceil(self.m / config.block_m) * math.ceil(self.n / config.block_n) * self.groups


@dataclass(frozen=True)
class Estimate:
    """A configuration's estimate, see the module; times in microseconds, of the whole launch.

    Attributes:
        resident: programs per multiprocessor; ``occupancy``: their warps, as a share of the most there can be.
        waves: rounds of programs over the GPU; ``busy``: share of all multiprocessors' time that has work.
        issue_us, mma_us, l2_us, memory_us: the launch, were only that to be waited for.
        time_us: the estimate; ``bound``: what it waits for, "issue", "mma", "l2" or "memory".
    """

    config: Config
    compiled: Compiled
    programs: int
    resident: int
    occupancy: float
    waves: float
    busy: float
    issue_us: float
    mma_us: float
    l2_us: float
    memory_us: float
    time_us: float
    bound: str

    @property
    def order(self) -> tuple[bool, float]:
        """Smaller is better."""
        return (self.compiled.spills > 0 or self.resident == 0, self.time_us)


def resident_programs(config: Config, compiled: Compiled, target: Target) -> int:
    """Programs one multiprocessor holds at once; 0 if not even one fits."""
    if compiled.error:
        return 0
    resident = target.blocks_per_sm(compiled.registers, compiled.shared, config.num_warps)
    if compiled.tensor_columns:
        resident = min(resident, _TENSOR_COLUMNS // compiled.tensor_columns)
    return resident


def estimate(problem: Problem, config: Config, compiled: Compiled, target: Target) -> Estimate:
    """Estimate ``problem`` with ``config`` on ``target``; the equations are the module's."""
    programs, steps = problem.programs(config), problem.steps(config)
    resident = resident_programs(config, compiled, target)
    units, issue = target.multiprocessors, _ISSUE_NVIDIA if target.nvidia else _ISSUE_AMD
    waves = programs / (units * resident) if resident else math.inf
    load = math.ceil(programs / units)
    macs = target.tflops[TRITON_TYPES[problem.dtype]] * 1000 / (2 * units * target.clock_ghz)
    per_step = {
        "issue": config.num_warps * compiled.loop / issue,
        "mma": config.block_m * config.block_n * config.block_k / macs,
        "l2": (config.block_m + config.block_n) * config.block_k * problem.dtype.itemsize / _L2_BYTES,
    }
    microsecond = target.clock_ghz * 1000
    parts = {name: load * steps * clocks / microsecond for name, clocks in per_step.items()}
    slowest = max(per_step, key=per_step.__getitem__)
    around = config.num_warps * compiled.rest / issue
    compute = parts[slowest] + (load * around + math.ceil(waves) * _LATENCY) / microsecond if resident else math.inf
    memory = problem.bytes / target.bandwidth_gb_s / 1000
    return Estimate(
        config=config,
        compiled=compiled,
        programs=programs,
        resident=resident,
        occupancy=resident * config.num_warps / target.max_warps,
        waves=waves,
        busy=programs / (load * units),
        issue_us=parts["issue"],
        mma_us=parts["mma"],
        l2_us=parts["l2"],
        memory_us=memory,
        time_us=max(compute, memory),
        bound="memory" if memory > compute else slowest,
    )


def rank(
    problem: Problem, configs: Sequence[Config], compiled: Callable[[Config], Compiled], target: Target
) -> list[Estimate]:
    """Estimates of ``configs``, best first; equal ones keep their order."""
    return sorted((estimate(problem, c, compiled(c), target) for c in configs), key=lambda e: e.order)


@dataclass(frozen=True)
class LayerPlan:
    """What the table says for one layer shape and what the estimate says about it.

    Attributes:
        name: the first layer of this shape; ``count``: how many share it.
        shape_class: the table's class; ``table``: its choice; ``best``: the estimate's.
        candidates: how many configurations were compared.
    """

    name: str
    count: int
    problem: Problem
    shape_class: str
    table: Estimate
    best: Estimate
    candidates: int

    @property
    def agrees(self) -> bool:
        """Whether the table's choice is the estimate's best, or too close to it to be told apart."""
        return self.table.order[0] == self.best.order[0] and self.table.time_us <= (1 + CLOSE) * self.best.time_us

    @property
    def reason(self) -> str:
        """Why the best candidate is the best."""
        table, best = self.table, self.best
        if table.config == best.config:
            return f"table's choice is the best of {self.candidates}, bound by {best.bound}"
        if table.compiled.error:
            return f"table's choice does not compile: {table.compiled.error}"
        if table.resident == 0:
            return "table's choice does not fit a multiprocessor"
        if table.compiled.spills and not best.compiled.spills:
            return f"table's choice spills {table.compiled.spills}"
        gain = f"{table.time_us / best.time_us - 1:.0%} faster"
        if self.agrees:
            gain = f"within {CLOSE:.0%}"
        if best.busy > table.busy + 0.02:
            return f"{gain}: multiprocessors busy {best.busy:.0%} of the time, not {table.busy:.0%}"
        for what, name in (("issue slots", "issue_us"), ("MMA time", "mma_us"), ("L2 traffic", "l2_us")):
            if table.bound == name.removesuffix("_us") and getattr(best, name) < getattr(table, name):
                return f"{gain}: {what} {getattr(best, name):.1f} us, not {getattr(table, name):.1f}"
        if math.ceil(best.waves) < math.ceil(table.waves):
            return f"{gain}: {math.ceil(best.waves)} waves, not {math.ceil(table.waves)}"
        return f"{gain}: less work outside the main loop"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        p = self.problem
        return {
            "name": self.name,
            "count": self.count,
            "op": p.op,
            "m": p.m,
            "n": p.n,
            "k": p.k,
            "groups": p.groups,
            "shape_class": self.shape_class,
            "table": _estimate_dict(self.table),
            "best": _estimate_dict(self.best),
            "agrees": self.agrees,
            "reason": self.reason,
            "candidates": self.candidates,
        }


def _estimate_dict(value: Estimate) -> dict[str, Any]:
    def plain(x: Any) -> Any:
        # JSON has no infinity: a configuration that does not fit has neither waves nor a time.
        return None if isinstance(x, float) and not math.isfinite(x) else x

    config = {f.name: getattr(value.config, f.name) for f in fields(Config)}
    compiled = {f.name: getattr(value.compiled, f.name) for f in fields(Compiled)}
    own = {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name not in ("config", "compiled")}
    return {"config": config, "compiled": compiled, **own}


@dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer and the input it sees in one model, the batch included.

    Attributes:
        rows: of a linear layer: all tokens of the batch. Of a convolution: the batch, with ``height`` and ``width``.
        kernel: (1, 1) and height = width = 1 for a linear layer.
    """

    linear: bool
    rows: int
    height: int
    width: int
    channels: int
    filters: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether it is a depthwise convolution, which multiplies no matrices."""
        return not self.linear and self.groups == self.channels > 1

    def record(self, arch: str, dtype: torch.dtype, config: Config | None) -> Launch:
        """The launch of its fused forward kernel (B = 2, scale, shift, ReLU, squares for the next layer)."""
        from bcos_rt.kernels.triton.conv import conv2d_fused
        from bcos_rt.kernels.triton.linear import linear_fused

        def tensor(*shape: int, as_type: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=as_type, device="meta")

        def image(n: int, c: int, h: int, w: int, as_type: torch.dtype = dtype) -> Tensor:
            return tensor(n, h, w, c, as_type=as_type).permute(0, 3, 1, 2)

        fp32 = torch.float32
        scale, shift = tensor(self.filters, as_type=fp32), tensor(self.filters, as_type=fp32)
        with recording(arch) as launches:
            if self.linear:
                x, weight = tensor(self.rows, self.channels), tensor(self.filters, self.channels)
                squares = tensor(self.rows, 1, as_type=fp32)
                linear_fused(
                    x, weight, squares, scale=scale, shift=shift, activation="relu", want_squares=True, config=config
                )
            else:
                x = image(self.rows, self.channels, self.height, self.width)
                weight = image(self.filters, self.channels // self.groups, *self.kernel)
                squares = image(self.rows, self.groups, self.height, self.width, fp32)
                conv2d_fused(
                    x, weight, squares, scale=scale, shift=shift, stride=self.stride, padding=self.padding,
                    dilation=self.dilation, groups=self.groups, activation="relu", want_squares=True, config=config,
                )  # fmt: skip
        return next(launch for launch in launches if launch.gemm)

    def problem(self, launch: Launch, dtype: torch.dtype) -> Problem:
        """What ``launch`` computes, in matrices."""
        out_h, out_w = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                (self.height, self.width), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        m, n = self.rows * out_h * out_w, self.filters // self.groups
        area = self.kernel[0] * self.kernel[1]
        k = area * self.channels // self.groups
        inputs = self.rows * self.height * self.width * self.channels
        elements = inputs + self.filters * k + m * self.filters
        # A folded kernel row is one place whose channels are the row's: few channels still fill a tile.
        places = self.kernel[0] if launch.constants.get("FOLD") else area
        op = "linear" if area == 1 else "conv2d"
        return Problem(op, m, n, k, self.groups, dtype, places, elements * dtype.itemsize)


def model_layers(model: str, batch: int) -> dict[LayerShape, list[str]]:
    """Distinct layer shapes of a source model (see :func:`bcos_rt.models.load_model`) with their layers' names.

    The stem's three channels are counted as the six of a B-cos network.

    Raises:
        InvalidArgumentError: an unknown model, or a batch below 1.
    """
    from torch import nn

    from bcos_rt.models import load_model

    if batch < 1:
        raise InvalidArgumentError("batch", batch, "at least 1")
    name = model if ":" in model or model == "efficientnet-lite0" else f"torchvision:{model}"
    with torch.device("meta"):
        loaded = load_model(name, weights="random")
        image = torch.empty(batch, 3, loaded.input_size, loaded.input_size)
    found: dict[LayerShape, list[str]] = {}

    def hook(where: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shape = _shape_of(module, inputs[0])
            found.setdefault(shape, []).append(where)

        return see

    for where, module in loaded.module.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(hook(where))
    with torch.no_grad():
        loaded.module(image)
    return found


def _shape_of(module: Any, x: Tensor) -> LayerShape:
    if isinstance(module, torch.nn.Linear):
        return LayerShape(True, x.numel() // x.shape[-1], 1, 1, module.in_features, module.out_features)
    n, c, h, w = x.shape
    c = 6 if c == 3 else c
    padding = module.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    elif padding == "valid":
        padding = (0, 0)
    return LayerShape(
        False, n, h, w, c, module.out_channels, tuple(module.kernel_size), tuple(module.stride), tuple(padding),
        tuple(module.dilation), module.groups,
    )  # fmt: skip


def compile_all(launches: Sequence[Launch], arch: str) -> list[Compiled]:
    """What the compiler makes of each launch; compiled in parallel, results kept on disk."""
    analyses = analyse_all([(launch, arch) for launch in launches])
    return [_compiled(launch, analysis, arch) for launch, analysis in zip(launches, analyses, strict=True)]


def _compiled(launch: Launch, analysis: Analysis, arch: str) -> Compiled:
    if analysis.error:
        return Compiled(0, 0, 0, 0, 0, error=analysis.error)
    loop = analysis.loop_instructions
    steps = 1.0
    if not TARGETS[arch].nvidia and analysis.loop:
        # AMD's compiler unrolls; a wavefront whose part of the tile holds 32 x 32 uses instructions of that size.
        config = launch.config
        part = config.block_m * config.block_n / config.num_warps
        macs = (2048 if launch.dtype == "fp32" else 8192) / (1 if part >= 1024 else 2)
        steps = max(1.0, analysis.loop["mma"] * macs / (part * config.block_k))
    return Compiled(
        analysis.registers,
        analysis.spills,
        analysis.shared_bytes,
        loop / steps if loop else float(analysis.instructions),
        analysis.instructions - loop,
        analysis.tensor_columns,
    )


Compiler = Callable[[Sequence[Launch], str], Sequence[Compiled]]


def plan_layers(
    shapes: Mapping[LayerShape, Sequence[str]], arch: str, dtype: torch.dtype, compiler: Compiler = compile_all
) -> list[LayerPlan]:
    """For every shape that multiplies matrices, compare the table's configuration with the autotuner's candidates.

    Args:
        shapes: with the names of their layers, as :func:`model_layers` gives them.
        compiler: what the compiler makes of launches, for tests.
    """
    work: list[tuple[Sequence[str], Problem, Config, dict[Config, Launch]]] = []
    for shape, names in shapes.items():
        if shape.depthwise:
            continue
        launch = shape.record(arch, dtype, None)
        problem = shape.problem(launch, dtype)
        launches = {launch.config: launch}
        for config in tune.candidates(problem.op, arch, problem.m, problem.n, dtype):
            # Launchers cut a tile down to a narrow output or a short sum, so that several may become one.
            other = shape.record(arch, dtype, config)
            launches.setdefault(other.config, other)
        work.append((names, problem, launch.config, launches))
    distinct = {launch.key: launch for _, _, _, launches in work for launch in launches.values()}
    compiled = dict(zip(distinct, compiler(list(distinct.values()), arch), strict=True))
    plans = []
    for names, problem, chosen, launches in work:
        known = {config: compiled[launch.key] for config, launch in launches.items()}
        ranked = rank(problem, list(launches), known.__getitem__, TARGETS[arch])
        table = next(e for e in ranked if e.config == chosen)
        kind = tune.shape_class(problem.m, problem.n, arch)
        plans.append(LayerPlan(names[0], len(names), problem, kind, table, ranked[0], len(ranked)))
    return plans


def plan(
    arch: str,
    model: str,
    batch: int = 32,
    dtype: str = "bf16",
    as_json: bool = False,
    *,
    layers: Mapping[LayerShape, Sequence[str]] | None = None,
    compiler: Compiler = compile_all,
    stream: TextIO | None = None,
) -> None:
    """Print, per distinct layer shape of ``model``, the table's tile and what the estimate says about it.

    Args:
        arch: one of the table's architectures, "sm_90" etc.
        model: "resnet50" (torchvision) or any name :func:`bcos_rt.models.load_model` takes.
        dtype: "bf16", "fp16" or "fp32".
        as_json: one JSON object instead of a table.
        layers: these shapes instead of the model's; ``compiler``, ``stream``: for tests.

    Raises:
        InvalidArgumentError: an architecture, model, batch or dtype that is not known.
    """
    if arch not in TARGETS:
        raise InvalidArgumentError("arch", repr(arch), " or ".join(map(repr, TARGETS)), did_you_mean(arch, TARGETS))
    if dtype not in DTYPES:
        raise InvalidArgumentError("dtype", repr(dtype), " or ".join(map(repr, DTYPES)), did_you_mean(dtype, DTYPES))
    shapes = model_layers(model, batch) if layers is None else layers
    depthwise = sum(len(names) for shape, names in shapes.items() if shape.depthwise)
    plans = plan_layers(shapes, arch, DTYPES[dtype], compiler)
    out = stream or sys.stdout
    head = {"arch": arch, "device": TARGETS[arch].device, "model": model, "batch": batch, "dtype": dtype}
    if as_json:
        content = {
            **head, "measured": False, "note": NOTE, "depthwise_layers": depthwise,
            "layers": [p.as_dict() for p in plans],
        }  # fmt: skip
        json.dump(content, out, indent=2, allow_nan=False)
        out.write("\n")
        return
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console = Console(file=out, highlight=False, width=200)
    console.print(_shown(plans, f"{model}, batch {batch}, {dtype}, on {arch} ({TARGETS[arch].device})"))
    differing = sum(p.count for p in plans if not p.agrees)
    total = sum(p.count for p in plans)
    console.print(Text(f"All times: {NOTE}."))
    console.print(
        Text(f"The table's tile is the estimate's best, or within {CLOSE:.0%}: {total - differing} of {total} layers.")
    )
    console.print(
        Text("Launches as for a prediction. The table's tiles must also hold an explanation's outputs in registers.")
    )
    if depthwise:
        console.print(Text(f"{depthwise} depthwise layers multiply no matrices and are left out."))


def _shown(plans: Sequence[LayerPlan], title: str) -> Table:
    table = Table(title=Text(title))
    for heading in (
        "layer",
        "M x N x K",
        "class",
        "table's tile",
        "resident",
        "waves",
        "busy",
        "time, bound (estimate)",
    ):
        table.add_column(heading)
    for heading in ("best by estimate", "reason"):
        table.add_column(heading)
    for p in plans:
        e, q = p.table, p.problem
        name = p.name if p.count == 1 else f"{p.name} and {p.count - 1} more"
        size = f"{q.m} x {q.n} x {q.k}" + (f" ({q.groups} groups)" if q.groups > 1 else "")
        best = "the same" if e.config == p.best.config else f"{p.best.config}, {p.best.time_us:.1f} us"
        cells = (
            name, size, p.shape_class, str(e.config), f"{e.resident} ({e.occupancy:.0%})", f"{e.waves:.2f}",
            f"{e.busy:.0%}",
            f"{e.time_us:.1f} us, {e.bound}", best if p.agrees else f"NOT THE TABLE'S: {best}", p.reason,
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return table

"""The program on a GPU: its fused ops are our Triton kernels, captured as CUDA graphs by input shape.

Constants go to the device once, weights in the memory order that the kernels read: channels-last for a convolution,
filters innermost for an adjoint (one that both read is kept twice). What no fused op stands for runs as PyTorch's own
kernels, in its precision (``torch.backends.cudnn.allow_tf32``). How shapes are captured, and who waits for whom, is
said in :mod:`bcos_rt.graph.backends.captured`.

Without a GPU only Triton's interpreter runs this (``TRITON_INTERPRET=1``, for tests; nothing is captured then). The
code for CUDA has never met a GPU: ``make gpu`` is what will tell.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bcos_rt.errors import InvalidArgumentError, MissingDependencyError, UnsupportedOpError
from bcos_rt.graph.backends.aten_module import check_inputs
from bcos_rt.graph.backends.captured import Captures, CudaGraphs, Outputs
from bcos_rt.graph.capture import bound_arguments
from bcos_rt.graph.program import Program
from bcos_rt.kernels import ops, reference

__all__ = ["TritonRunner", "build", "build_all", "unavailable_reason"]

bcos = torch.ops.bcos_rt
aten = torch.ops.aten

# Ops that read images of 0 to 255 as they are.
_READ_BYTES = (
    bcos.encode_image.default, bcos.conv2d_contributions.default, bcos.image_contributions.default,
    aten.sym_size.int,
)  # fmt: skip


def unavailable_reason() -> str:
    """Why this backend cannot run here; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available():
        return ""
    from bcos_rt.kernels.triton.launch import interpreting

    return "" if interpreting() else "PyTorch sees no CUDA device"


class TritonRunner:
    """Runs a program for any batch size and number of classes. See :data:`bcos_rt.graph.backends.Runner`.

    Attributes:
        device: where it runs; inputs from elsewhere are copied there.
        program: with constants on the device, as the kernels read them.
    """

    def __init__(self, program: Program, device: torch.device, captures: Captures) -> None:
        self.program, self.device = program, device
        self._captures, self._owner = captures, captures.owner()
        self._module = GraphModule(torch.nn.Module(), program.graph)
        self._scale_bytes = any(user.target not in _READ_BYTES for user in program.image.users)

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> Outputs:
        """Outputs by name for images [N, 3, H, W], of the program's dtype or uint8, and class ids [N, K].

        Returns tensors of the caller's own, ready for work on the current stream of the device.
        """
        check_inputs(self.program, images, targets)
        given = (images, *(() if targets is None else (targets,)))
        with torch.no_grad():
            return self._captures.call(self._owner, self._run, tuple(t.to(self.device) for t in given))

    def warm_up(self, batch: int, classes: int | None = None, image_dtype: torch.dtype | None = None) -> None:
        """Compile, load and capture a shape ahead of its first call."""
        value = self.program.image.meta["val"]
        images = torch.zeros(batch, *value.shape[1:], dtype=image_dtype or value.dtype, device=self.device)
        ids = None if classes is None else torch.zeros(batch, classes, dtype=torch.int64, device=self.device)
        for _ in range(self._captures.capture_at):
            self(images, ids)

    def _run(self, images: Tensor, targets: Tensor | None = None) -> Outputs:
        """Kernel by kernel."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), ops.use_backend("triton"):
            if self._scale_bytes and images.dtype == torch.uint8:
                images = images.to(self.program.image.meta["val"].dtype) / 255
            result: Outputs = self._module(*self.program.feed(images, targets))
            return result


def build(program: Program, device: str | torch.device | None = None) -> TritonRunner:
    """A runner of one program; see :func:`build_all`."""
    return build_all({"program": program}, device)["program"]


def build_all(
    programs: Mapping[str, Program], device: str | torch.device | None = None, *, graphs: int = 16
) -> dict[str, TritonRunner]:
    """Runners of programs that share constants (the same tensors), memory and the bound on captured shapes.

    Args:
        programs: by name; of fused ops in float32, bfloat16 or float16.
        device: a CUDA device; None: where the constants are, else the current one.
        graphs: shapes captured at a time.

    Raises:
        MissingDependencyError: Triton is not installed.
        UnsupportedOpError: there is no CUDA device.
        InvalidArgumentError: another kind of device.
    """
    reason = unavailable_reason()
    if reason:
        kind = MissingDependencyError if "not installed" in reason else UnsupportedOpError
        raise kind(f"backend 'triton': {reason}")
    target = _device(programs, device)
    captures = Captures(CudaGraphs(target) if target.type == "cuda" else None, graphs)
    kept = _Kept(target)
    return {name: TritonRunner(_placed(program, kept), target, captures) for name, program in programs.items()}


def _device(programs: Mapping[str, Program], given: str | torch.device | None) -> torch.device:
    own = next(iter(programs.values())).image.meta["val"].device
    device = torch.device(given) if given is not None else own
    if device.type != "cuda" and given is None and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type != "cuda" and (device.type != "cpu" or torch.cuda.is_available()):
        raise InvalidArgumentError("device", device, "a CUDA device (backend 'triton')")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


# --- constants -------------------------------------------------------------------------------------------------------


class _Kept:
    """Constants on the device, each value once for every layout that is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # By identity; the value itself is kept beside, so that no other takes its place.
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._values: dict[Any, list[Tensor]] = {}
        self._made: dict[tuple[int, str], Tensor] = {}

    def get(self, value: Tensor, layout: str = "") -> Tensor:
        """``value`` on the device, laid out by :data:`_LAYOUTS`."""
        same = self._same(value)
        key = (id(same), layout)
        if key not in self._made:
            there = same.detach().to(self.device)
            self._made[key] = _LAYOUTS[layout](there) if layout else there
        return self._made[key]

    def _same(self, value: Tensor) -> Tensor:
        """The first constant with these bits: programs made separately have copies of their own."""
        if id(value) not in self._seen:
            known = self._values.setdefault((value.dtype, tuple(value.shape), value.stride(), value.device), [])
            bits = _bits(value)
            same = next((other for other in known if torch.equal(_bits(other), bits)), value)
            if same is value:
                known.append(value)
            self._seen[id(value)] = (value, same)
        return self._seen[id(value)][1]


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _filters_innermost(weight: Tensor) -> Tensor:
    """[O, ...] in memory that ends in O: see ``pack_transposed`` of ``kernels/triton/conv_transposed.py``."""
    return weight.movedim(0, -1).contiguous().movedim(-1, 0)


def _channels_innermost(weight: Tensor) -> Tensor:
    """[O, C, kh, kw] in the memory of [O, kh, kw, C]."""
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "filters innermost": _filters_innermost,
    "channels innermost": _channels_innermost,
    "contiguous": Tensor.contiguous,
}


def _layout(node: Node) -> str:
    """The memory order in which an op's kernel takes its weight without copying it; empty where any will do."""
    if node.target is bcos.linear_fused.default:
        return "contiguous"
    if node.target is bcos.linear_transposed.default:
        return "filters innermost"
    if node.target not in (bcos.conv2d_fused.default, bcos.conv2d_transposed.default):
        return ""
    arguments = bound_arguments(node)
    depthwise = arguments["groups"] > 1 and arguments["weight"].meta["val"].shape[1] == 1
    if depthwise:
        return "filters innermost"
    if node.target is bcos.conv2d_fused.default:
        return "channels innermost"
    # The kernel's order for several groups has no strides in four dimensions: it copies those weights itself.
    return "filters innermost" if arguments["groups"] == 1 else ""


def _placed(program: Program, kept: _Kept) -> Program:
    """A copy of the program on the device, each weight in the order its op reads."""
    result = program.copy()
    packed: dict[tuple[Node, str], Node] = {}
    for node in list(result.graph.nodes):
        if node.op != "call_function":
            continue
        node.args, node.kwargs = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: kept.device if isinstance(a, torch.device) else a
        )
        layout = _layout(node)
        weight: Any = node.args[1] if layout else None
        if layout and weight in result.constants:
            if (weight, layout) not in packed:
                value = kept.get(result.constants[weight], layout)
                packed[weight, layout] = result.add_constant(value, result.names[weight], weight)
            node.args = (node.args[0], packed[weight, layout], *node.args[2:])
        if _too_many_places(node):
            # Plain PyTorch, as the layers do.
            node.target = getattr(reference, node.target._opname)
    result.clean()
    new = set(packed.values())
    for node, value in result.constants.items():
        if node not in new:
            result.constants[node] = kept.get(value)
    return result


def _too_many_places(node: Node) -> bool:
    """Whether a convolution's kernel is larger than the GPU kernels take (ViT-B/32's patches)."""
    if node.target not in (
        bcos.conv2d_fused.default,
        bcos.conv2d_transposed.default,
        bcos.conv2d_contributions.default,
    ):
        return False
    _, channels, *kernel = bound_arguments(node)["weight"].meta["val"].shape
    groups = bound_arguments(node).get("groups", 1)
    return max(kernel) > ops.MAX_TAPS and not (groups > 1 and channels == 1)

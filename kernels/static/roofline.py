"""How much a network and its explanation must move and multiply, and the least time that takes: a bound.

Nothing here is measured.

Three ways to run one torchvision network, counted kernel by kernel on the meta device:

* ``fused``: as our kernels run its B-cos form; :func:`plan` with ``bcos=True``.
* ``published``: the layers of the PyPI package ``bcos`` in the same network, explained through autograd, op by op;
  :func:`published`.
* ``plain``: the network before B-cosification with the fusions of cuDNN and TensorRT, and the gradient of its input;
  :func:`plan` with ``bcos=False``.

The bound of a pass on a GPU is ``sum over kernels of max(bytes / bandwidth, flops / peak)`` with data-sheet numbers.
Bytes: every tensor a kernel reads or writes, once and whole. Operations: those of matrix products and attention.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bcos_rt.errors import InvalidArgumentError, MissingDependencyError, UnsupportedOpError, did_you_mean
from bcos_rt.kernels.reference import MAP_COLUMNS
from bcos_rt.kernels.static.shapes import (
    IMAGE_CHANNELS,
    Layer,
    Network,
    capture,
    is_activation,
    is_transparent,
    layer,
    operation,
    shape,
    widen,
)
from bcos_rt.kernels.static.targets import TARGETS, Target

__all__ = ["Kernel", "OpCounter", "plan", "published", "roofline", "summary", "write_results"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FP32 = 4

NOTE = "a bound from counted bytes and operations and data-sheet rates; nothing was measured"


@dataclass(frozen=True)
class Kernel:
    """One kernel of a pass.

    Attributes:
        layer: name of the network's layer it belongs to, "" if none.
        op: what runs, "conv2d", "aten.mul.Tensor", ...
        explanation: False in the forward pass, True in the explanation's (or gradient's).
        read, written: bytes by what they are.
        flops: operations of matrix products and attention, a multiply-add being two.
    """

    layer: str
    op: str
    explanation: bool
    read: Mapping[str, int]
    written: Mapping[str, int]
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(self.read.values()) + sum(self.written.values())

    def milliseconds(self, target: Target, dtype: str) -> float:
        """``max(bytes / bandwidth, flops / peak)``."""
        memory = self.bytes / (target.bandwidth_gb_s * 1e6)
        return max(memory, self.flops / (target.tflops[dtype] * 1e9))


# Fused kernels ------------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """What one kernel computes: a layer with the normalisation, addition and activation that follow it."""

    name: str
    kind: str
    # Where its input comes from (a view is its base) and the shape it sees; None for the image.
    source: fx.Node | None
    seen: tuple[int, ...]
    output: tuple[int, ...]
    layer: Layer | None = None
    residual: fx.Node | None = None
    activation: str = ""
    bcos: bool = False
    # Head size of an attention: [N, heads, tokens, size].
    heads: tuple[int, ...] = ()


# Adjoints whose epilogue can multiply by what was saved of the layer before (the others' kernels do not have one).
_WITH_EPILOGUE = frozenset({"conv2d", "linear", "max_pool2d", "avg_pool2d"})


def _blocks(network: Network, bcos: bool) -> dict[fx.Node, _Block]:
    """Kernels of the forward pass in order, by the node whose value they write."""
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    constants = {node for node in network.graph.nodes if node.op == "placeholder" and node.name in network.parameters}
    blocks: dict[fx.Node, _Block] = {}
    written: dict[fx.Node, fx.Node] = {}  # a node whose value another node's kernel writes

    def constant(node: Any) -> bool:
        while node not in constants and is_transparent(node):
            node = node.args[0]
        return node in constants

    def base(node: fx.Node) -> fx.Node | None:
        while node in written or is_transparent(node):
            node = written[node] if node in written else node.args[0]  # type: ignore[assignment]
        return None if node.op == "placeholder" else node

    def absorb(node: fx.Node, block: _Block) -> list[fx.Node]:
        """Fuse what follows into the block; returns the nodes whose work it does, the last being what it writes."""
        path, passed = [node], [node]
        while len(passed[-1].users) == 1:
            (here,) = passed[-1].users
            op = operation(here)
            free = not block.residual and not block.activation
            if op == "batch_norm" and block.kind == "conv2d" and free:
                pass
            elif op == "add" and block.kind in ("conv2d", "linear") and free:
                others = [a for a in here.args[:2] if isinstance(a, fx.Node) and a is not passed[-1]]
                # The other summand must be there already.
                if len(others) != 1 or constant(others[0]) or order[others[0]] > order[node]:
                    break
                block.residual = base(others[0])
            elif is_activation(here) and block.kind in ("conv2d", "linear", "batch_norm") and not block.activation:
                block.activation = op
            elif is_transparent(here) and math.prod(shape(here)) == math.prod(shape(node)):
                passed.append(here)
                continue
            else:
                break
            passed.append(here)
            path = list(passed)
        return path

    for node in network.nodes():
        if node in written or node in blocks or is_transparent(node):
            continue
        op, found = operation(node), layer(node, network)
        first: Any = node.args[0]
        if found is not None:
            block = _Block(found.name, found.kind, base(first), found.input_shape, shape(node), found)
            # As the converter does it: an attention's projections stay plain.
            projection = found.kind == "linear" and found.name.endswith(("in_proj", "out_proj"))
            block.bcos = bcos and found.gemm and not projection
        elif op == "scaled_dot_product_attention":
            sources = {base(a) for a in node.args[:3]}  # type: ignore[arg-type]
            source = sources.pop()
            if sources or source is None:
                raise UnsupportedOpError("roofline: an attention whose q, k and v come from different kernels")
            name = str(list(node.meta["nn_module_stack"].values())[-1][0])
            block = _Block(name, "attention", source, blocks[source].output, shape(node), heads=shape(first))
        elif op == "cat" and sum(not constant(a) for a in first) == 1:
            (image,) = (a for a in first if not constant(a))
            block = _Block("tokens", "tokens", base(image), shape(image), shape(node))
        elif op == "add" and constant(node.args[1]) and blocks[base(first)].kind == "tokens":  # type: ignore[index]
            # A position embedding goes with the kernel that lays out the tokens.
            tokens = base(first)
            blocks[node], written[tokens] = blocks.pop(tokens), node  # type: ignore[arg-type, index]
            continue
        else:
            known = "convolutions, linear layers, pooling, normalisation, activations after them, residual additions"
            raise UnsupportedOpError(f"roofline: {op} ({node.name}); known are {known}, attention and class tokens")
        path = absorb(node, block)
        block.output = shape(path[-1])
        blocks[path[-1]] = block
        written.update(dict.fromkeys(path[:-1], path[-1]))
    return blocks


@dataclass
class _Plan:
    """Writes down the kernels of one pass; see :func:`plan`."""

    network: Network
    batch: int
    size: int
    itemsize: int
    bcos: bool
    explain: bool
    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = _blocks(self.network, self.bcos)
        self.users: dict[fx.Node | None, list[_Block]] = defaultdict(list)
        for block in self.blocks.values():
            self.users[block.source].append(block)
            if block.residual is not None:
                self.users[block.residual].append(block)
        # Gradients that have arrived at a value so far, and how many of its users have yet to send theirs.
        self.arrived: dict[fx.Node, int] = {}

    # Sizes in bytes.

    def tensor(self, numbers: Sequence[int]) -> int:
        return math.prod(numbers) * self.itemsize

    def squares(self, value: fx.Node | None, numbers: Sequence[int]) -> int:
        """Of the map of squares that goes with a value of this shape; 0 if no B-cos layer reads it."""
        readers = [b for b in self.users[value] if b.bcos and b.source is value and b.layer and not b.layer.depthwise]
        if not readers:
            return 0
        image = len(numbers) == 4
        channels = numbers[1] if image else numbers[-1]
        groups = max(b.layer.groups for b in readers if b.layer)
        producer = self.blocks[value].kind if value is not None else ""
        # Convolutions and linear layers write one entry per 64 channels of a group, the other kernels one per group.
        entries = groups * (-(-channels // groups // MAP_COLUMNS) if producer in ("conv2d", "linear") else 1)
        return math.prod(numbers) // channels * entries * _FP32

    def saved(self, block: _Block) -> dict[str, int]:
        """What the forward pass keeps of a block for its adjoint's neighbours."""
        kept: dict[str, int] = {}
        if not self.explain:
            return kept
        rows = math.prod(block.output) // _channels(block.output)
        bits = rows * -(-_channels(block.output) // 8)
        if block.bcos:
            kept["multiplier"] = self.tensor(block.output)
            if block.residual is not None and block.activation:
                kept["gate"] = bits if block.activation == "relu" else self.tensor(block.output)
        elif block.activation and block.kind != "batch_norm":
            kept["multiplier"] = bits if block.activation == "relu" else self.tensor(block.output)
        return kept

    # Forward.

    def forward(self) -> None:
        if self.bcos:
            image = self.batch * self.size**2
            first = next(b for b in self.blocks.values() if b.source is None)
            encoded = {"x": self.tensor((image, IMAGE_CHANNELS)), "squares": self.squares(None, first.seen)}
            self.emit(first, "encode_image", {"image": 3 * image * _FP32}, encoded)
        for value, block in self.blocks.items():
            read = {"x": self.tensor(block.seen)}
            written = {"y": self.tensor(block.output)}
            flops, found = 0, block.layer
            if found is not None and found.gemm:
                read["weight"] = self.tensor(found.weight_shape or ())
                # Scale and shift, or only a shift where the scale is folded into the weight.
                read["parameters"] = (2 if block.bcos else 1) * found.groups * found.n * _FP32
                if block.bcos and not found.depthwise:
                    read["squares"] = self.squares(block.source, block.seen)
                if block.residual is not None:
                    read["residual"] = self.tensor(block.output)
                flops = found.flops
            elif block.kind == "attention":
                flops = 4 * math.prod(block.heads) * block.heads[2]
                if self.explain:
                    written["logsumexp"] = math.prod(block.heads[:3]) * _FP32
            elif found is not None and found.weight_shape:
                read["parameters"] = 2 * math.prod(found.weight_shape) * _FP32
                if block.kind in ("layer_norm", "group_norm") and (self.bcos or self.explain):
                    statistics = 1 if self.bcos else 2
                    written["statistics"] = statistics * self.statistics(block) * _FP32
            elif block.kind == "max_pool2d" and self.explain:
                written["index"] = math.prod(block.output)
            written["squares"] = self.squares(value, block.output)
            self.emit(block, block.kind, read, written | self.saved(block), flops)

    def statistics(self, block: _Block) -> int:
        groups = block.layer.groups if block.layer else 1
        per = block.seen[0] * groups if block.kind == "group_norm" else math.prod(block.seen[:-1])
        return per

    # Backward.

    def backward(self) -> None:
        waiting = {value: len(self.users[value]) for value in self.blocks}
        for value, block in reversed(self.blocks.items()):
            if not self.users[value]:
                written = {"grad": self.tensor(block.output)}
                self.emit(block, "seed", self.saved(block), written, explanation=True)
            residual, source = block.residual, block.source
            if residual is not None:
                waiting[residual] -= 1
                self.deliver_residual(block, residual, waiting[residual] == 0)
            if source is None:
                self.last(block)
                continue
            waiting[source] -= 1
            self.adjoint(block, source, waiting[source] == 0)

    def adjoint(self, block: _Block, source: fx.Node, final: bool) -> None:
        """The kernel that takes a block's gradient to its source's value."""
        before, found = self.blocks[source], block.layer
        read = {"grad": self.tensor(block.output)}
        target = block.seen if math.prod(block.seen) < math.prod(before.output) else before.output
        flops, op = 0, f"{block.kind}_transposed"
        out = {"grad": self.tensor(target)}
        if found is not None and found.gemm:
            # With softmax(q k) held constant only the values' third of a joint projection has a gradient.
            share = 3 if self.bcos and found.name.endswith("in_proj") else 1
            read = {"grad": read["grad"] // share, "weight": self.tensor(found.weight_shape or ()) // share}
            flops = found.flops // share
        elif block.kind == "attention":
            third = self.tensor(block.seen) // 3
            statistics = {"logsumexp": math.prod(block.heads[:3]) * _FP32}
            matrices = 2 if self.bcos else 5
            flops = 2 * matrices * math.prod(block.heads) * block.heads[2]
            read |= statistics | ({"qk": 2 * third} if self.bcos else {"qkv": 3 * third, "out": read["grad"]})
            out = {"grad": third if self.bcos else 3 * third}
        elif block.kind in ("layer_norm", "group_norm"):
            read["statistics"] = (1 if self.bcos else 2) * self.statistics(block) * _FP32
            read["parameters"] = math.prod((found.weight_shape if found else None) or ()) * _FP32
            if not self.bcos:
                read["x"] = self.tensor(block.seen)
        elif block.kind == "batch_norm":
            read |= {"x": self.tensor(block.seen), "parameters": 2 * _channels(block.seen) * _FP32}
        elif block.kind == "max_pool2d":
            read["index"] = math.prod(block.output)
        elif block.kind == "tokens":
            # A slice of the gradient: nothing runs, unless the multiplication below.
            self.arrived[source] = self.tensor(target)
            self.finish(source, final)
            return
        if math.prod(target) < math.prod(before.output):
            # Of a slice: the gradient of everything else is zero.
            self.emit(block, op, read, out, flops, explanation=True)
            read, out, flops, op = {"grad": out["grad"]}, {"grad": self.tensor(before.output)}, 0, "slice_transposed"
        if source in self.arrived:
            read["identity"] = self.arrived[source]
        self.arrived[source] = self.tensor(before.output)
        if final and block.kind in _WITH_EPILOGUE and op != "slice_transposed":
            saved = self.saved(before)
            read |= saved
            if before.residual is not None and self.separate(before):
                out["raw"] = self.tensor(before.output)
            self.emit(block, op, read, out, flops, explanation=True)
        else:
            self.emit(block, op, read, out, flops, explanation=True)
            self.finish(source, final)

    def separate(self, block: _Block) -> bool:
        """Whether the identity branch's gradient differs from the one the block's own adjoint takes."""
        return self.bcos and "multiplier" in self.saved(block)

    def deliver_residual(self, block: _Block, residual: fx.Node, final: bool) -> None:
        """The gradient of a residual addition's other summand, which is there already."""
        numbers = self.tensor(block.output)
        if residual in self.arrived:
            self.emit(block, "add", {"grad": numbers, "identity": numbers}, {"grad": numbers}, explanation=True)
        self.arrived[residual] = numbers
        self.finish(residual, final)

    def finish(self, value: fx.Node, final: bool) -> None:
        """Multiply a complete gradient by what its block saved, where no epilogue did."""
        block = self.blocks[value]
        saved = self.saved(block)
        if not final or not saved:
            return
        written = {"grad": self.tensor(block.output)}
        if block.residual is not None and "gate" in saved:
            written["raw"] = written["grad"]
        self.emit(block, "multiply", {"grad": self.tensor(block.output)} | saved, written, explanation=True)

    def last(self, block: _Block) -> None:
        """The first layer's adjoint: contributions and colours of pixels; of the plain network, the gradient itself."""
        found = block.layer
        if found is None or not found.gemm:
            raise UnsupportedOpError(f"roofline: a network that starts with {block.kind}")
        read = {"grad": self.tensor(block.output), "weight": self.tensor(found.weight_shape or ())}
        pixels = self.batch * self.size**2
        if self.bcos:
            read["image"] = 3 * pixels * _FP32
            written = {"contributions": pixels * _FP32, "colour": 4 * pixels * _FP32}
        else:
            written = {"grad": self.tensor(block.seen)}
        op = "conv2d_contributions" if self.bcos else f"{block.kind}_transposed"
        self.emit(block, op, read, written, found.flops, explanation=True)

    def emit(
        self, block: _Block, op: str, read: Mapping[str, int], written: Mapping[str, int], flops: int = 0,
        explanation: bool = False,
    ) -> None:  # fmt: skip
        def some(sizes: Mapping[str, int]) -> dict[str, int]:
            return {name: size for name, size in sizes.items() if size}

        self.kernels.append(Kernel(block.name, op, explanation, some(read), some(written), flops))


def _channels(numbers: Sequence[int]) -> int:
    return numbers[1] if len(numbers) == 4 else numbers[-1]


def plan(
    network: Network, batch: int, size: int, dtype: torch.dtype, bcos: bool = True, explain: bool = True
) -> list[Kernel]:
    """Kernels of a forward pass and, if wanted, of the pass back to the image, one per fused layer.

    Args:
        network: with images of eight channels for a B-cos network, of three for a plain one.
        size: pixels of the image's sides.
        dtype: of activations, weights, gradients and multipliers.
        bcos: our kernels of the B-cos network; otherwise the plain network's.
        explain: also what the forward pass must save, and the adjoint.

    Raises:
        UnsupportedOpError: an operation that the plan has no kernel for.
    """
    made = _Plan(network, batch, size, dtype.itemsize, bcos, explain)
    made.forward()
    if explain:
        made.backward()
    return made.kernels


# Op by op -----------------------------------------------------------------------------------------------------------

# Operations that make a tensor out of nothing, or of their first argument's shape only.
_SHAPE_ONLY = ("new_", "ones_like", "zeros_like", "full_like", "empty", "ones", "zeros", "full", "arange", "scalar_")


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every aten operation as a kernel that reads its inputs and writes its outputs, once each.

    Views count nothing; an in-place operation reads and writes its tensor; repeated (expanded) numbers count once; an
    operand that an operation takes for its shape alone does not count.

    Attributes:
        kernels: what was seen so far; ``flops`` as ``torch.utils.flop_counter`` has them.
        explanation, layer: what the kernels to come are attributed to.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self.explanation = False
        self.layer = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
        storages = {id_of(t) for t in inputs}
        mutates = func._schema.is_mutable
        if not mutates and outputs and all(id_of(t) in storages for t in outputs):
            return out
        if name.startswith(("empty", "new_empty")):
            return out
        read = [] if name.startswith(_SHAPE_ONLY) else _read(name, args, inputs)
        packet = func._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        distinct = {id(t): t for t in read}.values()
        self.kernels.append(
            Kernel(
                self.layer, f"aten.{name}", self.explanation, {"inputs": sum(map(_bytes, distinct))},
                {"outputs": sum(map(_bytes, {id(t): t for t in outputs}.values()))}, int(flops),
            )
        )  # fmt: skip
        return out


def id_of(tensor: Tensor) -> int:
    """Equal for tensors that share memory, views and their bases."""
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    numbers = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return numbers * tensor.element_size() if tensor.numel() else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _read(name: str, args: Sequence[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs whose numbers an operation needs."""
    unread: list[Any] = []
    if name in ("copy_", "fill_", "zero_"):
        unread = [args[0]]
    elif (
        name == "max_pool2d_with_indices_backward"
        or (name == "convolution_backward" and not args[-1][1])  # no gradient of the weight
        or (name == "native_batch_norm_backward" and not args[7])  # evaluation
    ):
        unread = [args[1]]
    return [t for t in inputs if all(t is not other for other in unread)]


class _Attention(nn.Module):
    """Attention as ``bcos.models.vit.Attention`` computes it (that module needs einops), as torchvision calls its own.

    Its projections are plain, as the converter keeps them.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.detach = heads, False
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def set_explanation_mode(self, activate: bool = True) -> None:
        self.detach = activate

    def forward(self, x: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        if self.detach:
            q, k = q.detach(), k.detach()
        weights = (torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.to_out(torch.matmul(weights, v).transpose(1, 2).flatten(2)), None


def _published_network(model: str) -> nn.Module:
    import torchvision

    try:
        from bcos.modules import BcosConv2d, BcosLinear
        from bcos.modules.norms import DetachableLayerNorm
    except ImportError as error:
        raise MissingDependencyError("counting the published layers needs the package bcos: bcos-rt[test]") from error

    net: nn.Module = torchvision.models.get_model(model, weights=None)
    widen(net, 6)
    for name, module in list(net.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, nn.Conv2d):
            new = BcosConv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation[0], module.groups,
            )  # fmt: skip
        elif isinstance(module, nn.MultiheadAttention):
            new = _Attention(module.embed_dim, module.num_heads)
        elif isinstance(module, nn.Linear) and not type(module).__name__.startswith("NonDynamically"):
            new = BcosLinear(module.in_features, module.out_features)
        elif isinstance(module, nn.LayerNorm):
            new = DetachableLayerNorm(module.normalized_shape, eps=module.eps)
        if new is not None:
            net.set_submodule(name, new)
    return net.eval()


def published(model: str, batch: int, size: int, dtype: torch.dtype, explain: bool = True) -> list[Kernel]:
    """Operations of the published layers in a torchvision network: its forward pass and the explanation by autograd.

    The explanation is what the package's ``explain`` does without the picture: the winning logit's gradient and its
    product with the image, summed over channels.

    Raises:
        MissingDependencyError: the package ``bcos`` is not installed.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = _published_network(model).to(dtype)
        image = torch.empty(batch, 6, size, size, dtype=dtype, requires_grad=explain)
    for module in net.modules():
        switch = getattr(module, "set_explanation_mode", None)
        if explain and switch is not None:
            switch(True)
    counter = OpCounter()
    with torch.set_grad_enabled(explain), counter:
        with _attributed(net, counter):
            logits = net(image)
        if explain:
            counter.explanation = True
            logits.max(1).values.sum().backward(inputs=[image])
            counter.layer = ""
            torch.mul(image.detach(), image.grad).sum(1)  # type: ignore[arg-type]
    return counter.kernels


@contextmanager
def _attributed(net: nn.Module, counter: OpCounter) -> Iterator[None]:
    """Attribute operations to the innermost module that runs, as far as that is a layer of the network."""
    stack: list[str] = []
    handles = []

    def enter(name: str) -> Any:
        def see(*_: Any) -> None:
            stack.append(name)
            counter.layer = name

        return see

    def leave(*_: Any) -> None:
        stack.pop()
        counter.layer = stack[-1] if stack else ""

    for name, module in net.named_modules():
        # A published layer holds its linear part as a module: that is no layer by itself.
        if not name.endswith(".linear"):
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Report -------------------------------------------------------------------------------------------------------------

WAYS = ("fused", "published", "plain")


def _total(kernels: Iterable[Kernel], target: Target, dtype: str) -> dict[str, Any]:
    found = list(kernels)
    return {
        "kernels": len(found),
        "bytes": sum(k.bytes for k in found),
        "flops": sum(k.flops for k in found),
        "bound_ms": sum(k.milliseconds(target, dtype) for k in found),
    }


def _by_layer(kernels: Iterable[Kernel], names: Sequence[str]) -> dict[str, list[Kernel]]:
    """Kernels by layer; what is in none of them (a normalisation, an addition) goes with the layer before it."""
    known, here = set(names), names[0]
    found: dict[str, list[Kernel]] = {name: [] for name in names}
    for kernel in kernels:
        name = kernel.layer
        while name and name not in known:
            name = name.rpartition(".")[0]
        here = name or here
        found[here].append(kernel)
    return found


def summary(model: str, batch: int = 32, dtype: str = "bf16", size: int = 224, arch: str = "sm_90") -> dict[str, Any]:
    """Totals, ratios and layers of the three ways to run a torchvision classifier; JSON-ready.

    Each way has two passes: ``forward`` by itself, and ``explained``, a forward pass that keeps what is needed and the
    pass back to the image (of the plain network the gradient of its input). Layers: ``forward`` of the three ways,
    ``back`` of the fused and plain passes back.

    Raises:
        InvalidArgumentError: a model, batch, dtype or arch that is not known.
        MissingDependencyError: the package ``bcos`` is not installed.
        UnsupportedOpError: a network with operations that the plan has no kernels for.
    """
    if dtype not in DTYPES:
        raise InvalidArgumentError("dtype", repr(dtype), " or ".join(map(repr, DTYPES)), did_you_mean(dtype, DTYPES))
    if arch not in TARGETS:
        raise InvalidArgumentError("arch", repr(arch), " or ".join(map(repr, TARGETS)), did_you_mean(arch, TARGETS))
    target, storage = TARGETS[arch], DTYPES[dtype]
    encoded, image = capture(model, batch, size), capture(model, batch, size, 3)

    def run(way: str, explain: bool) -> list[Kernel]:
        if way == "published":
            return published(model, batch, size, storage, explain)
        return plan(encoded if way == "fused" else image, batch, size, storage, way == "fused", explain)

    passes = {(way, explain): run(way, explain) for way in WAYS for explain in (False, True)}
    totals = {
        way: {
            "forward": _total(passes[way, False], target, dtype),
            "explained": _total(passes[way, True], target, dtype),
        }
        for way in WAYS
    }
    names = list(dict.fromkeys(k.layer for k in passes["fused", False]))
    rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}
    parts = {f"{way}_forward": passes[way, False] for way in WAYS}
    parts |= {f"{way}_back": [k for k in passes[way, True] if k.explanation] for way in ("fused", "plain")}
    for part, kernels in parts.items():
        for name, found in _by_layer(kernels, names).items():
            rows[name][part] = _total(found, target, dtype)

    def ratio(one: str, other: str, stage: str, what: str) -> float:
        return float(totals[one][stage][what] / totals[other][stage][what])

    ratios = {
        f"{one}/{other}": {
            stage: {what: ratio(one, other, stage, what) for what in ("bytes", "bound_ms")}
            for stage in ("forward", "explained")
        }
        for one, other in (("fused", "plain"), ("published", "fused"), ("published", "plain"))
    }
    ops: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in passes["published", True]:
        ops[kernel.op].append(kernel)
    return {
        "model": model, "batch": batch, "size": size, "dtype": dtype, "arch": arch, "device": target.device,
        "bandwidth_gb_s": target.bandwidth_gb_s, "tflops": target.tflops[dtype], "measured": False, "note": NOTE,
        "totals": totals, "ratios": ratios, "layers": list(rows.values()),
        "published_ops": {
            op: _total(ks, target, dtype) for op, ks in sorted(ops.items(), key=lambda o: -sum(k.bytes for k in o[1]))
        },
    }  # fmt: skip


_COLUMNS = {"fused": "fused (ours)", "published": "published, op by op", "plain": "plain, fused"}
_STAGES = {"forward": "forward", "explained": "forward and explanation"}


def _total_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for way in WAYS:
        for stage, label in _STAGES.items():
            total, plain = found["totals"][way][stage], found["totals"]["plain"][stage]
            label = label if way != "plain" else label.replace("explanation", "input gradient")
            yield (
                _COLUMNS[way], label, str(total["kernels"]), f"{total['bytes'] / 1e9:.3f}",
                f"{total['flops'] / 1e9:.0f}", f"{total['bound_ms']:.3f}",
                f"{total['bytes'] / plain['bytes']:.2f}", f"{total['bound_ms'] / plain['bound_ms']:.2f}",
            )  # fmt: skip


_TOTAL_HEAD = ("way", "pass", "kernels", "GB", "GFLOP", "bound, ms", "bytes / plain", "bound / plain")


def _layer_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of layers in order; layers of equal numbers share one."""
    parts = ("fused_forward", "plain_forward", "published_forward", "fused_back", "plain_back")
    same: dict[tuple[str, ...], list[str]] = {}
    for row in found["layers"]:
        cells = [f"{row[p]['bytes'] / 1e6:.1f}" for p in parts]
        cells += [f"{row['fused_forward']['flops'] / 1e9:.1f}"]
        cells += [f"{row[p]['bound_ms'] * 1000:.1f}" for p in parts]
        same.setdefault(tuple(cells), []).append(row["name"])
    for numbers, names in same.items():
        yield (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", *numbers)


_LAYER_PARTS = ("ours fwd", "plain fwd", "published fwd", "ours back", "plain back")
_LAYER_HEAD = (
    "layer", *(f"{p}, MB" for p in _LAYER_PARTS), "ours fwd, GFLOP", *(f"{p}, us" for p in _LAYER_PARTS)
)  # fmt: skip


def roofline(
    model: str | Sequence[str] = "resnet50",
    batch: int = 32,
    dtype: str = "bf16",
    as_json: bool = False,
    arch: str = "sm_90",
    size: int = 224,
    out: Path | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print what a model's passes move, multiply and at least take; see the module.

    Args:
        model: one or several torchvision classifiers.
        as_json: JSON (one object, or a list of them) instead of tables.
        arch: the GPU whose data-sheet numbers bound the time.
        out: a folder; instead of printing, write ``roofline.md`` and ``roofline.json`` there.
        stream: instead of standard output.

    Raises:
        InvalidArgumentError, MissingDependencyError, UnsupportedOpError: as :func:`summary`.
    """
    names = [model] if isinstance(model, str) else list(model)
    found = [summary(name, batch, dtype, size, arch) for name in names]
    stream = stream or sys.stdout
    if out is not None:
        page, data = write_results(found, out)
        stream.write(f"wrote {page} and {data}\n")
        return
    if as_json:
        json.dump(found[0] if len(found) == 1 else found, stream, indent=1)
        stream.write("\n")
        return
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=200)
    for one in found:
        table = Table(*_TOTAL_HEAD, title=f"{one['model']}, batch {batch}, {dtype}, bound on {one['device']}")
        for row in _total_rows(one):
            table.add_row(*row)
        console.print(table)
        table = Table(*_LAYER_HEAD, title="by layer")
        for row in _layer_rows(one):
            table.add_row(*row)
        console.print(table)
    console.print(f"{NOTE}.")


def write_results(found: Sequence[Mapping[str, Any]], folder: Path) -> tuple[Path, Path]:
    """Write summaries as ``roofline.md`` and ``roofline.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "roofline.md", folder / "roofline.json"
    data.write_text(json.dumps(list(found), indent=1) + "\n", encoding="utf-8")
    page.write_text(_page(found), encoding="utf-8")
    return page, data


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def _page(found: Sequence[Mapping[str, Any]]) -> str:
    first = found[0]
    command = "python -m bcos_rt.kernels.static roofline " + " ".join(f"--model {f['model']}" for f in found)
    command += f" --batch {first['batch']} --dtype {first['dtype']} --out docs/results"
    text = _INTRODUCTION.format(
        batch=first["batch"], size=first["size"], dtype=first["dtype"], device=first["device"], command=command,
        bandwidth=first["bandwidth_gb_s"], tflops=first["tflops"],
    )  # fmt: skip
    for one in found:
        ours, theirs = one["ratios"]["fused/plain"], one["ratios"]["published/fused"]
        text += (
            f"\n## {one['model']}\n\n{_markdown(_TOTAL_HEAD, _total_rows(one))}\n"
            f"Our forward pass moves {ours['forward']['bytes']:.3f} times the plain network's bytes, and its bound is "
            f"{ours['forward']['bound_ms']:.3f} times as long. With the explanation, against the plain network's "
            f"forward pass and input gradient: {ours['explained']['bytes']:.3f} and "
            f"{ours['explained']['bound_ms']:.3f}. The published layers move {theirs['forward']['bytes']:.1f} times "
            f"our bytes forward and {theirs['explained']['bytes']:.1f} times with the explanation.\n\n"
            "Where the published explanation's bytes go:\n\n"
        )
        ops = list(one["published_ops"].items())[:8]
        text += _markdown(
            ("operation", "calls", "GB", "bound, ms"),
            ((f"`{o}`", str(t["kernels"]), f"{t['bytes'] / 1e9:.2f}", f"{t['bound_ms']:.3f}") for o, t in ops),
        )
        text += f"\n### Layers of {one['model']}\n\n{_markdown(_LAYER_HEAD, _layer_rows(one))}"
    return text


_INTRODUCTION = """# Roofline: bytes, operations and the least time they take

**These are counts and bounds. Nothing on this page was measured.** A pass's bound is the sum over its kernels of
`max(bytes / bandwidth, operations / peak)` with the data sheet's numbers of {device}
({bandwidth:.0f} GB/s, {tflops:.0f} TFLOP/s in {dtype}). Real kernels take longer.

Batch {batch}, {size} x {size} pixels, {dtype} storage. Made by

    {command}

which also writes [roofline.json](roofline.json), with every layer by itself.

## What is counted

**Bytes**: every tensor that a kernel reads or writes, once and whole, whatever stays in a cache and whatever a strided
1x1 convolution skips; weights too. **GFLOP**: matrix products, convolutions and attention, a multiply-add being two;
pointwise work counts as bytes only.

* **fused (ours)**: the B-cos form of the network, one kernel per convolution or linear layer, with norm, B-cos scaling,
  scale, shift, activation and residual addition in its epilogue. It reads the map of sums of squares of its input
  (float32, one entry per 64 channels after a convolution or linear layer, one after other kernels) and writes its
  output's. Encoding the image (float32, three channels, to eight channels and their map), pooling and LayerNorm are
  kernels of their own. For an explanation the forward pass also writes the multipliers (storage type), a bit mask of
  the gates where a residual addition ends in a ReLU, max pooling's places (one byte) and LayerNorm's statistics; an
  adjoint kernel reads gradient, weight, the multiplier of the layer before and the identity branch's gradient, and
  writes the multiplied gradient, at a block's edge the un-multiplied one too. Where no epilogue can multiply (a branch
  that ends in an addition fused into another branch's kernel; LayerNorm's adjoint) one more pass counts. The last
  kernel writes contributions and colour terms per pixel (float32) and no gradient of the image. One class per image.
* **published, op by op**: the same network with the layers of the PyPI package `bcos` (`BcosConv2d`, `BcosLinear`,
  `DetachableLayerNorm`, its attention with plain projections), executed on the meta device; every ATen operation is a
  kernel that reads its inputs and writes its outputs. Views count nothing. Everything runs in {dtype} (no autocast, no
  casts). The explanation is autograd's gradient of the winning logit, times the image, summed. The six-channel image is
  taken as given, its encoding is not counted. GELU's backward pass is PyTorch's one kernel.
* **plain, fused**: the network before B-cosification with what cuDNN and TensorRT fuse: BatchNorm folded into the
  weights, bias, activation and residual addition in the convolution's or linear layer's epilogue. Pooling and LayerNorm
  are kernels of their own; a normalised three-channel image is taken as given. Its input gradient: one kernel per
  layer with the activation's derivative (ReLU: a bit mask; GELU: a saved tensor) and the identity branch's gradient in
  the epilogue. This is as good as a library could do; PyTorch's own gradient moves more.
* Attention is one kernel in *fused* and *plain* (flash attention: reads q, k, v, writes the output; for a gradient also
  the logarithms of the softmax's sums). Its adjoint with softmax held constant reads q, k, gradient and gives the
  values' gradient, so that only a third of the joint projection is transposed; the plain gradient computes all three.
  The projections in and out of attention stay plain in all three, as the converter keeps them.
* The part of a logit that does not come from the pixels (`residual`) is counted nowhere.

"back": everything that runs after the forward pass. Layers of equal numbers share a row. In a row of the published
network, what is no layer by itself (BatchNorm, ReLU, addition) belongs to the layer before and an attention's
projections to the attention; autograd's operations are not attributed to layers. "us" are bounds.
"""

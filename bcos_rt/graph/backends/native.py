"""The CPU backend of our C++ kernels: oneDNN's convolutions through torch, everything around them in one pass each.

Needs no compiler when it runs. A fused op becomes a step: the convolution with its weights packed for oneDNN once, then
:mod:`bcos_rt.kernels.cpu` in place over what it returned. Adjoints of stride-1 convolutions are convolutions with
flipped weights (the transposed one is up to 10 % slower in oneDNN); the stem's, with its few output channels, is one
convolution that computes the four parities of pixels as channels (6.0 to 4.0 ms on ResNet-18, 2 cores).

Images go through in chunks of two by default, so that peak memory does not grow with the batch. Explanations of 8
images in chunks of 1, 2, 4 and 8 took 337, 295, 292 and 293 ms on ResNet-18, 730, 709, 681 and 762 on ResNet-50, 604,
517, 522 and 603 on DenseNet-121 (2 cores, medians of 5 interleaved runs). Transformers go in chunks of four: 345, 290,
269 and 293 ms on ViT-Ti (2 cores of a Xeon, medians of 6).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bcos_rt.errors import UnsupportedOpError
from bcos_rt.graph.backends import Runner
from bcos_rt.graph.backends.concatenation import Slice, join_in_place
from bcos_rt.graph.backends.padding import fold_crop_of_the_image, fold_crops, padding_of
from bcos_rt.graph.capture import bound_arguments
from bcos_rt.graph.lower_transposed import ParityAxis, flipped, parity_weight
from bcos_rt.graph.program import Program
from bcos_rt.kernels import cpu
from bcos_rt.kernels.cpu import channels_last, pointwise, winograd
from bcos_rt.kernels.reference import output_padding, output_size, per_row

__all__ = ["build", "lowered"]

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn
Function = Callable[..., Any]

# Images that go through together unless an engine is told another number: of networks made of convolutions, and of
# those made of linear layers.
CHUNK, CHUNK_OF_TOKENS = 2, 4


def build(programs: Sequence[Program], chunk: int | None = None) -> list[Runner]:
    """Lower programs to steps; what they pack of a constant that they share is packed once.

    Args:
        programs: fused ops, float32 or bfloat16, on the CPU.
        chunk: images that go through together; None: two, or four of a network with more linear layers than
            convolutions.

    Raises:
        UnsupportedOpError: the C++ kernels are not built, or the program's dtype is neither float32 nor bfloat16.
    """
    if not cpu.available():
        raise UnsupportedOpError(f"backend 'native': {cpu.unavailable_reason()}")
    packed = _Packed()
    return [_runner(*lowered(program, packed), chunk or _chunk_of(program)) for program in programs]


def _chunk_of(program: Program) -> int:
    names = [getattr(node.target, "_opname", "") for node in program.graph.nodes]
    return CHUNK_OF_TOKENS if names.count("linear_fused") > names.count("conv2d_fused") else CHUNK


def _runner(module: GraphModule, constants: list[Tensor], together: int) -> Runner:
    forward = module.forward

    def once(images: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        given = (images,) if targets is None else (images, targets)
        result: dict[str, Tensor] = forward(*constants, *given)
        return result

    def run(images: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        with torch.inference_mode():
            if images.shape[0] <= together:
                return once(images, targets)
            parts = [
                once(images[i : i + together], None if targets is None else targets[i : i + together])
                for i in range(0, images.shape[0], together)
            ]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return run


class _Packed:
    """What was packed of constants, for the programs that read them. The constants have to live as long as this."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}

    def get(self, constant: Tensor, how: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """``make()``, made once for this memory and this way of packing it."""
        key = (constant.data_ptr(), tuple(constant.shape), constant.dtype, *how)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class _Lowering:
    program: Program
    packed: _Packed


def lowered(program: Program, packed: _Packed | None = None) -> tuple[GraphModule, list[Tensor]]:
    """The program in steps, and the constants that no step took: its first arguments, before image and class ids."""
    program = program.copy()
    _lower(program, _Packed() if packed is None else packed)
    module = GraphModule(nn.Module(), program.graph)
    return module, [program.constants[n] for n in program.graph.nodes if n in program.constants]


def _lower(program: Program, packed: _Packed) -> None:
    """Replace every fused op of the program's graph by a step, a plain function of the node's tensor arguments."""
    low = _Lowering(program, packed)
    fold_crops(program, lambda node: _is_depthwise(program, bound_arguments(node)))
    fold_crop_of_the_image(program, lambda node: _fits_parity(program, bound_arguments(node)))
    for node, place in join_in_place(program, lambda node: _is_dense_convolution(program, node)).items():
        node.meta["writes_into"] = place
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is aten.repeat_interleave.self_int:
            node.target = _repeated
            continue
        if node.target in (aten.linear.default, aten.matmul.default):
            _lower_product(low, node)
            continue
        make = _MAKERS.get(node.target._opname) if node.target.namespace == "bcos_rt" else None
        if make is None:
            continue
        arguments = bound_arguments(node)
        function, args = make(low, node, arguments)
        if arguments.get("weight") is not None:
            node.meta["weight_shape"] = tuple(program.constants[arguments["weight"]].shape)
        # The name that the generated code gives it.
        function.__name__ = f"step_{node.name}"
        with program.graph.inserting_before(node):
            step = program.graph.call_function(function, tuple(args))
        step.meta.update(node.meta)
        node.replace_all_uses_with(step)
        program.graph.erase_node(node)
    program.clean()


def _repeated(x: Tensor, repeats: int, dim: int) -> Tensor:
    """Each image's values for each of its classes; of one class no copy."""
    return x if repeats == 1 else x.repeat_interleave(repeats, dim)


# --- convolutions ----------------------------------------------------------------------------------------------------


class _AtFirstCall:
    """A function of an image that ``make(weight, image)`` makes at the first call, for it depends on the sizes."""

    def __init__(self, weight: Tensor, make: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]) -> None:
        self.weight: Tensor | None = weight
        self.make = make
        self.function: Callable[[Tensor], Tensor] | None = None
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        if self.function is None:
            with self.lock:
                if self.function is None and self.weight is not None:
                    self.function = self.make(self.weight, x)
                    self.weight = None  # what was made keeps it, packed
        assert self.function is not None
        return self.function(x)


def _convolution(
    weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """``conv2d`` with packed weights; returns channels-last memory of its own.

    Which way is the faster depends on the size of the image, so it is chosen at the first call.
    """
    s, p, d = list(stride), list(padding), list(dilation)

    def choose(weight: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
        if bias is None and winograd.suits(weight, x, s, p, d, groups):
            return winograd.Winograd(weight, p)
        packed = mkldnn._reorder_convolution_weight(weight, p, s, d, groups, list(x.shape))
        return lambda x: channels_last(mkldnn._convolution_pointwise(x, packed, bias, p, s, d, groups, "none", [], ""))

    return _AtFirstCall(weight.contiguous(), choose)


def _adjoint(
    weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """The transposed convolution to ``input_size``; returns channels-last memory of its own."""
    kernel = list(weight.shape[2:])
    inside = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    if all(s == 1 for s in stride) and min(inside) >= 0:
        return _convolution(flipped(weight, groups), None, (1, 1), inside, dilation, groups)
    s, p, d = list(stride), list(padding), list(dilation)
    extra = output_padding(input_size, kernel, s, p, d)
    if groups > 1:
        return lambda grad: channels_last(F.conv_transpose2d(grad, weight, None, s, p, extra, groups, d))

    def make(weight: Tensor, grad: Tensor) -> Callable[[Tensor], Tensor]:
        size = list(grad.shape)
        packed = mkldnn._reorder_convolution_transpose_weight(weight, p, extra, s, d, groups, size)

        def run(grad: Tensor) -> Tensor:
            out = mkldnn._convolution_transpose_pointwise(grad, packed, None, p, extra, s, d, groups, "none", [], "")
            return channels_last(out)

        return run

    return _AtFirstCall(weight.contiguous(), make)


def _value(program: Program, node: Any) -> Tensor | None:
    """A constant argument's value; None for None."""
    return None if node is None else program.constants[node]


def _float(value: Tensor | None) -> Tensor | None:
    """A parameter as the C++ kernels read it."""
    return None if value is None else value.float().contiguous()


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _is_depthwise(program: Program, a: dict[str, Any]) -> bool:
    weight = program.constants[a["weight"]]
    return bool(weight.shape[1] == 1 and weight.shape[0] == a["groups"] and a["groups"] > 1)


def _is_dense_convolution(program: Program, node: Node) -> bool:
    if node.target is not torch.ops.bcos_rt.conv2d_fused.default:
        return False
    return not _is_depthwise(program, bound_arguments(node))


def _halves(size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a stem's adjoint can be computed as one convolution with the parities of pixels as channels."""
    return tuple(stride) == (2, 2) and tuple(dilation) == (1, 1) and all(s % 2 == 0 for s in size)


def _fits_parity(program: Program, a: dict[str, Any]) -> bool:
    size = [int(s) for s in program.image.meta["val"].shape[2:]]
    return a["groups"] == 1 and _halves(size, a["stride"], a["dilation"])


def _input_channels(x: Node, weight: Tensor) -> Tensor:
    """A stem's weights for the channels that :func:`_encode_image` left of the 8 of its op; others as they are."""
    source: Any = x
    while source.op == "call_function" and source.target in (aten.pad.default, aten.constant_pad_nd.default):
        source = source.args[0]
    meta = source.args[0].meta if source.target is operator.getitem else source.meta
    if "encoded_channels" not in meta:
        return weight
    if meta["mirrored"]:
        return (weight[:, :3] - weight[:, 3:6]).contiguous()
    return weight[:, : meta["encoded_channels"]].contiguous()


def _conv2d_fused(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    weight = low.program.constants[a["weight"]]
    bias, scale, shift = (_value(low.program, a[name]) for name in ("bias", "scale", "shift"))
    scale, shift = map(_float, (scale, shift))
    kernel, geometry = list(weight.shape[2:]), (list(a["stride"]), list(a["padding"]), list(a["dilation"]))
    wants = (a["want_multiplier"], a["want_gate"], a["want_squares"])
    b, eps, activation, groups = a["b"], a["eps"], a["activation"], a["groups"]
    if _is_depthwise(low.program, a):
        packed = low.packed.get(weight, ("depthwise",), lambda: cpu.pack_depthwise(weight))
        bias = _float(bias)
        source, padding = a["x"], geometry[1]
        if (padded := padding_of(source)) is not None:
            source, before = padded
            padding = [p + more for p, more in zip(padding, before, strict=True)]
        window = (geometry[0], padding, geometry[2])
        size = tuple(int(s) for s in node.meta["val"][0].shape[2:])

        def depthwise(x: Tensor, residual: Tensor | None) -> Any:
            return cpu.depthwise_fused(
                x, packed, kernel, bias, scale, shift, residual, *window, b, eps, activation, *wants, size
            )

        return depthwise, [source, a["residual"]]
    constant, weight = weight, _input_channels(a["x"], weight)
    place: Slice | None = node.meta.get("writes_into")
    args = [a["x"], a["squares"], a["residual"]]
    args = args if place is None else [*args, place.buffer]
    if bias is None and pointwise.suits(weight, geometry[1], groups):
        how: tuple[Any, ...] = ("pointwise", *geometry[0], *weight.shape)
        matrix = low.packed.get(constant, how, lambda: pointwise.Pointwise(weight, geometry[0]))

        def one_by_one(x: Tensor, squares: Tensor | None, residual: Tensor | None, buffer: Tensor | None = None) -> Any:
            x = cpu.readable(x)
            if squares is None and b != 1:
                squares = cpu.square_sum(x)
            y = matrix.empty(x) if buffer is None or place is None else place.of(buffer)
            return cpu.conv_epilogue(
                y, squares, kernel, *geometry, eps, scale, shift, residual, b, activation, *wants,
                product=matrix.product(x),
            )  # fmt: skip

        return one_by_one, args
    size = tuple(a["x"].meta["val"].shape[2:])
    how = ("convolution", _address(bias), *map(tuple, geometry), groups, size, *weight.shape)
    convolution = low.packed.get(
        constant, how, lambda: _convolution(weight, None if bias is None else bias.to(weight.dtype), *geometry, groups)
    )

    def dense(x: Tensor, squares: Tensor | None, residual: Tensor | None, buffer: Tensor | None = None) -> Any:
        z = convolution(x)
        if squares is None and b != 1:
            squares = cpu.square_sum(x, groups)
        out = None if buffer is None or place is None else place.of(buffer)
        return cpu.conv_epilogue(
            z, squares, kernel, *geometry, eps, scale, shift, residual, b, activation, *wants, groups, out
        )

    return dense, args


def _conv2d_transposed(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    weight = low.program.constants[a["weight"]]
    geometry = (list(a["stride"]), list(a["padding"]), list(a["dilation"]))
    size, want_raw = list(a["input_size"]), a["want_raw"]
    args = [a["grad"], a["multiplier"], a["identity"], a["gate"]]
    if _is_depthwise(low.program, a):
        packed = low.packed.get(weight, ("depthwise",), lambda: cpu.pack_depthwise(weight))
        kernel = list(weight.shape[2:])

        def depthwise(grad: Tensor, m: Tensor | None, identity: Tensor | None, gate: Tensor | None) -> Any:
            return cpu.depthwise_transposed(grad, packed, kernel, size, *geometry, m, identity, gate, want_raw)

        return depthwise, args
    if geometry[0] == [1, 1] and pointwise.suits(weight, geometry[1], a["groups"]):
        matrix = pointwise.Pointwise(flipped(weight, 1))

        def one_by_one(grad: Tensor, m: Tensor | None, identity: Tensor | None, gate: Tensor | None) -> Any:
            grad = cpu.readable(grad)
            out = matrix.empty(grad)
            return cpu.transposed_epilogue(out, m, identity, gate, want_raw, product=matrix.product(grad))

        return one_by_one, args
    back = _adjoint(weight, size, *geometry, a["groups"])
    return _with_epilogue(back, a), args


def _with_epilogue(back: Callable[[Tensor], Tensor], a: dict[str, Any]) -> Function:
    """An adjoint and its epilogue, in place over what the adjoint returned."""
    want_raw = a["want_raw"]
    if not want_raw and all(a[name] is None for name in ("multiplier", "identity")):

        def bare(grad: Tensor, *_: Any) -> Any:
            out = back(grad)
            return out, None

        return bare

    def run(grad: Tensor, m: Tensor | None, identity: Tensor | None, gate: Tensor | None) -> Any:
        return cpu.transposed_epilogue(back(grad), m, identity, gate, want_raw)

    return run


# --- the stem --------------------------------------------------------------------------------------------------------


def _mirrors(program: Program, node: Node, mean: Tensor, std: Tensor) -> bool:
    """Whether the inverted channels are the others' negative, as with means 1 - m, and only dense layers read them.

    Three channels v then do: a response to ``[v, -v]`` is that of ``w[:, :3] - w[:, 3:]`` to v.
    """
    error = (mean[3:].double() - (1 - mean[:3].double())).abs().max()
    if error > torch.finfo(torch.float32).eps or not torch.equal(std[3:], std[:3]):
        return False
    readers = [user for out in node.users if out.args[1] == 0 for user in out.users]
    while readers:
        reader = readers.pop()
        if padding_of(reader) is not None:
            readers.extend(reader.users)
        elif reader.target is not torch.ops.bcos_rt.square_sum.default and not (
            _is_dense_convolution(program, reader) and bound_arguments(reader)["groups"] == 1
        ):
            return False
    return True


def _encode_image(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    mean, std = low.program.constants[a["mean"]], low.program.constants[a["std"]]
    six, dtype = a["six_channels"], a["dtype"]
    mirrored = six and _mirrors(low.program, node, mean, std)
    channels = 6 if six and not mirrored else 3
    node.meta.update(encoded_channels=channels, mirrored=mirrored)
    if mirrored:
        mean, std = mean[:3], std[:3]

    def run(image: Tensor) -> Any:
        encoded, squares = cpu.encode_image(image, mean, std, channels == 6, dtype, channels)
        return encoded, squares.mul_(2) if mirrored else squares

    return run, [a["image"]]


def _conv2d_contributions(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    inverse = low.program.constants[a["inverse_std"]].float().contiguous()
    weight = low.program.constants[a["weight"]][:, : inverse.numel()]
    stride, padding, dilation = list(a["stride"]), list(a["padding"]), list(a["dilation"])
    height, width = (int(s) for s in low.program.image.meta["val"].shape[2:])
    scale, want_colour = a["scale"], any(u.args[1] == 2 for u in node.users)
    if _halves((height, width), stride, dilation):
        axes = [ParityAxis.of(k, 2, p) for k, p in zip(weight.shape[2:], padding, strict=True)]
        # One padding serves both ends; what it makes too many is not read.
        pads = [max(-axis.first, axis.last) for axis in axes]
        first = [pad + axis.first for pad, axis in zip(pads, axes, strict=True)]
        convolution = _convolution(parity_weight(weight, *axes), None, (1, 1), pads, (1, 1), 1)

        def by_parity(grad: Tensor, image: Tensor) -> Any:
            blocks = convolution(grad)[:, :, first[0] :, first[1] :]
            return cpu.image_contributions(blocks, image, inverse, scale, 2, want_colour)

        return by_parity, [a["grad"], a["image"]]
    back = _adjoint(weight, (height, width), stride, padding, dilation, 1)

    def run(grad: Tensor, image: Tensor) -> Any:
        return cpu.image_contributions(back(grad), image, inverse, scale, 1, want_colour)

    return run, [a["grad"], a["image"]]


def _image_contributions(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    inverse = low.program.constants[a["inverse_std"]].float().contiguous()
    scale, want_colour = a["scale"], any(u.args[1] == 2 for u in node.users)

    def run(grad: Tensor, image: Tensor) -> Any:
        return cpu.image_contributions(grad, image, inverse, scale, 1, want_colour)

    return run, [a["grad"], a["image"]]


# --- linear layers, pooling, the rest --------------------------------------------------------------------------------


class _Product:
    """``x W^T + b`` for rows x [..., C]: MKL's product with W packed for as many rows as came first.

    Packed, 196 to 1568 rows by 192 to 1536 channels take 3 to 26 % less time than F.linear (2 cores of a Xeon); other
    numbers of rows go the plain way.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.contiguous(), bias
        self.packed: Tensor | None = None
        self.rows = 0
        self.packs = weight.dtype == torch.float32 and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if self.packs and self.packed is None and rows > 1:
            with self.lock:
                if self.packed is None:
                    self.rows, self.packed = rows, torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
        if self.packed is None or rows != self.rows:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, rows)
        return out


def _product(low: _Lowering, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> _Product:
    """The product with a constant, or with its transpose, which no bias goes with."""
    how = ("product", transposed, _address(bias))
    return low.packed.get(weight, how, lambda: _Product(weight.t() if transposed else weight, bias))  # type: ignore[no-any-return]


def _lower_product(low: _Lowering, node: Node) -> None:
    """A plain linear layer, or its adjoint, whose weights are constant."""
    a = bound_arguments(node)
    linear = node.target is aten.linear.default
    x, matrix = (a["input"], a["weight"]) if linear else (a["self"], a["other"])
    constants = low.program.constants
    if matrix not in constants or matrix.meta["val"].ndim != 2 or x in constants or x.meta["val"].ndim < 2:
        return
    bias = _value(low.program, a["bias"]) if linear else None
    step = _product(low, constants[matrix], bias, transposed=not linear)
    node.target, node.args, node.kwargs = (lambda x: step(x)), (x,), {}
    node.target.__name__ = f"step_{node.name}"


def _linear_fused(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    weight = low.program.constants[a["weight"]]
    bias, scale, shift = (_value(low.program, a[name]) for name in ("bias", "scale", "shift"))
    bias = None if bias is None else bias.to(weight.dtype)
    scale, shift = map(_float, (scale, shift))
    wants = (a["want_multiplier"], a["want_gate"], a["want_squares"])
    b, eps, activation = a["b"], a["eps"], a["activation"]
    product = _product(low, weight, bias)

    def run(x: Tensor, squares: Tensor | None, residual: Tensor | None) -> Any:
        if squares is None and b != 1:
            squares = cpu.row_square_sum(x)
        z = product(x).contiguous()
        return cpu.linear_epilogue(z, squares, eps, scale, shift, residual, b, activation, *wants)

    return run, [a["x"], a["squares"], a["residual"]]


def _linear_transposed(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    product = _product(low, low.program.constants[a["weight"]], None, transposed=True)
    return (
        _with_epilogue(lambda grad: product(grad).contiguous(), a),
        [a["grad"], a["multiplier"], a["identity"], a["gate"]],
    )


def _layer_norm(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    weight, bias = (_float(_value(low.program, a[name])) for name in ("weight", "bias"))
    eps, want = a["eps"], a["want_squares"]
    return lambda x: cpu.layer_norm(x, weight, bias, eps, want), [a["x"]]


def _layer_norm_transposed(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    weight = _float(_value(low.program, a["weight"]))

    def run(grad: Tensor, rstd: Tensor, identity: Tensor | None) -> Tensor:
        return cpu.layer_norm_transposed(grad, rstd, weight, identity)

    return run, [a["grad"], a["rstd"], a["identity"]]


def _square_sum(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    groups = a["groups"]
    if groups == 1 and padding_of(a["x"]) is not None:
        # The image's encoding came with its map, which has fewer channels to pad.
        source, pads = a["x"].args[:2]
        if source.target is operator.getitem and source.args[1] == 0 and "encoded_channels" in source.args[0].meta:
            with low.program.graph.inserting_before(node):
                squares = low.program.graph.call_function(operator.getitem, (source.args[0], 1))
            return lambda squares: F.pad(squares, pads), [squares]
    return lambda x: cpu.square_sum(x, groups), [a["x"]]


def _avg_pool2d(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    kernel, stride, padding = (tuple(a[name]) for name in ("kernel_size", "stride", "padding"))
    ceil, count, want, groups = a["ceil_mode"], a["count_include_pad"], a["want_squares"], a["groups"]
    whole = kernel == tuple(a["x"].meta["val"].shape[2:]) and padding == (0, 0)

    def run(x: Tensor) -> Any:
        y = x.mean((2, 3), keepdim=True) if whole else F.avg_pool2d(x, kernel, stride, padding, ceil, count)
        y = channels_last(y)
        return y, (cpu.square_sum(y, groups) if want else None)

    return run, [a["x"]]


def _avg_pool2d_transposed(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    kernel, stride, padding, size = (list(a[name]) for name in ("kernel_size", "stride", "padding", "input_size"))
    ceil, count = a["ceil_mode"], a["count_include_pad"]
    area = size[0] * size[1]

    def spread(grad: Tensor) -> Tensor:
        out = torch.empty((*grad.shape[:2], *size), dtype=grad.dtype, memory_format=torch.channels_last)
        return out.copy_((grad / area).expand_as(out))

    def back(grad: Tensor) -> Tensor:
        shape = torch.empty((*grad.shape[:2], *size), dtype=grad.dtype, memory_format=torch.channels_last)
        return channels_last(aten.avg_pool2d_backward(grad, shape, kernel, stride, padding, ceil, count, None))

    whole = kernel == size and padding == [0, 0]
    return _with_epilogue(spread if whole else back, a), [a["grad"], a["multiplier"], a["identity"], a["gate"]]


def _max_pool2d(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    kernel, stride, padding, dilation = (tuple(a[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
    ceil, want_index, want_squares, groups = (a[name] for name in ("ceil_mode", "want_index", "want_squares", "groups"))

    def run(x: Tensor) -> Any:
        # Between our own steps the index is ATen's flat place in the image.
        if want_index:
            y, index = F.max_pool2d(x, kernel, stride, padding, dilation, ceil, return_indices=True)
        else:
            y = F.max_pool2d(x, kernel, stride, padding, dilation, ceil)
            index = None
        y = channels_last(y)
        return y, index, (cpu.square_sum(y, groups) if want_squares else None)

    return run, [a["x"]]


def _max_pool2d_transposed(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    kernel, stride, padding, dilation, size = (
        list(a[name]) for name in ("kernel_size", "stride", "padding", "dilation", "input_size")
    )

    def run(grad: Tensor, index: Tensor, m: Tensor | None, identity: Tensor | None, gate: Tensor | None) -> Any:
        like = torch.empty((*grad.shape[:2], *size), dtype=grad.dtype, memory_format=torch.channels_last)
        places = per_row(index, grad.shape[0])
        # Rounding up the size makes no difference to places that are already known.
        back = aten.max_pool2d_with_indices_backward(
            channels_last(grad), like, kernel, stride, padding, dilation, ceil, channels_last(places)
        )
        if m is None and identity is None and not want_raw:
            return channels_last(back), None
        return cpu.transposed_epilogue(channels_last(back), m, identity, gate, want_raw)

    want_raw = a["want_raw"]
    ceil = output_size(size, kernel, stride, padding, dilation) != [int(s) for s in a["grad"].meta["val"].shape[2:]]
    return run, [a["grad"], a["index"], a["multiplier"], a["identity"], a["gate"]]


def _scale_act(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    scale, shift = (low.program.constants[a[name]].float().contiguous() for name in ("scale", "shift"))
    activation, want, groups = a["activation"], a["want_squares"], a["groups"]
    return lambda x: cpu.scale_act(x, scale, shift, activation, want, groups), [a["x"]]


def _scale_act_transposed(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    scale, shift = (low.program.constants[a[name]].float().contiguous() for name in ("scale", "shift"))
    activation, in_place = a["activation"], _may_overwrite(node, a["identity"])
    node.meta["accumulates"] = True

    def run(grad: Tensor, x: Tensor, identity: Tensor | None) -> Tensor:
        return cpu.scale_act_transposed(grad, x, scale, shift, activation, identity, in_place)

    return run, [a["grad"], a["x"], a["identity"]]


def _may_overwrite(node: Node, identity: Any) -> bool:
    """Whether the adjoint of a dense layer can add to the gradient of what the layer concatenated with its result.

    That is so where that gradient is the first channels of an earlier such adjoint's result, where nothing else reads
    them, and where this result is sliced in turn (what is left in the end gets memory of its own size).
    """
    if not isinstance(identity, Node) or len(identity.users) != 1 or (own := _channel_range(identity)) is None:
        return False
    whole: Any = identity.args[0]
    ranges = [_channel_range(user) for user in whole.users if user is not identity]
    behind = all(r is not None and r[0] >= own[1] for r in ranges)
    sliced = all(_channel_range(user) is not None for user in node.users)
    return "accumulates" in whole.meta and own[0] == 0 and behind and sliced


def _channel_range(node: Node) -> tuple[int, int] | None:
    """The channels [begin, end) that a slice of channels takes."""
    if node.target is not aten.slice.Tensor:
        return None
    a = bound_arguments(node)
    channels = int(a["self"].meta["val"].shape[1])
    begin, end = a["start"] or 0, channels if a["end"] is None else min(a["end"], channels)
    return (begin, end) if a["dim"] == 1 and a["step"] == 1 and 0 <= begin <= end else None


def _transposed_epilogue(low: _Lowering, node: Node, a: dict[str, Any]) -> tuple[Function, list[Any]]:
    want_raw = a["want_raw"]

    def run(total: Tensor, m: Tensor | None, identity: Tensor | None, gate: Tensor | None) -> Any:
        # Not in place: others may still read it, and it may be a view.
        return cpu.transposed_epilogue(total, m, identity, gate, want_raw, in_place=False)

    return run, [a["total"], a["multiplier"], a["identity"], a["gate"]]


_MAKERS: dict[str, Callable[[_Lowering, Node, dict[str, Any]], tuple[Function, list[Any]]]] = {
    "avg_pool2d": _avg_pool2d,
    "avg_pool2d_transposed": _avg_pool2d_transposed,
    "conv2d_contributions": _conv2d_contributions,
    "conv2d_fused": _conv2d_fused,
    "conv2d_transposed": _conv2d_transposed,
    "encode_image": _encode_image,
    "image_contributions": _image_contributions,
    "layer_norm": _layer_norm,
    "layer_norm_transposed": _layer_norm_transposed,
    "linear_fused": _linear_fused,
    "linear_transposed": _linear_transposed,
    "max_pool2d": _max_pool2d,
    "max_pool2d_transposed": _max_pool2d_transposed,
    "scale_act": _scale_act,
    "scale_act_transposed": _scale_act_transposed,
    "square_sum": _square_sum,
    "transposed_epilogue": _transposed_epilogue,
}

"""An op on a shape, ready to be timed: our kernel, the same by PyTorch op by op, and what must come out.

=========================  ================================  ==========================================================
op                         our kernel on the CPU             floating-point operations
=========================  ================================  ==========================================================
``conv_epilogue``          C++, in place over z              a value: 5 (``|z| / n``, scale, z, shift, ReLU), 1 for the
                                                             residual, 1 for the multiplier, 2 for the map; a pixel:
                                                             kernel places + 2
``linear_epilogue``        C++, in place over z              a value: 2 (``|z| / n``, z), 1 for the multiplier, 2 for
                                                             the map; a row: 2
``transposed_epilogue``    C++, in place over the gradient   a value: 1 for each of multiplier, identity, gate
``square_sum``             C++                               2 a value
``row_square_sum``         C++                               2 a value
``scale_act``              C++                               3 a value, 2 for the map
``scale_act_transposed``   C++                               5 a value
``encode_image``           C++                               27 a pixel
``image_contributions``    C++                               a pixel: 6 for weights, 12 for their product with the
                                                             image, 40 for the colours
``depthwise_fused``        C++                               4 a kernel place (z and norm); a value: 9, 1 for the
                                                             multiplier, 2 for the map
``depthwise_transposed``   C++                               2 a kernel place of a gradient's value, 1 a result
``conv2d_fused``           convolution, epilogue             2 a multiply-add of a direct convolution
``conv2d_transposed``      convolution, epilogue             the same
``conv2d_contributions``   convolution, contributions        the same
``linear_fused``           product, epilogue                 2 a multiply-add
``linear_transposed``      product, epilogue                 2 a multiply-add
``max_pool2d``             ATen, ``square_sum``              a comparison a place, 2 a value for the map
``avg_pool2d``             ATen, ``square_sum``              an addition a place; a value: 1, 2 for the map
``avg_pool2d_transposed``  ATen, epilogue                    an addition a place, 1 a result
=========================  ================================  ==========================================================

Bytes: every tensor that the kernel is given and every one that it returns, once and whole; one it overwrites counts
twice; weights in their plain form. What a kernel keeps for itself (packed weights, the transformed tiles of Winograd)
is not counted, nor is it that a strided window may leave places out.

On the CPU those from ``conv2d_fused`` on run as the engine's native backend does them: its own step, with weights
packed at the first call. On CUDA an op is one of :mod:`bcos_rt.kernels.ops` on the Triton kernels, and those without
one there are left out.

Variants: ``predict`` is a layer of a prediction, with its norm's scale and shift, activation and the map for the next
layer; ``explain`` also writes the multiplier; ``residual`` also adds a shortcut and writes the gate by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bcos_rt.benchmark.kernels.layers import Sweep, label, outputs
from bcos_rt.graph.backends import native
from bcos_rt.graph.backends.aten_module import aten_module
from bcos_rt.graph.lower import lower_to_aten
from bcos_rt.graph.program import Program
from bcos_rt.kernels import cpu, ops, reference, reference_layers
from bcos_rt.kernels.reference import CONV_EPS, LINEAR_EPS, channels_last
from bcos_rt.kernels.static.shapes import Layer

__all__ = ["CPU_OPS", "CUDA_OPS", "Case", "Spec", "operations", "specs", "tensors_of"]

Results = tuple[Tensor, ...]
Run = Callable[[], Results]

PREDICT, EXPLAIN, RESIDUAL = "predict", "explain", "residual"


@dataclass(frozen=True)
class Case:
    """Operands of one op on one device, and who computes with them.

    Attributes:
        inputs: every tensor the kernel reads.
        run: our kernel; may overwrite an input. Results that were not asked for are left out.
        plain: the same function by PyTorch op by op, as on an installation without our kernels.
        expected: what ``run`` must return the first time, in float64; to be called before it. A map of sums of squares
            may be split into several channels.
        flops: see the module.
    """

    inputs: tuple[Tensor, ...]
    run: Run
    plain: Callable[[], Any]
    expected: Run
    flops: int

    def bytes(self, results: Results) -> int:
        """What must be moved at least, ``results`` being what ``run`` returned."""
        return sum(t.numel() * t.element_size() for t in (*self.inputs, *results))


@dataclass(frozen=True)
class Spec:
    """A case that has not been made: ``make(dtype, device)`` allocates its operands.

    Attributes:
        op, variant: in the results.
        layer: whose shapes it has.
    """

    op: str
    variant: str
    layer: Layer
    make: Callable[[torch.dtype, str], Case]

    @property
    def shape(self) -> str:
        """The layer's shape as text."""
        return label(self.layer)


def tensors_of(results: Any) -> Results:
    """The tensors of an op's result that are not empty placeholders."""
    many = results if isinstance(results, tuple | list) else (results,)
    return tuple(t for t in many if t.ndim != 1 or t.shape[0])


# --- operands --------------------------------------------------------------------------------------------------------


class _Operands:
    """Seeded operands of one case."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Of unit variance; images in channels-last memory."""
        values = torch.randn(shape, generator=self._generator, device=self.device).to(self.dtype)
        return channels_last(values) if len(shape) == 4 else values

    def vector(self, length: int, middle: float, spread: float) -> Tensor:
        """float32 [length]."""
        return middle + spread * torch.randn(length, generator=self._generator, device=self.device)

    def weight(self, layer: Layer) -> Tensor:
        """Filters of norm 1, in torch's layout."""
        shape = layer.weight_shape or ()
        values = torch.randn(shape, generator=self._generator, device=self.device)
        rows = values.flatten(1)
        unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return unit.reshape(shape).to(self.dtype)

    def signs(self, *shape: int) -> Tensor:
        """1 and -1: what is multiplied by them in place, again and again, neither grows nor vanishes."""
        values = self.normal(*shape)
        return torch.where(values < 0, -torch.ones_like(values), torch.ones_like(values))

    def squares(self, x: Tensor, groups: int = 1) -> Tensor:
        """The map that the producer of an image would have left."""
        return reference.square_sum(x, groups)

    def mask(self, *shape: int) -> Tensor:
        """A bit mask of half the channels, as a ReLU's gate is stored."""
        on = torch.rand((shape[0], *shape[2:], shape[1]), generator=self._generator, device=self.device) > 0.5
        return reference.pack_mask(on).permute(0, 3, 1, 2)

    def picture(self, layer: Layer) -> Tensor:
        """[N, 3, H, W] float32 in [0, 1], as a decoder gives it."""
        return torch.rand(layer.input_shape, generator=self._generator, device=self.device)


def _window(layer: Layer) -> dict[str, Any]:
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- ops that exist on every device ----------------------------------------------------------------------------------


def _program(op: str, first: str, given: Mapping[str, Any]) -> Program:
    """One op as a program: ``first`` its image, other tensors its constants."""
    constants = {name: v for name, v in given.items() if isinstance(v, Tensor) and name != first}
    options = {name: v for name, v in given.items() if not isinstance(v, Tensor)}
    call = getattr(ops, op)

    # A program's constants come before its image.
    def traced(*values: Tensor) -> list[Tensor]:
        named = dict(zip((*constants, first), values, strict=True))
        return list(tensors_of(call(**named, **options)))

    graph = make_fx(traced, tracing_mode="fake")(*constants.values(), given[first]).graph
    *rest, image = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(iter(reversed(graph.nodes)))
    program = Program(
        graph, dict(zip(rest, constants.values(), strict=True)), dict(zip(rest, constants, strict=True)), image, None
    )
    program.set_outputs({str(i): node for i, node in enumerate(output.args[0])})
    return program


def _fused(
    op: str,
    first: str,
    given: Mapping[str, Any],
    flops: int,
    device: str,
    on_cpu: Callable[[], Any] | None = None,
) -> Case:
    """An op of :mod:`bcos_rt.kernels.ops`.

    Args:
        first: the argument that an engine's graph computes; the others may be its constants.
        given: arguments by name.
        on_cpu: our kernel there; the native backend's step for the op if None.
    """
    given = {name: value for name, value in given.items() if value is not None}
    module = reference if hasattr(reference, op) else reference_layers
    definition = getattr(module, op)
    program = _program(op, first, given)
    lowered = aten_module(lower_to_aten(program))
    lead = given[first]

    def expected() -> Results:
        return tensors_of(definition(**{name: _wide(value) for name, value in given.items()}))

    run: Run
    if device == "cuda":
        call = getattr(ops, op)

        def run() -> Results:
            with ops.use_backend("triton"):
                return tensors_of(call(**given))

    elif on_cpu is not None:
        kernel = on_cpu

        def run() -> Results:
            return tensors_of(kernel())

    else:
        # As the engine runs it, images all together.
        (step,) = native.build([program], chunk=lead.shape[0])

        def run() -> Results:
            return tuple(step(lead, None).values())

    inputs = tuple(value for value in given.values() if isinstance(value, Tensor))
    return Case(inputs, run, lambda: lowered(lead), expected, flops)


def _conv2d_fused(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    x, filters = make.normal(*layer.input_shape), layer.output_shape[1]
    residual = make.normal(*layer.output_shape) if variant == RESIDUAL else None
    given = {
        "x": x, "weight": make.weight(layer), "squares": make.squares(x), "scale": make.vector(filters, 1, 0.3),
        "shift": make.vector(filters, 0, 0.1), "residual": residual, **_window(layer), "groups": layer.groups,
        "activation": "relu", "want_multiplier": variant != PREDICT, "want_gate": variant == RESIDUAL,
        "want_squares": True,
    }  # fmt: skip
    return _fused("conv2d_fused", "x", given, layer.flops, device)


def _conv2d_transposed(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    given = {
        "grad": make.normal(*layer.output_shape), "weight": make.weight(layer), "input_size": layer.input_shape[2:],
        **_window(layer), "groups": layer.groups, "multiplier": make.normal(*layer.input_shape),
        "identity": make.normal(*layer.input_shape) if variant == RESIDUAL else None,
    }  # fmt: skip
    return _fused("conv2d_transposed", "grad", given, layer.flops, device)


def _depthwise_fused(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    x, channels = make.normal(*layer.input_shape), layer.input_shape[1]
    weight, scale = make.weight(layer), make.vector(channels, 1, 0.3)
    shift, explain = make.vector(channels, 0, 0.1), variant != PREDICT
    given = {
        "x": x, "weight": weight, "scale": scale, "shift": shift, **_window(layer), "groups": channels,
        "activation": "relu6", "want_multiplier": explain, "want_squares": True,
    }  # fmt: skip
    packed = cpu.pack_depthwise(weight)

    def kernel() -> Any:
        return cpu.depthwise_fused(
            x, packed, layer.kernel, None, scale, shift, None, layer.stride, layer.padding, layer.dilation, 2.0,
            CONV_EPS, "relu6", explain, False, True,
        )  # fmt: skip

    values = math.prod(layer.output_shape)
    flops = values * (4 * math.prod(layer.kernel) + 9 + 2 + explain)
    return _fused("conv2d_fused", "x", given, flops, device, kernel)


def _depthwise_transposed(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    grad, weight = make.normal(*layer.output_shape), make.weight(layer)
    multiplier, size = make.normal(*layer.input_shape), layer.input_shape[2:]
    given = {
        "grad": grad, "weight": weight, "input_size": size, **_window(layer), "groups": layer.input_shape[1],
        "multiplier": multiplier,
    }  # fmt: skip
    packed = cpu.pack_depthwise(weight)

    def kernel() -> Any:
        return cpu.depthwise_transposed(
            grad, packed, layer.kernel, size, layer.stride, layer.padding, layer.dilation, multiplier
        )

    flops = 2 * grad.numel() * math.prod(layer.kernel) + multiplier.numel()
    return _fused("conv2d_transposed", "grad", given, flops, device, kernel)


def _conv2d_contributions(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    given = {
        "grad": make.normal(*layer.output_shape), "weight": make.weight(layer),
        "image": torch.rand((layer.input_shape[0], 3, *layer.input_shape[2:]), device=device),
        "inverse_std": make.vector(6, 4, 0.1), **_window(layer), "want_weights": True,
    }  # fmt: skip
    return _fused("conv2d_contributions", "image", given, layer.flops, device)


def _linear_fused(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    x = make.normal(*layer.input_shape)
    given = {
        "x": x, "weight": make.weight(layer), "squares": x.float().square().sum(-1, keepdim=True),
        "want_multiplier": variant != PREDICT, "want_squares": True,
    }  # fmt: skip
    return _fused("linear_fused", "x", given, layer.flops, device)


def _linear_transposed(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    given = {
        "grad": make.normal(*layer.output_shape), "weight": make.weight(layer),
        "multiplier": make.normal(*layer.input_shape),
    }  # fmt: skip
    return _fused("linear_transposed", "grad", given, layer.flops, device)


def _pool(name: str, end_flops: int, layer: Layer, dtype: torch.dtype, device: str) -> Case:
    """A pool with its map of squares: an operation a place of the window, and ``end_flops`` a result."""
    make = _Operands(dtype, device)
    given = {
        "x": make.normal(*layer.input_shape), "kernel_size": layer.kernel, "stride": layer.stride,
        "padding": layer.padding, "want_squares": True,
    }  # fmt: skip
    flops = math.prod(layer.output_shape) * (math.prod(layer.kernel) + end_flops)
    return _fused(name, "x", given, flops, device)


def _max_pool2d(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    # Without the index: between the CPU engine's own steps it has another form than the op's.
    return _pool("max_pool2d", 2, layer, dtype, device)


def _avg_pool2d(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    return _pool("avg_pool2d", 3, layer, dtype, device)


def _avg_pool2d_transposed(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    multiplier = make.normal(*layer.input_shape)
    given = {
        "grad": make.normal(*layer.output_shape), "input_size": layer.input_shape[2:], "kernel_size": layer.kernel,
        "stride": layer.stride, "padding": layer.padding, "multiplier": multiplier,
    }  # fmt: skip
    flops = math.prod(layer.output_shape) * math.prod(layer.kernel) + multiplier.numel()
    return _fused("avg_pool2d_transposed", "grad", given, flops, device)


def _square_sum(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    x = _Operands(dtype, device).normal(*layer.input_shape)
    return _fused("square_sum", "x", {"x": x}, 2 * x.numel(), device, lambda: cpu.square_sum(x))


def _scale_act(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    x, channels = make.normal(*layer.input_shape), layer.input_shape[1]
    scale, shift = make.vector(channels, 1, 0.3), make.vector(channels, 0, 0.1)
    given = {"x": x, "scale": scale, "shift": shift, "activation": "relu", "want_squares": True}
    return _fused("scale_act", "x", given, 5 * x.numel(), device, lambda: cpu.scale_act(x, scale, shift, "relu", True))


def _scale_act_transposed(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    x, grad, identity = (make.normal(*layer.input_shape) for _ in range(3))
    scale, shift = (make.vector(layer.input_shape[1], *of) for of in ((1, 0.3), (0, 0.1)))
    given = {"grad": grad, "x": x, "scale": scale, "shift": shift, "activation": "relu", "identity": identity}
    return _fused(
        "scale_act_transposed", "grad", given, 5 * x.numel(), device,
        lambda: cpu.scale_act_transposed(grad, x, scale, shift, "relu", identity),
    )  # fmt: skip


def _encode_image(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    picture = make.picture(layer)
    if variant == "uint8":
        picture = (picture * 255).round().to(torch.uint8)
    mean, std = make.vector(6, 0.45, 0.02), make.vector(6, 0.25, 0.01)
    given = {"image": picture, "mean": mean, "std": std, "six_channels": True, "dtype": dtype}
    pixels = picture.numel() // 3
    case = _fused(
        "encode_image", "image", given, 27 * pixels, device,
        lambda: cpu.encode_image(picture, mean, std, True, dtype, 6),
    )  # fmt: skip
    if device == "cuda":
        return case

    def expected() -> Results:
        # The CPU engine leaves the two channels of padding out.
        encoded, squares = reference_layers.encode_image(picture, mean.double(), std.double(), True, torch.float64)
        return encoded[:, :6], squares

    return Case(case.inputs, case.run, case.plain, expected, case.flops)


# --- steps of the CPU engine -----------------------------------------------------------------------------------------


def _on_cpu(
    inputs: Sequence[Tensor | None],
    run: Callable[[], Any],
    function: Callable[..., Any],
    flops: int,
) -> Case:
    """A C++ kernel that is no op by itself.

    Args:
        inputs: the arguments of ``function``, what it does in PyTorch at the precision of its arguments.
    """
    given = tuple(inputs)
    return Case(
        tuple(t for t in given if t is not None),
        lambda: tensors_of(run()),
        lambda: function(*given),
        lambda: tensors_of(function(*(_wide(t) for t in given))),
        flops,
    )


def _conv_epilogue(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    """``z`` ends near the shift and the residual after a few calls: the norms are ten times those of an input."""
    make = _Operands(dtype, device)
    filters, explain = layer.output_shape[1], variant != PREDICT
    z, squares = make.normal(*layer.output_shape), 100 * make.squares(make.normal(*layer.input_shape))
    scale, shift = make.vector(filters, 1, 0.3), make.vector(filters, 0, 0.1)
    residual = 0.3 * make.normal(*layer.output_shape) if variant == RESIDUAL else None
    wants = (explain, variant == RESIDUAL, True)

    def run() -> Any:
        return cpu.conv_epilogue(
            z, squares, layer.kernel, layer.stride, layer.padding, layer.dilation, CONV_EPS, scale, shift, residual,
            2.0, "relu", *wants,
        )  # fmt: skip

    def function(z: Tensor, squares: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Any:
        box = F.avg_pool2d(squares, layer.kernel, layer.stride, layer.padding) * math.prod(layer.kernel)
        factor = z.abs() / (box + CONV_EPS).sqrt() * scale[:, None, None]
        u = z * factor + shift[:, None, None]
        u = u if residual is None else u + residual
        y, on = u.relu().to(z.dtype), u > 0
        outs = [y]
        if wants[0]:
            outs.append((factor * on).to(z.dtype))
        if wants[1]:
            # Bytes instead of bits: packing takes PyTorch longer than all the rest. The tests compare the bits.
            outs.append(on)
        return (*outs, y.to(squares.dtype).square().sum(1, keepdim=True))

    values, pixels = z.numel(), z.numel() // filters
    flops = values * (5 + (residual is not None) + explain + 2) + pixels * (math.prod(layer.kernel) + 2)
    return _on_cpu((z, squares, scale, shift, residual), run, function, flops)


def _linear_epilogue(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    """The rows' norms are small, so that ``z |z| / n`` in place again and again stays what it is: ``|z| = n`` = 1."""
    make = _Operands(dtype, device)
    z = make.signs(*layer.output_shape)
    squares = torch.ones(layer.output_shape[0], 1)
    explain = variant != PREDICT

    def run() -> Any:
        return cpu.linear_epilogue(z, squares, LINEAR_EPS, want_multiplier=explain, want_squares=True)

    def function(z: Tensor, squares: Tensor) -> Any:
        factor = z.abs() / (squares.sqrt() + LINEAR_EPS)
        y = (z * factor).to(z.dtype)
        return (y, *([factor.to(z.dtype)] if explain else []), y.to(squares.dtype).square().sum(-1, keepdim=True))

    flops = z.numel() * (2 + explain + 2) + 2 * squares.numel()
    return _on_cpu((z, squares), run, function, flops)


def _transposed_epilogue(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    """The multiplier's values are 1 and -1 (1/2 and -1/2 with an identity): the gradient stays of its size."""
    make = _Operands(dtype, device)
    total, multiplier = make.normal(*layer.output_shape), make.signs(*layer.output_shape)
    residual = variant == RESIDUAL
    identity = make.normal(*layer.output_shape) if residual else None
    gate = make.mask(*layer.output_shape) if residual else None
    if residual:
        multiplier = multiplier / 2

    def function(total: Tensor, multiplier: Tensor, identity: Tensor | None, gate: Tensor | None) -> Any:
        if identity is None:
            return total * multiplier
        total = total + identity
        on = reference.unpack_mask(gate.permute(0, 2, 3, 1), total.shape[1]).permute(0, 3, 1, 2)  # type: ignore[union-attr]
        return total * multiplier, total * on

    return _on_cpu(
        (total, multiplier, identity, gate),
        lambda: cpu.transposed_epilogue(total, multiplier, identity, gate, residual),
        function,
        total.numel() * (3 if residual else 1),
    )


def _row_square_sum(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    x = _Operands(dtype, device).normal(*layer.input_shape)

    def function(x: Tensor) -> Tensor:
        return x.to(reference.norm_dtype(x)).square().sum(-1, keepdim=True)

    return _on_cpu((x,), lambda: cpu.row_square_sum(x), function, 2 * x.numel())


def _image_contributions(layer: Layer, variant: str, dtype: torch.dtype, device: str) -> Case:
    make = _Operands(dtype, device)
    grad = make.normal(layer.input_shape[0], 6, *layer.input_shape[2:])
    picture, inverse = make.picture(layer), make.vector(6, 4, 0.1)
    return _on_cpu(
        (grad, picture, inverse),
        lambda: cpu.image_contributions(grad, picture, inverse),
        reference.image_contributions,
        58 * picture.numel() // 3,
    )


# --- which ops on which layers ---------------------------------------------------------------------------------------

_Make = Callable[[Layer, str, torch.dtype, str], Case]
_FORWARD, _BACKWARD = (PREDICT, EXPLAIN), (EXPLAIN,)
# op -> its builder, the layers of a sweep it runs on, its variants.
_EVERYWHERE: dict[str, tuple[_Make, Callable[[Sweep], Sequence[Layer]], tuple[str, ...]]] = {
    "conv2d_fused": (_conv2d_fused, lambda s: (*s.stem, *s.convolutions), _FORWARD),
    "conv2d_transposed": (_conv2d_transposed, lambda s: s.convolutions, _BACKWARD),
    "conv2d_contributions": (_conv2d_contributions, lambda s: s.stem, _BACKWARD),
    "depthwise_fused": (_depthwise_fused, lambda s: s.depthwise, _FORWARD),
    "depthwise_transposed": (_depthwise_transposed, lambda s: s.depthwise, _BACKWARD),
    "linear_fused": (_linear_fused, lambda s: s.linears, _FORWARD),
    "linear_transposed": (_linear_transposed, lambda s: s.linears, _BACKWARD),
    "max_pool2d": (_max_pool2d, lambda s: s.max_pools, (PREDICT,)),
    "avg_pool2d": (_avg_pool2d, lambda s: s.avg_pools, (PREDICT,)),
    "avg_pool2d_transposed": (_avg_pool2d_transposed, lambda s: s.avg_pools, _BACKWARD),
    "square_sum": (_square_sum, lambda s: s.norms, (PREDICT,)),
    "scale_act": (_scale_act, lambda s: s.norms, (PREDICT,)),
    "scale_act_transposed": (_scale_act_transposed, lambda s: s.norms, (RESIDUAL,)),
    "encode_image": (_encode_image, lambda s: s.pictures, ("float32", "uint8")),
}
_CPU_ONLY: dict[str, tuple[_Make, Callable[[Sweep], Sequence[Layer]], tuple[str, ...]]] = {
    "conv_epilogue": (_conv_epilogue, lambda s: s.epilogues, (PREDICT, EXPLAIN, RESIDUAL)),
    "linear_epilogue": (_linear_epilogue, lambda s: s.linears, _FORWARD),
    "transposed_epilogue": (_transposed_epilogue, lambda s: outputs(s.epilogues), (EXPLAIN, RESIDUAL)),
    "row_square_sum": (_row_square_sum, lambda s: s.linears, (PREDICT,)),
    "image_contributions": (_image_contributions, lambda s: s.pictures, _BACKWARD),
}
CUDA_OPS = tuple(_EVERYWHERE)
CPU_OPS = (*_EVERYWHERE, *_CPU_ONLY)


def operations(device: str) -> tuple[str, ...]:
    """Names of the ops on a device, "cpu" or "cuda"."""
    return CUDA_OPS if device == "cuda" else CPU_OPS


def specs(sweep: Sweep, chosen: Sequence[str]) -> list[Spec]:
    """Every chosen op in every variant on its layers; shapes that several networks share once."""
    found: dict[tuple[str, str, str], Spec] = {}
    for op in chosen:
        make, layers, variants = (_EVERYWHERE | _CPU_ONLY)[op]
        for layer in layers(sweep):
            for variant in variants:
                spec = Spec(op, variant, layer, functools.partial(make, layer, variant))
                found.setdefault((op, variant, spec.shape), spec)
    return list(found.values())

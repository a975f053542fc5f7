"""The op table: for each ATen op of an explanation graph, the ONNX nodes that compute it.

An entry ``(builder, node, arguments)`` gets the graph node and its arguments by the schema's names (graph nodes and
plain numbers), emits ONNX nodes with :meth:`OnnxBuilder.op` and returns their result. Extend the table with::

    @bcos_rt.export.onnx_op(torch.ops.aten.my_op.default)
    def my_op(b, node, a):
        return b.op("MyOnnxOp", b[a["self"]])

Shapes are static but for the batch (and the number of classes); ``node.meta["val"].shape`` has them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

import bcos_rt.kernels.ops  # noqa: F401  (registers torch.ops.bcos_rt)
from bcos_rt.errors import UnsupportedOpError
from bcos_rt.export import fused

if TYPE_CHECKING:
    import onnx_ir as ir

    from bcos_rt.export.builder import OnnxBuilder

__all__ = ["ONNX_OPS", "OnnxOp", "emit", "onnx_op"]

aten = torch.ops.aten
bcos = torch.ops.bcos_rt
Arguments = Mapping[str, Any]
OnnxOp = Callable[["OnnxBuilder", Node, Arguments], Any]

ONNX_OPS: dict[Any, OnnxOp] = {}
INT64_MAX = (1 << 63) - 1
POWER_EPS = 1e-6  # the published 1e-6 inside a fractional power, bcos_rt.kernels.reference.POWER_EPS


def onnx_op(*targets: Any) -> Callable[[OnnxOp], OnnxOp]:
    """Register how one or more ops are written in ONNX (a later registration replaces an earlier one)."""

    def register(function: OnnxOp) -> OnnxOp:
        for target in targets:
            ONNX_OPS[target] = function
        return function

    return register


def arguments_of(node: Node) -> dict[str, Any]:
    """A node's arguments by name, defaults filled in (positions for targets without a schema)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def describe(node: Node) -> str:
    """Op and module, for messages."""
    from bcos_rt.graph.capture import module_of

    return f"{node.target} in {module_of(node)}"


def emit(b: OnnxBuilder, node: Node) -> None:
    """Emit one graph node through the table.

    Raises:
        UnsupportedOpError: the table has no entry for the op; op and module are named.
    """
    if node.target not in ONNX_OPS:
        raise UnsupportedOpError(
            f"{describe(node)}: this op has no ONNX form here. Add one with @bcos_rt.export.onnx_op({node.target})."
        )
    b.current = node
    result = ONNX_OPS[node.target](b, node, arguments_of(node))
    b.values[node] = tuple(result) if isinstance(result, tuple | list) else result
    b.current = None


# Helpers -----------------------------------------------------------------------------------------------------------


def _val(x: Any) -> Any:
    return x.meta["val"]


def _shape(x: Any) -> tuple[Any, ...]:
    return tuple(x.meta["val"].shape)


def _dtype(x: Any) -> torch.dtype:
    dtype: torch.dtype = x.meta["val"].dtype
    return dtype


def _pair(value: Any) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return values * 2 if len(values) == 1 else values


def _fail(node: Node, why: str) -> UnsupportedOpError:
    return UnsupportedOpError(f"{describe(node)}: {why}")


def _axes(b: OnnxBuilder, dims: Any, ndim: int) -> Any:
    given = [dims] if isinstance(dims, int) else list(dims or range(ndim))
    return b.ints(sorted(d % ndim for d in given))


# Elementwise -------------------------------------------------------------------------------------------------------


def _compute_dtype(node: Node, *operands: Any) -> torch.dtype:
    dtype = _dtype(node)
    if dtype != torch.bool:
        return dtype
    for operand in operands:
        if isinstance(operand, Node) and isinstance(_val(operand), Tensor):
            dtype = torch.promote_types(dtype, _dtype(operand))
    return dtype


def _binary(op_type: str, x: str = "self", y: str = "other") -> OnnxOp:
    def emit_binary(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
        dtype = _compute_dtype(node, a[x], a[y])
        left, right = b.operand(a[x], dtype), b.operand(a[y], dtype)
        alpha = a.get("alpha", 1)
        if alpha != 1:
            right = b.op("Mul", right, b.scalar(alpha, dtype))
        result: ir.Value = b.op(op_type, left, right)
        return result

    return emit_binary


for _target, _name in {
    aten.add.Tensor: "Add",
    aten.add.Scalar: "Add",
    aten.sub.Tensor: "Sub",
    aten.sub.Scalar: "Sub",
    aten.mul.Tensor: "Mul",
    aten.mul.Scalar: "Mul",
    aten.div.Tensor: "Div",
    aten.div.Scalar: "Div",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
    aten.gt.Scalar: "Greater",
    aten.gt.Tensor: "Greater",
    aten.ge.Scalar: "GreaterOrEqual",
    aten.ge.Tensor: "GreaterOrEqual",
    aten.lt.Scalar: "Less",
    aten.lt.Tensor: "Less",
    aten.le.Scalar: "LessOrEqual",
    aten.le.Tensor: "LessOrEqual",
    aten.eq.Scalar: "Equal",
    aten.eq.Tensor: "Equal",
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
}.items():
    onnx_op(_target)(_binary(_name))


@onnx_op(aten.ne.Scalar, aten.ne.Tensor)
def not_equal(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``a != b``."""
    result: ir.Value = b.op("Not", _binary("Equal")(b, node, a))
    return result


@onnx_op(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``other - alpha self``."""
    return _binary("Sub")(b, node, {"self": a["other"], "other": a["self"], "alpha": a["alpha"]})  # type: ignore[no-any-return]


@onnx_op(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
def pow_(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x^p``."""
    dtype = _dtype(node)
    result: ir.Value = b.op("Pow", b.operand(a["self"], dtype), b.operand(a["exponent"], dtype))
    return result


def _unary(op_type: str, **attributes: Any) -> OnnxOp:
    def emit_unary(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
        result: ir.Value = b.op(op_type, b[next(iter(a.values()))], **attributes)
        return result

    return emit_unary


for _target, _name in {
    aten.neg.default: "Neg",
    aten.abs.default: "Abs",
    aten.sign.default: "Sign",
    aten.exp.default: "Exp",
    aten.log.default: "Log",
    aten.erf.default: "Erf",
    aten.tanh.default: "Tanh",
    aten.sigmoid.default: "Sigmoid",
    aten.relu.default: "Relu",
    aten.softplus.default: "Softplus",
    aten.logical_not.default: "Not",
    aten.floor.default: "Floor",
}.items():
    onnx_op(_target)(_unary(_name))
onnx_op(aten.hardsigmoid.default)(_unary("HardSigmoid", alpha=1 / 6, beta=0.5))


@onnx_op(aten.sqrt.default)
def sqrt(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Square root, in fp32."""
    return b.settled(b.op("Sqrt", b.widened(b[a["self"]])))


@onnx_op(aten.rsqrt.default)
def rsqrt(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``1 / sqrt(x)``, in fp32."""
    return b.settled(b.op("Reciprocal", b.op("Sqrt", b.widened(b[a["self"]]))))


@onnx_op(aten.reciprocal.default)
def reciprocal(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``1 / x``, in fp32."""
    return b.settled(b.op("Reciprocal", b.widened(b[a["self"]])))


def _clip(b: OnnxBuilder, x: Node, low: Any, high: Any) -> ir.Value:
    # A lower limit above 0 keeps a divisor from 0.
    ends = [None if v is None or math.isinf(v) else b.scalar(v, _dtype(x), positive=v is low) for v in (low, high)]
    result: ir.Value = b.op("Clip", b[x], *ends)
    return result


@onnx_op(aten.clamp.default, aten.hardtanh.default, aten.clamp_min.default, aten.clamp_max.default, aten.relu6.default)
def clamp(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``min(max(x, low), high)``."""
    if node.target is aten.relu6.default:
        return _clip(b, a["self"], 0.0, 6.0)
    low = a.get("min", a.get("min_val"))
    high = a.get("max", a.get("max_val"))
    return _clip(b, a["self"], low, high)


@onnx_op(aten.leaky_relu.default)
def leaky_relu(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x`` or ``slope x``."""
    result: ir.Value = b.op("LeakyRelu", b[a["self"]], alpha=float(a["negative_slope"]))
    return result


@onnx_op(aten.elu.default)
def elu(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """ELU (and SELU: its ``scale``)."""
    if a["input_scale"] != 1:
        raise _fail(node, "input_scale other than 1")
    result: ir.Value = b.op("Elu", b[a["self"]], alpha=float(a["alpha"]))
    if a["scale"] != 1:
        # scale (x for x > 0, alpha (e^x - 1) below), as one product
        result = b.op("Mul", result, b.scalar(a["scale"]))
    return result


@onnx_op(aten.prelu.default)
def prelu(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x`` or ``w_c x``."""
    ndim = _val(a["self"]).ndim
    slope = b.op("Reshape", b[a["weight"]], b.ints([-1] + [1] * (ndim - 2)))
    result: ir.Value = b.op("PRelu", b[a["self"]], slope)
    return result


@onnx_op(aten.gelu.default)
def gelu(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x Phi(x)``, written as the adjoint writes its gate, so that the two share their nodes."""
    x = b[a["self"]]
    if a["approximate"] == "tanh":
        cube = b.op("Mul", b.op("Mul", x, x), x)
        inner = b.op("Add", x, b.op("Mul", cube, b.scalar(0.044715)))
        phi = b.op("Tanh", b.op("Mul", inner, b.scalar(math.sqrt(2 / math.pi))))
    else:
        phi = b.op("Erf", b.op("Mul", x, b.scalar(1 / math.sqrt(2))))
    gate = b.op("Add", b.op("Mul", phi, b.scalar(0.5)), b.scalar(0.5))
    result: ir.Value = b.op("Mul", x, gate)
    return result


@onnx_op(aten.silu.default)
def silu(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x sigmoid(x)``."""
    x = b[a["self"]]
    result: ir.Value = b.op("Mul", x, b.op("Sigmoid", x))
    return result


@onnx_op(aten.hardswish.default)
def hardswish(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x clamp(x + 3, 0, 6) / 6``."""
    result: ir.Value = b.op("HardSwish", b[a["self"]])
    return result


@onnx_op(aten.mish.default)
def mish(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x tanh(softplus(x))``."""
    x = b[a["self"]]
    result: ir.Value = b.op("Mul", x, b.op("Tanh", b.op("Softplus", x)))
    return result


@onnx_op(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``self`` where the condition holds, else ``other``."""
    dtype = _dtype(node)
    result: ir.Value = b.op("Where", b[a["condition"]], b.operand(a["self"], dtype), b.operand(a["other"], dtype))
    return result


@onnx_op(aten.masked_fill.Scalar)
def masked_fill(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """A number where the mask holds."""
    result: ir.Value = b.op("Where", b[a["mask"]], b.scalar(a["value"], _dtype(node)), b[a["self"]])
    return result


@onnx_op(
    aten.clone.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.feature_dropout.default,
)
def identity(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """The same tensor (dropout: in evaluation mode)."""
    if a.get("train"):
        raise _fail(node, "dropout is active; export in evaluation mode")
    return b[next(iter(a.values()))]


@onnx_op(aten._to_copy.default, aten.to.dtype)
def to_dtype(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """A cast."""
    x = b[a["self"]]
    if _dtype(node).is_floating_point and _dtype(a["self"]).is_floating_point:
        return x
    result: ir.Value = b.op("Cast", x, to=int(b.data_type(_dtype(node))))
    return result


@onnx_op(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
def filled(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """A tensor of one number."""
    number = a.get("fill_value", 1 if node.target is aten.ones_like.default else 0)
    result: ir.Value = b.op("Expand", b.scalar(number, _dtype(node)), b.op("Shape", b[a["self"]]))
    return result


# Linear layers -----------------------------------------------------------------------------------------------------


def _same_padding(node: Node, padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """ONNX pads (begins, then ends)."""
    if not isinstance(padding, str):
        return _pair(padding) * 2
    total = [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    before = [t // 2 for t in total]
    return before + [t - p for t, p in zip(total, before, strict=True)]


@onnx_op(aten.conv2d.default, aten.conv2d.padding)
def conv2d(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Conv``."""
    kernel, dilation = list(_shape(a["weight"])[2:]), _pair(a["dilation"])
    result: ir.Value = b.op(
        "Conv",
        b[a["input"]],
        b[a["weight"]],
        *([b[a["bias"]]] if a["bias"] is not None else []),
        kernel_shape=kernel,
        strides=_pair(a["stride"]),
        pads=_same_padding(node, a["padding"], kernel, dilation),
        dilations=dilation,
        group=a["groups"],
    )
    return result


def flipped_weight(b: OnnxBuilder, weight: ir.Value, shape: Sequence[int], groups: int) -> ir.Value:
    """[O, I/g, kh, kw] -> [I, O/g, kh, kw], kernel flipped: the ``Conv`` that is the stride-1 transposed convolution.

    Written as nodes on the stored weight, so that each weight is in the file once; runtimes fold them when they load.
    """
    key = ("flipped", weight, groups)
    if key in b.cache:
        return b.cache[key]
    out, per_group, kh, kw = (int(s) for s in shape)
    if groups == 1:
        turned = b.op("Transpose", weight, perm=[1, 0, 2, 3])
    elif out == groups and per_group == 1:
        turned = weight
    else:
        split = b.op("Reshape", weight, b.ints([groups, out // groups, per_group, kh, kw]))
        swapped = b.op("Transpose", split, perm=[0, 2, 1, 3, 4])
        turned = b.op("Reshape", swapped, b.ints([groups * per_group, out // groups, kh, kw]))
    if (kh, kw) != (1, 1):
        far = b.ints([-INT64_MAX - 1, -INT64_MAX - 1])
        turned = b.op("Slice", turned, b.ints([-1, -1]), far, b.ints([2, 3]), b.ints([-1, -1]))
    b.cache[key] = turned
    return b.cache[key]


@onnx_op(aten.conv_transpose2d.input)
def conv_transpose2d(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Conv`` with the flipped kernel at stride 1, else ``ConvTranspose``.

    In onnxruntime (CPU) the forms that a compiler is given (bcos_rt.graph.lower_transposed) are no faster for strides:
    parities as channels take as long, zeros put between places longer.
    """
    weight, shape = a["weight"], _shape(a["weight"])
    kernel = [int(s) for s in shape[2:]]
    stride, padding, dilation = _pair(a["stride"]), _pair(a["padding"]), _pair(a["dilation"])
    extra = _pair(a["output_padding"])
    bias = [b[a["bias"]]] if a["bias"] is not None else []
    flipped = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    if stride == [1, 1] and extra == [0, 0] and min(flipped) >= 0:
        result: ir.Value = b.op(
            "Conv",
            b[a["input"]],
            flipped_weight(b, b[weight], shape, a["groups"]),
            *bias,
            kernel_shape=kernel,
            strides=[1, 1],
            pads=flipped * 2,
            dilations=dilation,
            group=a["groups"],
        )
        return result
    result = b.op(
        "ConvTranspose",
        b[a["input"]],
        b[weight],
        *bias,
        kernel_shape=kernel,
        strides=stride,
        pads=padding * 2,
        output_padding=extra,
        dilations=dilation,
        group=a["groups"],
    )
    return result


@onnx_op(aten.linear.default)
def linear(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x w^T + b``: ``Gemm`` for a matrix, else ``MatMul``."""
    x, weight = a["input"], b[a["weight"]]
    if _val(x).ndim == 2:
        result: ir.Value = b.op("Gemm", b[x], weight, *([b[a["bias"]]] if a["bias"] is not None else []), transB=1)
        return result
    result = b.op("MatMul", b[x], b.op("Transpose", weight, perm=[1, 0]))
    return result if a["bias"] is None else b.op("Add", result, b[a["bias"]])


@onnx_op(aten.addmm.default)
def addmm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``beta c + alpha x w``."""
    result: ir.Value = b.op(
        "Gemm", b[a["mat1"]], b[a["mat2"]], b[a["self"]], alpha=float(a["alpha"]), beta=float(a["beta"])
    )
    return result


@onnx_op(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``MatMul``."""
    left, right = list(a.values())[:2]
    result: ir.Value = b.op("MatMul", b[left], b[right])
    return result


# B-cos pieces ------------------------------------------------------------------------------------------------------


def _box_mean(
    b: OnnxBuilder,
    squares: Any,
    channels: int,
    kernel: list[int],
    stride: list[int],
    pad: list[int],
    dilation: list[int],
) -> Any:
    """Mean of each window, zeros outside counted, of a [N, channels, H, W] map in fp32."""
    if kernel == [1, 1] and stride == [1, 1] and pad == [0, 0]:
        return squares
    if dilation == [1, 1] and all(p < k for p, k in zip(pad, kernel, strict=True)):
        return b.op("AveragePool", squares, kernel_shape=kernel, strides=stride, pads=pad * 2, count_include_pad=1)
    ones = torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    window = b.tensor(ones, f"box_{channels}_{kernel[0]}_{kernel[1]}", wide=True)
    return b.op(
        "Conv", squares, window, kernel_shape=kernel, strides=stride, pads=pad * 2, dilations=dilation, group=channels
    )


def _patch_norm(b: OnnxBuilder, x: Node, geometry: Sequence[Any], groups: int, eps: float, averaged: bool) -> Any:
    """``n`` in the current precision: of patch sums, or (``averaged``) over the root of the kernel's area."""
    kernel, stride, pad, dilation = (_pair(g) for g in geometry)
    _, channels, height, width = _shape(x)
    area = 1 if averaged else kernel[0] * kernel[1]
    if groups == 1 and area == 1 and dilation == [1, 1] and all(p < k for p, k in zip(pad, kernel, strict=True)):
        return b.call("PatchNorm", b[x], kernel_shape=kernel, strides=stride, pads=pad * 2, epsilon=eps)
    wide = b.widened(b[x])
    if groups == 1:
        squares = b.op("ReduceSumSquare", wide, b.ints([1]), keepdims=1)
    elif groups == channels:
        squares = b.op("Mul", wide, wide)
    else:
        split = b.op("Reshape", wide, b.ints([-1, groups, channels // groups, height, width]))
        squares = b.op("ReduceSumSquare", split, b.ints([2]), keepdims=0)
    mean = _box_mean(b, squares, groups, kernel, stride, pad, dilation)
    if area != 1:
        mean = b.op("Mul", mean, b.scalar(area, wide=True))
    return b.settled(b.op("Sqrt", b.op("Add", mean, b.scalar(eps, wide=True))))


def _aligned(b: OnnxBuilder, n: ir.Value, groups: int, channels: int, dim: int) -> ir.Value:
    """A per-group norm repeated to the output channels."""
    if groups in (1, channels):
        return n
    index = [i * groups // channels for i in range(channels)]
    result: ir.Value = b.op("Gather", n, b.ints(index), axis=dim)
    return result


@onnx_op(bcos.patch_norm.default)
def patch_norm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``sqrt(box_sum(sum_c x_c^2) + eps)``."""
    geometry = (a["kernel_size"], a["stride"], a["padding"], a["dilation"])
    result: ir.Value = _patch_norm(b, a["x"], geometry, a["groups"], a["eps"], averaged=False)
    return result


@onnx_op(bcos.row_norm.default)
def row_norm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``||x|| + eps`` over the last dimension; fp16 has no 1e-12, so there its smallest number guards the division."""
    eps = max(a["eps"], 2.0**-24) if b.in_half() else a["eps"]
    result: ir.Value = b.call("RowNorm", b[a["x"]], epsilon=eps)
    return result


@onnx_op(bcos.dynamic_scale.default)
def dynamic_scale(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``(|z| / n)^(B-1)``; B other than 2: ``(|z| / n + 1e-6)^(B-1)``."""
    z, n, dim = a["z"], a["n"], a["channel_dim"]
    norm = _aligned(b, b[n], _shape(n)[dim], _shape(z)[dim], dim)
    if a["b"] == 2:
        result: ir.Value = b.call("DynamicScale", b[z], norm)
        return result
    result = b.call("DynamicScalePower", b[z], norm, b.scalar(POWER_EPS), exponent=float(a["b"] - 1))
    return result


@onnx_op(fused.bcos_conv2d)
def bcos_conv2d(b: OnnxBuilder, node: Node, a: Arguments) -> tuple[ir.Value, ir.Value]:
    """The function ``BcosConv`` and its relatives; grouped or dilated ones from their pieces."""
    arguments: tuple[Any, ...] = node.args
    x, weight, bias, *window, groups, exponent_b, eps, delta, relu = arguments
    stride, padding, dilation = (_pair(w) for w in window)
    kernel = [int(s) for s in _shape(weight)[2:]]
    simple = bias is None and groups == 1 and dilation == [1, 1]
    if simple and all(p < k for p, k in zip(padding, kernel, strict=True)) and not (relu and exponent_b != 2):
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": stride,
            "pads": padding * 2,
            "dilations": dilation,
            "group": 1,
            "epsilon": float(eps),
        }
        operands = [b[x], b[weight]]
        name = "BcosConvRelu" if relu else "BcosConv"
        if exponent_b != 2:
            name = "BcosConvPower"
            operands.append(b[delta])
            attributes["exponent"] = float(exponent_b - 1)
        pair: tuple[ir.Value, ir.Value] = b.call(name, *operands, outputs=2, **attributes)
        return pair
    z = b.op(
        "Conv",
        b[x],
        b[weight],
        *([b[bias]] if bias is not None else []),
        kernel_shape=kernel,
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=groups,
    )
    norm = _patch_norm(b, x, (kernel, stride, padding, dilation), groups, eps, averaged=True)
    norm = _aligned(b, norm, groups, _shape(weight)[0], 1)
    if relu:
        z = b.op("Relu", z)
        m = b.op("Div", z, norm)
    elif exponent_b == 2:
        m = b.call("DynamicScale", z, norm)
    else:
        m = b.call("DynamicScalePower", z, norm, b[delta], exponent=float(exponent_b - 1))
    return b.op("Mul", z, m), m


# Normalisation -----------------------------------------------------------------------------------------------------


@onnx_op(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm(b: OnnxBuilder, node: Node, a: Arguments) -> tuple[ir.Value]:
    """BatchNorm in evaluation mode; its other two results, saved statistics, are empty."""
    return (batch_norm(b, node, a),)


@onnx_op(aten.batch_norm.default)
def batch_norm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """BatchNorm in evaluation mode."""
    channels = _shape(a["input"])[1]
    weight = b[a["weight"]] if a["weight"] is not None else b.tensor(torch.ones(channels), f"ones_{channels}")
    bias = b[a["bias"]] if a["bias"] is not None else b.tensor(torch.zeros(channels), f"zeros_{channels}")
    result: ir.Value = b.op(
        "BatchNormalization",
        b[a["input"]],
        weight,
        bias,
        b[a["running_mean"]],
        b[a["running_var"]],
        epsilon=float(a["eps"]),
    )
    return result


@onnx_op(aten.layer_norm.default)
def layer_norm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """LayerNorm; its statistics in fp32."""
    shape = list(a["normalized_shape"])
    name = "_".join(map(str, shape))
    weight = b[a["weight"]] if a["weight"] is not None else b.tensor(torch.ones(shape), f"ones_{name}")
    bias = [b[a["bias"]]] if a["bias"] is not None else []
    # stash_type 1: mean and variance in fp32 whatever the input's type.
    result: ir.Value = b.op(
        "LayerNormalization", b[a["input"]], weight, *bias, axis=-len(shape), epsilon=float(a["eps"]), stash_type=1
    )
    return result


def _standardised(b: OnnxBuilder, x: Any, axes: ir.Value, eps: float) -> Any:
    centred = b.op("Sub", x, b.op("ReduceMean", x, axes, keepdims=1))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), axes, keepdims=1)
    return b.op("Div", centred, b.op("Sqrt", b.op("Add", variance, b.scalar(eps, wide=True))))


@onnx_op(aten.group_norm.default)
def group_norm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """GroupNorm; its statistics in fp32."""
    x, groups = a["input"], a["num_groups"]
    shape = _shape(x)
    per_group = math.prod(int(s) for s in shape[1:]) // groups
    grouped = b.op("Reshape", b.widened(b[x]), b.ints([-1, groups, per_group]))
    result = b.reshape(b.settled(_standardised(b, grouped, b.ints([2]), a["eps"])), shape)
    view = b.ints([-1] + [1] * (len(shape) - 2))
    if a["weight"] is not None:
        result = b.op("Mul", result, b.op("Reshape", b[a["weight"]], view))
    if a["bias"] is not None:
        result = b.op("Add", result, b.op("Reshape", b[a["bias"]], view))
    return result


@onnx_op(aten.rms_norm.default)
def rms_norm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """RMSNorm; its root mean square in fp32."""
    x = b.widened(b[a["input"]])
    eps = a["eps"] if a["eps"] is not None else torch.finfo(_dtype(a["input"])).eps
    axes = b.ints([-i for i in range(len(a["normalized_shape"]), 0, -1)])
    square = b.op("ReduceMean", b.op("Mul", x, x), axes, keepdims=1)
    root = b.op("Sqrt", b.op("Add", square, b.scalar(eps, wide=True)))
    result = b.settled(b.op("Div", x, root))
    return result if a["weight"] is None else b.op("Mul", result, b[a["weight"]])


@onnx_op(aten.var.correction)
def var(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Variance about the mean, in fp32."""
    x = a["self"]
    shape = _shape(x)
    dims = [d % len(shape) for d in (a["dim"] or range(len(shape)))]
    axes = b.ints(sorted(dims))
    wide = b.widened(b[x])
    centred = b.op("Sub", wide, b.op("ReduceMean", wide, axes, keepdims=1))
    result = b.op("ReduceMean", b.op("Mul", centred, centred), axes, keepdims=int(a["keepdim"]))
    correction = 1 if a["correction"] is None else a["correction"]
    if correction:
        count = math.prod(int(shape[d]) for d in dims)
        result = b.op("Mul", result, b.scalar(count / (count - correction), wide=True))
    return b.settled(result)


@onnx_op(aten.softmax.int, aten._softmax.default)
def softmax(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Softmax along one dimension, in fp32."""
    return b.settled(b.op("Softmax", b.widened(b[a["self"]]), axis=a["dim"]))


# Reductions --------------------------------------------------------------------------------------------------------


def _reduction(op_type: str, node: Node, b: OnnxBuilder, a: Arguments) -> ir.Value:
    axes = _axes(b, a["dim"], _val(a["self"]).ndim)
    return b.settled(b.op(op_type, b.widened(b[a["self"]]), axes, keepdims=int(a["keepdim"])))


@onnx_op(aten.sum.dim_IntList)
def sum_(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Sum, in fp32."""
    return _reduction("ReduceSum", node, b, a)


@onnx_op(aten.mean.dim)
def mean(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Mean, in fp32; over all positions of an image it is a pooling."""
    x = a["self"]
    dims = sorted(d % _val(x).ndim for d in (a["dim"] or []))
    if dims == [2, 3] and _val(x).ndim == 4 and a["keepdim"]:
        result: ir.Value = b.op("GlobalAveragePool", b[x])
        return result
    return _reduction("ReduceMean", node, b, a)


@onnx_op(aten.amax.default)
def amax(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Largest value."""
    axes = _axes(b, a["dim"], _val(a["self"]).ndim)
    result: ir.Value = b.op("ReduceMax", b[a["self"]], axes, keepdims=int(a["keepdim"]))
    return result


@onnx_op(aten.linalg_vector_norm.default)
def vector_norm(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Euclidean norm, in fp32."""
    if a["ord"] != 2:
        raise _fail(node, f"a norm of order {a['ord']}")
    return _reduction("ReduceL2", node, b, a)


@onnx_op(aten.argmax.default)
def argmax(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Index of the largest value, the first of equals."""
    if a["dim"] is None:
        raise _fail(node, "argmax over all dimensions")
    result: ir.Value = b.op("ArgMax", b[a["self"]], axis=a["dim"], keepdims=int(a["keepdim"]))
    return result


# Pooling -----------------------------------------------------------------------------------------------------------


def _windows(size: int, out: int, kernel: int, stride: int, pad: int, count_pad: bool, divisor: int | None) -> Tensor:
    """[out, size]: the matrix of one dimension of an average pool (its divisor is a product over both dimensions).

    With ``divisor`` the matrix sums, and the caller divides.
    """
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        start = i * stride - pad
        stop = min(start + kernel, size + pad)
        counted = stop - start
        start, stop = max(start, 0), min(stop, size)
        share = 1.0 if divisor is not None else 1 / (counted if count_pad else stop - start)
        matrix[i, start:stop] = share
    return matrix


def _pool_matrices(node: Node, a: Arguments, size: Sequence[int], out: Sequence[int]) -> tuple[Tensor, Tensor]:
    kernel, stride, pad = _pool_window(a)
    divisor = a["divisor_override"]
    rows, columns = (
        _windows(size[i], out[i], kernel[i], stride[i], pad[i], a["count_include_pad"], divisor) for i in range(2)
    )
    return (rows / divisor if divisor is not None else rows), columns


def _pool_window(a: Arguments) -> tuple[list[int], list[int], list[int]]:
    kernel = _pair(a["kernel_size"])
    return kernel, _pair(a["stride"] or kernel), _pair(a["padding"])


def _out_size(size: int, kernel: int, stride: int, pad: int) -> int:
    return (size + 2 * pad - kernel) // stride + 1


def _two_sided(b: OnnxBuilder, x: ir.Value, rows: Tensor, columns: Tensor, name: str) -> ir.Value:
    """``R x C^T`` with constant matrices [H', H] and [W', W]."""
    left = b.op("MatMul", b.tensor(rows, f"{name}/rows"), x)
    result: ir.Value = b.op("MatMul", left, b.tensor(columns.t(), f"{name}/columns"))
    return result


@onnx_op(aten.avg_pool2d.default)
def avg_pool2d(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``AveragePool``; a rounded-up size or another divisor as a product with constant matrices."""
    x = a["self"]
    kernel, stride, pad = _pool_window(a)
    size, out = [int(s) for s in _shape(x)[2:]], [int(s) for s in _shape(node)[2:]]
    plain = [_out_size(size[i], kernel[i], stride[i], pad[i]) for i in range(2)] == out
    if not plain or a["divisor_override"] is not None:
        return _two_sided(b, b[x], *_pool_matrices(node, a, size, out), name=node.name)
    result: ir.Value = b.op(
        "AveragePool",
        b[x],
        kernel_shape=kernel,
        strides=stride,
        pads=pad * 2,
        count_include_pad=int(a["count_include_pad"]),
    )
    return result


@onnx_op(aten.avg_pool2d_backward.default)
def avg_pool2d_backward(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``R^T grad C`` with the pool's constant matrices."""
    grad = a["grad_output"]
    size, out = [int(s) for s in _shape(node)[2:]], [int(s) for s in _shape(grad)[2:]]
    rows, columns = _pool_matrices(node, a, size, out)
    return _two_sided(b, b[grad], rows.t(), columns.t(), name=node.name)


def _adaptive_matrix(size: int, out: int) -> Tensor:
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        start, stop = i * size // out, -((-(i + 1) * size) // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


@onnx_op(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """A global or ordinary pool where the windows are equal, else a product with constant matrices."""
    x = a["self"]
    size, out = [int(s) for s in _shape(x)[-2:]], [int(s) for s in _shape(node)[-2:]]
    if out == size:
        return b[x]
    if _val(x).ndim == 4 and out == [1, 1]:
        result: ir.Value = b.op("GlobalAveragePool", b[x])
        return result
    if _val(x).ndim == 4 and all(s % o == 0 for s, o in zip(size, out, strict=True)):
        kernel = [s // o for s, o in zip(size, out, strict=True)]
        result = b.op("AveragePool", b[x], kernel_shape=kernel, strides=kernel)
        return result
    name = f"adaptive_{size[0]}_{size[1]}_{out[0]}_{out[1]}"
    return _two_sided(b, b[x], _adaptive_matrix(size[0], out[0]), _adaptive_matrix(size[1], out[1]), name)


def _max_pool(b: OnnxBuilder, node: Node, a: Arguments, indices: bool) -> Any:
    kernel, stride, pad = _pool_window(a)
    return b.op(
        "MaxPool",
        b[a["self"]],
        outputs=2 if indices else 1,
        kernel_shape=kernel,
        strides=stride,
        pads=pad * 2,
        dilations=_pair(a["dilation"]),
        ceil_mode=int(a["ceil_mode"]),
    )


@onnx_op(aten.max_pool2d.default)
def max_pool2d(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``MaxPool``."""
    result: ir.Value = _max_pool(b, node, a, indices=False)
    return result


@onnx_op(aten.max_pool2d_with_indices.default)
def max_pool2d_with_indices(b: OnnxBuilder, node: Node, a: Arguments) -> tuple[ir.Value, ir.Value]:
    """``MaxPool``; ONNX counts indices through the whole batch, PyTorch within each channel's plane."""
    pooled, flat = _max_pool(b, node, a, indices=True)
    plane = math.prod(int(s) for s in _shape(a["self"])[2:])
    return pooled, b.op("Mod", flat, b.int_scalar(plane))


@onnx_op(aten.max_pool2d_with_indices_backward.default)
def max_pool2d_backward(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Each adjoint added where its window's largest element stood."""
    grad, indices = a["grad_output"], a["indices"]
    shape = _shape(node)
    channels, plane = int(shape[1]), int(shape[2]) * int(shape[3])
    count = math.prod(int(s) for s in _shape(grad)[2:])
    # In fp32: windows overlap, so numbers are summed, and onnxruntime sums no fp16 here.
    flat = b.op("Reshape", b.widened(b[grad]), b.ints([-1, channels, count]))
    where_to = b.op("Reshape", b[indices], b.ints([-1, channels, count]))
    size = b.op("Concat", b.size(b[grad], 0), b.ints([channels, plane]), axis=0)
    zeros = b.op("Expand", b.scalar(0.0, wide=True), size)
    added = b.op("ScatterElements", zeros, where_to, flat, axis=2, reduction="add")
    return b.settled(b.reshape(added, shape))


# Shapes ------------------------------------------------------------------------------------------------------------


@onnx_op(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
)
def reshape(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """The same numbers in another shape."""
    wanted = a.get("size", a.get("shape"))
    return b.reshape(b[next(iter(a.values()))], _shape(node), wanted if isinstance(wanted, Sequence) else ())


@onnx_op(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Drop dimensions of size 1 (an axis of another size is left alone, as in PyTorch)."""
    shape = _shape(a["self"])
    dims = a.get("dim", list(range(len(shape))))
    axes = [d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)]
    axes = [d for d in axes if shape[d] == 1]
    if not axes:
        return b[a["self"]]
    result: ir.Value = b.op("Squeeze", b[a["self"]], b.ints(axes))
    return result


@onnx_op(aten.unsqueeze.default)
def unsqueeze(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """A new dimension of size 1."""
    result: ir.Value = b.op("Unsqueeze", b[a["self"]], b.ints([a["dim"] % _val(node).ndim]))
    return result


@onnx_op(aten.permute.default)
def permute(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Transpose``."""
    ndim = _val(node).ndim
    result: ir.Value = b.op("Transpose", b[a["self"]], perm=[d % ndim for d in a["dims"]])
    return result


@onnx_op(aten.transpose.int)
def transpose(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Two dimensions swapped."""
    order = list(range(_val(node).ndim))
    i, j = a["dim0"] % len(order), a["dim1"] % len(order)
    order[i], order[j] = order[j], order[i]
    result: ir.Value = b.op("Transpose", b[a["self"]], perm=order)
    return result


@onnx_op(aten.t.default)
def t(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """A matrix's transpose."""
    if _val(node).ndim < 2:
        return b[a["self"]]
    result: ir.Value = b.op("Transpose", b[a["self"]], perm=[1, 0])
    return result


@onnx_op(aten.expand.default)
def expand(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Expand``; a size that does not change is asked for as 1."""
    x = a["self"]
    given, wanted = _shape(x), list(a["size"])
    given = (1,) * (len(wanted) - len(given)) + given
    sizes: list[Any] = []
    for have, want, final in zip(given, wanted, _shape(node), strict=True):
        if isinstance(final, int):
            sizes.append(final)
        else:
            sizes.append(want if isinstance(have, int) and isinstance(want, Node) else 1)
    result: ir.Value = b.op("Expand", b[x], b.sizes(sizes))
    return result


@onnx_op(aten.expand_as.default)
def expand_as(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Expand`` to another tensor's shape."""
    result: ir.Value = b.op("Expand", b[a["self"]], b.op("Shape", b[a["other"]]))
    return result


@onnx_op(aten.slice.Tensor)
def slice_(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x[start:end:step]`` along one dimension."""
    start = 0 if a["start"] is None else a["start"]
    end = INT64_MAX if a["end"] is None else a["end"]
    if not isinstance(start, int) or not isinstance(end, int):
        raise _fail(node, "a slice whose ends depend on the batch")
    dim = a["dim"] % _val(node).ndim
    result: ir.Value = b.op(
        "Slice", b[a["self"]], b.ints([start]), b.ints([end]), b.ints([dim]), b.ints([int(a["step"])])
    )
    return result


@onnx_op(aten.select.int)
def select(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """One index of a dimension."""
    ndim = _val(a["self"]).ndim
    result: ir.Value = b.op("Gather", b[a["self"]], b.int_scalar(int(a["index"])), axis=a["dim"] % ndim)
    return result


@onnx_op(aten.cat.default)
def cat(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Concat``."""
    dtype = _dtype(node)
    result: ir.Value = b.op("Concat", *(b.operand(x, dtype) for x in a["tensors"]), axis=a["dim"] % _val(node).ndim)
    return result


@onnx_op(aten.stack.default)
def stack(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Concat`` along a new dimension."""
    dim = a["dim"] % _val(node).ndim
    result: ir.Value = b.op("Concat", *(b.op("Unsqueeze", b[x], b.ints([dim])) for x in a["tensors"]), axis=dim)
    return result


@onnx_op(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(b: OnnxBuilder, node: Node, a: Arguments) -> tuple[ir.Value, ...]:
    """Parts along one dimension, each a ``Slice`` (``Gather`` for unbind)."""
    x = a["self"]
    dim = a["dim"] % _val(x).ndim
    if node.target is aten.unbind.int:
        return tuple(b.op("Gather", b[x], b.int_scalar(i), axis=dim) for i in range(len(_val(node))))
    parts, start = [], 0
    for part in _val(node):
        stop = start + int(part.shape[dim])
        parts.append(b.op("Slice", b[x], b.ints([start]), b.ints([stop]), b.ints([dim])))
        start = stop
    return tuple(parts)


@onnx_op(operator.getitem)
def getitem(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """One of several results."""
    values = b.raw(node.args[0])  # type: ignore[arg-type]
    index = node.args[1]
    if not isinstance(values, tuple) or not isinstance(index, int):
        raise _fail(node, "indexes something that is not a tuple of results")
    return values[index]


def _onnx_pads(pads: Sequence[int], ndim: int) -> tuple[list[int], list[int]]:
    """PyTorch's pads (last dimension first) as lists of begins and ends by dimension."""
    before, after = [0] * ndim, [0] * ndim
    for i in range(len(pads) // 2):
        before[ndim - 1 - i], after[ndim - 1 - i] = int(pads[2 * i]), int(pads[2 * i + 1])
    return before, after


@onnx_op(aten.constant_pad_nd.default, aten.pad.default)
def pad(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Pad``; negative pads cut."""
    x, mode = a["self"], a.get("mode", "constant")
    ndim = _val(x).ndim
    before, after = _onnx_pads(a["pad"], ndim)
    value = b[x]
    cut = [d for d in range(ndim) if before[d] < 0 or after[d] < 0]
    if cut:
        starts = [max(-before[d], 0) for d in cut]
        ends = [-max(-after[d], 0) or INT64_MAX for d in cut]
        value = b.op("Slice", value, b.ints(starts), b.ints(ends), b.ints(cut))
    pads = [max(p, 0) for p in before + after]
    if not any(pads):
        return value
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in names:
        raise _fail(node, f"padding mode {mode!r}")
    fill = [b.scalar(a.get("value") or 0, _dtype(node))] if mode == "constant" else []
    result: ir.Value = b.op("Pad", value, b.ints(pads), *fill, mode=names[mode])
    return result


@onnx_op(aten.reflection_pad2d_backward.default, aten.replication_pad2d_backward.default)
def pad_backward(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``P^T grad Q``: every border element adds to the pixel it mirrors or repeats."""
    size = [int(s) for s in _shape(node)[-2:]]
    left, right, top, bottom = (int(p) for p in a["padding"])
    mirror = node.target is aten.reflection_pad2d_backward.default

    def matrix(length: int, before: int, after: int) -> Tensor:
        result = torch.zeros(length + before + after, length, dtype=torch.float64)
        for i in range(length + before + after):
            source = i - before
            if mirror:
                source = abs(source) if source < length else 2 * (length - 1) - source
            result[i, min(max(source, 0), length - 1)] = 1.0
        return result

    rows, columns = matrix(size[0], top, bottom), matrix(size[1], left, right)
    return _two_sided(b, b[a["grad_output"]], rows.t(), columns.t(), node.name)


@onnx_op(aten.roll.default)
def roll(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Each dimension cut in two, and the pieces swapped."""
    x = a["self"]
    value = b[x]
    if len(a["dims"]) != len(a["shifts"]):
        raise _fail(node, "rolls the flattened tensor")
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        size = _shape(x)[dim]
        if not isinstance(size, int):
            raise _fail(node, "rolls the batch")
        cut = -shift % size
        if cut == 0:
            continue
        axis = b.ints([dim % len(_shape(x))])
        head = b.op("Slice", value, b.ints([0]), b.ints([cut]), axis)
        tail = b.op("Slice", value, b.ints([cut]), b.ints([INT64_MAX]), axis)
        value = b.op("Concat", tail, head, axis=dim % len(_shape(x)))
    return value


# Sizes and repetition ----------------------------------------------------------------------------------------------


@onnx_op(aten.sym_size.int)
def sym_size(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """One size, as a vector of length 1."""
    value = b.raw(a["self"])
    if isinstance(value, tuple):
        raise _fail(node, "the size of several results")
    return b.size(value, a["dim"] % _val(a["self"]).ndim)


def _size_arithmetic(op_type: str) -> OnnxOp:
    def emit_arithmetic(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
        left, right = (b.ints([v]) if isinstance(v, int) else b[v] for v in node.args)
        result: ir.Value = b.op(op_type, left, right)
        return result

    return emit_arithmetic


_SIZE_ARITHMETIC: dict[Any, str] = {
    operator.mul: "Mul",
    operator.add: "Add",
    operator.sub: "Sub",
    operator.floordiv: "Div",
}
for _function, _name in _SIZE_ARITHMETIC.items():
    onnx_op(_function)(_size_arithmetic(_name))


@onnx_op(aten.repeat_interleave.self_int)
def repeat_interleave(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """Each entry of a dimension ``repeats`` times: ``Gather`` with the index of each row's image."""
    x, repeats = a["self"], a["repeats"]
    if a["dim"] is None:
        raise _fail(node, "repeats the flattened tensor")
    dim = a["dim"] % _val(x).ndim
    size = _shape(x)[dim]
    key = ("repeat", repeats, str(size))
    if key not in b.cache:
        k = b.ints([repeats]) if isinstance(repeats, int) else b[repeats]
        count = b.ints([size]) if isinstance(size, int) else b.size(b[x], dim)
        rows = b.op("Squeeze", b.op("Mul", count, k), b.ints([0]))
        b.cache[key] = b.op("Div", b.op("Range", b.int_scalar(0), rows, b.int_scalar(1)), k)
    result: ir.Value = b.op("Gather", b[x], b.cache[key], axis=dim)
    return result


# Ops of the export passes ------------------------------------------------------------------------------------------


@onnx_op(fused.encode_image)
def encode_image(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``[x, 1 - x]``."""
    image = b[a["0"]]
    result: ir.Value = b.op("Concat", image, b.op("Sub", b.scalar(1.0), image), axis=1)
    return result


@onnx_op(fused.scale)
def scale(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``x`` times a number."""
    result: ir.Value = b.op("Mul", b[a["0"]], b.scalar(a["1"]))
    return result


@onnx_op(fused.class_channel)
def class_channel(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``GatherND`` of each row's channel."""
    taken = b.op("GatherND", b[a["0"]], b[a["1"]], batch_dims=1)
    result: ir.Value = b.op("Unsqueeze", taken, b.ints([1]))
    return result


@onnx_op(fused.class_row)
def class_row(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """``Gather`` of each row's weights."""
    result: ir.Value = b.op("Gather", b[a["0"]], b.op("Squeeze", b[a["1"]], b.ints([1])), axis=0)
    return result


@onnx_op(fused.colour_picture)
def colour_picture(b: OnnxBuilder, node: Node, a: Arguments) -> ir.Value:
    """The function ``ColourPicture``, for K classes on the rows of all images."""
    weights, contributions = a["0"], a["1"]
    shape = _shape(weights)
    channels, height, width = (int(s) for s in shape[-3:])
    pixels = height * width
    rank = 0.995 * (pixels - 1)
    lower = math.floor(rank)
    w, c = b[weights], b[contributions]
    if len(shape) == 5:
        w = b.op("Reshape", w, b.ints([-1, channels, height, width]))
        c = b.op("Reshape", c, b.ints([-1, height, width]))
    picture: ir.Value = b.call("ColourPicture", w, c, count=[pixels - lower], fraction=float(rank - lower))
    if len(shape) == 5:
        size = b.op("Concat", b.size(b[weights], 0), b.size(b[weights], 1), b.ints([height, width, 4]), axis=0)
        picture = b.op("Reshape", picture, size)
    return picture

"""Model-local functions of the domain ``ai.bcos``: B-cos pieces as single nodes with a body of standard ops.

They keep the graph readable and are a hook: a runtime without a kernel of that name uses the body.

``BcosConv``        y = z m, m = |z| / n of a B-cos convolution with B = 2, its norm averaged over the kernel's area
``BcosConvRelu``    the same followed by a ReLU, written so that the convolution and the ReLU fuse
``BcosConvPower``   any B: m = (|z| / n + delta)^(B-1), delta per channel
``PatchNorm``       n of every patch a convolution sees
``DynamicScale``    m = |z| / n
``DynamicScalePower``  m = (|z| / n + delta)^(B-1)
``RowNorm``         n of the last dimension
``ColourPicture``   the colour explanation [M, H, W, 4]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DOMAIN", "FUNCTION_NAMES", "make_functions"]

DOMAIN = "ai.bcos"

# Squares overflow fp16 above 256 and lose everything below 1e-4, so a norm is computed in fp32 whatever the type of x;
# in an fp32 file the casts do nothing and runtimes drop them.
_PATCH_NORM = """
  wide = Cast <to = 1> (X)
  channel_axis = Constant <value_ints = [1]> ()
  squares = ReduceSumSquare <keepdims = 1> (wide, channel_axis)
  mean = AveragePool <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
                      count_include_pad = 1> (squares)
  eps = Constant <value_float: float = @epsilon> ()
  shifted = Add (mean, eps)
  root = Sqrt (shifted)
"""
_CONV = """
  z = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
            dilations: ints = @dilations, group: int = @group> (X, W)
"""
_CONV_ATTRIBUTES = "kernel_shape, strides, pads, dilations, group, epsilon"

_BODIES = {
    "PatchNorm": f"""
PatchNorm <kernel_shape, strides, pads, epsilon> (X) => (N) {{
  {_PATCH_NORM}
  N = CastLike (root, X)
}}""",
    "BcosConv": f"""
BcosConv <{_CONV_ATTRIBUTES}> (X, W) => (Y, M) {{
  {_CONV}
  {_PATCH_NORM}
  n = CastLike (root, X)
  size = Abs (z)
  M = Div (size, n)
  Y = Mul (z, M)
}}""",
    "BcosConvRelu": f"""
BcosConvRelu <{_CONV_ATTRIBUTES}> (X, W) => (Y, M) {{
  {_CONV}
  positive = Relu (z)
  {_PATCH_NORM}
  n = CastLike (root, X)
  M = Div (positive, n)
  Y = Mul (positive, M)
}}""",
    "BcosConvPower": f"""
BcosConvPower <{_CONV_ATTRIBUTES}, exponent> (X, W, delta) => (Y, M) {{
  {_CONV}
  {_PATCH_NORM}
  n = CastLike (root, X)
  size = Abs (z)
  ratio = Div (size, n)
  raised = Add (ratio, delta)
  power = Constant <value_float: float = @exponent> ()
  power_like = CastLike (power, X)
  M = Pow (raised, power_like)
  Y = Mul (z, M)
}}""",
    "DynamicScale": """
DynamicScale (Z, N) => (M) {
  size = Abs (Z)
  M = Div (size, N)
}""",
    "DynamicScalePower": """
DynamicScalePower <exponent> (Z, N, delta) => (M) {
  size = Abs (Z)
  ratio = Div (size, N)
  raised = Add (ratio, delta)
  power = Constant <value_float: float = @exponent> ()
  power_like = CastLike (power, Z)
  M = Pow (raised, power_like)
}""",
    "RowNorm": """
RowNorm <epsilon> (X) => (N) {
  wide = Cast <to = 1> (X)
  last = Constant <value_ints = [-1]> ()
  length = ReduceL2 <keepdims = 1> (wide, last)
  eps = Constant <value_float: float = @epsilon> ()
  shifted = Add (length, eps)
  N = CastLike (shifted, X)
}""",
    # The published picture: direction of the six weights per location, and their norm where they contribute, smoothed
    # over 15 x 15 pixels, relative to its 99.5 % quantile. `count` largest values reach down to the lower neighbour of
    # the quantile's rank and `fraction` is how far it lies above that one.
    "ColourPicture": """
ColourPicture <count, fraction> (W, contributions) => (picture) {
  one = Constant <value_ints = [1]> ()
  zero_index = Constant <value_ints = [0]> ()
  three = Constant <value_ints = [3]> ()
  six = Constant <value_ints = [6]> ()
  last = Constant <value_ints = [-1]> ()
  tiny = Constant <value_float = 1e-12> ()
  zero = Constant <value_float = 0.0> ()
  unit = Constant <value_float = 1.0> ()
  size = Abs (W)
  largest = ReduceMax <keepdims = 1> (size, one)
  largest_positive = Add (largest, tiny)
  direction = Div (W, largest_positive)
  positive = Relu (direction)
  colour = Slice (positive, zero_index, three, one)
  inverse = Slice (positive, three, six, one)
  both = Add (colour, inverse)
  both_positive = Add (both, tiny)
  rgb = Div (colour, both_positive)
  norm = ReduceL2 <keepdims = 1> (W, one)
  map = Unsqueeze (contributions, one)
  against = Less (map, zero)
  counted = Where (against, tiny, norm)
  smooth = AveragePool <kernel_shape = [15, 15], pads = [7, 7, 7, 7], count_include_pad = 1> (counted)
  flat = Flatten <axis = 1> (smooth)
  k = Constant <value_ints: ints = @count> ()
  top, where_top = TopK <axis = 1, largest = 1, sorted = 1> (flat, k)
  minus_two = Constant <value_ints = [-2]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  lower = Slice (top, last, end, one)
  around = Slice (top, minus_two, end, one)
  upper = Slice (around, zero_index, one, one)
  gap = Sub (upper, lower)
  fraction_value = Constant <value_float: float = @fraction> ()
  step = Mul (gap, fraction_value)
  quantile = Add (lower, step)
  least = Constant <value_float = 1.1754943508222875e-38> ()
  quantile_positive = Max (quantile, least)
  spatial = Constant <value_ints = [2, 3]> ()
  divisor = Unsqueeze (quantile_positive, spatial)
  relative = Div (smooth, divisor)
  alpha = Clip (relative, zero, unit)
  rgba = Concat <axis = 1> (rgb, alpha)
  picture = Transpose <perm = [0, 2, 3, 1]> (rgba)
}""",
}
FUNCTION_NAMES = tuple(_BODIES)


def make_functions(names: set[str], opset: int) -> list[ir.Function]:
    """The functions of the given names, their bodies in a standard opset."""
    import onnx
    import onnx.parser
    import onnx_ir as ir

    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    return [
        ir.serde.deserialize_function(onnx.parser.parse_function(header + _BODIES[name]))
        for name in _BODIES
        if name in names
    ]

"""CPU kernels in C++: everything around the convolutions and matrix products, which oneDNN does through torch.

One pass over each image: the whole B-cos epilogue in place over ``z``, the end of an adjoint, stem preparation, maps of
sums of squares, depthwise convolutions with their norms, the explanation's weights and contributions. float32 and
bfloat16 storage, float32 arithmetic. AVX-512, AVX2 or the compiler's baseline, chosen when the module loads
(``BCOS_RT_ISA=avx2`` or ``portable`` asks for less). The functions mean what :mod:`bcos_rt.kernels.reference` and
:mod:`bcos_rt.kernels.reference_layers` say; tensors are on the CPU, images [N, C, H, W] in channels-last memory.

They are steps of an engine, not ops: some overwrite their first argument, and none records gradients. Shapes are not
checked here; an engine has them from its graph.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bcos_rt.kernels import reference
from bcos_rt.kernels.reference import ACTIVATIONS

__all__ = [
    "available",
    "channel_combine",
    "channel_moments",
    "channel_products",
    "channels_last",
    "conv_epilogue",
    "depthwise_fused",
    "depthwise_transposed",
    "encode_image",
    "image_contributions",
    "in_channels_last",
    "isa",
    "layer_norm",
    "layer_norm_transposed",
    "linear_epilogue",
    "pack_depthwise",
    "readable",
    "row_square_sum",
    "scale_act",
    "scale_act_transposed",
    "square_response_grad",
    "square_row_response_grad",
    "square_sum",
    "transposed_epilogue",
    "unavailable_reason",
]


_ISAS = ("avx512", "avx2", "portable")


@functools.cache
def _load() -> tuple[Any, str | None]:
    wanted = os.environ.get("BCOS_RT_ISA", "")
    if wanted and wanted not in _ISAS:
        return None, f"BCOS_RT_ISA: got {wanted!r}, expected one of {', '.join(_ISAS)}"
    # torch is imported above: the extension then shares its OpenMP threads instead of bringing its own.
    try:
        module: ModuleType = importlib.import_module("bcos_rt.kernels.cpu._native")
    except ImportError as error:
        return None, _failure() or f"{error}"
    return module, None


def _failure() -> str | None:
    """What setup.py wrote where it could not build the kernels."""
    try:
        return (Path(__file__).parent / "build_failure.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def available() -> bool:
    """Whether the C++ kernels were built with this installation."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Why they are not; None if they are."""
    return _load()[1]


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable".

    Raises:
        ImportError: the kernels are not there.
    """
    return str(_kernels().isa())


def _kernels() -> Any:
    module, reason = _load()
    if module is None:
        raise ImportError(f"the C++ kernels of bcos-rt are not built: {reason}")
    return module


# --- operands --------------------------------------------------------------------------------------------------------


def _storage(x: Tensor) -> int:
    return 1 if x.dtype == torch.bfloat16 else 0


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def in_channels_last(x: Tensor) -> bool:
    """Whether an image [N, C, H, W] has the strides of channels-last memory, those of sizes of 1 too."""
    _, c, h, w = x.shape
    return x.stride() == (c * h * w, 1, w * c, c)


def channels_last(x: Tensor) -> Tensor:
    """:func:`bcos_rt.kernels.reference.channels_last`, at once where there is nothing to do."""
    return x if in_channels_last(x) else reference.channels_last(x)


def readable(x: Tensor) -> Tensor:
    """``x`` with its channels next to each other; a copy only where they are not."""
    if x.ndim == 4:
        if x.stride(1) == 1 or x.shape[1] == 1:
            return x
        return channels_last(x)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _operand(x: Tensor | None) -> tuple[int, int, int, int] | None:
    """(address, batch, row, pixel strides) of an image [N, C, H, W], or of rows [M, ..., C] as images of one row."""
    if x is None:
        return None
    x = readable(x)
    if x.ndim == 4:
        return x.data_ptr(), x.stride(0), x.stride(2), x.stride(3)
    return x.data_ptr(), x.stride(0), 0, x.stride(1) if x.ndim == 3 else 0


def _pixel_stride(x: Tensor) -> int:
    """From pixel to pixel in channels-last memory, or in a slice of its channels; strides of sizes of 1 say nothing."""
    _, _, h, w = x.shape
    return x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0)


def _image_like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    n, c, h, w = shape
    # Cheaper to make than by a memory format.
    return torch.empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), dtype=dtype, device="cpu")


def _window(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    return (*kernel, *stride, *padding, *dilation)


# What was not asked for; nothing writes to it.
_NOTHING = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)}
_WINDOW_OF_ONE = (1, 1, 1, 1, 0, 0, 1, 1)


def _gate_like(y: Tensor, activation: str, want: bool, image: bool) -> Tensor | None:
    if not want or activation == "none":
        return None
    if activation != "relu":
        return _image_like(y.shape, y.dtype) if image else torch.empty_like(y)
    if not image:
        return torch.empty((*y.shape[:-1], -(-y.shape[-1] // 8)), dtype=torch.uint8, device="cpu")
    return _image_like((y.shape[0], -(-y.shape[1] // 8), *y.shape[2:]), torch.uint8)


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return _NOTHING[like.dtype] if value is None else value


# --- forward ---------------------------------------------------------------------------------------------------------


def conv_epilogue(
    z: Tensor,
    squares: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    b: float = 2.0,
    activation: str = "none",
    want_multiplier: bool = False,
    want_gate: bool = False,
    want_squares: bool = False,
    groups: int = 1,
    out: Tensor | None = None,
    product: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y = act(z (|z| / n)^(b-1) scale + shift + residual)`` after a convolution; ``y`` overwrites ``z`` or ``out``.

    Args:
        z: [N, O, H', W'] in channels-last memory or a slice of its channels, float32 or bfloat16, its bias added.
        squares: float32 map of sums of squares of the convolution's input, [N, T, H, W] with T a multiple of
            ``groups``, in channels-last memory; None for b = 1.
        scale, shift: float32 [O].
        residual: like ``z``; may be a slice of the channels of a wider image.
        out: like ``z``; None for ``z``.
        product: what ``z`` is to be filled with first (:meth:`bcos_rt.kernels.cpu.pointwise.Pointwise.product`); None
            where it holds its values.

    Returns:
        ``z`` or ``out``, the multiplier, the gate (a bit mask for relu) and the map of ``y`` [N, groups, H', W']; what
        was not asked for is empty.
    """
    n, o, oh, ow = z.shape
    wants = b != 1 and squares is not None
    height, width = (squares.shape[2], squares.shape[3]) if wants and squares is not None else (oh, ow)
    multiplier = _image_like(z.shape, z.dtype) if want_multiplier else None
    gate = _gate_like(z, activation, want_gate, True)
    out_squares = _image_like((n, groups, oh, ow), torch.float32) if want_squares else None
    residual = None if residual is None else readable(residual)
    y = z if out is None else out
    _kernels().epilogue(
        (n, o, height, width, oh, ow), _window(kernel, stride, padding, dilation), _storage(z), z.data_ptr(),
        _pixel_stride(z), y.data_ptr(), _pixel_stride(y), _pointer(squares) if wants else 0,
        squares.shape[1] if squares is not None else 1, groups, False, _pointer(scale), _pointer(shift),
        _operand(residual), b, eps, ACTIVATIONS.index(activation), _pointer(multiplier), _pointer(gate),
        _pointer(out_squares), torch.get_num_threads(), product,
    )  # fmt: skip
    return y, _or_empty(multiplier, z), _or_empty(gate, z), _or_empty(out_squares, z)


def linear_epilogue(
    z: Tensor,
    squares: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    b: float = 2.0,
    activation: str = "none",
    want_multiplier: bool = False,
    want_gate: bool = False,
    want_squares: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`conv_epilogue` after a linear layer (n = norm + eps): ``z`` [..., O] contiguous, ``squares`` [..., T]."""
    o = z.shape[-1]
    rows = z.numel() // o if o else 0
    multiplier = torch.empty_like(z) if want_multiplier else None
    gate = _gate_like(z, activation, want_gate, False)
    out_squares = torch.empty((*z.shape[:-1], 1), dtype=torch.float32, device="cpu") if want_squares else None
    residual = None if residual is None else residual.contiguous()
    flat = None if residual is None else (residual.data_ptr(), 0, 0, o)
    wants = b != 1 and squares is not None
    _kernels().epilogue(
        (1, o, 1, rows, 1, rows), _WINDOW_OF_ONE, _storage(z), z.data_ptr(), o, z.data_ptr(), o,
        _pointer(squares) if wants else 0,
        squares.shape[-1] if squares is not None else 1, 1, True, _pointer(scale), _pointer(shift), flat, b, eps,
        ACTIVATIONS.index(activation), _pointer(multiplier), _pointer(gate), _pointer(out_squares),
        torch.get_num_threads(), None,
    )  # fmt: skip
    return z, _or_empty(multiplier, z), _or_empty(gate, z), _or_empty(out_squares, z)


def square_response_grad(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """:func:`bcos_rt.kernels.reference.square_response_grad` in one pass; x and y in channels-last memory."""
    n, o, oh, ow = y.shape
    grad, squares = readable(grad), square_sum(x, groups)
    grad_z, norm = _image_like(y.shape, y.dtype), _image_like((n, groups, oh, ow), torch.float32)
    _kernels().response_grad(
        (n, o, x.shape[2], x.shape[3], oh, ow), _window(kernel_size, stride, padding, dilation), _storage(y),
        y.data_ptr(), o, _operand(grad), squares.data_ptr(), groups, groups, False, eps, grad_z.data_ptr(),
        norm.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_z, norm


def square_row_response_grad(grad: Tensor, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`bcos_rt.kernels.reference.square_row_response_grad` in one pass."""
    grad, y, squares = grad.contiguous(), y.contiguous(), row_square_sum(x)
    o = y.shape[-1]
    rows = y.numel() // o if o else 0
    grad_z, norm = torch.empty_like(y), torch.zeros_like(squares)
    _kernels().response_grad(
        (1, o, 1, rows, 1, rows), _WINDOW_OF_ONE, _storage(y), y.data_ptr(), o, (grad.data_ptr(), 0, 0, o),
        squares.data_ptr(), 1, 1, True, eps, grad_z.data_ptr(), norm.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    # The kernel gives grad_n / n, as for a convolution.
    length = squares.sqrt_()
    return grad_z, torch.where(length > 0, norm * (length + eps) / length, norm.new_zeros(()))


def square_sum(x: Tensor, groups: int = 1) -> Tensor:
    """Channel sums of squares by group: [N, C, H, W] -> float32 [N, groups, H, W]."""
    n, c, h, w = x.shape
    x = readable(x)
    out = _image_like((n, groups, h, w), torch.float32)
    _kernels().square_sum((n, c, h, w, h, w), _storage(x), _operand(x), groups, out.data_ptr(), torch.get_num_threads())
    return out


def row_square_sum(x: Tensor) -> Tensor:
    """Sums of squares of rows: [..., C] -> float32 [..., 1]."""
    x = x.contiguous()
    c = x.shape[-1]
    rows = x.numel() // c if c else 0
    out = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device="cpu")
    _kernels().square_sum(
        (1, c, 1, rows, 1, rows), _storage(x), (x.data_ptr(), 0, 0, c), 1, out.data_ptr(), torch.get_num_threads()
    )
    return out


def _planes(image: Tensor) -> tuple[Tensor, tuple[int, bool, int, int, int, int]]:
    if image.dtype not in (torch.uint8, torch.float32):
        image = image.float()
    batch, channel, row, pixel = image.stride()
    return image, (image.data_ptr(), image.dtype == torch.uint8, batch, channel, row, pixel)


def encode_image(
    image: Tensor, mean: Tensor, std: Tensor, six_channels: bool, dtype: torch.dtype, channels: int = 8
) -> tuple[Tensor, Tensor]:
    """``(v - mean) / std`` of ``v = [x, 1 - x]`` (or x), and its map.

    Args:
        image: [N, 3, H, W], uint8 or floating point, any strides.
        channels: of the result; those beyond 6 (or 3) are zero.
    """
    n, _, h, w = image.shape
    image, planes = _planes(image)
    out, squares = _image_like((n, channels, h, w), dtype), _image_like((n, 1, h, w), torch.float32)
    mean, inverse = mean.float().contiguous(), std.float().reciprocal().contiguous()
    _kernels().encode(
        (n, channels, h, w, h, w), _storage(out), planes, mean.data_ptr(), inverse.data_ptr(), six_channels,
        out.data_ptr(), squares.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, squares


def scale_act(
    x: Tensor, scale: Tensor, shift: Tensor, activation: str, want_squares: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """``act(scale x + shift)`` and its map; ``x`` may be a slice of channels."""
    n, c, h, w = x.shape
    x = readable(x)
    out = _image_like(x.shape, x.dtype)
    squares = _image_like((n, groups, h, w), torch.float32) if want_squares else None
    _kernels().scale_act(
        (n, c, h, w, h, w), _storage(x), _operand(x), None, None, scale.data_ptr(), shift.data_ptr(),
        ACTIVATIONS.index(activation), groups, 1, out.data_ptr(), c, _pointer(squares), torch.get_num_threads(),
    )  # fmt: skip
    return out, _or_empty(squares, x)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over all pixels, float32 [C].

    Args:
        x: float32 [N, C, H, W] in channels-last memory, of at least one pixel.
    """
    count = x.numel() // x.shape[1]
    # Relative to a pixel first: numbers far from 0 that differ little keep their digits.
    first = x.detach()[0, :, 0, 0].contiguous()
    mean = (first.double() + _channel_sums(x, None, first, False) / count).float()
    return mean, (_channel_sums(x, None, mean, True) / count).float()


def channel_products(x: Tensor, y: Tensor) -> Tensor:
    """The sum of ``x y`` over all pixels of each channel, float64 [C]; images as in :func:`channel_moments`."""
    return _channel_sums(x, y, None, False)


def _channel_sums(x: Tensor, y: Tensor | None, mean: Tensor | None, squared: bool) -> Tensor:
    n, c, h, w = x.shape
    out = torch.empty(c, dtype=torch.float64, device="cpu")
    _kernels().channel_sums(
        n * h * w, c, x.data_ptr(), _pointer(y), _pointer(mean), squared, out.data_ptr(), torch.get_num_threads()
    )
    return out


def channel_combine(x: Tensor, mean: Tensor, x_scale: Tensor, y: Tensor, y_scale: Tensor) -> Tensor:
    """``(x - mean) x_scale + y y_scale`` by channel: images as in :func:`channel_moments`, the others float32 [C]."""
    n, c, h, w = x.shape
    out = _image_like(x.shape, x.dtype)
    mean, x_scale, y_scale = (v.contiguous() for v in (mean, x_scale, y_scale))
    _kernels().channel_combine(
        n * h * w, c, x.data_ptr(), y.data_ptr(), mean.data_ptr(), x_scale.data_ptr(), y_scale.data_ptr(),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


# --- adjoint ---------------------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, want_squares: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`bcos_rt.kernels.reference_layers.layer_norm` in one pass; ``weight`` and ``bias`` float32."""
    x = x.contiguous()
    c = x.shape[-1]
    rows = x.numel() // c if c else 0
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
    squares = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device="cpu") if want_squares else None
    _kernels().layer_norm(
        rows, c, _storage(x), x.data_ptr(), _pointer(weight), _pointer(bias), eps, y.data_ptr(), rstd.data_ptr(),
        _pointer(squares), torch.get_num_threads(),
    )  # fmt: skip
    return y, rstd, _or_empty(squares, y)


def layer_norm_transposed(grad: Tensor, rstd: Tensor, weight: Tensor | None, identity: Tensor | None = None) -> Tensor:
    """:func:`bcos_rt.kernels.reference_layers.layer_norm_transposed` in one pass; ``rstd``, ``weight`` float32."""
    grad, rstd = grad.contiguous(), rstd.contiguous()
    identity = None if identity is None else identity.contiguous()
    c = grad.shape[-1]
    rows = grad.numel() // c if c else 0
    per_image = grad.shape[0] // rstd.shape[0] if grad.ndim > 1 and rstd.shape[0] else 1
    length = rows // grad.shape[0] if grad.ndim > 1 and grad.shape[0] else 1
    out = torch.empty_like(grad)
    _kernels().layer_norm_adjoint(
        rows, c, length, per_image, _storage(grad), grad.data_ptr(), _pointer(identity), rstd.data_ptr(),
        _pointer(weight), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _end(
    out: Tensor,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
) -> tuple[tuple[Any, ...], Tensor | None, tuple[Tensor | None, ...]]:
    """The epilogue's operands for results like ``out``; the tensors they point into have to live until the call."""
    raw = torch.empty_like(out) if want_raw else None
    kept = tuple(None if t is None else readable(t) for t in (multiplier, identity, gate))
    images = next((t.shape[0] for t in (multiplier, gate) if t is not None), out.shape[0])
    per_image = out.shape[0] // images if images else 1
    bits = gate is not None and gate.dtype == torch.uint8
    operands = tuple(_operand(t) for t in kept)
    return (*operands, bits, max(per_image, 1), out.data_ptr(), _pointer(raw)), raw, kept


def _sizes(x: Tensor) -> tuple[int, ...]:
    """(batch, channels, height, width) of an image, or of rows [M, ..., C] as images of one row."""
    if x.ndim == 4:
        n, c, h, w = x.shape
        return n, c, h, w, h, w
    length = x.shape[1] if x.ndim == 3 else 1
    return x.shape[0], x.shape[-1], 1, length, 1, length


def transposed_epilogue(
    total: Tensor,
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
    in_place: bool = True,
    product: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """``G = total + identity``; returns ``G multiplier`` and ``G gate`` (empty if not wanted).

    Args:
        total: [M, C, H, W] in channels-last memory, or rows [M, C] or [M, L, C], contiguous.
        in_place: the first result overwrites ``total``; otherwise ``total`` may have any strides.
        multiplier, gate: of N images for M = N K rows; a uint8 gate is a bit mask.
        product: what ``total`` is to be filled with first, as for :func:`conv_epilogue`.
    """
    total = readable(total)
    out = total
    if not in_place:
        out = _image_like(total.shape, total.dtype) if total.ndim == 4 else total.new_empty(total.shape)
    end, raw, _kept = _end(out, multiplier, identity, gate, want_raw)
    _kernels().adjoint_end(_sizes(total), _storage(total), _operand(total), end, torch.get_num_threads(), product)
    return out, _or_empty(raw, total)


def scale_act_transposed(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    identity: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """``grad scale gate(scale x + shift) + identity``: grad [N K, C, H, W], x [N, C, H, W].

    With ``in_place`` it overwrites ``identity``, an image in channels-last memory or its first channels.
    """
    m, c, h, w = grad.shape
    grad, x = readable(grad), readable(x)
    identity = None if identity is None else readable(identity)
    out = identity if in_place and identity is not None else _image_like(grad.shape, grad.dtype)
    _kernels().scale_act(
        (m, c, h, w, h, w), _storage(x), _operand(x), _operand(grad), _operand(identity), scale.data_ptr(),
        shift.data_ptr(), ACTIVATIONS.index(activation), 1, max(m // max(x.shape[0], 1), 1), out.data_ptr(),
        out.stride(3), 0, torch.get_num_threads(),
    )  # fmt: skip
    return out


def image_contributions(
    grad: Tensor, image: Tensor, inverse_std: Tensor, scale: float = 1.0, block: int = 1, want_colour: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [M, 6, H, W] (contiguous), contributions [M, H, W] and the picture's colours [M, 4, H, W], all float32.

    Args:
        grad: [M, 6 (or 3) or more, H, W], at least the image's size. With ``block`` = s, [M, s s C', H / s, W / s]
            with channel ``(dy s + dx) C' + c``, as a strided convolution's adjoint computed as one convolution gives.
        image: [N, 3, H, W], uint8 or floating point.
        inverse_std: float32 [6] or [3].
    """
    channels = inverse_std.numel()
    m, (_, _, h, w) = grad.shape[0], image.shape
    grad = readable(grad)
    image, planes = _planes(image)
    weights = torch.empty((m, channels, h, w), dtype=torch.float32, device="cpu")
    contributions = torch.empty((m, h, w), dtype=torch.float32, device="cpu")
    colour = torch.empty((m, 4, h, w), dtype=torch.float32, device="cpu") if want_colour and channels == 6 else None
    _kernels().contributions(
        (m, channels, h, w, h, w), _storage(grad), _operand(grad), block, grad.shape[1] // (block * block),
        max(m // max(image.shape[0], 1), 1), planes, inverse_std.data_ptr(), scale, weights.data_ptr(),
        contributions.data_ptr(), _pointer(colour), torch.get_num_threads(),
    )  # fmt: skip
    return weights, contributions, _or_empty(colour, weights)


# --- depthwise -------------------------------------------------------------------------------------------------------


def pack_depthwise(weight: Tensor) -> Tensor:
    """A depthwise convolution's weights as the kernels read them: [C, 1, kh, kw] -> float32 [kh kw, C]."""
    return weight.reshape(weight.shape[0], -1).t().float().contiguous()


def depthwise_fused(
    x: Tensor,
    packed: Tensor,
    kernel: Sequence[int],
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    b: float,
    eps: float,
    activation: str,
    want_multiplier: bool = False,
    want_gate: bool = False,
    want_squares: bool = False,
    size: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A depthwise B-cos convolution with its epilogue, ``z`` and the norms in one pass; see :func:`conv_epilogue`.

    Args:
        padding: before the image.
        size: (H', W') of the result; None where there is as much padding behind the image as before it.
    """
    n, c, h, w = x.shape
    x = readable(x)
    oh, ow = size or (
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, k, s, p, d in zip((h, w), kernel, stride, padding, dilation, strict=True)
    )
    y = _image_like((n, c, oh, ow), x.dtype)
    multiplier = torch.empty_like(y) if want_multiplier else None
    gate = _gate_like(y, activation, want_gate, True)
    squares = _image_like((n, 1, oh, ow), torch.float32) if want_squares else None
    residual = None if residual is None else readable(residual)
    _kernels().depthwise(
        (n, c, h, w, oh, ow), _window(kernel, stride, padding, dilation), _storage(x), _operand(x), _operand(residual),
        packed.data_ptr(), _pointer(bias), _pointer(scale), _pointer(shift), b, eps, ACTIVATIONS.index(activation),
        y.data_ptr(), _pointer(multiplier), _pointer(gate), _pointer(squares), torch.get_num_threads(),
    )  # fmt: skip
    return y, _or_empty(multiplier, y), _or_empty(gate, y), _or_empty(squares, y)


def depthwise_transposed(
    grad: Tensor,
    packed: Tensor,
    kernel: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    multiplier: Tensor | None = None,
    identity: Tensor | None = None,
    gate: Tensor | None = None,
    want_raw: bool = False,
) -> tuple[Tensor, Tensor]:
    """The adjoint of a depthwise convolution with its epilogue; see :func:`transposed_epilogue`.

    ``padding`` is that before the image; ``input_size`` may be any part of what the windows cover.
    """
    m, c, oh, ow = grad.shape
    grad = readable(grad)
    out = _image_like((m, c, *input_size), grad.dtype)
    end, raw, _kept = _end(out, multiplier, identity, gate, want_raw)
    _kernels().depthwise_adjoint(
        (m, c, *input_size, oh, ow), _window(kernel, stride, padding, dilation), _storage(grad), _operand(grad),
        packed.data_ptr(), end, torch.get_num_threads(),
    )  # fmt: skip
    return out, _or_empty(raw, out)

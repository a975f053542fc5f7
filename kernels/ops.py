"""The ops of bcos-rt: schemas, shapes, autograd, autocast and dispatch. Layers call these and nothing below them.

``torch.ops.bcos_rt.conv2d`` and ``torch.ops.bcos_rt.linear`` are single nodes under ``torch.export`` and
``torch.compile``; the explanation graph splits them into the linear response, the norm (:func:`patch_norm`,
:func:`row_norm`) and the multiplier (:func:`dynamic_scale`), which are ops too, so that later passes recognise them.
The fused forms (``conv2d_fused``, ``conv2d_transposed``, ...) are what an engine's fusion passes put in their place:
one kernel each, inference only.

Dispatch: CUDA tensors in fp16, bf16 and fp32 go to the Triton kernels, everything else to :mod:`.reference` (attention
to :mod:`.blocked_attention`); :func:`use_backend` chooses by hand. Under autocast the layers compute in autocast's
dtype, their norms in fp32.

Layout: images are [N, C, H, W]. The Triton kernels work on channels-last memory and return it, so that an NCHW image is
rearranged once, at the network's first layer.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, did_you_mean
from bcos_rt.kernels import blocked_attention, cpu, reference, reference_layers
from bcos_rt.kernels.reference import ACTIVATIONS, CONV_EPS, LINEAR_EPS
from bcos_rt.kernels.shapes import SHAPES, patch_norm_shape, row_norm_shape

__all__ = [
    "ACTIVATIONS",
    "CONV_EPS",
    "LINEAR_EPS",
    "Backend",
    "attention",
    "attention_transposed",
    "avg_pool2d",
    "avg_pool2d_transposed",
    "conv2d",
    "conv2d_contributions",
    "conv2d_fused",
    "conv2d_transposed",
    "dynamic_scale",
    "encode_image",
    "group_norm",
    "group_norm_transposed",
    "image_contributions",
    "layer_norm",
    "layer_norm_transposed",
    "linear",
    "linear_fused",
    "linear_transposed",
    "max_pool2d",
    "max_pool2d_transposed",
    "patch_norm",
    "row_norm",
    "scale_act",
    "scale_act_transposed",
    "square_sum",
    "transposed_epilogue",
    "use_backend",
]

Backend = Literal["auto", "triton", "reference"]
STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Offsets inside the kernels are 32-bit.
MAX_ELEMENTS = 2**31 - 1

_backend: ContextVar[Backend] = ContextVar("bcos_rt_backend", default="auto")


# --- dispatch --------------------------------------------------------------------------------------------------------


# Which file of kernels/triton/ holds each launcher; imported at first use, since importing Triton takes a second.
_LAUNCHERS = {
    "attention": "attention",
    "attention_transposed": "attention",
    "avg_pool2d": "pool",
    "avg_pool2d_transposed": "pool",
    "backward": "training",
    "conv2d_contributions": "contributions",
    "conv2d_fused": "conv",
    "conv2d_transposed": "conv_transposed",
    "depthwise_grad_weight": "depthwise",
    "depthwise_transposed": "depthwise",
    "encode_image": "stem",
    "group_norm": "norms",
    "group_norm_transposed": "norms",
    "interpreting": "launch",
    "layer_norm": "norms",
    "layer_norm_transposed": "norms",
    "linear_fused": "linear",
    "linear_transposed": "conv_transposed",
    "max_pool2d": "pool",
    "max_pool2d_transposed": "pool",
    "row_square_sum": "square_sum",
    "scale_act": "scale_act",
    "scale_act_transposed": "scale_act",
    "square_sum": "square_sum",
}


# Ops that are plain PyTorch on every device: an engine's backends fuse them away or have kernels of their own.
_PLAIN = ("image_contributions", "transposed_epilogue")


@functools.cache
def _triton(name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"bcos_rt.kernels.triton.{_LAUNCHERS[name]}")
    launcher: Callable[..., Any] = getattr(module, name)
    return launcher


_REFERENCES: dict[str, Callable[..., Any]] = {
    name: getattr(module, name)
    for module in (reference, reference_layers)
    for name in (*_LAUNCHERS, *_PLAIN)
    if hasattr(module, name)
}


@functools.cache
def _triton_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the kernels of every op called inside: ``"triton"``, ``"reference"``, or ``"auto"`` (by device).

    A backward pass uses what its forward pass did, wherever it is called.

    ``"triton"`` on CPU tensors works in Triton's interpreter only (``TRITON_INTERPRET=1``, for tests).

    Raises:
        InvalidArgumentError: another name.
    """
    if name not in ("auto", "triton", "reference"):
        raise InvalidArgumentError("name", repr(name), "'auto', 'triton' or 'reference'")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def _use_triton(x: Tensor) -> bool:
    """Whether the op that ``x`` is the first argument of runs a Triton kernel."""
    backend = _backend.get()
    if backend == "reference":
        return False
    if backend == "triton":
        return True
    return x.device.type == "cuda" and (x.dtype in STORAGE_DTYPES or x.dtype == torch.uint8) and _triton_installed()


# Plain PyTorch as well, for any device and dtype, but with less memory than the reference.
_BLOCKED: dict[str, Callable[..., Any]] = {
    "attention": blocked_attention.attention,
    "attention_transposed": blocked_attention.attention_transposed,
}


def _kernel(name: str, x: Tensor) -> Callable[..., Any]:
    """The function that does op ``name`` for ``x``: a Triton launcher, or plain PyTorch."""
    if name not in _PLAIN and _use_triton(x):
        return _triton(name)
    return _BLOCKED[name] if name in _BLOCKED and _backend.get() == "auto" else _REFERENCES[name]


# --- checks, before anything is launched -----------------------------------------------------------------------------


def _check(op: str, first: str, **tensors: Tensor | None) -> None:
    """Same device, usable dtypes and sizes. ``first`` names the tensor whose device and dtype the others must have.

    Parameters (scale, shift, ...), maps and gates have dtypes of their own; only operands are held to ``first``'s.

    Raises:
        InvalidTypeError: a dtype; InvalidArgumentError: a device or a size.
    """
    lead = tensors[first]
    if lead is None:
        raise InvalidTypeError(f"{op}: {first}", "None", "a tensor")
    triton = _use_triton(lead)
    if triton and lead.dtype not in STORAGE_DTYPES and not (op == "encode_image" and lead.dtype == torch.uint8):
        raise InvalidTypeError(
            f"{op}: {first}", f"dtype {lead.dtype}", "float16, bfloat16 or float32",
            " (the Triton kernels; use_backend('reference') takes any floating point)",
        )  # fmt: skip
    if not triton and not lead.is_floating_point() and op != "encode_image":
        raise InvalidTypeError(f"{op}: {first}", f"dtype {lead.dtype}", "a floating-point tensor")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != lead.device:
            raise InvalidArgumentError(f"{op}: {name}", f"device {tensor.device}", f"{lead.device}, as {first} has")
        if name in _OPERANDS and tensor.dtype != lead.dtype:
            raise InvalidTypeError(f"{op}: {name}", f"dtype {tensor.dtype}", f"{lead.dtype}, as {first} has")
        if triton and tensor.numel() > MAX_ELEMENTS:
            raise InvalidArgumentError(
                f"{op}: {name}", f"{tensor.numel()} elements (shape {tuple(tensor.shape)})",
                f"at most {MAX_ELEMENTS}: offsets are 32-bit", " (split the batch)",
            )  # fmt: skip
    if triton and lead.device.type != "cuda" and not _triton("interpreting")():
        raise InvalidArgumentError(
            f"{op}: {first}", f"device {lead.device}", "a CUDA device for the Triton kernels",
            " (or set TRITON_INTERPRET=1 before the first import of triton, for tests)",
        )  # fmt: skip


_OPERANDS = {"x", "weight", "residual", "grad", "multiplier", "identity"}


def _check_size(op: str, name: str, x: Tensor, elements: int) -> None:
    if _use_triton(x) and elements > MAX_ELEMENTS:
        raise InvalidArgumentError(
            f"{op}: {name}", f"{elements} elements", f"at most {MAX_ELEMENTS}: offsets are 32-bit",
            " (split the batch)",
        )  # fmt: skip


def _conv_size(
    op: str,
    x_shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """Output shape of a convolution; typed errors for what no convolution can be."""
    if len(x_shape) != 4 or weight.ndim != 4:
        raise InvalidArgumentError(
            f"{op}: x, weight",
            f"shapes {tuple(x_shape)}, {tuple(weight.shape)}",
            "[N, C, H, W], [O, C / groups, kh, kw]",
        )
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or any(v < least for v in pair):
            raise InvalidArgumentError(f"{op}: {name}", tuple(pair), f"two integers of at least {least}")
    channels, filters = x_shape[1], weight.shape[0]
    if groups < 1 or channels % groups or filters % groups or weight.shape[1] * groups != channels:
        raise InvalidArgumentError(
            f"{op}: weight", f"shape {tuple(weight.shape)} with groups={groups}",
            f"[O, C / groups, kh, kw] for C = {channels} input channels, O a multiple of groups",
        )  # fmt: skip
    size = reference.output_size(x_shape[2:], weight.shape[2:], stride, padding, dilation)
    if min(size) < 1:
        raise InvalidArgumentError(
            f"{op}: x", f"shape {tuple(x_shape)}", f"an image of at least one patch of {tuple(weight.shape[2:])}"
        )
    if _use_triton(weight) and _too_many_taps(weight, groups) and not (op == "conv2d" and _backend.get() == "auto"):
        raise InvalidArgumentError(
            f"{op}: weight", f"kernel {tuple(weight.shape[2:])}", f"at most {MAX_TAPS} places along an axis"
        )
    return x_shape[0], filters, size[0], size[1]


# The Triton main loop keeps a bit per place of the kernel along an axis in an int32.
MAX_TAPS = 31


def _too_many_taps(weight: Tensor, groups: int) -> bool:
    # A depthwise kernel has a loop of its own, without bits.
    return max(weight.shape[2:]) > MAX_TAPS and not (groups > 1 and weight.shape[1] == 1)


def _rows_use_cpp(x: Tensor) -> bool:
    """Whether the C++ kernels take rows like these."""
    if _backend.get() != "auto" or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return cpu.available()


def _uses_cpp(x: Tensor) -> bool:
    """Whether the C++ kernels can go over an image without rearranging it."""
    return _rows_use_cpp(x) and cpu.in_channels_last(x)


def has_memory(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors, not stand-ins of torch.compile, torch.func or fake tensor modes."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and not torch._is_functional_tensor(t)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and not torch._C._functorch.is_legacy_batchedtensor(t)
        for t in tensors
    )


def _conv2d_uses_triton(x: Tensor, weight: Tensor, groups: int) -> bool:
    """As :func:`_use_triton`, but a layer takes the reference for kernels of over 31 places (ViT-B/32's patches)."""
    return _use_triton(x) and not (_backend.get() == "auto" and _too_many_taps(weight, groups))


def _check_b(op: str, b: float) -> None:
    if not b >= 1:
        raise InvalidArgumentError(f"{op}: b", b, "a number of at least 1")


def _check_learned_b(op: str, b: float | Tensor, x: Tensor) -> None:
    if isinstance(b, Tensor) and (b.ndim != 0 or b.device != x.device or not b.is_floating_point()):
        raise InvalidArgumentError(
            f"{op}: b", f"shape {tuple(b.shape)}, dtype {b.dtype}, device {b.device}",
            f"a floating-point tensor without dimensions on {x.device}",
        )  # fmt: skip


def _padded(x: Tensor) -> int:
    """Elements of an image whose channels the kernel pads to a multiple of 8."""
    n, c, h, w = x.shape
    return n * -(-c // 8) * 8 * h * w


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise InvalidArgumentError(
            f"{op}: activation",
            repr(activation),
            f"one of {', '.join(ACTIVATIONS)}",
            did_you_mean(activation, ACTIVATIONS),
        )


def _check_map(op: str, squares: Tensor | None, shape: Sequence[int], groups: int, dim: int) -> None:
    """A sum-of-squares map has x's places and a multiple of ``groups`` entries."""
    if squares is None:
        return
    given, wanted = list(squares.shape), list(shape)
    entries = given.pop(dim) if len(given) == len(wanted) else 0
    wanted.pop(dim)
    dtypes = (torch.float32,) if _use_triton(squares) else (torch.float32, torch.float64)
    if given != wanted or entries < 1 or entries % groups or squares.dtype not in dtypes:
        raise InvalidArgumentError(
            f"{op}: squares", f"shape {tuple(squares.shape)}, dtype {squares.dtype}",
            f"a float32 map of x's places with a multiple of {groups} entries along dimension {dim}",
        )  # fmt: skip


def _check_shape(op: str, **pairs: tuple[Tensor | None, Sequence[int]]) -> None:
    for name, (tensor, shape) in pairs.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise InvalidArgumentError(f"{op}: {name}", f"shape {tuple(tensor.shape)}", str(tuple(shape)))


def _inference_only(op: str, **tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise InvalidArgumentError(
                    f"{op}: {name}", "a tensor that requires a gradient",
                    "an inference-only op's argument to be detached", " (use torch.no_grad(), or conv2d and linear)",
                )  # fmt: skip


# --- the layers: differentiable --------------------------------------------------------------------------------------


def _channels_last_like(shape: Sequence[int], x: Tensor) -> Tensor:
    n, c, h, w = shape
    return x.new_empty((n, h, w, c)).permute(0, 3, 1, 2)


def _conv2d_values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b: float | Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    _check("conv2d", "x", x=x, weight=weight, bias=bias)
    shape = _conv_size("conv2d", x.shape, weight, stride, padding, dilation, groups)
    _check_learned_b("conv2d", b, x)
    if not _conv2d_uses_triton(x, weight, groups):
        geometry = (stride, padding, dilation)
        if not isinstance(b, Tensor) and b != 1 and _uses_cpp(x):
            if _is_cpp_depthwise(weight, groups):
                none = (None, None, None)
                packed, wide = cpu.pack_depthwise(weight), None if bias is None else bias.float()
                return cpu.depthwise_fused(x, packed, weight.shape[2:], wide, *none, *geometry, b, eps, "none")[0]
            z = cpu.channels_last(F.conv2d(x, weight, bias, *geometry, groups))
            return cpu.conv_epilogue(
                z, cpu.square_sum(x, groups), weight.shape[2:], *geometry, eps, b=b, groups=groups
            )[0]
        return reference.conv2d(x, weight, bias, *geometry, groups, b, eps)
    _check_size("conv2d", "the result", x, math.prod(shape))
    _check_size("conv2d", "x, its channels padded to 8,", x, _padded(x))
    y: Tensor = _triton("conv2d_fused")(
        x, weight, None, None if bias is None else bias.float().contiguous(), None, None, None,
        stride, padding, dilation, groups, b, eps,
    )[0]  # fmt: skip
    return y


def _conv2d_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _channels_last_like(out.shape, out) if _conv2d_uses_triton(x, weight, groups) else out


def _conv2d_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float | Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, weight, bias and B, empty where not needed."""
    if groups > 1 and weight.shape[1] == 1:
        kernels = _triton_depthwise(x, weight, stride, padding, dilation, groups)
        grads = _depthwise_grads(grad, x, weight, bias, y, b, stride, padding, dilation, groups, eps, needs, *kernels)
    else:
        nhwc = [t.permute(0, 2, 3, 1).contiguous() for t in (grad, x, weight, y)]
        squares = _triton("square_sum")(x, groups).permute(0, 2, 3, 1)
        grad_x, grad_w, grad_bias, grad_b = _triton("backward")(
            nhwc[0], nhwc[1], nhwc[2], bias, nhwc[3], squares, stride, padding, dilation, groups, b, eps, needs, False,
            "conv2d",
        )  # fmt: skip
        grads = (
            None if grad_x is None else grad_x.permute(0, 3, 1, 2),
            None if grad_w is None else grad_w.permute(0, 3, 1, 2),
            grad_bias,
            grad_b,
        )
    return _present(grads, x)


def _depthwise_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float | Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    needs: Sequence[bool],
    transposed: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    grad_weight: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, ...]:
    """A depthwise convolution's: its norms are as large as its output, so that part is pointwise PyTorch.

    Args:
        transposed: the adjoint of the convolution with the given filters, plus the given tensor.
        grad_weight: the filters' gradient, from that of z.
    """
    geometry = (weight.shape[2:], stride, padding, dilation, groups, eps)
    grad_b = None
    if isinstance(b, Tensor) or b != 2:
        n = reference.patch_norm(x, *geometry)
        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        grad_z, grad_n, grad_b = reference.grad_response(grad, z, n, b, 1)
        share = grad_n / n
    else:
        grad_z, share = reference.square_response_grad(grad, x, y, *geometry)
    grad_x = grad_w = grad_bias = None
    if needs[0]:
        ones = torch.ones((groups, 1, *weight.shape[2:]), device=x.device)
        spread = transposed(share, ones, None)
        grad_x = transposed(grad_z, weight, (x * spread).to(x.dtype))
    if needs[1]:
        grad_w = grad_weight(grad_z).to(weight.dtype)
    if needs[2] and bias is not None:
        grad_bias = grad_z.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_w, grad_bias, grad_b if needs[3] else None


def _triton_depthwise(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[Callable[..., Tensor], ...]:
    """The last two arguments of :func:`_depthwise_grads`, of the GPU kernels."""
    window = (stride, padding, dilation)

    def transposed(grad: Tensor, filters: Tensor, plus: Tensor | None) -> Tensor:
        end = () if plus is None else (None, plus, None, False)
        out: Tensor = _triton("depthwise_transposed")(
            grad.contiguous(), filters, x.shape[2:], *window, groups, *end
        )[0]  # fmt: skip
        return out

    def grad_weight(grad_z: Tensor) -> Tensor:
        out: Tensor = _triton("depthwise_grad_weight")(grad_z, x, weight.shape[2:], *window)
        return out

    return transposed, grad_weight


def _cpp_depthwise(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[Callable[..., Tensor], ...]:
    """The last two arguments of :func:`_depthwise_grads`, of the C++ kernels; the filters' gradient is torch's."""
    window = (stride, padding, dilation)

    def transposed(grad: Tensor, filters: Tensor, plus: Tensor | None) -> Tensor:
        packed = cpu.pack_depthwise(filters)
        return cpu.depthwise_transposed(grad, packed, filters.shape[2:], x.shape[2:], *window, identity=plus)[0]

    def grad_weight(grad_z: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten.convolution_backward(
            grad_z, x, weight, None, *map(list, window), False, [0, 0], groups, [False, True, False]
        )[1]
        return out

    return transposed, grad_weight


def _is_cpp_depthwise(weight: Tensor, groups: int) -> bool:
    """Whether the C++ kernel of depthwise convolutions takes these filters: one a channel."""
    return groups > 1 and weight.shape[:2] == (groups, 1)


def _present(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # An op returns tensors: what is not needed is empty.
    a, b, c, d = (like.new_empty(0) if g is None else g for g in grads)
    return a, b, c, d


def _needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


@torch.library.custom_op("bcos_rt::conv2d", mutates_args=())
def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float,
    eps: float,
) -> Tensor:
    _check_b("conv2d", b)
    return _conv2d_values(x, weight, bias, b, stride, padding, dilation, groups, eps)


@_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _conv2d_shape(x, weight, bias, *options[:4])


@torch.library.custom_op("bcos_rt::conv2d_learned_b", mutates_args=())
def _conv2d_learned_b(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    return _conv2d_values(x, weight, bias, b, stride, padding, dilation, groups, eps)


@_conv2d_learned_b.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, *options: Any) -> Tensor:
    return _conv2d_shape(x, weight, bias, *options[:4])


@torch.library.custom_op("bcos_rt::conv2d_backward", mutates_args=())
def _conv2d_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float,
    learned_b: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exponent = b if learned_b is None else learned_b
    return _conv2d_grads(grad, x, weight, bias, y, exponent, stride, padding, dilation, groups, eps, needs)


@_conv2d_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float,
    learned_b: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _present(
        (
            _channels_last_like(x.shape, x) if needs[0] else None,
            _channels_last_like(weight.shape, weight) if needs[1] else None,
            torch.empty_like(bias) if needs[2] and bias is not None else None,
            torch.empty_like(learned_b) if needs[3] and learned_b is not None else None,
        ),
        x,
    )


def _conv2d_backward(
    triton: bool,
    cpp: bool,
    saved: Sequence[Any],
    options: Sequence[Any],
    b: float | Tensor,
    grad: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, weight, bias, y = saved
    stride, padding, dilation, groups, eps = options
    if not triton:
        with torch.autocast(x.device.type, enabled=False):
            # A second derivative (create_graph=True) and transforms (torch.compile, vmap) need operations they know.
            direct = cpp and not torch.is_grad_enabled() and has_memory(grad, x, y) and cpu.in_channels_last(y)
            if direct and _is_cpp_depthwise(weight, groups):
                kernels = _cpp_depthwise(x, weight, stride, padding, dilation, groups)
                return _depthwise_grads(
                    grad, x, weight, bias, y, b, stride, padding, dilation, groups, eps, needs, *kernels
                )
            response = cpu.square_response_grad if direct else None
            return reference.conv2d_backward(
                grad, x, weight, bias, y, stride, padding, dilation, groups, b, eps, needs, response
            )
    learned = b if isinstance(b, Tensor) else None
    grads = _conv2d_backward_op(
        grad, x, weight, bias, y, 2.0 if learned is not None else b, learned, stride, padding, dilation, groups, eps,
        list(needs),
    )  # fmt: skip
    return _needed(grads, needs)


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, stride, padding, dilation, groups, b, eps = inputs
    ctx.b, ctx.options = b, (stride, padding, dilation, groups, eps)
    # Decided here: a backward pass runs in autograd's threads, which do not see use_backend.
    ctx.triton, ctx.cpp = _conv2d_uses_triton(x, weight, groups), _uses_cpp(x)
    ctx.save_for_backward(x, weight, bias, output)


def _conv2d_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [*ctx.needs_input_grad[:3], False]
    grads = _conv2d_backward(ctx.triton, ctx.cpp, ctx.saved_tensors, ctx.options, ctx.b, grad, needs)
    return (*grads[:3], None, None, None, None, None, None)


_conv2d.register_autograd(_conv2d_autograd, setup_context=_conv2d_setup)


def _conv2d_learned_b_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, b, *options = inputs
    ctx.options, ctx.triton, ctx.cpp = options, _conv2d_uses_triton(x, weight, options[3]), _uses_cpp(x)
    ctx.save_for_backward(x, weight, bias, output, b)


def _conv2d_learned_b_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *saved, b = ctx.saved_tensors
    grads = _conv2d_backward(ctx.triton, ctx.cpp, saved, ctx.options, b, grad, ctx.needs_input_grad[:4])
    return (*grads, None, None, None, None, None)


_conv2d_learned_b.register_autograd(_conv2d_learned_b_autograd, setup_context=_conv2d_learned_b_setup)


def _linear_values(x: Tensor, weight: Tensor, bias: Tensor | None, b: float | Tensor, eps: float) -> Tensor:
    _check("linear", "x", x=x, weight=weight, bias=bias)
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise InvalidArgumentError(
            "linear: x, weight", f"shapes {tuple(x.shape)}, {tuple(weight.shape)}", "[..., C] and [O, C]"
        )
    _check_learned_b("linear", b, x)
    if not _use_triton(x):
        if not isinstance(b, Tensor) and b != 1 and _rows_use_cpp(x):
            z = F.linear(x, weight, bias).contiguous()
            return cpu.linear_epilogue(z, cpu.row_square_sum(x), eps, b=b)[0]
        return reference.linear(x, weight, bias, b, eps)
    _check_size("linear", "the result", x, x.numel() // max(x.shape[-1], 1) * weight.shape[0])
    y: Tensor = _triton("linear_fused")(
        x, weight, None, None if bias is None else bias.float().contiguous(), None, None, None, b, eps
    )[0]
    return y


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out.new_empty(out.shape) if _use_triton(x) else out


@torch.library.custom_op("bcos_rt::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, b: float, eps: float) -> Tensor:
    _check_b("linear", b)
    return _linear_values(x, weight, bias, b, eps)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return _linear_shape(x, weight, bias)


@torch.library.custom_op("bcos_rt::linear_learned_b", mutates_args=())
def _linear_learned_b(x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, eps: float) -> Tensor:
    return _linear_values(x, weight, bias, b, eps)


@_linear_learned_b.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return _linear_shape(x, weight, bias)


@torch.library.custom_op("bcos_rt::linear_backward", mutates_args=())
def _linear_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float,
    learned_b: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = [t.reshape(-1, 1, 1, t.shape[-1]).contiguous() for t in (grad, x, y)]
    squares = _triton("row_square_sum")(x).reshape(-1, 1, 1, 1)
    grad_x, grad_w, grad_bias, grad_b = _triton("backward")(
        rows[0], rows[1], weight[:, None, None, :].contiguous(), bias, rows[2], squares, (1, 1), (0, 0), (1, 1), 1,
        b if learned_b is None else learned_b, eps, needs, True, "linear",
    )  # fmt: skip
    grad_x = None if grad_x is None else grad_x.view(x.shape)
    grad_w = None if grad_w is None else grad_w.view(weight.shape)
    return _present((grad_x, grad_w, grad_bias, grad_b), x)


@_linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: float,
    learned_b: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _present(
        (
            x.new_empty(x.shape) if needs[0] else None,
            weight.new_empty(weight.shape) if needs[1] else None,
            torch.empty_like(bias) if needs[2] and bias is not None else None,
            torch.empty_like(learned_b) if needs[3] and learned_b is not None else None,
        ),
        x,
    )


def _linear_backward(
    triton: bool, cpp: bool, saved: Sequence[Any], eps: float, b: float | Tensor, grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    x, weight, bias, y = saved
    if not triton:
        with torch.autocast(x.device.type, enabled=False):
            # As _conv2d_backward.
            direct = cpp and not torch.is_grad_enabled() and has_memory(grad, x, y)
            response = cpu.square_row_response_grad if direct else None
            return reference.linear_backward(grad, x, weight, bias, y, b, eps, needs, response)
    learned = b if isinstance(b, Tensor) else None
    grads = _linear_backward_op(grad, x, weight, bias, y, 2.0 if learned is not None else b, learned, eps, list(needs))
    return _needed(grads, needs)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.b, ctx.eps = inputs
    ctx.triton, ctx.cpp = _use_triton(x), _rows_use_cpp(x)
    ctx.save_for_backward(x, weight, bias, output)


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [*ctx.needs_input_grad[:3], False]
    return (*_linear_backward(ctx.triton, ctx.cpp, ctx.saved_tensors, ctx.eps, ctx.b, grad, needs)[:3], None, None)


_linear.register_autograd(_linear_autograd, setup_context=_linear_setup)


def _linear_learned_b_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, b, ctx.eps = inputs
    ctx.triton = _use_triton(x)
    ctx.save_for_backward(x, weight, bias, output, b)


def _linear_learned_b_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *saved, b = ctx.saved_tensors
    return (*_linear_backward(ctx.triton, False, saved, ctx.eps, b, grad, ctx.needs_input_grad[:4]), None)


_linear_learned_b.register_autograd(_linear_learned_b_autograd, setup_context=_linear_learned_b_setup)


def _register_autocast(name: str, op: Callable[..., Tensor]) -> None:
    """Under autocast ``name`` computes in autocast's dtype, like a convolution (its norm stays in fp32 inside).

    ``torch.library.register_autocast`` fixes one dtype when it is called; this takes the one in force.
    """
    for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):

        def cast_and_call(*args: Any, device: str = device) -> Tensor:
            dtype = torch.get_autocast_dtype(device)

            def cast(value: Any) -> Any:
                # float64 is left alone, as torch does; a learned B is a parameter of the norm, not an operand.
                eligible = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
                return value.to(dtype) if eligible and value.dtype != torch.float64 else value

            with torch.autocast(device, enabled=False):
                return op(*(cast(value) for value in args))

        _library.impl(name, cast_and_call, key)  # type: ignore[no-untyped-call]


_library = torch.library.Library("bcos_rt", "FRAGMENT")  # type: ignore[no-untyped-call]
_register_autocast("conv2d", _conv2d)
_register_autocast("linear", _linear)
_register_autocast("conv2d_learned_b", _conv2d_learned_b)
_register_autocast("linear_learned_b", _linear_learned_b)


# --- the parts an explanation graph is made of -----------------------------------------------------------------------


@torch.library.custom_op("bcos_rt::patch_norm", mutates_args=())
def patch_norm(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    """Norm of every patch, [N, C, H, W] -> [N, groups, H', W'] (see :func:`reference.patch_norm`); inference only."""
    with torch.autocast(x.device.type, enabled=False):
        return _own(reference.patch_norm(x, kernel_size, stride, padding, dilation, groups, eps), x)


patch_norm.register_fake(patch_norm_shape)


@torch.library.custom_op("bcos_rt::row_norm", mutates_args=())
def row_norm(x: Tensor, eps: float) -> Tensor:
    """Norm of the last dimension, [..., C] -> [..., 1] (see :func:`reference.row_norm`); inference only."""
    return reference.row_norm(x, eps)


row_norm.register_fake(row_norm_shape)


@torch.library.custom_op("bcos_rt::dynamic_scale", mutates_args=())
def dynamic_scale(z: Tensor, n: Tensor, b: float, channel_dim: int) -> Tensor:
    """The multiplier ``m``, shape of ``z`` (see :func:`reference.dynamic_scale`); inference only."""
    return _own(reference.dynamic_scale(z, n, b, channel_dim), z)


@dynamic_scale.register_fake
def _(z: Tensor, n: Tensor, b: float, channel_dim: int) -> Tensor:
    return torch.empty_like(z)


def _own(out: Tensor, given: Tensor) -> Tensor:
    # An op must not return its own input.
    return out.clone() if out is given else out


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    b: float | Tensor = 2.0,
    eps: float = CONV_EPS,
) -> Tensor:
    """B-cos 2-D convolution, ``y = z * (|z| / n)^(B-1)`` with ``z = conv(x, weight) + bias``.

    Args:
        x: [N, C, H, W], floating point.
        weight: [O, C / groups, kh, kw].
        bias: [O] or None; part of ``z``.
        b: B >= 1. At 1 this is the plain convolution and no norm is computed. A 0-dimensional float32 tensor is a
            learned B: it gets a gradient, and takes the general formula ``(|z| / n + 1e-6)^(B-1)`` even at 1 and 2.

    Returns:
        [N, O, H', W'], differentiable in x, weight, bias and a learned B.

    Raises:
        InvalidArgumentError, InvalidTypeError: shapes, devices or dtypes that do not go together, named.
    """
    if isinstance(b, Tensor):
        learned: Tensor = _conv2d_learned_b(
            x, weight, bias, b, list(stride), list(padding), list(dilation), groups, eps
        )
        return learned
    if b == 1:
        return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    out: Tensor = _conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups, float(b), eps)
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, b: float | Tensor = 2.0, eps: float = LINEAR_EPS
) -> Tensor:
    """B-cos linear layer over the last dimension: x [..., C], weight [O, C] -> [..., O]; see :func:`conv2d`."""
    if isinstance(b, Tensor):
        learned: Tensor = _linear_learned_b(x, weight, bias, b, eps)
        return learned
    if b == 1:
        return F.linear(x, weight, bias)
    out: Tensor = _linear(x, weight, bias, float(b), eps)
    return out


# --- the fused forms: one kernel each, inference only ----------------------------------------------------------------


def _checked_conv(
    op: str,
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None,
    parameters: dict[str, Tensor | None],
    residual: Tensor | None,
    out_shape: Sequence[int],
    groups: int,
    b: float,
    activation: str,
    dim: int,
) -> None:
    _check(op, "x", x=x, weight=weight, squares=squares, residual=residual, **parameters)
    _check_b(op, b)
    _check_activation(op, activation)
    filters = weight.shape[0]
    _check_shape(
        op, residual=(residual, out_shape), **{name: (value, (filters,)) for name, value in parameters.items()}
    )
    _check_map(op, squares, x.shape, groups, dim)
    _check_size(op, "the result", x, math.prod(out_shape))
    if x.ndim == 4 and dim == 1:
        _check_size(op, "x, its channels padded to 8,", x, _padded(x))


def _check_conv2d_fused(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    b: float,
    eps: float,
    activation: str,
    *_: bool,
) -> None:
    shape = _conv_size("conv2d_fused", x.shape, weight, stride, padding, dilation, groups)
    # A depthwise convolution works its norm out itself: any map will do.
    entries = 1 if groups == x.shape[1] else groups
    parameters = {"bias": bias, "scale": scale, "shift": shift}
    _checked_conv("conv2d_fused", x, weight, squares, parameters, residual, shape, entries, b, activation, 1)


def _check_linear_fused(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    b: float,
    eps: float,
    activation: str,
    *_: bool,
) -> None:
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise InvalidArgumentError(
            "linear_fused: x, weight", f"shapes {tuple(x.shape)}, {tuple(weight.shape)}", "[..., C] and [O, C]"
        )
    shape = (*x.shape[:-1], weight.shape[0])
    parameters = {"bias": bias, "scale": scale, "shift": shift}
    _checked_conv("linear_fused", x, weight, squares, parameters, residual, shape, 1, b, activation, -1)


def _check_epilogue(
    op: str,
    shape: Sequence[int],
    dim: int,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
) -> None:
    """What the adjoints' shared epilogue needs: factors of N images for gradients of N * K, the identity like these."""
    _check_shape(op, identity=(identity, shape))
    packed = list(shape)
    packed[dim] = -(-shape[dim] // 8)
    images = None
    for name, factor in (("multiplier", multiplier), ("gate", gate)):
        if factor is None:
            continue
        wanted = packed if factor.dtype == torch.uint8 else list(shape)
        count = factor.shape[0] if factor.ndim else 0
        whole = count == 0 == shape[0] or (count > 0 and shape[0] % count == 0)
        if list(factor.shape[1:]) != wanted[1:] or not whole or (images is not None and images != count):
            raise InvalidArgumentError(
                f"{op}: {name}", f"shape {tuple(factor.shape)}",
                f"[N, {', '.join(map(str, wanted[1:]))}] with N a divisor of the gradient's {shape[0]} rows",
            )  # fmt: skip
        images = count


def _check_conv2d_transposed(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
) -> None:
    op = "conv2d_transposed"
    _check(op, "grad", grad=grad, weight=weight, multiplier=multiplier, identity=identity, gate=gate)
    if len(input_size) != 2 or weight.ndim != 4 or grad.ndim != 4:
        raise InvalidArgumentError(
            f"{op}: grad, weight, input_size",
            f"shapes {tuple(grad.shape)}, {tuple(weight.shape)} and {tuple(input_size)}",
            "[M, O, H', W'], [O, C / groups, kh, kw] and (H, W)",
        )
    shape = (grad.shape[0], weight.shape[1] * groups, *input_size)
    _check_shape(op, grad=(grad, _conv_size(op, shape, weight, stride, padding, dilation, groups)))
    _check_epilogue(op, shape, 1, multiplier, identity, gate)
    _check_size(op, "the result", grad, math.prod(shape))


def _check_linear_transposed(
    grad: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,
    identity: Tensor | None,
    gate: Tensor | None,
    want_raw: bool,
) -> None:
    op = "linear_transposed"
    _check(op, "grad", grad=grad, weight=weight, multiplier=multiplier, identity=identity, gate=gate)
    if grad.ndim < 2 or weight.ndim != 2 or grad.shape[-1] != weight.shape[0]:
        raise InvalidArgumentError(
            f"{op}: grad, weight", f"shapes {tuple(grad.shape)}, {tuple(weight.shape)}", "[M, ..., O] and [O, C]"
        )
    shape = (*grad.shape[:-1], weight.shape[1])
    _check_epilogue(op, shape, -1, multiplier, identity, gate)
    _check_size(op, "the result", grad, math.prod(shape))


def _check_conv2d_contributions(
    grad: Tensor,
    weight: Tensor,
    image: Tensor,
    inverse_std: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    want_weights: bool,
) -> None:
    op = "conv2d_contributions"
    _check(op, "grad", grad=grad, weight=weight, image=image, inverse_std=inverse_std)
    channels = inverse_std.numel()
    if channels not in (3, 6) or weight.ndim != 4 or weight.shape[1] < channels:
        raise InvalidArgumentError(
            f"{op}: weight, inverse_std", f"shapes {tuple(weight.shape)}, {tuple(inverse_std.shape)}",
            "the first layer's weight of 6 (or 3) input channels, and as many standard deviations",
        )  # fmt: skip
    _check_image(op, grad, image)
    shape = (grad.shape[0], weight.shape[1], *image.shape[2:])
    _check_size(op, "the result", grad, grad.shape[0] * channels * image.shape[2] * image.shape[3])
    _check_shape(op, grad=(grad, _conv_size(op, shape, weight, stride, padding, dilation, 1)))


def _check_image_contributions(
    grad: Tensor, image: Tensor, inverse_std: Tensor, scale: float, want_weights: bool
) -> None:
    op = "image_contributions"
    _check(op, "grad", grad=grad, image=image, inverse_std=inverse_std)
    channels = inverse_std.numel()
    _check_image(op, grad, image)
    if channels not in (3, 6) or grad.shape[1] < channels or grad.shape[2:] != image.shape[2:]:
        raise InvalidArgumentError(
            f"{op}: grad, inverse_std", f"shapes {tuple(grad.shape)}, {tuple(inverse_std.shape)}",
            f"[M, 6 (or 3) or more, {image.shape[2]}, {image.shape[3]}] and as many standard deviations",
        )  # fmt: skip


def _check_transposed_epilogue(
    total: Tensor, multiplier: Tensor | None, identity: Tensor | None, gate: Tensor | None, want_raw: bool
) -> None:
    op = "transposed_epilogue"
    _check(op, "total", total=total, multiplier=multiplier, identity=identity, gate=gate)
    if total.ndim < 2:
        raise InvalidArgumentError(f"{op}: total", f"shape {tuple(total.shape)}", "[M, C, H, W] or [M, ..., C]")
    _check_epilogue(op, tuple(total.shape), 1 if total.ndim == 4 else -1, multiplier, identity, gate)


def _check_scores(op: str, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Queries, keys and mask of one softmax."""
    if query.ndim != 4 or key.ndim != 4 or key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise InvalidArgumentError(
            f"{op}: query, key", f"shapes {tuple(query.shape)}, {tuple(key.shape)}", "[N, H, T, D], [N, H, S, D]"
        )
    if 0 in (key.shape[2], query.shape[3]):
        raise InvalidArgumentError(f"{op}: key", f"shape {tuple(key.shape)}", "at least one key, of one channel")
    if key.dtype != query.dtype:
        raise InvalidTypeError(f"{op}: key", f"dtype {key.dtype}", f"{query.dtype}, as query has")
    if mask is None:
        return
    full = (*query.shape[:3], key.shape[2])
    if mask.ndim > 4 or any(m not in (1, s) for m, s in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise InvalidArgumentError(f"{op}: mask", f"shape {tuple(mask.shape)}", f"one that broadcasts to {full}")
    if not mask.is_floating_point():
        raise InvalidTypeError(f"{op}: mask", f"dtype {mask.dtype}", "floating point: it is added to the scores")


def _check_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
    op = "attention"
    _check(op, "query", query=query, key=key, value=value, mask=mask)
    _check_scores(op, query, key, mask)
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise InvalidArgumentError(f"{op}: value", f"shape {tuple(value.shape)}", f"({key.shape[0]}, H, S, E) as key's")
    if value.dtype != query.dtype:
        raise InvalidTypeError(f"{op}: value", f"dtype {value.dtype}", f"{query.dtype}, as query has")
    _check_size(op, "the result", query, math.prod(query.shape[:3]) * value.shape[3])


def _check_attention_transposed(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> None:
    op = "attention_transposed"
    _check(op, "grad", grad=grad, query=query, key=key, lse=lse, mask=mask)
    _check_scores(op, query, key, mask)
    _check_shape(op, lse=(lse, query.shape[:3]))
    rows, images = grad.shape[0] if grad.ndim else 0, query.shape[0]
    if grad.ndim != 4 or grad.shape[1:3] != query.shape[1:3] or not (rows == images or (images and rows % images == 0)):
        raise InvalidArgumentError(
            f"{op}: grad", f"shape {tuple(grad.shape)}", f"[{images} K, H, T, E] for queries {tuple(query.shape)}"
        )
    if _use_triton(grad) and query.dtype not in STORAGE_DTYPES:
        raise InvalidTypeError(f"{op}: query", f"dtype {query.dtype}", "float16, bfloat16 or float32")
    _check_size(op, "the result", grad, math.prod(grad.shape[:2]) * key.shape[2] * grad.shape[3])


def _check_image(op: str, grad: Tensor, image: Tensor) -> None:
    rows, count = grad.shape[0], image.shape[0] if image.ndim else 0
    if image.ndim != 4 or image.shape[1] != 3 or not (rows == count or (count and rows % count == 0)):
        raise InvalidArgumentError(
            f"{op}: image", f"shape {tuple(image.shape)}",
            f"[N, 3, H, W] with N a divisor of the gradient's {grad.shape[0]} rows",
        )  # fmt: skip
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise InvalidTypeError(f"{op}: image", f"dtype {image.dtype}", "uint8 or floating point")


def _check_rows(op: str, name: str, factor: Tensor | None, shape: Sequence[int]) -> None:
    """A factor of N images for ``shape``'s N * K rows."""
    if factor is None:
        return
    rows, count = shape[0], factor.shape[0] if factor.ndim else 0
    if list(factor.shape[1:]) != list(shape[1:]) or not (rows == count or (count and rows % count == 0)):
        raise InvalidArgumentError(
            f"{op}: {name}", f"shape {tuple(factor.shape)}",
            f"[N, {', '.join(map(str, shape[1:]))}] with N a divisor of {rows} rows",
        )  # fmt: skip


def _check_layer(op: str, first: str, given: dict[str, Any]) -> None:
    """Pooling, norms and scale_act: what goes with their first argument. Windows are checked where they are used."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    # Their weights are parameters of float32, not operands.
    _check(op, first, **{("parameter " * (name == "weight") + name): value for name, value in tensors.items()})
    lead = given[first]
    tokens = op.startswith("layer_norm")
    if not tokens and lead.ndim != 4:
        raise InvalidArgumentError(f"{op}: {first}", f"shape {tuple(lead.shape)}", "four dimensions")
    if tokens and lead.ndim < 1:
        raise InvalidArgumentError(f"{op}: {first}", "a number", "at least one dimension")
    channels = lead.shape[-1 if tokens else 1]
    for name in ("weight", "bias", "scale", "shift"):
        _check_shape(op, **{name: (tensors.get(name), (channels,))})
    if op == "encode_image":
        count = 6 if given["six_channels"] else 3
        _check_shape(op, image=(lead, (lead.shape[0], 3, *lead.shape[2:])))
        _check_shape(op, mean=(given["mean"], (count,)), std=(given["std"], (count,)))
        if lead.dtype != torch.uint8 and not lead.is_floating_point():
            raise InvalidTypeError(f"{op}: image", f"dtype {lead.dtype}", "uint8 or floating point")
        _check_size(op, "the result", lead, lead.numel() // 3 * 8)
    if "input_size" in given:
        shape = (lead.shape[0], channels, *given["input_size"])
        window = [given[name] for name in ("kernel_size", "stride", "padding")]
        rest = (given["dilation"], False) if "dilation" in given else ((1, 1), given["ceil_mode"])
        size = reference_layers.pooled_size(given["input_size"], *window, *rest)
        if op == "avg_pool2d_transposed":
            _check_shape(op, grad=(lead, (lead.shape[0], channels, *size)))
        _check_rows(op, "index", tensors.get("index"), tuple(lead.shape))
        _check_epilogue(op, shape, 1, *(given[name] for name in ("multiplier", "identity", "gate")))
        _check_size(op, "the result", lead, math.prod(shape))
    else:
        _check_shape(op, identity=(tensors.get("identity"), tuple(lead.shape)))
    _check_rows(op, "x", None if first == "x" else tensors.get("x"), tuple(lead.shape))
    if "rstd" in given:
        rows = tuple(lead.shape[:-1]) if tokens else (lead.shape[0], given["groups"])
        if rows:
            _check_rows(op, "rstd", given["rstd"], rows)
    if "activation" in given:
        _check_activation(op, given["activation"])


def _fused(name: str, check: Callable[..., None] | None, first: str = "x") -> Callable[..., Any]:
    """Register ``bcos_rt::name``: the reference function's signature; checks; the kernels of the tensors' device.

    On fake tensors :data:`SHAPES` has the results' shapes, or the reference function itself: every backend returns the
    same.
    """
    plain = _REFERENCES[name]
    signature = inspect.signature(plain)

    def run(*args: Any) -> Any:
        if check is not None:
            check(*args)
        else:
            _check_layer(name, first, dict(zip(signature.parameters, args, strict=True)))
        kernel = _kernel(name, args[0])
        if name == "encode_image" and args[-1] not in STORAGE_DTYPES:
            kernel = _REFERENCES[name]
        # Kernels read parameters through a bare pointer. Autocast has no business in here: norms are fp32.
        with torch.autocast(args[0].device.type, enabled=False):
            return _distinct(kernel(*(a.contiguous() if isinstance(a, Tensor) and a.ndim == 1 else a for a in args)))

    def shapes(*args: Any) -> Any:
        return _distinct(SHAPES.get(name, plain)(*args))

    op = torch.library.custom_op(f"bcos_rt::{name}", run, mutates_args=(), schema=_schema(plain))
    op.register_fake(shapes)

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        _inference_only(name, **{k: v for k, v in bound.arguments.items() if isinstance(v, Tensor)})
        return op(*bound.args)

    return call


def _distinct(result: Any) -> Any:
    """An op's results must not share memory, and what was not asked for is one empty tensor in several places."""
    if not isinstance(result, tuple):
        return result
    # A static 0: asking a dynamic size whether it is 0 would pin it.
    return tuple(
        t.new_empty(0) if t.ndim == 1 and isinstance(t.shape[0], int) and t.shape[0] == 0 else t for t in result
    )


def _schema(function: Callable[..., Any]) -> str:
    """The op schema of ``function``'s annotations, without defaults (a schema takes no pairs as such)."""
    hints = get_type_hints(function)
    parameters = [
        p.replace(default=inspect.Parameter.empty, annotation=hints[p.name])
        for p in inspect.signature(function).parameters.values()
    ]

    def described(*args: Any) -> None: ...

    described.__signature__ = inspect.Signature(parameters, return_annotation=hints["return"])  # type: ignore[attr-defined]
    return torch.library.infer_schema(described, mutates_args=())


conv2d_fused = _fused("conv2d_fused", _check_conv2d_fused)
linear_fused = _fused("linear_fused", _check_linear_fused)
conv2d_transposed = _fused("conv2d_transposed", _check_conv2d_transposed)
linear_transposed = _fused("linear_transposed", _check_linear_transposed)
conv2d_contributions = _fused("conv2d_contributions", _check_conv2d_contributions)
image_contributions = _fused("image_contributions", _check_image_contributions, "grad")
transposed_epilogue = _fused("transposed_epilogue", _check_transposed_epilogue, "total")
square_sum = _fused("square_sum", None)
encode_image = _fused("encode_image", None, "image")
avg_pool2d = _fused("avg_pool2d", None)
max_pool2d = _fused("max_pool2d", None)
avg_pool2d_transposed = _fused("avg_pool2d_transposed", None, "grad")
max_pool2d_transposed = _fused("max_pool2d_transposed", None, "grad")
scale_act = _fused("scale_act", None)
scale_act_transposed = _fused("scale_act_transposed", None, "grad")
layer_norm = _fused("layer_norm", None)
layer_norm_transposed = _fused("layer_norm_transposed", None, "grad")
group_norm = _fused("group_norm", None)
group_norm_transposed = _fused("group_norm_transposed", None, "grad")
attention = _fused("attention", _check_attention, "query")
attention_transposed = _fused("attention_transposed", _check_attention_transposed, "grad")

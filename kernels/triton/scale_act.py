"""A per-channel scale, a shift and an activation between a producer and a B-cos layer (pre-activation networks).

    y = act(u) = gate(u) u        u = scale_c x + shift_c
    squares = sum over the channels of a group of y^2                       (what the next layer's norm is made of)

and, for an explanation, its adjoint with the gate held constant (of image m // K, where every image has K classes):

    out = grad scale_c gate(scale_c x + shift_c) + identity
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError, did_you_mean
from bcos_rt.kernels.triton.channel_tiles import channel_tile, place_tile, store_squares, tile_arguments, total_channels
from bcos_rt.kernels.triton.common import ACTIVATIONS, activate, activation_gate, empty, nhwc
from bcos_rt.kernels.triton.launch import Config, launch

__all__ = ["scale_act", "scale_act_transposed"]


@triton.jit
def scale_act_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    squares_ptr,
    places_total,
    units,
    groups,
    chunks,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``y = gate(u) u`` with ``u = scale_c x + shift_c``, of one tile, and optionally its squares."""
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place_in = places < places_total
    channel, channel_in = channel_tile(units, groups, chunks, UNIT, EXACT, PARTS, WIDTH)
    offset = places[:, None] * total_channels(units, groups, UNIT, EXACT) + channel[None, :]
    mask = place_in[:, None] & channel_in[None, :]
    scale = tl.load(scale_ptr + channel, mask=channel_in, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=channel_in, other=0.0)
    u = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    y = activate(u, activation_gate(u, ACTIVATION), ACTIVATION)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, y, mask=mask)
    if squares_ptr is not None:
        store_squares(
            y.to(tl.float32), squares_ptr, places, place_in, channel_in, groups * chunks, BLOCK_M, PARTS, WIDTH
        )


@triton.jit
def scale_act_transposed_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    identity_ptr,
    out_ptr,
    places_total,
    image_places,
    per_image,
    units,
    groups,
    chunks,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``out = grad scale_c gate(scale_c x + shift_c) + identity``, of one tile; x of the gradient's image."""
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place_in = places < places_total
    channel, channel_in = channel_tile(units, groups, chunks, UNIT, EXACT, PARTS, WIDTH)
    channels = total_channels(units, groups, UNIT, EXACT)
    offset = places[:, None] * channels + channel[None, :]
    x_places = places // (image_places * per_image) * image_places + places % image_places
    mask = place_in[:, None] & channel_in[None, :]
    scale = tl.load(scale_ptr + channel, mask=channel_in, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=channel_in, other=0.0)
    x = tl.load(x_ptr + x_places[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    slope = scale[None, :] * activation_gate(x * scale[None, :] + shift[None, :], ACTIVATION)
    out = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32) * slope
    if identity_ptr is not None:
        out += tl.load(identity_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        raise InvalidArgumentError("activation", name, f"one of {list(ACTIVATIONS)}", did_you_mean(name, ACTIVATIONS))
    return ACTIVATIONS[name]


def scale_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    want_squares: bool = False,
    groups: int = 1,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``act(scale_c x + shift_c)`` and its map; see :func:`bcos_rt.kernels.ops.scale_act`."""
    x = nhwc(x)
    batch, height, width, channels = x.shape
    places = batch * height * width
    groups = groups if want_squares else 1
    tile = config or place_tile(channels, groups)
    programs, parts, arguments = tile_arguments(channels, groups, tile)
    y = empty(x, x.shape)
    squares = empty(x, (batch, height, width, parts), torch.float32) if want_squares else None
    launch(
        "scale_act",
        scale_act_kernel,
        (-(-places // tile.block_m), programs),
        tile,
        {
            "x_ptr": x,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "y_ptr": y,
            "squares_ptr": squares,
            "places_total": places,
            "ACTIVATION": _activation(activation),
            **arguments,
        },
        vector_operands=arguments["UNIT"] * x.element_size() >= 16,
        dtype=x.dtype,
    )
    return y.permute(0, 3, 1, 2), x.new_empty(0) if squares is None else squares.permute(0, 3, 1, 2)


def scale_act_transposed(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    identity: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Adjoint of :func:`scale_act`, the gate constant; see :func:`bcos_rt.kernels.ops.scale_act_transposed`."""
    per_image = grad.shape[0] // max(x.shape[0], 1)
    grad, x = nhwc(grad), nhwc(x)
    batch, height, width, channels = grad.shape
    places = batch * height * width
    tile = config or place_tile(channels)
    programs, _, arguments = tile_arguments(channels, 1, tile)
    out = empty(grad, grad.shape)
    launch(
        "scale_act_transposed",
        scale_act_transposed_kernel,
        (-(-places // tile.block_m), programs),
        tile,
        {
            "grad_ptr": grad,
            "x_ptr": x,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "identity_ptr": None if identity is None else nhwc(identity),
            "out_ptr": out,
            "places_total": places,
            "image_places": height * width,
            "per_image": per_image,
            "ACTIVATION": _activation(activation),
            **arguments,
        },
        vector_operands=arguments["UNIT"] * grad.element_size() >= 16,
        dtype=grad.dtype,
    )
    return out.permute(0, 3, 1, 2)

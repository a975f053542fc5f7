"""A network's input out of an image in one pass: ``[x, 1 - x]``, normalised, channels last, padded; map of squares.

    x = image / 255 for uint8, else image             v = [x_r, x_g, x_b, 1 - x_r, 1 - x_g, 1 - x_b]   (or x alone)
    encoded[n, h, w, c] = (v_c - mean_c) / std_c      zeros for the channels up to 8
    squares[n, h, w] = sum over c of encoded[n, h, w, c]^2

B-cos networks encode an image with its inverse so that a pixel's direction, not its size, says its colour
(arXiv 2205.10268, section 3.3). Eight channels are 16 bytes a pixel in 16-bit storage: one store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels.reference_layers import ENCODED_CHANNELS
from bcos_rt.kernels.triton.common import empty
from bcos_rt.kernels.triton.launch import Config, launch

__all__ = ["encode_image"]


@triton.jit
def _standardised(v, mean_ptr, std_ptr, c: tl.constexpr, DTYPE: tl.constexpr):
    return ((v - tl.load(mean_ptr + c)) / tl.load(std_ptr + c)).to(DTYPE)


@triton.jit
def encode_image_kernel(
    image_ptr,
    mean_ptr,
    std_ptr,
    encoded_ptr,
    squares_ptr,
    pixels_total,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    BYTES: tl.constexpr,
    SIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The 8 channels of BLOCK_M pixels and their sums of squares; planes are read once, whatever their strides."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels_total
    row = pixel // width
    offset = (row // height) * stride_n + (row % height) * stride_h + (pixel % width) * stride_w
    r = tl.load(image_ptr + offset, mask=inside, other=0).to(tl.float32)
    g = tl.load(image_ptr + offset + stride_c, mask=inside, other=0).to(tl.float32)
    b = tl.load(image_ptr + offset + 2 * stride_c, mask=inside, other=0).to(tl.float32)
    if BYTES:
        r = r / 255.0
        g = g / 255.0
        b = b / 255.0
    dtype: tl.constexpr = encoded_ptr.dtype.element_ty
    zero = tl.zeros((BLOCK_M,), dtype)
    c0 = _standardised(r, mean_ptr, std_ptr, 0, dtype)
    c1 = _standardised(g, mean_ptr, std_ptr, 1, dtype)
    c2 = _standardised(b, mean_ptr, std_ptr, 2, dtype)
    c3, c4, c5 = zero, zero, zero
    if SIX:
        c3 = _standardised(1.0 - r, mean_ptr, std_ptr, 3, dtype)
        c4 = _standardised(1.0 - g, mean_ptr, std_ptr, 4, dtype)
        c5 = _standardised(1.0 - b, mean_ptr, std_ptr, 5, dtype)
    # Joins put a pixel's values side by side within its thread; the outermost join is the lowest bit of the channel.
    even = tl.join(tl.join(c0, c4), tl.join(c2, zero))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, zero))
    encoded = tl.reshape(tl.join(even, odd), (BLOCK_M, 8))
    tl.store(encoded_ptr + pixel[:, None] * 8 + tl.arange(0, 8)[None, :], encoded, mask=inside[:, None])
    wide = encoded.to(tl.float32)
    tl.store(squares_ptr + pixel, tl.sum(wide * wide, 1), mask=inside)


def encode_image(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    six_channels: bool = True,
    dtype: torch.dtype = torch.float32,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """An image's encoding and its map; see :func:`bcos_rt.kernels.ops.encode_image`.

    Raises:
        InvalidArgumentError: an image without three channels, or other than 6 (or 3) means or deviations.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise InvalidArgumentError("image", tuple(image.shape), "[N, 3, H, W]")
    for name, values in (("mean", mean), ("std", std)):
        if values.numel() != (6 if six_channels else 3):
            raise InvalidArgumentError(name, tuple(values.shape), "[6]" if six_channels else "[3]")
    if sum((size - 1) * stride for size, stride in zip(image.shape, image.stride(), strict=True)) >= 2**31:
        # Offsets are 32 bits: a view spread over more than that is packed first.
        image = image.contiguous()
    batch, _, height, width = image.shape
    pixels = batch * height * width
    # A pixel a thread: then the stores of a warp are one run of bytes.
    tile = config or Config(128, ENCODED_CHANNELS)
    encoded = empty(image, (batch, height, width, ENCODED_CHANNELS), dtype)
    squares = empty(image, (batch, height, width, 1), torch.float32)
    launch(
        "encode_image",
        encode_image_kernel,
        (-(-pixels // tile.block_m),),
        tile,
        {
            "image_ptr": image,
            "mean_ptr": mean.contiguous(),
            "std_ptr": std.contiguous(),
            "encoded_ptr": encoded,
            "squares_ptr": squares,
            "pixels_total": pixels,
            "height": height,
            "width": width,
            "stride_n": image.stride(0),
            "stride_c": image.stride(1),
            "stride_h": image.stride(2),
            "stride_w": image.stride(3),
            "BYTES": image.dtype == torch.uint8,
            "SIX": six_channels,
            "BLOCK_M": tile.block_m,
        },
        vector_operands=False,
        dtype=dtype,
    )
    return encoded.permute(0, 3, 1, 2), squares.permute(0, 3, 1, 2)

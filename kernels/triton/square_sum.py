"""Channel sums of squares of a tensor that no fused producer wrote a map for.

squares[n, g, h, w] = sum over the channels of group g of x[n, c, h, w]^2        (fp32, whatever x is)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.triton.common import empty, nhwc
from bcos_rt.kernels.triton.launch import Config, launch

__all__ = ["row_square_sum", "square_sum"]


@triton.jit
def square_sum_kernel(x_ptr, squares_ptr, rows_total, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = rows < rows_total
    columns = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for c in range(0, channels, BLOCK_N):
        mask = row_in[:, None] & (c + columns < channels)[None, :]
        x = tl.load(x_ptr + rows[:, None] * channels + (c + columns)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(squares_ptr + rows, total, mask=row_in)


def _rows(x: Tensor, channels: int, config: Config | None) -> Tensor:
    """fp32 [rows, 1] of contiguous x taken as rows of ``channels``."""
    rows = x.numel() // channels
    # 4096 elements a program keep 128-bit loads of every thread in flight a few times over.
    block_n = min(triton.next_power_of_2(channels), 256)
    tile = config or Config(max(4096 // block_n, 8), block_n)
    squares = empty(x, (rows, 1), torch.float32)
    launch(
        "square_sum",
        square_sum_kernel,
        (-(-rows // tile.block_m),),
        tile,
        {
            "x_ptr": x,
            "squares_ptr": squares,
            "rows_total": rows,
            "channels": channels,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        vector_operands=False,
        dtype=x.dtype,
    )
    return squares


def square_sum(x: Tensor, groups: int = 1, config: Config | None = None) -> Tensor:
    """[N, C, H, W] -> [N, groups, H, W] float32, channels-last."""
    n, channels, height, width = x.shape
    squares = _rows(nhwc(x), channels // groups, config)
    return squares.view(n, height, width, groups).permute(0, 3, 1, 2)


def row_square_sum(x: Tensor, config: Config | None = None) -> Tensor:
    """[..., C] -> [..., 1] float32."""
    return _rows(x.contiguous(), x.shape[-1], config).view(*x.shape[:-1], 1)

# ruff: noqa: N803 (compile-time constants are upper case, as in the product's kernels)
"""Small Triton kernels, some of which break a rule of the compile job on purpose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bcos_rt.kernels.triton.launch import Config, Launch, launch, recording


@triton.jit
def matmul_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    squares_ptr,
    rows,
    columns_units,
    length_units,
    DOT: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = columns_units * 16
    length = length_units * BLOCK_K
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, length, BLOCK_K):
        a = tl.load(x_ptr + m[:, None] * length + (start + k)[None, :])
        b = tl.load(weight_ptr + n[None, :] * length + (start + k)[:, None])
        if DOT:
            acc = tl.dot(a, b, acc)
        else:
            acc += tl.sum(a[:, :, None].to(tl.float32) * b[None, :, :].to(tl.float32), 1)
        if SQUARES:
            # What the design keeps out of the loop.
            squares += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
    if SQUARES:
        tl.store(squares_ptr + m, squares, mask=m < rows)
    tl.store(y_ptr + m[:, None] * columns + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=m[:, None] < rows)


def matmul(
    arch: str, *, dot: bool = True, squares: bool = False, aligned: bool = True, config: Config | None = None
) -> Launch:
    """The launch of a product [512, 256] x [256, 512] in bf16, without its alignment if so wished."""
    tile = config or Config(64, 64, 32, 4, 2)

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        # One element into its storage: no longer on 16 bytes.
        flat = torch.empty(shape[0] * shape[1] + 1, dtype=dtype, device="meta")
        return flat[0 if aligned else 1 :][: shape[0] * shape[1]].view(shape)

    with recording(arch) as launches:
        launch(
            "small_matmul",
            matmul_kernel,
            (8, 8),
            tile,
            {
                "x_ptr": tensor(512, 256),
                "weight_ptr": tensor(512, 256),
                "y_ptr": tensor(512, 512),
                "squares_ptr": tensor(512, 1, dtype=torch.float32),
                "rows": 512,
                "columns_units": 32,
                "length_units": 256 // tile.block_k,
                "DOT": dot,
                "SQUARES": squares,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
            },
            gemm=True,
            vector_operands=True,
            plain=not squares,
        )
    return launches[0]

"""Attention with its log-sum-exp, and its adjoint in the values, both without a matrix of all tokens.

    P = softmax(scale q k^T + mask)     out = P v     lse = log sum_s exp(scale q k^T + mask)     P = exp(... - lse)

An explanation holds P constant, so the adjoint is ``grad_v = P^T grad``: it needs q, k and lse, from which each tile of
P is made again in registers. K classes of an image stand side by side in one tile of gradients, so that a tile of P
serves all of them (as many as fit).

Forward (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 1; the order of arXiv 2307.08691): a program keeps
BLOCK_M queries and goes through the keys, with a running maximum b and sum l that rescale what was summed so far::

    b' = max(b, max_s x)     p = 2^(x - b')     l = l 2^(b - b') + sum_s p     acc = acc 2^(b - b') + p v

where ``x = log2(e) (scale q k^T + mask)``: the hardware has an instruction for 2^x, and e^x is two. Transposed: a
program keeps BLOCK_N keys and goes through the queries; nothing is rescaled, since lse is known. Head sizes are padded
to powers of two with zeros. Scores, sums and lse are fp32; P is rounded to the other operand's type for its product. A
query whose keys are all shut out (-inf) has out = lse = 0, which makes its P zero in the adjoint.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels import blocked_attention
from bcos_rt.kernels.triton import tune
from bcos_rt.kernels.triton.common import dot_precision, empty, split_columns
from bcos_rt.kernels.triton.launch import Config, current_arch, launch

__all__ = ["MAX_HEAD", "attention", "attention_transposed"]

# Channels of a head that a program's tiles have room for; more go through plain PyTorch.
MAX_HEAD = 128

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    scale,
    heads,
    tokens,
    keys,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    v_image,
    v_head,
    v_token,
    mask_image,
    mask_head,
    mask_token,
    mask_key,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M queries of one head: out and lse. ``scale`` has log2(e) in it; ``*_image`` to ``*_key`` are strides."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    sequence = tl.program_id(0) // tiles
    image = sequence // heads
    head = sequence % heads
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = row < tokens
    inner = tl.arange(0, BLOCK_D)
    outer = tl.arange(0, BLOCK_E)
    inner_in = inner < INNER
    outer_in = outer < OUTER
    q_tile = q_ptr + image * q_image + head * q_head + row[:, None] * q_token + inner[None, :]
    q = tl.load(q_tile, mask=row_in[:, None] & inner_in[None, :], other=0.0)
    k_base = k_ptr + image * k_image + head * k_head
    v_base = v_ptr + image * v_image + head * v_head

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for first in range(0, keys, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        column_in = column < keys
        k_tile = k_base + column[None, :] * k_token + inner[:, None]
        k = tl.load(k_tile, mask=column_in[None, :] & inner_in[:, None], other=0.0)
        x = tl.dot(q, k, input_precision=PRECISION) * scale
        if mask_ptr is not None:
            mask_tile = mask_ptr + image * mask_image + head * mask_head
            mask_tile += row[:, None] * mask_token + column[None, :] * mask_key
            added = tl.load(mask_tile, mask=row_in[:, None] & column_in[None, :], other=0.0)
            x += added.to(tl.float32) * LOG2_E
        x = tl.where(column_in[None, :], x, float("-inf"))
        higher = tl.maximum(best, tl.max(x, 1))
        shift = higher
        if mask_ptr is not None:
            # As long as every key was shut out: -inf - -inf would be NaN.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(x - shift[:, None])
        rescale = tl.exp2(best - shift)
        total = total * rescale + tl.sum(p, 1)
        v_tile = v_base + column[:, None] * v_token + outer[None, :]
        v = tl.load(v_tile, mask=column_in[:, None] & outer_in[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        best = higher

    present = total > 0
    acc *= tl.where(present, 1.0 / tl.where(present, total, 1.0), 0.0)[:, None]
    # [N, T, H, E] in memory.
    place = (image * tokens + row) * heads + head
    parts = split_columns(acc, PARTS)
    for part in tl.static_range(PARTS):
        out_column = part * (BLOCK_E // PARTS) + tl.arange(0, BLOCK_E // PARTS)
        tl.store(
            out_ptr + place[:, None] * OUTER + out_column[None, :],
            parts[part].to(out_ptr.dtype.element_ty),
            mask=row_in[:, None] & (out_column < OUTER)[None, :],
        )
    lse = tl.where(present, (best + tl.log2(tl.where(present, total, 1.0))) * LN_2, 0.0)
    tl.store(lse_ptr + (image * heads + head) * tokens + row, lse, mask=row_in)


@triton.jit
def attention_transposed_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    mask_ptr,
    out_ptr,
    scale,
    heads,
    tokens,
    keys,
    classes,
    grad_row,
    grad_head,
    grad_token,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    mask_image,
    mask_head,
    mask_token,
    mask_key,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """BLOCK_N keys of one head (grid axis 0) and CLASSES classes of its image (axis 1): ``P^T grad``."""
    tiles = tl.cdiv(keys, BLOCK_N)
    sequence = tl.program_id(0) // tiles
    image = sequence // heads
    head = sequence % heads
    key = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    key_in = key < keys
    inner = tl.arange(0, BLOCK_D)
    inner_in = inner < INNER
    column = tl.arange(0, CLASSES * BLOCK_E)
    one = tl.program_id(1) * CLASSES + column // BLOCK_E
    outer = column % BLOCK_E
    column_in = (one < classes) & (outer < OUTER)
    k_tile = k_ptr + image * k_image + head * k_head + key[:, None] * k_token + inner[None, :]
    k = tl.load(k_tile, mask=key_in[:, None] & inner_in[None, :], other=0.0)
    q_base = q_ptr + image * q_image + head * q_head
    grad_columns = (image * classes + one) * grad_row + head * grad_head + outer
    lse_base = lse_ptr + (image * heads + head) * tokens

    acc = tl.zeros((BLOCK_N, CLASSES * BLOCK_E), tl.float32)
    for first in range(0, tokens, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_in = row < tokens
        q = tl.load(
            q_base + row[None, :] * q_token + inner[:, None], mask=row_in[None, :] & inner_in[:, None], other=0.0
        )
        x = tl.dot(k, q, input_precision=PRECISION) * scale
        if mask_ptr is not None:
            mask_tile = mask_ptr + image * mask_image + head * mask_head
            mask_tile += row[None, :] * mask_token + key[:, None] * mask_key
            added = tl.load(mask_tile, mask=row_in[None, :] & key_in[:, None], other=0.0)
            x += added.to(tl.float32) * LOG2_E
        # No such query: P = 0.
        lse = tl.load(lse_base + row, mask=row_in, other=float("inf"))
        p = tl.exp2(x - (lse * LOG2_E)[None, :])
        grad_tile = grad_ptr + grad_columns[None, :] + row[:, None] * grad_token
        grad = tl.load(grad_tile, mask=row_in[:, None] & column_in[None, :], other=0.0)
        acc = tl.dot(p.to(grad.dtype), grad, acc, input_precision=GRAD_PRECISION)

    parts = split_columns(acc, PARTS)
    for part in tl.static_range(PARTS):
        out_column = part * (CLASSES * BLOCK_E // PARTS) + tl.arange(0, CLASSES * BLOCK_E // PARTS)
        out_class = tl.program_id(1) * CLASSES + out_column // BLOCK_E
        out_outer = out_column % BLOCK_E
        place = (((image * classes + out_class) * heads + head) * keys)[None, :] + key[:, None]
        tl.store(
            out_ptr + place * OUTER + out_outer[None, :],
            parts[part].to(out_ptr.dtype.element_ty),
            mask=key_in[:, None] & ((out_class < classes) & (out_outer < OUTER))[None, :],
        )


def _padded(size: int) -> int:
    """A head size as a tile has it: what ``tl.dot`` sums over is a power of two of at least 16."""
    return max(int(triton.next_power_of_2(size)), 16)


# Columns of gradients in a program: at most so many classes times (padded) head size, by bits of an operand.
_COLUMNS = {16: 256, 32: 128}
_COLUMNS_AMD = {16: 128, 32: 128}


def _tile(arch: str, width: int, bits: int, transposed: bool) -> Config:
    """Queries, keys, warps and stages for a (padded) head size, transposed for columns, of ``width``.

    Chosen so that nothing spills on any target, with a mask too: the fullest that were tried did.
    """
    if arch == "interpreter":
        return Config(32, 32)
    place = tune.family(arch)
    # Mma instructions of sm_80 and sm_120 keep every operand in registers.
    few = place in ("sm_80", "sm_120")
    if bits == 32:
        return Config(64 if width <= 64 and (transposed or not few) else 32, 32, num_warps=8, num_stages=2)
    if transposed:
        return Config(32, 64, num_warps=4 if width <= 64 else 8, num_stages=2)
    keys = 32 if width > 64 or place == "gfx942" else 64
    return Config(64 if few else 128, keys, num_warps=8, num_stages=2)


def _parts(arch: str) -> int:
    """AMD's matrix cores leave a result so that it is stored 8 bytes at a time, unless it is taken apart first."""
    return 2 if arch.startswith("gfx") else 1


def _readable(x: Tensor) -> Tensor:
    """Any strides but of the innermost dimension, whose elements are neighbours; offsets are 32-bit."""
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and span < 2**31 else x.contiguous()


def _mask_arguments(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, dict[str, int]]:
    """The mask and its strides, 0 where it is broadcast to [N, H, T, S]."""
    names = ("mask_image", "mask_head", "mask_token", "mask_key")
    if mask is None:
        return None, dict.fromkeys(names, 0)
    if mask.dtype == torch.float64:
        mask = mask.float()
    return mask, dict(zip(names, mask.expand(shape).stride(), strict=True))


def _strides(name: str, x: Tensor, first: str = "image") -> dict[str, int]:
    return {f"{name}_{first}": x.stride(0), f"{name}_head": x.stride(1), f"{name}_token": x.stride(2)}


def _aligned(mask: Tensor | None, *operands: Tensor) -> bool:
    """Whether every token of every operand starts on 16 bytes, and no mask of an operand's type says otherwise."""
    last = 0 if mask is None or mask.dtype not in {t.dtype for t in operands} else mask.shape[-1]
    return last * operands[0].element_size() % 16 == 0 and all(
        t.shape[3] * t.element_size() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:3])
        for t in operands
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; see :func:`bcos_rt.kernels.ops.attention`."""
    if max(query.shape[3], value.shape[3]) > MAX_HEAD:
        return blocked_attention.attention(query, key, value, mask, scale)
    query, key, value = _readable(query), _readable(key), _readable(value)
    images, heads, tokens, inner = query.shape
    keys, outer = key.shape[2], value.shape[3]
    arch = current_arch(query.device)
    block_d, block_e = _padded(inner), _padded(outer)
    tile = config or _tile(arch, max(block_d, block_e), 8 * query.element_size(), False)
    out = empty(query, (images, tokens, heads, outer))
    lse = empty(query, (images, heads, tokens), torch.float32)
    mask, mask_strides = _mask_arguments(mask, (images, heads, tokens, keys))
    launch(
        "attention",
        attention_kernel,
        (-(-tokens // tile.block_m) * images * heads,),
        tile,
        {
            "q_ptr": query,
            "k_ptr": key,
            "v_ptr": value,
            "mask_ptr": mask,
            "out_ptr": out,
            "lse_ptr": lse,
            "scale": scale * math.log2(math.e),
            "heads": heads,
            "tokens": tokens,
            "keys": keys,
            **_strides("q", query),
            **_strides("k", key),
            **_strides("v", value),
            **mask_strides,
            "INNER": inner,
            "OUTER": outer,
            "BLOCK_D": block_d,
            "BLOCK_E": block_e,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "PARTS": _parts(arch),
            "PRECISION": dot_precision(query.dtype, arch),
        },
        gemm=True,
        vector_operands=_aligned(mask, query, key, value),
        dtype=query.dtype,
    )
    return out.transpose(1, 2), lse


def attention_transposed(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    config: Config | None = None,
) -> Tensor:
    """The adjoint of :func:`attention` in its values; see :func:`bcos_rt.kernels.ops.attention_transposed`."""
    if max(query.shape[3], grad.shape[3]) > MAX_HEAD:
        return blocked_attention.attention_transposed(grad, query, key, lse, mask, scale)
    grad, query, key = _readable(grad), _readable(query), _readable(key)
    images, heads, tokens, inner = query.shape
    keys, outer = key.shape[2], grad.shape[3]
    classes = grad.shape[0] // max(images, 1)
    arch = current_arch(grad.device)
    block_d, block_e = _padded(inner), _padded(outer)
    bits = 8 * max(grad.element_size(), query.element_size())
    columns = (_COLUMNS_AMD if arch.startswith("gfx") else _COLUMNS)[bits]
    together = max(min(triton.next_power_of_2(classes), columns // block_e), 1)
    tile = config or _tile(arch, max(block_d, block_e * together), bits, True)
    out = empty(grad, (grad.shape[0], heads, keys, outer))
    mask, mask_strides = _mask_arguments(mask, (images, heads, tokens, keys))
    launch(
        "attention_transposed",
        attention_transposed_kernel,
        (-(-keys // tile.block_n) * images * heads, -(-classes // together)),
        tile,
        {
            "grad_ptr": grad,
            "q_ptr": query,
            "k_ptr": key,
            "lse_ptr": lse.float().contiguous(),
            "mask_ptr": mask,
            "out_ptr": out,
            "scale": scale * math.log2(math.e),
            "heads": heads,
            "tokens": tokens,
            "keys": keys,
            "classes": classes,
            **_strides("grad", grad, "row"),
            **_strides("q", query),
            **_strides("k", key),
            **mask_strides,
            "INNER": inner,
            "OUTER": outer,
            "BLOCK_D": block_d,
            "BLOCK_E": block_e,
            "CLASSES": together,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "PARTS": _parts(arch),
            "PRECISION": dot_precision(query.dtype, arch),
            "GRAD_PRECISION": dot_precision(grad.dtype, arch),
        },
        gemm=True,
        vector_operands=_aligned(mask, grad, query, key),
        dtype=grad.dtype,
    )
    return out

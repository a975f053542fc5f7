"""Attention in plain PyTorch without a matrix of all its tokens: any float dtype, any device.

The functions mean what :mod:`bcos_rt.kernels.reference` says. Scores are made block by block, of :data:`BLOCK` numbers
each, and dropped: of several images and heads where there are few tokens, of some queries of one head where there are
many. The adjoint works each block out again from the queries, the keys and the softmax's log-sum-exp, once for all
classes of an image, whose gradients stand side by side in one matrix product. Sums are at least float32.

Forward, PyTorch's own CPU kernel (which also returns the log-sum-exp) does the same in one call where it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bcos_rt.kernels.reference import norm_dtype

__all__ = ["BLOCK", "attention", "attention_transposed"]

# Scores of a block: 1 MiB in float32, about a processor's second-level cache. The adjoint of 2 images, 6 heads of 64
# channels and 577 tokens took 29, 25, 21, 21 and 25 ms with blocks of 2^16, 2^17, 2^18, 2^20 and 2^22 (one thread).
BLOCK = 1 << 18


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See :func:`bcos_rt.kernels.reference.attention`."""
    if query.device.type == "cpu" and query.shape[3] == value.shape[3] and (mask is None or mask.dtype == query.dtype):
        given = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        # It takes the innermost dimension as it comes, if it is contiguous.
        tensors = [t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value)]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, False, attn_mask=given, scale=scale
        )
        # Its layout follows the queries', which is ours where they come from one projection of the tokens.
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    images, heads, tokens, _ = query.shape
    wide = norm_dtype(query)
    out = query.new_empty((images, tokens, heads, value.shape[3])).transpose(1, 2)
    lse = query.new_empty((images, heads, tokens), dtype=wide)
    for at, head in _heads(query, key):
        values = value[at, head].to(wide)
        for row in _rows(query, key):
            scores = _scores(query, key, mask, scale, at, head, row)
            block = scores.logsumexp(-1)
            block.masked_fill_(block == -math.inf, 0)
            lse[at, head, row] = block
            out[at, head, row] = torch.matmul(scores.sub_(block[..., None]).exp_(), values).to(out.dtype)
    return out, lse


def attention_transposed(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """See :func:`bcos_rt.kernels.reference.attention_transposed`."""
    images, heads, tokens, _ = query.shape
    keys, columns = key.shape[2], grad.shape[3]
    out = grad.new_empty((grad.shape[0], heads, keys, columns))
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    classes = grad.shape[0] // images
    wide = torch.promote_types(norm_dtype(grad), norm_dtype(query))
    # [N, H, tokens, K, E]: the classes of an image side by side.
    given, result = (torch.unflatten(t, 0, (images, classes)).permute(0, 2, 3, 1, 4) for t in (grad, out))
    for at, head in _heads(query, key):
        total: Tensor | None = None
        for row in _rows(query, key):
            scores = _scores(query, key, mask, scale, at, head, row)
            probabilities = scores.sub_(lse[at, head, row, None]).exp_().to(wide)
            part = torch.matmul(probabilities.transpose(-2, -1), given[at, head, row].flatten(3).to(wide))
            total = part if total is None else total.add_(part)
        if total is not None:
            result[at, head] = torch.unflatten(total, -1, (classes, columns)).to(out.dtype)
    return out


def _heads(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and heads that go together."""
    images, heads, tokens, _ = query.shape
    together = max(BLOCK // max(min(tokens * key.shape[2], BLOCK), 1), 1)
    some_heads, some_images = min(together, max(heads, 1)), max(together // max(heads, 1), 1)
    for i in range(0, images, some_images):
        for h in range(0, heads, some_heads):
            yield slice(i, i + some_images), slice(h, h + some_heads)


def _rows(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Queries that go together."""
    tokens = query.shape[2]
    some = max(BLOCK // key.shape[2], 1)
    # Blocks of about one size: a short last one would cost as much as a long one.
    some = -(-tokens // -(-tokens // some)) if tokens else 1
    for t in range(0, tokens, some):
        yield slice(t, t + some)


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, at: slice, head: slice, row: slice
) -> Tensor:
    """``scale q k^T + mask`` of some images, heads and queries, in at least float32."""
    wide = norm_dtype(query)
    scores = torch.matmul(query[at, head, row].to(wide) * scale, key[at, head].to(wide).transpose(-2, -1))
    if mask is not None:
        full = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        part = [i if n > 1 else slice(None) for i, n in zip((at, head, row), full.shape, strict=False)]
        scores += full[tuple(part)]
    return scores

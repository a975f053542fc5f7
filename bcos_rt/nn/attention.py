"""Attention layers that call their projections, where the layers they stand for read the projections' weights.

``torch.nn.MultiheadAttention`` and its relatives hand the weights of their linear layers to a function. A B-cos layer
put in such a projection's place would never be called. :func:`call_projections` makes, of a layer like that, one of the
same function, the same submodules and the same state-dict keys whose forward calls the submodules.

In an explanation attention is linear in its values, the softmax held constant (B-cos v2, arXiv 2306.10898, section
3.4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PROJECTIONS", "AttentionPool", "MultiheadAttention", "WindowAttention", "call_projections"]


class MultiheadAttention(nn.Module):
    """``out_proj(softmax(q k^T / sqrt(d)) v)``, arguments and results as :class:`torch.nn.MultiheadAttention`'s.

    Attributes:
        in_proj_weight, in_proj_bias: of q, k and v one below the other, [3 E, E] and [3 E].
        out_proj: the output projection, a module of its own.
    """

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = old.embed_dim, old.num_heads, old.dropout
        self.batch_first = old.batch_first
        self.in_proj_weight = old.in_proj_weight
        self.register_parameter("in_proj_bias", old.in_proj_bias)
        out = nn.Linear(old.embed_dim, old.embed_dim, bias=False, device="meta")
        out.weight = old.out_proj.weight
        out.register_parameter("bias", old.out_proj.bias)
        self.out_proj: nn.Module = out

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        mask = _merged_mask(attn_mask, key_padding_mask, self.num_heads, q.dtype)
        probabilities: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores + mask
            probabilities = F.dropout(scores.softmax(-1), self.dropout, self.training)
            out = probabilities @ v
            if average_attn_weights:
                probabilities = probabilities.mean(1)
        else:
            dropout = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
        out = out.transpose(1, 2).flatten(2)
        result: Tensor = self.out_proj(out if self.batch_first else out.transpose(0, 1))
        return result, probabilities

    def _heads(self, x: Tensor) -> Tensor:
        """[N, T, E] (or [T, N, E]) -> [N, heads, T, E / heads]."""
        x = torch.unflatten(x, -1, (self.num_heads, self.embed_dim // self.num_heads))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _merged_mask(mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks of torch's layer (True, or -inf, is what nobody looks at) as one that is added to the scores."""

    def added(values: Tensor) -> Tensor:
        if values.dtype != torch.bool:
            return values
        return torch.zeros_like(values, dtype=dtype).masked_fill(values, -torch.inf)

    merged = None if mask is None else added(mask)
    if merged is not None and merged.ndim == 3:
        merged = torch.unflatten(merged, 0, (-1, heads))
    if padding is not None:
        of_keys = added(padding)[:, None, None, :]
        merged = of_keys if merged is None else merged + of_keys
    return merged


class WindowAttention(nn.Module):
    """Attention in shifted windows with a relative position bias, as torchvision's ``ShiftedWindowAttention``.

    [N, H, W, C] in and out; ``qkv`` and ``proj`` are modules of their own (Liu et al. 2021, arXiv 2103.14030).
    """

    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.window_size, self.shift_size = list(old.window_size), list(old.shift_size)
        self.num_heads = old.num_heads
        self.attention_dropout, self.dropout = old.attention_dropout, old.dropout
        self.qkv, self.proj = old.qkv, old.proj
        self.relative_position_bias_table = old.relative_position_bias_table
        self.register_buffer("relative_position_index", old.relative_position_index)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        window = self.window_size
        rows, columns = -(-height // window[0]), -(-width // window[1])
        # A window as large as the padded map is not shifted.
        shift = [s if count > 1 else 0 for s, count in zip(self.shift_size, (rows, columns), strict=True)]
        x = F.pad(x, (0, 0, 0, columns * window[1] - width, 0, rows * window[0] - height))
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        # [N, rows, wh, columns, ww, C] -> [N, windows, wh * ww, C]
        x = torch.unflatten(torch.unflatten(x, 2, (columns, window[1])), 1, (rows, window[0]))
        x = x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        qkv = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, channels // self.num_heads))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each [N, windows, heads, wh * ww, C / heads]
        scores = q * (channels // self.num_heads) ** -0.5 @ k.transpose(-2, -1) + self._position_bias()
        if any(shift):
            scores = scores + self._shift_mask(rows, columns, shift, scores)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        x = F.dropout(self.proj((weights @ v).transpose(2, 3).flatten(3)), self.dropout, self.training)
        x = torch.unflatten(torch.unflatten(x, 2, (window[0], window[1])), 1, (rows, columns))
        x = x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = torch.roll(x, (shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _position_bias(self) -> Tensor:
        """[heads, wh * ww, wh * ww]."""
        tokens = self.window_size[0] * self.window_size[1]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return torch.unflatten(bias, 0, (tokens, tokens)).permute(2, 0, 1)

    def _shift_mask(self, rows: int, columns: int, shift: list[int], like: Tensor) -> Tensor:
        """-100 between tokens of a rolled map's window that are no neighbours in the image, [windows, 1, T, T]."""
        parts = []
        for count, window, moved in zip((rows, columns), self.window_size, shift, strict=True):
            size = count * window
            place = torch.arange(size, device=like.device)
            part = (place >= size - window).long() + (place >= size - moved).long() if moved else place * 0
            parts.append(torch.unflatten(part, 0, (count, window)))
        region = 3 * parts[0][:, None, :, None] + parts[1][None, :, None, :]
        region = region.flatten(2).flatten(0, 1)
        apart = region[:, None, :] != region[:, :, None]
        return (apart.to(like.dtype) * -100.0)[:, None]


class AttentionPool(nn.Module):
    """CLIP's pooling by attention of the mean token to all (Radford et al. 2021, arXiv 2103.00020, section 2.4).

    [N, C, H, W] -> [N, D]. With ``pooled = False`` the values of all places go through the output projection instead,
    [N, H * W, D]: nothing is mixed between places and no position embedding is added (B-cosification, arXiv 2411.00715,
    section 3.3; the dense mode is that of Zhou et al., "Extract Free Dense Labels from CLIP", arXiv 2112.01071).
    """

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.num_heads = old.num_heads
        self.positional_embedding = old.positional_embedding
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = old.q_proj, old.k_proj, old.v_proj, old.c_proj
        self.pooled = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        if not self.pooled:
            tokens: Tensor = self.c_proj(self.v_proj(x))
            return tokens
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        if self.positional_embedding is not None:
            x = x + self.positional_embedding.to(x.dtype)
        q, k, v = self._heads(self.q_proj(x[:, :1])), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        pooled: Tensor = self.c_proj(mixed[:, 0])
        return pooled

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, pooled={self.pooled}"


# The submodules that make queries, keys and values.
PROJECTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    MultiheadAttention: (),
    WindowAttention: ("qkv",),
    AttentionPool: ("q_proj", "k_proj", "v_proj"),
}


def _is_plain(layer: nn.MultiheadAttention) -> bool:
    return layer.in_proj_weight is not None and layer.bias_k is None and not layer.add_zero_attn


def _makers() -> dict[type[nn.Module], Callable[[Any], nn.Module]]:
    """Layer class -> what makes ours of it; of packages that were never imported no model can hold a layer."""
    import sys

    makers: dict[type[nn.Module], Callable[[Any], nn.Module]] = {nn.MultiheadAttention: MultiheadAttention}
    for module, name, maker in (
        ("torchvision.models.swin_transformer", "ShiftedWindowAttention", WindowAttention),
        ("open_clip.modified_resnet", "AttentionPool2d", AttentionPool),
        ("clip.model", "AttentionPool2d", AttentionPool),
    ):
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            makers[cls] = maker
    return makers


def call_projections(layer: nn.Module) -> nn.Module | None:
    """A layer of the same function and state dict whose projections are called; None where none is needed or known.

    The new layer shares the old one's parameters, submodules and mode. Classes known:
    :class:`torch.nn.MultiheadAttention` (packed projections, no ``bias_k``), torchvision's ``ShiftedWindowAttention``,
    CLIP's ``AttentionPool2d``.
    """
    maker = _makers().get(type(layer))
    if maker is None or (isinstance(layer, nn.MultiheadAttention) and not _is_plain(layer)):
        return None
    made = maker(layer)
    made.training = layer.training
    return made

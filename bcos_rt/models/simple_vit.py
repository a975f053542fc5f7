"""SimpleViT, the plain vision transformer without class token, and its variant with a convolutional stem.

The architecture of Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580): fixed
2-D sin-cos position embeddings, pre-norm blocks, the mean over tokens, one linear layer as head. The ``vitc`` models
put the stem of Xiao et al., "Early Convolutions Help Transformers See Better" (arXiv 2106.14881), before it and have a
block less. Sizes and state-dict keys are those of the models published with B-cos v2 (arXiv 2306.10898), whose
standard form this is: three channels, :class:`torch.nn.Linear`, :class:`torch.nn.LayerNorm`, :class:`torch.nn.GELU`,
in the stem ``GroupNorm(1, channels)``. :func:`bcos_rt.bcosify` makes the B-cos form of it.

Images may have any height and width that the patches divide; behind the convolutional stem any at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

__all__ = [
    "SIMPLE_VITS",
    "SIMPLE_VIT_MEAN",
    "SIMPLE_VIT_STD",
    "SIMPLE_VIT_WEIGHTS",
    "Patches",
    "PositionEmbedding",
    "SimpleViT",
    "simple_vit_b_patch16_224",
    "simple_vit_l_patch16_224",
    "simple_vit_s_patch16_224",
    "simple_vit_ti_patch16_224",
    "vitc_b_patch1_14",
    "vitc_l_patch1_14",
    "vitc_s_patch1_14",
    "vitc_ti_patch1_14",
]

TEMPERATURE = 10_000.0
# Of the published models, RGB in [0, 1].
SIMPLE_VIT_MEAN = (0.485, 0.456, 0.406)
SIMPLE_VIT_STD = (0.229, 0.224, 0.225)


class Patches(nn.Module):
    """Cuts a map into square patches: [N, C, H, W] -> [N, H / p, W / p, p * p * C].

    A patch's numbers are in the order (row, column, channel), the channel fastest.

    Args:
        size: p, side of a patch in pixels.

    Raises:
        InvalidArgumentError: a map without batch, or whose sides are no multiples of p.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InvalidArgumentError("image", f"shape {list(x.shape)}", "[N, C, H, W]")
        n, channels, height, width = x.shape
        p = self.size
        if height % p or width % p or not height or not width:
            raise InvalidArgumentError("image", f"{height} x {width} pixels", f"height and width multiples of {p}")
        x = x.reshape(n, channels, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class PositionEmbedding(nn.Module):
    """Adds fixed 2-D sin-cos embeddings to a grid of tokens: [N, H, W, D] -> [N, H * W, D].

    A token at row r and column c gets ``[sin(c w), cos(c w), sin(r w), cos(r w)]`` with the D / 4 frequencies
    ``w_i = 10000 ** (-i / (D / 4 - 1))`` (arXiv 2205.01580, after MoCo v3, arXiv 2104.02057). Computed from the grid,
    in float32 at least, so that every image size has its own; there are no parameters.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[-3:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        steps = torch.arange(dim // 4, dtype=dtype, device=x.device) / (dim // 4 - 1)
        frequencies = TEMPERATURE**-steps
        rows = torch.arange(height, dtype=dtype, device=x.device)[:, None] * frequencies
        columns = torch.arange(width, dtype=dtype, device=x.device)[:, None] * frequencies
        of_rows = torch.cat([rows.sin(), rows.cos()], dim=-1)[:, None].expand(-1, width, -1)
        of_columns = torch.cat([columns.sin(), columns.cos()], dim=-1)[None].expand(height, -1, -1)
        embedding = torch.cat([of_columns, of_rows], dim=-1)
        return (x + embedding.to(x.dtype)).flatten(1, 2)


class _Attention(nn.Module):
    """``to_out(softmax(q k^T / sqrt(d)) v)`` of the normalised tokens, [N, T, D] in and out; no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(self._split(q), self._split(k), self._split(v))
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """[N, T, D] -> [N, heads, T, D / heads]."""
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class _FeedForward(nn.Module):
    """Norm, linear layer, GELU, linear layer, each token by itself."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["norm"] = nn.LayerNorm(dim)
        layers["linear1"] = nn.Linear(dim, mlp_dim)
        layers["act"] = nn.GELU()
        layers["linear2"] = nn.Linear(mlp_dim, dim)
        self.net = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class _Encoder(nn.Module):
    """One pre-norm block: attention and feed-forward, each with its shortcut."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.attn = _Attention(dim, heads)
        self.ff = _FeedForward(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        out: Tensor = self.ff(x) + x
        return out


def _conv_stem(channels: Sequence[int]) -> nn.Sequential:
    """3 x 3 convolutions, each with a norm over channels and places and a GELU; halved wherever channels are added."""
    layers: list[nn.Module] = []
    before = 3
    for after in channels:
        layers += [nn.Conv2d(before, after, 3, 2 if after > before else 1, 1), nn.GroupNorm(1, after), nn.GELU()]
        before = after
    return nn.Sequential(*layers)


class SimpleViT(nn.Module):
    """A plain vision transformer of normalised images, [N, 3, H, W] -> logits [N, num_classes].

    Weights have PyTorch's default initialisation, as in B-cos v2.

    Args:
        patch_size: side of a patch, in pixels, or in places of the stem's result.
        dim: D, width of a token, a multiple of 4 (half of it for a row, half for a column) and of ``heads``, at
            least 8.
        depth: blocks.
        heads: attention heads in each.
        mlp_dim: width inside the feed-forward layers.
        conv_stem: channels of the stem's convolutions; empty for none.
        num_classes: logits.

    Raises:
        InvalidTypeError: a size that is no integer.
        InvalidArgumentError: a size below 1, or a ``dim`` that does not fit.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        conv_stem: Sequence[int] = (),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        sizes = {
            "patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads, "mlp_dim": mlp_dim,
            "num_classes": num_classes, **{f"conv_stem[{i}]": c for i, c in enumerate(conv_stem)},
        }  # fmt: skip
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(name, repr(value), "an integer")
            if value < 1:
                raise InvalidArgumentError(name, value, "at least 1")
        if dim % 4 or dim % heads or dim < 8:
            raise InvalidArgumentError("dim", dim, f"a multiple of 4 and of heads={heads}, at least 8")
        embedding: OrderedDict[str, nn.Module] = OrderedDict()
        if conv_stem:
            embedding["conv_stem"] = _conv_stem(conv_stem)
        embedding["patches"] = Patches(patch_size)
        embedding["linear"] = nn.Linear((conv_stem[-1] if conv_stem else 3) * patch_size**2, dim)
        self.to_patch_embedding = nn.Sequential(embedding)
        self.positional_embedding = PositionEmbedding()
        self.transformer = nn.Sequential(
            OrderedDict((f"encoder_{i}", _Encoder(dim, heads, mlp_dim)) for i in range(depth))
        )
        head: OrderedDict[str, nn.Module] = OrderedDict()
        head["norm"] = nn.LayerNorm(dim)
        head["linear"] = nn.Linear(dim, num_classes)
        self.linear_head = nn.Sequential(head)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.positional_embedding(self.to_patch_embedding(image))
        logits: Tensor = self.linear_head(self.transformer(tokens).mean(dim=1))
        return logits


# --- the published models --------------------------------------------------------------------------------------------


def simple_vit_ti_patch16_224(num_classes: int = 1000) -> SimpleViT:
    """Tiny: 192 wide, 12 blocks, 3 heads, patches of 16 x 16 pixels."""
    return SimpleViT(patch_size=16, dim=192, depth=12, heads=3, mlp_dim=768, num_classes=num_classes)


def simple_vit_s_patch16_224(num_classes: int = 1000) -> SimpleViT:
    """Small: 384 wide, 12 blocks, 6 heads, patches of 16 x 16 pixels."""
    return SimpleViT(patch_size=16, dim=384, depth=12, heads=6, mlp_dim=1536, num_classes=num_classes)


def simple_vit_b_patch16_224(num_classes: int = 1000) -> SimpleViT:
    """Base: 768 wide, 12 blocks, 12 heads, patches of 16 x 16 pixels."""
    return SimpleViT(patch_size=16, dim=768, depth=12, heads=12, mlp_dim=3072, num_classes=num_classes)


def simple_vit_l_patch16_224(num_classes: int = 1000) -> SimpleViT:
    """Large: 1024 wide, 14 blocks, 16 heads, patches of 16 x 16 pixels."""
    return SimpleViT(patch_size=16, dim=1024, depth=14, heads=16, mlp_dim=4096, num_classes=num_classes)


def vitc_ti_patch1_14(num_classes: int = 1000) -> SimpleViT:
    """Tiny with four strided convolutions (14 x 14 tokens at 224 pixels) and 11 blocks."""
    stem = (24, 48, 96, 192)
    return SimpleViT(patch_size=1, dim=192, depth=11, heads=3, mlp_dim=768, conv_stem=stem, num_classes=num_classes)


def vitc_s_patch1_14(num_classes: int = 1000) -> SimpleViT:
    """Small with four strided convolutions (14 x 14 tokens at 224 pixels) and 11 blocks."""
    stem = (48, 96, 192, 384)
    return SimpleViT(patch_size=1, dim=384, depth=11, heads=6, mlp_dim=1536, conv_stem=stem, num_classes=num_classes)


def vitc_b_patch1_14(num_classes: int = 1000) -> SimpleViT:
    """Base with six convolutions, four of them strided (14 x 14 tokens at 224 pixels), and 11 blocks."""
    stem = (64, 128, 128, 256, 256, 512)
    return SimpleViT(patch_size=1, dim=768, depth=11, heads=12, mlp_dim=3072, conv_stem=stem, num_classes=num_classes)


def vitc_l_patch1_14(num_classes: int = 1000) -> SimpleViT:
    """Large with six convolutions, four of them strided (14 x 14 tokens at 224 pixels), and 13 blocks."""
    stem = (64, 128, 128, 256, 256, 512)
    return SimpleViT(patch_size=1, dim=1024, depth=13, heads=16, mlp_dim=4096, conv_stem=stem, num_classes=num_classes)


SIMPLE_VITS: dict[str, Callable[[int], SimpleViT]] = {
    "simple_vit_ti_patch16_224": simple_vit_ti_patch16_224,
    "simple_vit_s_patch16_224": simple_vit_s_patch16_224,
    "simple_vit_b_patch16_224": simple_vit_b_patch16_224,
    "simple_vit_l_patch16_224": simple_vit_l_patch16_224,
    "vitc_ti_patch1_14": vitc_ti_patch1_14,
    "vitc_s_patch1_14": vitc_s_patch1_14,
    "vitc_b_patch1_14": vitc_b_patch1_14,
    "vitc_l_patch1_14": vitc_l_patch1_14,
}

_RELEASE = "https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights"

# Trained as standard networks on ImageNet at 224 pixels. The end of each name is the start of the file's SHA-256, which
# the download is checked against.
SIMPLE_VIT_WEIGHTS: dict[str, str] = {
    "simple_vit_ti_patch16_224": f"{_RELEASE}/standard_simple_vit_ti_patch16_224-2ae8c65a39.pth",
    "simple_vit_s_patch16_224": f"{_RELEASE}/standard_simple_vit_s_patch16_224-f2934fcdcf.pth",
    "simple_vit_b_patch16_224": f"{_RELEASE}/standard_simple_vit_b_patch16_224-87074200ed.pth",
    "simple_vit_l_patch16_224": f"{_RELEASE}/standard_simple_vit_l_patch16_224-62dc536e03.pth",
    "vitc_ti_patch1_14": f"{_RELEASE}/standard_vitc_ti_patch1_14-a5d6bded37.pth",
    "vitc_s_patch1_14": f"{_RELEASE}/standard_vitc_s_patch1_14-34ecd7288e.pth",
    "vitc_b_patch1_14": f"{_RELEASE}/standard_vitc_b_patch1_14-4d374b0220.pth",
    "vitc_l_patch1_14": f"{_RELEASE}/standard_vitc_l_patch1_14-560e48f246.pth",
}

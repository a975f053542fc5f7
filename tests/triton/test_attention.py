"""Attention with its log-sum-exp and its adjoint in the values: kernels against the reference in float64."""

import pytest
import torch
from torch import nn

from bcos_rt import bcosify
from bcos_rt.graph import build_explanation_graph
from bcos_rt.graph.backends import triton as backend
from bcos_rt.graph.fused import build_fused
from bcos_rt.kernels import ops, reference
from bcos_rt.kernels.triton.attention import attention, attention_transposed
from bcos_rt.kernels.triton.launch import Config
from tests.triton.cases import DTYPES, draw
from tests.triton.guard import check

NAMED_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
SCALE = 0.3

# N, H, T, S, D, E, K. The interpreter's tile is 32 x 32.
SIZES = {
    "one": (2, 2, 1, 1, 16, 16, 1),
    "cls_and_patches": (2, 2, 50, 50, 32, 32, 1),
    "odd": (1, 2, 65, 65, 24, 24, 3),
    "many": (1, 1, 197, 197, 64, 64, 2),
    "cross": (2, 1, 7, 40, 8, 20, 2),
    "wide_heads": (1, 1, 33, 34, 80, 96, 1),
    "widest_heads": (1, 1, 20, 40, 128, 128, 5),
    "too_wide_heads": (1, 2, 9, 10, 136, 16, 2),
    "many_classes": (2, 1, 10, 9, 16, 16, 19),
    "empty": (0, 2, 5, 5, 16, 16, 1),
}
MASKS = ("none", "tokens", "keys", "heads", "images", "shut")


def problem(size, dtype, mask="none"):
    n, heads, tokens, keys, inner, outer, classes = SIZES[size]
    query = draw((n, heads, tokens, inner), dtype, 0)
    key = draw((n, heads, keys, inner), dtype, 1)
    value = draw((n, heads, keys, outer), dtype, 2)
    grad = draw((n * classes, heads, tokens, outer), dtype, 3)
    shapes = {
        "tokens": (tokens, keys), "keys": (1, heads, 1, keys), "heads": (heads, tokens, keys),
        "images": (n, 1, tokens, keys), "shut": (tokens, keys),
    }  # fmt: skip
    added = None if mask == "none" else draw(shapes[mask], torch.float32, 4)
    if mask == "shut":
        # A query without keys, one whose first tile of keys is shut out, and one with only the first key.
        added[0] = -torch.inf
        added[tokens // 2, : keys - 1] = -torch.inf
        added[-1, 1:] = -torch.inf
    return query, key, value, grad, added


def double(t):
    return None if t is None else t.double()


def compare(guards, dtype, query, key, value, grad, mask, config=None):
    """Both kernels on guarded copies; the adjoint gets what the forward kernel found."""
    q, k, v, g, m = (None if t is None else guards.guarded(t) for t in (query, key, value, grad, mask))
    out, lse = attention(q, k, v, m, SCALE, config=config)
    back = attention_transposed(g, q, k, guards.guarded(lse), m, SCALE, config=config)
    true_out, true_lse = reference.attention(double(query), double(key), double(value), double(mask), SCALE)
    true_back = reference.attention_transposed(
        grad.double(), query.double(), key.double(), true_lse, double(mask), SCALE
    )
    assert out.dtype == value.dtype
    assert back.dtype == grad.dtype
    assert lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()
    check(out, true_out, dtype, "out")
    check(lse, true_lse, torch.float32, "lse")
    check(back, true_back, dtype, "grad_v")
    guards.verify()


@NAMED_DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, guards):
    compare(guards, dtype, *problem(size, dtype))


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("size", ["odd", "cross"])
def test_masks(size, mask, guards):
    compare(guards, torch.float32, *problem(size, torch.float32, mask))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=("fp16", "bf16"))
def test_a_mask_with_16_bit_operands(dtype, guards):
    query, key, value, grad, mask = problem("cross", dtype, "shut")
    compare(guards, dtype, query, key, value, grad, mask)
    compare(guards, dtype, query, key, value, grad, mask.to(dtype))


def test_parts_of_one_projection(guards):
    # As a network has them: queries, keys and values of a token beside each other.
    n, heads, tokens, _, inner, _, _ = SIZES["cls_and_patches"]
    projected = guards.guarded(draw((n, tokens, 3, heads, inner), torch.float32, 5))
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
    grad = guards.guarded(draw((2 * n, tokens, heads, inner), torch.float32, 6)).transpose(1, 2)
    out, lse = attention(query, key, value, None, SCALE)
    back = attention_transposed(grad, query, key, lse, None, SCALE)
    given = [t.double().cpu() for t in (query, key, value)]
    true_out, true_lse = reference.attention(*given, None, SCALE)
    check(out, true_out, torch.float32, "out")
    check(lse, true_lse, torch.float32, "lse")
    true_back = reference.attention_transposed(grad.double().cpu(), *given[:2], true_lse, None, SCALE)
    check(back, true_back, torch.float32, "grad_v")


def test_channels_that_are_no_neighbours(guards):
    query, key, value, grad, _ = problem("odd", torch.float32)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (query, key, value, grad)]
    compare(guards, torch.float32, *turned, None)


def test_gradients_of_another_dtype(guards):
    query, key, _, grad, _ = problem("odd", torch.float32)
    _, lse = reference.attention(query, key, key, None, SCALE)
    given = [guards.guarded(t) for t in (grad.bfloat16(), query, key, lse)]
    expected = reference.attention_transposed(grad.bfloat16().double(), query.double(), key.double(), lse, None, SCALE)
    back = attention_transposed(*given, None, SCALE)
    assert back.dtype == torch.bfloat16
    check(back, expected, torch.bfloat16, "grad_v")


@pytest.mark.parametrize("config", [Config(16, 64), Config(64, 16), Config(64, 64)], ids=str)
def test_tiles(config, guards):
    compare(guards, torch.float32, *problem("odd", torch.float32, "shut"), config=config)


def test_large_scores_do_not_overflow(guards):
    query, key, value, grad, _ = problem("odd", torch.float16)
    compare(guards, torch.float16, query * 30, key * 30, value, grad, None)


def test_through_the_ops(device):
    query, key, value, grad, mask = problem("odd", torch.float32, "tokens")
    given = [t.to(device) for t in (query, key, value, grad, mask)]
    with ops.use_backend("triton"):
        out, lse = ops.attention(*given[:3], given[4], SCALE)
        back = ops.attention_transposed(given[3], *given[:2], lse, given[4], SCALE)
    true_out, true_lse = reference.attention(*(t.double() for t in (query, key, value, mask)), SCALE)
    check(out, true_out, torch.float32, "out")
    true_back = reference.attention_transposed(
        grad.double(), query.double(), key.double(), true_lse, mask.double(), SCALE
    )
    check(back, true_back, torch.float32, "grad_v")


def test_a_networks_explanation(device):
    """The triton backend's program of a network that attends, against stored softmaxes in float64."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.qkv, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48), nn.Linear(16, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.head(x.transpose(1, 2).flatten(2).mean(1))

    torch.manual_seed(3)
    net = bcosify(Attends())[0].eval()
    images = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[1, 4, -1], [-1, 2, 2]])
    program = build_fused(net, (24, 16), attention="recompute").explain
    found = backend.build(program, device)(images.to(device), targets.to(device))
    wide = net.double()
    stored = build_explanation_graph(wide, (24, 16), multi=True)
    expected = stored(wide, wide.encode(images.double()), targets)
    for name, value in expected.items():
        ours = found[name].double().cpu()
        assert float((ours - value).abs().max()) <= 2e-5 * max(float(value.abs().max()), 1e-3), name

"""Attention's ops on the CPU: the reference against PyTorch, the blocked form against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.kernels import blocked_attention, ops, reference
from tests.tolerances import kernel_tolerance

# N, H, T, S, D, E, K
SIZES = {
    "self": (2, 3, 50, 50, 24, 24, 1),
    "cross": (2, 3, 7, 9, 8, 5, 3),
    "classes": (1, 2, 65, 33, 16, 16, 4),
    "one": (3, 1, 1, 1, 4, 4, 2),
    "empty": (0, 2, 5, 5, 4, 4, 1),
}
MASKS = ("none", "tokens", "keys", "images", "heads", "shut")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def problem(size, mask, dtype=torch.float64, seed=0):
    """query, key, value, grad, mask; the first three are parts of one tensor where their sizes allow it."""
    n, heads, tokens, keys, inner, outer, classes = SIZES[size]
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    if tokens == keys and inner == outer:
        query, key, value = draw(n, tokens, 3, heads, inner).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        query, key, value = draw(n, heads, tokens, inner), draw(n, heads, keys, inner), draw(n, heads, keys, outer)
    shapes = {
        "tokens": (tokens, keys), "keys": (1, heads, 1, keys), "images": (n, 1, tokens, keys),
        "heads": (heads, tokens, keys), "shut": (tokens, keys),
    }  # fmt: skip
    added = None if mask == "none" else draw(*shapes[mask])
    if mask == "shut":
        added[:, 1:] = -torch.inf
        added[0] = -torch.inf
    return query, key, value, draw(n * classes, heads, tokens, outer), added


def double(t):
    return None if t is None else t.double()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_reference_is_torchs(size, mask):
    query, key, value, grad, added = problem(size, mask)
    out, lse = reference.attention(query, key, value, added, 0.7)
    value = value.clone().requires_grad_()
    expected = F.scaled_dot_product_attention(query, key, value, added, scale=0.7)
    torch.testing.assert_close(out, expected)
    scores = query @ key.transpose(-2, -1) * 0.7 + (0 if added is None else added)
    present = scores.max(-1).values > -torch.inf
    torch.testing.assert_close(lse, torch.where(present, scores.logsumexp(-1), torch.zeros_like(lse)))
    # <grad, P v> = <P^T grad, v> for each class.
    back = reference.attention_transposed(grad, query, key, lse, added, 0.7)
    classes = SIZES[size][-1]
    for k in range(classes):
        (wanted,) = torch.autograd.grad(expected, value, grad[k::classes], retain_graph=True)
        torch.testing.assert_close(back[k::classes], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_blocked_is_the_reference(size, mask, dtype, monkeypatch):
    query, key, value, grad, added = problem(size, mask, dtype)
    given = [double(t) for t in (query, key, value, added)]
    true_out, true_lse = reference.attention(*given, 0.7)
    true_back = reference.attention_transposed(grad.double(), given[0], given[1], true_lse, given[3], 0.7)
    for block in (blocked_attention.BLOCK, 400, 40):
        monkeypatch.setattr(blocked_attention, "BLOCK", block)
        out, lse = ops.attention(query, key, value, added, 0.7)
        back = ops.attention_transposed(grad, query, key, lse, added, 0.7)
        assert out.dtype == back.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert out.transpose(1, 2).is_contiguous()
        for found, true, precision in ((out, true_out, dtype), (lse, true_lse, lse.dtype), (back, true_back, dtype)):
            rtol, atol = kernel_tolerance(precision).values()
            scale = float(true.abs().max()) if true.numel() else 1.0
            torch.testing.assert_close(found.double(), true, rtol=rtol, atol=atol * scale)


def test_a_mask_that_shuts_out_whole_blocks():
    # PyTorch's own kernel goes through 512 keys at a time.
    query, key, value, grad = (torch.randn(1, 1, 600, 8, generator=torch.Generator().manual_seed(i)) for i in range(4))
    mask = torch.zeros(600, 600)
    mask[:, :520] = -torch.inf
    out, lse = ops.attention(query, key, value, mask, 0.3)
    expected, true_lse = reference.attention(*(t.double() for t in (query, key, value, mask)), 0.3)
    torch.testing.assert_close(out.double(), expected, **kernel_tolerance(torch.float32))
    back = ops.attention_transposed(grad, query, key, lse, mask, 0.3)
    expected = reference.attention_transposed(*(t.double() for t in (grad, query, key)), true_lse, mask.double(), 0.3)
    torch.testing.assert_close(back.double(), expected, **kernel_tolerance(torch.float32))
    assert not back[:, :, :520].any()


def test_queries_of_another_dtype_than_gradients():
    query, key, value, grad, _ = problem("classes", "none", torch.float32)
    _, lse = ops.attention(query, key, value, None, 0.7)
    back = ops.attention_transposed(grad.bfloat16(), query, key, lse, None, 0.7)
    expected = reference.attention_transposed(grad.bfloat16().double(), query.double(), key.double(), lse, None, 0.7)
    assert back.dtype == torch.bfloat16
    # Its values are sums of exact products of rounded gradients.
    torch.testing.assert_close(back, expected.bfloat16(), rtol=2**-7, atol=1e-5)


def test_memory_does_not_grow_with_the_square_of_tokens():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    query, key, value = torch.rand(1, 2, 3000, 4), torch.rand(1, 2, 3000, 4), torch.rand(1, 2, 3000, 3)
    with Watch():
        _, lse = blocked_attention.attention(query, key, value, None, 1.0)
        blocked_attention.attention_transposed(value, query, key, lse, None, 1.0)
    assert 0 < max(seen) <= blocked_attention.BLOCK


@pytest.mark.parametrize("mask", ["none", "images"])
def test_opcheck(mask):
    query, key, value, grad, added = problem("classes", mask, torch.float32)
    _, lse = ops.attention(query, key, value, added, 0.7)
    torch.library.opcheck(torch.ops.bcos_rt.attention, (query, key, value, added, 0.7))
    torch.library.opcheck(torch.ops.bcos_rt.attention_transposed, (grad, query, key, lse, added, 0.7))
    with ops.use_backend("reference"):
        torch.library.opcheck(torch.ops.bcos_rt.attention, (query, key, value, added, 0.7))
        torch.library.opcheck(torch.ops.bcos_rt.attention_transposed, (grad, query, key, lse, added, 0.7))


Q, K, V = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 6, 4), torch.rand(2, 3, 6, 7)
LSE, GRAD = torch.rand(2, 3, 5), torch.rand(4, 3, 5, 7)
REFUSED = {
    "attention: query, key": lambda: ops.attention(Q, torch.rand(2, 3, 6, 5), V),
    "attention: query: got dtype torch.int64": lambda: ops.attention(Q.long(), K, V),
    "attention: key: got dtype": lambda: ops.attention(Q, K.double(), V),
    "attention: key: got shape": lambda: ops.attention(Q, K[:, :, :0], V[:, :, :0]),
    "attention: value: got shape": lambda: ops.attention(Q, K, V[:, :, :4]),
    "attention: value: got dtype": lambda: ops.attention(Q, K, V.double()),
    "attention: mask: got shape": lambda: ops.attention(Q, K, V, torch.rand(4, 6)),
    "attention: mask: got dtype torch.bool": lambda: ops.attention(Q, K, V, torch.rand(5, 6) > 0.5),
    "attention: value: got a tensor that requires": lambda: ops.attention(Q, K, V.clone().requires_grad_()),
    "attention_transposed: grad": lambda: ops.attention_transposed(GRAD[:3], Q, K, LSE),
    "attention_transposed: lse": lambda: ops.attention_transposed(GRAD, Q, K, LSE[:, :, :4]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises((InvalidArgumentError, InvalidTypeError)) as caught:
        REFUSED[message]()
    assert message in str(caught.value)

"""The ops against the definition of a B-cos layer written out patch by patch in float64, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bcos_rt.kernels import ops, reference

BS = (1.0, 1.5, 2.0, 2.5)
GEOMETRIES = {
    # name: channels in, out, kernel, stride, padding, dilation, groups, image
    "3x3": (4, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (9, 7)),
    "stem": (6, 8, (7, 7), (2, 2), (3, 3), (1, 1), 1, (17, 23)),
    "pointwise_strided": (5, 3, (1, 1), (2, 2), (0, 0), (1, 1), 1, (8, 9)),
    "uneven": (4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, (9, 8)),
    "dilated": (4, 4, (3, 3), (1, 1), (2, 2), (2, 2), 1, (7, 7)),
    "grouped": (8, 12, (3, 3), (2, 2), (1, 1), (1, 1), 4, (8, 8)),
    "depthwise": (6, 6, (5, 5), (1, 1), (2, 2), (1, 1), 6, (7, 9)),
    "depthwise_multiplier": (3, 9, (3, 3), (2, 2), (1, 1), (1, 1), 3, (9, 9)),
    "wide_padding": (2, 3, (3, 3), (1, 1), (3, 3), (1, 1), 1, (5, 5)),
    "patchify": (3, 4, (4, 4), (4, 4), (0, 0), (1, 1), 1, (12, 16)),
}


def by_definition(x, w, bias, stride, padding, dilation, groups, b):
    """Every patch as a vector: z = w . p, n = sqrt(p . p + 1e-6), y = z (|z| / n)^(B-1)."""
    n, _, _, _ = x.shape
    out, per_group, kh, kw = w.shape
    patches = F.unfold(x, (kh, kw), dilation, padding, stride)
    patches = patches.view(n, groups, per_group * kh * kw, -1)
    z = torch.einsum("ngpl,gop->ngol", patches, w.view(groups, out // groups, -1))
    if bias is not None:
        z = z + bias.view(groups, -1, 1)
    norm = (patches.square().sum(2, keepdim=True) + 1e-6).sqrt()
    if b == 1:
        y = z
    elif b == 2:
        y = z * z.abs() / norm
    else:
        y = z * (z.abs() / norm + 1e-6) ** (b - 1)
    height = (x.shape[2] + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    return y.flatten(1, 2).unflatten(2, (height, -1))


def problem(name, dtype=torch.float64, bias=False, seed=0):
    cin, out, kernel, stride, padding, dilation, groups, size = GEOMETRIES[name]
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, cin, *size, generator=g, dtype=torch.float64)
    w = torch.randn(out, cin // groups, *kernel, generator=g, dtype=torch.float64)
    c = torch.randn(out, generator=g, dtype=torch.float64) if bias else None
    return [t.to(dtype) if t is not None else None for t in (x, w, c)], (stride, padding, dilation, groups)


@pytest.mark.parametrize("b", BS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d_is_the_definition(name, bias, b):
    tensors, geometry = problem(name, bias=bias)
    torch.testing.assert_close(ops.conv2d(*tensors, *geometry, b), by_definition(*tensors, *geometry, b))


@pytest.mark.parametrize("b", BS)
@pytest.mark.parametrize("name", ["uneven", "depthwise", "pointwise_strided"])
def test_conv2d_gradients(name, b):
    tensors, geometry = problem(name, bias=True)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: ops.conv2d(*t, *geometry, b), tensors, fast_mode=True)
    loss = [f(*tensors, *geometry, b).sin().sum() for f in (ops.conv2d, by_definition)]
    for ours, true in zip(*(torch.autograd.grad(v, tensors) for v in loss), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-8, atol=1e-8 * float(true.abs().max()))


@pytest.mark.parametrize("b", BS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)])
def test_linear_values_and_gradients(shape, b):
    g = torch.Generator().manual_seed(1)
    x, w, c = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in (shape, (7, 5), (7,)))
    z = x @ w.t() + c
    u = z.abs() / (x.norm(dim=-1, keepdim=True) + 1e-12)
    expected = z if b == 1 else z * (u if b == 2 else (u + 1e-6) ** (b - 1))
    torch.testing.assert_close(ops.linear(x, w, c, b), expected)
    ours = torch.autograd.grad(ops.linear(x, w, c, b).sin().sum(), (x, w, c))
    for a, e in zip(ours, torch.autograd.grad(expected.sin().sum(), (x, w, c)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("b", BS)
def test_empty_batch(b):
    tensors, geometry = problem("grouped", torch.float32)
    x = tensors[0][:0].requires_grad_()
    y = ops.conv2d(x, tensors[1], None, *geometry, b)
    assert y.shape == (0, 12, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert ops.linear(torch.rand(0, 5), torch.rand(3, 5), None, b).shape == (0, 3)


@pytest.mark.parametrize("b", [1.5, 2.0])
def test_zero_patches_and_dead_filters_have_finite_values_and_gradients(b):
    x = torch.zeros(1, 3, 5, 5, requires_grad=True)
    w = torch.zeros(4, 3, 3, 3)
    w[1:] = torch.randn(3, 3, 3, 3)
    w.requires_grad_()
    y = ops.conv2d(x, w, None, padding=(1, 1), b=b)
    assert not y.any()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(w.grad).all()
    row = torch.zeros(2, 5, requires_grad=True)
    ops.linear(row, torch.randn(3, 5), None, b).sum().backward()
    assert torch.isfinite(row.grad).all()


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_do_not_overflow(dtype, magnitude):
    """fp16 squares overflow above 256 and vanish below 2.4e-4; the norm lives in fp32."""
    (x, w, _), geometry = problem("3x3", dtype)
    x, w = x * magnitude, w / 20
    y = ops.conv2d(x, w, None, *geometry, 2.0)
    assert y.dtype == dtype
    exact = by_definition(x.double(), w.double(), None, *geometry, 2.0)
    # z and m are rounded to the storage dtype, z after a sum of 36 products.
    tolerance = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)


def test_channels_last_gives_the_same_numbers():
    (x, w, _), geometry = problem("grouped", torch.float32)
    expected = ops.conv2d(x, w, None, *geometry, 2.0)
    given = ops.conv2d(x.to(memory_format=torch.channels_last), w, None, *geometry, 2.0)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("b", BS[1:])
def test_opcheck(b):
    (x, w, c), (stride, padding, dilation, groups) = problem("uneven", torch.float32, bias=True)
    arguments = (x.requires_grad_(), w.requires_grad_(), c.requires_grad_())
    torch.library.opcheck(
        torch.ops.bcos_rt.conv2d, (*arguments, list(stride), list(padding), list(dilation), groups, b, 1e-6)
    )
    row = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.bcos_rt.linear, (row, torch.randn(4, 5, requires_grad=True), None, b, 1e-12))
    n = reference.patch_norm(x, (3, 2), stride, padding, dilation, groups).detach()
    z = F.conv2d(x, w, None, stride, padding, dilation, groups).detach()
    torch.library.opcheck(torch.ops.bcos_rt.dynamic_scale, (z, n, b, 1))
    torch.library.opcheck(
        torch.ops.bcos_rt.patch_norm,
        (x.detach(), [3, 2], list(stride), list(padding), list(dilation), groups, 1e-6),
    )
    torch.library.opcheck(torch.ops.bcos_rt.row_norm, (row.detach(), 1e-12))


def test_compiles_without_graph_breaks():
    (x, w, _), geometry = problem("3x3", torch.float32)
    compiled = torch.compile(lambda x, w: ops.conv2d(x, w, None, *geometry, 2.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), ops.conv2d(x, w, None, *geometry, 2.0))


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(0.1, 10),
    b=st.sampled_from(BS[1:]),
    seed=st.integers(0, 2**16),
)
def test_a_bcos_layer_is_positively_homogeneous_and_bounded(scale, b, seed):
    """y(s x) = s y(x) (up to the stabilisers), and |y| <= |z| ||w||^(B-1): the cosine is at most 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, generator=g, dtype=torch.float64)
    w = torch.randn(4, 6, generator=g, dtype=torch.float64)
    y = ops.linear(x, w, None, b)
    torch.testing.assert_close(ops.linear(scale * x, w, None, b), scale * y, rtol=1e-6, atol=1e-9)
    bound = F.linear(x, w).abs() * (w.norm(dim=1) + 1e-6) ** (b - 1)
    assert bool((y.abs() <= bound * (1 + 1e-9)).all())

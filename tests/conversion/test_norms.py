"""BatchNorm without centring: its fast way on the CPU against what autograd makes of the definition."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bcos_rt.nn import BatchNormUncentered2d


def defined(x, weight, bias, eps):
    """The definition, and the statistics."""
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    out = x * scale[:, None, None]
    return (out if bias is None else out + bias[:, None, None]), mean, var


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (2, 1, 1, 6), (4, 3, 1, 1), (1, 2, 5, 5)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}])
def test_values_gradients_and_statistics(shape, layout, options):
    torch.manual_seed(0)
    norm = BatchNormUncentered2d(shape[1], **options, dtype=torch.float64)
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    # Far from 0, where a difference of squares would lose its digits.
    x = (torch.randn(shape, dtype=torch.float64) + 30).contiguous(memory_format=layout).requires_grad_()
    direction = torch.randn(shape, dtype=torch.float64)
    given = [x, *norm.parameters()]
    y = norm(x)
    expected, mean, var = defined(x, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad((v * direction).sum(), given) for v in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("several", [False, True])
def test_float32_gradients(layout, affine, several):
    """In channels-last memory those of the C++ kernels; several at a time are not."""
    torch.manual_seed(0)
    norm = BatchNormUncentered2d(21, bias=False, affine=affine)
    if affine:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (torch.randn(3, 21, 9, 8) + 10).contiguous(memory_format=layout).requires_grad_()
    direction = torch.randn(2, 3, 21, 9, 8) if several else torch.randn(3, 21, 9, 8)
    wide = [v.detach().double().requires_grad_() for v in (x, *norm.parameters())]
    expected, _, _ = defined(wide[0], wide[1] if affine else None, None, norm.eps)
    close = {"rtol": 1e-4, "atol": 1e-3}
    y = norm(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-5)
    ours = torch.autograd.grad(y, [x, *norm.parameters()], direction, is_grads_batched=several)
    theirs = torch.autograd.grad(expected, wide, direction.double(), is_grads_batched=several)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), wanted, **close)


def test_channels_of_one_value_have_the_gradient_of_the_definition():
    """An error in the mean would be divided by eps."""
    x = torch.full((8, 3, 32, 32), 2.3).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = BatchNormUncentered2d(3, bias=False)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((norm(x) * direction).sum(), x)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((defined(wide, None, None, norm.eps)[0] * direction).sum(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)


def test_other_devices_by_default_and_modes_that_watch():
    norm = BatchNormUncentered2d(8, track_running_stats=False)
    x, other = (torch.randn(4, 8, 5, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    expected = norm(x)
    with torch.device("meta"):
        torch.testing.assert_close(norm(x), expected)
    traced = make_fx(norm, tracing_mode="real")(x)
    torch.testing.assert_close(traced(other), norm(other))


def test_gradients_that_are_views_of_their_negatives():
    norm = BatchNormUncentered2d(4)
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    (ours,) = torch.autograd.grad(norm(x), x, torch._neg_view(grad))
    (theirs,) = torch.autograd.grad(norm(x), x, -grad)
    torch.testing.assert_close(ours, theirs)


def test_no_images_and_no_channels():
    norm = BatchNormUncentered2d(4, track_running_stats=False)
    x = torch.zeros(0, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_float32_statistics_are_as_exact_as_torch_var_mean():
    torch.manual_seed(0)
    x = (torch.randn(4, 8, 64, 64) + 3).contiguous(memory_format=torch.channels_last)
    norm = BatchNormUncentered2d(8, momentum=1.0)
    norm(x)
    _, mean, var = defined(x.double(), None, None, norm.eps)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_statistics_in_float32(dtype):
    """Squares above 65504 do not overflow."""
    x = (torch.randn(2, 3, 8, 8) * 300).to(dtype)
    y = BatchNormUncentered2d(3)(x)
    assert y.dtype == dtype
    expected, _, _ = defined(x.double(), None, None, 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)


def test_second_derivatives():
    torch.manual_seed(0)
    norm = BatchNormUncentered2d(3, bias=False, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)),
                                        (x, norm.weight))  # fmt: skip
    # Through a layer before it: the gradient's own dependence on the statistics counts.
    before = torch.randn(3, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, 2, 3, dtype=torch.float64)

    def slope(apply):
        z = torch.nn.functional.conv2d(x, before)
        (first,) = torch.autograd.grad((apply(z) * direction).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), before)[0]

    theirs = slope(lambda z: defined(z, norm.weight, None, norm.eps)[0])
    torch.testing.assert_close(slope(norm), theirs, rtol=1e-9, atol=1e-9)


def test_transforms_and_tracing_take_the_general_way(tmp_path):
    norm = BatchNormUncentered2d(3, track_running_stats=False)
    x = torch.randn(2, 3, 4, 4)

    def energy(x):
        return (norm(x) ** 3).sum()

    (expected,) = torch.autograd.grad(energy(leaf := x.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(energy)(x), expected)
    with torch.no_grad():
        torch.jit.trace(norm, x).save(tmp_path / "norm.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "norm.pt")(x), norm(x))


def test_weights_of_another_dtype_do_not_change_the_results():
    norm = BatchNormUncentered2d(3).double()
    assert norm(torch.randn(2, 3, 4, 4)).dtype == torch.float32

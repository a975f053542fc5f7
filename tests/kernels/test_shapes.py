"""The fused ops' shapes without data are those of the reference functions' results."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bcos_rt.kernels import ops, reference, reference_layers
from bcos_rt.kernels.shapes import SHAPES

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def described(result):
    results = result if isinstance(result, tuple) else (result,)
    # The stride of a dimension of one entry says nothing, nor does that of a tensor of none.
    return [
        (tuple(t.shape), [step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1 and t.numel()], t.dtype)
        for t in results
    ]


def compare(name, *args, **kwargs):
    """The reference's results and SHAPES' are alike; so is the op on tensors without data."""
    function = getattr(reference, name, None) or getattr(reference_layers, name)
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    expected = described(ops._distinct(function(*bound.args)))
    assert described(ops._distinct(SHAPES[name](*bound.args))) == expected
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in bound.args]
        assert described(getattr(torch.ops.bcos_rt, name)(*fake)) == expected


def images(n, c, h, w, dtype=torch.float32, last=False):
    x = torch.randn(n, c, h, w, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "filters", "groups", "kernel", "stride", "padding", "dilation"),
    [
        ((2, 8, 7, 5), 12, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
        ((2, 8, 7, 5), 12, 2, (3, 2), (2, 1), (0, 1), (1, 2)),
        ((1, 130, 6, 6), 130, 130, (3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 1, 4, 4), 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
        ((2, 4, 3, 3), 70, 1, (3, 3), (1, 1), (0, 0), (1, 1)),
        ((0, 8, 7, 5), 12, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    ],
)
def test_convolutions(shape, filters, groups, kernel, stride, padding, dilation, last, dtype):
    x = images(*shape, dtype, last)
    weight = images(filters, shape[1] // groups, *kernel, dtype)
    channel = torch.rand(filters, dtype=dtype)
    geometry = (stride, padding, dilation, groups)
    y = reference.conv2d_fused(x, weight, None, None, None, None, None, *geometry)[0]
    for activation in ("none", "relu", "silu"):
        for b, wants, rest in [(2.0, True, (channel, channel, channel, y)), (1.0, False, (None,) * 4)]:
            flags = {"b": b, "activation": activation, "want_multiplier": wants, "want_gate": wants}
            for squares in (False, True):
                compare("conv2d_fused", x, weight, None, *rest, *geometry, want_squares=squares, **flags)
    grad = torch.cat([y, y])
    compare("conv2d_transposed", grad, weight, shape[2:], *geometry)
    mask = torch.ones(shape[0], -(-shape[1] // 8), *shape[2:], dtype=torch.uint8)
    compare("conv2d_transposed", grad, weight, shape[2:], *geometry, x, None, mask, want_raw=True)
    compare("conv2d_transposed", grad, weight, shape[2:], *geometry, None, torch.cat([x, x]), x, want_raw=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(4,), (2, 3), (2, 1, 3), (0, 5)])
def test_linear_layers(rows, dtype):
    weight = torch.randn(70, 6, dtype=dtype)
    for x in (torch.randn(*rows, 6, dtype=dtype), torch.randn(6, *rows, dtype=dtype).movedim(0, -1)):
        for activation in ("none", "relu", "gelu"):
            for wants in (False, True):
                rest = (
                    (torch.rand(70, dtype=dtype),) * 3 + (torch.rand(*rows, 70, dtype=dtype),) if wants else (None,) * 4
                )
                flags = {"want_multiplier": wants, "want_gate": wants, "want_squares": wants}
                compare("linear_fused", x, weight, None, *rest, activation=activation, **flags)
    grad, factor = torch.randn(2 * rows[0], *rows[1:], 70, dtype=dtype), torch.rand(*rows, 6, dtype=dtype)
    compare("linear_transposed", grad, weight)
    compare("linear_transposed", grad, weight, factor, None, factor, want_raw=True)
    total = torch.cat([factor, factor])
    compare("transposed_epilogue", total, factor, total, None, want_raw=True)
    compare("transposed_epilogue", total.movedim(0, -1).contiguous().movedim(-1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (1, 130, 1, 1), (2, 1, 3, 3), (0, 8, 2, 2)])
def test_layers_of_images(shape, last, dtype):
    x, channel = images(*shape, dtype, last), torch.rand(shape[1], dtype=dtype)
    grad = torch.cat([x, x])
    for activation in ("relu", "silu"):
        compare("scale_act", x, channel, channel, activation)
        compare("scale_act", x, channel, channel, activation, want_squares=True, groups=1 if shape[1] == 1 else 2)
        compare("scale_act_transposed", grad, x, channel, channel, activation, grad)
    compare("transposed_epilogue", grad)
    compare("transposed_epilogue", grad, x, grad, x, want_raw=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (1, 130, 3, 3), (2, 1, 4, 5), (0, 8, 4, 4)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 1))])
def test_pools(shape, kernel, stride, padding, last, dtype):
    x, groups = images(*shape, dtype, last), 1 if shape[1] == 1 else 2
    for ceil in (False, True):
        compare("avg_pool2d", x, kernel, stride, padding, ceil)
        compare("avg_pool2d", x, kernel, stride, padding, ceil, False, True, groups)
        compare("max_pool2d", x, kernel, stride, padding, (1, 1), ceil)
        compare("max_pool2d", x, kernel, stride, padding, (1, 1), ceil, True, True, groups)
        y, index, _ = reference_layers.max_pool2d(x, kernel, stride, padding, (1, 1), ceil, True)
        grad = torch.cat([y, y])
        for rest in ((), (x, None, x, True), (None, torch.cat([x, x]))):
            compare("avg_pool2d_transposed", grad, shape[2:], kernel, stride, padding, ceil, True, *rest)
            compare("max_pool2d_transposed", grad, index, shape[2:], kernel, stride, padding, (1, 1), *rest)
    compare("max_pool2d", images(1, 2, 20, 20, dtype), (17, 17), (1, 1), (0, 0), (1, 1), False, True)
    compare("max_pool2d", images(1, 2, 9, 9, dtype), (2, 2), (1, 1), (0, 0), (3, 2), False, True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("six", [False, True])
def test_encoding(six, last):
    statistics = torch.rand(6 if six else 3)
    for given in (images(2, 3, 5, 4, last=last), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)):
        for dtype in DTYPES:
            compare("encode_image", given, statistics, statistics, six, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(4,), (2, 3), (2, 1, 3), (0, 5), ()])
def test_norms_of_rows(rows, dtype):
    weight = torch.rand(6, dtype=dtype)
    for x in (torch.randn(*rows, 6, dtype=dtype), torch.randn(6, *rows, dtype=dtype).movedim(0, -1)):
        for squares in (False, True):
            compare("layer_norm", x, weight, None, 1e-6, squares)
        _, rstd, _ = reference_layers.layer_norm(x, None, None, 1e-6)
        compare("layer_norm_transposed", x, rstd, weight)
        if rows:
            compare("layer_norm_transposed", torch.cat([x, x]), rstd, None, torch.cat([x, x]))
        compare_norm("row_norm", x, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (1, 1, 5, 5), (0, 8, 4, 4)])
def test_norms_of_patches(shape, last, dtype):
    x = images(*shape, dtype, last)
    for groups in {1, shape[1], max(1, shape[1] // 2)}:
        for geometry in (
            ((3, 3), (2, 2), (1, 1), (1, 1)),
            ((1, 1), (1, 1), (0, 0), (1, 1)),
            ((2, 2), (1, 2), (0, 1), (2, 1)),
        ):
            compare_norm("patch_norm", x, *geometry, groups, 1e-6)


def compare_norm(name, *args):
    """The op's result, with data and without."""
    expected = described(getattr(reference, name)(*args))
    op = getattr(torch.ops.bcos_rt, name)
    assert described(op(*args)) == expected
    with FakeTensorMode() as mode:
        assert described(op(mode.from_tensor(args[0]), *args[1:])) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype):
    query, key, value = (torch.randn(2, 3, n, d, dtype=dtype) for n, d in ((5, 4), (7, 4), (7, 6)))
    compare("attention", query, key, value, torch.zeros(5, 7), 0.5)
    out, lse = reference.attention(query, key, value)
    compare("attention_transposed", torch.cat([out, out]).contiguous(), query, key, lse)


def test_every_fused_op_with_shapes_of_its_own_is_compared():
    text = inspect.getsource(inspect.getmodule(compare))
    assert all(f'compare("{name}"' in text for name in SHAPES)

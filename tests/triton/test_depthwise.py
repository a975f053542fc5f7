"""Depthwise kernels against float64: the forward pass with every epilogue, the adjoint, the gradient of the weight.

The expected values come from ``torch.nn.functional`` alone, with the norm as a convolution of x^2 with ones.
"""

import pytest
import torch
import torch.nn.functional as F

from bcos_rt.kernels import ops
from bcos_rt.kernels.triton import depthwise
from bcos_rt.kernels.triton.conv_transposed import pack_transposed
from bcos_rt.kernels.triton.depthwise import (
    depthwise_fused,
    depthwise_grad_weight,
    depthwise_transposed,
    rows_and_taps,
)
from bcos_rt.kernels.triton.launch import Config
from tests.triton.guard import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6

# name: batch, channels, filters per channel, image, kernel, stride, padding, dilation
GEOMETRIES = {
    "3x3": (2, 24, 1, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 halved": (2, 16, 1, (9, 6), (3, 3), (2, 2), (1, 1), (1, 1)),
    "three filters a channel": (1, 5, 3, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "oblong, dilated": (1, 9, 1, (12, 11), (3, 2), (1, 2), (2, 0), (2, 1)),
    "stride and dilation share a factor": (1, 8, 2, (13, 9), (3, 3), (4, 2), (2, 3), (2, 3)),
    "two kernel blocks": (1, 8, 1, (18, 4), (14, 1), (1, 1), (3, 0), (1, 1)),
    "a place no patch meets": (1, 3, 1, (8, 7), (1, 1), (3, 2), (0, 0), (1, 1)),
    "two tiles of channels": (1, 72, 1, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
}
WALKS = [None, Config(4, 64, 1), Config(8, 64, 2), Config(4, 64, 4)]


every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
# Every geometry in fp32; the 16-bit dtypes differ in how values are loaded and stored only.
every_case = pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        pytest.param(geometry, dtype, id=f"{name}-{dtype}")
        for name, geometry in GEOMETRIES.items()
        for dtype in (DTYPES if name in ("3x3 halved", "three filters a channel") else DTYPES[:1])
    ],
)


def draw(seed, shape, dtype=torch.float32, channels_last=True):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else values


def problem(geometry, dtype):
    """x, weight and the convolution's arguments."""
    batch, channels, multiple, size, kernel, stride, padding, dilation = geometry
    x = draw(1, (batch, channels, *size), dtype)
    weight = draw(2, (multiple * channels, 1, *kernel), dtype, channels_last=False)
    return x, weight, {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels}


def gate_of(u, activation):
    """``act(u) / u`` from torch's own activations."""
    if activation == "relu":
        return (u > 0).double()
    act = {"none": lambda v: v, "relu6": F.relu6, "gelu": F.gelu, "silu": F.silu, "hardswish": F.hardswish}[activation]
    return act(u) / u


def packed_bits(on):
    """[N, C, H, W] of bool -> [N, ceil(C / 8), H, W], bit i of byte j is channel 8 j + i."""
    padded = F.pad(on.long(), (0, 0, 0, 0, 0, -on.shape[1] % 8))
    bits = padded.unflatten(1, (-1, 8)) << torch.arange(8)[None, None, :, None, None]
    return bits.sum(2).to(torch.uint8)


def expected(x, weight, bias, scale, shift, residual, conv, b, activation):
    """u, y, the multiplier and the gate in float64."""
    x, weight = x.double().cpu(), weight.double().cpu()
    channels = x.shape[1]

    def column(v):
        return 0.0 if v is None else v.double().cpu()[:, None, None]

    z = F.conv2d(x, weight, None, **conv) + column(bias)
    s = torch.ones_like(z)
    if b != 1:
        ones = torch.ones(channels, 1, *weight.shape[2:], dtype=torch.float64)
        n = (F.conv2d(x * x, ones, None, **conv) + EPS).sqrt().repeat_interleave(weight.shape[0] // channels, 1)
        s = z.abs() / n if b == 2 else (z.abs() / n + 1e-6) ** (b - 1)
    if scale is not None:
        s = s * column(scale)
    u = z * s + column(shift) + (0.0 if residual is None else residual.double().cpu())
    gate = gate_of(u, activation)
    return u, u * gate, s * gate, gate


def put(guards, *tensors):
    return [None if t is None else guards.guarded(t) for t in tensors]


def compare_forward(guards, geometry, dtype, b, activation, config=None, parameters=True):
    x, weight, conv = problem(geometry, dtype)
    filters = weight.shape[0]
    bias = scale = shift = residual = None
    if parameters:
        bias, scale, shift = (draw(seed, (filters,)) for seed in (3, 4, 5))
        residual = draw(6, F.conv2d(x.float(), weight.float(), None, **conv).shape, dtype)
    operands = put(guards, x, weight, bias, scale, shift, residual)
    x, weight, *rest = operands
    y, multiplier, gate, squares = depthwise_fused(
        x, weight, None, *rest, **conv, b=b, eps=EPS, activation=activation, want_multiplier=True, want_gate=True,
        want_squares=True, config=config,
    )  # fmt: skip
    u, y64, multiplier64, gate64 = expected(x, weight, *rest, conv, b, activation)
    for result in (y, multiplier, squares):
        assert result.permute(0, 2, 3, 1).is_contiguous()
    assert y.dtype == multiplier.dtype == dtype
    check(y, y64, dtype, "y")
    # A ReLU may switch differently where u rounds to 0, and u is a difference of larger numbers.
    settled = u.abs() > 1e-5 * u.abs().max()
    check(torch.where(settled, multiplier.cpu().double(), 0.0), torch.where(settled, multiplier64, 0.0), dtype, "m")
    if activation == "relu":
        differ = gate.cpu() ^ packed_bits(u > 0)
        assert not (differ & packed_bits(settled)).any()
    elif activation == "none":
        assert gate.numel() == 0
    else:
        check(gate, gate64, dtype, "gate")
    # Of what was stored: exact up to the order of the sum.
    square = y.cpu().double() ** 2
    square = F.pad(square, (0, 0, 0, 0, 0, -filters % 64)).unflatten(1, (-1, 64)).sum(2)
    check(squares, square, torch.float32, "squares")


@every_case
def test_forward(geometry, dtype, guards):
    compare_forward(guards, geometry, dtype, 2.0, "relu")


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
def test_every_activation_and_power(activation, b, guards):
    compare_forward(guards, GEOMETRIES["3x3"], torch.float32, b, activation)


@pytest.mark.parametrize("config", WALKS, ids=str)
@pytest.mark.parametrize("name", ["3x3 halved", "oblong, dilated", "stride and dilation share a factor"])
def test_rows_per_thread_do_not_matter(name, config, guards):
    compare_forward(guards, GEOMETRIES[name], torch.float32, 1.5, "silu", config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_parameters(dtype, guards):
    compare_forward(guards, GEOMETRIES["3x3"], dtype, 2.0, "none", parameters=False)


def test_only_what_was_asked_for(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    x, weight = put(guards, x, weight)
    y, *others = depthwise_fused(x, weight, **conv)
    check(y, expected(x, weight, None, None, None, None, conv, 2.0, "none")[1], torch.float32)
    assert all(t.numel() == 0 for t in others)


def test_b_in_memory_takes_the_general_formula(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    x, weight, b = put(guards, x, weight, torch.tensor(1.7))
    y = depthwise_fused(x, weight, **conv, b=b)[0]
    check(y, expected(x, weight, None, None, None, None, conv, 1.7, "none")[1], torch.float32)


def test_large_fp16_values_do_not_overflow_the_norm(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float16)
    x, weight = put(guards, x * 1000, weight / 16)
    y = depthwise_fused(x, weight, **conv)[0]
    check(y, expected(x, weight, None, None, None, None, conv, 2.0, "none")[1], torch.float16)


def test_dead_channels_and_filters_give_zeros(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    x[:, 3] = 0
    weight[5] = 0
    x, weight = put(guards, x, weight)
    y, multiplier, _, _ = depthwise_fused(x, weight, **conv, want_multiplier=True)
    for result in (y, multiplier):
        assert (result[:, [3, 5]] == 0).all()
        assert not result.isnan().any()


def test_relu_keeps_a_nan(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    x[1, 2, 3, 4] = torch.nan
    x, weight = put(guards, x, weight)
    y = depthwise_fused(x, weight, **conv, activation="relu")[0]
    touched = torch.zeros(y.shape, dtype=torch.bool)
    touched[1, 2, 2:5, 3:6] = True
    assert torch.equal(y.isnan().cpu(), touched)


def test_a_packed_weight_gives_the_same_bits(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    x, weight, packed = put(guards, x, weight, pack_transposed(weight))
    assert not packed.is_contiguous()
    assert torch.equal(depthwise_fused(x, weight, **conv)[0], depthwise_fused(x, packed, **conv)[0])


def test_images_in_any_memory_order(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    last, first, weight = put(guards, x, x.contiguous(), weight)
    assert torch.equal(depthwise_fused(last, weight, **conv)[0], depthwise_fused(first, weight, **conv)[0])


def transposed64(grad, weight, size, conv):
    """G without the identity, through autograd of the plain convolution in float64."""
    image = torch.zeros(grad.shape[0], conv["groups"], *size, dtype=torch.float64, requires_grad=True)
    z = F.conv2d(image, weight.double().cpu(), None, **conv)
    return torch.autograd.grad(z, image, grad.double().cpu())[0]


def compare_transposed(guards, geometry, dtype, kind, classes=1, config=None):
    x, weight, conv = problem(geometry, dtype)
    batch, size = x.shape[0], x.shape[2:]
    multiplier, on = draw(7, x.shape, dtype), draw(8, x.shape) > 0
    gate = {"bits": packed_bits(on), "float": draw(9, x.shape, dtype), "none": None}[kind]
    if gate is not None:
        gate = gate.contiguous(memory_format=torch.channels_last)
    places = F.conv2d(x.float(), weight.float(), None, **conv).shape[1:]
    grad = draw(10, (batch * classes, *places), dtype)
    identity = draw(11, (batch * classes, *x.shape[1:]), dtype)
    grad, weight, multiplier, identity, gate = put(guards, grad, weight, multiplier, identity, gate)
    out, raw = depthwise_transposed(
        grad, weight, size, conv["stride"], conv["padding"], conv["dilation"], conv["groups"], multiplier, identity,
        gate, True, config=config,
    )  # fmt: skip
    total = transposed64(grad, weight, size, conv) + identity.double().cpu()

    def repeated(factor):
        return factor.double().cpu().repeat_interleave(classes, 0)

    assert out.permute(0, 2, 3, 1).is_contiguous()
    assert out.dtype == raw.dtype == dtype
    check(out, total * repeated(multiplier), dtype, "out")
    factor = {"bits": on, "float": gate, "none": torch.ones_like(x)}[kind]
    check(raw, total * repeated(factor), dtype, "raw")


@every_case
def test_transposed(geometry, dtype, guards):
    compare_transposed(guards, geometry, dtype, "bits", 2)


@pytest.mark.parametrize("kind", ["none", "float"])
def test_transposed_gates(kind, guards):
    compare_transposed(guards, GEOMETRIES["3x3 halved"], torch.float32, kind, 3)


@pytest.mark.parametrize("config", WALKS, ids=str)
@pytest.mark.parametrize("name", ["3x3", "oblong, dilated", "stride and dilation share a factor"])
def test_transposed_rows_per_thread_do_not_matter(name, config, guards):
    compare_transposed(guards, GEOMETRIES[name], torch.float32, "bits", 1, config)


@every_geometry
def test_transposed_alone(geometry, guards):
    x, weight, conv = problem(geometry, torch.float32)
    grad = draw(10, F.conv2d(x, weight, None, **conv).shape)
    grad, weight = put(guards, grad, weight)
    out, raw = depthwise_transposed(
        grad, weight, x.shape[2:], conv["stride"], conv["padding"], conv["dilation"], conv["groups"]
    )
    check(out, transposed64(grad, weight, x.shape[2:], conv), torch.float32)
    assert raw.numel() == 0


@every_case
def test_grad_weight(geometry, dtype, guards):
    compare_grad_weight(guards, geometry, dtype)


def test_grad_weight_on_another_tile(guards):
    compare_grad_weight(guards, GEOMETRIES["two tiles of channels"], torch.float32, Config(2, 16))


def compare_grad_weight(guards, geometry, dtype, config=None):
    x, weight, conv = problem(geometry, dtype)
    grad_z = draw(12, F.conv2d(x.float(), weight.float(), None, **conv).shape, dtype)
    x, grad_z = put(guards, x, grad_z)
    arguments = (grad_z, x, weight.shape[2:], conv["stride"], conv["padding"], conv["dilation"], config)
    grad_w = depthwise_grad_weight(*arguments)
    w = weight.double().requires_grad_()
    z = F.conv2d(x.double().cpu(), w, None, **conv)
    assert grad_w.dtype == torch.float32
    # Products of stored values, summed in fp32: no rounding to storage in between.
    check(grad_w, torch.autograd.grad(z, w, grad_z.double().cpu())[0], torch.float32)
    assert torch.equal(grad_w, depthwise_grad_weight(*arguments))


def test_empty_batch(guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    places = (conv["stride"], conv["padding"], conv["dilation"])
    x, weight = put(guards, x[:0], weight)
    y, multiplier, gate, squares = depthwise_fused(
        x, weight, **conv, activation="relu", want_multiplier=True, want_gate=True, want_squares=True
    )
    assert y.shape == multiplier.shape == (0, 24, 7, 9)
    assert gate.shape == (0, 3, 7, 9)
    assert squares.shape == (0, 1, 7, 9)
    assert depthwise_transposed(y, weight, (7, 9), *places, 24, x)[0].shape == (0, 24, 7, 9)
    grad_w = depthwise_grad_weight(y, x, (3, 3), *places)
    assert grad_w.shape == (24, 1, 3, 3)
    assert (grad_w == 0).all()


def test_the_walk_fits_the_registers():
    rows = (1, 2, 4)
    assert rows_and_taps(rows, 3, 1, 1, True) == (4, 3)
    assert rows_and_taps(rows, 7, 1, 1, True) == (2, 7)
    assert rows_and_taps(rows, 7, 1, 1, False) == (4, 7)
    # Nothing is shared between rows further apart than the kernel is high.
    assert rows_and_taps(rows, 1, 1, 1, False) == (2, 1)
    # 31 is prime, so kernel rows come one by one; what a caller insists on is taken.
    assert rows_and_taps(rows, 31, 1, 1, True) == (2, 1)
    assert rows_and_taps((4,), 31, 1, 1, True) == (4, 1)


def test_small_problems_are_spread_over_more_programs(monkeypatch):
    tiles = []
    monkeypatch.setattr(depthwise, "launch", lambda name, function, grid, config, *_, **__: tiles.append(config))
    for batch in (1, 64):
        x = torch.empty(batch, 14, 14, 96, device="meta").permute(0, 3, 1, 2)
        depthwise_fused(x, torch.empty(96, 1, 3, 3, device="meta"), padding=(1, 1), groups=96)
    assert [tile.block_k for tile in tiles] == [1, 4]


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_through_the_op(b, device, guards):
    x, weight, conv = problem(GEOMETRIES["3x3"], torch.float32)
    x, weight = x.to(device), weight.to(device)
    with ops.use_backend("triton"):
        y = ops.conv2d_fused(x, weight, **conv, b=b, activation="relu", want_squares=True)[0]
        out = ops.conv2d_transposed(
            y, weight, x.shape[2:], conv["stride"], conv["padding"], conv["dilation"], conv["groups"], x
        )[0]
    y64 = expected(x, weight, None, None, None, None, conv, b, "relu")[1]
    check(y, y64, torch.float32)
    check(out, transposed64(y, weight, x.shape[2:], conv) * x.double().cpu(), torch.float32)

"""Image encoding, pooling and normalisation: kernels against the float64 reference, the reference against torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.kernels import reference_layers as reference
from bcos_rt.kernels.reference import map_entries, pack_mask
from bcos_rt.kernels.triton import norms, pool, scale_act, stem
from bcos_rt.kernels.triton.launch import Config
from tests.tolerances import TOLERANCES
from tests.triton.cases import ACTIVATIONS, DTYPES, channels_last, draw, is_channels_last
from tests.triton.guard import check

NAMED_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
LAUNCHERS = {
    name: getattr(module, name)
    for module, names in (
        (stem, ("encode_image",)),
        (pool, ("avg_pool2d", "max_pool2d", "avg_pool2d_transposed", "max_pool2d_transposed")),
        (scale_act, ("scale_act", "scale_act_transposed")),
        (norms, ("layer_norm", "layer_norm_transposed", "group_norm", "group_norm_transposed")),
    )
    for name in names
}

# Every window and dtype meets one kind of gate; the kinds do not depend on either.
GATES = dict(zip(DTYPES, ("values", "bits", "none"), strict=True))

# kernel, stride, padding, dilation, ceil_mode, image
WINDOWS = {
    "3x3": ((3, 3), (2, 2), (1, 1), (1, 1), False, (7, 9)),
    "2x2": ((2, 2), (2, 2), (0, 0), (1, 1), False, (6, 4)),
    "overlapping": ((3, 3), (1, 1), (1, 1), (1, 1), False, (4, 5)),
    "uneven_ceil": ((3, 2), (2, 3), (1, 1), (1, 1), True, (8, 5)),
    "ceil_outside": ((2, 3), (3, 2), (0, 1), (1, 1), True, (8, 6)),
    "gaps": ((2, 2), (4, 3), (0, 1), (1, 1), False, (9, 8)),
    "global": ((5, 6), (5, 6), (0, 0), (1, 1), False, (5, 6)),
    "global_padded": ((6, 6), (2, 2), (1, 1), (1, 1), False, (4, 4)),
    "wide": ((5, 5), (1, 1), (2, 2), (1, 1), False, (5, 4)),
}
DILATED = {
    "dilated": ((2, 2), (1, 1), (1, 1), (3, 2), True, (9, 9)),
    "dilated_strided": ((3, 2), (2, 3), (1, 1), (2, 2), False, (8, 7)),
}


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compare(guards, name, dtype, /, *arguments, **options):
    """Launch ``name`` on guarded copies and compare all it returns with the reference on the same values in float64."""
    copies = [guards.guarded(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    extra = {k: guards.guarded(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    actual = LAUNCHERS[name](*copies, **extra)
    options.pop("config", None)
    if name == "encode_image":
        options["dtype"] = torch.float64
    expected = getattr(reference, name)(*map(wide, arguments), **{k: wide(v) for k, v in options.items()})
    if isinstance(actual, torch.Tensor):
        actual, expected = (actual,), (expected,)
    for i, (result, truth) in enumerate(zip(actual, expected, strict=True)):
        check(result, truth, dtype, f"{name}: result {i}")
        if result.ndim == 4 and not name.startswith("layer_norm"):
            assert is_channels_last(result), i
    guards.verify()
    return tuple(result.cpu() for result in actual)


def image(channels, size, dtype=torch.float32, batch=2, seed=0):
    return channels_last(draw((batch, channels, *size), dtype, seed))


def check_map(y, squares, groups):
    """The map is of the rounded values, whatever the true ones are; its entries follow a group's channels."""
    size = y.shape[1] // groups
    parts = [part.double().square().sum(1) for g in y.split(size, 1) for part in g.split(64, 1)]
    assert squares.dtype == torch.float32
    check(squares, torch.stack(parts, 1), torch.float32, "map")


def epilogue(channels, size, dtype, gate, classes=3):
    """Multiplier, identity and gate of an adjoint with ``classes`` per image."""
    kept = {
        "multiplier": image(channels, size, dtype, 2, 30),
        "identity": image(channels, size, dtype, 2 * classes, 31),
        "gate": image(channels, size, dtype, 2, 32),
    }
    if gate == "bits":
        packed = pack_mask(kept["gate"].permute(0, 2, 3, 1) > 0)
        kept["gate"] = packed.permute(0, 3, 1, 2)
    elif gate == "none":
        kept["gate"] = None
    return kept


# --- the stem --------------------------------------------------------------------------------------------------------


IMAGES = {
    "bytes": lambda: torch.arange(2 * 3 * 9 * 13).reshape(2, 3, 9, 13).remainder(256).to(torch.uint8),
    "float": lambda: draw((2, 3, 12, 11), torch.float32, 1).sigmoid(),
    "half": lambda: draw((2, 3, 5, 7), torch.float16, 1).sigmoid(),
    "channels_last": lambda: channels_last(draw((2, 3, 7, 5), torch.float32, 1).sigmoid()),
    "strided": lambda: draw((2, 3, 14, 30), torch.float32, 1).sigmoid()[:, :, ::2, 1::3],
    "channels_of_more": lambda: draw((2, 5, 4, 4), torch.float32, 1).sigmoid()[:, 1:4],
    "empty": lambda: torch.empty(0, 3, 4, 4),
}


@NAMED_DTYPES
@pytest.mark.parametrize("six", [True, False], ids=("six", "three"))
@pytest.mark.parametrize("kind", IMAGES)
def test_encode_image(kind, six, dtype, guards):
    x = IMAGES[kind]()
    mean, std = (draw((6 if six else 3,), torch.float32, i).sigmoid() for i in (3, 4))
    encoded, squares = compare(guards, "encode_image", dtype, x, mean, std, six_channels=six, dtype=dtype)
    assert encoded.dtype == dtype
    assert not encoded[:, 6 if six else 3 :].any()
    if len(x):
        check_map(encoded, squares, 1)


def test_encoding_is_what_the_formula_says():
    x = IMAGES["bytes"]()
    mean, std = torch.rand(6).double(), torch.rand(6).double() + 0.5
    encoded, _ = reference.encode_image(x, mean, std, dtype=torch.float64)
    for c in range(3):
        v = x[:, c].double() / 255
        torch.testing.assert_close(encoded[:, c], (v - mean[c]) / std[c])
        torch.testing.assert_close(encoded[:, 3 + c], (1 - v - mean[3 + c]) / std[3 + c])


def test_encode_image_refuses(guards):
    with pytest.raises(InvalidArgumentError, match="image"):
        stem.encode_image(torch.rand(2, 4, 5, 5), torch.rand(6), torch.rand(6))
    with pytest.raises(InvalidArgumentError, match="std"):
        stem.encode_image(torch.rand(2, 3, 5, 5), torch.rand(6), torch.rand(3))


# --- pooling ---------------------------------------------------------------------------------------------------------


@NAMED_DTYPES
@pytest.mark.parametrize("window", WINDOWS)
def test_avg_pool(window, dtype, guards):
    kernel, stride, padding, _, ceil, size = WINDOWS[window]
    for channels, include in itertools.product((8, 5), (True, False)):
        x = image(channels, size, dtype)
        options = {"ceil_mode": ceil, "count_include_pad": include, "want_squares": True}
        y, squares = compare(guards, "avg_pool2d", dtype, x, kernel, stride, padding, **options)
        check_map(y, squares, 1)


@NAMED_DTYPES
@pytest.mark.parametrize("window", WINDOWS | DILATED)
def test_max_pool(window, dtype, guards):
    kernel, stride, padding, dilation, ceil, size = (WINDOWS | DILATED)[window]
    for channels in (8, 5):
        # Few different values: ties, of which the first place counts.
        x = image(channels, size, dtype).round()
        options = {"ceil_mode": ceil, "want_index": True, "want_squares": True}
        y, index, squares = compare(guards, "max_pool2d", dtype, x, kernel, stride, padding, dilation, **options)
        assert index.dtype == torch.uint8
        check_map(y, squares, 1)


@pytest.mark.parametrize(("channels", "groups"), [(12, 1), (12, 3), (20, 5), (8, 8), (200, 1), (200, 2), (256, 2)])
@pytest.mark.parametrize("name", ["avg_pool2d", "max_pool2d", "scale_act", "global"])
def test_maps_of_groups(name, channels, groups, guards):
    x = image(channels, (3, 4), torch.float16)
    v = draw((channels,), torch.float32, 5)
    arguments = {
        "avg_pool2d": (x, (2, 2), (1, 1), (0, 0)),
        "max_pool2d": (x, (2, 2), (1, 1), (0, 0), (1, 1)),
        "scale_act": (x, v, v, "relu"),
        "global": (x, (3, 4), (1, 1), (0, 0)),
    }[name]
    name = name.replace("global", "avg_pool2d")
    results = compare(guards, name, torch.float16, *arguments, want_squares=True, groups=groups)
    assert results[-1].shape[1] == groups * map_entries(channels // groups)
    check_map(results[0], results[-1], groups)


@NAMED_DTYPES
@pytest.mark.parametrize("window", WINDOWS)
def test_avg_pool_transposed(window, dtype, guards):
    kernel, stride, padding, _, ceil, size = WINDOWS[window]
    out = reference.pooled_size(size, kernel, stride, padding, (1, 1), ceil)
    for channels, include in ((8, True), (5, False)):
        grad = image(channels, out, dtype, 6, 7)
        kept = epilogue(channels, size, dtype, GATES[dtype])
        compare(
            guards, "avg_pool2d_transposed", dtype, grad, size, kernel, stride, padding, ceil, include,
            want_raw=True, **kept,
        )  # fmt: skip


@NAMED_DTYPES
@pytest.mark.parametrize("window", WINDOWS | DILATED)
def test_max_pool_transposed(window, dtype, guards):
    kernel, stride, padding, dilation, ceil, size = (WINDOWS | DILATED)[window]
    for channels in (8, 5):
        x = image(channels, size)
        _, index, _ = reference.max_pool2d(x, kernel, stride, padding, dilation, ceil, True)
        grad = image(channels, index.shape[2:], dtype, 6, 7)
        kept = epilogue(channels, size, dtype, GATES[dtype])
        arguments = (grad, index, size, kernel, stride, padding, dilation)
        compare(guards, "max_pool2d_transposed", dtype, *arguments, want_raw=True, **kept)


def test_pools_transposed_without_an_epilogue(guards):
    grad = image(5, (3, 3))
    _, index, _ = reference.max_pool2d(image(5, (6, 6)), (2, 2), (2, 2), (0, 0), want_index=True)
    _, raw = compare(guards, "avg_pool2d_transposed", torch.float32, grad, (6, 6), (2, 2), (2, 2), (0, 0))
    assert raw.numel() == 0
    compare(guards, "max_pool2d_transposed", torch.float32, grad, index, (6, 6), (2, 2), (2, 2), (0, 0))


def test_large_windows_have_a_wide_index(guards):
    x = image(3, (18, 19), batch=1)
    arguments = ((17, 16), (1, 2), (0, 3), (1, 1))
    _, index, _ = compare(guards, "max_pool2d", torch.float32, x, *arguments, want_index=True)
    assert index.dtype == torch.int32
    assert int(index.max()) > 255
    grad = image(3, index.shape[2:], batch=1, seed=1)
    compare(guards, "max_pool2d_transposed", torch.float32, grad, index, (18, 19), *arguments)


@NAMED_DTYPES
def test_max_pool_of_nan_and_infinities(dtype, guards):
    x = image(5, (6, 6), dtype)
    x[0, 0, 1, 1] = x[0, 0, 2, 2] = x[1, 3, 5, 5] = float("nan")
    x[0, 1] = float("-inf")
    x[1, 0, :3] = float("inf")
    arguments = ((3, 3), (2, 2), (1, 1), (1, 1), False, True)
    y, index, _ = pool.max_pool2d(guards.guarded(x), *arguments)
    expected, places, _ = reference.max_pool2d(x, *arguments)
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.cpu(), places)


def test_the_window_may_miss_the_image(guards):
    """A dilated window whose places all lie in the padding: -inf, as in torch."""
    x = image(3, (4, 2))
    arguments = ((2, 2), (1, 1), (0, 1), (1, 3))
    y, _, _ = pool.max_pool2d(guards.guarded(x), *arguments)
    assert torch.equal(y.cpu(), F.max_pool2d(x, *arguments))
    assert y.isinf().any()


@pytest.mark.parametrize(
    ("argument", "window"),
    [
        ("kernel_size", ((0, 2), (1, 1), (0, 0))),
        ("kernel_size", ((7, 2), (1, 1), (0, 0))),
        ("stride", ((2, 2), (1, 0), (0, 0))),
        ("padding", ((2, 2), (1, 1), (2, 0))),
        ("padding", ((2, 2), (1, 1), (-1, 0))),
    ],
)
def test_pools_refuse(argument, window, guards):
    x = image(4, (5, 6))
    for module in (reference, pool):
        for name in ("avg_pool2d", "max_pool2d"):
            with pytest.raises(InvalidArgumentError, match=argument):
                getattr(module, name)(x, *window)
    with pytest.raises(InvalidArgumentError, match="groups"):
        pool.max_pool2d(x, (2, 2), (2, 2), (0, 0), want_squares=True, groups=3)


@pytest.mark.parametrize("window", WINDOWS | DILATED)
def test_pooling_reference_is_torch(window):
    kernel, stride, padding, dilation, ceil, size = (WINDOWS | DILATED)[window]
    x = draw((2, 5, *size), torch.float64, 0).requires_grad_()
    expected, flat = F.max_pool2d(x, kernel, stride, padding, dilation, ceil, return_indices=True)
    y, index, squares = reference.max_pool2d(x.detach(), kernel, stride, padding, dilation, ceil, True, True)
    assert torch.equal(y, expected)
    assert tuple(y.shape[2:]) == reference.pooled_size(size, kernel, stride, padding, dilation, ceil)
    torch.testing.assert_close(squares[:, 0], y.square().sum(1))
    out_h, out_w = y.shape[2:]
    for p, q in itertools.product(range(out_h), range(out_w)):
        h = p * stride[0] - padding[0] + index[:, :, p, q].long() // kernel[1] * dilation[0]
        w = q * stride[1] - padding[1] + index[:, :, p, q].long() % kernel[1] * dilation[1]
        assert torch.equal(h * size[1] + w, flat[:, :, p, q])
    grad = draw(y.shape, torch.float64, 1)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    out, _ = reference.max_pool2d_transposed(grad, index, size, kernel, stride, padding, dilation)
    torch.testing.assert_close(out, expected_grad)
    if dilation == (1, 1):
        for include in (True, False):
            expected = F.avg_pool2d(x, kernel, stride, padding, ceil, include)
            y, _ = reference.avg_pool2d(x.detach(), kernel, stride, padding, ceil, include)
            assert torch.equal(y, expected)
            (expected_grad,) = torch.autograd.grad(expected, x, grad)
            out, _ = reference.avg_pool2d_transposed(grad, size, kernel, stride, padding, ceil, include)
            torch.testing.assert_close(out, expected_grad)


# --- scale, shift and activation -------------------------------------------------------------------------------------


@NAMED_DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scale_act(activation, dtype, guards):
    for channels in (8, 21):
        scale, shift = (draw((channels,), torch.float32, i) for i in (1, 2))
        # Values on both sides of ReLU6's and Hardswish's bends.
        x = image(channels, (5, 7), dtype) * 4
        y, squares = compare(guards, "scale_act", dtype, x, scale, shift, activation, want_squares=True)
        check_map(y, squares, 1)
        grad = image(channels, (5, 7), dtype, 6, 3)
        identity = image(channels, (5, 7), dtype, 6, 4)
        compare(guards, "scale_act_transposed", dtype, grad, x, scale, shift, activation, identity)
        compare(guards, "scale_act_transposed", dtype, grad, x, scale, shift, activation)


def test_scale_act_reference_is_torch():
    functions = (lambda u: u, F.relu, F.relu6, F.gelu, F.silu, F.hardswish)
    x = draw((2, 5, 3, 4), torch.float64, 0) * 4
    scale, shift = (draw((5,), torch.float64, i) for i in (1, 2))
    for name, function in zip(ACTIVATIONS, functions, strict=True):
        u = x * scale[:, None, None] + shift[:, None, None]
        y, _ = reference.scale_act(x, scale, shift, name)
        torch.testing.assert_close(y, function(u))
        # Linear in u, the gate constant: the adjoint of v -> scale gate v.
        grad = draw(y.shape, torch.float64, 3)
        slope = scale[:, None, None] * torch.where(u == 0, 0, function(u) / u)
        torch.testing.assert_close(reference.scale_act_transposed(grad, x, scale, shift, name), grad * slope)


def test_scale_act_refuses(guards):
    v = torch.ones(4)
    with pytest.raises(InvalidArgumentError, match="relu"):
        scale_act.scale_act(image(4, (2, 2)), v, v, "rellu")


def test_infinities_pass_a_relu(guards):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0]).reshape(1, 4, 1, 1)
    y, _ = scale_act.scale_act(guards.guarded(x), *(guards.guarded(v) for v in (torch.ones(4), torch.zeros(4))), "relu")
    torch.testing.assert_close(y.cpu(), x.relu(), equal_nan=True)


# --- normalisation ---------------------------------------------------------------------------------------------------


def parameters(channels):
    weight, bias = (draw((channels,), torch.float32, i) for i in (1, 2))
    return [(weight, bias), (None, None)]


@NAMED_DTYPES
@pytest.mark.parametrize("channels", [1, 24, 300])
def test_layer_norm(channels, dtype, guards):
    x = draw((2, 7, channels), dtype, 0) * 3 + 1
    for weight, bias in parameters(channels):
        y, rstd, squares = compare(guards, "layer_norm", dtype, x, weight, bias, 1e-5, want_squares=True)
        assert rstd.dtype == torch.float32
        check(squares[..., 0], y.double().square().sum(-1), torch.float32, "map")
        grad, identity = (draw((6, 7, channels), dtype, i) for i in (3, 4))
        rstd = draw((2, 7), torch.float32, 5).abs()
        compare(guards, "layer_norm_transposed", dtype, grad, rstd, weight, identity)
    compare(guards, "layer_norm_transposed", dtype, grad, rstd, None)


def test_layer_norm_of_one_token_and_of_images(guards):
    for shape in ((5,), (3, 5), (2, 3, 4, 5)):
        x = draw(shape, torch.float32, 0)
        compare(guards, "layer_norm", torch.float32, x, None, None, 1e-6)
        rstd = draw(shape[:-1], torch.float32, 1).abs()
        compare(guards, "layer_norm_transposed", torch.float32, x, rstd, None)


@NAMED_DTYPES
@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (12, 3), (4, 4), (40, 1)])
def test_group_norm(channels, groups, dtype, guards):
    x = image(channels, (3, 7), dtype) * 3 + 1
    for weight, bias in parameters(channels):
        # Several tiles of places, the last one partial.
        options = {"config": Config(16, 1)}
        results = compare(guards, "group_norm", dtype, x, groups, weight, bias, 1e-5, want_squares=True, **options)
        y, rstd, squares = results
        assert rstd.dtype == torch.float32
        check(squares, y.double().square().unflatten(1, (groups, -1)).sum(2), torch.float32, "map")
        grad, identity = (image(channels, (3, 7), dtype, 6, i) for i in (3, 4))
        rstd = draw((2, groups), torch.float32, 5).abs()
        compare(guards, "group_norm_transposed", dtype, grad, rstd, weight, groups, identity, **options)
    compare(guards, "group_norm_transposed", dtype, grad, rstd, None, groups)


def test_norms_of_values_far_from_zero(guards):
    """A variance from sums of squares would be lost here."""
    x = image(12, (5, 7)) + 100
    compare(guards, "group_norm", torch.float32, x, 3, None, None, 1e-5, config=Config(16, 1))
    compare(guards, "layer_norm", torch.float32, x.permute(0, 2, 3, 1), None, None, 1e-5)


def test_norms_of_constants(guards):
    x = torch.full((2, 6, 3, 3), 7.0)
    compare(guards, "group_norm", torch.float32, channels_last(x), 2, None, None, 1e-5, want_squares=True)
    compare(guards, "layer_norm", torch.float32, x, None, None, 1e-5, want_squares=True)


def test_norms_refuse(guards):
    with pytest.raises(InvalidArgumentError, match="16384"):
        norms.layer_norm(torch.empty(1, norms.MAX_CHANNELS + 1, device="meta"), None, None, 1e-5)
    for module in (reference, norms):
        with pytest.raises(InvalidArgumentError, match="groups"):
            module.group_norm(image(6, (2, 2)), 4, None, None, 1e-5)


def test_norm_reference_is_torch():
    """Forward against torch, the adjoint against autograd through the norm with its variance detached."""
    weight, bias = (draw((6,), torch.float64, i) for i in (1, 2))
    x = draw((2, 6, 3, 5), torch.float64, 0).requires_grad_()
    grad = draw(x.shape, torch.float64, 3)
    for groups in (1, 2, 6):
        y, rstd, squares = reference.group_norm(x.detach(), groups, weight, bias, 1e-5, True)
        torch.testing.assert_close(y, F.group_norm(x.detach(), groups, weight, bias, 1e-5))
        torch.testing.assert_close(squares, y.square().unflatten(1, (groups, -1)).sum(2))
        held = x.unflatten(1, (groups, -1))
        centred = held - held.mean((2, 3, 4), keepdim=True)
        spread = centred.square().mean((2, 3, 4), keepdim=True).detach()
        linear = (centred / (spread + 1e-5).sqrt()).flatten(1, 2) * weight[:, None, None] + bias[:, None, None]
        torch.testing.assert_close(linear, y)
        (expected,) = torch.autograd.grad(linear, x, grad)
        out = reference.group_norm_transposed(grad, rstd, weight, groups, grad)
        torch.testing.assert_close(out, expected + grad, rtol=TOLERANCES["oracle64"], atol=TOLERANCES["oracle64"])
    tokens = x.permute(0, 2, 3, 1)
    y, rstd, squares = reference.layer_norm(tokens.detach(), weight, bias, 1e-5, True)
    torch.testing.assert_close(y, F.layer_norm(tokens.detach(), (6,), weight, bias, 1e-5))
    torch.testing.assert_close(squares[..., 0], y.square().sum(-1))
    centred = tokens - tokens.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).detach()
    linear = centred / (spread + 1e-5).sqrt() * weight + bias
    (expected,) = torch.autograd.grad(linear, x, grad.permute(0, 2, 3, 1))
    out = reference.layer_norm_transposed(grad.permute(0, 2, 3, 1), rstd, weight)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), expected)


# --- magnitudes, layouts, nothing at all -----------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [6e4, 3e-6])
def test_fp16_squares_neither_overflow_nor_vanish(magnitude, guards):
    x = (image(24, (4, 4)).clamp(-1, 1) * magnitude).half()
    one, zero = torch.ones(24), torch.zeros(24)
    calls = {
        "avg_pool2d": (x, (2, 2), (2, 2), (0, 0)),
        "max_pool2d": (x, (2, 2), (2, 2), (0, 0), (1, 1)),
        "scale_act": (x, one, zero, "relu"),
    }
    for name, arguments in calls.items():
        copies = [guards.guarded(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        results = LAUNCHERS[name](*copies, want_squares=True)
        assert results[-1].isfinite().all()
        assert results[-1].amax() > 0
        check_map(results[0].cpu(), results[-1].cpu(), 1)
    compare(guards, "layer_norm", torch.float16, x.permute(0, 2, 3, 1), one, zero, 0.0, want_squares=True)
    compare(guards, "group_norm", torch.float16, x, 3, one, zero, 0.0, want_squares=True)


def test_any_layout_comes_out_channels_last(guards):
    x = draw((2, 5, 6, 4), torch.float32, 0)
    compare(guards, "avg_pool2d", torch.float32, x, (2, 2), (2, 2), (0, 0))
    compare(guards, "max_pool2d", torch.float32, x, (2, 2), (2, 2), (0, 0), (1, 1), want_index=True)
    compare(guards, "group_norm", torch.float32, x, 5, None, None, 1e-5)
    compare(guards, "layer_norm", torch.float32, x.transpose(1, 3), None, None, 1e-5)
    grad = draw((4, 5, 6, 4), torch.float32, 1)
    compare(guards, "scale_act_transposed", torch.float32, grad, x, torch.ones(5), torch.ones(5), "silu", grad)


def test_empty_batch(guards):
    x, v = image(8, (4, 4), batch=0), torch.ones(8)
    compare(guards, "avg_pool2d", torch.float32, x, (2, 2), (2, 2), (0, 0), want_squares=True)
    compare(guards, "avg_pool2d", torch.float32, x, (4, 4), (4, 4), (0, 0), want_squares=True)
    _, index, _ = compare(
        guards, "max_pool2d", torch.float32, x, (2, 2), (2, 2), (0, 0), want_index=True, want_squares=True
    )
    grad = image(8, (2, 2), batch=0)
    compare(guards, "avg_pool2d_transposed", torch.float32, grad, (4, 4), (2, 2), (2, 2), (0, 0), want_raw=True)
    compare(guards, "max_pool2d_transposed", torch.float32, grad, index, (4, 4), (2, 2), (2, 2), (0, 0), multiplier=x)
    compare(guards, "scale_act", torch.float32, x, v, v, "gelu", want_squares=True)
    compare(guards, "scale_act_transposed", torch.float32, x, x, v, v, "gelu", x)
    compare(guards, "layer_norm", torch.float32, x, None, None, 1e-5, want_squares=True)
    compare(guards, "layer_norm_transposed", torch.float32, x, x[..., 0].contiguous(), None, x)
    compare(guards, "group_norm", torch.float32, x, 2, v, v, 1e-5, want_squares=True)
    compare(guards, "group_norm_transposed", torch.float32, x, torch.empty(0, 2), v, 2, x)

"""The forward convolution kernel, every option of its epilogue, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from bcos_rt.kernels import ops
from bcos_rt.kernels.triton.conv import conv2d_fused
from bcos_rt.kernels.triton.launch import Config
from tests.triton.cases import ACTIVATIONS, BS, DTYPES, GEOMETRIES, Geometry, channels_last, compare, draw
from tests.triton.guard import check

NAMED_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
CONV = GEOMETRIES["3x3"]


def parameters(filters, *names):
    """Float32 vectors of the epilogue, none of them zero or one."""
    drawn = {name: draw((filters,), torch.float32, 10 + i) for i, name in enumerate(("bias", "scale", "shift"))}
    return {name: drawn[name] for name in names}


def everything(geometry, dtype, batch=2):
    return {
        **parameters(geometry.filters, "bias", "scale", "shift"),
        "residual": geometry.y_like(batch, dtype, seed=20),
    }


WANT_ALL = {"want_multiplier": True, "want_gate": True, "want_squares": True}


@NAMED_DTYPES
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, guards):
    g = GEOMETRIES[name]
    compare(guards, "conv2d_fused", dtype, {"x": g.x(dtype=dtype), "weight": g.weight(dtype)}, **g.options)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_with_the_whole_epilogue(name, guards):
    g = GEOMETRIES[name]
    tensors = {"x": g.x(), "weight": g.weight(), **everything(g, torch.float32)}
    compare(guards, "conv2d_fused", torch.float32, tensors, activation="relu", **WANT_ALL, **g.options)


@NAMED_DTYPES
@pytest.mark.parametrize("b", BS)
def test_every_b(b, dtype, guards):
    tensors = {"x": CONV.x(dtype=dtype), "weight": CONV.weight(dtype), **parameters(CONV.filters, "bias", "scale")}
    compare(guards, "conv2d_fused", dtype, tensors, b=b, **WANT_ALL, **CONV.options)


@pytest.mark.parametrize(
    ("extra", "wants"),
    [
        (("bias",), {}),
        (("scale",), {}),
        (("shift",), {}),
        (("residual",), {}),
        ((), {"want_multiplier": True}),
        ((), {"want_gate": True}),
        ((), {"want_squares": True}),
    ],
    ids=str,
)
def test_every_option_alone(extra, wants, guards):
    g = GEOMETRIES["odd_channels"]
    given = {name: value for name, value in everything(g, torch.float16).items() if name in extra}
    tensors = {"x": g.x(dtype=torch.float16), "weight": g.weight(torch.float16), **given}
    results = compare(guards, "conv2d_fused", torch.float16, tensors, **wants, **g.options)
    wanted = [name.removeprefix("want_") for name in wants if name != "want_gate"]
    assert [r.numel() > 0 for r in results] == [True, *(n in wanted for n in ("multiplier", "gate", "squares"))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_alone(activation, guards):
    g = GEOMETRIES["odd_channels"]
    tensors = {"x": g.x() * 4, "weight": g.weight()}
    compare(guards, "conv2d_fused", torch.float32, tensors, activation=activation, **g.options)


@NAMED_DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_everything_together(activation, dtype, guards):
    g = Geometry(16, 20, (3, 3), padding=(1, 1), size=(5, 4))
    # Values on both sides of ReLU6's and Hardswish's bends.
    tensors = {"x": g.x(dtype=dtype) * 4, "weight": g.weight(dtype), **everything(g, dtype)}
    results = compare(guards, "conv2d_fused", dtype, tensors, activation=activation, **WANT_ALL, **g.options)
    assert results[2].dtype == (torch.uint8 if activation == "relu" else dtype)


@NAMED_DTYPES
@pytest.mark.parametrize(("name", "tiles"), [("3x3", 3), ("uneven", 2), ("uneven", 6), ("1x1", 2), ("grouped", 8)])
def test_a_map_is_what_the_norm_comes_from(name, tiles, dtype, guards):
    """A map that is not the sum of x's squares: entries ``g T / G`` to ``(g + 1) T / G - 1`` belong to group g."""
    g = GEOMETRIES[name]
    squares = channels_last(draw((2, tiles, *g.size), torch.float32, 5).abs() + 0.1)
    tensors = {"x": g.x(dtype=dtype), "weight": g.weight(dtype), "squares": squares}
    compare(guards, "conv2d_fused", dtype, tensors, **g.options)


@NAMED_DTYPES
@pytest.mark.parametrize("name", ["many_channels", "grouped_bytes"])
def test_one_layer_feeds_the_next(name, dtype, guards):
    """The map that a layer writes is the one that the next layer's own squares would be."""
    g = GEOMETRIES[name]
    first = {"x": g.x(dtype=dtype), "weight": g.weight(dtype)}
    y, _, _, squares = compare(guards, "conv2d_fused", dtype, first, want_squares=True, **g.options)
    after = Geometry(g.filters, 9, (3, 3), padding=(1, 1), size=g.out_size)
    tensors = {"x": y, "weight": after.weight(dtype)}
    given = compare(guards, "conv2d_fused", dtype, {**tensors, "squares": squares}, **after.options)
    worked_out = compare(guards, "conv2d_fused", dtype, tensors, **after.options)
    torch.testing.assert_close(given[0], worked_out[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@NAMED_DTYPES
def test_b_1_is_a_plain_convolution(dtype, guards):
    g = GEOMETRIES["uneven"]
    x, weight = g.x(dtype=dtype), g.weight(dtype)
    bias = parameters(g.filters, "bias")["bias"]
    with ops.use_backend("triton"):
        y = ops.conv2d_fused(*map(guards.guarded, (x, weight)), None, guards.guarded(bias), b=1.0, **g.options)[0]
    check(y, F.conv2d(x.double(), weight.double(), bias.double(), **g.options), dtype)


@pytest.mark.parametrize("name", ["odd_channels", "grouped", "patchify", "1x1"])
def test_layouts_give_the_same_numbers(name, guards):
    """Channels-last, NCHW, and slices of something larger."""
    g = GEOMETRIES[name]
    last = {
        "x": g.x(),
        "weight": g.weight(),
        "residual": g.y_like(seed=3),
        "squares": channels_last(draw((2, g.groups * 2, *g.size), torch.float32, 4).square()),
    }
    first = {key: value.contiguous() for key, value in last.items()}
    sliced = {key: value.contiguous().repeat_interleave(2, 3)[..., ::2] for key, value in last.items()}
    results = [
        compare(guards, "conv2d_fused", torch.float32, t, **WANT_ALL, **g.options) for t in (last, first, sliced)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@NAMED_DTYPES
@pytest.mark.parametrize("b", BS)
def test_patches_of_zeros_give_zero(b, dtype, guards):
    x = CONV.x(dtype=dtype)
    x[0] = 0
    x[1, :, :, :4] = 0
    tensors = {"x": x, "weight": CONV.weight(dtype)}
    y, multiplier, _, squares = compare(guards, "conv2d_fused", dtype, tensors, b=b, **WANT_ALL, **CONV.options)
    assert not y[0].any()
    assert not squares[0].any()
    assert not multiplier[0].isnan().any()
    if b == 2:
        assert not multiplier[0].any()


@pytest.mark.parametrize(
    ("dtype", "size", "weight_size"),
    [
        (torch.float16, 2000.0, 1.0),  # squares overflow above 256
        (torch.float16, 1e-4, 10.0),  # and vanish below 2.4e-4
        (torch.bfloat16, 1e12, 1.0),
        (torch.bfloat16, 1e-4, 10.0),
        (torch.float32, 1e15, 1.0),
        (torch.float32, 1e-6, 100.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("b", [1.5, 2.0])
def test_magnitudes(dtype, size, weight_size, b, guards):
    """Without a map: the kernel's own squares; results stay in the dtype's range."""
    tensors = {"x": CONV.x(dtype=torch.float64) * size, "weight": CONV.weight(torch.float64) * weight_size}
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    y = compare(guards, "conv2d_fused", dtype, tensors, b=b, want_multiplier=True, **CONV.options)[0]
    assert y.abs().max() > 0


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_a_nan_stays_where_its_patches_are(activation, guards):
    x = CONV.x()
    x[1, 3, 2, 1] = float("nan")
    with ops.use_backend("triton"):
        y = ops.conv2d_fused(guards.guarded(x), guards.guarded(CONV.weight()), activation=activation, **CONV.options)[0]
    expected = torch.zeros(y.shape, dtype=torch.bool)
    expected[1, :, 1:4, 0:3] = True
    assert torch.equal(y.isnan().cpu(), expected)


def test_a_relu_closes_on_minus_infinity(guards):
    """A gate of 0 times an infinity would be NaN."""
    x = CONV.x()
    x[1, 3, 2, 1] = float("inf")
    tensors = {"x": x, "weight": CONV.weight()}
    y = compare(guards, "conv2d_fused", torch.float32, tensors, b=1.0, activation="relu", **CONV.options)[0]
    assert y.isinf().any()
    assert not y.isnan().any()


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("name", ["3x3", "grouped"])
def test_batches(batch, name, guards):
    g = GEOMETRIES[name]
    tensors = {"x": g.x(batch), "weight": g.weight(), **everything(g, torch.float32, batch)}
    compare(guards, "conv2d_fused", torch.float32, tensors, activation="relu", **WANT_ALL, **g.options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        Config(16, 64, 16),
        Config(64, 16, 64, group_m=1),
        Config(32, 128, 32, 4),
        Config(16, 256, 32, 1),
        Config(128, 64, 16),
    ],
    ids=str,
)
def test_tiles_do_not_change_the_result(config, dtype, guards):
    """Several parts of the epilogue, several entries of the map in one tile, tiles larger than the problem."""
    g = Geometry(24, 200, (2, 2), padding=(1, 0), size=(3, 4))
    tensors = {"x": g.x(dtype=dtype), "weight": g.weight(dtype), **everything(g, dtype)}
    expected = compare(guards, "conv2d_fused", dtype, tensors, activation="relu", **WANT_ALL, **g.options)
    given = {key: guards.guarded(value) for key, value in tensors.items()}
    actual = conv2d_fused(**given, activation="relu", config=config, **WANT_ALL, **g.options)
    for result, truth in zip(actual, expected, strict=True):
        check(result, truth.double() if truth.is_floating_point() else truth, dtype)
    assert actual[3].shape[1] == 4


@pytest.mark.parametrize("groups", [1, 3])
@NAMED_DTYPES
def test_square_sum(groups, dtype, guards):
    for channels, size in ((33, (5, 7)), (3, (1, 1)), (300, (2, 3))):
        x = channels_last(draw((2, channels, *size), dtype, 0) * 300)
        compare(guards, "square_sum", torch.float32, {"x": x}, groups=groups)
    compare(guards, "square_sum", torch.float32, {"x": x.contiguous()}, groups=groups)
    compare(guards, "square_sum", torch.float32, {"x": x[:0]}, groups=groups)


def test_opcheck(device):
    """Shapes, dtypes and strides that a compiler is told are those that come."""
    g = GEOMETRIES["odd_channels"]
    given = {"x": g.x(), "weight": g.weight(), **everything(g, torch.float32)}
    t = {key: value.to(device) for key, value in given.items()}
    arguments = (
        t["x"], t["weight"], None, t["bias"], t["scale"], t["shift"], t["residual"], list(g.stride), list(g.padding),
        list(g.dilation), 1, 2.0, 1e-6, "relu", True, True, True,
    )  # fmt: skip
    with ops.use_backend("triton"):
        torch.library.opcheck(torch.ops.bcos_rt.conv2d_fused, arguments)

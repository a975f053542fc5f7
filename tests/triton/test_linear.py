"""The forward linear kernel, every option of its epilogue, against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from bcos_rt.kernels import ops
from bcos_rt.kernels.triton.launch import Config
from bcos_rt.kernels.triton.linear import linear_fused
from tests.triton.cases import ACTIVATIONS, BS, DTYPES, compare, draw
from tests.triton.guard import check

NAMED_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
SHAPES = {
    # name: x, filters
    "rows": ((5, 40), 70),
    "tokens": ((2, 3, 24), 7),
    "many_rows": ((70, 33), 35),
    "vector": ((33,), 9),
    "grid": ((2, 3, 2, 8), 16),
    "one_channel": ((3, 1), 1),
    "no_rows": ((0, 8), 5),
    "no_tokens": ((2, 0, 8), 5),
}
WANT_ALL = {"want_multiplier": True, "want_gate": True, "want_squares": True}


def operands(name, dtype, size=1.0):
    shape, filters = SHAPES[name]
    weight = draw((filters, shape[-1]), torch.float64, 1)
    return {
        "x": (draw(shape, torch.float64, 0) * size).to(dtype),
        "weight": (weight / weight.norm(dim=1, keepdim=True)).to(dtype),
    }


def epilogue(name, dtype):
    shape, filters = SHAPES[name]
    return {
        "bias": draw((filters,), torch.float32, 2),
        "scale": draw((filters,), torch.float32, 3),
        "shift": draw((filters,), torch.float32, 4),
        "residual": draw((*shape[:-1], filters), dtype, 5),
    }


@NAMED_DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, guards):
    compare(guards, "linear_fused", dtype, operands(name, dtype))


@NAMED_DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_with_the_whole_epilogue(name, dtype, guards):
    tensors = {**operands(name, dtype), **epilogue(name, dtype)}
    compare(guards, "linear_fused", dtype, tensors, activation="relu", **WANT_ALL)


@NAMED_DTYPES
@pytest.mark.parametrize("b", BS)
def test_every_b(b, dtype, guards):
    compare(guards, "linear_fused", dtype, operands("tokens", dtype), b=b, **WANT_ALL)


@pytest.mark.parametrize("option", ["bias", "scale", "shift", "residual", "multiplier", "gate", "squares"])
def test_every_option_alone(option, guards):
    tensors = operands("tokens", torch.bfloat16)
    given = {key: value for key, value in epilogue("tokens", torch.bfloat16).items() if key == option}
    wants = {} if given else {f"want_{option}": True}
    compare(guards, "linear_fused", torch.bfloat16, {**tensors, **given}, **wants)


@NAMED_DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_everything_together(activation, dtype, guards):
    tensors = {**operands("rows", dtype, 6.0), **epilogue("rows", dtype)}
    _, _, gate, _ = compare(guards, "linear_fused", dtype, tensors, activation=activation, **WANT_ALL)
    assert gate.shape[-1:] == {"none": (0,), "relu": (9,)}.get(activation, (70,))


@NAMED_DTYPES
@pytest.mark.parametrize("entries", [1, 3])
def test_a_map_is_what_the_norm_comes_from(entries, dtype, guards):
    squares = draw((2, 3, entries), torch.float32, 6).abs() + 0.1
    compare(guards, "linear_fused", dtype, {**operands("tokens", dtype), "squares": squares})


@NAMED_DTYPES
def test_one_layer_feeds_the_next(dtype, guards):
    y, _, _, squares = compare(guards, "linear_fused", dtype, operands("rows", dtype), want_squares=True)
    assert squares.shape == (5, 2)
    weight = draw((6, 70), dtype, 7)
    results = [
        compare(guards, "linear_fused", dtype, {"x": y, "weight": weight, "squares": given})[0]
        for given in (squares, None)
    ]
    torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@NAMED_DTYPES
def test_b_1_is_a_plain_linear_layer(dtype, guards):
    t = operands("tokens", dtype)
    with ops.use_backend("triton"):
        y = ops.linear_fused(guards.guarded(t["x"]), guards.guarded(t["weight"]), b=1.0)[0]
    check(y, F.linear(t["x"].double(), t["weight"].double()), dtype)


@NAMED_DTYPES
@pytest.mark.parametrize("b", BS)
def test_rows_of_zeros_give_zero(b, dtype, guards):
    t = operands("rows", dtype)
    t["x"][1:4] = 0
    y = compare(guards, "linear_fused", dtype, t, b=b, activation="gelu", **WANT_ALL)[0]
    assert not y[1:4].any()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 3000.0),  # squares overflow above 256
        (torch.float16, 2e-4),  # and vanish below 2.4e-4
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
    ],
    ids=str,
)
def test_magnitudes(dtype, size, guards):
    """B = 2 keeps the scale of its input: ||x|| cos |cos|."""
    y = compare(guards, "linear_fused", dtype, operands("rows", dtype, size), want_multiplier=True)[0]
    assert y.abs().max() > 0


def test_layouts_give_the_same_numbers(guards):
    t = {**operands("rows", torch.float32), **epilogue("rows", torch.float32)}
    matrices = ("x", "weight", "residual")
    turned = {key: value.t().contiguous().t() if key in matrices else value for key, value in t.items()}
    sliced = {key: value.repeat_interleave(2, 1)[:, ::2] if key in matrices else value for key, value in t.items()}
    results = [compare(guards, "linear_fused", torch.float32, given, **WANT_ALL) for given in (t, turned, sliced)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("config", [Config(16, 32, 16), Config(64, 256, 64, 1), Config(16, 128, 128)], ids=str)
def test_tiles_do_not_change_the_result(config, guards):
    t = {"x": draw((37, 50), torch.float16, 0), "weight": draw((150, 50), torch.float16, 1) / 8}
    expected = compare(guards, "linear_fused", torch.float16, t, activation="relu", **WANT_ALL)
    given = {key: guards.guarded(value) for key, value in t.items()}
    actual = linear_fused(**given, activation="relu", config=config, **WANT_ALL)
    for result, truth in zip(actual, expected, strict=True):
        check(result, truth.double() if truth.is_floating_point() else truth, torch.float16)

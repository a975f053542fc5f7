"""Every lowering against the fused op it replaces, in float64; and a whole network's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcos_rt.errors import UnsupportedOpError
from bcos_rt.graph.fused import build_fused
from bcos_rt.graph.lower import lower_to_aten
from bcos_rt.graph.lower_transposed import ParityAxis
from bcos_rt.graph.specialise import specialise, with_image_dtype
from bcos_rt.kernels import ops
from tests.graph.programs import program_of
from tests.kernels.chain import network
from tests.kernels.test_ops import GEOMETRIES
from tests.tolerances import kernel_tolerance

BS = (1.0, 1.5, 2.0, 2.5)
ACTIVATIONS = ops.ACTIVATIONS
N = 2


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def check(function, first, *constants):
    """The lowered program's outputs are the fused op's, for a compiler and op by op; no fused op is left."""
    program = program_of(function, first, [c for c in constants if c is not None])
    expected = program.run(first, None)
    assert expected
    dtype = next(t.dtype for t in expected.values() if t.is_floating_point())
    for compiled in (False, True):
        lowered = lower_to_aten(program, compiled=compiled)
        lowered.graph.lint()
        assert not [n for n in lowered.graph.nodes if "bcos_rt" in str(n.target)]
        result = lowered.run(first, None)
        for name, value in expected.items():
            assert result[name].dtype == value.dtype
            torch.testing.assert_close(result[name], value, check_stride=False, **kernel_tolerance(dtype))
    return lowered


def geometry(name):
    cin, out, kernel, stride, padding, dilation, groups, size = GEOMETRIES[name]
    return cin, out, kernel, size, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", BS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolution(name, b):
    cin, out, kernel, size, window = geometry(name)
    x, w = rand(N, cin, *size), rand(out, cin // window["groups"], *kernel)
    scale, shift, bias = (rand(out, seed=s, dtype=torch.float32) for s in (1, 2, 3))
    y = torch.nn.functional.conv2d(x, w, None, **window)

    def layer(x, w, scale, shift, bias, residual):
        given = {"scale": scale, "shift": shift, "bias": bias, "residual": residual}
        y, m, _, _ = ops.conv2d_fused(x, w, None, **given, **window, b=b, activation="relu", want_multiplier=True)
        plain, _, _, _ = ops.conv2d_fused(x, w, None, **window, b=b)
        return y, m, plain

    check(layer, x, w, scale, shift, bias, rand(*y.shape, seed=4))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("b", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3])
def test_gate_and_multiplier_reach_the_adjoint(activation, b, k):
    x, w, grad, identity = rand(N, 5, 9, 7), rand(11, 5, 3, 3), rand(N * k, 11, 9, 7), rand(N * k, 11, 9, 7, seed=1)

    def edge(x, w, grad, identity):
        y, m, gate, _ = ops.conv2d_fused(
            x, w, None, padding=(1, 1), b=b, activation=activation, want_multiplier=True, want_gate=True
        )
        gate = None if activation == "none" else gate
        return y, *ops.transposed_epilogue(grad, m, identity, gate, True)

    check(edge, x, w, grad, identity)


@pytest.mark.parametrize("k", [1, 2])
def test_gate_alone_of_rows(k):
    x, w, grad = rand(N, 4, 6), rand(11, 6), rand(N * k, 4, 11)

    def edge(x, w, grad):
        y, _, gate, _ = ops.linear_fused(x, w, activation="relu", want_gate=True)
        return y, ops.transposed_epilogue(grad, None, None, gate, True)[1]

    check(edge, x, w, grad)


@pytest.mark.parametrize("b", BS)
@pytest.mark.parametrize("rows", [(N,), (N, 5)])
def test_linear(rows, b):
    x, w = rand(*rows, 6), rand(8, 6)
    scale, shift, bias = (rand(8, seed=s, dtype=torch.float32) for s in (1, 2, 3))

    def layer(x, w, scale, shift, bias, residual):
        return ops.linear_fused(
            x, w, None, bias, scale, shift, residual, b=b, activation="gelu",
            want_multiplier=True, want_gate=True, want_squares=True,
        )  # fmt: skip

    check(layer, x, w, scale, shift, bias, rand(*rows, 8, seed=4))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_maps_of_squares(groups):
    x, w = rand(N, 6, 8, 7), rand(6, 6 // groups, 3, 3)

    def chain(x, w, w2):
        y, _, _, squares = ops.conv2d_fused(x, w, None, padding=(1, 1), groups=groups, want_squares=True)
        return ops.conv2d_fused(y, w2, squares if groups < 6 else None, groups=groups)[0], ops.square_sum(y, groups)

    check(chain, x, w, rand(6, 6 // groups, 3, 3, seed=1))


# --- adjoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_transposed_convolution(name, k):
    cin, out, kernel, size, window = geometry(name)
    x, w = rand(N, cin, *size), rand(out, cin // window["groups"], *kernel)
    places = torch.nn.functional.conv2d(x, w, None, **window).shape[1:]

    def adjoint(grad, w, multiplier, identity, gate):
        return ops.conv2d_transposed(
            grad, w, size, **window, multiplier=multiplier, identity=identity, gate=gate, want_raw=True
        )

    gate = torch.randint(0, 256, (N, -(-cin // 8), *size), dtype=torch.uint8)
    check(adjoint, rand(N * k, *places), w, x, rand(N * k, cin, *size, seed=2), gate)


def test_one_convolution_for_all_parity_classes_of_a_stem():
    w = rand(16, 6, 7, 7)
    lowered = check(lambda grad, w: ops.conv2d_transposed(grad, w, (32, 30), (2, 2), (3, 3))[0], rand(1, 16, 16, 15), w)
    targets = [n.target for n in lowered.graph.nodes]
    assert torch.ops.aten.conv2d.default in targets
    assert torch.ops.aten.conv_transpose2d.input not in targets


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 4), st.integers(1, 23))
def test_parity_classes_are_the_transposed_convolution(kernel, stride, padding, size):
    """One axis: ``x[s q + a] = sum over places of g[q + place] w[tap]``, for every geometry."""
    padding = min(padding, kernel // 2)
    count = (size + 2 * padding - kernel) // stride + 1
    if count < 1:
        return
    g, w = rand(count), torch.cat([rand(kernel, seed=1), torch.zeros(1, dtype=torch.float64)])
    axis = ParityAxis.of(kernel, stride, padding)
    for i in range(size):
        q, a = divmod(i, stride)
        places = range(q + axis.first, q + axis.last + 1)
        ours = sum(float(g[o] * w[tap]) for o, tap in zip(places, axis.taps[a], strict=True) if 0 <= o < count)
        direct = sum(float(g[o] * w[t]) for o in range(count) if 0 <= (t := i + padding - stride * o) < kernel)
        assert abs(ours - direct) < 1e-12


@pytest.mark.parametrize("k", [1, 2])
def test_transposed_linear(k):
    grad, w, identity = rand(N * k, 5, 8), rand(8, 6), rand(N * k, 5, 6)
    gate = torch.randint(0, 256, (N, 5, 1), dtype=torch.uint8)
    check(
        lambda g, w, m, i, gate: ops.linear_transposed(g, w, m, i, gate, True), grad, w, rand(N, 5, 6), identity, gate
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("k", [1, 2])
def test_contributions(channels, k, dtype):
    image = torch.rand(N, 3, 13, 10, dtype=torch.float64)
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image
    grad, w, inverse = rand(N * k, 8, 7, 5), rand(8, 8, 3, 3), 1 + rand(channels, dtype=torch.float32).abs()

    def last(image, grad, w, inverse):
        fused = ops.conv2d_contributions(grad, w, image, inverse, (2, 2), (1, 1), (1, 1), 0.5, True)
        total = ops.conv2d_transposed(grad, w, (13, 10), (2, 2), (1, 1))[0]
        return *fused, *ops.image_contributions(total, image, inverse, 0.5, False)

    check(last, image, grad, w, inverse)


# --- image, pools, norms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.parametrize("six", [True, False])
def test_image_encoding(six, dtype):
    image = torch.rand(N, 3, 9, 8, dtype=torch.float64)
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image
    mean, std = (torch.rand(6 if six else 3) + 0.1 for _ in range(2))
    check(lambda image, mean, std: ops.encode_image(image, mean, std, six, torch.float64), image, mean, std)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_first_layer_reads_no_padding_channels(mirrored, pad):
    """Of normalised inverted channels, [u, -u], only u."""
    image, w = torch.rand(N, 3, 12, 11), rand(16, 8, 7, 7, dtype=torch.float32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    mean = torch.cat([mean, 1 - mean + (0 if mirrored else 0.01)])

    def stem(image, mean, std, w):
        x, squares = ops.encode_image(image, mean, std, True, image.dtype)
        if pad:
            x = torch.nn.functional.pad(x, (1, 2, 0, 3))
            squares = ops.square_sum(x)
        return ops.conv2d_fused(x, w, squares, stride=(2, 2), padding=(3, 3), want_multiplier=True)[:2]

    lowered = check(stem, image, mean, torch.cat([std, std]), w)
    convolutions = [n for n in lowered.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert [n.args[1].meta["val"].shape[1] for n in convolutions] == [3 if mirrored else 6]


POOLS = {
    # kernel, stride, padding, ceil_mode, count_include_pad; image
    "stem": ((3, 3), (2, 2), (1, 1), False, True, (17, 12)),
    "halves": ((2, 2), (2, 2), (0, 0), False, True, (8, 6)),
    "cut": ((2, 2), (2, 2), (0, 0), False, True, (9, 7)),
    "ceil": ((3, 2), (2, 2), (1, 0), True, False, (10, 9)),
    "whole": ((7, 5), (7, 5), (0, 0), False, True, (7, 5)),
    "large": ((7, 6), (3, 2), (3, 1), False, True, (15, 14)),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", POOLS)
def test_average_pool(name, k):
    kernel, stride, padding, ceil, count, size = POOLS[name]
    x = rand(N, 6, *size)
    places = ops.avg_pool2d(x, kernel, stride, padding, ceil, count)[0].shape[2:]
    gate = torch.randint(0, 256, (N, 1, *size), dtype=torch.uint8)

    def both(x, grad, m, identity, gate):
        y, _ = ops.avg_pool2d(x, kernel, stride, padding, ceil, count, True, 2)
        back = ops.avg_pool2d_transposed(grad, size, kernel, stride, padding, ceil, count, m, identity, gate, True)
        return y, *back

    check(both, x, rand(N * k, 6, *places), rand(N, 6, *size, seed=1), rand(N * k, 6, *size, seed=2), gate)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("name", POOLS)
def test_max_pool(name, k, dilation):
    kernel, stride, padding, ceil, _, size = POOLS[name]
    if name == "whole" and dilation != (1, 1):
        return
    x = rand(N, 6, *size)
    index = ops.max_pool2d(x, kernel, stride, padding, dilation, ceil, True)[1]

    def both(x, grad, index, m):
        y, own, _ = ops.max_pool2d(x, kernel, stride, padding, dilation, ceil, True)
        window = (size, kernel, stride, padding, dilation)
        given, _ = ops.max_pool2d_transposed(grad, index, *window)  # an index that no lowered op made
        return y, ops.max_pool2d_transposed(grad, own, *window, multiplier=m)[0], given

    check(both, x, rand(N * k, 6, *index.shape[2:]), index, rand(N, 6, *size, seed=1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [1, 2])
def test_scaled_activation(activation, k):
    x, grad, identity = rand(N, 6, 5, 4), rand(N * k, 6, 5, 4), rand(N * k, 6, 5, 4, seed=1)
    scale, shift = (3 * rand(6, seed=s, dtype=torch.float32) for s in (1, 2))

    def both(x, scale, shift, grad, identity):
        y, _ = ops.scale_act(x, scale, shift, activation)
        return y, ops.scale_act_transposed(grad, x, scale, shift, activation, identity)

    check(both, x, scale, shift, grad, identity)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_norms(affine, k):
    x, image = rand(N, 5, 6), rand(N, 6, 4, 3)
    weight, bias = (rand(6, seed=s, dtype=torch.float32) if affine else None for s in (1, 2))
    grad, image_grad = rand(N * k, 5, 6, seed=3), rand(N * k, 6, 4, 3, seed=4)

    def all_of(x, image, grad, image_grad, *affine):
        weight, bias = affine if affine else (None, None)
        y, rstd, squares = ops.layer_norm(x, weight, bias, 1e-5, True)
        z, group_rstd, group_squares = ops.group_norm(image, 3, weight, bias, 1e-5, True)
        return (
            y, rstd, squares, z, group_rstd, group_squares,
            ops.layer_norm_transposed(grad, rstd, weight, grad),
            ops.group_norm_transposed(image_grad, group_rstd, weight, 3, image_grad),
        )  # fmt: skip

    check(all_of, x, image, grad, image_grad, weight, bias)


def test_factors_that_no_pass_fused():
    x, w = rand(N, 8, 9, 8), rand(12, 4, 3, 3)
    window = ((2, 2), (1, 1), (1, 1))

    def parts(x, w):
        z = torch.nn.functional.conv2d(x, w, None, *window, 2)
        n = ops.patch_norm(x, [3, 3], [2, 2], [1, 1], [1, 1], 2, 1e-6)
        rows = x.flatten(2)
        return [ops.dynamic_scale(z, n, b, 1) for b in BS] + [ops.row_norm(rows, 1e-12)]

    check(parts, x, w)


def test_bfloat16_convolutions_stay_bfloat16():
    x, w = (t.to(torch.bfloat16) for t in (rand(N, 8, 9, 7), rand(16, 8, 3, 3)))
    scale, bias = (rand(16, seed=s, dtype=torch.float32) for s in (1, 2))
    lowered = check(
        lambda x, w, scale, bias: ops.conv2d_fused(
            x, w, None, bias, scale, activation="relu", want_multiplier=True
        )[:2],
        x, w, scale, bias,
    )  # fmt: skip
    (z,) = [n for n in lowered.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert z.meta["val"].dtype == torch.bfloat16
    assert any(
        n.target is torch.ops.aten.rsqrt.default and n.meta["val"].dtype == torch.float32 for n in lowered.graph.nodes
    )


# --- programs --------------------------------------------------------------------------------------------------------


def test_a_gate_is_read_by_fused_ops_alone():
    def leak(x, w):
        return ops.conv2d_fused(x, w, None, activation="relu", want_gate=True)[2] & 1

    program = program_of(leak, rand(N, 8, 5, 5), [rand(8, 8, 3, 3)])
    with pytest.raises(UnsupportedOpError, match="gate"):
        lower_to_aten(program)


def test_nothing_unwanted_is_made():
    x, w = rand(N, 8, 5, 5), rand(8, 8, 3, 3)
    program = program_of(lambda x, w: ops.conv2d_fused(x, w, None, activation="relu")[0], x, [w])
    targets = [n.target for n in lower_to_aten(program).graph.nodes if n.op == "call_function"]
    aten = torch.ops.aten
    assert len(targets) == 10
    assert aten.gt.Scalar not in targets
    assert aten.where.ScalarOther not in targets
    # A map of squares is made once, whoever asks for it.
    twice = program_of(
        lambda x, w: ops.conv2d_fused(x, w, None)[0] + ops.conv2d_fused(x, 2 * w, ops.square_sum(x, 1))[0], x, [w]
    )
    targets = [n.target for n in lower_to_aten(twice).graph.nodes]
    assert targets.count(aten.sum.dim_IntList) == targets.count(aten.avg_pool2d.default) == 1


@pytest.fixture(scope="module")
def programs():
    return build_fused(network(torch.float64), (33, 30), torch.float64)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_network(programs, compiled, k):
    """The symbolic program for every batch and number of classes, and the one made for a single pair of them."""
    images = torch.rand(2, 3, 33, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 4], [0, -1]])[:, :k]
    expected = programs.explain.run(images, ids)
    lowered = lower_to_aten(programs.explain, compiled=compiled)
    fixed = lower_to_aten(specialise(programs.explain, 2, k), compiled=compiled)
    assert not [n for n in fixed.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    assert {n.meta["side"] for n in fixed.graph.nodes if n.op == "call_function"} == {"forward", "adjoint"}
    for program in (lowered, fixed):
        result = program.run(images, ids)
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            scale = float(value.double().abs().max())
            torch.testing.assert_close(result[name], value, rtol=0, atol=1e-9 * scale)
    one = lowered.run(images[1:], ids[1:])
    torch.testing.assert_close(one["contributions"], expected["contributions"][1:])
    # The program that was lowered is untouched.
    torch.testing.assert_close(programs.explain.run(images, ids)["weights"], expected["weights"], rtol=0, atol=0)


def test_a_network_of_bytes(programs):
    images = torch.randint(0, 256, (2, 3, 33, 30), dtype=torch.uint8)
    expected = programs.predict.run(images.double() / 255, None)["logits"]
    lowered = lower_to_aten(with_image_dtype(programs.predict, torch.uint8))
    torch.testing.assert_close(lowered.run(images, None)["logits"], expected)


def test_an_empty_batch(programs):
    out = lower_to_aten(programs.explain).run(torch.rand(0, 3, 33, 30, dtype=torch.float64), torch.zeros(0, 2).long())
    assert out["weights"].shape == (0, 2, 6, 33, 30)
    assert out["residual"].shape == (0, 2)

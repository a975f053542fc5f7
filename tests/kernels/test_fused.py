"""The fused ops put together: a network's explanation must be the explanation graph's."""

import pytest
import torch

from bcos_rt import explain
from bcos_rt.explanation import picture
from bcos_rt.kernels import ops
from tests.kernels.chain import explain_fused, network

TARGETS = torch.tensor([[1, 4], [0, 2]])


@torch.no_grad()
def test_a_networks_explanation_in_fused_ops():
    net = network(torch.float64)
    images = torch.rand(2, 3, 33, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = explain(net, images, TARGETS)
    logits, weights, contributions, colour = explain_fused(net, images, TARGETS, torch.float64)
    # The encoding's constants are float32 in the network's buffers and in the ops' parameters alike.
    torch.testing.assert_close(logits, expected.logits, rtol=1e-6, atol=0)
    for ours, graph in ((weights, expected.weights), (contributions, expected.contributions)):
        scale = float(graph.abs().max())
        torch.testing.assert_close(ours, graph.flatten(0, 1).reshape(ours.shape), rtol=0, atol=1e-6 * scale)
    encoded = torch.cat([images, 1 - images], 1).repeat_interleave(2, 0)
    rgba = picture.colour_picture(encoded, weights, smooth=0, alpha_percentile=100)
    torch.testing.assert_close(colour[:, :3].permute(0, 2, 3, 1), rgba[..., :3])
    alpha = colour[:, 3] / colour[:, 3].flatten(1).amax(1)[:, None, None]
    torch.testing.assert_close(alpha, rgba[..., 3])


def test_fused_ops_take_a_channels_last_and_a_plain_caller():
    x = torch.randn(2, 8, 6, 5)
    w = torch.randn(4, 8, 3, 3)
    plain = ops.conv2d_fused(x, w, want_squares=True)
    last = ops.conv2d_fused(x.to(memory_format=torch.channels_last), w, want_squares=True)
    for a, b in zip(plain, last, strict=True):
        torch.testing.assert_close(a, b)
        if a.numel():
            assert a.permute(0, 2, 3, 1).is_contiguous()


def _conv(**changes):
    x, w = torch.randn(2, 8, 6, 5), torch.randn(4, 8, 3, 3)
    return {"x": x, "weight": w, **changes}


BAD_CALLS = {
    # what the message must name -> the call
    "stride": lambda: ops.conv2d_fused(**_conv(stride=(0, 1))),
    "padding": lambda: ops.conv2d_fused(**_conv(padding=(1, -1))),
    "dilation": lambda: ops.conv2d_fused(**_conv(dilation=(1,))),
    "activation": lambda: ops.conv2d_fused(**_conv(activation="relo")),
    "b: got 0.5": lambda: ops.conv2d_fused(**_conv(b=0.5)),
    "weight: got shape": lambda: ops.conv2d_fused(**_conv(weight=torch.randn(4, 7, 3, 3))),
    "weight: got dtype torch.float16": lambda: ops.conv2d_fused(**_conv(weight=torch.randn(4, 8, 3, 3).half())),
    "weight: got device meta": lambda: ops._check(
        "conv2d", "x", **_conv(weight=torch.empty(4, 8, 3, 3, device="meta"))
    ),
    "x: got dtype torch.int64": lambda: ops.conv2d_fused(**_conv(x=torch.ones(2, 8, 6, 5, dtype=torch.int64))),
    "squares": lambda: ops.conv2d_fused(**_conv(squares=torch.ones(2, 1, 6, 4))),
    "scale": lambda: ops.conv2d_fused(**_conv(scale=torch.ones(5))),
    "residual": lambda: ops.conv2d_fused(**_conv(residual=torch.ones(2, 4, 6, 5))),
    "x: got shape": lambda: ops.conv2d_fused(**_conv(x=torch.randn(2, 8, 2, 5))),
    "x: got a tensor that requires": lambda: ops.conv2d_fused(**_conv(x=torch.randn(2, 8, 6, 5, requires_grad=True))),
    "conv2d: weight": lambda: ops.conv2d(torch.randn(2, 8, 6, 5), torch.randn(4, 8, 3, 3).double()),
    "linear: x, weight": lambda: ops.linear(torch.randn(2, 8), torch.randn(4, 7)),
    "linear_fused: bias": lambda: ops.linear_fused(torch.randn(2, 8), torch.randn(4, 8), bias=torch.ones(3)),
    "transposed: grad": lambda: ops.conv2d_transposed(torch.randn(2, 4, 4, 4), torch.randn(4, 8, 3, 3), (6, 5)),
    "multiplier": lambda: ops.conv2d_transposed(
        torch.randn(4, 4, 4, 3), torch.randn(4, 8, 3, 3), (6, 5), multiplier=torch.ones(3, 8, 6, 5)
    ),
    "gate": lambda: ops.linear_transposed(
        torch.randn(4, 5), torch.randn(5, 8), gate=torch.ones(4, 2, dtype=torch.uint8), want_raw=True
    ),
    "identity": lambda: ops.linear_transposed(torch.randn(4, 5), torch.randn(5, 8), identity=torch.ones(2, 8)),
    "image": lambda: ops.conv2d_contributions(
        torch.randn(4, 4, 4, 3), torch.randn(4, 6, 3, 3), torch.rand(3, 3, 6, 5), torch.ones(6)
    ),
    "inverse_std": lambda: ops.conv2d_contributions(
        torch.randn(4, 4, 4, 3), torch.randn(4, 6, 3, 3), torch.rand(2, 3, 6, 5), torch.ones(4)
    ),
}


@pytest.mark.parametrize("named", BAD_CALLS)
def test_bad_arguments_are_named_before_anything_runs(named):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD_CALLS[named]()
    assert named in str(caught.value)
    assert "expected" in str(caught.value)


def test_triton_on_the_cpu_outside_the_interpreter_is_refused():
    with ops.use_backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET"):
        ops.conv2d(torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3))
    with ops.use_backend("triton"), pytest.raises(TypeError, match=r"x: got dtype torch.float64"):
        ops.conv2d(torch.randn(1, 4, 5, 5).double(), torch.randn(2, 4, 3, 3).double())
    with pytest.raises(ValueError, match="name: got 'cuda'"), ops.use_backend("cuda"):
        pass


def test_too_many_elements_for_32_bit_offsets_are_refused_before_a_launch():
    """On meta tensors, which take no memory: the check comes before any kernel would be launched."""
    x = torch.empty(2**15, 64, 33, 32, device="meta")
    with ops.use_backend("triton"), pytest.raises(ValueError, match=r"x: got 2214592512 elements.*at most 2147483647"):
        ops._check("conv2d", "x", x=x)
    with ops.use_backend("triton"), pytest.raises(ValueError, match="split the batch"):
        ops._check_size("conv2d", "the result", x, 2**31)
    with ops.use_backend("triton"), pytest.raises(ValueError, match="at most 31 places"):
        ops._conv_size("conv2d", (1, 4, 64, 64), torch.empty(2, 4, 33, 3), (1, 1), (0, 0), (1, 1), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(dtype):
    x, w = torch.randn(2, 8, 6, 5), torch.randn(4, 8, 3, 3, requires_grad=True)
    v, u = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    exact = ops.conv2d(x, w).detach()
    with torch.autocast("cpu", dtype):
        y, z = ops.conv2d(x, w), ops.linear(v, u)
        direct = torch.ops.bcos_rt.conv2d(x, w, None, [1, 1], [0, 0], [1, 1], 1, 2.0, 1e-6)
        kept = ops.conv2d(x.double(), w.double())
    assert y.dtype == z.dtype == direct.dtype == dtype
    assert kept.dtype == torch.float64
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))
    (y.float().sum() + z.float().sum()).backward()
    assert w.grad.dtype == u.grad.dtype == torch.float32


def test_learned_b_has_the_definitions_gradient():
    x, w = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, 3, 3, dtype=torch.float64)
    b = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b: ops.conv2d(x, w, None, b=b), (x, w, b))
    v, u = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    v.requires_grad_(), u.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, u, b: ops.linear(v, u, None, b=b), (v, u, b))
    torch.testing.assert_close(ops.conv2d(x, w, b=b), ops.conv2d(x, w, b=1.7))


def test_opcheck_of_every_fused_op():
    """Schema, fake shapes and strides, and tracing, on the reference kernels."""
    check = torch.library.opcheck
    o = torch.ops.bcos_rt
    x, w, par = torch.randn(2, 8, 6, 5), torch.randn(4, 4, 3, 3), torch.rand(4)
    geometry = ([1, 1], [1, 1], [1, 1])
    flags = (True, True, True)
    y = ops.conv2d_fused(x, w, padding=(1, 1), groups=2)[0]
    check(o.square_sum, (x, 2))
    check(o.conv2d_fused, (x, w, ops.square_sum(x, 2), par, par, par, y, *geometry, 2, 1.5, 1e-6, "relu", *flags))
    check(o.conv2d_fused, (x, w, None, None, None, None, None, *geometry, 2, 2.0, 1e-6, "gelu", *flags))
    check(o.linear_fused, (x, torch.randn(4, 5), None, None, par, par, None, 2.0, 1e-12, "silu", *flags))
    gate = torch.ones(2, 1, 6, 5, dtype=torch.uint8)
    check(o.conv2d_transposed, (torch.randn(4, 4, 6, 5), w, [6, 5], *geometry, 2, x, None, gate, True))
    check(o.linear_transposed, (torch.randn(4, 3), torch.randn(3, 8), torch.rand(2, 8), None, None, False))
    image, mean = torch.rand(2, 3, 6, 5), torch.rand(6)
    check(o.conv2d_contributions, (y, torch.randn(4, 6, 3, 3), image, mean, *geometry, 2.0, True))
    check(o.encode_image, (image, mean, mean + 1, True, torch.float32))
    check(o.avg_pool2d, (x, [2, 2], [2, 2], [0, 0], True, True, True, 1))
    check(o.max_pool2d, (x, [3, 3], [2, 2], [1, 1], [1, 1], False, True, True, 1))
    small, index, _ = ops.max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), want_index=True)
    check(o.max_pool2d_transposed, (small, index, [6, 5], [3, 3], [2, 2], [1, 1], [1, 1], x, None, None, True))
    small = ops.avg_pool2d(x, (2, 2), (2, 2), (0, 0))[0]
    check(o.avg_pool2d_transposed, (small, [6, 5], [2, 2], [2, 2], [0, 0], False, True, x, None, None, False))
    channel = torch.rand(8)
    check(o.scale_act, (x, channel, channel, "relu", True, 2))
    check(o.scale_act_transposed, (x, x, channel, channel, "relu", x))
    rows = torch.randn(2, 3, 8)
    check(o.layer_norm, (rows, channel, channel, 1e-5, True))
    check(o.layer_norm_transposed, (rows, torch.rand(2, 3), channel, rows))
    check(o.group_norm, (x, 2, channel, channel, 1e-5, True))
    check(o.group_norm_transposed, (x, torch.rand(2, 2), channel, 2, x))


def test_fused_ops_compile_and_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 8, 3, 3), requires_grad=False)

        def forward(self, x):
            y, _, _, squares = ops.conv2d_fused(x, self.weight, activation="relu", padding=(1, 1), want_squares=True)
            return ops.conv2d_transposed(y, self.weight, x.shape[2:], padding=(1, 1))[0] + squares

    layer, x = Layer(), torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
    more = torch.randn(5, 8, 6, 5)
    torch.testing.assert_close(exported.module()(more), layer(more))


def _pool(**changes):
    x = torch.randn(2, 8, 6, 6)
    given = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0)}
    return ops.avg_pool2d_transposed(**{"grad": x[:, :, :3, :3], "input_size": (6, 6), **given, **changes})


BAD_LAYERS = {
    "scale": lambda: ops.scale_act(torch.randn(2, 8, 6, 5), torch.ones(7), torch.ones(8), "relu"),
    "activation": lambda: ops.scale_act(torch.randn(2, 8, 6, 5), torch.ones(8), torch.ones(8), "tanh"),
    "groups": lambda: ops.group_norm(torch.randn(2, 8, 6, 5), 3, torch.ones(8), torch.ones(8), 1e-5),
    "weight": lambda: ops.layer_norm(torch.randn(2, 8), torch.ones(7), torch.ones(8), 1e-5),
    "rstd": lambda: ops.layer_norm_transposed(torch.randn(4, 3, 8), torch.ones(3, 3), torch.ones(8)),
    "padding": lambda: ops.max_pool2d(torch.randn(2, 8, 6, 6), (2, 2), (2, 2), (2, 2), (1, 1)),
    "grad": lambda: _pool(input_size=(8, 6)),
    "identity": lambda: _pool(identity=torch.ones(1, 8, 6, 6)),
    "multiplier": lambda: _pool(multiplier=torch.ones(2, 8, 6, 5)),
    "image": lambda: ops.encode_image(torch.rand(2, 4, 6, 6), torch.ones(6), torch.ones(6)),
    "std": lambda: ops.encode_image(torch.rand(2, 3, 6, 6), torch.ones(6), torch.ones(3)),
    "image: got dtype": lambda: ops.encode_image(torch.ones(2, 3, 6, 6).int(), torch.ones(6), torch.ones(6)),
}


@pytest.mark.parametrize("named", BAD_LAYERS)
def test_bad_arguments_of_the_layers_between_are_named(named):
    with pytest.raises((ValueError, TypeError), match=named):
        BAD_LAYERS[named]()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_take_float32_parameters(dtype):
    x, weight = torch.randn(2, 8, 4, 4), torch.rand(8)
    y, rstd, _ = ops.group_norm(x.to(dtype), 2, weight, weight, 1e-5)
    expected = torch.nn.functional.group_norm(x, 2, weight, weight)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.03)
    assert ops.group_norm_transposed(y, rstd, weight, 2).dtype == dtype
    rows, rstd, _ = ops.layer_norm(x.permute(0, 2, 3, 1).to(dtype), weight, weight, 1e-5)
    assert ops.layer_norm_transposed(rows, rstd, weight).dtype == dtype


def test_expanded_and_strided_parameters():
    x, w = torch.randn(2, 8, 6, 5), torch.randn(4, 8, 3, 3)
    expected = ops.conv2d_fused(x, w, scale=torch.full((4,), 2.0), shift=torch.ones(4))[0]
    found = ops.conv2d_fused(x, w, scale=torch.tensor([2.0]).expand(4), shift=torch.ones(8)[::2])[0]
    torch.testing.assert_close(found, expected)


def test_norms_stay_in_float32_under_autocast():
    x = 300 * torch.rand(1, 4, 9, 9)
    with torch.autocast("cpu", torch.float16):
        n = ops.patch_norm(x, [3, 3], [1, 1], [2, 2], [2, 2], 1, 1e-6)
        m = ops.conv2d_fused(x, torch.ones(2, 4, 3, 3), dilation=(2, 2), want_multiplier=True)[1]
    assert n.dtype == m.dtype == torch.float32
    assert bool(n.isfinite().all())
    assert bool(m.isfinite().all())


@pytest.mark.parametrize("b", [torch.tensor([1.5]), torch.tensor(2)])
def test_a_learned_b_is_one_floating_point_number(b):
    with pytest.raises(ValueError, match="b: got shape"):
        ops.conv2d(torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3), b=b)


def test_no_image_has_no_contributions():
    out = ops.conv2d_contributions(
        torch.randn(0, 4, 4, 3), torch.randn(4, 6, 3, 3), torch.rand(0, 3, 6, 5), torch.ones(6)
    )
    assert out[1].shape == (0, 6, 5)

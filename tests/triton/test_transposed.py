"""The adjoint (explanation) kernels: against autograd of the plain convolution and the reference, in float64."""

import pytest
import torch
import torch.nn.functional as F

from bcos_rt.kernels import ops, reference
from bcos_rt.kernels.triton.conv_transposed import conv2d_transposed
from bcos_rt.kernels.triton.launch import Config
from tests.triton.cases import DTYPES, GEOMETRIES, Geometry, channels_last, compare, draw, is_channels_last
from tests.triton.guard import check

NAMED_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
CLASSES = 3


def factors(geometry, dtype, batch, classes, bits):
    """Multiplier and gate of ``batch`` images, and the identity branch's gradient for their ``classes`` each."""
    shape = (batch, geometry.channels, *geometry.size)
    drawn = draw(shape, torch.float32, 11)
    if bits:
        gate = reference.pack_mask((drawn > 0).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        gate = channels_last(drawn.to(dtype))
    return {
        "multiplier": channels_last(draw(shape, dtype, 12)),
        "identity": channels_last(draw((batch * classes, *shape[1:]), dtype, 13)),
        "gate": gate,
    }


def by_autograd(geometry, grad, weight):
    """conv^T(grad) as the gradient of <conv(x), grad> for x, in float64."""
    x = torch.zeros(grad.shape[0], geometry.channels, *geometry.size, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x, weight.double(), **geometry.options), x, grad.double())[0]


@NAMED_DTYPES
@pytest.mark.parametrize("name", GEOMETRIES)
def test_is_the_adjoint_of_the_convolution(name, dtype, guards):
    g = GEOMETRIES[name]
    grad, weight = g.y_like(dtype=dtype), g.weight(dtype)
    with ops.use_backend("triton"):
        out, raw = ops.conv2d_transposed(guards.guarded(grad), guards.guarded(weight), g.size, **g.options)
    check(out, by_autograd(g, grad, weight), dtype)
    assert out.dtype == dtype
    assert is_channels_last(out)
    assert raw.numel() == 0


@pytest.mark.parametrize("name", GEOMETRIES)
def test_same_product_with_either_side(name, guards):
    """<conv(x), g> = <x, conv^T(g)>, both sides by these kernels."""
    g = GEOMETRIES[name]
    x, weight, grad = guards.guarded(g.x()), guards.guarded(g.weight()), guards.guarded(g.y_like(seed=5))
    with ops.use_backend("triton"):
        y = ops.conv2d_fused(x, weight, b=1.0, **g.options)[0]
        back = ops.conv2d_transposed(grad, weight, g.size, **g.options)[0]
    left, right = (y.double() * grad.double()), (x.double() * back.double())
    assert float((left.sum() - right.sum()).abs()) < 1e-5 * float(left.abs().sum())


@pytest.mark.parametrize("bits", [True, False], ids=["bits", "values"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_with_the_whole_epilogue(name, bits, guards):
    g = GEOMETRIES[name]
    grad = g.y_like(2 * CLASSES, torch.float32)
    tensors = {"grad": grad, "weight": g.weight(), **factors(g, torch.float32, 2, CLASSES, bits)}
    compare(guards, "conv2d_transposed", torch.float32, tensors, input_size=g.size, want_raw=True, **g.options)


@NAMED_DTYPES
@pytest.mark.parametrize("bits", [True, False], ids=["bits", "values"])
@pytest.mark.parametrize("name", ["odd_channels", "patchify", "1x1", "grouped"])
def test_dtypes_with_the_whole_epilogue(name, bits, dtype, guards):
    g = GEOMETRIES[name]
    grad = g.y_like(2 * CLASSES, dtype)
    tensors = {"grad": grad, "weight": g.weight(dtype), **factors(g, dtype, 2, CLASSES, bits)}
    compare(guards, "conv2d_transposed", dtype, tensors, input_size=g.size, want_raw=True, **g.options)


@pytest.mark.parametrize("want_raw", [False, True])
@pytest.mark.parametrize("given", [(), ("multiplier",), ("identity",), ("gate",), ("multiplier", "gate")], ids=str)
@pytest.mark.parametrize("name", ["odd_channels", "1x1_strided", "patchify"])
def test_every_option_alone(name, given, want_raw, guards):
    g = GEOMETRIES[name]
    chosen = {k: v for k, v in factors(g, torch.float16, 2, CLASSES, True).items() if k in given}
    tensors = {"grad": g.y_like(2 * CLASSES, torch.float16), "weight": g.weight(torch.float16), **chosen}
    options = {"input_size": g.size, "want_raw": want_raw, **g.options}
    _, raw = compare(guards, "conv2d_transposed", torch.float16, tensors, **options)
    assert (raw.numel() > 0) == want_raw


@pytest.mark.parametrize(("images", "classes"), [(0, 1), (0, 3), (1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize("name", ["3x3", "1x1", "patchify", "grouped"])
def test_batches_and_classes(name, images, classes, guards):
    g = GEOMETRIES[name]
    tensors = {
        "grad": g.y_like(images * classes),
        "weight": g.weight(),
        **factors(g, torch.float32, images, classes, True),
    }
    compare(guards, "conv2d_transposed", torch.float32, tensors, input_size=g.size, want_raw=True, **g.options)


@pytest.mark.parametrize("name", ["odd_channels", "grouped", "patchify"])
def test_layouts_give_the_same_numbers(name, guards):
    g = GEOMETRIES[name]
    last = {"grad": g.y_like(6), "weight": g.weight(), **factors(g, torch.float32, 2, CLASSES, True)}
    options = {"input_size": g.size, "want_raw": True, **g.options}
    results = [
        compare(guards, "conv2d_transposed", torch.float32, tensors, **options)
        for tensors in (last, {key: value.contiguous() for key, value in last.items()})
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3e-4), (torch.float16, 3000.0), (torch.bfloat16, 1e-30)])
def test_magnitudes(dtype, size, guards):
    """Explanation gradients are tiny: no product is rounded before the sum."""
    g = GEOMETRIES["3x3"]
    grad = (g.y_like(dtype=torch.float64) * size).to(dtype)
    out = compare(
        guards, "conv2d_transposed", dtype, {"grad": grad, "weight": g.weight(dtype)}, input_size=g.size, **g.options
    )[0]
    assert out.abs().max() > 0


def test_a_closed_gate_is_not_a_zero_multiplier(guards):
    """What an identity branch carries on is gated, not multiplied."""
    g = GEOMETRIES["3x3"]
    tensors = {"grad": g.y_like(), "weight": g.weight(), **factors(g, torch.float32, 2, 1, True)}
    tensors["multiplier"].zero_()
    out, raw = compare(
        guards, "conv2d_transposed", torch.float32, tensors, input_size=g.size, want_raw=True, **g.options
    )
    assert not out.any()
    assert raw.any()


@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(64, 128, 32), Config(16, 256, 64, 1)], ids=str)
@pytest.mark.parametrize("name", ["large", "patchify"])
def test_tiles_do_not_change_the_result(name, config, guards):
    g = Geometry(150, 40, (2, 3), (1, 2), (1, 1), size=(4, 5)) if name == "large" else GEOMETRIES[name]
    tensors = {"grad": g.y_like(6), "weight": g.weight(), **factors(g, torch.float32, 2, CLASSES, True)}
    options = {"input_size": g.size, "want_raw": True, **g.options}
    expected = compare(guards, "conv2d_transposed", torch.float32, tensors, **options)
    given = {key: guards.guarded(value) for key, value in tensors.items()}
    for result, truth in zip(conv2d_transposed(**given, config=config, **options), expected, strict=True):
        check(result, truth.double(), torch.float32)


LINEAR = {"rows": ((2,), 40, 70), "tokens": ((2, 3), 24, 7), "grid": ((2, 2, 3), 9, 33), "no_images": ((0, 3), 8, 5)}


@NAMED_DTYPES
@pytest.mark.parametrize("bits", [True, False], ids=["bits", "values"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, bits, dtype, guards):
    lead, channels, filters = LINEAR[name]
    rows = (lead[0] * CLASSES, *lead[1:])
    drawn = draw((*lead, channels), dtype, 4)
    tensors = {
        "grad": draw((*rows, filters), dtype, 0),
        "weight": draw((filters, channels), dtype, 1) / 4,
        "multiplier": draw((*lead, channels), dtype, 2),
        "identity": draw((*rows, channels), dtype, 3),
        "gate": reference.pack_mask(drawn > 0) if bits else drawn,
    }
    compare(guards, "linear_transposed", dtype, tensors, want_raw=True)
    plain = compare(guards, "linear_transposed", dtype, {key: tensors[key] for key in ("grad", "weight")})
    assert plain[1].numel() == 0


def test_opcheck(device):
    g = GEOMETRIES["odd_channels"]
    t = {"grad": g.y_like(6), "weight": g.weight(), **factors(g, torch.float32, 2, CLASSES, True)}
    t = {key: value.to(device) for key, value in t.items()}
    geometry = (list(g.size), list(g.stride), list(g.padding), list(g.dilation), 1)
    arguments = (t["grad"], t["weight"], *geometry, t["multiplier"], t["identity"], t["gate"], True)
    with ops.use_backend("triton"):
        torch.library.opcheck(torch.ops.bcos_rt.conv2d_transposed, arguments)

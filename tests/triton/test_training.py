"""Gradients of the layers by the Triton kernels against autograd through the plain float64 definition."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bcos_rt.kernels import ops, reference
from bcos_rt.kernels.triton.launch import Config
from bcos_rt.kernels.triton.training import grad_weight
from tests.triton.cases import DTYPES, GEOMETRIES, Geometry, channels_last, draw
from tests.triton.guard import check

NAMED_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
BS = (1.5, 2.0, 2.5)
NAMES = ("x", "weight", "bias", "b")


def truth(function, tensors, seed, **options):
    """Value and gradients in float64; autograd goes through every step of the definition, the norm too."""
    wide = {key: value.detach().double().requires_grad_() for key, value in tensors.items()}
    b = wide.get("b", options.pop("b", 2.0))
    arguments = {"x": wide["x"], "weight": wide["weight"], "bias": wide.get("bias"), "b": b, **options}
    y = function(**arguments)
    return y, dict(zip(wide, torch.autograd.grad(y, list(wide.values()), seed.double()), strict=True))


def compare(guards, op, dtype, tensors, **options):
    """Value and every gradient of ``ops.<op>``; returns the gradients."""
    given = {key: guards.guarded(value).requires_grad_() for key, value in tensors.items()}
    arguments = {"x": given["x"], "weight": given["weight"], "bias": given.get("bias")}
    arguments["b"] = given.get("b", options.get("b", 2.0))
    others = {key: value for key, value in options.items() if key != "b"}
    with ops.use_backend("triton"):
        y = getattr(ops, op)(**arguments, **others)
        seed = draw(y.shape, dtype, 99)
        if y.ndim == 4:
            seed = channels_last(seed)
        grads = dict(zip(given, torch.autograd.grad(y, list(given.values()), guards.guarded(seed)), strict=True))
    expected, true = truth(getattr(reference, op), tensors, seed, **options)
    check(y, expected, dtype, "y")
    for key, value in true.items():
        assert grads[key].dtype == tensors[key].dtype, key
        check(grads[key], value, dtype, f"gradient for {key}")
    guards.verify()
    return grads


def problem(g, dtype, batch=2):
    return {"x": g.x(batch, dtype), "weight": g.weight(dtype), "bias": draw((g.filters,), dtype, 2)}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d_geometries(name, guards):
    g = GEOMETRIES[name]
    compare(guards, "conv2d", torch.float32, problem(g, torch.float32), **g.options)


@NAMED_DTYPES
@pytest.mark.parametrize("b", BS)
@pytest.mark.parametrize("name", ["odd_channels", "uneven"])
def test_conv2d_every_b(name, b, dtype, guards):
    g = GEOMETRIES[name]
    compare(guards, "conv2d", dtype, problem(g, dtype), b=b, **g.options)


@pytest.mark.parametrize("b", BS)
def test_depthwise(b, guards):
    """Its norms are as large as its output; pointwise PyTorch between two kernels."""
    g = Geometry(6, 12, (3, 3), (2, 1), (1, 1), groups=6, size=(6, 5))
    compare(guards, "conv2d", torch.float32, problem(g, torch.float32), b=b, **g.options)


@NAMED_DTYPES
@pytest.mark.parametrize("b", BS)
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 7)], ids=str)
def test_linear_every_b(shape, b, dtype, guards):
    tensors = {"x": draw(shape, dtype, 0), "weight": draw((9, shape[-1]), dtype, 1) / 4, "bias": draw((9,), dtype, 2)}
    compare(guards, "linear", dtype, tensors, b=b)


@NAMED_DTYPES
@pytest.mark.parametrize("b", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("name", ["3x3", "grouped"])
def test_learned_b(name, b, dtype, guards):
    """B as a 0-dimensional float32 tensor: no longer the formula of 1 and 2, and it gets a gradient."""
    g = GEOMETRIES[name]
    compare(guards, "conv2d", dtype, {**problem(g, dtype), "b": torch.tensor(b)}, **g.options)


@pytest.mark.parametrize("b", [1.0, 1.7])
def test_learned_b_of_a_linear_layer(b, guards):
    tensors = {"x": draw((2, 3, 12), torch.float32, 0), "weight": draw((7, 12), torch.float32, 1) / 4}
    compare(guards, "linear", torch.float32, {**tensors, "b": torch.tensor(b)})


@pytest.mark.parametrize("b", BS)
def test_zeros_have_finite_gradients(b, guards):
    """Patches and rows of zeros, and filters of zeros: every slope there is 0, not an infinity."""
    g = GEOMETRIES["3x3"]
    x, weight = g.x(), g.weight()
    x[0], x[1, :, :, :4], weight[3] = 0, 0, 0
    grads = compare(guards, "conv2d", torch.float32, {"x": x, "weight": weight}, b=b, **g.options)
    assert b != 2 or not grads["x"][0].any()
    # The definition's own gradient of ||x|| at 0 is NaN in autograd: the rows that are not 0 are compared.
    row, weight = draw((4, 12), torch.float32, 0), draw((7, 12), torch.float32, 1)
    row[1] = 0
    with ops.use_backend("triton"):
        given = [guards.guarded(t).requires_grad_() for t in (row, weight)]
        grads = torch.autograd.grad(ops.linear(*given, b=b).sum(), given)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 500.0), (torch.float16, 1e-3), (torch.bfloat16, 1e10)], ids=str
)
def test_magnitudes(dtype, size, guards):
    g = GEOMETRIES["3x3"]
    compare(guards, "conv2d", dtype, {"x": (g.x(dtype=torch.float64) * size).to(dtype), "weight": g.weight(dtype)},
            **g.options)  # fmt: skip
    x = (draw((5, 24), torch.float64, 0) * size).to(dtype)
    compare(guards, "linear", dtype, {"x": x, "weight": draw((9, 24), dtype, 1) / 4})


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_what_is_needed(wanted, guards):
    g = GEOMETRIES["odd_channels"]
    tensors = problem(g, torch.float32)
    given = {key: guards.guarded(value).requires_grad_(key == wanted) for key, value in tensors.items()}
    with ops.use_backend("triton"):
        y = ops.conv2d(given["x"], given["weight"], given["bias"], **g.options)
        y.sum().backward()  # an expanded gradient
    _, true = truth(reference.conv2d, tensors, torch.ones(y.shape), **g.options)
    for key, value in given.items():
        assert (value.grad is not None) == (key == wanted)
    check(given[wanted].grad, true[wanted], torch.float32)


@pytest.mark.parametrize("b", [1.5, 2.0, "learned"])
@pytest.mark.parametrize("name", ["many_channels", "grouped_bytes"])
def test_what_is_kept_for_the_backward_pass(name, b, guards):
    """x, the parameters, and at most one tensor as large as the output and one map of norms (or of squares)."""
    g = GEOMETRIES[name]
    x, weight = guards.guarded(g.x()).requires_grad_(), guards.guarded(g.weight()).requires_grad_()
    exponent = torch.tensor(1.5, device=x.device, requires_grad=True) if b == "learned" else b
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), ops.use_backend("triton"):
        y = ops.conv2d(x, weight, b=exponent, **g.options)
    others = [n for where, n in kept.items() if where not in {t.untyped_storage().data_ptr() for t in (x, weight)}]
    norms = g.groups * max(x[:, 0].numel(), y[:, 0].numel())
    assert sorted(others)[-1] == y.numel()
    assert sum(others) <= y.numel() + norms + 1


@pytest.mark.parametrize("name", ["3x3", "grouped"])
def test_layouts_and_repeats_give_the_same_numbers(name, guards):
    g = GEOMETRIES[name]
    last = problem(g, torch.float32)
    first = {key: value.contiguous() for key, value in last.items()}
    results = [compare(guards, "conv2d", torch.float32, t, **g.options) for t in (last, last, first)]
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_empty_batch(op, guards):
    g = GEOMETRIES["3x3"]
    if op == "conv2d":
        grads = compare(guards, op, torch.float32, problem(g, torch.float32, batch=0), **g.options)
    else:
        grads = compare(guards, op, torch.float32, {"x": torch.zeros(0, 5), "weight": draw((3, 5), torch.float32, 1)})
    assert not grads["weight"].any()


@NAMED_DTYPES
def test_a_long_sum_is_split(dtype, guards):
    """Rows enough that several programs share a weight's gradient."""
    tensors = {"x": draw((700, 10), dtype, 0), "weight": draw((9, 10), dtype, 1) / 3}
    compare(guards, "linear", dtype, tensors)


@pytest.mark.parametrize("config", [Config(16, 16, 16), Config(64, 128, 32, group_m=1)], ids=str)
@pytest.mark.parametrize("name", ["stem", "grouped", "many_channels"])
def test_tiles_do_not_change_a_weight_s_gradient(name, config, guards):
    g = GEOMETRIES[name]
    x, grad = g.x(), g.y_like(seed=5)
    geometry = (g.stride, g.padding, g.dilation, g.groups)
    given = [guards.guarded(t).permute(0, 2, 3, 1) for t in (grad, x)]
    actual = grad_weight(*given, g.kernel, *geometry, config=config)
    weight = g.weight(torch.float64).requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), weight, **g.options)
    check(actual.permute(0, 3, 1, 2), torch.autograd.grad(y, weight, grad.double())[0], torch.float32)


@pytest.mark.parametrize("b", [1.5, "learned"])
def test_opcheck(b, device):
    g = GEOMETRIES["odd_channels"]
    x, weight, bias = (t.to(device).requires_grad_() for t in problem(g, torch.float32).values())
    geometry = (list(g.stride), list(g.padding), list(g.dilation), g.groups)
    with ops.use_backend("triton"):
        if b == "learned":
            exponent = torch.tensor(1.5, device=device, requires_grad=True)
            arguments = (x, weight, bias, exponent, *geometry, 1e-6)
            torch.library.opcheck(torch.ops.bcos_rt.conv2d_learned_b, arguments)
        else:
            torch.library.opcheck(torch.ops.bcos_rt.conv2d, (x, weight, bias, *geometry, b, 1e-6))

"""Cases of ``bcos-rt bench kernels``: results, counts, shapes, ceilings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bcos_rt.benchmark.kernels import cases, committed, layers
from bcos_rt.benchmark.kernels.layers import convolution, image, label, linear, networks
from bcos_rt.benchmark.kernels.rows import COLUMNS, DTYPES, measure
from bcos_rt.benchmark.kernels.timing import QUICK, Budget, Ceilings, time_blocks
from bcos_rt.kernels import cpu
from tests.bench.kernel_cases import TINY, assert_close

needs_kernels = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.unavailable_reason()}")
SPECS = cases.specs(TINY, cases.CPU_OPS)


def ids(spec: cases.Spec) -> str:
    return f"{spec.op}-{spec.variant}-{spec.shape}".replace(" ", "")


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_kernel_and_plain_give_what_the_definition_says(spec, dtype):
    """Called a second time, too: what is timed are calls upon calls, some in place."""
    case = spec.make(DTYPES[dtype], "cpu")
    expected = case.expected()
    plain = cases.tensors_of(case.plain())
    results = tuple(t.clone() for t in case.run())
    assert len(results) == len(expected) == len(plain)
    for i, (actual, other, wanted) in enumerate(zip(results, plain, expected, strict=True)):
        assert_close(actual, wanted, DTYPES[dtype], f"result {i}")
        # Its encoded image keeps the two channels of padding.
        other = other[:, : wanted.shape[1]] if spec.op == "encode_image" else other
        assert_close(other, wanted, torch.bfloat16, f"result {i} of PyTorch op by op")
    for _ in range(50):
        results = case.run()
    numbers = [t for t in results if t.is_floating_point()]
    assert all(bool(t.isfinite().all()) for t in numbers)
    # Nothing dies out either: denormals would be timed.
    assert all(float(t.abs().max()) > 1e-3 for t in numbers)
    assert case.flops > 0


@needs_kernels
def test_bytes_and_operations_by_hand():
    """A 3 x 3 convolution of stride 2, a depthwise one, epilogues; float32 and bfloat16."""
    layer = convolution("x", 2, 16, 7, 24, 3, 2)  # [2, 16, 7, 7] -> [2, 24, 4, 4]
    values, pixels = 2 * 24 * 4 * 4, 2 * 4 * 4

    def counted(op: str, variant: str, dtype: torch.dtype, at: layers.Layer = layer) -> tuple[int, int]:
        spec = next(s for s in cases.specs(_sweep_of(at), [op]) if s.variant == variant)
        case = spec.make(dtype, "cpu")
        return case.bytes(case.run()), case.flops

    x, squares, weight, parameters = 2 * 16 * 49, 2 * 49 * 4, 24 * 16 * 9, 2 * 24 * 4
    out_squares = pixels * 4
    flops = 2 * values * 16 * 9
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        read = (x + weight) * size + squares + parameters
        assert counted("conv2d_fused", "predict", dtype) == (read + values * size + out_squares, flops)
        assert counted("conv2d_fused", "explain", dtype) == (read + 2 * values * size + out_squares, flops)
        # The gradient and the weights, the multiplier of the layer below, the result.
        moved = (values + weight + 2 * x) * size
        assert counted("conv2d_transposed", "explain", dtype) == (moved, flops)
        # z is read and written; of 24 channels the gate takes 3 bytes a pixel.
        moved = 4 * values * size + squares + parameters + pixels * 3 + out_squares
        assert counted("conv_epilogue", "residual", dtype) == (moved, values * 9 + pixels * 11)
    depthwise = convolution("x", 2, 16, 7, 16, 3, 1, groups=16)
    moved = 4 * (2 * x + 16 * 9 + 2 * 16) + 2 * 49 * 4
    assert counted("depthwise_fused", "predict", torch.float32, depthwise) == (moved, x * (4 * 9 + 11))


def _sweep_of(layer: layers.Layer) -> layers.Sweep:
    depthwise = (layer,) if layer.depthwise else ()
    dense = () if layer.depthwise else (layer,)
    return layers.Sweep((), dense, depthwise, (), (), (), dense, (), ())


def _layers_of(net: nn.Module, channels: int) -> set[str]:
    """Labels of the layers that a network meets for one image, and its input's of every norm."""
    found: set[str] = set()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            side, kernel, stride = x.shape[2], module.kernel_size[0], module.stride[0]
            layer = convolution("", 1, x.shape[1], side, out.shape[1], kernel, stride, groups=module.groups)
            found.add(label(layer))
        elif isinstance(module, nn.BatchNorm2d):
            found.add(label(image("", *x.shape[:3])))
        elif isinstance(module, nn.Linear):
            found.add(label(linear("", math.prod(x.shape[:-1]), *reversed(module.weight.shape))))

    with torch.device("meta"):
        for module in net.modules():
            module.register_forward_hook(hook)
        net.eval()(torch.empty(1, channels, 224, 224))
    return found


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "efficientnet-lite0"])
def test_the_shapes_are_those_of_the_networks(name):
    import torchvision

    with torch.device("meta"):
        if name == "efficientnet-lite0":
            net = pytest.importorskip("timm").create_model("tf_efficientnet_lite0")
        else:
            net = getattr(torchvision.models, name)(weights=None)
    met = _layers_of(net, 3)
    sweep = networks(1, 6)
    ours = [
        layer
        for layer in (*sweep.convolutions, *sweep.depthwise, *sweep.linears, *sweep.norms)
        if layer.name == name
    ]  # fmt: skip
    assert ours
    assert [label(layer) for layer in ours if label(layer) not in met] == []
    assert len({label(layer) for layer in ours}) == len(ours)


@needs_kernels
def test_a_row_is_complete_and_consistent():
    spec = next(s for s in SPECS if s.op == "conv2d_fused")
    ceilings = Ceilings(QUICK, "cpu")
    row, other = measure([(spec, "fp32"), (spec, "bf16")], 2, "cpu", ceilings)
    assert other["bytes"] < row["bytes"]
    assert set(row) == set(COLUMNS)
    assert row["q1_us"] <= row["median_us"] <= row["q3_us"]
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
    assert row["gflop_s"] == pytest.approx(row["flops"] / row["median_us"] / 1e3)
    assert row["speedup"] == pytest.approx(row["reference_us"] / row["median_us"])
    assert row["share_copy"] == pytest.approx(row["gb_s"] / ceilings.copies[row["bytes"]])
    assert row["share_gemm"] == pytest.approx(row["gflop_s"] / ceilings.products[torch.float32])


def test_blocks_hold_as_many_calls_as_their_time():
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    seconds = time_blocks(run, Budget(1, 0.0, 1e-4, 4, 0.0, 8), "cpu")
    assert len(seconds) == 4
    assert all(0 < s < 1e-4 for s in seconds)
    assert calls > 40  # an empty function takes far less than a block


ROWS = [
    {"op": "square_sum", "variant": "predict", "shape": s, "batch": 1, "dtype": "fp32", "device": "cpu",
     "machine": "m", "isa": "avx2", "threads": 2, "median_us": 10.0}
    for s in ("64x56x56", "64x28x28")
]  # fmt: skip
ASKED = {"op": ["square_sum"], "dtype": ["fp32"], "device": ["cpu"], "batch": [1]}


def test_comparison_finds_slower_and_missing_rows():
    slow = {**ROWS[0], "median_us": 12.6}
    other = {**ROWS[0], "shape": "1x1x1"}
    unasked = {**ROWS[0], "dtype": "bf16"}
    result = committed.compare([slow, other], [*ROWS, unasked], 1.25, ASKED)
    assert [c.key[2] for c in result.slower] == ["64x56x56"]
    assert result.slower[0].ratio == pytest.approx(1.26)
    assert [k[2] for k in result.only_here] == ["1x1x1"]
    assert [k[2] for k in result.only_before] == ["64x28x28"]  # bf16 was not asked for
    assert result.warnings == []
    assert committed.compare([{**ROWS[0], "median_us": 12.4}], ROWS, 1.25, ASKED).slower == []


@pytest.mark.parametrize(("column", "word"), [("machine", "machine"), ("isa", "instruction"), ("threads", "threads")])
def test_comparison_with_other_conditions_is_said(column, word):
    (warning,) = committed.compare([{**ROWS[0], column: "7"}], ROWS, 1.25, ASKED).warnings
    assert word in warning
    assert "7" in warning
    assert str(ROWS[0][column]) in warning


def test_the_guides_table_is_of_the_committed_rows():
    from bench import kernels

    page = (kernels.ROOT / "docs" / "microbenchmarks.md").read_text(encoding="utf-8")
    assert kernels.table() in page

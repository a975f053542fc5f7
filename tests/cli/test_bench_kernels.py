"""``bcos-rt bench kernels``."""

import csv
import json

import pytest
import torch

from bcos_rt.benchmark.kernels import layers
from bcos_rt.benchmark.kernels.rows import COLUMNS
from bcos_rt.kernels import cpu
from tests.bench.kernel_cases import tiny_sweep

needs_kernels = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.unavailable_reason()}")
FEW = ("--op", "square_sum", "--op", "scale_act", "--dtype", "fp32", "--device", "cpu", "--quick")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(layers, "networks", tiny_sweep)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rewritten(path, target, change):
    rows = change(rows_of(path))
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return target


def times(factor, **values):
    return lambda rows: [{**r, **values, "median_us": float(r["median_us"]) * factor} for r in rows]


@pytest.fixture
def measured(bcos, tmp_path):
    """A CSV file of a run on tiny layers."""
    path = tmp_path / "cpu.csv"
    result = bcos("bench", "kernels", *FEW, "--threads", 1, "--csv", path)
    assert result.code == 0, result.err
    return path


@needs_kernels
def test_measures_and_writes(bcos, tmp_path):
    before = torch.get_num_threads()
    path = tmp_path / "out.csv"
    result = bcos("bench", "kernels", *FEW, "--threads", 1, "--csv", path, "--json")
    assert result.code == 0, result.err
    assert torch.get_num_threads() == before
    rows = result.json["rows"]
    assert [r["op"] for r in rows] == ["square_sum", "scale_act"]  # as listed, not as asked for
    assert all(r["median_us"] > 0 and r["threads"] == 1 and r["dtype"] == "fp32" for r in rows)
    assert len(rows_of(path)) == len(rows)
    environment = json.loads(path.with_suffix(".json").read_text())
    assert environment["machine"]["cpu"]["model"]
    assert environment["setting"]["quick"] is True
    assert environment["ceilings"]["gemm_gflop_s"]["float32"] > 0


@needs_kernels
def test_every_op_on_every_layer(bcos):
    result = bcos("bench", "kernels", "--device", "cpu", "--quick", "--dtype", "fp32", "--threads", 1)
    assert result.code == 0, result.err
    for op in ("conv2d_fused", "conv_epilogue", "depthwise_fused", "max_pool2d", "linear_epilogue"):
        assert op in result.out
    assert "of copy" in result.out


@needs_kernels
def test_compare_passes_and_finds_a_slowdown(bcos, measured, tmp_path):
    slow = rewritten(measured, tmp_path / "slow.csv", times(1000))
    result = bcos("bench", "kernels", *FEW, "--threads", 1, "--compare", slow)
    assert result.code == 0, result.err
    assert "2 rows compared, 0 slower" in result.out
    fast = rewritten(measured, tmp_path / "fast.csv", times(0.001))
    result = bcos("bench", "kernels", *FEW, "--threads", 1, "--compare", fast)
    assert result.code == 1
    assert "2 rows compared, 2 slower than 1.25 times" in result.out
    assert "slower than committed" in result.out
    result = bcos("bench", "kernels", *FEW, "--threads", 1, "--compare", fast, "--tolerance", 1e9, "--json")
    assert result.code == 0
    assert result.json["comparison"]["compared"] == 2
    result = bcos("bench", "kernels", *FEW, "--threads", 1, "--compare", fast, "--json")
    assert result.code == 1
    assert len(result.json["comparison"]["slower"]) == 2


@needs_kernels
def test_compare_says_missing_rows_and_another_machine(bcos, measured, tmp_path):
    def change(rows):
        return [{**rows[0], "shape": "1x1x1", "machine": "other"}, {**rows[1], "machine": "other", "median_us": 1e9}]

    other = rewritten(measured, tmp_path / "other.csv", change)
    result = bcos("bench", "kernels", *FEW, "--threads", 1, "--compare", other)
    assert result.code == 0
    assert "1 rows measured here, not in the file" in result.out
    assert "1 rows in the file, not measured here" in result.out
    assert "1x1x1" in result.out
    assert "NOT COMPARABLE" in result.err
    assert "other" in result.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "no rows"),
        ("a,b\n1,2\n", "no column 'op'"),
        (",".join(COLUMNS) + "\n" + "x," * 10 + "fast\n", "line 2"),
        (b"\xff\xfe\x00", "utf-8"),
    ],
)
def test_a_bad_file_is_named(bcos, tmp_path, text, message):
    path = tmp_path / "bad.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = bcos("bench", "kernels", "--device", "cpu", "--compare", path)
    assert result.code == 2
    assert "--compare" in result.err
    assert message in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "square_sums", "--device", "cpu"), "did you mean 'square_sum' or 'row_square_sum'"),
        (("--dtype", "fp64"), "fp32, bf16"),
        (("--device", "gpu"), "auto, cpu, cuda"),
        (("--tolerance", 0.5), "--tolerance"),
        (("--csv", "out.txt"), ".csv"),
    ],
)
def test_bad_input_is_named(bcos, arguments, message):
    result = bcos("bench", "kernels", *arguments)
    assert result.code == 2
    assert message in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(bcos):
    result = bcos("bench", "kernels", "--device", "cuda")
    assert result.code == 2
    assert "--device" in result.err

"""The exported explanation is faster than autograd's: both times are printed (pytest -s, or on failure)."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")


@pytest.mark.timing
def test_onnx_explains_faster_than_autograd():
    path = Path(__file__).resolve().parents[1] / "bench" / "onnx_vs_autograd.py"
    spec = importlib.util.spec_from_file_location("onnx_vs_autograd", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    threads = torch.get_num_threads()
    try:
        result = bench.measure(threads, 7)
    finally:
        torch.set_num_threads(threads)
    median = result["median ms"]
    print({name: median[name] for name in median})
    assert result["largest difference of W, relative"] < 1e-3
    assert median["onnxruntime, explanation"] < median["PyTorch autograd, explanation"]

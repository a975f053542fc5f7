"""bfloat16 in Triton's interpreter against torch's, with the fix of ``interpreter.py``; the same kernels on a GPU."""

# ruff: noqa: N803 (compile-time constants of Triton kernels are upper case)

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_rt.kernels.triton.launch import interpreting

REPOSITORY = Path(__file__).parents[2]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def copy_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0.0)
    tl.store(y_ptr + place, x.to(y_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    acc = tl.dot(tl.load(a_ptr + place), tl.trans(tl.load(b_ptr + place)), acc, input_precision="ieee")
    tl.store(y_ptr + place, acc)


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, sum_ptr, larger_ptr, less_ptr, total_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + place)
    b = tl.load(b_ptr + place)
    tl.store(sum_ptr + place, a + b * 3.0)
    tl.store(larger_ptr + place, tl.where(a < b, b, a))
    tl.store(less_ptr + place, (a < b).to(tl.int32))
    tl.store(total_ptr, tl.sum(a.to(tl.float32), 0))


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    copy_kernel[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


def awkward(device: str = "cpu") -> Tensor:
    """fp32 values that rounding to bfloat16 gets wrong if it can: ties both ways, carries, extremes, zeros."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x3FFFFFFF, 0x7F7FFFFF, 0x00008000, 0x00018000]
    ties = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    plain = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-39, 3e38, -3e38, float("inf"), float("-inf"), float("nan")])
    drawn = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 10
    return torch.cat([ties, plain, drawn]).to(device)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    # -0 and 0 compare equal.
    assert torch.equal(torch.signbit(actual), torch.signbit(expected))


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_casts_round_as_torch_does(source, target, device, guards):
    values = awkward(device).nan_to_num(0.5) if source != target else awkward(device)
    if torch.float16 in (source, target):
        values = values.clamp(-6e4, 6e4)
    x = values.to(source)
    same(copied(x, target), x.to(target))


def test_infinity_and_nan_survive_rounding_to_bfloat16(device, guards):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38], device=device)
    y = copied(x, torch.bfloat16)
    assert y.isnan().tolist() == [False, False, True, False]
    assert y[0] == y[3] == float("inf")
    assert y[1] == float("-inf")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_multiplies_values(dtype, device, guards):
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in range(2))
    y = torch.empty(16, 16, device=device)
    dot_kernel[(1,)](a, b, y, SIZE=16)
    torch.testing.assert_close(y.double(), a.double() @ b.double().t(), rtol=1e-5, atol=1e-5)


def test_arithmetic_in_bfloat16_rounds_every_result(device, guards):
    a, b = (torch.randn(32, generator=torch.Generator().manual_seed(i)).to(device, torch.bfloat16) for i in range(2))
    total, larger = torch.empty_like(a), torch.empty_like(a)
    less = torch.empty(32, dtype=torch.int32, device=device)
    wide = torch.empty(1, device=device)
    arithmetic_kernel[(1,)](a, b, total, larger, less, wide, BLOCK=32)
    # A GPU may fuse the product and the sum.
    torch.testing.assert_close(total, a + b * 3, rtol=2**-7, atol=2**-7)
    if interpreting():
        same(total, a + b * 3)
    same(larger, torch.maximum(a, b))
    assert torch.equal(less.bool(), a < b)
    torch.testing.assert_close(wide[0], a.float().sum())


def without_the_fix() -> None:
    """What the interpreter does as it comes; run below in a process of its own."""
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.empty(16, 16)
    dot_kernel[(1,)](a, a, y, SIZE=16)
    true = a.double() @ a.double().t()
    print("dot wrong" if not torch.allclose(y.double(), true, rtol=1e-3, atol=1e-3) else "dot right")
    x = awkward().nan_to_num(0.5)
    print("cast wrong" if not torch.equal(copied(x, torch.bfloat16), x.bfloat16()) else "cast right")


@pytest.mark.skipif(not interpreting(), reason="about the interpreter")
def test_the_fix_is_still_needed():
    """Fails when Triton's interpreter has learnt bfloat16: then ``interpreter.fix_bfloat16`` can go."""
    code = "from tests.triton.test_interpreter import without_the_fix; without_the_fix()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["dot wrong", "cast wrong"]

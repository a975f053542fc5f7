"""The guard bands themselves: kernels that are wrong on purpose, each in one way, are caught."""

# ruff: noqa: N803 (compile-time constants of Triton kernels are upper case)

import pytest
import torch
import triton
import triton.language as tl

from bcos_rt.kernels.triton import common
from bcos_rt.kernels.triton.launch import interpreting
from tests.triton.guard import INTEGER_POISON, OutsideError, check, guarding

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def double_kernel(x_ptr, y_ptr, count, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x, reading READ elements further on and writing WRITE elements more than there are."""
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place + READ, mask=place < count, other=0.0)
    tl.store(y_ptr + place, (2.0 * x.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=place < count + WRITE)


@triton.jit
def overwrite_kernel(x_ptr, place):
    tl.store(x_ptr + place, 7.0)


def doubled(guards, x, read=0, write=0):
    given = guards.guarded(x)
    y = common.empty(given, x.shape)
    double_kernel[(1,)](given, y, x.numel(), READ=read, WRITE=write, BLOCK=64)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_kernel_passes(dtype, device, guards):
    x = torch.randn(13, device=device).to(dtype)
    check(doubled(guards, x), 2 * x.double(), dtype)


@pytest.mark.skipif(not interpreting(), reason="addresses are seen in the interpreter")
@pytest.mark.parametrize(("read", "write"), [(1, 0), (-1, 0), (40, 0), (0, 1)])
def test_the_interpreter_sees_an_address_outside(read, write, device):
    with (
        pytest.raises(triton.runtime.errors.InterpreterError, match="addresses outside it, first element"),
        guarding(device) as guards,
    ):
        doubled(guards, torch.randn(13, device=device), read, write)


@pytest.fixture
def blind(monkeypatch):
    """As on a GPU: nobody looks at addresses."""
    monkeypatch.setattr("tests.triton.guard.Guards.look", lambda *_: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_past_the_end_is_seen(dtype, device, blind):
    with pytest.raises(OutsideError, match="written after it, first at 0"), guarding(device) as guards:
        doubled(guards, torch.randn(13, device=device).to(dtype), write=1)


@pytest.mark.parametrize("place", [-1, 13])
def test_a_write_beside_an_operand_is_seen(place, device, blind):
    with pytest.raises(OutsideError, match=r"operand .* written (before|after) it"), guarding(device) as guards:
        overwrite_kernel[(1,)](guards.guarded(torch.zeros(13, device=device)), place)


def test_a_write_into_an_operand_is_seen(device):
    with pytest.raises(OutsideError, match="an operand was written to"), guarding(device) as guards:
        overwrite_kernel[(1,)](guards.guarded(torch.zeros(13, device=device)), 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_left_unwritten_is_seen(dtype, device, guards):
    x = torch.randn(13, device=device).to(dtype)
    y = doubled(guards, x, write=-1)
    with pytest.raises(AssertionError, match=r"1 of 13 values are wrong \(1 NaN\), first at \(12,\)"):
        check(y, 2 * x.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", [-1, 1, 13])
def test_a_read_outside_poisons_the_result(dtype, read, device, blind):
    with guarding(device) as guards:
        x = torch.randn(13, device=device).to(dtype)
        y = doubled(guards, x, read=read)
    assert y.isnan().sum() == min(abs(read), 13)


def test_integers_are_poisoned_too(device, guards):
    assert (guards.allocate((5,), torch.uint8, device) == INTEGER_POISON).all()
    with pytest.raises(AssertionError, match="5 of 5 integers differ"):
        check(guards.allocate((5,), torch.int32, device), torch.zeros(5), torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int32], ids=str)
def test_layout_and_alignment_are_kept(dtype, device, guards):
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[..., 1::2], x[:0]):
        copy = guards.guarded(given)
        assert copy.stride() == given.stride()
        assert torch.equal(copy.cpu(), given)
        assert copy.data_ptr() % 16 == 0
    result = common.empty(copy, (2, 4, 5, 3))
    assert result.is_contiguous()
    assert result.data_ptr() % 16 == 0
    with pytest.raises(ValueError, match="expanded"):
        guards.guarded(torch.zeros(1, 3).expand(2, 3))


def test_the_allocator_is_put_back(device):
    with guarding(device) as guards:
        assert common.allocator == guards.allocate
    assert common.allocator is torch.empty
    with pytest.raises(ZeroDivisionError), guarding(device):
        raise ZeroDivisionError
    assert common.allocator is torch.empty


def test_check_is_relative_to_the_largest_magnitude():
    expected = torch.tensor([1e6, 0.0], dtype=torch.float64)
    check(torch.tensor([1e6, 5.0]), expected, torch.float32)
    with pytest.raises(AssertionError, match="first at"):
        check(torch.tensor([1e6, 50.0]), expected, torch.float32)
    check(torch.zeros(3), torch.zeros(3, dtype=torch.float64), torch.bfloat16)
    with pytest.raises(AssertionError, match="values are wrong"):
        check(torch.full((3,), 1e-30), torch.zeros(3, dtype=torch.float64), torch.bfloat16)
    with pytest.raises(AssertionError, match="shape"):
        check(torch.zeros(1, 3), torch.zeros(3, dtype=torch.float64), torch.float32)
    infinite = torch.tensor([float("inf"), 1.0], dtype=torch.float64)
    check(infinite.float(), infinite, torch.float32)
    with pytest.raises(AssertionError, match="values are wrong"):
        check(torch.tensor([1.0, 1.0]), infinite, torch.float32)

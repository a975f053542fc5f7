"""A bfloat16 that works in Triton's interpreter (as of triton 3.8). Applied by this folder's conftest, for tests only.

The interpreter keeps bfloat16 as ``uint16`` bits and forgets so: its dot and its arithmetic work on the bit patterns,
fp32 -> bf16 truncates where the hardware rounds to nearest even, casts from and to other types convert the bits as
integers, and constants are missing. Here every operation on bfloat16 widens to fp32 and rounds the result back, which
is what the hardware does. ``test_interpreter.py`` notices when Triton makes this unnecessary.

:func:`save_time` leaves out work that comes to nothing. :func:`watch` adds what only an interpreter can do: a look at
the address of every load and store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

__all__ = ["fix_bfloat16", "round_to_bfloat16", "save_time", "watch", "widen_bfloat16"]

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
# Called with the addresses of each load and store that is not masked off, and the size of an element.
Watcher = Callable[[NDArray[np.uint64], int], None]


def round_to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; infinities stay, NaN stays NaN."""
    wide = np.array(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding could carry a NaN's payload into the sign.
    return np.where(np.isnan(wide), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def widen_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The fp32 values of bfloat16 bits: exact."""
    return np.left_shift(bits.astype(np.uint32), 16).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: Any) -> Any:
    """The same values as fp32 where they are bfloat16."""
    return Handle(widen_bfloat16(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(handle: Any) -> Any:
    """An fp32 result as bfloat16; a comparison's result stays what it is."""
    if handle.data.dtype != np.float32:
        return handle
    return Handle(round_to_bfloat16(handle.data), tl.bfloat16)


def _around(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` on fp32 wherever an operand is bfloat16 (Triton has made both operands the same type by then)."""

    def method(self: Any, *arguments: Any) -> Any:
        if not any(isinstance(a, Handle) and _is_bfloat16(a) for a in arguments):
            return original(self, *arguments)
        wide = original(self, *(_widened(a) if isinstance(a, Handle) else a for a in arguments))
        return _narrowed(wide)

    return method


def fix_bfloat16() -> None:
    """Patch the interpreter's builder; once is enough."""
    if hasattr(Builder, "get_bf16"):
        return
    cast, convert, ternary, dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.ternary_op, Builder.create_dot

    def get_bf16(self: Any, value: float) -> Any:
        return Handle(round_to_bfloat16(np.array([value])), tl.bfloat16)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bfloat16(src) else Handle(round_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, _widened(src), dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        if _is_bfloat16(src) or dst_type.scalar == tl.bfloat16:
            if rounding not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
                raise NotImplementedError(f"bfloat16 with rounding {rounding}")
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding)

    def ternary_op(self: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
        # Choosing moves bits; only what computes needs values.
        if op is np.where:
            return ternary(self, first, second, third, op)
        return _around(ternary)(self, first, second, third, op)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *options)

    Builder.get_bf16 = get_bf16
    Builder.cast_impl = cast_impl
    Builder.create_fp_to_fp = create_fp_to_fp
    Builder.ternary_op = ternary_op
    Builder.create_dot = create_dot
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(Builder, name, _around(getattr(Builder, name)))


def save_time() -> None:
    """Halve the interpreter's time by what it does for nothing.

    It works every integer sum out again in 64 bits for an assertion that is off, and goes through all of
    ``triton.language`` at every call of a device function, to patch what the launch has patched already.
    """
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    call = interpreter.InterpretedFunction.__call__

    def call_patched(self: Any, *arguments: Any, **options: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in (tl, tl.core)):
            return call(self, *arguments, **options)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call_patched


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Show ``watcher`` the address of every element that a kernel loads or stores inside; it may raise."""
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def show(ptrs: Any, mask: Any) -> None:
        # A mask may come as integers.
        watcher(ptrs.data[mask.data.astype(bool)], max(1, ptrs.get_element_ty().primitive_bitwidth // 8))

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        show(ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        show(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    try:
        yield
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store

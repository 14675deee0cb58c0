"""Makes Triton's interpreter (TRITON_INTERPRET=1) compute bfloat16 as a GPU does. Triton 3.6 to 3.9 do not.

The interpreter holds every block in a numpy array, and numpy has no bfloat16: a block of them is a uint16 array of
their bits. What only moves bits (load, store, reshape, trans, join, where) is right as it is. What computes hands these
integers to np.add, np.matmul, np.sum, silently; and a cast from float32 cuts the lower bits off where hardware rounds
to the nearest, ties to even. `install` replaces those methods, by the same ones in float32 and one rounding after:

    elementwise   + - * / % comparisons, minimum, maximum, clamp, fma, negation
    tl.dot        products and sums in float32; rounded only if the accumulator is bfloat16
    casts         to and from every other type but float8
    reductions    sum (rounded after every addition, as hardware does), min, max, argmin, argmax
    constants     tl.full(..., tl.bfloat16), x * 0.5

Scans are refused, not repaired: no kernel here needs them. What 3.6 does otherwise than hardware in float32 too is
mended with it: minimum and maximum of a number and a NaN are the number; fma rounds once; a comparison is an int1.

What remains unlike a GPU: tl.dot multiplies in full float32 whatever `input_precision` says, and sums in numpy's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

_NAN = np.uint16(0x7FFF)  # the NaN that hardware writes
_MISSING = object()


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of the same value: bfloat16 is its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, of two the even one."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)  # wider: the largest NaN would overflow
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), _NAN, rounded.astype(np.uint16))


def complaint() -> str:
    """Why the interpreter cannot be used with the installed packages, or ''."""
    numbers = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, np)]
    if numbers[0] < (3, 9) and numbers[1] >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} cannot use numpy {np.__version__} (an array of one "
            'element is no longer an index)\n  -> pip install "numpy<2.4"'
        )
    return ""


# ---- the methods that replace Triton's ----


def _is_bf16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _is_other_float(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar.is_floating() and not _is_bf16(x)


def _widened(x: Any) -> Any:
    return TensorHandle(widen(x.data), tl.float32) if _is_bf16(x) else x


def _in_float32(method: Callable) -> Callable:
    """An operation on blocks; a result of nothing but bfloat16 is rounded to it. tl.dot may add to float32."""

    def repaired(self, *operands, **options):
        if np.where in operands or not any(map(_is_bf16, operands)):
            result = method(self, *operands, **options)
        else:
            result = method(self, *map(_widened, operands), **options)
            if result.data.dtype != np.bool_ and not any(map(_is_other_float, operands)):
                result = TensorHandle(narrow(result.data), tl.bfloat16)
        # Triton leaves the operands' type on a comparison, by which a cast of it goes wrong
        return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    return repaired


def _cast(method: Callable) -> Callable:
    def repaired(self, block, to):
        to = to.scalar
        if _is_bf16(block) == (to == tl.bfloat16):
            return method(self, block, to)
        if to == tl.bfloat16:
            return TensorHandle(narrow(block.data.astype(np.float32)), to)
        return TensorHandle(widen(block.data).astype(interpreter._get_np_dtype(to)), to)

    return repaired


def _fma(self, x, y, z):
    """A product of two float32 is exact in float64: one rounding of the sum, but for a tie in 2^29."""
    total = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)


def _constant(self, value):
    return TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)


def _sum(method: Callable) -> Callable:
    """Halves added to each other until one is left: one of the orders a GPU may take, with its roundings."""

    def repaired(self, block):
        if block.dtype != tl.bfloat16:
            return method(self, block)
        values, axis = widen(block.handle.data), self.axis
        kept = [1 if axis in (None, i) else size for i, size in enumerate(values.shape)]
        values = values.reshape(-1) if axis is None else np.moveaxis(values, axis, 0)
        while len(values) > 1:
            half = len(values) // 2
            values = widen(narrow(values[:half] + values[half:]))
        total = narrow(values[0])
        return self.to_tensor(total.reshape(kept) if self.keep_dims else total, tl.bfloat16)

    return repaired


def _min_max(method: Callable) -> Callable:
    def repaired(self, block, *reductions, **named):
        block = block[0] if isinstance(block, tuple) else block
        if block.dtype != tl.bfloat16:
            return method(self, block, *reductions, **named)
        found = method(self, self.to_tensor(widen(block.handle.data), tl.float32), *reductions, **named)
        value, *index = found if isinstance(found, tuple) else (found,)
        bits = narrow(value.handle.data)
        value = self.to_tensor(bits if value.type.is_block() else bits[0], tl.bfloat16)
        return (value, *index) if index else value

    return repaired


def _no_scan(method: Callable) -> Callable:
    def refused(self, blocks):
        if any(block.dtype == tl.bfloat16 for block in blocks):
            raise NotImplementedError("tests/triton_interpreter.py: scans of bfloat16 are not repaired; use float32")
        return method(self, blocks)

    return refused


def _replacements() -> Iterator[tuple[type, str, Callable]]:
    builder = InterpreterBuilder
    if not hasattr(interpreter._interpreter, "fma_fp32"):  # 3.6
        yield builder, "create_fma", _in_float32(_fma)
        yield builder, "create_maxnumf", lambda self, x, y: self.binary_op(x, y, np.fmax)
        yield builder, "create_minnumf", lambda self, x, y: self.binary_op(x, y, np.fmin)
    else:
        yield builder, "create_fma", _in_float32(builder.create_fma)
    for name in ("unary_op", "binary_op", "ternary_op", "create_dot"):
        yield builder, name, _in_float32(getattr(builder, name))
    yield builder, "cast_impl", _cast(builder.cast_impl)
    yield builder, "get_bf16", _constant
    yield ReduceOps, "sum", _sum(ReduceOps.sum)
    yield ReduceOps, "min_max", _min_max(ReduceOps.min_max)
    yield ScanOps, "apply_impl", _no_scan(ScanOps.apply_impl)


_originals: list[tuple[type, str, Any]] = []


def install() -> None:
    """Before the first launch. A second call changes nothing."""
    if _originals:
        return
    for owner, name, method in list(_replacements()):
        _originals.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, method)


@contextmanager
def uninstalled() -> Iterator[None]:
    """Triton as it came."""
    while _originals:
        owner, name, method = _originals.pop()
        if method is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, method)
    try:
        yield
    finally:
        install()

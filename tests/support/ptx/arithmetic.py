"""PTX arithmetic that NumPy does not have, on scalars and vectors alike.

NumPy's own add, subtract, multiply, divide and square root are those of IEEE 754, as `.rn` is. A
NaN is a NaN here: hardware's has one bit pattern, NumPy's may have another.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
s8, s16, s32, s64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
DTYPES: dict[str, Any] = {
    "b8": u8, "u8": u8, "s8": s8, "b16": u16, "u16": u16, "s16": s16, "b32": u32, "u32": u32,
    "s32": s32, "b64": u64, "u64": u64, "s64": s64, "f16": f16, "f32": f32, "f64": f64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items() if name[0] != "b"}
WIDTHS = {dtype: np.dtype(dtype).itemsize for dtype in DTYPES.values()}
UNSIGNED = {1: u8, 2: u16, 4: u32, 8: u64}


class PtxError(Exception):
    """What a GPU would fault on, or what this machine does not know."""


def select(condition: Any, a: Any, b: Any) -> Any:
    """`where`, which keeps scalars scalars."""
    return (a if condition else b) if condition.ndim == 0 else np.where(condition, a, b)


def ftz(x: Any) -> Any:
    """Float32 with its subnormals flushed to a zero of the same sign."""
    return select(np.abs(x) < f32(2.0**-126), np.copysign(f32(0), x), x)


def _extreme(a: Any, b: Any, pick: Any, signs: Any) -> Any:
    result = pick(a, b)
    same = a == b
    if np.any(same):
        bits = UNSIGNED[result.dtype.itemsize]
        zeros = signs(np.asarray(a).view(bits), np.asarray(b).view(bits)).view(result.dtype)
        result = select(np.asarray(same), zeros, result)
    return result


def fmax(a: Any, b: Any) -> Any:
    """The other operand where one is NaN; -0 lies below +0."""
    return _extreme(a, b, np.fmax, np.bitwise_and)


def fmin(a: Any, b: Any) -> Any:
    """The other operand where one is NaN; -0 lies below +0."""
    return _extreme(a, b, np.fmin, np.bitwise_or)


def fma32(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` rounded once: the product is exact in float64, the sum rounded to odd there."""
    product = a.astype(f64) * b.astype(f64)
    c = c.astype(f64)
    total = np.atleast_1d(product + c)
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    bits = total.view(s64)
    even = np.isfinite(total) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    odd = np.where((error > 0) == (total > 0), bits + 1, bits - 1)
    result = np.where(even, odd, bits).view(f64).astype(f32)
    return result if a.ndim or b.ndim or c.ndim else result[0]


_libm_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_libm_fma.restype, _libm_fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma64 = np.frompyfunc(_libm_fma, 3, 1)


def fma64(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` rounded once, by the C library."""
    return np.asarray(_fma64(a, b, c)).astype(f64)


def to_bf16(x: Any) -> Any:
    """The bits of float32 rounded to bfloat16."""
    bits = x.view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return select(np.isnan(x), u16(0x7FFF) | (rounded & u16(0)), rounded)


def from_bf16(bits: Any) -> Any:
    return (bits.astype(u32) << u32(16)).view(f32)


def ex2(x: Any) -> Any:
    """`ex2.approx.ftz`, rounded once: hardware's may differ by 2 units in the last place."""
    return ftz(np.exp2(ftz(x).astype(f64)).astype(f32))


def prmt(a: Any, b: Any, selector: int) -> Any:
    """Bytes of two registers by a selector; bit 3 of a digit copies the byte's sign."""
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    result = u32(0)
    for place in range(4):
        digit = (selector >> (4 * place)) & 15
        byte = ((both >> u64(8 * (digit & 7))) & u64(255)).astype(u32)
        if digit & 8:
            byte = (byte >> u32(7)) * u32(255)
        result = result | (byte << u32(8 * place))
    return result


def unordered(a: Any, b: Any) -> Any:
    return np.isnan(a) | np.isnan(b)

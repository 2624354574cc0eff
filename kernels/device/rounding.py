"""Storage narrower than the arithmetic; the twin of `bngd_triton.eager.rounding`.

Traffic per element beyond the parameter's own: a remainder is read and written in 2 bytes each, a
master in 4; stochastic rounding moves nothing and takes about 15 integer instructions.
"""

import triton
import triton.language as tl

from .tables import MASTER_COPY, REMAINDER, STOCHASTIC

# see bngd_triton/eager/rounding.py
GOLDEN = tl.constexpr(0x9E3779B9)
FIRST = tl.constexpr(0x7FEB352D)
SECOND = tl.constexpr(0x846CA68B)


@triton.jit
def store_as(x, like: tl.constexpr, SOFT: tl.constexpr):
    """Round float32 to the storage type, to nearest even.

    SOFT does it in integers for bfloat16: the interpreter's own cast truncates.
    """
    if SOFT and like == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(x != x, (bits >> 16) | 0x40, kept)
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(like)


@triton.jit
def widen(param, master, KIND: tl.constexpr, SOFT: tl.constexpr):
    """The float32 values that a step starts from."""
    if KIND == REMAINDER:
        high = param.to(tl.int16, bitcast=True).to(tl.int32) << 16
        wide = (high + master.to(tl.int32)).to(tl.float32, bitcast=True)
        # a zero or an infinity that someone wrote beside a remainder of the other sign
        return tl.where(wide != wide, high.to(tl.float32, bitcast=True), wide)
    elif KIND == MASTER_COPY:
        # whoever wrote to the parameter since meant that value; compared in float32, since the
        # interpreter compares the bits of bfloat16
        wide = param.to(tl.float32)
        kept = store_as(master, param.dtype, SOFT).to(tl.float32)
        return tl.where(kept == wide, master, wide)
    else:
        return param.to(tl.float32)


@triton.jit
def narrow(x, like: tl.constexpr, hashed, KIND: tl.constexpr, SOFT: tl.constexpr):
    """What to store of float32: the parameter, and its master."""
    if KIND == REMAINDER:
        bits = _bits(x)
        # a tie rounds away from zero: the +0x8000 of a tie to even does not fit an int16
        kept = (bits + 0x8000) >> 16
        # what is left of bits without kept << 16, whose lower half is 0
        return kept.to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.int16)
    elif KIND == STOCHASTIC:
        if like == tl.bfloat16:
            return _stochastic_bfloat16(x, hashed), x
        else:
            return _stochastic_float16(x, hashed), x
    else:
        return store_as(x, like, SOFT), x


@triton.jit
def _bits(x):
    """Of float32; of a NaN those of one that no carry into the upper half makes a number."""
    return tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))


@triton.jit
def _stochastic_bfloat16(x, hashed):
    bits = _bits(x)
    kept = (bits + (hashed >> 16).to(tl.int32)) >> 16
    kept = tl.where((kept & 0x7F80) == 0x7F80, bits >> 16, kept)
    return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _stochastic_float16(x, hashed):
    bits = x.to(tl.int32, bitcast=True)
    place = tl.maximum(((bits >> 23) & 0xFF) - 127, -14) - 10
    up = ((127 - place) << 23).to(tl.float32, bitcast=True)
    down = ((127 + place) << 23).to(tl.float32, bitcast=True)
    size = tl.abs(x)
    rounded = tl.floor(size * up + (hashed >> 19).to(tl.float32) * 0.0001220703125) * down
    rounded = tl.where((rounded > 65504) & (size < 65536), 65504.0, rounded)
    signed = rounded.to(tl.int32, bitcast=True) | (bits & -2147483648)
    return tl.where(size < float("inf"), signed.to(tl.float32, bitcast=True), x).to(tl.float16)


@triton.jit
def rounding_seeds(clock, key):
    """Two 32-bit seeds of a tensor in a step, from its group's clock (int64) and its key."""
    seed = _mix(((clock >> 32) & 0xFFFFFFFF).to(tl.uint32) + GOLDEN)
    step = _mix((clock & 0xFFFFFFFF).to(tl.uint32) ^ seed)
    return _mix((key & 0xFFFFFFFF).to(tl.uint32) ^ step), step


@triton.jit
def hash_positions(positions, tensor, step):
    """Random bits (uint32) for the elements at int64 positions."""
    return _mix(_mix((positions & 0xFFFFFFFF).to(tl.uint32) ^ tensor) + step)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * FIRST
    x = x ^ (x >> 15)
    x = x * SECOND
    return x ^ (x >> 16)

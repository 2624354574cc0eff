"""Parameters narrower than the arithmetic: float32 masters, and stochastic rounding.

The eager twin of ``kernels/device/rounding.py``. Three ways to keep what a bfloat16 or float16
parameter would lose of a small step:

* a remainder: the parameter is the upper half of its float32 master, rounded to nearest, and an
  int16 tensor holds the rest: ``master bits = (parameter bits << 16) + remainder``. A tie rounds
  up, away from zero, since the +0x8000 of a tie to even does not fit an int16;
* a master: float32, kept whole, for float16 parameters, whose bits are no part of it;
* stochastic rounding: up with the probability that makes the mean exact, by a hash of the element,
  the tensor, the step and the seed. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import NARROW
from ..tensors import walked_in_place

# 2**32 / golden ratio, and the multipliers of lowbias32, a 32-bit mixer of low bias (Chris
# Wellons, "Prospecting for Hash Functions", 2018)
GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
LOW = 0xFFFFFFFF


def new_master(param: Tensor, like: Tensor) -> Tensor:
    """`like` (zeros) made the master of a parameter that has had none."""
    return like if like.dtype is torch.int16 else like.copy_(param)


def master_dtype(param: Tensor, master_weights: str | None) -> torch.dtype | None:
    """Of the tensor that a parameter's master needs; None where there is none."""
    if master_weights != "split" or param.dtype not in NARROW:
        return None
    return torch.int16 if param.dtype is torch.bfloat16 else torch.float32


def widen(param: Tensor, master: Tensor | None) -> Tensor:
    """The values that a step starts from, float32 if there is a master."""
    if master is None:
        return param
    if master.dtype is torch.int16:
        high = param.view(torch.int16).int() << 16
        wide = (high + master.int()).view(torch.float32)
        # a zero or an infinity that someone wrote beside a remainder of the other sign
        return torch.where(wide.isnan(), high.view(torch.float32), wide)
    # whoever wrote to the parameter since meant that value
    return torch.where(master.to(param.dtype) == param, master, param.float())


def store_(param: Tensor, master: Tensor | None, new: Tensor, hashed: Tensor | None) -> None:
    """Round `new` to the parameter, and what is lost to the master.

    Args:
        param: written.
        master: written; None without.
        new: of the parameter's shape, float32 or float64.
        hashed: int64 in [0, 2**32) of the parameter's shape for stochastic rounding.
    """
    if master is not None:
        wide = new.float()
        if master.dtype is torch.int16:
            bits = _bits(wide)
            kept = (bits + 0x8000) >> 16
            param.copy_(kept.to(torch.int16).view(torch.bfloat16))
            # what is left of bits without kept << 16, whose lower half is 0
            master.copy_(bits.to(torch.int16))
            return
        master.copy_(wide)
        param.copy_(wide)
    elif hashed is not None:
        round_ = _stochastic_bfloat16 if param.dtype is torch.bfloat16 else _stochastic_float16
        param.copy_(round_(new.float(), hashed))
    else:
        param.copy_(new)


def _bits(wide: Tensor) -> Tensor:
    """Of float32; of a NaN those of one that no carry into the upper half makes a number."""
    return torch.where(wide.isnan(), 0x7FC00000, wide.contiguous().view(torch.int32))


def _stochastic_bfloat16(wide: Tensor, hashed: Tensor) -> Tensor:
    """Add 16 random bits below the last one that is kept; infinities pass as they are."""
    bits = _bits(wide)
    kept = (bits + (hashed >> 16).int()) >> 16
    # never from a finite value to infinity
    kept = torch.where(kept & 0x7F80 == 0x7F80, bits >> 16, kept)
    return kept.to(torch.int16).view(torch.bfloat16)


def _stochastic_float16(wide: Tensor, hashed: Tensor) -> Tensor:
    """In units of the last place, add 13 random bits below the point and take the floor."""
    bits = wide.contiguous().view(torch.int32)
    # the exponent of the last place: 10 below the value's, and at least that of a subnormal
    place = (((bits >> 23) & 0xFF) - 127).clamp(min=-14) - 10
    up = ((127 - place) << 23).view(torch.float32)
    down = ((127 + place) << 23).view(torch.float32)
    rounded = ((wide.abs() * up) + (hashed >> 19).float() * 2.0**-13).floor() * down
    # 65504 is the greatest float16; 65536 would have been the next
    rounded = torch.where((rounded > 65504) & (wide.abs() < 65536), 65504.0, rounded)
    return torch.where(wide.isfinite(), rounded.copysign(wide), wide)


def hash_positions(clock: Tensor, key: int, positions: Tensor) -> Tensor:
    """Random bits for elements: int64 in [0, 2**32), of the shape of `positions`.

    Args:
        clock: 0-dim int64: the seed in the upper 32 bits, the step in the lower.
        key: of the tensor.
        positions: int64 places in the tensor's memory; their lower 32 bits count.
    """
    seed = _mix(((clock >> 32) + GOLDEN) & LOW)
    step = _mix((clock & LOW) ^ seed)
    tensor = _mix((key & LOW) ^ step)
    return _mix((_mix((positions & LOW) ^ tensor) + step) & LOW)


def _mix(x: Tensor) -> Tensor:
    """lowbias32 of int64 in [0, 2**32); products wrap, their low halves are exact."""
    x = x ^ (x >> 16)
    x = (x * FIRST) & LOW
    x = x ^ (x >> 15)
    x = (x * SECOND) & LOW
    return x ^ (x >> 16)


def positions_of(param: Tensor, slices: int) -> Tensor:
    """The places of a parameter's entries in the memory that the kernels walk: int64, its shape."""
    strides: Sequence[int] = param.stride()
    if not walked_in_place(param, slices):
        strides = torch.empty(param.shape, dtype=param.dtype, device="meta").stride()
    places = torch.zeros((), dtype=torch.int64, device=param.device)
    for size, stride in zip(param.shape, strides):
        index = torch.arange(size, dtype=torch.int64, device=param.device)
        places = places.unsqueeze(-1) + index * stride
    return places

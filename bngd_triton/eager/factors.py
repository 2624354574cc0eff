"""From statistics to the factors that normalise slices, and which slices take part.

The eager twin of ``kernels/device/factors.py``: the same factors from the same statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from ..records import MEAN, SKIPPED, STD
from .moments import Moments, power_of_two

# sigma below this multiple of |mean| is rounding, not spread: float64 statistics of equal values
# are off by a few units of 2**-53, and the least real spread of 2**31 float32 values is 2**-40
UNIFORM = 8 * 2.0**-53


class Factors(NamedTuple):
    """What normalises slices: ``ghat = ((g * up * more) - high - low) * inverse``; [slices, 1].

    ``up * more`` is the power of two that brings ``rms(v) + eps`` into [1, 2), in two factors
    since one can overflow; ``high + low`` is the centred share of the mean in those units.

    Attributes:
        up: see above, like the next four.
        more: see above; None where all are known to be 1.
        high: see above.
        low: see above.
        inverse: see above.
        uniform: which slices have no spread.
        valid: whether ghat enters momentum; None where it is known to, of every slice.
        beta: the weight of momentum's past; None is the group's `momentum`.
        moves: whether the slice moves; None where all are known to.
    """

    up: Tensor
    more: Tensor | None
    high: Tensor
    low: Tensor
    inverse: Tensor
    uniform: Tensor
    valid: Tensor | None
    beta: Tensor | None
    moves: Tensor | None

    def split(self, rows: list[int]) -> Iterator[Factors]:
        """The factors of so many slices, one after the other."""
        # `split` is a function of Python that asks for more than it needs here
        columns = (repeat(None) if c is None else c.split_with_sizes(rows) for c in self)
        return map(Factors._make, zip(*columns))


def factors_from(
    found: Moments,
    options: Options,
    centering: float | Tensor,
    dtype: torch.dtype,
    grad_scale: Tensor | None = None,
) -> Factors:
    """Statistics to factors, rounded once to `dtype`; every finite slice takes part.

    Args:
        found: the statistics.
        options: the group's.
        centering: share of the mean that is removed, of all slices or [slices, 1].
        dtype: of the arithmetic.
        grad_scale: what the gradient was multiplied by.
    """
    mean, variance = found.mean, found.m2 / found.n
    uniform = variance.sqrt() <= UNIFORM * mean.abs()
    if not isinstance(centering, Tensor):
        centering = torch.full_like(mean, centering)
    removed = centering.masked_fill(uniform, 0.0)
    kept = (1 - removed) * mean
    eps: float | Tensor = options.eps
    if grad_scale is not None:
        # the gradient is as many times too large: the quotient is that of the unscaled one
        eps = eps * grad_scale.to(mean.device).double().reshape(())
    if isinstance(found.exponent, Tensor):
        eps = eps * power_of_two(found.exponent)
    divisor = (variance + kept.square()).sqrt() + eps
    zero = divisor == 0
    # divisor * 2**exponent is in [1, 2): products neither overflow nor lose bits to underflow
    exponent = torch.where(zero, 0, 1 - torch.frexp(divisor).exponent.long())
    limit = 1022 if dtype is torch.float64 else 126
    total = exponent + found.exponent
    up = total.clamp(-limit, limit)
    more = None
    if _partial(total == up) is not None:
        more = power_of_two((total - up).clamp(-limit, limit)).to(dtype)
    scale = power_of_two(exponent.clamp(-1022, 1022))
    center = removed * mean * scale
    high = center.to(dtype)
    sign = -1.0 if options.maximize else 1.0
    inverse = torch.where(zero, 0.0, sign / (divisor * scale))
    # one that is not finite makes the sum so
    finite = torch.isfinite(mean + found.m2)
    valid = _partial(finite)
    return Factors(
        up=power_of_two(up).to(dtype),
        more=more,
        high=high,
        low=(center - high.double()).to(dtype),
        inverse=inverse.to(dtype),
        uniform=uniform,
        valid=valid,
        beta=None,
        moves=valid,
    )


def _partial(mask: Tensor) -> Tensor | None:
    """A mask; None where it is known to hold for every slice. A GPU is not waited for."""
    return None if mask.device.type == "cpu" and bool(mask.all()) else mask


def admit(
    factors: Factors,
    options: Options,
    closing: bool,
    found_inf: Tensor | None,
    seen: Tensor | None,
) -> tuple[Factors, Tensor | None]:
    """Which slices take part: the finite ones, and those that moved before in their window.

    Args:
        factors: of all slices, before anything is left out.
        options: the group's.
        closing: whether this is the last micro-batch of a window.
        found_inf: what a GradScaler found.
        seen: bool [slices, 1]: whether a slice has had a valid micro-batch in this window.

    Returns:
        The factors, and `seen` after this micro-batch.
    """
    valid = None if options.nonfinite == "propagate" else factors.valid
    if found_inf is not None:
        # a sum over devices, so anything but 0
        clean = found_inf.to(factors.uniform.device).reshape(()) == 0
        valid = _partial(clean.expand_as(factors.uniform) if valid is None else valid & clean)
    if seen is None:
        return factors._replace(valid=valid, moves=valid), None
    # the first valid micro-batch decays; where none was, nothing moves
    past = torch.full_like(factors.inverse, options.momentum)
    beta = torch.where(seen, 1.0, past)
    now = torch.ones_like(seen) if valid is None else seen | valid
    return factors._replace(valid=valid, beta=beta, moves=_partial(now)), now & (not closing)


def closing_factors(seen: Tensor, dtype: torch.dtype) -> Factors:
    """For the end of a window without one more gradient: move by what momentum holds."""
    zero = torch.zeros_like(seen, dtype=dtype)
    none = torch.zeros_like(seen)
    return Factors(zero, None, zero, zero, zero, none, none, zero + 1, seen)


def record_moments(
    found: Moments, factors: Factors, options: Options, grad_scale: Tensor | None
) -> Tensor:
    """Rows for the records: statistics of the unscaled gradient, 1 for a slice left out by an inf.

    Returns:
        float64 [slices, 3], see `records.RECORD`; without the last column where it would be zeros.
    """
    mean, std = found.mean, (found.m2 / found.n).sqrt()
    if isinstance(found.exponent, Tensor):
        down = power_of_two(-found.exponent)
        mean, std = mean * down, std * down
    if grad_scale is not None:
        scale = grad_scale.to(mean.device).double().reshape(())
        mean, std = mean / scale, std / scale
    columns = {MEAN: mean, STD: std}
    if factors.valid is not None and options.nonfinite != "propagate":
        columns[SKIPPED] = (~factors.valid).double()
    return torch.cat([columns[i] for i in range(len(columns))], 1)

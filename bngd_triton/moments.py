"""Mean and spread of slices in float64, and the factors that normalise them.

The eager twin of ``kernels/moments.py``: the same factors from the same statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .members import MEAN, SKIPPED, STD, Member, Pass
from .options import Options

# sigma below this multiple of |mean| is rounding, not spread: float64 statistics of equal values
# are off by a few units of 2**-53, and the least real spread of 2**31 float32 values is 2**-40
UNIFORM = 8 * 2.0**-53

# elements of a block on the CPU: its temporaries fit a core's L2, and torch starts threads from
# 32768 elements on, whose barriers cost more than the work where other processes want the cores
BLOCK = 2**15 - 1


class Moments(NamedTuple):
    """Statistics of slices: float64 tensors that broadcast against the gradient.

    `mean` and `m2` (the sum of squared deviations) belong to the gradient times
    ``2**exponent``, which keeps squares of float64 gradients in range; it is 0 for narrower ones.
    """

    n: int
    mean: Tensor
    m2: Tensor
    exponent: Tensor | int


class Fold(NamedTuple):
    """What normalises a slice: ``ghat = ((g * up * more) - high - low) * inverse``.

    ``up * more`` is the power of two that brings ``rms(v) + eps`` into [1, 2), in two factors
    since one can overflow; ``high + low`` is the centred share of the mean in those units.
    """

    up: Tensor
    more: Tensor
    high: Tensor
    low: Tensor
    inverse: Tensor
    uniform: Tensor
    finite: Tensor
    # whether ghat enters momentum; the weight of momentum's past; whether the slice moves
    valid: Tensor
    beta: Tensor | float
    moves: Tensor

    def of_block(self, block: slice | EllipsisType) -> Fold:
        """The factors of the slices in one of the gradient's `blocks`."""
        return Fold(*(_of_block(field, block) for field in self))


def slice_dims(ndim: int, granularity: str) -> tuple[int, ...]:
    """The dimensions that one slice spans: all of them, or all but the first for rows."""
    return tuple(range(1 if granularity == "row" and ndim >= 2 else 0, ndim))


def blocks(tensor: Tensor) -> list[slice | EllipsisType]:
    """Index ranges of dimension 0 that are worked on one after the other.

    On the CPU a block's temporaries stay in its caches, which is several times faster; a GPU takes
    the whole tensor, since every block would cost launches.
    """
    size = tensor.shape[0] if tensor.dim() else 1
    step = max(1, BLOCK * size // max(1, tensor.numel()))
    if tensor.device.type != "cpu" or step >= size:
        return [...]
    return [slice(start, start + step) for start in range(0, size, step)]


def moments(grad: Tensor, dims: tuple[int, ...], exponent: Tensor | int | None = None) -> Moments:
    """Count, mean and sum of squared deviations over `dims`, kept as dimensions of size 1."""
    if exponent is None:
        exponent = exponent_of(grad.abs().amax(dims, keepdim=True)) if _is_wide(grad) else 0
    parts = [
        _block_moments(grad[block], dims, _of_block(exponent, block)) for block in blocks(grad)
    ]
    if len(parts) == 1:
        return parts[0]
    means, m2 = [part.mean for part in parts], [part.m2 for part in parts]
    if 0 in dims:
        return _merge([part.n for part in parts], torch.stack(means), torch.stack(m2), exponent)
    return Moments(parts[0].n, torch.cat(means), torch.cat(m2), exponent)


def _block_moments(grad: Tensor, dims: tuple[int, ...], exponent: Tensor | int) -> Moments:
    """Deviations are taken from the slice's first entry, then from their own mean.

    So equal values have none, and a mean far above the spread costs no digits.
    """
    values = grad.double()
    if isinstance(exponent, Tensor):
        values = values * power_of_two(exponent)
    first = values[tuple(slice(0, 1) if d in dims else slice(None) for d in range(grad.dim()))]
    deviation = values - first
    shift = deviation.mean(dims, keepdim=True)
    deviation -= shift
    m2 = deviation.square_().sum(dims, keepdim=True)
    return Moments(grad.numel() // m2.numel(), first + shift, m2, exponent)


def _merge(sizes: list[int], means: Tensor, m2: Tensor, exponent: Tensor | int) -> Moments:
    """Moments of the union of the runs stacked along dimension 0 (Chan, Golub and LeVeque)."""
    n = torch.tensor(sizes, dtype=torch.float64, device=m2.device)
    n = n.view(-1, *[1] * (m2.dim() - 1))
    total = sum(sizes)
    # relative to the first mean, so that equal means merge without rounding
    away = means - means[0]
    shift = (n * away).sum(0) / total
    return Moments(total, means[0] + shift, (m2 + n * (away - shift).square()).sum(0), exponent)


def global_moments(grads: Sequence[Tensor]) -> Moments | None:
    """The moments of the concatenation of `grads`, as 0-dim tensors; None without entries."""
    filled = [grad for grad in grads if grad.numel()]
    if not filled:
        return None
    exponent: Tensor | int = 0
    if any(_is_wide(grad) for grad in filled):
        exponent = exponent_of(torch.stack([grad.double().abs().amax() for grad in filled]).amax())
    parts = [moments(grad, slice_dims(grad.dim(), "global"), exponent) for grad in filled]
    means = torch.stack([part.mean.reshape(()) for part in parts])
    m2 = torch.stack([part.m2.reshape(()) for part in parts])
    return _merge([part.n for part in parts], means, m2, exponent)


def fold_moments(
    found: Moments,
    options: Options,
    centering: float,
    dtype: torch.dtype,
    grad_scale: Tensor | None = None,
) -> Fold:
    """Statistics to the factors that `reference.normalize` applies, rounded once to `dtype`."""
    mean, variance = found.mean, found.m2 / found.n
    uniform = variance.sqrt() <= UNIFORM * mean.abs()
    removed = torch.full_like(mean, centering).masked_fill(uniform, 0.0)
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
    more = (total - up).clamp(-limit, limit)
    scale = power_of_two(exponent.clamp(-1022, 1022))
    center = removed * mean * scale
    high = center.to(dtype)
    sign = -1.0 if options.maximize else 1.0
    inverse = torch.where(zero, 0.0, sign / (divisor * scale))
    finite = torch.isfinite(mean) & torch.isfinite(found.m2)
    return Fold(
        up=power_of_two(up).to(dtype),
        more=power_of_two(more).to(dtype),
        high=high,
        low=(center - high.double()).to(dtype),
        inverse=inverse.to(dtype),
        uniform=uniform,
        finite=finite,
        valid=finite,
        beta=options.momentum,
        moves=finite,
    )


def admit(fold: Fold, member: Member, options: Options, this: Pass) -> Fold:
    """Which slices take part: the finite ones, and those that moved before in their window."""
    valid = fold.finite
    if options.nonfinite == "propagate":
        valid = torch.ones_like(valid)
    if this.found_inf is not None:
        # a sum over devices, so anything but 0
        valid = valid & (this.found_inf.to(valid.device).reshape(()) == 0)
    if member.window is None:
        return fold._replace(valid=valid, moves=valid)
    seen = member.window.view(valid.shape) != 0
    beta = torch.ones_like(fold.inverse).masked_fill(valid & ~seen, options.momentum)
    seen = seen | valid
    member.window.copy_((seen & (not this.closing[member.group])).view(-1))
    return fold._replace(valid=valid, beta=beta, moves=seen)


def closing_fold(member: Member, window: Tensor | None) -> Fold:
    """For the end of a window without one more gradient: move by what momentum holds."""
    assert window is not None, "a member without gradient is there to close its window"
    wide = torch.promote_types(member.param.dtype, torch.float32)
    rows = window.numel()
    seen = window.view([rows] + [1] * (member.param.dim() - 1) if rows > 1 else []) != 0
    zero = torch.zeros((), dtype=wide, device=member.param.device)
    none = torch.zeros_like(seen)
    return Fold(zero, zero, zero, zero, zero, none, none, none, 1.0, seen)


def record_moments(
    record: Tensor, found: Moments, fold: Fold, options: Options, grad_scale: Tensor | None
) -> None:
    """Note the statistics of the unscaled gradient, and which slices an inf or a NaN left out."""
    mean, std = found.mean, (found.m2 / found.n).sqrt()
    if isinstance(found.exponent, Tensor):
        down = power_of_two(-found.exponent)
        mean, std = mean * down, std * down
    if grad_scale is not None:
        scale = grad_scale.to(mean.device).double().reshape(())
        mean, std = mean / scale, std / scale
    record[:, MEAN] = mean.reshape(-1)
    record[:, STD] = std.reshape(-1)
    if options.nonfinite != "propagate":
        record[:, SKIPPED] += (~fold.finite).reshape(-1)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` in float64, exact; `exponent` is int64 in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _of_block(field: Any, block: slice | EllipsisType) -> Any:
    """The part of a per-slice tensor that belongs to a block; one slice belongs to all."""
    per_slice = isinstance(field, Tensor) and field.dim() > 0 and field.shape[0] > 1
    return field[block] if per_slice else field


def exponent_of(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` near 1, bounded so that both ends stay in range."""
    return (-torch.frexp(largest.double()).exponent.long()).clamp(-1000, 1000)


def _is_wide(grad: Tensor) -> bool:
    """Whether squares of the values can leave float64's range."""
    return grad.dtype is torch.float64

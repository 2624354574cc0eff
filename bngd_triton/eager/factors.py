"""From statistics to the factors that normalise slices, and which slices take part.

The eager twin of ``kernels/device/moments.py`` and ``publish.py`` there: the same factors from the
same statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from ..records import MEAN, SKIPPED, STD, StepInputs, StepTensor
from .moments import Moments, global_moments, moments, of_block, power_of_two, slice_dims

# sigma below this multiple of |mean| is rounding, not spread: float64 statistics of equal values
# are off by a few units of 2**-53, and the least real spread of 2**31 float32 values is 2**-40
UNIFORM = 8 * 2.0**-53


class Factors(NamedTuple):
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

    def of_block(self, block: slice | EllipsisType) -> Factors:
        """The factors of the slices in one of the gradient's `blocks`."""
        return Factors(*(of_block(field, block) for field in self))


def factors_of(
    members: Sequence[StepTensor],
    options: Options,
    inputs: StepInputs,
    given: Sequence[Moments] | None = None,
) -> Iterator[Factors | None]:
    """The `Factors` of each gradient in turn; None for a tensor without entries.

    Records statistics and windows on the way.
    """
    shared = None
    if options.granularity == "global" and given is None:
        shared = global_moments([member.grad for member in members if member.grad is not None])
    # a global slice is admitted and recorded once, with the first of its tensors, which keeps the
    # window of all
    leader: Factors | None = None
    for index, member in enumerate(members):
        empty = member.param.numel() == 0
        if empty and given is None:
            yield None
            continue
        if member.grad is None:
            keeper = members[0] if options.granularity == "global" else member
            yield closing_factors(member, keeper.window)
            continue
        dim = member.grad.dim()
        if given is not None:
            found = given[index]
        else:
            found = shared or moments(member.grad, slice_dims(dim, options.granularity))
        wide = torch.promote_types(
            torch.promote_types(member.param.dtype, member.grad.dtype), torch.float32
        )
        centering = options.centering if options.centres(dim) else 0.0
        fold = factors_from(found, options, centering, wide, inputs.grad_scale)
        if leader is None:
            admitted = admit(fold, member, options, inputs)
            record_moments(member.record, found, fold, options, inputs.grad_scale)
            leader = admitted if shared else None
        else:
            admitted = fold._replace(valid=leader.valid, beta=leader.beta, moves=leader.moves)
        yield None if empty else admitted


def factors_from(
    found: Moments,
    options: Options,
    centering: float,
    dtype: torch.dtype,
    grad_scale: Tensor | None = None,
) -> Factors:
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
    return Factors(
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


def admit(fold: Factors, member: StepTensor, options: Options, inputs: StepInputs) -> Factors:
    """Which slices take part: the finite ones, and those that moved before in their window."""
    valid = fold.finite
    if options.nonfinite == "propagate":
        valid = torch.ones_like(valid)
    if inputs.found_inf is not None:
        # a sum over devices, so anything but 0
        valid = valid & (inputs.found_inf.to(valid.device).reshape(()) == 0)
    if member.window is None:
        return fold._replace(valid=valid, moves=valid)
    seen = member.window.view(valid.shape) != 0
    # the first valid micro-batch; where none was, nothing moves
    beta = torch.ones_like(fold.inverse).masked_fill(~seen, options.momentum)
    seen = seen | valid
    member.window.copy_((seen & (not inputs.closing[member.group])).view(-1))
    return fold._replace(valid=valid, beta=beta, moves=seen)


def closing_factors(member: StepTensor, window: Tensor | None) -> Factors:
    """For the end of a window without one more gradient: move by what momentum holds."""
    assert window is not None, "a member without gradient is there to close its window"
    wide = torch.promote_types(member.param.dtype, torch.float32)
    rows = window.numel()
    seen = window.view([rows] + [1] * (member.param.dim() - 1) if rows > 1 else []) != 0
    zero = torch.zeros((), dtype=wide, device=member.param.device)
    none = torch.zeros_like(seen)
    return Factors(zero, zero, zero, zero, zero, none, none, none, 1.0, seen)


def record_moments(
    record: Tensor, found: Moments, fold: Factors, options: Options, grad_scale: Tensor | None
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
        # out of place: a tensor subclass may carry each operation out more than once
        record[:, SKIPPED] = record[:, SKIPPED] + (~fold.finite).reshape(-1)

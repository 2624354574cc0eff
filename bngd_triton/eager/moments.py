"""Mean and spread of slices in float64."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
        # squares of narrower values stay in float64's range
        wide = grad.dtype is torch.float64
        exponent = exponent_of(grad.abs().amax(dims, keepdim=True)) if wide else 0
    parts = [_block_moments(grad[block], dims, of_block(exponent, block)) for block in blocks(grad)]
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
    """Moments of the union of the runs stacked along dimension 0."""
    n = torch.tensor(sizes, dtype=torch.float64, device=m2.device)
    n = n.view(-1, *[1] * (m2.dim() - 1))
    return Moments(sum(sizes), *pooled(n, means, m2, means[0]), exponent)


def pooled(n: Tensor, means: Tensor, m2: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squares of unions along dimension 0 (Chan, Golub and LeVeque).

    Relative to the mean of a part with entries, `base`, so that equal means merge without rounding.
    Parts without entries have any finite mean, and 0.
    """
    away = means - base
    shift = (n * away).sum(0) / n.sum(0).clamp_min(1.0)
    return base + shift, (m2 + n * (away - shift).square()).sum(0)


def global_moments(grads: Sequence[Tensor]) -> Moments | None:
    """The moments of the concatenation of `grads`, as 0-dim tensors; None without entries."""
    filled = [grad for grad in grads if grad.numel()]
    if not filled:
        return None
    exponent: Tensor | int = 0
    if any(grad.dtype is torch.float64 for grad in filled):
        exponent = exponent_of(torch.stack([grad.double().abs().amax() for grad in filled]).amax())
    parts = [moments(grad, slice_dims(grad.dim(), "global"), exponent) for grad in filled]
    means = torch.stack([part.mean.reshape(()) for part in parts])
    m2 = torch.stack([part.m2.reshape(()) for part in parts])
    return _merge([part.n for part in parts], means, m2, exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` in float64, exact; `exponent` is int64 in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def of_block(field: Any, block: slice | EllipsisType) -> Any:
    """The part of a per-slice tensor that belongs to a block; one slice belongs to all."""
    per_slice = isinstance(field, Tensor) and field.dim() > 0 and field.shape[0] > 1
    return field[block] if per_slice else field


def exponent_of(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` near 1, bounded so that both ends stay in range."""
    return (-torch.frexp(largest.double()).exponent.long()).clamp(-1000, 1000)

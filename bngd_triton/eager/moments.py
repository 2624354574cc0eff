"""Mean and spread of slices in float64.

Values are matrices here: a row is a slice, whatever shape and order in memory they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .scratch import Scratch, cut, entries_of_a_block

# entries of a slice whose deviations are summed at once: fewer than those from which on torch sums
# one row by several threads, whose number would show in the bits
PIECE = 2**15 - 1


class Moments(NamedTuple):
    """Statistics of slices: float64 [slices, 1].

    `mean` and `m2` (the sum of squared deviations) belong to the gradient times
    ``2**exponent``, which keeps squares of float64 gradients in range; it is 0 for narrower ones.
    `n` is the number of a slice's entries.
    """

    n: int | Tensor
    mean: Tensor
    m2: Tensor
    exponent: Tensor | int


def moments(
    values: Tensor, exponent: Tensor | int | None = None, scratch: Scratch | None = None
) -> Moments:
    """Count, mean and sum of squared deviations of each row.

    Args:
        values: [slices, entries] of any float dtype, not empty.
        exponent: of each slice, int64 [slices, 1]; None finds it where the dtype needs one.
        scratch: room for a block of temporaries.
    """
    scratch = scratch or Scratch()
    rows, columns = values.shape
    if exponent is None:
        # squares of narrower values stay in float64's range
        exponent = exponent_of(largest(values)) if values.dtype is torch.float64 else 0
    on_cpu = values.device.type == "cpu"
    if columns > PIECE and on_cpu:
        exponents: list[Tensor | int] = [exponent] * rows
        if isinstance(exponent, Tensor):
            exponents = list(exponent.expand(rows, 1).split_with_sizes([1] * rows))
        found = [_long_row(*pair, scratch) for pair in zip(values, exponents)]
        mean, m2 = (torch.cat(column) for column in zip(*found))
        return Moments(columns, mean, m2, exponent)
    blocks = cut(values, entries_of_a_block(values))
    scales: list[Tensor | None] = [None] * len(blocks)
    if isinstance(exponent, Tensor):
        of_rows = power_of_two(exponent).expand(rows, 1)
        scales = list(of_rows.split_with_sizes(list(map(len, blocks))))
    parts = [_block_moments(*pair, scratch) for pair in zip(blocks, scales)]
    mean, m2 = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts))
    return Moments(columns, mean, m2, exponent)


def _long_row(row: Tensor, exponent: Tensor | int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of a long slice, by those of its pieces."""
    whole = row.numel() // PIECE * PIECE
    pieces = [row[:whole].view(-1, PIECE), row[whole:].view(1, -1)]
    parts = [moments(piece, exponent, scratch) for piece in pieces if piece.numel()]
    whole_row = united(parts)
    return whole_row.mean, whole_row.m2


def _block_moments(block: Tensor, scale: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each row, by sums of deviations from its first entry.

    So equal values have none, and a mean far above the spread costs no digits: the first entry is
    at most ``sqrt(n - 1)`` spreads from the mean, so that the correction takes 15 bits of 53.
    """
    deviation = scratch.copy("deviation", block, torch.float64)
    if scale is not None:
        deviation = deviation.mul_(scale)
    n = block.shape[1]
    first = torch.clone(deviation[:, :1])
    deviation = deviation.sub_(first)
    shift = deviation.sum(1, keepdim=True).div_(n)
    squares = deviation.mul_(deviation).sum(1, keepdim=True)
    # rounding may leave less than nothing
    return first.add_(shift), squares.sub_(shift.mul_(shift).mul_(n)).clamp_min_(0.0)


def pooled(n: Tensor, means: Tensor, m2: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squares of unions along dimension 0 (Chan, Golub and LeVeque).

    Relative to the mean of a part with entries, `base`, so that equal means merge without rounding.
    Parts without entries have any finite mean, and 0.
    """
    away = means - base
    shift = (n * away).sum(0) / n.sum(0).clamp_min(1.0)
    return base + shift, (m2 + n * (away - shift).square()).sum(0)


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of all the slices of several, one after the other."""
    if len(parts) == 1:
        return parts[0]
    n = torch.cat([torch.full_like(part.mean, 1.0) * part.n for part in parts])
    mean, m2 = torch.cat([part.mean for part in parts]), torch.cat([part.m2 for part in parts])
    if not any(isinstance(part.exponent, Tensor) for part in parts):
        return Moments(n, mean, m2, 0)
    zero = torch.zeros_like(mean, dtype=torch.int64).split([len(part.mean) for part in parts])
    return Moments(n, mean, m2, torch.cat([z + part.exponent for z, part in zip(zero, parts)]))


def united(parts: Sequence[Moments]) -> Moments:
    """The moments of one slice that is made of all; with one exponent, if any."""
    whole = joined(parts)
    n = torch.full_like(whole.mean, 1.0) * whole.n
    mean, m2 = pooled(n, whole.mean, whole.m2, whole.mean[:1])
    exponent = whole.exponent[:1] if isinstance(whole.exponent, Tensor) else 0
    return Moments(n.sum(0, keepdim=True), mean.view(1, 1), m2.view(1, 1), exponent)


def largest(values: Tensor) -> Tensor:
    """The largest magnitude of each row: float64 [slices, 1]; NaN where one is."""
    high, low = values.amax(1, keepdim=True), values.amin(1, keepdim=True)
    return torch.maximum(high.double(), -low.double())


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` in float64, exact; `exponent` is int64 in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def exponent_of(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` near 1, bounded so that both ends stay in range."""
    return (-torch.frexp(largest.double()).exponent.long()).clamp(-1000, 1000)

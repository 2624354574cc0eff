"""Tables of slice statistics, and their merge over processes.

A table is float64 [slices, MOMENTS_COLUMNS], see `kernels.tables`. Mean and sum of squares are not
finite where an entry is not. The slices of a float64 gradient, whose squares can leave float64's
range, are kept in units of the power of two that brings their largest magnitude near 1: least and
greatest tell which, so it needs no column.

`Exchange` packs the tables of all tensors into one, gathers it over the process groups over which
slices are spread, and merges in rank order, so that every rank computes the same bits. Nothing
here reads a device tensor on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..eager.moments import Moments, exponent_of, moments, pooled, power_of_two
from ..kernels.tables import MOMENT_GREATEST, MOMENT_LEAST, MOMENTS_COLUMNS
from ..records import slices_of

# bytes of gathered tables that a rank holds before slices are dealt out to ranks instead: the 291
# tensors of an 8B transformer pass it at 2883 ranks
GATHERED = 2**25

# torch 2.13 renamed it, and warns of the old name
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Share(NamedTuple):
    """What one rank holds of one tensor's slices; set by shapes, dtypes and placements alone.

    Attributes:
        slices: rows of this rank's table: the slices of which it may hold a part.
        entries: entries of one whole slice, over all ranks.
        groups: the process groups over which each slice is spread, innermost first. Their ranks
            hold parts of the same slices, in the same order.
        wide: whether the gradient is float64, see the module.
        device: where the table is.
        union: tensors with the same number here are one slice together (``"global"``), each with
            a table of one row. None for slices of its own.
    """

    slices: int
    entries: int
    groups: tuple[ProcessGroup, ...]
    wide: bool
    device: torch.device
    union: int | None = None


@torch.no_grad()
def local_table(grad: Tensor, granularity: str) -> Tensor:
    """The statistics of the entries at hand.

    Args:
        grad: a plain tensor: this rank's part of a gradient. It may be empty.
        granularity: ``"tensor"``, ``"row"`` or ``"global"``; the last as ``"tensor"``.

    Returns:
        float64 [slices, MOMENTS_COLUMNS] on the device of `grad`.
    """
    slices = slices_of(grad.shape, granularity)
    if grad.numel() == 0:
        table = grad.new_zeros((slices, MOMENTS_COLUMNS), dtype=torch.float64)
        table[:, MOMENT_LEAST], table[:, MOMENT_GREATEST] = float("inf"), float("-inf")
        return table
    values = grad.reshape(slices, -1)
    least, greatest = (one(1, keepdim=True).double() for one in (values.amin, values.amax))
    wide = grad.dtype is torch.float64
    found = moments(values, _exponent_within(least, greatest) if wide else 0)
    entries = torch.full_like(found.mean, values.shape[1])
    return torch.cat([entries, found.mean, found.m2, least, greatest], 1)


def merge(parts: Tensor, wide: Tensor | None = None) -> Tensor:
    """The statistics of unions, summed in the order of `parts`.

    Args:
        parts: float64 [parts, slices, MOMENTS_COLUMNS]; a row without entries is ignored,
            whatever it holds.
        wide: which parts are in units of their own power of two: bool, broadcasts against
            [parts, slices]. A union with such a part is so too. None: no part is.

    Returns:
        float64 [slices, MOMENTS_COLUMNS].
    """
    n, mean, m2, least, greatest = parts.unbind(-1)
    filled = n > 0
    mean, m2 = torch.where(filled, mean, 0.0), torch.where(filled, m2, 0.0)
    least = torch.where(filled, least, float("inf")).amin(0)
    greatest = torch.where(filled, greatest, float("-inf")).amax(0)
    if wide is not None:
        wide = wide.expand(n.shape)
        own = torch.where(
            wide, _exponent_within(parts[..., MOMENT_LEAST], parts[..., MOMENT_GREATEST]), 0
        )
        common = torch.where(wide.any(0), _exponent_within(least, greatest), 0)
        # beyond the bounds a part is nothing beside the largest one
        mean = mean * power_of_two((common - own).clamp(-1022, 1022))
        m2 = m2 * power_of_two((2 * (common - own)).clamp(-1022, 1022))
    first = mean.gather(0, filled.byte().argmax(0, keepdim=True))[0]
    mean, m2 = pooled(n, mean, m2, first)
    return torch.stack([n.sum(0), mean, m2, least, greatest], -1)


def _exponent_within(least: Tensor, greatest: Tensor) -> Tensor:
    """The power of two that brings the larger magnitude of the two near 1."""
    return exponent_of(torch.maximum(least.abs(), greatest.abs()))


def _wide_rows(shares: Sequence[Share]) -> Tensor | None:
    """Which rows of the shares' packed tables are wide; None if none is."""
    if not any(share.wide for share in shares):
        return None
    return torch.cat(
        [torch.full((s.slices,), s.wide, dtype=torch.bool, device=s.device) for s in shares]
    )


class _Stage(NamedTuple):
    """One collective: rows of the packed table that travel over one process group."""

    group: ProcessGroup
    # None where it is all rows
    rows: Tensor | None
    # of those rows; None where no row is
    wide: Tensor | None

    def run(self, table: Tensor) -> Tensor:
        """The packed table, merged over the group."""
        part = table if self.rows is None else table.index_select(0, self.rows)
        ranks = dist.get_world_size(self.group)
        if ranks * part.nbytes <= GATHERED:
            merged = self._gather(part, ranks)
        else:
            merged = self._deal(part, ranks)
        return merged if self.rows is None else table.index_copy(0, self.rows, merged)

    def _gather(self, part: Tensor, ranks: int) -> Tensor:
        """Every rank merges all slices: one message, ``ranks`` tables in memory."""
        parts = part.new_empty((ranks * part.shape[0], MOMENTS_COLUMNS))
        all_gather(parts, part, group=self.group)
        return merge(parts.view(ranks, *part.shape), self.wide)

    def _deal(self, part: Tensor, ranks: int) -> Tensor:
        """Every rank merges its share of the slices: two messages, four tables in memory."""
        slices = part.shape[0]
        each = -(-slices // ranks)
        padded = part.new_zeros((ranks * each, MOMENTS_COLUMNS))
        padded[:slices] = part
        dealt = torch.empty_like(padded)
        dist.all_to_all_single(dealt, padded, group=self.group)
        wide = self.wide
        if wide is not None:
            first = dist.get_rank(self.group) * each
            wide = torch.cat([wide, wide.new_zeros(ranks * each - slices)])[first : first + each]
        merged = merge(dealt.view(ranks, each, MOMENTS_COLUMNS), wide)
        all_gather(padded, merged, group=self.group)
        return padded[:slices]


class Exchange:
    """The merge of all tensors' statistics over processes; laid out once, run every step.

    Each process group over which a slice is spread costs one collective, whatever the number of
    tensors: one for a mesh of one dimension, one per cutting dimension of a larger mesh. Meshes
    sliced from one root share their groups. Beyond `GATHERED` bytes it is two.

    Args:
        shares: one per tensor, the same tensors in the same order on every rank of a mesh; all
            on one device.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = tuple(shares)
        self._unions: dict[int, list[int]] = {}
        for i, share in enumerate(shares):
            if share.union is not None:
                self._unions.setdefault(share.union, []).append(i)
        self._stages: list[_Stage] = []
        # by name: several meshes may hold one group as different objects
        groups = {group.group_name: group for share in shares for group in share.groups}
        for name, group in groups.items():
            taken, rows, start = [], [], 0
            for share in shares:
                if any(name == other.group_name for other in share.groups):
                    taken.append(share)
                    end = start + share.slices
                    rows.append(torch.arange(start, end, dtype=torch.int64, device=share.device))
                start += share.slices
            if any(share.slices for share in taken):
                some = torch.cat(rows) if len(taken) < len(shares) else None
                self._stages.append(_Stage(group, some, _wide_rows(taken)))

    @torch.no_grad()
    def run(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Merge this rank's tables with those of the other ranks.

        Args:
            tables: float64 [slices, MOMENTS_COLUMNS] for each share, see the module.

        Returns:
            The tables of the whole slices, in the order of the shares; for those of a union the
            same table.
        """
        merged = list(tables)
        if self._stages:
            packed = torch.cat(merged)
            for stage in self._stages:
                packed = stage.run(packed)
            merged = list(packed.split([share.slices for share in self.shares]))
        for members in self._unions.values():
            wide = _wide_rows([self.shares[i] for i in members])
            parts = torch.stack([merged[i] for i in members])
            whole = merge(parts, None if wide is None else wide.unsqueeze(1))
            for i in members:
                merged[i] = whole
        return merged

    def moments(self, i: int, table: Tensor) -> Moments:
        """What `run` found for share `i`: [slices, 1]."""
        share = self.shares[i]
        members = [i] if share.union is None else self._unions[share.union]
        _, mean, m2, least, greatest = table.split(1, 1)
        wide = any(self.shares[j].wide for j in members)
        exponent = _exponent_within(least, greatest) if wide else 0
        return Moments(sum(self.shares[j].entries for j in members), mean, m2, exponent)

"""Steps of tensors whose slices lie on several processes.

First every rank measures what it holds, one exchange merges all slices' statistics, then every
rank moves its part by those of the whole: with the kernels or with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .checks import nonfinite_somewhere
from .exchange import Exchange, Share, local_table, merge, moments_of
from .kernels.prepared import FusedStep
from .members import Member, Pass, new_record
from .options import Options


class Part(NamedTuple):
    """One rank's part of a tensor: local tensors, and what they are a part of."""

    member: Member
    share: Share
    fused: bool
    name: str


class Spread:
    """What a rank keeps from one step of spread tensors to the next."""

    def __init__(self) -> None:
        self._exchange: Exchange | None = None
        self._prepared: FusedStep | None = None
        self._parts: list[Part] = []
        self._tables: list[Tensor] = []

    def measure(self, parts: Sequence[Part], options: list[Options], this: Pass) -> None:
        """Find the statistics of the whole slices.

        Args:
            parts: the same tensors in the same order on every rank; all on one device.
            options: of every group.
            this: what is new in this step.

        Raises:
            FloatingPointError: a non-finite slice with ``nonfinite="raise"``, on every rank.
        """
        self._parts = _recording_once(parts, options)
        kernels = [part.member for part in self._parts if _by_kernels(part)]
        measured: list[Tensor] = []
        if kernels:
            self._prepared = FusedStep.fitting(self._prepared, kernels, options, apart=True)
            measured = self._prepared.measure(kernels, options, this)
        tables = []
        for part in self._parts:
            if _by_kernels(part):
                tables.append(measured.pop(0))
            else:
                assert part.member.grad is not None
                tables.append(local_table(part.member.grad, options[part.member.group].granularity))
        shares = tuple(part.share for part in self._parts)
        if self._exchange is None or self._exchange.shares != shares:
            self._exchange = Exchange(shares)
        self._tables = self._together(self._exchange.run(tables), options)
        if this.found_inf is None:
            self._refuse_nonfinite(options)

    def _together(self, tables: list[Tensor], options: list[Options]) -> list[Tensor]:
        """One table for all tensors of a global group."""
        for index, one in enumerate(options):
            here = [i for i, part in enumerate(self._parts) if part.member.group == index]
            if one.granularity != "global" or not here:
                continue
            wide = torch.tensor([[self._parts[i].share.wide] for i in here])
            flags = wide.to(tables[here[0]].device) if bool(wide.any()) else None
            whole = merge(torch.stack([tables[i] for i in here]), flags)
            for i in here:
                tables[i] = whole
        return tables

    def _refuse_nonfinite(self, options: list[Options]) -> None:
        for part, table in zip(self._parts, self._tables):
            if options[part.member.group].nonfinite != "raise":
                continue
            if not bool(table[:, 1:3].isfinite().all()):
                raise nonfinite_somewhere(part.name)

    def move(self, options: list[Options], this: Pass) -> None:
        """Move the parts by the statistics that were found."""
        kernels = [t for part, t in zip(self._parts, self._tables) if _by_kernels(part)]
        if kernels and self._prepared is not None:
            self._prepared.move(kernels, this)
        for index, one in enumerate(options):
            rest = [
                (part, table)
                for part, table in zip(self._parts, self._tables)
                if part.member.group == index and not _by_kernels(part)
            ]
            shares = [part.share for part in self._parts if part.member.group == index]
            together = one.granularity == "global"
            found = [
                moments_of(
                    table,
                    sum(share.entries for share in shares) if together else part.share.entries,
                    part.share.ndim,
                    wide=any(share.wide for share in shares) if together else part.share.wide,
                )
                for part, table in rest
            ]
            reference.apply_([part.member for part, _ in rest], one, this, found)
        self._parts, self._tables = [], []


def _by_kernels(part: Part) -> bool:
    return part.fused and part.member.param.numel() > 0


def _recording_once(parts: Sequence[Part], options: list[Options]) -> list[Part]:
    """A global group shares one record: only its first tensor may write to it."""
    seen: set[int] = set()
    found = []
    for part in parts:
        member = part.member
        if options[member.group].granularity == "global":
            if member.group in seen:
                spare = new_record(1, member.param.device)
                part = part._replace(member=member._replace(record=spare))
            seen.add(member.group)
        found.append(part)
    return found

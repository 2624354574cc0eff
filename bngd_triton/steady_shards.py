"""Recognise a repeated step of parameters of which other processes hold parts.

What is asked is what `Steady` asks, of the parts at hand, and that tensors are placed as they were.
Ranks need not agree: a step that is recognised and one that is laid out anew exchange the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.plan import capturing
from .members import Member, Pass
from .memory import is_sharded, local
from .options import OptionsReader
from .spread import Spread, by_kernels
from .steady import Lot, Steady


def lots_of(spreads: Sequence[Spread], hollow: Sequence[tuple[Tensor, Member]]) -> Iterator[Lot]:
    """The lots of a step that was measured; what has no entries here comes last."""
    empty = list(hollow)
    for spread in spreads:
        parts = spread.parts
        yield Lot(spread.prepared, [(p.param, p.member) for p in parts if by_kernels(p)], spread)
        empty += [(part.param, part.member) for part in parts if not by_kernels(part)]
    yield Lot(None, empty)


class SteadyShards(Steady):
    """As `Steady`; `moved` are DTensors, or some of them are."""

    def __init__(
        self, optimizer: Any, lots: Sequence[Lot], reader: OptionsReader, this: Pass
    ) -> None:
        super().__init__(optimizer, lots, reader, this)
        # they come anew from every backward
        self.witness = None
        self.scaled = this.found_inf is not None
        self.placed = _placed(self.moved)
        # the lots hold gradients, which are not to be held
        self.runs = [(lot.prepared, lot.spread, len(lot.pairs)) for lot in lots]
        self.spreads = [lot.spread for lot in lots if lot.spread is not None]
        for spread in self.spreads:
            spread.keep()

    @torch.no_grad()
    def run(self, optimizer: Any, this: Pass) -> bool:
        """As `Steady.run`."""
        # whether all ranks learn what a GradScaler found was asked, or not, when this was made
        if (this.found_inf is not None) != self.scaled or capturing(self.device):
            return False
        return super().run(optimizer, this)

    def _grads(self) -> list[Any] | None:
        grads = super()._grads()
        if grads is None or any(grad is None for grad in grads):
            return None
        if not _placed(grads) == self.placed == _placed(self.moved):
            return None
        return list(map(local, grads))

    def _params(self) -> list[Tensor]:
        return list(map(local, self.moved))

    def _point_at(self, found: list[int]) -> bool:
        start = 0
        for prepared, _, count in self.runs:
            here = found[start : start + count]
            start += count
            if prepared is not None and not prepared.point_at(here):
                return False
        return True

    def _launch(self, this: Pass) -> None:
        options = self.reader.options
        # the other ranks wait for them
        for shared in self.spreads:
            shared.measure_again(options, this)
        for prepared, spread, _ in self.runs:
            if spread is None and prepared is not None:
                prepared.run_again(this)
        for shared in self.spreads:
            shared.move(options, this)


def _placed(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.shape, t.placements, t.device_mesh) if is_sharded(t) else t.shape for t in tensors]

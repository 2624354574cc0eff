"""Steps of tensors whose slices lie on several processes.

First every rank measures what it holds, one exchange merges all slices' statistics, then every
rank moves its part by those of the whole: with the kernels or with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..checks import nonfinite_somewhere
from ..eager.eager_step import apply_
from ..kernels.fused_step import FusedStep, gradient_of
from ..kernels.tables import MOMENT_M2, MOMENT_MEAN
from ..options import Options
from ..records import StepInputs, StepTensor, new_record
from .exchange import Exchange, Share, local_table


class Part(NamedTuple):
    """One rank's part of a tensor: local tensors, and what they are a part of."""

    param: Tensor
    member: StepTensor
    share: Share
    fused: bool
    name: str


class ShardedStep:
    """What a rank keeps from one step of sharded tensors to the next."""

    def __init__(self) -> None:
        self._exchange: Exchange | None = None
        self.prepared: FusedStep | None = None
        # of the last step, without gradients if it is over
        self.parts: list[Part] = []
        # of the step that is being made: the statistics of whole slices
        self._tables: list[Tensor] = []

    def measure(self, parts: Sequence[Part], options: list[Options], inputs: StepInputs) -> None:
        """Find the statistics of the whole slices.

        Args:
            parts: the same tensors in the same order on every rank; all on one device.
            options: of every group.
            inputs: what is new in this step.

        Raises:
            FloatingPointError: a non-finite slice with ``nonfinite="raise"``, on every rank.
        """
        self.parts = _united(parts, options)
        kernels = [part.member for part in self.parts if by_kernels(part)]
        measured: list[Tensor] = []
        if kernels:
            self.prepared = FusedStep.fitting([self.prepared], kernels, options, sharded=True)
            measured = self.prepared.measure(kernels, options, inputs)
        else:
            self.prepared = None
        shares = tuple(part.share for part in self.parts)
        if self._exchange is None or self._exchange.shares != shares:
            self._exchange = Exchange(shares)
        self._merge(measured, options)
        if inputs.found_inf is None:
            self._refuse_nonfinite(options)

    def let_go(self) -> None:
        """After `measure` and `update`: hold no gradients; the two can be repeated without."""
        self.parts = [_stripped(part) for part in self.parts]

    def measure_again(self, options: list[Options], inputs: StepInputs) -> None:
        """As the last `measure`, of the gradients that `prepared` points at.

        The kernels must have served all that has entries.

        Args:
            options: of every group; those last written to `prepared`.
            inputs: what is new in this step.
        """
        measured = [] if self.prepared is None else self.prepared.measure_again(inputs)
        self._merge(measured, options)

    def _merge(self, measured: list[Tensor], options: list[Options]) -> None:
        """Exchange the kernels' tables and those of the other parts."""
        ready = iter(measured)
        tables = [
            next(ready)
            if by_kernels(part)
            else local_table(gradient_of(part.member), options[part.member.group].granularity)
            for part in self.parts
        ]
        assert self._exchange is not None
        self._tables = self._exchange.run(tables)

    def _refuse_nonfinite(self, options: list[Options]) -> None:
        for part, table in zip(self.parts, self._tables):
            if options[part.member.group].nonfinite != "raise":
                continue
            if not bool(table[:, MOMENT_MEAN : MOMENT_M2 + 1].isfinite().all()):
                raise nonfinite_somewhere(part.name)

    def update(self, options: list[Options], inputs: StepInputs) -> None:
        """Update the parts by the statistics that were found."""
        kernels = [t for part, t in zip(self.parts, self._tables) if by_kernels(part)]
        if self.prepared is not None:
            self.prepared.update_by(kernels, inputs)
        assert self._exchange is not None
        for index, choice in enumerate(options):
            rest = {
                i: part.member
                for i, part in enumerate(self.parts)
                if part.member.group == index and not by_kernels(part)
            }
            found = [self._exchange.moments(i, self._tables[i]) for i in rest]
            apply_(list(rest.values()), choice, inputs, found)
        self._tables = []


def by_kernels(part: Part) -> bool:
    """Whether the kernels serve a part: not where it has no entries."""
    return part.fused and part.member.param.numel() > 0


def _stripped(part: Part) -> Part:
    """Without its gradient, which is not to be held; an empty one has a double of its own."""
    grad = None
    if part.member.grad is not None and not part.member.grad.numel():
        grad = part.member.grad.new_empty(part.member.grad.shape)
    return part._replace(member=part.member._replace(grad=grad))


def _united(parts: Sequence[Part], options: list[Options]) -> list[Part]:
    """A global group is one slice with one record: only its first tensor may write to that."""
    seen: set[int] = set()
    found = []
    for part in parts:
        member = part.member
        if options[member.group].granularity == "global":
            if member.group in seen:
                spare = new_record(1, member.param.device)
                part = part._replace(member=member._replace(record=spare))
            seen.add(member.group)
            part = part._replace(share=part.share._replace(union=member.group))
        found.append(part)
    return found

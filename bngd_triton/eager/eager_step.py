"""A step by the reference, laid out once: which tensors are worked on together, as matrices.

The eager twin of ``kernels/fused_step.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from ..records import RECORD, SKIPPED, StepInputs, StepTensor, rounds_stochastically
from .factors import (
    Factors,
    admit,
    closing_factors,
    factors_from,
    record_moments,
)
from .moments import Moments, exponent_of, joined, largest, moments, united
from .rounding import hash_positions, positions_of
from .runs import Run, arithmetic_of, kind_of, run_of
from .scratch import Scratch, cut
from .update import Block, Constants, update_


class EagerStep:
    """A step of one group's tensors, of which some may lack a gradient.

    Args:
        tensors: what is stepped.
        options: the group's.
        empty: whether tensors without entries are recorded: others hold parts of their slices.
    """

    def __init__(
        self, tensors: Sequence[StepTensor], options: Options, *, empty: bool = False
    ) -> None:
        kinds: dict[Any, list[int]] = {}
        for i, tensor in enumerate(tensors):
            if tensor.param.numel() or empty:
                kinds.setdefault(kind_of(i, tensor), []).append(i)
        # families share an arithmetic: where it is done, in which dtype, and of gradients or none
        self._families: dict[tuple[torch.device, torch.dtype, bool], list[Run]] = {}
        for places in kinds.values():
            tensor = tensors[places[0]]
            family = (tensor.param.device, arithmetic_of(tensor), tensor.grad is not None)
            self._families.setdefault(family, []).append(run_of(places, tensor, options))
        # where each family's statistics are noted
        self._notes: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def run(
        self,
        tensors: Sequence[StepTensor],
        grads: Sequence[Tensor | None],
        options: Options,
        inputs: StepInputs,
        given: Sequence[Moments] | None = None,
    ) -> None:
        """Move the parameters.

        Args:
            tensors: those that this was laid out for, but for their gradients.
            grads: of each, of the kind that it was laid out for.
            options: the group's now.
            inputs: what else is new in this step.
            given: statistics of each tensor's slices, where other processes hold parts of them.
        """
        scratch = Scratch()
        together = options.granularity == "global" and given is None
        shared = _shared(grads, scratch) if together else None
        # a global slice is admitted and recorded once, with the first of its tensors, which keeps
        # the window of all
        first: Factors | None = None
        for number, ((_, dtype, stepped), runs) in enumerate(self._families.items()):
            lists = [[tensors[i] for i in run.places] for run in runs]
            new = [[grads[i] for i in run.places] for run in runs]
            owners = list(tensors[:1]) if together else [t for several in lists for t in several]
            closing = inputs.closing[owners[0].group]
            seen = _seen(owners)
            if not stepped:
                assert seen is not None, "a tensor without gradient is there to close its window"
                factors = closing_factors(seen, dtype)
            else:
                found = shared or _found(runs, new, given, scratch)
                centering = options.centering if together else _centering(runs, lists, options)
                factors = factors_from(found, options, centering, dtype, inputs.grad_scale)
                if first is None:
                    noted = record_moments(found, factors, options, inputs.grad_scale)
                    self._note(number, owners, noted)
                    factors, seen = admit(factors, options, closing, inputs.found_inf, seen)
                    _keep(owners, seen)
                    first = factors if together else None
                else:
                    beta = None if first.beta is None else first.beta.to(dtype)
                    factors = factors._replace(valid=first.valid, beta=beta, moves=first.moves)
            _update(runs, lists, new, factors, options, inputs, scratch)

    def _note(self, family: int, owners: Sequence[StepTensor], rows: Tensor) -> None:
        """Fill in records, of which many share a storage: in one call for each."""
        if family not in self._notes:
            self._notes[family] = _homes([owner.record for owner in owners])
        parts = rows.split([len(places) for _, places in self._notes[family]])
        for (home, places), part in zip(self._notes[family], parts):
            columns = part.shape[1]
            if columns > SKIPPED:
                part[:, SKIPPED] += home.index_select(0, places)[:, SKIPPED]
            home[:, :columns].index_copy_(0, places, part)


def apply_(
    tensors: Sequence[StepTensor],
    options: Options,
    inputs: StepInputs,
    given: Sequence[Moments] | None = None,
) -> None:
    """`EagerStep.run` on what was checked before, under `torch.no_grad`, laid out for once."""
    step = EagerStep(tensors, options, empty=given is not None)
    step.run(tensors, [tensor.grad for tensor in tensors], options, inputs, given)


def _shared(grads: Sequence[Tensor | None], scratch: Scratch) -> Moments | None:
    """The statistics of the one slice that all gradients are together."""
    rows = [grad.reshape(1, -1) for grad in grads if grad is not None and grad.numel()]
    if not rows:
        return None
    exponent: Tensor | int = 0
    if any(row.dtype is torch.float64 for row in rows):
        exponent = exponent_of(torch.cat([largest(row) for row in rows]).amax(0, keepdim=True))
    return united([moments(row, exponent, scratch) for row in rows])


def _found(
    runs: Sequence[Run],
    grads: Sequence[list[Tensor | None]],
    given: Sequence[Moments] | None,
    scratch: Scratch,
) -> Moments:
    """The statistics of all slices, in the order of the runs."""
    if given is not None:
        return joined([given[i] for run in runs for i in run.places])
    return joined(
        [
            moments(run.matrix("grad", stack, scratch), None, scratch)
            for run, several in zip(runs, grads)
            for stack in run.stacks(several)
        ]
    )


def _centering(
    runs: Sequence[Run], lists: Sequence[Sequence[StepTensor]], options: Options
) -> float | Tensor:
    """Of each slice: vectors keep their mean unless asked; a number where all are alike."""
    shares = [
        options.centering if options.centres(tensors[0].param.dim()) else 0.0 for tensors in lists
    ]
    if len(set(shares)) == 1:
        return shares[0]
    device = lists[0][0].param.device
    return torch.cat(
        [
            torch.full((run.slices * len(run.places), 1), share, dtype=torch.float64, device=device)
            for run, share in zip(runs, shares)
        ]
    )


def _seen(owners: Sequence[StepTensor]) -> Tensor | None:
    """Which slices have had a valid micro-batch in this window: bool [slices, 1]."""
    windows = [owner.window for owner in owners if owner.window is not None]
    return torch.cat(windows).view(-1, 1) != 0 if windows else None


def _keep(owners: Sequence[StepTensor], seen: Tensor | None) -> None:
    windows = [owner.window for owner in owners if owner.window is not None]
    if seen is not None:
        for window, part in zip(windows, seen.view(-1).split(list(map(len, windows)))):
            window.copy_(part)


def _homes(records: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Runs of records that lie in one storage: all of it as a table, and their rows in it."""
    homes: list[tuple[Tensor, list[Tensor]]] = []
    last = None
    for record in records:
        storage = record.untyped_storage()
        first = record.storage_offset() // len(RECORD)
        if storage.data_ptr() != last:
            last = storage.data_ptr()
            rows = storage.nbytes() // (len(RECORD) * record.element_size())
            homes.append((record.as_strided((rows, len(RECORD)), (len(RECORD), 1), 0), []))
        homes[-1][1].append(
            torch.arange(first, first + len(record), dtype=torch.int64, device=record.device)
        )
    return [(home, torch.cat(places)) for home, places in homes]


def _update(
    runs: Sequence[Run],
    lists: Sequence[list[StepTensor]],
    grads: Sequence[list[Tensor | None]],
    factors: Factors,
    options: Options,
    inputs: StepInputs,
    scratch: Scratch,
) -> None:
    """Normalise and update all blocks."""
    constants = Constants.of(options, factors.inverse.dtype)
    group, device = lists[0][0].group, factors.inverse.device
    closing = inputs.closing[group]
    sizes = [run.rows_of_blocks() for run in runs]
    if len(factors.inverse) == 1:
        of_block: Iterator[Factors] = repeat(factors)
    else:
        of_block = factors.split(list(chain.from_iterable(sizes)))
    for run, rows_of_run, tensors, new in zip(runs, sizes, lists, grads):
        of_run = list(islice(of_block, len(rows_of_run)))
        if not run.columns:
            continue
        of_part = (rows for rows in of_run for _ in range(run.parts))
        stochastic = closing and rounds_stochastically(tensors[0].param, options)
        clock = inputs.clocks[device][group] if stochastic else None
        for stack, of_stack in zip(run.stacks(tensors), run.stacks(new)):
            # what is first in `zip` ends it, and leaves the others where they are
            for (block, hashed), rows in zip(
                _blocks(run, stack, of_stack, clock, scratch), of_part
            ):
                update_(
                    block, rows, constants, options, closing=closing, hashed=hashed,
                    scratch=scratch,
                )  # fmt: skip


def _blocks(
    run: Run,
    stack: list[StepTensor],
    grads: list[Tensor | None],
    clock: Tensor | None,
    scratch: Scratch,
) -> Iterator[tuple[Block, Tensor | None]]:
    """The blocks of a stack, each with bits for stochastic rounding; copies are put back after."""
    written: list[list[Any]] = [[getattr(t, name) for t in stack] for name in Block._fields[1:]]
    kinds = zip(Block._fields, [grads, *written])
    matrices = [run.matrix(name, several, scratch) for name, several in kinds]
    cuts = [repeat(None) if matrix is None else cut(matrix, run.limit) for matrix in matrices]
    bits: Iterator[Tensor | None] = repeat(None)
    if clock is not None:
        bits = _bits(run, stack, clock, cut(matrices[1], run.limit))
    yield from zip(map(Block._make, zip(*cuts)), bits)
    if run.in_place:
        return
    for several, matrix in zip(written, matrices[1:]):
        if matrix is not None:
            if len(several) == 1:
                several[0].copy_(matrix.view(several[0].shape))
            else:
                torch.unbind_copy(matrix.view(-1, *several[0].shape), 0, out=several)


def _bits(
    run: Run, stack: list[StepTensor], clock: Tensor, blocks: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Random bits of each entry, by its place in the memory that the kernels walk."""
    if not run.in_place:
        hashed = [
            hash_positions(clock, t.key, positions_of(t.param, run.slices)).view(-1, run.columns)
            for t in stack
        ]
        yield from cut(torch.cat(hashed), run.limit)
        return
    start = 0
    for block in blocks:
        # blocks follow one another in memory
        end = start + block.numel()
        places = torch.arange(start, end, dtype=torch.int64, device=block.device)
        yield hash_positions(clock, stack[0].key, places).view(block.shape)
        start = end

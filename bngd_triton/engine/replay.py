"""Recognise a step that repeats the one before it, and replay it.

A prepared step stays valid while every tensor that it names is of the kind that it was and at the
address where it was, and the options that decide the layout are what they were. `Replay.run` asks
exactly that, of all tensors, in every step; gradients alone may move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from operator import attrgetter, is_, is_not, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..eager.eager_step import EagerStep
from ..kernels.fused_step import FusedStep
from ..kernels.plan import capturing
from ..options import OptionsReader
from ..records import StepInputs, StepTensor
from ..state import KEYS
from ..tensors import Written, dispatches, is_sharded, local, reach

if TYPE_CHECKING:
    # torch may be built without torch.distributed
    from ..sharding.sharded_step import ShardedStep

_params = itemgetter("params")
_grad = attrgetter("grad")


class Lot(NamedTuple):
    """What one prepared step serves.

    Attributes:
        prepared: the step, by the kernels or by the reference; None for parameters of which this
            process holds nothing.
        pairs: each parameter, and what of it the step was last run with, in the step's order.
        sharded: keeps the statistics of slices of which other processes hold parts.
    """

    prepared: FusedStep | EagerStep | None
    pairs: Sequence[tuple[Tensor, StepTensor]]
    sharded: ShardedStep | None = None


class Replay:
    """What the last step worked on; `run` repeats it if that still holds.

    Args:
        optimizer: its groups and state after that step, and its choice of implementation.
        lots: all that the step moved; kernels walk every tensor of theirs where it is.
        reader: has read the options of each group.
        inputs: what was new in the step.
    """

    def __init__(
        self, optimizer: Any, lots: Sequence[Lot], reader: OptionsReader, inputs: StepInputs
    ) -> None:
        lists = list(map(_params, optimizer.param_groups))
        # held, so that no other object can take the place of one of them
        self.params = list(chain.from_iterable(lists))
        self.sizes = list(map(len, lists))
        place = {id(param): i for i, param in enumerate(self.params)}
        self.moved = [place[id(param)] for lot in lots for param, _ in lot.pairs]
        rest = sorted(set(range(len(self.params))) - set(self.moved))
        # without a gradient, and not looked at any further; without entries, and they may grow
        self.idle = [i for i in rest if self.params[i].grad is None]
        self.empty = [self.params[i] for i in rest if self.params[i].grad is not None]
        # gradients are not to be held
        self.lots = [
            Lot(
                lot.prepared,
                [(param, tensor._replace(grad=None)) for param, tensor in lot.pairs],
                lot.sharded,
            )
            for lot in lots
        ]
        self.sharded_steps = [lot.sharded for lot in lots if lot.sharded is not None]
        self.fused = optimizer.fused
        self.reader, self.options, self.closing = reader, reader.options, inputs.closing
        self.layouts = [one.layout for one in reader.options]

        stepped = [self.params[i] for i in self.moved]
        grads = list(map(_grad, stepped))
        self.sharded = bool(self.sharded_steps) or any(map(is_sharded, stepped))
        self.placed = _placed([*stepped, *grads]) if self.sharded else []
        # whether all ranks learn of what a GradScaler found was asked, or not, for this step
        self.scaled = inputs.found_inf is not None
        self.devices = list(dict.fromkeys(param.device for param in stepped))

        self.keys, self.entries = list(optimizer.state), list(optimizer.state.values())
        # users may keep things of their own there
        entries = [entry for entry in self.entries if isinstance(entry, dict)]
        self.slots = [
            (itemgetter(key), [entry for entry in entries if key in entry]) for key in KEYS
        ]
        fixed = [*self._parts(stepped), *self._parts(self._held())]
        self.addresses = list(map(Tensor.data_ptr, fixed))
        self.written = Written(fixed)
        sizes = [reach(grad) * grad.element_size() for grad in self._parts(grads)]
        self.bytes_of_grads = np.array(sizes, np.uint64)
        self.same_kinds = same_kinds([*self._parts(grads), *fixed])

    @staticmethod
    def serves(lots: Sequence[Lot]) -> bool:
        """Whether a step is of the sort that can be replayed."""
        for prepared, pairs, _ in lots:
            if isinstance(prepared, FusedStep) and not prepared.in_place:
                return False
            # the reference serves whatever tells nothing by its memory, and parts of a tensor
            if isinstance(prepared, EagerStep) and any(dispatches(param) for param, _ in pairs):
                return False
        return any(lot.pairs for lot in lots)

    @torch.no_grad()
    def run(self, optimizer: Any, inputs: StepInputs) -> bool:
        """Step if all is as it was but for options and gradients; else change nothing.

        Args:
            optimizer: the one this was made for.
            inputs: what is new in this step.

        Returns:
            Whether the step was made.

        Raises:
            ValueError: an option, changed since, is out of bounds.
            TypeError: likewise.
        """
        lists = list(map(_params, optimizer.param_groups))
        params = list(chain.from_iterable(lists))
        as_before = (
            optimizer.fused is self.fused
            and list(map(len, lists)) == self.sizes
            and all(map(is_, params, self.params))
            and self._same_state(optimizer.state)
            and self._replayable(inputs)
        )
        if not as_before:
            return False
        grads = list(map(_grad, params))
        if any(grads[i] is not None for i in self.idle):
            return False
        if len(self.moved) < len(params) or len(self.lots) > 1:
            grads, params = [grads[i] for i in self.moved], [params[i] for i in self.moved]
        if self.sharded and (None in grads or _placed([*params, *grads]) != self.placed):
            return False
        try:
            grads = self._parts(grads)
            fixed = [*self._parts(params), *self._parts(self._held())]
            if not self.same_kinds(*grads, *fixed) or any(map(Tensor.numel, self.empty)):
                return False
            if list(map(Tensor.data_ptr, fixed)) != self.addresses:
                return False
            found = list(map(Tensor.data_ptr, grads))
        # a gradient or an entry that is gone, or a gradient without memory
        except (KeyError, TypeError, RuntimeError, AttributeError):
            return False
        return self._follow(optimizer, grads, found, inputs)

    def _replayable(self, inputs: StepInputs) -> bool:
        """Whether a capture, if one is under way, can hold the step; a full check refuses it."""
        if self.sharded and (inputs.found_inf is not None) != self.scaled:
            return False
        if not any(map(capturing, self.devices)):
            return True
        # the host counts micro-batches, the idle would be left out of every replay
        windows = any(one.accumulation_steps > 1 for one in self.options)
        return not (self.idle or self.sharded or windows)

    def _same_state(self, state: dict[Any, Any]) -> bool:
        """Whether the same entries belong to the same parameters; tensors are looked at later."""
        return (
            len(state) == len(self.entries)
            and all(map(is_, state, self.keys))
            and all(map(is_, state.values(), self.entries))
        )

    def _held(self) -> list[Tensor]:
        """The state's tensors, as they stand now."""
        return list(chain.from_iterable(map(get, entries) for get, entries in self.slots))

    def _parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """What this process holds of them."""
        return list(map(local, tensors)) if self.sharded else tensors

    def _follow(
        self, optimizer: Any, grads: list[Tensor], found: list[int], inputs: StepInputs
    ) -> bool:
        """Bring gradients' addresses and options up to date, and launch."""
        # the full check copies those that lie where the step writes
        if self.written.hold_any(found, self.bytes_of_grads):
            return False
        options = self.reader.read(optimizer.param_groups)
        changed = any(map(is_not, options, self.options)) or len(options) != len(self.options)
        if any(one.nonfinite == "raise" for one in options):
            return False
        if changed and [one.layout for one in options] != self.layouts:
            return False
        ends = list(accumulate(len(lot.pairs) for lot in self.lots))
        for lot, end in zip(self.lots, ends):
            here = found if len(self.lots) == 1 else found[end - len(lot.pairs) : end]
            if isinstance(lot.prepared, FusedStep) and not lot.prepared.plan.point_at(here):
                return False
        if changed or self.reader.by_value or inputs.closing != self.closing:
            for lot in self.lots:
                if isinstance(lot.prepared, FusedStep):
                    lot.prepared.write(options, inputs.closing)
            self.options, self.closing = options, inputs.closing
        # the other ranks wait for them
        for step in self.sharded_steps:
            step.measure_again(options, inputs)
        for lot, end in zip(self.lots, ends):
            if isinstance(lot.prepared, EagerStep):
                tensors = [tensor for _, tensor in lot.pairs]
                of_lot = grads[end - len(tensors) : end]
                lot.prepared.run(tensors, of_lot, options[tensors[0].group], inputs)
            elif lot.sharded is None and lot.prepared is not None:
                lot.prepared.update_again(inputs)
        for step in self.sharded_steps:
            step.update(options, inputs)
        return True

    def memory(self) -> list[Tensor]:
        """What the kernels write, held whatever becomes of the tensors that look at it."""
        return [
            tensor.detach() for tensor in (*(self.params[i] for i in self.moved), *self._held())
        ]


def lots_of(
    sharded_steps: Iterable[ShardedStep], empty: Sequence[tuple[Tensor, StepTensor]]
) -> list[Lot]:
    """The lots of a step that was measured; what has no entries in this process comes last."""
    from ..sharding.sharded_step import by_kernels

    lots, without = [], list(empty)
    for step in sharded_steps:
        served = [(part.param, part.member) for part in step.parts if by_kernels(part)]
        lots.append(Lot(step.prepared, served, step))
        without += [(part.param, part.member) for part in step.parts if not by_kernels(part)]
    return [*lots, Lot(None, without)]


def same_kinds(tensors: list[Tensor]) -> Callable[..., bool]:
    """A function that tells whether tensors are of these dtypes, devices, shapes and strides."""
    try:
        # torch.compile's own guard: one call in C for all of them, 57 ns a tensor
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        check: Callable[..., bool] = guards.check
        if check(*tensors):
            return check
    # it is torch's own affair, and may be missing or change: then Python says the same
    except (ImportError, AttributeError, TypeError, RuntimeError):
        pass

    def kinds(found: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(t.dtype, t.device, t.shape, t.stride(), t.layout, t.is_neg()) for t in found]

    expected = kinds(tensors)
    return lambda *found: kinds(found) == expected


def _placed(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.shape, t.placements, t.device_mesh) if is_sharded(t) else t.shape for t in tensors]

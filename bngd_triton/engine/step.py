"""From groups of parameters to one step: what is made, who serves what."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..eager.eager_step import EagerStep
from ..eager.rounding import GOLDEN
from ..kernels.fused_step import FusedStep
from ..kernels.plan import capturing
from ..options import Options, OptionsReader
from ..records import StepInputs, StepTensor, rounds_stochastically
from ..state import MOMENTUM, WINDOW, make_state, master_of
from ..tensors import is_sharded, local
from .collect import (
    Work,
    check_replayable,
    check_scaled,
    copy_shared_gradients,
    gather,
    refuse_capture,
)
from .replay import Lot, Replay, lots_of

if TYPE_CHECKING:
    # torch may be built without torch.distributed
    from ..sharding.sharded_step import Part, ShardedStep


class Stepper:
    """Steps an optimizer's parameters, all or some; keeps what the next step may repeat."""

    def __init__(self) -> None:
        # the kernels' steps of the last one, for each device
        self.prepared: list[FusedStep] = []
        self.replay: Replay | None = None
        # and those that CUDA graphs hold
        self.captured: list[FusedStep] = []
        self.reader = OptionsReader()
        self.sharded_steps: dict[torch.device, ShardedStep] = {}
        # whether some group counts micro-batches; whether some group rounds stochastically
        self.windowed = False
        self.rounding = False

    def step(self, optimizer: Any) -> None:
        """Move every parameter that has a gradient."""
        replay = self.replay
        if replay is not None:
            closing = closing_of(optimizer.param_groups) if self.windowed else replay.closing
            if replay.run(optimizer, inputs_of(optimizer, closing)):
                if any(map(capturing, replay.devices)):
                    self._hold(replay)
                return
        self.replay = None
        self.lay_out_and_step(optimizer, inputs_of(optimizer))

    def _hold(self, replay: Replay) -> None:
        """Keep all that a CUDA graph has captured: its replays read and write it."""
        memory = replay.memory()
        for prepared, _, _ in replay.lots:
            if isinstance(prepared, FusedStep):
                prepared.fix(memory)
                if prepared not in self.captured:
                    self.captured.append(prepared)

    def sync(self, optimizer: Any) -> None:
        """Write every group's options to the tables of the last step and of captured ones."""
        groups = optimizer.param_groups
        options, closing = self.reader.read(groups), closing_of(groups)
        steps = [one for one in self.prepared if one not in self.captured] + self.captured
        if steps:
            check_replayable(steps[-1].layouts, options)
        layouts = [one.layout for one in options]
        for step in steps:
            # an earlier capture whose layout was given up since is held, and left as it is
            if step.layouts == layouts:
                step.write(options, closing)

    @torch.no_grad()
    def lay_out_and_step(
        self, optimizer: Any, inputs: StepInputs, closed: Collection[Tensor] = ()
    ) -> None:
        """As `step`, laid out anew and checked in full; nothing changes if anything is refused.

        Args:
            optimizer: its groups and state.
            inputs: what is new in this step.
            closed: parameters whose windows have been closed.
        """
        refuse_capture(optimizer)
        groups = optimizer.param_groups
        if inputs.found_inf is not None:
            check_scaled(groups)
        options = self.reader.read(groups)
        work = [gather(optimizer, i, one, inputs, closed) for i, one in enumerate(options)]
        self.windowed = any(one.accumulation_steps > 1 for one in options)
        self.rounding = any(one.master_weights == "stochastic" for one in options)
        for group, part, choice in zip(groups, work, options):
            prepare_state(optimizer, [*part.params, *part.ending], choice)
            if choice.accumulation_steps == 1:
                # a window that was given up leaves nothing behind
                group["micro_step"] = 0
                for param in group["params"]:
                    optimizer.state.get(param, {}).pop(WINDOW, None)
        copy_shared_gradients(work, optimizer.state)
        served, eager, empty, parts = _divided(optimizer, work, options)
        # the other ranks wait for what is here: first
        for device, its_parts in parts.items():
            from ..sharding.sharded_step import ShardedStep

            self.sharded_steps.setdefault(device, ShardedStep()).measure(its_parts, options, inputs)
        sharded_steps = [self.sharded_steps[device] for device in parts]
        lots: list[Lot] = []
        for pairs, group_work, choice in zip(eager, work, options):
            if pairs:
                tensors = [tensor for _, tensor in pairs]
                step = EagerStep(tensors, choice)
                step.run(tensors, [tensor.grad for tensor in tensors], choice, inputs)
                lots.append(Lot(step, pairs))
            for param in group_work.ending:
                # the next gradient makes it anew; until then steps can be recognised
                del optimizer.state[param][WINDOW]
        lots = self._updated(served, options, inputs) + lots
        if sharded_steps or empty:
            lots += lots_of(sharded_steps, empty)
        if _repeatable(work, options) and Replay.serves(lots):
            self.replay = Replay(optimizer, lots, self.reader, inputs)
        for sharded in sharded_steps:
            sharded.update(options, inputs)
            sharded.let_go()

    def _updated(self, served: Served, options: list[Options], inputs: StepInputs) -> list[Lot]:
        """Steps by the kernels, laid out anew where no earlier layout fits; what was run."""
        laid_out = self.prepared + self.captured
        self.prepared, lots = [], []
        for pairs in served.values():
            tensors = [tensor for _, tensor in pairs]
            prepared = FusedStep.fitting(laid_out, tensors, options)
            prepared.update(tensors, options, inputs)
            self.prepared.append(prepared)
            lots.append(Lot(prepared, pairs))
        return lots


Served = dict[torch.device, list[tuple[Tensor, StepTensor]]]


class Division(NamedTuple):
    """Who serves what of a step: each parameter beside what this process holds of it.

    Attributes:
        served: on each device, by the kernels.
        eager: of each group, by the reference.
        empty: of which other ranks hold all.
        parts: on each device, of which other ranks hold parts.
    """

    served: Served
    eager: list[list[tuple[Tensor, StepTensor]]]
    empty: list[tuple[Tensor, StepTensor]]
    parts: dict[torch.device, list[Part]]


def _divided(optimizer: Any, work: Sequence[Work], options: Sequence[Options]) -> Division:
    """Who serves what; parameters that have left the groups are let go of."""
    every = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer._records.keep(every)
    keys = {id(param): i for i, param in enumerate(every)}
    found = Division({}, [], [], {})
    for index, (part, choice) in enumerate(zip(work, options)):
        grads: list[Tensor | None] = [*part.grads, *[None] * len(part.ending)]
        tensors = [
            member(optimizer, param, grad, choice, index, keys[id(param)])
            for param, grad in zip([*part.params, *part.ending], grads)
        ]
        found.eager.append(list(zip(part.ending, tensors[len(part.params) :])))
        of_params = zip(part.params, tensors, part.names, part.fused, part.shares)
        for param, tensor, name, fused, share in of_params:
            if share is not None:
                from ..sharding.sharded_step import Part

                part_of = Part(param, tensor, share, fused, name)
                found.parts.setdefault(tensor.param.device, []).append(part_of)
            elif not fused:
                found.eager[-1].append((param, tensor))
            elif tensor.param.numel():
                found.served.setdefault(tensor.param.device, []).append((param, tensor))
            elif is_sharded(param):
                found.empty.append((param, tensor))
    return found


def _repeatable(work: Sequence[Work], options: Sequence[Options]) -> bool:
    """Whether the next step may repeat this one, as far as groups and placements tell."""
    if any(one.nonfinite == "raise" for one in options) or any(part.waiting for part in work):
        return False
    # of tensors that other ranks have parts of, steps by the kernels alone are replayed
    sharded = any(is_sharded(param) for part in work for param in part.params)
    return not sharded or all(all(part.fused) for part in work)


def prepare_state(optimizer: Any, params: Sequence[Tensor], options: Options) -> None:
    """Make what parameters with a gradient lack: state, a record, the clock of their device."""
    make_state(optimizer.state, params, options)
    optimizer._records.make(params, options)
    optimizer._clocks.wind(optimizer.param_groups, {param.device for param in params})


@torch.no_grad()
def make_all_state(optimizer: Any) -> None:
    """Make what a first step would, and move nothing."""
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        prepare_state(optimizer, params, Options.of(group))


def member(
    optimizer: Any, param: Tensor, grad: Tensor | None, options: Options, group: int, key: int
) -> StepTensor:
    """What this process holds of a parameter, its gradient and its state."""
    entry = optimizer.state.get(param, {})
    master, window = master_of(entry, param, options), entry.get(WINDOW)
    if is_sharded(param) and rounds_stochastically(param, options):
        # parts round apart, replicas alike
        from ..sharding.placements import ordinal

        key += ordinal(param) * GOLDEN
    return StepTensor(
        param=local(param),
        grad=grad,
        momentum=local(entry[MOMENTUM]) if options.buffered else None,
        group=group,
        record=optimizer._records[param],
        master=None if master is None else local(master),
        window=None if window is None else local(window),
        key=key & 0xFFFFFFFF,
    )


def closing_of(groups: Sequence[dict[str, Any]]) -> list[bool]:
    """For each group, whether the next micro-batch is the last of its window."""
    return [g["micro_step"] + 1 >= g["accumulation_steps"] for g in groups]


def count_micro_batch(groups: Sequence[dict[str, Any]]) -> None:
    """Go on to the next micro-batch of each window."""
    for group, closed in zip(groups, closing_of(groups)):
        if group["accumulation_steps"] > 1:
            group["micro_step"] = 0 if closed else group["micro_step"] + 1


def inputs_of(optimizer: Any, closing: Sequence[bool] | None = None) -> StepInputs:
    """What the next step of all groups brings, with what a GradScaler has left in the optimizer.

    Args:
        optimizer: its groups, clocks and attributes.
        closing: see `closing_of`.
    """
    found = []
    for name in ("grad_scale", "found_inf"):
        value = optimizer.__dict__.get(name)
        # a number: set by hand, or what was found on no device at all
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        found.append(value)
    if closing is None:
        closing = closing_of(optimizer.param_groups)
    return StepInputs(closing, optimizer._clocks, *found)

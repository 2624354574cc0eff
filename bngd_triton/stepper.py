"""From groups of parameters to one step: what is made, who serves what."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import reference
from .gathering import check_scaled, copy_shared_gradients, gather, refuse_capture
from .kernels.plan import capturing
from .kernels.prepared import FusedStep
from .members import Member, Pass, rounds_stochastically
from .memory import is_sharded, local
from .options import Options, OptionsReader
from .precision import GOLDEN
from .state import MOMENTUM, WINDOW, make_state, master_of
from .steady import Lot, Steady

if TYPE_CHECKING:
    # torch may be built without torch.distributed
    from .spread import Part, Spread


class Stepper:
    """Steps an optimizer's parameters, all or some; keeps what the next step may repeat."""

    def __init__(self) -> None:
        self.prepared: FusedStep | None = None
        self.steady: Steady | None = None
        self.reader = OptionsReader()
        self.spread: dict[torch.device, Spread] = {}
        # whether some group counts micro-batches; whether some group rounds stochastically
        self.windowed = False
        self.rounding = False

    def step(self, optimizer: Any) -> None:
        """Move every parameter that has a gradient."""
        steady = self.steady
        # the full check refuses to capture windows
        captured = self.windowed and steady is not None and capturing(steady.device)
        if steady is not None and not captured:
            closing = closing_of(optimizer.param_groups) if self.windowed else steady.closing
            if steady.run(optimizer, optimizer._pass(closing)):
                return
        self.steady = None
        self.lay_out_and_step(optimizer, optimizer._pass(closing_of(optimizer.param_groups)))

    @torch.no_grad()
    def lay_out_and_step(self, optimizer: Any, this: Pass, closed: Collection[Tensor] = ()) -> None:
        """As `step`, laid out anew and checked in full; nothing changes if anything is refused.

        Args:
            optimizer: its groups and state.
            this: what is new in this step.
            closed: parameters whose windows have been closed.
        """
        refuse_capture(optimizer)
        groups = optimizer.param_groups
        if this.found_inf is not None:
            check_scaled(groups)
        options = self.reader.read(groups)
        work = [gather(optimizer, i, one, this, closed) for i, one in enumerate(options)]
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
        keys = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
        served: list[tuple[Tensor, Member]] = []
        # of which other ranks hold all
        hollow: list[tuple[Tensor, Member]] = []
        rest: list[list[Member]] = []
        spread: list[Part] = []
        for index, (part, choice) in enumerate(zip(work, options)):
            grads: list[Tensor | None] = [*part.grads, *[None] * len(part.ending)]
            of_group = [
                member(optimizer, param, grad, choice, index, keys[id(param)])
                for param, grad in zip([*part.params, *part.ending], grads)
            ]
            rest.append(of_group[len(part.params) :])
            here = zip(part.params, of_group, part.names, part.fused, part.shares)
            for param, one, name, fused, share in here:
                if share is not None:
                    from .spread import Part

                    spread.append(Part(param, one, share, fused, name))
                elif not fused:
                    rest[-1].append(one)
                elif one.param.numel():
                    served.append((param, one))
                elif is_sharded(param):
                    hollow.append((param, one))
        # the other ranks wait for what is here: first
        spreads = [
            self._measured(device, spread, options, this)
            for device in dict.fromkeys(part.member.param.device for part in spread)
        ]
        for members, part, choice in zip(rest, work, options):
            if members:
                reference.apply_(members, choice, this)
            for param in part.ending:
                # the next gradient makes it anew; until then steps can be recognised
                del optimizer.state[param][WINDOW]
        if served:
            self.run([one for _, one in served], options, this)
        shaped = not any(is_lazy(p) for group in groups for p in group["params"])
        if shaped and all(all(part.fused) and not part.waiting for part in work):
            lots = [Lot(self.prepared, served)] if served else []
            self.steady = self._repeating(optimizer, lots, spreads, hollow, this)
        for found in spreads:
            found.move(options, this)

    def _measured(
        self, device: torch.device, parts: list[Part], options: list[Options], this: Pass
    ) -> Spread:
        """The statistics of what other ranks have parts of, on one device."""
        if device not in self.spread:
            from .spread import Spread

            self.spread[device] = Spread()
        found = self.spread[device]
        here = [part for part in parts if part.member.param.device == device]
        found.measure(here, options, this)
        return found

    def _repeating(
        self,
        optimizer: Any,
        lots: list[Lot],
        spreads: list[Spread],
        hollow: list[tuple[Tensor, Member]],
        this: Pass,
    ) -> Steady | None:
        """What recognises the next step, if it is of the sort that can be."""
        sharded = spreads or hollow or any(is_sharded(p) for lot in lots for p, _ in lot.pairs)
        kind: type[Steady] = Steady
        if sharded:
            from .steady_shards import SteadyShards, lots_of

            kind, lots = SteadyShards, [*lots, *lots_of(spreads, hollow)]
        if not any(lot.pairs for lot in lots) or not Steady.serves(lots, self.reader.options):
            return None
        return kind(optimizer, lots, self.reader, this)

    def run(self, members: list[Member], options: list[Options], this: Pass) -> None:
        """A step by the kernels, laid out anew where the last layout does not fit."""
        self.prepared = FusedStep.fitting(self.prepared, members, options)
        self.prepared.run(members, options, this)


def prepare_state(optimizer: Any, params: Sequence[Tensor], options: Options) -> None:
    """Make what parameters with a gradient lack: state, a record, the clock of their device."""
    make_state(optimizer.state, params, options)
    optimizer._records.make(params, options)
    optimizer._wind_clocks({param.device for param in params})


def member(
    optimizer: Any, param: Tensor, grad: Tensor | None, options: Options, group: int, key: int
) -> Member:
    """What this process holds of a parameter, its gradient and its state."""
    entry = optimizer.state.get(param, {})
    master, window = master_of(entry, param, options), entry.get(WINDOW)
    if is_sharded(param) and rounds_stochastically(param, options):
        # parts round apart, replicas alike
        from .distributed import ordinal

        key += ordinal(param) * GOLDEN
    return Member(
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

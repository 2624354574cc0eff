"""From groups of parameters to one step: what is checked, what is made, who serves what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .checkpoint import parameter_names
from .checks import check_step, check_tensors
from .kernels.launch import why_not
from .kernels.plan import capturing
from .kernels.prepared import FusedStep
from .members import Member, Pass
from .options import Options
from .state import MOMENTUM, WINDOW, make_state, master_of
from .steady import Steady


class _Work(NamedTuple):
    """What one group asks of a step: its parameters that have a gradient, or a window to close."""

    options: Options
    params: list[Tensor]
    grads: list[Tensor]
    # for each parameter, whether the kernels serve it
    fused: list[bool]
    # parameters without a gradient whose window ends
    ending: list[Tensor]


class Stepper:
    """Steps an optimizer's parameters, all or some; keeps what the next step may repeat."""

    def __init__(self) -> None:
        self.prepared: FusedStep | None = None
        self.steady: Steady | None = None
        # whether some group counts micro-batches; whether some group rounds stochastically
        self.windowed = False
        self.rounding = False

    def step(self, optimizer: Any) -> None:
        """Move every parameter that has a gradient."""
        steady = self.steady
        if steady is not None:
            closing = closing_of(optimizer.param_groups) if self.windowed else steady.closing
            if steady.run(optimizer, optimizer._pass(closing)):
                return
        self.steady = None
        self.lay_out_and_step(optimizer, optimizer._pass(closing_of(optimizer.param_groups)))

    @torch.no_grad()
    def lay_out_and_step(
        self, optimizer: Any, this: Pass, only: Tensor | None = None, ending: bool = True
    ) -> None:
        """As `step`, laid out anew and checked in full; nothing changes if anything is refused.

        Args:
            optimizer: its groups and state.
            this: what is new in this step.
            only: leave all other parameters alone.
            ending: close windows of parameters without a gradient.
        """
        refuse_capture(optimizer)
        groups = optimizer.param_groups
        work = [gather(optimizer, i, this, only, ending) for i in range(len(groups))]
        self.windowed = any(part.options.accumulation_steps > 1 for part in work)
        self.rounding = any(part.options.master_weights == "stochastic" for part in work)
        for part in work:
            make_state(optimizer.state, part.params, part.options)
            optimizer._records.make([*part.params, *part.ending], part.options)
            optimizer._wind_clocks({param.device for param in part.params})
        keys = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
        served: list[Member] = []
        for index, part in enumerate(work):
            members = self._members(optimizer, part, index, keys)
            served += [m for m, on in zip(members, part.fused) if on and m.param.numel()]
            rest = [m for m, on in zip(members, part.fused) if not on]
            rest += [self._ending(optimizer, param, part, index, keys) for param in part.ending]
            if rest:
                reference.apply_(rest, part.options, this)
        if served:
            options = [part.options for part in work]
            prepared = self.prepared
            if prepared is None or prepared.signature != FusedStep.sign(served, options):
                self.prepared = prepared = FusedStep(served, options)
            prepared.run(served, options, this)
            alone = only is None and all(all(part.fused) and not part.ending for part in work)
            if alone and Steady.serves(prepared, options):
                self.steady = Steady(optimizer, prepared, served, options, this.closing)

    @staticmethod
    def _members(optimizer: Any, part: _Work, index: int, keys: dict[int, int]) -> list[Member]:
        options, found = part.options, []
        for param, grad in zip(part.params, part.grads):
            entry = optimizer.state.get(param, {})
            found.append(
                Member(
                    param=param,
                    grad=grad,
                    momentum=entry[MOMENTUM] if options.buffered else None,
                    group=index,
                    master=master_of(entry, param, options),
                    window=entry.get(WINDOW),
                    record=optimizer._records[param],
                    key=keys[id(param)],
                )
            )
        return found

    @staticmethod
    def _ending(
        optimizer: Any, param: Tensor, part: _Work, index: int, keys: dict[int, int]
    ) -> Member:
        entry, record = optimizer.state[param], optimizer._records[param]
        master = master_of(entry, param, part.options)
        window, key = entry[WINDOW], keys[id(param)]
        return Member(param, None, entry[MOMENTUM], index, record, master, window, key)


def closing_of(groups: Sequence[dict[str, Any]]) -> list[bool]:
    """For each group, whether the next micro-batch is the last of its window."""
    return [g.get("micro_step", 0) + 1 >= g["accumulation_steps"] for g in groups]


def refuse_capture(optimizer: Any) -> None:
    """A CUDA graph can hold only a step that repeats the one before it."""
    captured = [
        (name, param)
        for index, group in enumerate(optimizer.param_groups)
        for name, param in zip(parameter_names(group, index), group["params"])
        if capturing(param.device)
    ]
    if captured and any(group["accumulation_steps"] > 1 for group in optimizer.param_groups):
        raise RuntimeError(
            "a step with accumulation_steps > 1 cannot be captured in a CUDA graph: the host "
            "counts its micro-batches; capture with accumulation_steps=1"
        )
    for name, param in captured:
        if param.grad is None:
            raise RuntimeError(
                f"{name} has no gradient while a CUDA graph is being captured, and would not "
                "move in any replay; give it one, or leave it out of the optimizer"
            )
    if captured:
        raise RuntimeError(
            "a step captured in a CUDA graph must repeat the one before it (same tensors, "
            "layouts and granularity, kernels only); run one whole iteration on the same "
            "stream first, and keep its gradients (zero_grad(set_to_none=False))"
        )


def gather(optimizer: Any, index: int, this: Pass, only: Tensor | None, ending: bool) -> _Work:
    """What a group asks of this step, checked in full before anything changes."""
    group = optimizer.param_groups[index]
    options = Options.of(group)
    every = parameter_names(group, index)
    state = optimizer.state
    found = [
        (param, param.grad, name)
        for param, name in zip(group["params"], every)
        if param.grad is not None and (only is None or param is only)
    ]
    params = [param for param, _, _ in found]
    grads = [grad for _, grad, _ in found]
    names = [name for _, _, name in found]
    buffers = [state[p].get(MOMENTUM, p) if p in state else p for p in params]
    check_tensors(params, grads, buffers, buffered=options.buffered, names=names)
    # an overflow is no error where a GradScaler has seen it
    scaled = this.found_inf is not None and options.nonfinite == "raise"
    check_step(params, grads, options, names=names, finite=not scaled)
    if options.granularity == "global" and options.accumulation_steps > 1:
        _check_complete(group["params"], every)
    ended: list[Tensor] = []
    if options.accumulation_steps > 1 and this.closing[index] and ending:
        ended = [
            p
            for p in group["params"]
            if p.grad is None and p in state and WINDOW in state[p] and p.numel()
        ]
    fused = serve(optimizer.fused, params, names, options)
    # a float32 parameter may have a float64 gradient, or momentum from a float64 checkpoint
    others = [(g, b) if options.buffered else (g,) for g, b in zip(grads, buffers)]
    for on, more, name in zip(fused, others, names):
        reason = next(filter(None, map(why_not, more)), None) if on and optimizer.fused else None
        if reason:
            raise RuntimeError(
                f"fused=True cannot serve {name} with the gradient or momentum it has: {reason}"
            )
    fused = [on and not any(map(why_not, more)) for on, more in zip(fused, others)]
    if options.granularity == "global":
        fused = [all(fused)] * len(fused)
    return _Work(options, params, grads, fused, ended)


def _check_complete(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse a global group whose slice would change within a window."""
    missing = [name for param, name in zip(params, names) if param.grad is None]
    if missing and len(missing) < len(params):
        raise RuntimeError(
            "granularity='global' with accumulation_steps > 1 needs a gradient of every parameter "
            f"of the group in every micro-batch, {missing[0]} has none; put such parameters in "
            "another group, or use granularity='tensor'"
        )


def serve(
    fused: bool | None, params: Sequence[Tensor], names: Sequence[str], options: Options
) -> list[bool]:
    """Which parameters go to the kernels; an error where ``fused=True`` cannot be kept."""
    if fused is False:
        return [False] * len(params)
    reasons = [why_not(param) for param in params]
    for name, reason in zip(names, reasons):
        if fused and reason:
            raise RuntimeError(f"fused=True cannot serve {name}: {reason}")
    if fused is None:
        # in the interpreter kernels are for tests: they are slower than the reference
        reasons = [
            reason or (None if param.device.type != "cpu" else "cpu")
            for param, reason in zip(params, reasons)
        ]
    if options.granularity == "global" and any(reasons):
        return [False] * len(params)
    return [reason is None for reason in reasons]

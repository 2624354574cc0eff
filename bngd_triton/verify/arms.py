"""The ways to step a case of `bngd verify`; all must end where the definition does."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..eager.rounding import master_dtype, widen
from ..kernels import fused_step_
from ..kernels.devices import Tuning, tuning_for
from ..kernels.launch import FORMS
from ..optimizer import BNGD
from ..options import Options
from ..state import MOMENTUM, make_state, master_key, master_of
from .cases import STEPS, Case
from .tensors import Placed, empty_gradients, gradients, weights


class Snapshot(NamedTuple):
    """What is kept of one parameter between steps, on the CPU.

    Attributes:
        param: its value.
        wide: float32, with the bits that a master keeps; `param` without a master, or beside one
            that does not round to it.
        momentum: None without momentum.
    """

    param: Tensor
    wide: Tensor
    momentum: Tensor | None


class Run(NamedTuple):
    """What an arm left.

    Attributes:
        steps: what was kept before the first step, and after each.
        skipped: slices that were left as they were.
        overwritten: entries beside the parameters that were written.
    """

    steps: list[list[Snapshot]]
    skipped: int
    overwritten: int


def by_optimizer(case: Case, device: torch.device, seed: int, *, fused: bool) -> Run:
    """`BNGD.step`, by the kernels or by the eager reference."""
    return _Optimizing(case, device, seed, fused).run()


def by_form(case: Case, device: torch.device, seed: int, form: str) -> Run:
    """`fused_step_` in one of `launch.FORMS`."""
    tuning = tuning_for(device)
    placed = weights(case, tuning, device, seed)
    params = [one.tensor for one in placed]
    grads = empty_gradients(case, placed)
    options = Options(**case.options)
    state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    make_state(state, params, options)
    masters = [master_of(state[param], param, options) for param in params]
    buffers = [state[param][MOMENTUM] for param in params] if options.buffered else None
    steps = [snapshots(state, params, options)]
    skipped = 0
    for step in range(STEPS):
        _fill(grads, gradients(case, tuning, step, seed))
        skipped += int(
            fused_step_(
                params, grads, buffers, masters=masters,
                tuning=dataclasses.replace(tuning, form=form),
                rounding_key=step if case.stochastic else None, **case.rule,
            )
        )  # fmt: skip
        steps.append(snapshots(state, params, options))
    return Run(steps, skipped, _overwritten(placed))


def by_graph(case: Case, device: torch.device, seed: int) -> Run:
    """`BNGD.step` twice, then replays of a CUDA graph in which it was captured."""
    return _Optimizing(case, device, seed, True).run_captured()


def more_arms(case: Case, device: torch.device, seed: int) -> dict[str, Callable[[], Run]]:
    """What must give the bits that `by_optimizer` with kernels gives, by name."""
    forms: Sequence[str] = FORMS
    found: dict[str, Callable[[], Run]] = {}
    if device.type == "cpu":
        # the interpreter runs one program after the other: the other form is the second run
        forms = [form for form in FORMS if form != (tuning_for(device).form or FORMS[0])]
    else:
        found["second run"] = functools.partial(by_optimizer, case, device, seed, fused=True)
    found |= {form: functools.partial(by_form, case, device, seed, form) for form in forms}
    # copies of what is not walked in place cannot be captured, and are refused
    if device.type == "cuda" and case["tensors"] == "large":
        found["CUDA graph"] = functools.partial(by_graph, case, device, seed)
    return found


class _Optimizing:
    """An optimizer over the tensors of a case, and what it kept so far."""

    def __init__(self, case: Case, device: torch.device, seed: int, fused: bool) -> None:
        self.case, self.device, self.seed = case, device, seed
        self.tuning: Tuning = tuning_for(device)
        self.placed = weights(case, self.tuning, device, seed)
        self.params = [Parameter(one.tensor) for one in self.placed]
        self.grads = empty_gradients(case, self.placed)
        self.options = Options(**case.options)
        self.optimizer = BNGD(self.params, fused=fused, **case.options)
        for param, grad in zip(self.params, self.grads):
            # torch checks dtype and strides only on assignment
            param.grad = torch.empty_like(param)
            param.grad.data = grad
        self.steps = [snapshots(self.optimizer.state, self.params, self.options)]

    def run(self) -> Run:
        for step in range(STEPS):
            self._step(step, self.optimizer.step)
        return self._done()

    def run_captured(self) -> Run:
        side, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(side):
            # the second repeats the first, as the captured one will
            for step in range(2):
                self._step(step, self.optimizer.step)
            with torch.cuda.graph(graph, stream=side):
                self.optimizer.step()
            for step in range(2, STEPS):
                self._step(step, graph.replay)
        torch.cuda.current_stream(self.device).wait_stream(side)
        return self._done()

    def _step(self, step: int, move: Callable[[], Any]) -> None:
        _fill(self.grads, gradients(self.case, self.tuning, step, self.seed))
        move()
        self.steps.append(snapshots(self.optimizer.state, self.params, self.options))

    def _done(self) -> Run:
        # parameters with a storage of their own have moved to flat buffers
        return Run(self.steps, self.optimizer.skipped, _overwritten(self.placed))


def _fill(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values):
        place.copy_(value)


def _overwritten(placed: Sequence[Placed]) -> int:
    return sum(one.overwritten() for one in placed)


def snapshots(
    state: Mapping[Tensor, Mapping[str, Tensor]], params: Sequence[Tensor], options: Options
) -> list[Snapshot]:
    """What is kept of parameters; state that is not there yet begins as the parameter, as zeros."""
    found = []
    for param in params:
        theta, entry = param.detach(), state.get(param, {})
        kept = {key: entry.get(key) for key in kept_keys(param, options)}
        master, momentum = kept.get(master_key(param)), kept.get(MOMENTUM)
        found.append(
            Snapshot(
                theta.cpu().clone(),
                widen(theta, master).cpu().clone(),
                None if momentum is None else momentum.cpu().clone(),
            )
        )
    return found


def kept_keys(param: Tensor, options: Options) -> list[str]:
    """Keys of the state that a step leaves for a parameter, but for windows."""
    keys = [MOMENTUM] if options.buffered else []
    if master_dtype(param, options.master_weights) is not None:
        keys.append(master_key(param))
    return keys

"""`verify_step`: one step of somebody's own model, held against the definition in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import is_served
from ..engine.collect import gather
from ..engine.step import inputs_of
from ..optimizer import BNGD
from ..options import Options
from ..state_dicts import named_parameters, names_in
from ..strict_json import nulls
from ..tensors import is_sharded
from .arms import kept_keys, snapshots
from .judge import step_errors
from .oracle import oracle_step

LossFunction = Callable[[nn.Module], Tensor]


class CheckedParameter(NamedTuple):
    """What a step did to one parameter.

    Attributes:
        name: as the optimizer was given it, else as the model names it.
        shape: of the parameter.
        dtype: of the parameter.
        path: ``"kernels"`` or ``"eager"``: which implementation served it.
        share: the largest error of parameter (its master, where it has one) and momentum, as a
            share of its bound in `verify.tolerances`; up to 1 is right.
        where: a sentence about the entry with that error.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str
    share: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound."""
        return self.share <= 1


@dataclass(frozen=True)
class StepReport:
    """What `verify_step` found; ``str`` gives a table.

    Attributes:
        loss: before the step.
        parameters: those that have a gradient, and any that moved without one.
        without_gradient: names of the others.
        skipped: slices that an inf or a NaN left as they were.
    """

    loss: float
    parameters: tuple[CheckedParameter, ...]
    without_gradient: tuple[str, ...]
    skipped: int

    @property
    def ok(self) -> bool:
        """Whether every parameter is within its bound."""
        return all(checked.ok for checked in self.parameters)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it: a share that is no finite number is None."""
        rows = [
            {**checked._asdict(), "dtype": _name(checked.dtype), "ok": checked.ok}
            for checked in self.parameters
        ]
        found: dict[str, Any] = nulls({"passed": self.ok, **vars(self), "parameters": rows})
        return found

    def __str__(self) -> str:
        lines = ["of bound  path     dtype     shape           name"]
        for checked in self.parameters:
            shape = " x ".join(map(str, checked.shape)) or "scalar"
            where = f"{checked.path:7}  {_name(checked.dtype):8}  {shape:14}  {checked.name}"
            lines.append(f"{checked.share:8.2f}  {where}")
        wrong = [checked for checked in self.parameters if not checked.ok]
        lines += [f"{checked.name}: {checked.where}" for checked in wrong]
        right = f"{len(self.parameters) - len(wrong)} of {len(self.parameters)}"
        lines.append(f"loss {self.loss:.6g}; {right} parameters within their bounds")
        if self.skipped:
            lines.append(f"slices with an inf or a NaN, left as they were: {self.skipped}")
        if self.without_gradient:
            lines.append(f"without a gradient: {', '.join(self.without_gradient)}")
        return "\n".join(lines)


def verify_step(model: nn.Module, optimizer: BNGD, loss_fn: LossFunction) -> StepReport:
    """Hold one step of a model against the definition in float64, parameter by parameter.

    Model and optimizer are copied, and the copies take the step: nothing of the caller's changes,
    the state of random number generators included. The definition (`verify.oracle`) is literal and
    runs on the CPU: a few seconds for four million entries, and a minute where they are a million
    rows. float64 parameters are held to the bounds of float32.

    Args:
        model: as it is trained, before or after any number of steps.
        optimizer: of its parameters.
        loss_fn: takes the model (a copy of `model`) and returns its loss on one batch, a scalar
            tensor.

    Returns:
        A report; its ``ok`` is the verdict.

    Raises:
        TypeError: `optimizer` is no BNGD.
        ValueError: model or optimizer cannot be copied; the loss is no scalar; no parameter of the
            optimizer has a gradient from it.
        NotImplementedError: micro-batches, gradient release and sharded parameters.
    """
    _check(optimizer)
    cuda = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    # which turns gradients on, too
    with torch.random.fork_rng(cuda), torch.inference_mode(False):
        model, optimizer = _copied(model, optimizer)
        names = _names(model, optimizer)
        optimizer.zero_grad()
        loss = loss_fn(model)
        if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
            raise ValueError(
                "loss_fn must return a scalar tensor that depends on the model's parameters, got "
                f"{loss!r}"
            )
        loss.backward()
    before = [_Before(optimizer, index, names) for index in range(len(optimizer.param_groups))]
    if not any(group.params for group in before):
        raise ValueError(
            "no parameter of the optimizer has a gradient: loss_fn must compute the loss with the "
            "model that it is given, whose parameters must be the optimizer's"
        )
    skipped = optimizer.skipped
    optimizer.step()
    checked = tuple(one for group in before for one in group.compare(optimizer))
    served = {one.name for one in checked}
    without = tuple(name for name in names.values() if name not in served)
    skipped = optimizer.skipped - skipped
    return StepReport(float(loss.detach()), checked, without, skipped)


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, BNGD):
        raise TypeError(f"optimizer must be a BNGD, got {type(optimizer).__name__}")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    refused = {
        "accumulation_steps > 1": any(g["accumulation_steps"] > 1 for g in optimizer.param_groups),
        "gradient release": optimizer._release is not None,
        "sharded parameters": any(map(is_sharded, params)),
    }
    for what, found in refused.items():
        if found:
            raise NotImplementedError(
                f"verify_step does not serve {what}; verify an optimizer of the same options "
                "without"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copied(model: nn.Module, optimizer: BNGD) -> tuple[nn.Module, BNGD]:
    try:
        return copy.deepcopy((model, optimizer))
    # whatever a model's own attributes raise
    except Exception as error:
        raise ValueError(
            "verify_step steps copies, and copy.deepcopy fails on this model and optimizer: "
            f"{error}. A model must not keep tensors of a forward pass (torch.nn.utils.weight_norm "
            "does, parametrizations.weight_norm does not), nor locks, files or processes"
        ) from error


def _names(model: nn.Module, optimizer: BNGD) -> dict[Tensor, str]:
    """The name of each parameter of the optimizer."""
    of_model, groups = names_in(model, optimizer), optimizer.param_groups
    return {
        param: own if "param_names" in groups[index] else of_model.get(own, own)
        for index, own, param in named_parameters(groups)
    }


class _Before:
    """One group of parameters before the step, and where the definition takes them."""

    def __init__(self, optimizer: BNGD, index: int, names: dict[Tensor, str]) -> None:
        group = optimizer.param_groups[index]
        self.options = Options.of(group)
        self.names = names
        self.params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        # what the step must leave alone
        self.others: list[tuple[Tensor, Tensor]] = [
            (param, param.detach().cpu().clone())
            for param in group["params"]
            if param.grad is None and is_served(param) and not param.is_meta
        ]
        self.fused = gather(optimizer, index, self.options, inputs_of(optimizer), ()).fused
        self.snapshots = snapshots(optimizer.state, self.params, self.options)
        self.target = oracle_step(
            [one.wide for one in self.snapshots],
            [param.grad for param in self.params],
            [one.momentum for one in self.snapshots],
            **{name: getattr(self.options, name) for name in oracle_step.__kwdefaults__ or ()},
        )

    def compare(self, optimizer: BNGD) -> Iterator[CheckedParameter]:
        """With what the step did."""
        after = snapshots(optimizer.state, self.params, self.options)
        rows = zip(self.params, self.fused, self.snapshots, after, *self.target)
        for param, fused, old, new, target, momentum in rows:
            errors = step_errors(old, new, target, momentum, self.options)
            worst = max(errors, key=lambda error: error.share)
            share, where = worst.share, worst.where
            kept = optimizer.state.get(param, {})
            lost = [key for key in kept_keys(param, self.options) if key not in kept]
            if lost:
                share, where = math.inf, f"the step left no {' and no '.join(lost)}"
            yield self._checked(param, "kernels" if fused else "eager", share, where)
        for param, before in self.others:
            now = param.detach().cpu()
            if not torch.equal(now.nan_to_num(), before.nan_to_num()):
                where = "has no gradient, and the step moved it"
                yield self._checked(param, "none", math.inf, where)

    def _checked(self, param: Tensor, path: str, share: float, where: str) -> CheckedParameter:
        name, shape = self.names[param], tuple(param.shape)
        return CheckedParameter(name, shape, param.dtype, path, share, where)

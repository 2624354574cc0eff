"""What `bngd verify` asks of a case, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.devices import tuning_for
from ..options import Options
from ..records import NARROW
from .arms import Run, Snapshot, by_optimizer, more_arms
from .cases import STEPS, Case
from .oracle import oracle_step
from .tensors import gradients
from .tolerances import step_bounds

# digits of a significand
_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True)
class Error:
    """How far parameters are from where the definition in float64 would have moved them.

    Attributes:
        ulp: the largest error, in units of the last place of what was added: parameter, sum or
            step (at least `lr`), whichever is largest. Rounding to nearest leaves half of one.
        share: the largest error as a share of its bound in `tolerances`, momentum included.
        where: a sentence about the latter.
    """

    ulp: float
    share: float
    where: str


@dataclass
class Result:
    """What a case showed.

    Attributes:
        case: its name.
        kernels: their error; None where they could not run.
        eager: the reference's.
        failures: sentences; none if all was as promised.
        bits: "equal" where kernels and reference must and do agree in every bit, "unequal" where
            they do not, "" where nothing is promised.
    """

    case: str
    kernels: Error | None = None
    eager: Error | None = None
    failures: list[str] = field(default_factory=list)
    bits: str = ""

    def bounded(self, name: str, error: Error) -> Error:
        """`error`, noted as a failure of an arm where it exceeds its bound."""
        if error.share > 1:
            self.failures.append(f"{name}: {error.where}")
        return error

    @property
    def share(self) -> float:
        """The larger share of a bound; infinite where there is none to be had."""
        errors = [one.share for one in (self.kernels, self.eager) if one is not None]
        return max(errors) if len(errors) == 2 else torch.inf


def judge(case: Case, device: torch.device, seed: int) -> Result:
    """Run a case in every way, and compare."""
    result = Result(case.name)
    arms: dict[str, Callable[[], Run]] = {
        "kernels": partial(by_optimizer, case, device, seed, fused=True),
        "reference": partial(by_optimizer, case, device, seed, fused=False),
        **more_arms(case, device, seed),
    }
    if case.unscaled is not None:
        other = partial(by_optimizer, case.unscaled, device, seed, fused=True)
        arms["run with gradients that are a power of two smaller or larger"] = other
    runs = {}
    for name, arm in arms.items():
        try:
            runs[name] = arm()
        # whatever a broken installation raises: the other cases are run all the same
        except Exception as error:
            result.failures.append(f"{name}: {type(error).__name__}: {error}".partition("\n")[0])
    for name, run in runs.items():
        if run.overwritten:
            result.failures.append(f"{name}: wrote to {run.overwritten} entries beside parameters")
    truth = _Truth(case, device, seed)
    kernels, reference = runs.pop("kernels", None), runs.pop("reference", None)
    if kernels is not None:
        result.kernels = result.bounded("kernels", truth.error(kernels))
    if reference is not None:
        result.eager = result.bounded("reference", truth.error(reference))
    if kernels is None or reference is None:
        return result
    if kernels.skipped != reference.skipped:
        counts = f"the kernels skipped {kernels.skipped} slices, the reference {reference.skipped}"
        result.failures.append(counts)
    if case.promises_bits:
        runs["reference"] = reference
        result.bits = "equal"
    for name, run in runs.items():
        different = _different(kernels, run)
        if different:
            result.failures.append(f"{name}: other bits than the kernels': {different}")
            if run is reference:
                result.bits = "unequal"
    return result


class _Truth:
    """The oracle's steps of a case, each from where a step of a run began: errors do not add up."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case = case
        self.grads = [gradients(case, tuning_for(device), step, seed) for step in range(STEPS)]
        # of each step: where the last run that was judged began, and where the oracle goes
        self.known: list[tuple[list[Tensor | None], Any] | None] = [None] * STEPS

    def error(self, run: Run) -> Error:
        """The largest of a run's errors, over all steps and tensors."""
        options = Options(**self.case.options)
        errors = [Error(0.0, 0.0, "")]
        for step, (before, after) in enumerate(pairwise(run.steps)):
            for old, new, target, momentum in zip(before, after, *self._targets(step, before)):
                for error in step_errors(old, new, target, momentum, options):
                    errors.append(replace(error, where=f"step {step + 1}, {error.where}"))
        worst = max(errors, key=lambda error: error.share)
        return replace(worst, ulp=max(error.ulp for error in errors))

    def _targets(self, step: int, before: Sequence[Snapshot]) -> Any:
        """Parameters and momenta after the step; runs that agree so far share them."""
        start = [one.wide for one in before] + [one.momentum for one in before]
        known = self.known[step]
        if known is None or not all(map(_same, known[0], start)):
            n = len(before)
            found = oracle_step(start[:n], self.grads[step], start[n:], **self.case.rule)  # type: ignore[arg-type]
            known = self.known[step] = start, found
        return known[1]


def step_errors(
    old: Snapshot, new: Snapshot, target: Tensor, momentum: Tensor | None, options: Options
) -> Iterator[Error]:
    """The errors of a parameter and of its momentum after one step.

    Args:
        old: before the step.
        new: after it.
        target: the oracle's parameter.
        momentum: the oracle's.
        options: of the step.
    """
    lr = float(options.lr)
    theta = old.wide.double()
    # a step of lr 0 moves nothing
    update = ((1 - lr * options.weight_decay) * theta - target) / (lr or 1.0)
    size = update.abs()
    if new.momentum is not None and momentum is not None:
        size = torch.maximum(size, momentum.abs())
    dtype = _bounded(new.wide.dtype)
    bounds = step_bounds(
        theta, target, size, dtype, lr, options.normalizer == "cdf",
        buffer=torch.float32 if new.momentum is None else _bounded(new.momentum.dtype),
        stochastic=options.master_weights == "stochastic" and dtype in NARROW,
    )  # fmt: skip
    # ghat is a difference of numbers of size 1
    scale = torch.stack([theta.abs(), target.abs(), lr * (1 + update.abs())]).amax(0)
    yield _compare("parameter", new.wide, target, bounds[0], _ulp(scale, dtype))
    if new.momentum is not None and momentum is not None:
        yield _compare("momentum", new.momentum, momentum, bounds[1])


def _bounded(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose bounds apply: float64 is held to float32's."""
    return torch.float32 if dtype is torch.float64 else dtype


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def _compare(
    what: str, got: Tensor, want: Tensor, bound: Tensor, ulp: Tensor | None = None
) -> Error:
    """Entry by entry; a NaN in `want` asks for one in `got`. `ulp` may be left out."""
    if not got.numel():
        return Error(0.0, 0.0, "")
    got, want = got.double(), want.double()
    error = (got - want).abs().nan_to_num(torch.inf)
    error = torch.where(got.isnan() & want.isnan() | (got == want), 0.0, error)
    share = torch.where(error == 0, 0.0, error / bound).nan_to_num(torch.inf, torch.inf).flatten()
    i = int(share.argmax())
    where = (
        f"{what} of shape {tuple(got.shape)}, entry {i}: {float(got.flatten()[i]):.9g}, not "
        f"{float(want.flatten()[i]):.9g}; {float(share[i]):.3g} times the bound"
    )
    ulps = torch.zeros_like(share) if ulp is None else torch.where(error == 0, 0.0, error / ulp)
    return Error(float(ulps.nan_to_num(torch.inf, torch.inf).max()), float(share[i]), where)


def _ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of two numbers of a dtype around `size`, float64."""
    exponent = torch.frexp(size).exponent
    least = torch.finfo(dtype).smallest_normal * 2.0 ** (1 - _BITS[dtype])
    return torch.ldexp(torch.ones_like(size), exponent - _BITS[dtype]).clamp(min=least)


def _different(one: Run, other: Run) -> str:
    """Where two runs do not agree in every bit; "" if they do."""
    # before the first step an optimizer has no state yet
    for step, (mine, theirs) in enumerate(zip(one.steps[1:], other.steps[1:]), 1):
        for a, b in zip(mine, theirs):
            for what, x, y in zip(Snapshot._fields, a, b):
                if x is None or y is None:
                    continue
                bits = [t.contiguous().view(-1).view(torch.uint8) for t in (x, y)]
                if not torch.equal(*bits):
                    shape = tuple(x.shape)
                    return f"{what} of shape {shape} after step {step}"
    if one.skipped != other.skipped:
        return f"{one.skipped} and {other.skipped} slices skipped"
    return ""

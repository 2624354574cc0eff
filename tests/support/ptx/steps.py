"""Whole steps by compiled kernels against the eager reference; each gives a list of complaints.

Runs in a process of its own, see `worker`. Gradients have exact statistics, so that both agree in
every bit, but where a case says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bngd_triton import reference
from bngd_triton.kernels import fused_step_
from bngd_triton.verify.tolerances import step_bounds
from support.exact_runs import bits
from support.ptx.driver import Machine
from support.ptx.execute import Schedule

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# who goes on when, and on how many processors
SCHEDULES = {
    "in order": (Schedule(), 1),
    "reversed": (Schedule("reversed"), 1),
    "random": (Schedule("random", resident=6), 3),
    "warps": (Schedule("random", resident=4, warps=True), 2),
}
# tiles of all five shapes, and spans of a slice
SHAPES = ((5000,), (12, 300), (16,), (17000,), (6, 16), (5, 1500), (2, 3000), (7, 20))
# no tiles: their kernel takes longest to compile; an odd length
LONG = ((9000,), (2, 8300), (17000,), (8195,), (2, 8200))
# of every kind: what is not finite, by tensor and place
POISON = ((0, 4999, "inf"), (1, 301, "nan"), (6, 2999, "-inf"))
LR = 1e-2


@dataclasses.dataclass(frozen=True)
class StepCase:
    """Steps of one list of tensors.

    Attributes:
        shapes: of the tensors.
        param: dtype of the parameters, like the next two.
        grad: see there.
        momentum: see there.
        master: "remainder", "copy", or none.
        offset: entries that lie before each tensor beyond an aligned place.
        exact: whether statistics are exact; else the package's tolerances apply.
        poison: tensor, entry and value of what is not finite in the first step.
        scale: what a `GradScaler` multiplied gradients by.
        found_inf: what it found, in the second step.
        steps: how many.
        wide: whether statistics are float64 lanes, else blocks of float32.
        hints: whether the caches are told what is read again.
        options: by name; by tensor, where they do not say otherwise.
    """

    shapes: tuple[tuple[int, ...], ...] = SHAPES
    param: torch.dtype = F32
    grad: torch.dtype = F32
    momentum: torch.dtype = F32
    master: str = ""
    offset: int = 0
    exact: bool = True
    poison: tuple[tuple[int, int, str], ...] = ()
    scale: float | None = None
    found_inf: float = 0.0
    steps: int = 2
    wide: bool = True
    hints: bool = True
    options: tuple[tuple[str, Any], ...] = ()


def exact_gradient(
    shape: Sequence[int], seed: int, dtype: torch.dtype, *, shuffled: bool = True
) -> Tensor:
    """1 and 3 times a power of two, half of each in every row, and a 2 where its length is odd.

    In order, blocks of float32 have exact statistics, too.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = shape[0] if len(shape) > 1 else 1
    n = torch.Size(shape).numel() // rows
    values = torch.tensor(([1, 3] * n)[:n])
    values[-1] += n % 2
    order = torch.rand(rows, n, generator=generator).argsort(1)
    if not shuffled:
        order = torch.arange(n).expand(rows, n)
    return (values[order] * 2.0 ** -(seed % 5)).view(tuple(shape)).to(dtype)


class Guarded:
    """Tensors inside larger buffers whose rest must not change; a guard of NaN must not be read."""

    def __init__(self, offset: int) -> None:
        self._before = 32 + offset
        self._whole: list[tuple[Tensor, int, float]] = []

    def __call__(self, values: Tensor, guard: float = 77) -> Tensor:
        n = values.numel()
        whole = torch.full((n + 64 + self._before,), guard, dtype=values.dtype)
        inside = whole[self._before : self._before + n]
        inside.copy_(values.flatten())
        self._whole.append((whole, n, guard))
        return inside.view(values.shape)

    def complaints(self) -> list[str]:
        for whole, n, guard in self._whole:
            outside = torch.cat([whole[: self._before], whole[self._before + n :]])
            if not ((outside == guard) | (outside.isnan() & (guard != guard))).all():
                return [f"written outside a tensor of {n} entries"]
        return []


def differing(
    name: str, ours: Sequence[Tensor] | None, theirs: Sequence[Tensor] | None
) -> list[str]:
    """Where two lists of tensors differ in a bit, NaN for NaN."""
    found = []
    for i, (a, b) in enumerate(zip(ours or (), theirs or ())):
        other = bits(a) != bits(b)
        if a.is_floating_point():
            other &= ~(a.isnan() & b.isnan())
        if other.any():
            found.append(f"{name} {i} {tuple(a.shape)}: {int(other.sum())} differ")
    return found


def prepare(machine: Machine, schedule: str, form: str, **more: bool) -> Any:
    """The tuning of a form, with more of its fields, and the machine's schedule set."""
    machine.schedule, machine.processors = SCHEDULES[schedule]
    machine.launched.clear()
    return dataclasses.replace(machine.tuning, form=form, **more)


def step(machine: Machine, case: StepCase, form: str, schedule: str) -> list[str]:
    """`fused_step_` and `reference.step_` on the same tensors."""
    tuning = prepare(machine, schedule, form, wide=case.wide, hints=case.hints)
    torch.manual_seed(0)
    inside = Guarded(case.offset)
    options = {"granularity": "tensor", **dict(case.options)}
    accumulated = options.get("accumulation_steps", 1)
    params = [inside(torch.randn(shape).to(case.param)) for shape in case.shapes]
    momenta = masters = windows = None
    if options.get("momentum") != 0.0 or accumulated > 1:
        momenta = [inside(torch.randn(shape).to(case.momentum)) for shape in case.shapes]
    if case.master == "remainder":
        masters = [
            inside(torch.randint(-3000, 3000, shape, dtype=torch.int16)) for shape in case.shapes
        ]
    elif case.master == "copy":
        masters = [inside(p.float() * (1 + 1e-5 * torch.randn(p.shape))) for p in params]
        for param, master in zip(params, masters):
            param.copy_(master)
    if accumulated > 1:
        by_row = options["granularity"] == "row"
        rows = [shape[0] if by_row and len(shape) > 1 else 1 for shape in case.shapes]
        windows = [inside(torch.zeros(n, dtype=torch.uint8)) for n in rows]
    ours = params, momenta, masters, windows
    theirs = [[t.clone() for t in tensors] if tensors else None for tensors in ours]
    complaints = []
    for k in range(case.steps):
        grads = []
        for i, shape in enumerate(case.shapes):
            values = torch.randn(shape) * 1e-3 + 5e-4
            if case.exact:
                values = exact_gradient(shape, 100 * k + i + 1, case.grad, shuffled=case.wide)
            grads.append(inside(values.to(case.grad), torch.nan))
        for i, place, value in case.poison if k == 0 else ():
            grads[i].view(-1)[place] = float(value)
        new = dict(options)
        if accumulated > 1:
            new["closing"] = (k + 1) % accumulated == 0
        if "rounding_key" in options:
            new["rounding_key"] += k
        if case.scale is not None:
            new["grad_scale"] = torch.tensor([case.scale])
            new["found_inf"] = torch.tensor([case.found_inf if k == 1 else 0.0])
            for grad in grads:
                grad *= case.scale
        before = [p.clone() for p in theirs[0]]
        want = reference.step_(
            theirs[0], grads, theirs[1], lr=LR, masters=theirs[2], windows=theirs[3], **new
        )
        got = fused_step_(
            params, grads, momenta, lr=LR, masters=masters, windows=windows, tuning=tuning, **new
        )
        if int(got) != int(want):
            complaints.append(f"step {k}: {int(got)} slices skipped, not {int(want)}")
        if not case.exact:
            complaints += _too_far(case, ours, theirs, before)
            break
    if case.exact:
        for name, mine, other in zip(("param", "momentum", "master", "window"), ours, theirs):
            complaints += differing(name, mine, other)
    for launched in machine.launched:
        if ("evict" in launched.compiled.asm["ptx"]) != case.hints:
            complaints.append(f"{launched.name} does not tell the caches what it is asked to")
    return complaints + inside.complaints()


def _too_far(case: StepCase, ours: Any, theirs: Any, before: Sequence[Tensor]) -> list[str]:
    """What differs by more than the tolerances after one step."""
    found = []
    cdf = dict(case.options).get("normalizer") == "cdf"
    nesterov = bool(dict(case.options).get("nesterov"))
    for i, (theta, param, want) in enumerate(zip(before, ours[0], theirs[0])):
        # Nesterov moves by up to as much again as momentum holds
        held = theirs[1][i].double() if theirs[1] else torch.ones_like(want).double() * 2
        bounds = step_bounds(
            theta.double(), want.double(), held * (1 + nesterov), case.param, LR, cdf,
            buffer=case.momentum, stochastic="rounding_key" in dict(case.options),
        )  # fmt: skip
        pairs = [("param", param, want, bounds[0])]
        if theirs[1]:
            pairs.append(("momentum", ours[1][i], theirs[1][i], bounds[1]))
        for name, a, b, bound in pairs:
            away = (a.double() - b.double()).abs() - bound
            if (away > 0).any():
                found.append(f"{name} {i}: {float(away.max()):.3g} beyond its tolerance")
    return found

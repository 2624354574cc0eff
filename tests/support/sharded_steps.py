"""Whole optimizers over sharded parameters, on 2 to 4 ranks: one start per world does everything.

Every rank is given its part of the same gradients, so that only the optimizer is compared with one
process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.debug import CommDebugMode

from bngd_triton import BNGD
from bngd_triton.eager.rounding import widen
from bngd_triton.options import Options
from bngd_triton.sharding import placements
from bngd_triton.state import WINDOW, master_of
from bngd_triton.tensors import local
from support.sharded_model import (
    SHAPES,
    Block,
    Parts,
    gradients,
    initial,
    like,
    mesh_of,
    parts,
    shard,
)
from support.sharded_statistics import global_rows

STEPS = 20
LR = 1e-2
F32, BF16 = torch.float32, torch.bfloat16
# one parameter group for each; all are stepped together
GROUPS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "tensor": (F32, {}),
    "row": (F32, {"granularity": "row", "nesterov": True, "weight_decay": 0.1}),
    "global": (F32, {"granularity": "global", "weight_decay": 0.1, "maximize": True}),
    "cdf": (F32, {"normalizer": "cdf", "momentum": 0.0}),
    "row without momentum": (F32, {"granularity": "row", "momentum": 0.0, "center_1d": True}),
    "bfloat16": (BF16, {"weight_decay": 0.1, "centering": 0.5}),
    "bfloat16 row": (BF16, {"granularity": "row", "momentum_dtype": BF16}),
    "bfloat16 global": (BF16, {"granularity": "global", "nesterov": True}),
    "float16": (torch.float16, {"normalizer": "cdf", "granularity": "row"}),
    "micro-batches": (F32, {"accumulation_steps": 2, "weight_decay": 0.1}),
    "micro-batches row": (BF16, {"accumulation_steps": 2, "granularity": "row"}),
}
LAYOUTS = {
    2: ("fsdp", "tp", "mixed"),
    3: ("fsdp", "mixed"),
    4: ("fsdp", "hsdp", "fsdp over tp"),
}
# the interpreter takes 0.1 s for a group's step: kernels take 20 steps once, elsewhere the two
# around the first NaN
LONG_FUSED = ("tensor", "bfloat16 row")
SHORT_FUSED = ("tensor", "bfloat16 row", "bfloat16 global", "micro-batches row")
ROUNDED = ("fsdp", "hsdp")
# mesh dimensions that cut slices
CUTTING = {"fsdp": 1, "hsdp": 1, "tp": 1, "mixed": 1, "fsdp over tp": 2}
GRANULARITIES = ("tensor", "row", "global")


class Group(NamedTuple):
    """What became of one group on one rank; lists run over its parameters."""

    indices: list[Tensor]
    # float32: masters where there are any
    values: list[Tensor]
    rows: list[Tensor]
    # mean, standard deviation and skips of the slices that this rank has
    statistics: list[Tensor]
    # whether state lies as its parameter does
    placed: bool


class Run(NamedTuple):
    """One optimizer through the same gradients."""

    layout: str
    fused: bool
    groups: tuple[str, ...] = tuple(GROUPS)
    steps: range = range(STEPS)


def runs(world: int) -> list[Run]:
    found = []
    for layout in LAYOUTS[world]:
        found.append(Run(layout, False))
        if (world, layout) == (3, "fsdp"):
            found.append(Run(layout, True, LONG_FUSED))
        elif layout != "fsdp":
            found.append(Run(layout, True, SHORT_FUSED, range(4, 6)))
    return found


APART = Run("fsdp", False, ("tensor", "bfloat16", "global"), range(2))


def made(run: Run, world: int) -> tuple[BNGD, dict[str, Parts]]:
    held = {name: parts(run.layout, world, GROUPS[name][0]) for name in run.groups}
    groups = [{"params": held[name].params, **GROUPS[name][1]} for name in run.groups]
    optimizer = BNGD(groups, lr=LR, fused=run.fused)
    for part in held.values():
        part.place(initial())
    return optimizer, held


def train(run: Run, world: int) -> dict[str, Group]:
    optimizer, held = made(run, world)
    for step in run.steps:
        for part in held.values():
            part.give(gradients(step))
        optimizer.step()
    return {name: outcome(optimizer, i, held[name]) for i, name in enumerate(run.groups)}


@torch.no_grad()
def outcome(optimizer: BNGD, index: int, part: Parts) -> Group:
    group = optimizer.param_groups[index]
    options = Options.of(group)
    stats = optimizer.grad_stats()
    values, rows, statistics, placed = [], [], [], True
    for i, param in enumerate(part.params):
        state = optimizer.state.get(param, {})
        master = master_of(state, param, options)
        values.append(widen(local(param), None if master is None else local(master)).float())
        one = stats[f"param_groups[{index}]['params'][{i}]"]
        statistics.append(torch.stack([one.mean, one.std, one.skipped], -1).view(-1, 3))
        by_row = options.granularity == "row" and param.dim() >= 2
        rows.append(global_rows(param) if by_row else torch.zeros(1).long())
        for key, tensor in state.items():
            if key == WINDOW:
                kind = DTensor if by_row and isinstance(param, DTensor) else Tensor
                placed &= type(tensor) is kind and local(tensor).numel() == len(rows[-1])
            else:
                placed &= type(tensor) is type(param.data)
                placed &= local(tensor).shape == local(param).shape
                placed &= getattr(tensor, "placements", 0) == getattr(param, "placements", 0)
        placed &= len(state) == options.buffered + (master is not None) + (WINDOW in state)
        placed &= (WINDOW in state) == (options.accumulation_steps > 1)
    return Group(part.indices, values, rows, statistics, placed)


def commands(layout: str, world: int) -> int:
    """Collectives of one step of all groups."""
    optimizer, held = made(Run(layout, False), world)
    for part in held.values():
        part.give(gradients(0))
    with CommDebugMode() as counter:
        optimizer.step()
    return counter.get_total_counts()


class Raised(NamedTuple):
    message: str
    unchanged: bool
    # after a good step that follows
    values: list[Tensor]


def raising(layout: str, world: int, granularity: str, fused: bool) -> Raised:
    """A NaN that one rank holds, under ``nonfinite="raise"``."""
    held = parts(layout, world, F32)
    optimizer = BNGD(
        held.params, lr=LR, granularity=granularity, nonfinite="raise", weight_decay=0.1,
        fused=fused,
    )  # fmt: skip
    held.place(initial())
    held.give(gradients(0))
    optimizer.step()
    before = snapshot(optimizer, held)
    held.give(gradients(5))
    message = ""
    try:
        optimizer.step()
    except FloatingPointError as error:
        message = str(error)
    after = snapshot(optimizer, held)
    held.give(gradients(1))
    optimizer.step()
    return Raised(message, all(map(torch.equal, before, after)), snapshot(optimizer, held))


@torch.no_grad()
def snapshot(optimizer: BNGD, held: Parts) -> list[Tensor]:
    tensors = [*held.params, *(t for state in optimizer.state.values() for t in state.values())]
    return [local(tensor).clone() for tensor in tensors]


class Scaled(NamedTuple):
    unchanged: bool
    scale: float
    values: list[Tensor]


def scaled(layout: str, world: int, fused: bool) -> Scaled:
    """A GradScaler's overflow that one rank holds, then a step without."""
    held = parts(layout, world, F32)
    optimizer = BNGD(held.params, lr=LR, weight_decay=0.1, fused=fused)
    held.place(initial())
    before = [local(param.detach()).clone() for param in held.params]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    unchanged = False
    for step in (5, 1):
        scale = float(scaler.scale(torch.ones(())))
        given = gradients(step)
        if step == 5:
            given = [grad.nan_to_num(torch.inf) for grad in given]
        held.give([grad * scale for grad in given])
        scaler.step(optimizer)
        scaler.update()
        if step == 5:
            after = [local(param.detach()) for param in held.params]
            unchanged = all(map(torch.equal, before, after))
    return Scaled(unchanged, scaler.get_scale(), snapshot(optimizer, held)[: len(SHAPES)])


def rounded(layout: str, world: int, fused: bool) -> tuple[int, Tensor]:
    """Equal entries with equal gradients, rounded stochastically: which shard this is, and it."""
    module = nn.Linear(16, 8 * world, bias=False, dtype=BF16)
    nn.init.ones_(module.weight)
    shard(module, layout, world)
    optimizer = BNGD(module.parameters(), lr=2.0**-10, master_weights="stochastic", fused=fused)
    for _ in range(3):
        module.weight.grad = like(module.weight, torch.ones_like(local(module.weight.detach())))
        optimizer.step()
    return placements.ordinal(module.weight), local(module.weight.detach()).clone()


def scaled_refused(world: int) -> tuple[str, bool]:
    """A GradScaler over a replicated parameter, then a sharded one; and the other way round."""
    mesh = mesh_of((world,))
    model = nn.ModuleDict({"replicated": Block(), "cut": Block()})
    distribute_module(model["replicated"], mesh)
    fully_shard(model["cut"], mesh=mesh)
    words = ""
    for first, second in (("cut", "replicated"), ("replicated", "cut")):
        params = [*model[first].parameters(), *model[second].parameters()]
        optimizer = BNGD(params, fused=False)
        for param in params:
            param.grad = torch.ones_like(param)
        before = [local(param.detach()).clone() for param in params]
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        try:
            scaler.step(optimizer)
        except RuntimeError as error:
            words = str(error)
        same = all(torch.equal(local(p.detach()), old) for p, old in zip(params, before))
        if first == "cut":
            assert not words
            assert not same
    return words, same


def refused(layout: str, world: int) -> str:
    held = parts(layout, world, F32)
    optimizer = BNGD(held.params, granularity="global", accumulation_steps=2)
    held.give(gradients(0))
    try:
        optimizer.step()
    except NotImplementedError as error:
        return str(error)
    return ""

"""Whole optimizers over sharded parameters, on 2 to 4 ranks: one start per world does everything.

Every rank is given its part of the same gradients, so that only the optimizer is compared with one
process.
"""

import functools
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.debug import CommDebugMode

from bngd_triton import BNGD
from bngd_triton.eager.rounding import widen
from bngd_triton.options import Options
from bngd_triton.sharding import exchange, placements
from bngd_triton.state import WINDOW, master_of
from bngd_triton.tensors import local
from support import processes
from support.sharded_model import Block, gradients, initial, like, mesh_of, parts, shard
from support.sharded_statistics import global_rows

STEPS = 20
LR = 1e-2
F32, BF16 = torch.float32, torch.bfloat16
# one parameter group for each; all are stepped together
GROUPS = {
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
LAYOUTS = {2: ("fsdp", "tp", "mixed"), 3: ("fsdp", "mixed"), 4: ("fsdp", "hsdp", "fsdp over tp")}
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


def runs(world):
    found = []
    for layout in LAYOUTS[world]:
        found.append(Run(layout, False))
        if (world, layout) == (3, "fsdp"):
            found.append(Run(layout, True, LONG_FUSED))
        elif layout != "fsdp":
            found.append(Run(layout, True, SHORT_FUSED, range(4, 6)))
    return found


APART = Run("fsdp", False, ("tensor", "bfloat16", "global"), range(2))


def made(run, world):
    held = {name: parts(run.layout, world, GROUPS[name][0]) for name in run.groups}
    groups = [{"params": held[name].params, **GROUPS[name][1]} for name in run.groups]
    optimizer = BNGD(groups, lr=LR, fused=run.fused)
    for part in held.values():
        part.place(initial())
    return optimizer, held


def train(run, world):
    optimizer, held = made(run, world)
    for step in run.steps:
        for part in held.values():
            part.give(gradients(step))
        optimizer.step()
    return {name: outcome(optimizer, i, held[name]) for i, name in enumerate(run.groups)}


@torch.no_grad()
def outcome(optimizer, index, part):
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


def commands(layout, world):
    """Collectives of one step of all groups."""
    optimizer, held = made(Run(layout, False), world)
    for part in held.values():
        part.give(gradients(0))
    with CommDebugMode() as counter:
        optimizer.step()
    return counter.get_total_counts()


def own(tensors):
    """Copies of what this rank holds."""
    return [local(tensor.detach()).clone() for tensor in tensors]


class Attempt(NamedTuple):
    """The error of a call, if there was one, and whether it left all tensors alone."""

    words: str
    unchanged: bool


def attempt(act, params, optimizer):
    tensors = [*params, *(t for state in optimizer.state.values() for t in state.values())]
    before, words = own(tensors), ""
    try:
        act()
    except (FloatingPointError, RuntimeError) as error:
        words = str(error)
    return Attempt(words, all(map(torch.equal, before, own(tensors))))


def start(layout, world, **options):
    held = parts(layout, world, F32)
    optimizer = BNGD(held.params, lr=LR, weight_decay=0.1, **options)
    held.place(initial())
    return optimizer, held


class Outcome(NamedTuple):
    """What was tried, and the values after a good step that follows."""

    tried: Attempt
    values: list[Tensor]


def raising(layout, world, granularity, fused):
    """A NaN that one rank holds, under ``nonfinite="raise"``."""
    options = {"granularity": granularity, "nonfinite": "raise"}
    optimizer, held = start(layout, world, fused=fused, **options)
    held.give(gradients(0))
    optimizer.step()
    held.give(gradients(5))
    tried = attempt(optimizer.step, held.params, optimizer)
    held.give(gradients(1))
    optimizer.step()
    return Outcome(tried, own(held.params))


def scaled(layout, world, fused):
    """A GradScaler's overflow that one rank holds, then a step without."""
    optimizer, held = start(layout, world, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    tried = []
    for step in (5, 1):
        scale = float(scaler.scale(torch.ones(())))
        held.give([grad.nan_to_num(torch.inf) * scale for grad in gradients(step)])
        tried.append(attempt(lambda: scaler.step(optimizer), held.params, optimizer))
        scaler.update()
    assert scaler.get_scale() == 4.0
    return Outcome(tried[0], own(held.params))


def rounded(layout, world, fused):
    """Equal entries with equal gradients, rounded stochastically: which shard this is, and it."""
    module = nn.Linear(16, 8 * world, bias=False, dtype=BF16)
    nn.init.ones_(module.weight)
    shard(module, layout, world)
    optimizer = BNGD(module.parameters(), lr=2.0**-10, master_weights="stochastic", fused=fused)
    for _ in range(3):
        module.weight.grad = like(module.weight, torch.ones_like(local(module.weight.detach())))
        optimizer.step()
    return placements.ordinal(module.weight), local(module.weight.detach()).clone()


def scaled_over(world, *order):
    """A GradScaler over replicated and sharded parameters, in an order."""
    mesh = mesh_of((world,))
    model = nn.ModuleDict({"replicated": Block(), "cut": Block()})
    distribute_module(model["replicated"], mesh)
    fully_shard(model["cut"], mesh=mesh)
    params = [param for name in order for param in model[name].parameters()]
    optimizer = BNGD(params, fused=False)
    for param in params:
        param.grad = torch.ones_like(param)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    return attempt(lambda: scaler.step(optimizer), params, optimizer)


def global_micro_batch(world):
    optimizer, held = start("fsdp", world, granularity="global", accumulation_steps=2)
    held.give(gradients(0))
    return attempt(optimizer.step, held.params, optimizer)


class Result(NamedTuple):
    """What one rank returns; keys are a layout and whether kernels were used, then as it says."""

    trained: dict[tuple[str, bool], dict[str, Group]]
    # without an exchange
    apart: dict[str, Group]
    commands: dict[str, int]
    raised: dict[tuple[str, bool, str], Outcome]
    scaled: dict[bool, Outcome]
    rounded: dict[tuple[str, bool], tuple[int, Tensor]]
    tried: dict[str, Attempt]


def visit(world):
    layouts, paths = LAYOUTS[world], (False, True)
    with mock.patch.object(exchange.Exchange, "run", lambda self, tables: list(tables)):
        apart = train(APART, world)
    raised = {
        (name, fused, how): raising(name, world, how, fused)
        for name in layouts
        for how in GRANULARITIES
        for fused in paths[: 1 + (name == layouts[-1] and how == "row")]
    }
    round_in = [(name, fused) for name in ROUNDED if name in layouts for fused in paths]
    return Result(
        {(run.layout, run.fused): train(run, world) for run in runs(world)},
        apart,
        {name: commands(name, world) for name in layouts},
        raised,
        {fused: scaled("fsdp", world, fused) for fused in paths},
        {(name, fused): rounded(name, world, fused) for name, fused in round_in},
        {
            "global micro-batches": global_micro_batch(world),
            "cut first": scaled_over(world, "cut", "replicated"),
            "replicated first": scaled_over(world, "replicated", "cut"),
        },
    )


@functools.cache
def tried(world):
    try:
        return processes.run(world, visit, world)
    except Exception as error:
        # a world that fails does so once, not for every test: ranks may wait long for each other
        return error


def visited(world):
    found = tried(world)
    if isinstance(found, Exception):
        raise found
    return found


@functools.cache
def alone(run):
    """The same in one process, on whole parameters, without kernels.

    Kernels finish a small whole tensor as a tile, whose statistics are float32.
    """
    return train(run._replace(layout="whole", fused=False), 1)

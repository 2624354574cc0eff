"""Statistics of sharded tensors against exact arithmetic on the whole tensor, on 2 to 4 ranks.

Every world starts once and exchanges all its cases together, as a step would.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple
from unittest import mock

import mpmath
import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from bngd_triton import distributed, exchange
from bngd_triton.exchange import Exchange, Share, local_table, merge

# float64 sums of a few hundred entries: some units of 2**-53, here in units of 1e-12
CLOSE = 1e-12
GRANULARITIES = ("tensor", "row", "global")


class Case(NamedTuple):
    """One sharded gradient. Without placements it is a plain tensor."""

    desc: str
    shape: tuple[int, ...]
    placements: tuple[Any, ...] | None
    mesh: tuple[int, ...]
    gradient: tuple[Any, ...] | None = None
    values: Callable[[Tensor], Tensor] = lambda x: x
    # whether torch's own DTensor statistics can be asked
    eager: bool = True


def _huge_and_tiny(x: Tensor) -> Tensor:
    """Squares of the first half overflow float64, those of the second half underflow."""
    scale = torch.where(torch.arange(x.numel()).view(x.shape) < x.numel() // 2, 1e200, 1e-200)
    return x.double() * scale


def _nan_in_last(x: Tensor) -> Tensor:
    x.view(-1)[-1] = torch.nan
    return x


def _inf_in_last(x: Tensor) -> Tensor:
    x.view(-1)[-1] = torch.inf
    return x


TWO = (2,)
THREE = (3,)
GRID = (2, 2)
R, S0, S1 = Replicate(), Shard(0), Shard(1)

CASES = {
    2: [
        Case("plain", (5, 3), None, TWO),
        Case("even", (8, 6), (S0,), TWO),
        Case("columns", (6, 8), (S1,), TWO),
        Case("uneven columns", (4, 5), (S1,), TWO),
        Case("empty columns", (4, 1), (S1,), TWO),
        Case("replicated", (4, 5), (R,), TWO),
        Case("partial gradient", (7, 5), (S0,), TWO, (Partial(),)),
        Case("partial gradient, replicated", (3, 5), (R,), TWO, (Partial(),)),
        Case("replicated gradient", (7, 5), (S0,), TWO, (R,)),
        Case("gradient in columns", (6, 4), (S0,), TWO, (S1,)),
        Case("float64", (6, 5), (S0,), TWO, values=lambda x: x.double()),
        Case("overflow", (6, 5), (S0,), TWO, values=lambda x: x.double() * 1e200, eager=False),
        Case("underflow", (6, 4), (S1,), TWO, values=lambda x: x.double() * 1e-200, eager=False),
        Case("both ends", (6, 5), (S0,), TWO, values=_huge_and_tiny, eager=False),
        Case("nothing", (0, 5), (S0,), TWO, eager=False),
        Case("bfloat16", (9, 5), (S0,), TWO, values=lambda x: x.bfloat16()),
        Case("far from 0", (9, 5), (S0,), TWO, values=lambda x: x + 1e4),
        Case("equal", (9, 5), (S0,), TWO, values=lambda x: torch.full_like(x, 0.1)),
        Case("zero", (9, 5), (S0,), TWO, values=torch.zeros_like),
    ],
    3: [
        Case("plain", (5, 3), None, THREE),
        Case("uneven", (10, 7), (S0,), THREE),
        Case("an empty rank", (2, 9), (S0,), THREE),
        Case("two empty ranks", (1, 4), (S0,), THREE),
        Case("many entries", (64, 33), (S0,), THREE),
        Case("vector", (5,), (S0,), THREE),
        Case("0-d", (), (R,), THREE),
        Case("one entry", (1,), (S0,), THREE),
        Case("convolution", (4, 5, 3, 2), (S0,), THREE),
        Case("convolution, input channels", (4, 5, 3, 2), (S1,), THREE),
        Case("last dimension", (4, 3, 5), (Shard(2),), THREE),
        Case("empty columns", (5, 2), (S1,), THREE),
        Case("first rank empty-handed", (3, 2), (S1,), THREE, (Partial(),)),
        Case("equal, empty ranks", (2, 3), (S0,), THREE, values=lambda x: torch.full_like(x, 0.1)),
        Case("float64, empty ranks", (2, 9), (S0,), THREE, values=_huge_and_tiny, eager=False),
    ],
    4: [
        Case("plain", (5, 3), None, GRID),
        Case("on a line of four", (10, 3), (S0,), (4,)),
        Case("hybrid", (7, 5), (R, S0), GRID),
        Case("hybrid, columns", (5, 7), (R, S1), GRID),
        Case("outer only", (7, 5), (S0, R), GRID),
        Case("replicated twice", (3, 2), (R, R), GRID),
        Case("rows and columns", (7, 5), (S0, S1), GRID),
        Case("columns and rows", (7, 5), (S1, S0), GRID),
        Case("rows twice", (9, 5), (S0, S0), GRID, eager=False),
        Case("rows twice, ranks empty", (2, 5), (S0, S0), GRID, eager=False),
        Case("columns twice", (5, 9), (S1, S1), GRID, eager=False),
        Case("columns twice, ranks empty", (5, 3), (S1, S1), GRID, eager=False),
        Case("partial gradient, hybrid", (7, 5), (R, S0), GRID, (Partial(), S0)),
        Case("vector", (7,), (S0, R), GRID),
        Case("float64", (7, 5), (S0, S1), GRID, values=_huge_and_tiny, eager=False),
    ],
}
# not in the global slice of the others, which they would spoil
SPOILT = {
    world: [
        Case("nan on the last rank", (10, 7), (S0,), (world,), values=_nan_in_last, eager=False),
        Case("inf on the last rank", (10, 7), (S1,), (world,), values=_inf_in_last, eager=False),
    ]
    for world in CASES
}
WORLDS = sorted(CASES)
IDS = [(world, case) for world in WORLDS for case in CASES[world] + SPOILT[world]]


def whole(case: Case) -> Tensor:
    """The whole gradient: its mean drifts, so that parts have means of their own."""
    generator = torch.Generator().manual_seed(len(case.desc) + 97 * len(case.shape))
    x = torch.randn(case.shape, generator=generator)
    drift = torch.arange(x.numel(), dtype=torch.float32).view(case.shape)
    return case.values(x + 0.25 * drift)


class Result(NamedTuple):
    """What one rank found about one tensor; the lists have an item per local slice."""

    n: int
    counted: list[float]
    mean: list[float]
    std: list[mpmath.mpf]
    least: list[float]
    greatest: list[float]
    table: Tensor
    rows: Tensor
    share: dict[str, Any]


class Collective(NamedTuple):
    name: str
    ranks: int
    sent: int
    received: int


class World(NamedTuple):
    """What one rank returns."""

    results: dict[tuple[str, str], Result]
    collectives: dict[str, list[Collective]]
    commands: dict[str, int]
    reads: int
    eager: dict[str, tuple[float, float]]
    placed: dict[str, bool]
    gradients: dict[str, Tensor]
    refusals: dict[str, str]


class HostReads(TorchDispatchMode):
    """Counts values read on the host, each of which would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _recorded(log: list[Collective]) -> Any:
    """Records what goes through the collectives that an exchange may use."""

    def wrap(name: str, original: Any) -> Any:
        def call(output: Tensor, given: Tensor, group: Any) -> Any:
            log.append(
                Collective(name, dist.get_world_size(group), given.nbytes, output.nbytes)
            )
            return original(output, given, group=group)

        return call

    names = ("all_gather_into_tensor", "all_to_all_single")
    return mock.patch.multiple(dist, **{name: wrap(name, getattr(dist, name)) for name in names})

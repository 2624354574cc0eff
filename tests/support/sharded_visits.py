"""All that a test asks of sharded steps, by one start of the ranks."""

from __future__ import annotations

import functools
from typing import NamedTuple
from unittest import mock

from torch import Tensor

from bngd_triton.sharding import exchange
from support import processes
from support.sharded_steps import (
    APART,
    GRANULARITIES,
    LAYOUTS,
    ROUNDED,
    Group,
    Raised,
    Run,
    Scaled,
    commands,
    raising,
    refused,
    rounded,
    runs,
    scaled,
    scaled_refused,
    train,
)


class Result(NamedTuple):
    """What one rank returns; keys are a layout and whether kernels were used, then as it says."""

    trained: dict[tuple[str, bool], dict[str, Group]]
    # without an exchange
    apart: dict[str, Group]
    commands: dict[str, int]
    raised: dict[tuple[str, bool, str], Raised]
    scaled: dict[bool, Scaled]
    rounded: dict[tuple[str, bool], tuple[int, Tensor]]
    refused: str
    scaled_refused: tuple[str, bool]


def visit(world: int) -> Result:
    layouts, paths = LAYOUTS[world], (False, True)
    with mock.patch.object(exchange.Exchange, "run", lambda self, tables: list(tables)):
        apart = train(APART, world)
    return Result(
        {(run.layout, run.fused): train(run, world) for run in runs(world)},
        apart,
        {name: commands(name, world) for name in layouts},
        {
            (name, fused, how): raising(name, world, how, fused)
            for name in layouts
            for how in GRANULARITIES
            for fused in paths[: 1 + (name == layouts[-1] and how == "row")]
        },
        {fused: scaled("fsdp", world, fused) for fused in paths},
        {
            (name, fused): rounded(name, world, fused)
            for name in ROUNDED
            if name in layouts
            for fused in paths
        },
        refused("fsdp", world),
        scaled_refused(world),
    )


@functools.cache
def tried(world: int) -> list[Result] | Exception:
    try:
        return processes.run(world, visit, world)
    except Exception as error:
        # a world that fails does so once, not for every test: ranks may wait long for each other
        return error


def visited(world: int) -> list[Result]:
    found = tried(world)
    if isinstance(found, Exception):
        raise found
    return found


@functools.cache
def alone(run: Run) -> dict[str, Group]:
    """The same in one process, on whole parameters, without kernels.

    Kernels finish a small whole tensor as a tile, whose statistics are float32.
    """
    return train(run._replace(layout="whole", fused=False), 1)

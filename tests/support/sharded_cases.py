"""Sharded gradients on 2 to 4 ranks: which are tried, and together with which."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard


class Case(NamedTuple):
    """One sharded gradient. Without placements it is a plain tensor."""

    desc: str
    shape: tuple[int, ...]
    placements: tuple[Any, ...] | None
    mesh: tuple[int, ...]
    gradient: tuple[Any, ...] | None = None
    values: Callable[[Tensor], Tensor] = lambda x: x


def _huge_and_tiny(x):
    """Squares of the first half overflow float64, those of the second half underflow."""
    scale = torch.full(x.shape, 1e-200, dtype=torch.float64)
    scale.view(-1)[: x.numel() // 2] = 1e200
    return x.double() * scale


def _with_last(value):
    def change(x):
        x.view(-1)[-1] = value
        return x

    return change


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
        Case("overflow", (6, 5), (S0,), TWO, values=lambda x: x.double() * 1e200),
        Case("underflow", (6, 4), (S1,), TWO, values=lambda x: x.double() * 1e-200),
        Case("both ends", (6, 5), (S0,), TWO, values=_huge_and_tiny),
        Case("nothing", (0, 5), (S0,), TWO),
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
        Case("partial gradient, an empty rank", (3, 2), (S1,), THREE, (Partial(),)),
        Case("equal, empty ranks", (2, 3), (S0,), THREE, values=lambda x: torch.full_like(x, 0.1)),
        Case("float64, empty ranks", (2, 9), (S0,), THREE, values=_huge_and_tiny),
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
        Case("rows twice", (9, 5), (S0, S0), GRID),
        Case("rows twice, ranks empty", (2, 5), (S0, S0), GRID),
        Case("columns twice", (5, 9), (S1, S1), GRID),
        Case("columns twice, ranks empty", (5, 3), (S1, S1), GRID),
        Case("partial gradient, hybrid", (7, 5), (R, S0), GRID, (Partial(), S0)),
        Case("vector", (7,), (S0, R), GRID),
        Case("float64", (7, 5), (S0, S1), GRID, values=_huge_and_tiny),
    ],
}
# one entry of the last rank is not finite
SPOILT = {
    world: [
        Case("nan on the last rank", (10, 7), (S0,), (world,), values=_with_last(torch.nan)),
        Case("inf on the last rank", (7, 10), (S1,), (world,), values=_with_last(torch.inf)),
    ]
    for world in CASES
}
WORLDS = sorted(CASES)


def _every(_):
    return True


# what is exchanged together: granularity, then whether a case takes part
RUNS = {
    "tensor": ("tensor", _every),
    "row": ("row", _every),
    "global": ("global", lambda case: bool((whole(case).abs() < 1e30).all())),
    "global, extreme": ("global", lambda case: bool(whole(case).isfinite().all())),
    "global, spoilt": ("global", _every),
    "dealt out": ("tensor", _every),
    "rows dealt out": ("row", _every),
}


def whole(case):
    """The whole gradient: its mean drifts, so that parts have means of their own."""
    generator = torch.Generator().manual_seed(len(case.desc) + 97 * len(case.shape))
    x = torch.randn(case.shape, generator=generator)
    drift = torch.arange(x.numel(), dtype=torch.float32).view(case.shape)
    return case.values(x + 0.25 * drift)

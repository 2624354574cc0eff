"""The tensors and gradients of a case of `bngd verify`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.devices import Tuning
from ..kernels.tables import SHAPES_OF_TILES
from .cases import Case

# entries before and after a tensor that lies in a larger buffer; 64 bytes or more, so that the
# tensor is aligned where it starts right after them
_GUARD = 32
# what random values are drawn as, whatever torch's defaults
_DRAWN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
# parameters' guards, which a stray write changes; those of gradients are NaN, which a stray read
# spreads
_MARK = 77.0
# how the tensors of a set lie, in turn
_WAYS = {
    "tiny": ("own", "inside", "unaligned"),
    "borders": ("own", "unaligned"),
    "large": ("own",),
}
_LAYOUTS = (
    ((12, 10), "transposed"),
    ((2, 4, 3, 5), "channels_last"),
    ((3, 4, 5), "permuted"),
    ((8, 9), "gaps"),
    ((7, 33), "rows apart"),
    ((100,), "unaligned"),
    ((5, 16), "unaligned"),
    ((300,), "inside"),
    ((90, 70), "transposed"),
)


class Placed(NamedTuple):
    """A tensor, and how it lies in which buffer; None if it has a storage of its own."""

    tensor: Tensor
    way: str
    buffer: Tensor | None = None

    def overwritten(self) -> int:
        """How many entries of the buffer beside the tensor have changed."""
        if self.buffer is None:
            return 0
        outside = torch.ones_like(self.buffer, dtype=torch.bool)
        view = self.tensor
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        return int((self.buffer[outside] != _MARK).sum())


def shapes(case: Case, tuning: Tuning) -> list[tuple[tuple[int, ...], str]]:
    """The shapes of a case, each with how it lies in memory, for these sizes of work items."""
    kind = case["tensors"]
    if kind == "layouts":
        return list(_LAYOUTS)
    if kind == "tiny":
        found: list[tuple[int, ...]] = [(), (1,), (2,), (0,), (3,), (17,), (257,), (1, 1), (3, 0)]
        found += [(5, 7), (4, 16), (2, 3, 4, 5)]
    elif kind == "borders":
        # a row is in a tile of as many such rows as `tile` holds
        longest = [tuning.tile // rows for rows in SHAPES_OF_TILES]
        found = [shape for n in longest for shape in ((2, n), (1, n + 1))]
        found += [(tuning.tile - 1,), (tuning.tile,), (tuning.tile + 17,), (tuning.block + 17,)]
        found += [(tuning.span,), (tuning.span + 1,)]
    else:
        found = [(2 * tuning.span + 17,), (2, tuning.span + 5), (40, 30)]
    ways = _WAYS[kind]
    return [(shape, ways[i % len(ways)]) for i, shape in enumerate(found)]


def place(values: Tensor, way: str, guard: float = _MARK) -> Placed:
    """A copy of `values` that lies in memory in a certain way."""
    shape = values.shape
    if way == "own":
        return Placed(values.clone(memory_format=torch.contiguous_format), way)
    start = _GUARD + (way == "unaligned")
    like = torch.empty(shape, dtype=values.dtype, device="meta")
    if way == "channels_last":
        like = like.to(memory_format=torch.channels_last)
    elif way in ("transposed", "permuted"):
        # the last dimension outermost
        like = like.new_empty((shape[-1], *shape[:-1])).movedim(0, -1)
    strides = like.stride()
    if way == "gaps":
        strides = tuple(2 * stride for stride in strides)
    elif way == "rows apart":
        strides = (strides[0] + 3, *strides[1:])
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    length = start + max(extent, 0) + _GUARD
    buffer = torch.full((length,), guard, dtype=values.dtype, device=values.device)
    return Placed(buffer.as_strided(shape, strides, start).copy_(values), way, buffer)


def weights(case: Case, tuning: Tuning, device: torch.device, seed: int) -> list[Placed]:
    """The parameters of a case, before its first step."""
    generator = torch.Generator().manual_seed(seed)
    placed = []
    for shape, way in shapes(case, tuning):
        values = torch.randn(shape, generator=generator, **_DRAWN)
        placed.append(place(values.to(device, case.dtypes[0]), way))
    return placed


def empty_gradients(case: Case, params: list[Placed]) -> list[Tensor]:
    """Where gradients are written: as the parameters lie, but for every third tensor."""
    found = []
    others = {"transposed": "inside", "inside": "unaligned"}
    for i, (param, way, _) in enumerate(params):
        values = torch.zeros(param.shape, dtype=case.dtypes[1], device=param.device)
        found.append(place(values, others.get(way, way) if i % 3 == 2 else way, torch.nan).tensor)
    return found


# every arm of a case asks for the same ones
@functools.lru_cache(maxsize=8)
def gradients(case: Case, tuning: Tuning, step: int, seed: int) -> list[Tensor]:
    """The gradients of one step, on the CPU, of the gradients' dtype; not to be written.

    Args:
        case: says of what kind.
        tuning: as for `shapes`.
        step: from 0 on; the second has the infinities and NaN of a case with such.
        seed: of the run.
    """
    kind, dtype = case["gradients"], case.dtypes[1]
    generator = torch.Generator().manual_seed((seed * 1000 + step + 1) % 2**63)
    found = []
    for i, (shape, _) in enumerate(shapes(case, tuning)):
        # multiples of 2**-12: a power of two times them is exact where it is in range
        values = torch.randn(shape, generator=generator, **_DRAWN)
        values = (values + 0.5).mul(4096).round().div(4096)
        flat = values.view(-1)
        if kind == "steep":
            values = values + 1000
        elif kind in ("exploding", "vanishing"):
            # 2**100 is 1.3e30; float16 ends at 6.5e4 and has 10 bits below 6e-5
            power = 10 if dtype is torch.float16 else 100
            values = values.to(dtype).float() * 2.0 ** (power if kind == "exploding" else -power)
        elif kind == "constant":
            values = torch.full(shape, 0.375 * (step + 1), **_DRAWN)
        elif kind == "zeros":
            values = torch.zeros(shape, **_DRAWN)
        elif kind == "spike":
            values = torch.zeros(shape, **_DRAWN)
            values.view(-1)[-1:] = 1.0
        elif kind == "exact":
            values = _exact(shape, generator)
        elif step == 1 and i % 2 == 0 and kind in ("inf", "nan"):
            # where a missed tail would hide it
            flat[-1:] = float(kind)
        found.append(values.to(dtype))
    return found


def _exact(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows whose mean is 2: entries 1 and 3, as many of each, and a 2 where their number is odd."""
    rows = shape[0] if len(shape) > 1 else 1
    n = torch.Size(shape).numel() // max(rows, 1)
    row = torch.tensor([1.0, 3.0] * (n // 2) + [2.0] * (n % 2), **_DRAWN)
    order = torch.rand(rows, n, generator=generator, **_DRAWN).argsort(1)
    return row.expand(rows, n).gather(1, order).reshape(shape)

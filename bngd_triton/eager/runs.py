"""Which tensors of a step are worked on together, as matrices whose rows are slices.

A large tensor is walked where it lies, block by block; small ones of one shape are stacked, since
twenty operations of torch on each would take as long as on a block of 4000 entries. What cannot be
seen as a matrix without a copy is stacked alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Options
from ..records import StepTensor, slices_of
from ..tensors import dispatches, same_order, walked_in_place
from .scratch import Scratch, entries_of_a_block

# entries up to which tensors of one shape are stacked: three copies in and two out, of 1 us each
# for 4096, in the place of twenty operations of 1 us
SMALL = 2**13


class Run(NamedTuple):
    """Tensors of one kind that are worked on together.

    Attributes:
        places: of the tensors in the step's list, in order.
        slices: of each of them.
        columns: entries of a slice.
        in_place: whether its one tensor is walked where it lies; else copies are worked on.
        each: of how many tensors at a time.
        limit: entries of a block.
    """

    places: list[int]
    slices: int
    columns: int
    in_place: bool
    each: int
    limit: int

    @property
    def parts(self) -> int:
        """How many blocks a slice is cut in."""
        return -(-self.columns // self.limit)

    def rows_of_blocks(self) -> list[int]:
        """How many slices each block has, or each run of blocks that one slice is cut in."""
        sizes = []
        for stack in self.stacks(self.places):
            rows = self.slices * len(stack)
            step = max(1, self.limit // max(1, self.columns))
            sizes += [step] * (rows // step) + [rows % step] * (rows % step > 0)
        return sizes

    def stacks(self, tensors: list[Any]) -> Iterator[list[Any]]:
        """The tensors, or something of each, that are worked on at a time."""
        return (tensors[i : i + self.each] for i in range(0, len(tensors), self.each))

    def matrix(self, name: str, several: list[Any], scratch: Scratch) -> Any:
        """Tensors of one kind in a stack, a row to a slice; None where there are none."""
        first = several[0]
        if first is None:
            return None
        if self.in_place:
            return in_memory_order(first, self.slices)
        if len(several) == 1:
            return first.reshape(self.slices, self.columns)
        shape = (len(several), *first.shape)
        # not where `update_` has its temporaries
        room = scratch.room(f"stacked {name}", shape, first.dtype, first.device)
        return torch.stack(several, out=room).view(-1, self.columns)


def in_memory_order(tensor: Tensor, slices: int) -> Tensor:
    """A matrix of a tensor that `walked_in_place`: a row to a slice, as a view."""
    columns = tensor.numel() // slices
    if tensor.is_contiguous():
        return tensor.view(slices, columns)
    return tensor.as_strided((slices, columns), (columns, 1))


def kind_of(place: int, tensor: StepTensor) -> object:
    """What tensors must share to be stacked; a number for one that is worked on alone."""
    param = tensor.param
    others = (tensor.grad, tensor.momentum, tensor.master)
    if not 0 < param.numel() <= SMALL or dispatches(param):
        return place
    if any(other is not None and dispatches(other) for other in others):
        return place
    dtypes = tuple(None if other is None else other.dtype for other in others)
    return (param.shape, param.dtype, param.device, dtypes)


def run_of(places: list[int], tensor: StepTensor, options: Options) -> Run:
    """What tensors of one kind are worked on as; `tensor` is the first of them."""
    param = tensor.param
    slices = slices_of(param.shape, options.granularity)
    columns = param.numel() // slices if slices else 0
    others = [t for t in (tensor.grad, tensor.momentum, tensor.master) if t is not None]
    in_place = (
        len(places) == 1
        and param.numel() > 0
        and not any(map(dispatches, (param, *others)))
        and walked_in_place(param, slices)
        and all(same_order(other, param) and not other.is_neg() for other in others)
    )
    limit = entries_of_a_block(param)
    return Run(places, slices, columns, in_place, max(1, limit // max(1, param.numel())), limit)


def arithmetic_of(tensor: StepTensor) -> torch.dtype:
    """The dtype of the arithmetic: at least float32."""
    wide = torch.promote_types(tensor.param.dtype, torch.float32)
    return wide if tensor.grad is None else torch.promote_types(wide, tensor.grad.dtype)

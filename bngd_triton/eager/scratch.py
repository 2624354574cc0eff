"""Blocks of matrices that stay in a core's cache, and room for what is made of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tensors import dispatches

# entries of a block on the CPU: its temporaries, 3.5 MB, stay in the core's caches, and twenty
# operations of 10 us each outweigh the microsecond that torch takes to start one
BLOCK = 2**17


def entries_of_a_block(tensor: Tensor) -> int:
    """How many entries are worked on at a time.

    On the CPU a block's temporaries stay in its caches, which is several times faster; a GPU takes
    the whole tensor, since every block would cost launches.
    """
    return BLOCK if tensor.device.type == "cpu" else max(1, tensor.numel())


def cut(matrix: Tensor, limit: int) -> list[Tensor]:
    """Blocks of at most `limit` entries: some rows, or a part of one; in order, as views."""
    rows, columns = matrix.shape
    if columns <= limit:
        step = max(1, limit // columns)
        return [matrix] if rows <= step else list(matrix.split(step))
    if rows == 1:
        return list(matrix.split(limit, 1))
    return [part for row in matrix.split(1) for part in row.split(limit, 1)]


class Scratch:
    """Room that is used again and again: one buffer for each name and dtype."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def room(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Room of a shape, which the next of its name and dtype will take."""
        view = self._views.get((name, dtype, shape))
        if view is None:
            buffer, size = self._buffers.get((name, dtype)), math.prod(shape)
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device=device)
                self._buffers[name, dtype] = buffer
            view = self._views[name, dtype, shape] = buffer[:size].view(shape)
        return view

    def like(self, name: str, block: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Room of a block's shape; None for a tensor class that makes its own results."""
        return None if dispatches(block) else self.room(name, block.shape, dtype, block.device)

    def copy(self, name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
        """A block in another dtype, in room that the next of its name will take."""
        room = self.like(name, block, dtype)
        return block.to(dtype, copy=True) if room is None else room.copy_(block)

"""The work list of the single-launch step: the tables of a batch, in an order that cannot deadlock.

    S(w0) T.. S(w1) U(w0) S(w2) U(w1) ... U(wn)

A *wave* is a run of segments: a wave's slices (S), the next wave's slices, then its chunks (U).
Programs that draw the last slices of a wave have another wave to read before anyone has to wait,
and a gradient is read again when at most two waves have gone by. Tiles (T) depend on nothing: they
fill the wait of a list with one wave. Within a segment the newest chunk comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLICE_ITEM, TILE_ITEM, CHUNK_ITEM = 0, 1, 2
# columns of an item: its kind, then up to five of its table
ITEM = 6


class Work(NamedTuple):
    """What one launch does for a batch, on the device.

    Attributes:
        items: int64 [n, 6]: kind, then the item's row of the slices, tiles or chunks.
        counters: int32 [1 + segments]: the ticket, and a flag for each segment from
            `first_segment` on; zero between launches.
        first_segment: the least segment of the batch.
    """

    items: Tensor
    counters: Tensor
    first_segment: int


def lay_out(slices: Tensor, tiles: Tensor, chunks: Tensor, wave: int) -> Work:
    """Order a batch's work.

    Args:
        slices: int64 [slices, 5], the segment last.
        tiles: int64 [tiles, 5].
        chunks: int64 [chunks, 4], the segment last; ascending within a segment.
        wave: elements of gradient in a wave. A segment that starts in the k-th run of so many
            elements is in wave k, so waves are longer by less than their last segment.
    """
    device = slices.device
    slices, tiles, chunks = slices.cpu(), tiles.cpu(), chunks.cpu()
    # the tensors of a global group need not be neighbours in the tables
    slices = slices[slices[:, -1].argsort(stable=True)]
    chunks = chunks.flip(0)
    chunks = chunks[chunks[:, -1].argsort(stable=True)]
    first = int(slices[0, -1]) if len(slices) else 0
    n_segments = int(slices[-1, -1]) - first + 1 if len(slices) else 0
    sizes = slices.new_zeros(n_segments)
    sizes.index_add_(0, slices[:, -1] - first, slices[:, 2])
    waves = ((sizes.cumsum(0) - sizes) // wave)[slices[:, -1] - first]
    # a segment longer than a wave leaves numbers out
    waves = waves.unique_consecutive(return_inverse=True)[1]
    wave_of = slices.new_zeros(n_segments)
    wave_of[slices[:, -1] - first] = waves

    tables = ((SLICE_ITEM, slices), (TILE_ITEM, tiles), (CHUNK_ITEM, chunks))
    items = slices.new_zeros(sum(len(table) for _, table in tables), ITEM)
    at = 0
    for kind, table in tables:
        items[at : at + len(table), 0] = kind
        items[at : at + len(table), 1 : 1 + table.shape[1]] = table
        at += len(table)
    # S(w) at 2 w, T at 1 behind S(w0), U(w) at 2 w + 3 behind S(w + 1)
    turn = torch.cat(
        [
            2 * waves,
            tiles.new_ones(len(tiles)),
            2 * wave_of[chunks[:, -1] - first] + 3,
        ]
    )
    return Work(
        items=items[turn.argsort(stable=True)].to(device),
        counters=torch.zeros(1 + n_segments, dtype=torch.int32, device=device),
        first_segment=first,
    )

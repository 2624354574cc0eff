"""The work list of the single-launch step: the tables of a batch, in an order that cannot deadlock.

    S(w0) S(w1) U(w0) S(w2) U(w1) ... U(wn)

A *wave* is a run of slices: a wave's spans (S), the next wave's spans, then its chunks (U).
Programs that draw the last spans of a wave have another wave to read before anyone has to wait,
and a gradient is read again when at most two waves have gone by. Within a slice the newest chunk
comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tables import (  # isort: skip
    CHUNK_ITEM, CHUNK_SLICE, ITEM_COLUMNS, ITEM_KIND, ITEM_ROW, SPAN_ITEM, SPAN_LENGTH, SPAN_SLICE,
)  # fmt: skip


class Work(NamedTuple):
    """What one launch does for a batch, on the device.

    Attributes:
        items: int64 [n, ITEM_COLUMNS].
        counters: int32 [1 + slices]: the ticket, and a flag for each slice from
            `first_slice` on; zero between launches.
        first_slice: the least slice of the batch that has spans.
    """

    items: Tensor
    counters: Tensor
    first_slice: int


def lay_out(spans: Tensor, chunks: Tensor, wave: int) -> Work:
    """Order a batch's work.

    Args:
        spans: int64 [spans, SPAN_COLUMNS].
        chunks: int64 [chunks, CHUNK_COLUMNS]; ascending within a slice.
        wave: elements of gradient in a wave. A slice that starts in the k-th run of so many
            elements is in wave k, so waves are longer by less than their last slice.
    """
    device = spans.device
    spans, chunks = spans.cpu(), chunks.cpu()
    # the tensors of a global group need not be neighbours in the tables
    spans = spans[spans[:, SPAN_SLICE].argsort(stable=True)]
    chunks = chunks.flip(0)
    chunks = chunks[chunks[:, CHUNK_SLICE].argsort(stable=True)]
    of_spans, of_chunks = spans[:, SPAN_SLICE], chunks[:, CHUNK_SLICE]
    first = int(of_spans[0]) if len(spans) else 0
    n_slices = int(of_spans[-1]) - first + 1 if len(spans) else 0
    sizes = spans.new_zeros(n_slices)
    sizes.index_add_(0, of_spans - first, spans[:, SPAN_LENGTH])
    waves = ((sizes.cumsum(0) - sizes) // wave)[of_spans - first]
    # a slice longer than a wave leaves numbers out
    waves = waves.unique_consecutive(return_inverse=True)[1]
    wave_of = spans.new_zeros(n_slices)
    wave_of[of_spans - first] = waves

    tables = ((SPAN_ITEM, spans), (CHUNK_ITEM, chunks))
    items = spans.new_zeros(sum(len(table) for _, table in tables), ITEM_COLUMNS)
    start = 0
    for kind, table in tables:
        rows = items[start : start + len(table)]
        rows[:, ITEM_KIND] = kind
        rows[:, ITEM_ROW : ITEM_ROW + table.shape[1]] = table
        start += len(table)
    # S(w) at 2 w, U(w) at 2 w + 3 behind S(w + 1)
    turn = torch.cat([2 * waves, 2 * wave_of[of_chunks - first] + 3])
    return Work(
        items=items[turn.argsort(stable=True)].to(device),
        counters=torch.zeros(1 + n_slices, dtype=torch.int32, device=device),
        first_slice=first,
    )

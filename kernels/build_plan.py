"""From a list of tensors to the tables that the kernels walk; `plan.py` has the words."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .devices import Tuning
from .plan import Batch, Entry, Kind, Plan

from .tables import (  # isort: skip
    CHUNK_COLUMNS, CHUNK_LENGTH, CHUNK_SLICE, CHUNK_START, CHUNK_TENSOR, FACTORS_COLUMNS,
    MOMENTS_COLUMNS, RECORD_BYTES, ROW_CODED, ROW_COLUMNS, ROW_LENGTH, ROW_RECORD, ROW_WINDOW,
    SLICE_CODED, SLICE_COLUMNS, SLICE_FIRST, SLICE_LENGTH, SLICE_RECORD, SLICE_SPANS, SLICE_WINDOW,
    SPAN_COLUMNS, SPAN_LENGTH, SPAN_PARTIAL, SPAN_SLICE, SPAN_START, SPAN_TENSOR, TILE_COLUMNS,
    TILE_FIRST_ROW, TILE_LISTED, TILE_LONGEST, TILE_ROWS, TILE_SHAPE, SHAPES_OF_TILES, TILE_TENSOR,
)  # fmt: skip

# of tables: laid out on the CPU, whatever the default device, and uploaded whole
INT64: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}


def build(entries: Sequence[Entry], tuning: Tuning, *, tiles: bool = True) -> Plan:
    """Lay out the work of a step over non-empty tensors of one device.

    Args:
        entries: the tensors, in the order in which `Plan.point_at` will get their gradients.
        tuning: sizes of the work items.
        tiles: finish short rows and tensors in a launch of their own. Without it every slice has
            spans, and factors in the plan's table.
    """
    device = entries[0].param.device
    kinds: dict[Kind, list[int]] = {}
    # of the tile that finishes an entry's rows; None where they have spans
    shapes = []
    for i, entry in enumerate(entries):
        kind = entry.kind
        kinds.setdefault(kind, []).append(i)
        shapes.append(_tile_shape(entry, kind.aligned, tuning) if tiles else None)

    slices, places, n_partials = _slices(entries, shapes, tuning)
    batches = []
    grad_ptrs = torch.empty(len(entries), dtype=torch.int64, device=device)
    end = 0
    for kind, members in kinds.items():
        end += len(members)
        pointers = grad_ptrs[end - len(members) : end]
        # tensors that share a tile are neighbours in the tables, and those of a length in a tile
        listed = {i for i in members if shapes[i] is not None and entries[i].rows == 1}
        members.sort(key=lambda i: entries[i].length if i in listed else 0)
        batches.append(_batch(entries, members, kind, shapes, places, tuning, pointers))
    homes = {(entries[i].shared, kind) for kind, members in kinds.items() for i in members}
    groups = [shared for shared, _ in homes if shared is not None]
    order = [i for batch in batches for i in batch.order]
    n = len(slices)
    return Plan(
        device=device,
        tuning=tuning,
        batches=batches,
        slices=slices.to(device),
        partials=torch.zeros(MOMENTS_COLUMNS, n_partials, dtype=torch.float64, device=device),
        arrived=torch.zeros(n, dtype=torch.int32, device=device),
        factors=torch.zeros(n, FACTORS_COLUMNS, dtype=torch.float32, device=device),
        records=[entry.record for entry in entries],
        windows=[entry.window for entry in entries if entry.window is not None],
        across_batches=len(groups) > len(set(groups)),
        grad_bytes=sum(entry.grad.numel() * entry.grad.element_size() for entry in entries),
        grad_ptrs=grad_ptrs,
        # a list in C; of one place itemgetter would give no tuple
        in_batch_order=itemgetter(*order) if len(order) > 1 else tuple,
    )


class _Place(NamedTuple):
    """Where a tensor's slices and partial results are."""

    first_slice: int
    first_partial: int
    # elements of a span
    step: int


def _slices(
    entries: Sequence[Entry], shapes: Sequence[int | None], tuning: Tuning
) -> tuple[Tensor, list[_Place | None], int]:
    """The table of slices, each entry's place in it, and the number of partial results."""
    shared: dict[int | None, list[int]] = {}
    for i, entry in enumerate(entries):
        if entry.shared is not None:
            shared.setdefault(entry.shared, []).append(i)
    tables: list[Tensor] = []
    places: list[_Place | None] = [None] * len(entries)
    n_slices = n_partials = 0
    for i, entry in enumerate(entries):
        if shapes[i] is not None or places[i]:
            continue
        members = shared.get(entry.shared, [i])
        total = sum(entries[j].length for j in members)
        step = _span_step(total, tuning)
        first = n_partials
        for j in members:
            places[j] = _Place(n_slices, n_partials, step)
            n_partials += -(-entries[j].length // step) * entries[j].rows
        per_slice = (n_partials - first) // entry.rows
        table = torch.zeros(entry.rows, SLICE_COLUMNS, **INT64)
        row = _arange(entry.rows)
        table[:, SLICE_FIRST] = row * per_slice + first
        table[:, SLICE_SPANS] = per_slice
        table[:, SLICE_LENGTH] = total
        table[:, SLICE_CODED] = entry.coded
        table[:, SLICE_RECORD] = address(entry.record) + row * RECORD_BYTES
        if entry.window is not None:
            table[:, SLICE_WINDOW] = address(entry.window) + row
        tables.append(table)
        n_slices += entry.rows
    return _stack(tables, SLICE_COLUMNS), places, n_partials


def _batch(
    entries: Sequence[Entry],
    members: list[int],
    kind: Kind,
    shapes: Sequence[int | None],
    places: Sequence[_Place | None],
    tuning: Tuning,
    grad_ptrs: Tensor,
) -> Batch:
    """The tables of one batch, in one upload."""
    spans: list[Tensor] = []
    chunks: list[Tensor] = []
    tiles: list[Tensor] = []
    for at, i in enumerate(members):
        entry, place, shape = entries[i], places[i], shapes[i]
        if place is not None:
            spans.append(_spans(at, entry, place))
            chunks.append(_chunks(at, entry, place, tuning.chunk))
        elif shape is not None and entry.rows > 1:
            tiles.append(_tiles(at, [entry.length] * entry.rows, False, shape))
    for shape in range(len(SHAPES_OF_TILES)):
        small = [at for at, i in enumerate(members) if shapes[i] == shape and entries[i].rows == 1]
        if small:
            lengths = [entries[members[at]].length for at in small]
            tiles.append(_tiles(small[0], lengths, True, shape))

    parts = {
        "spans": _stack(spans, SPAN_COLUMNS),
        "tiles": _stack(tiles, TILE_COLUMNS),
        "chunks": _stack(chunks, CHUNK_COLUMNS),
        "rows": torch.tensor([_row(entries[i]) for i in members], **INT64),
        "param_ptrs": torch.tensor([address(entries[i].param) for i in members], **INT64),
        "momentum_ptrs": torch.tensor([address(entries[i].buffer) for i in members], **INT64),
        "master_ptrs": torch.tensor([_master(entries[i]) for i in members], **INT64),
    }
    flat = torch.cat([part.flatten() for part in parts.values()]).to(grad_ptrs.device)
    pieces = flat.split([part.numel() for part in parts.values()])
    return Batch(
        order=members,
        kind=kind,
        grad_ptrs=grad_ptrs,
        **{name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces)},
    )


def _spans(at: int, entry: Entry, place: _Place) -> Tensor:
    """The spans of all rows of tensor `at`."""
    starts, lengths, slices = _cut(entry, place.step, place.first_slice)
    table = torch.empty(len(starts), SPAN_COLUMNS, **INT64)
    table[:, SPAN_TENSOR] = at
    table[:, SPAN_START] = starts
    table[:, SPAN_LENGTH] = lengths
    table[:, SPAN_PARTIAL] = _arange(len(starts)) + place.first_partial
    table[:, SPAN_SLICE] = slices
    return table


def _chunks(at: int, entry: Entry, place: _Place, step: int) -> Tensor:
    """The chunks of all rows of tensor `at`, of at most `step` elements."""
    starts, lengths, slices = _cut(entry, step, place.first_slice)
    table = torch.empty(len(starts), CHUNK_COLUMNS, **INT64)
    table[:, CHUNK_TENSOR] = at
    table[:, CHUNK_START] = starts
    table[:, CHUNK_LENGTH] = lengths
    table[:, CHUNK_SLICE] = slices
    return table


def _cut(entry: Entry, step: int, first_slice: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut every row: first element, elements and slice of each part."""
    starts = _arange(entry.length, step)
    lengths = (entry.length - starts).clamp(max=step).repeat(entry.rows)
    rows = _arange(entry.rows).repeat_interleave(len(starts))
    starts = starts.repeat(entry.rows) + rows * entry.length
    return starts, lengths, first_slice + (rows if entry.shared is None else rows * 0)


def _tiles(at: int, lengths: list[int], listed: bool, shape: int) -> Tensor:
    """Tiles of rows of these lengths, ascending: of tensor `at`, or of one each if `listed`."""
    per_tile = SHAPES_OF_TILES[shape]
    first = _arange(len(lengths), per_tile)
    table = torch.empty(len(first), TILE_COLUMNS, **INT64)
    table[:, TILE_TENSOR] = at + first if listed else at
    table[:, TILE_ROWS] = (len(lengths) - first).clamp(max=per_tile)
    table[:, TILE_FIRST_ROW] = 0 if listed else first
    table[:, TILE_LISTED] = int(listed)
    last = (first + per_tile - 1).clamp(max=len(lengths) - 1)
    table[:, TILE_LONGEST] = torch.tensor(lengths, **INT64)[last]
    table[:, TILE_SHAPE] = shape
    return table


def _stack(tables: list[Tensor], columns: int) -> Tensor:
    return torch.cat(tables) if tables else torch.empty(0, columns, **INT64)


def _row(entry: Entry) -> list[int]:
    """A tensor's row of the table for tiles."""
    row = [0] * ROW_COLUMNS
    row[ROW_LENGTH], row[ROW_CODED] = entry.length, entry.coded
    row[ROW_RECORD] = address(entry.record)
    row[ROW_WINDOW] = 0 if entry.window is None else address(entry.window)
    return row


def _master(entry: Entry) -> int:
    """The address of the master, or the key of stochastic rounding."""
    return entry.key or 0 if entry.master is None else address(entry.master)


def address(tensor: Tensor) -> int:
    """Where a tensor's entries start, as an int64: addresses from 2**63 on (XPU) are negative."""
    return (tensor.data_ptr() ^ (1 << 63)) - (1 << 63)


def _arange(end: int, step: int = 1) -> Tensor:
    return torch.arange(0, end, step, **INT64)


def _span_step(length: int, tuning: Tuning) -> int:
    granule = tuning.block * tuning.unroll
    step = max(tuning.span, -(-length // tuning.max_spans))
    return -(-step // granule) * granule


def _tile_shape(entry: Entry, aligned: bool, tuning: Tuning) -> int | None:
    """The shape of the tiles of an entry's rows; None where they have spans.

    A tile masks by the row's length, which must not cut a wide access: small aligned tensors of
    odd length have spans, which take their last entries apart.
    """
    if entry.shared is not None or (aligned and entry.length % entry.granule):
        return None
    return tuning.tile_shape(entry.length, aligned)

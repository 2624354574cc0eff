"""From a list of tensors to the tables that the kernels walk; `plan.py` has the words."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import Batch, Entry, Kind, Plan
from .tuning import Tuning

# what the kernels' tables have to a row
SLICE, TILE, SEGMENT, CHUNK = 5, 5, 6, 4
# of tables: laid out on the CPU, whatever the default device, and uploaded whole
INT64: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
# bytes to a slice in a record: three float64
RECORD = 24


def build(entries: Sequence[Entry], tuning: Tuning, *, tiles: bool = True) -> Plan:
    """Lay out the work of a step over non-empty tensors of one device.

    Args:
        entries: the tensors, in the order in which `Plan.point_at` will get their gradients.
        tuning: sizes of the work items.
        tiles: finish rows and tensors that fit in registers in the first launch. Without it
            every slice has statistics and a fold in the plan's tables.
    """
    device = entries[0].param.device
    kinds: dict[Kind, list[int]] = {}
    # of the tile that finishes an entry's rows; 0 where they are segments
    columns = []
    for i, entry in enumerate(entries):
        kind = entry.kind
        kinds.setdefault(kind, []).append(i)
        columns.append(_tile_columns(entry, kind.aligned, tuning) if tiles else 0)

    segments, spans, n_partials = _segments(entries, columns, tuning)
    batches = []
    grad_ptrs = torch.empty(len(entries), dtype=torch.int64, device=device)
    end = 0
    for kind, members in kinds.items():
        end += len(members)
        pointers = grad_ptrs[end - len(members) : end]
        # tensors that share a tile are neighbours in the tables
        members.sort(key=lambda i: columns[i] if entries[i].rows == 1 else 0)
        batches.append(_batch(entries, members, kind, columns, spans, tuning, pointers))
    homes = {(entries[i].shared, kind) for kind, members in kinds.items() for i in members}
    groups = [shared for shared, _ in homes if shared is not None]
    order = [i for batch in batches for i in batch.order]
    n = len(segments)
    return Plan(
        device=device,
        tuning=tuning,
        batches=batches,
        segments=segments.to(device),
        partials=torch.zeros(5, n_partials, dtype=torch.float64, device=device),
        arrived=torch.zeros(n, dtype=torch.int32, device=device),
        factors=torch.zeros(n, 8, dtype=torch.float32, device=device),
        records=[entry.record for entry in entries],
        windows=[entry.window for entry in entries if entry.window is not None],
        spanning=len(groups) > len(set(groups)),
        grad_bytes=sum(entry.grad.numel() * entry.grad.element_size() for entry in entries),
        grad_ptrs=grad_ptrs,
        # a list in C; of one place itemgetter would give no tuple
        in_batch_order=itemgetter(*order) if len(order) > 1 else tuple,
    )


class _Span(NamedTuple):
    """Where a tensor's segments and partial results are."""

    segment: int
    partial: int
    # elements of a slice, slices of a row
    step: int
    slices: int


def _segments(
    entries: Sequence[Entry], columns: Sequence[int], tuning: Tuning
) -> tuple[Tensor, list[_Span | None], int]:
    """The segment table, each entry's place in it, and the number of partial results."""
    shared: dict[int | None, list[int]] = {}
    for i, entry in enumerate(entries):
        if entry.shared is not None:
            shared.setdefault(entry.shared, []).append(i)
    tables: list[Tensor] = []
    spans: list[_Span | None] = [None] * len(entries)
    n_segments = n_partials = 0
    done = set()
    for i, entry in enumerate(entries):
        if columns[i] or i in done:
            continue
        members = shared.get(entry.shared, [i])
        total = sum(entries[j].length for j in members)
        step = _slice_step(total, tuning)
        first = n_partials
        for j in members:
            slices = -(-entries[j].length // step)
            spans[j] = _Span(n_segments, n_partials, step, slices)
            n_partials += slices * entries[j].rows
            done.add(j)
        per_segment = (n_partials - first) // entry.rows
        table = torch.empty(entry.rows, SEGMENT, **INT64)
        row = _arange(entry.rows)
        table[:, 0] = row * per_segment + first
        table[:, 1] = per_segment
        table[:, 2] = total
        table[:, 3] = entry.coded
        table[:, 4] = address(entry.record) + row * RECORD
        table[:, 5] = 0
        if entry.window is not None:
            table[:, 5] = address(entry.window) + row
        tables.append(table)
        n_segments += entry.rows
    segments = _stack(tables, SEGMENT)
    return segments, spans, n_partials


def _batch(
    entries: Sequence[Entry],
    members: list[int],
    kind: Kind,
    columns: Sequence[int],
    spans: Sequence[_Span | None],
    tuning: Tuning,
    grad_ptrs: Tensor,
) -> Batch:
    """The tables of one batch, in one upload."""
    slices: list[Tensor] = []
    chunks: list[Tensor] = []
    tiles: list[Tensor] = []
    for at, i in enumerate(members):
        entry, span = entries[i], spans[i]
        if span is not None:
            partial = _arange(span.slices * entry.rows) + span.partial
            slices.append(_cut(at, entry, span.step, partial, span.segment))
            chunks.append(_cut(at, entry, tuning.chunk, None, span.segment))
        elif entry.rows > 1:
            tiles.append(_tiles(at, entry.rows, False, columns[i], tuning))
    for width in tuning.tile_columns:
        small = [at for at, i in enumerate(members) if columns[i] == width and entries[i].rows == 1]
        if small:
            tiles.append(_tiles(small[0], len(small), True, width, tuning))

    parts = {
        "slices": _stack(slices, SLICE),
        "tiles": _stack(tiles, TILE),
        "chunks": _stack(chunks, CHUNK),
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
        n_slices=len(parts["slices"]),
        n_tiles=len(parts["tiles"]),
        n_chunks=len(parts["chunks"]),
        grad_ptrs=grad_ptrs,
        **{name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces)},
    )


def _cut(at: int, entry: Entry, step: int, partial: Tensor | None, segment: int) -> Tensor:
    """Cut every row of a tensor in steps: tensor, first element, elements(, partial), segment."""
    length = entry.length
    starts = _arange(length, step)
    sizes = (length - starts).clamp(max=step)
    row = _arange(entry.rows)
    table = torch.empty(entry.rows, len(starts), CHUNK if partial is None else SLICE, **INT64)
    table[..., 0] = at
    table[..., 1] = row[:, None] * length + starts
    table[..., 2] = sizes
    if partial is not None:
        table[..., 3] = partial.view(entry.rows, -1)
    table[..., -1] = segment + row[:, None] if entry.shared is None else segment
    return table.view(-1, table.shape[-1])


def _tiles(at: int, rows: int, listed: bool, columns: int, tuning: Tuning) -> Tensor:
    """Tiles of `rows` rows from tensor `at` on: of that tensor, or one per tensor if `listed`."""
    per_tile = tuning.tile_rows(columns)
    first = _arange(rows, per_tile)
    table = torch.empty(len(first), TILE, **INT64)
    table[:, 0] = at + first if listed else at
    table[:, 1] = (rows - first).clamp(max=per_tile)
    table[:, 2] = 0 if listed else first
    table[:, 3] = int(listed)
    table[:, 4] = columns
    return table


def _stack(tables: list[Tensor], columns: int) -> Tensor:
    return torch.cat(tables) if tables else torch.empty(0, columns, **INT64)


def _row(entry: Entry) -> list[int]:
    """A tensor's row of the table for tiles."""
    window = 0 if entry.window is None else address(entry.window)
    return [entry.length, entry.coded, address(entry.record), window]


def _master(entry: Entry) -> int:
    """The address of the master, or the key of stochastic rounding."""
    return entry.key or 0 if entry.master is None else address(entry.master)


def address(tensor: Tensor) -> int:
    """Where a tensor's entries start, as an int64: addresses from 2**63 on (XPU) are negative."""
    return (tensor.data_ptr() ^ (1 << 63)) - (1 << 63)


def _arange(end: int, step: int = 1) -> Tensor:
    return torch.arange(0, end, step, **INT64)


def _slice_step(length: int, tuning: Tuning) -> int:
    granule = tuning.block * tuning.unroll
    step = max(tuning.slice, -(-length // tuning.max_partials))
    return -(-step // granule) * granule


def _tile_columns(entry: Entry, aligned: bool, tuning: Tuning) -> int:
    """The narrowest tile shape that holds a row; 0 where rows are not finished in registers.

    A tile masks by the row's length, which must not cut a wide access: small aligned tensors of
    odd length are segments, which take their last entries apart.
    """
    if entry.shared is not None or (aligned and entry.length % entry.granule):
        return 0
    return next((columns for columns in tuning.tile_columns if entry.length <= columns), 0)

"""From a list of tensors to the tables that the kernels walk.

Words: a *segment* is a contiguous run of one tensor with its own statistics (a tensor, or a long
row), or all tensors of a global group together; a *slice* is the part of a segment that one
program of the first launch reads; a *chunk* is the part that one program of the second launch
moves; a *tile* is a set of rows or of small tensors that one program finishes in registers.

Tensors that share storage dtypes and alignment form a *batch*: two launches serve it, whatever
the number of tensors, groups and options. Statistics of all batches come before all updates, so
that a global group may span batches. A single launch can serve a batch instead (`work.py`), unless
such a group spans batches.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .direct import Handle
from .work import Work, lay_out

# what the kernels' tables have to a row
SLICE, TILE, SEGMENT, CHUNK, ROW = 5, 5, 6, 4, 4
# bytes to a slice in a record: three float64
RECORD = 24
# bytes of the widest access
ALIGNMENT = 16
# `Kind.master`, as in precision.py, which imports Triton
PLAIN, REMAINDER, MASTER_COPY, STOCHASTIC = range(4)


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work items, in elements unless named otherwise; all powers of two.

    Attributes:
        wide: stream statistics in float64 lanes; else in float32 tiles.
        block: lanes of a statistics program; times `unroll`, the granule of a slice.
        unroll: rows of `block` per trip of the streaming loop.
        slice: least size of a slice. A segment has at most `max_partials` slices.
        max_partials: bounds the table of partial results, and the merge by one program.
        merge: partial results merged per trip.
        update_block: elements per trip of an update program.
        chunk: elements per update program.
        tile: entries held in registers by a program that finishes rows or small tensors; rows
            longer than this are segments.
        warps: per program of the first launch.
        update_warps: per program of the second launch.
        form: "two-launch" or "single-launch"; None leaves it to `launch.form_for`.
        wave: bytes of gradient in a wave of the single launch. Two or three waves are live at a
            time; beyond 25 MB they would not stay in the 60 MB of an H200's L2, which may hold
            data from its far half twice. Programs wait where a wave has fewer slices than there
            are programs: 4 MiB are 512 slices of 2048 float32, and an H200 runs 528 programs.
        programs_per_sm: of the single launch; 4 fit the registers of an SM, 3 with tiles.
        pdl: let the updates start while the statistics end (NVIDIA's programmatic dependent
            launch, from sm_90 on; of no effect elsewhere). Compiled, never run or timed.
        direct: launch compiled kernels by their handles (`direct.py`). Never run or timed.
    """

    wide: bool = True
    block: int = 512
    unroll: int = 4
    slice: int = 16384
    max_partials: int = 4096
    merge: int = 256
    update_block: int = 1024
    chunk: int = 16384
    tile: int = 2048
    warps: int = 4
    update_warps: int = 4
    form: str | None = None
    wave: int = 4 << 20
    programs_per_sm: int = 4
    pdl: bool = False
    direct: bool = False

    @property
    def tile_columns(self) -> tuple[int, ...]:
        """Row capacities of the tile's shapes; the narrowest that holds a row is used."""
        return tuple(self.tile >> shrink for shrink in (6, 4, 2, 0))

    def tile_rows(self, columns: int) -> int:
        """Rows of the tile that has this many columns."""
        return max(1, self.block // columns)


def gpu_tuning(*, wide: bool, wave: int) -> Tuning:
    """The sizes for a GPU whose warps have `wave` lanes."""
    # two waves of 64 are the threads of four warps; with four, 16-byte loads become 8-byte ones
    return Tuning(wide=wide, warps=128 // wave)


class Entry(NamedTuple):
    """One tensor of a step, as the plan needs it.

    All three tensors have the same dense memory order, in which a row is one contiguous run.

    Attributes:
        param: written in place.
        grad: read only.
        momentum: written in place; None without momentum.
        record: float64 [rows, 3], written.
        option: the tensor's row of the option table.
        rows: slices along dimension 0; 1 when the tensor is one slice.
        centred: whether the mean is removed.
        shared: tensors with the same number here form one slice; None for a slice of its own.
        master: int16 or float32, written in place; None without a master.
        window: uint8 [rows], written; None without accumulation.
        key: seeds stochastic rounding; None where the parameter is rounded to nearest.
    """

    param: Tensor
    grad: Tensor
    momentum: Tensor | None
    record: Tensor
    option: int
    rows: int
    centred: bool
    shared: int | None
    master: Tensor | None = None
    window: Tensor | None = None
    key: int | None = None


class Kind(NamedTuple):
    """What tensors must share to share launches."""

    param: torch.dtype
    grad: torch.dtype
    momentum: torch.dtype
    # see `precision.PLAIN` and what follows there
    master: int
    aligned: bool


@dataclass
class Batch:
    """The tables of one class of tensors; int64 on the device."""

    order: list[int]
    kind: Kind
    n_slices: int
    n_tiles: int
    n_chunks: int
    slices: Tensor
    tiles: Tensor
    chunks: Tensor
    rows: Tensor
    param_ptrs: Tensor
    momentum_ptrs: Tensor
    master_ptrs: Tensor
    grad_ptrs: Tensor
    _work: Work | None = None
    # of this batch's compiled kernels: see `direct.launch`
    handles: dict[int, Handle] = field(default_factory=dict)

    def work(self, tuning: Tuning) -> Work:
        """The work list of a single launch, laid out when first asked for."""
        if self._work is None:
            wave = max(1, tuning.wave // self.kind.grad.itemsize)
            self._work = lay_out(self.slices, self.tiles, self.chunks, wave)
        return self._work


@dataclass
class Plan:
    """Everything a step reuses as long as its tensors stay where they are."""

    device: torch.device
    tuning: Tuning
    batches: list[Batch]
    segments: Tensor
    partials: Tensor
    arrived: Tensor
    folds: Tensor
    # the segments of each entry; a tile has none
    first_segment: list[int]
    # written through addresses in the tables: they must live as long
    records: list[Tensor]
    windows: list[Tensor]
    # whether a segment has slices in several batches
    spanning: bool
    # the batches' gradient addresses, one table, and what was uploaded to it last
    grad_ptrs: Tensor
    in_batch_order: Callable[[list[int]], tuple[int, ...]]
    addresses: list[int] = field(default_factory=list)

    def point_at(self, addresses: list[int]) -> None:
        """Upload the gradients' addresses where one changed; they are in entry order."""
        if addresses is self.addresses:
            return
        if addresses == self.addresses:
            # the list that will be given again
            self.addresses = addresses
            return
        if capturing(self.device):
            raise RuntimeError(
                "a gradient moved while a CUDA graph is being captured; run one whole iteration "
                "with zero_grad(set_to_none=False) before the capture, on the same stream"
            )
        ordered = array("q", self.in_batch_order(addresses))
        upload(self.grad_ptrs, torch.frombuffer(ordered, dtype=torch.int64))
        self.addresses = addresses


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be uploaded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(table: Tensor, values: Tensor) -> None:
    """Copy CPU values to a device table, in stream order and without waiting for the device."""
    if table.device.type == "cpu":
        table.copy_(values)
    else:
        # torch's pinned allocator gives the memory out again only after the copy
        table.copy_(values.pin_memory(), non_blocking=True)


def build(entries: Sequence[Entry], tuning: Tuning, *, tiles: bool = True) -> Plan:
    """Lay out the work of a step over non-empty tensors of one device.

    Args:
        entries: the tensors, in the order in which `Plan.point_at` will get their gradients.
        tuning: sizes of the work items.
        tiles: finish rows and tensors that fit in registers in the first launch. Without it
            every slice has statistics and a fold in the plan's tables.
    """
    device = entries[0].param.device
    aligned = [_is_aligned(entry) for entry in entries]
    tiled = [tiles and _fits_tile(e, on, tuning) for e, on in zip(entries, aligned)]
    kinds: dict[Kind, list[int]] = {}
    for i, entry in enumerate(entries):
        buffer = entry.momentum.dtype if entry.momentum is not None else torch.float32
        kind = Kind(entry.param.dtype, entry.grad.dtype, buffer, master_kind(entry), aligned[i])
        kinds.setdefault(kind, []).append(i)

    segments, spans, n_partials = _segments(entries, tiled, tuning)
    batches = []
    grad_ptrs = torch.empty(len(entries), dtype=torch.int64, device=device)
    end = 0
    for kind, members in kinds.items():
        end += len(members)
        pointers = grad_ptrs[end - len(members) : end]
        # tensors that share a tile are neighbours in the tables
        members = sorted(
            members,
            key=lambda i: _columns(entries[i], tuning) if tiled[i] and entries[i].rows == 1 else 0,
        )
        batches.append(_batch(entries, members, kind, tiled, spans, tuning, pointers))
    homes = {(entries[i].shared, kind) for kind, members in kinds.items() for i in members}
    groups = [shared for shared, _ in homes if shared is not None]
    n = len(segments)
    return Plan(
        device=device,
        tuning=tuning,
        batches=batches,
        segments=segments.to(device),
        partials=torch.zeros(5, n_partials, dtype=torch.float64, device=device),
        arrived=torch.zeros(n, dtype=torch.int32, device=device),
        folds=torch.zeros(n, 8, dtype=torch.float32, device=device),
        first_segment=[span.segment if span else -1 for span in spans],
        records=[entry.record for entry in entries],
        windows=[entry.window for entry in entries if entry.window is not None],
        spanning=len(groups) > len(set(groups)),
        grad_ptrs=grad_ptrs,
        in_batch_order=_picker([i for batch in batches for i in batch.order]),
    )


def _picker(order: list[int]) -> Callable[[list[int]], tuple[int, ...]]:
    """A function that reorders a list; in C, where `order` has more than one place."""
    return itemgetter(*order) if len(order) > 1 else tuple


class _Span(NamedTuple):
    """Where a tensor's segments and partial results are."""

    segment: int
    partial: int
    # elements of a slice, slices of a row
    step: int
    slices: int


def _segments(
    entries: Sequence[Entry], tiled: Sequence[bool], tuning: Tuning
) -> tuple[Tensor, list[_Span | None], int]:
    """The segment table, each entry's place in it, and the number of partial results."""
    shared: dict[int, list[int]] = {}
    for i, entry in enumerate(entries):
        if entry.shared is not None:
            shared.setdefault(entry.shared, []).append(i)
    totals = {key: sum(_length(entries[i]) for i in members) for key, members in shared.items()}
    tables: list[Tensor] = []
    spans: list[_Span | None] = [None] * len(entries)
    n_segments = n_partials = 0
    done = set()
    for i, entry in enumerate(entries):
        if tiled[i] or i in done:
            continue
        members = shared[entry.shared] if entry.shared is not None else [i]
        total = totals[entry.shared] if entry.shared is not None else _length(entry)
        step = _slice_step(total, tuning)
        first = n_partials
        for j in members:
            slices = -(-_length(entries[j]) // step)
            spans[j] = _Span(n_segments, n_partials, step, slices)
            n_partials += slices * entries[j].rows
            done.add(j)
        per_segment = (n_partials - first) // entry.rows
        table = torch.empty(entry.rows, SEGMENT, dtype=torch.int64)
        table[:, 0] = torch.arange(entry.rows) * per_segment + first
        table[:, 1] = per_segment
        table[:, 2] = total
        table[:, 3] = _code(entry)
        table[:, 4] = entry.record.data_ptr() + torch.arange(entry.rows) * RECORD
        table[:, 5] = 0
        if entry.window is not None:
            table[:, 5] = entry.window.data_ptr() + torch.arange(entry.rows)
        tables.append(table)
        n_segments += entry.rows
    segments = torch.cat(tables) if tables else torch.empty(0, SEGMENT, dtype=torch.int64)
    return segments, spans, n_partials


def _batch(
    entries: Sequence[Entry],
    members: list[int],
    kind: Kind,
    tiled: Sequence[bool],
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
            partial = torch.arange(span.slices * entry.rows) + span.partial
            slices.append(_cut(at, entry, span.step, partial, span.segment))
            chunks.append(_cut(at, entry, tuning.chunk, None, span.segment))
        elif entry.rows > 1:
            columns = _columns(entry, tuning)
            tiles.append(_tiles(at, entry.rows, tuning.tile_rows(columns), False, columns))
    for columns in tuning.tile_columns:
        small = [
            at
            for at, i in enumerate(members)
            if tiled[i] and entries[i].rows == 1 and _columns(entries[i], tuning) == columns
        ]
        if small:
            tiles.append(_tiles(small[0], len(small), tuning.tile_rows(columns), True, columns))

    rows = torch.tensor([_row(entries[i]) for i in members])
    params = torch.tensor([entries[i].param.data_ptr() for i in members])
    # without momentum the address is never used, but it must be one
    momenta = torch.tensor([_momentum(entries[i]).data_ptr() for i in members])
    masters = torch.tensor([_master(entries[i]) for i in members])
    parts = [
        _stack(slices, SLICE),
        _stack(tiles, TILE),
        _stack(chunks, CHUNK),
        rows,
        params,
        momenta,
        masters,
    ]
    flat = torch.cat([part.flatten() for part in parts]).to(grad_ptrs.device)
    views = [
        view.view(part.shape)
        for view, part in zip(flat.split([part.numel() for part in parts]), parts)
    ]
    return Batch(
        order=members,
        kind=kind,
        n_slices=len(parts[0]),
        n_tiles=len(parts[1]),
        n_chunks=len(parts[2]),
        slices=views[0],
        tiles=views[1],
        chunks=views[2],
        rows=views[3],
        param_ptrs=views[4],
        momentum_ptrs=views[5],
        master_ptrs=views[6],
        grad_ptrs=grad_ptrs,
    )


def _cut(at: int, entry: Entry, step: int, partial: Tensor | None, segment: int) -> Tensor:
    """Cut every row of a tensor in steps: tensor, first element, elements(, partial), segment."""
    length = _length(entry)
    starts = torch.arange(0, length, step)
    sizes = torch.minimum(torch.tensor(step), length - starts)
    row = torch.arange(entry.rows)
    table = torch.empty(entry.rows, len(starts), CHUNK if partial is None else SLICE).long()
    table[..., 0] = at
    table[..., 1] = row[:, None] * length + starts
    table[..., 2] = sizes
    if partial is not None:
        table[..., 3] = partial.view(entry.rows, -1)
    table[..., -1] = segment + row[:, None] if entry.shared is None else segment
    return table.view(-1, table.shape[-1])


def _tiles(at: int, rows: int, per_tile: int, listed: bool, columns: int) -> Tensor:
    """Tiles of `rows` rows from tensor `at` on: of that tensor, or one per tensor if `listed`."""
    first = torch.arange(0, rows, per_tile)
    table = torch.empty(len(first), TILE, dtype=torch.int64)
    table[:, 0] = at + first if listed else at
    table[:, 1] = torch.minimum(torch.tensor(per_tile), rows - first)
    table[:, 2] = 0 if listed else first
    table[:, 3] = int(listed)
    table[:, 4] = columns
    return table


def _stack(tables: list[Tensor], columns: int) -> Tensor:
    return torch.cat(tables) if tables else torch.empty(0, columns, dtype=torch.int64)


def _length(entry: Entry) -> int:
    """Elements of a row."""
    return entry.param.numel() // entry.rows


def _columns(entry: Entry, tuning: Tuning) -> int:
    """The narrowest tile shape that holds a row."""
    return next(columns for columns in tuning.tile_columns if _length(entry) <= columns)


def _code(entry: Entry) -> int:
    return entry.option * 2 + entry.centred


def _row(entry: Entry) -> list[int]:
    """A tensor's row of the table for tiles."""
    window = 0 if entry.window is None else entry.window.data_ptr()
    return [_length(entry), _code(entry), entry.record.data_ptr(), window]


def _momentum(entry: Entry) -> Tensor:
    return entry.param if entry.momentum is None else entry.momentum


def _master(entry: Entry) -> int:
    """The address of the master, or the key of stochastic rounding."""
    return entry.key or 0 if entry.master is None else entry.master.data_ptr()


def master_kind(entry: Entry) -> int:
    """How the parameter keeps what its storage type would lose."""
    if entry.master is not None:
        return REMAINDER if entry.master.dtype is torch.int16 else MASTER_COPY
    return PLAIN if entry.key is None else STOCHASTIC


def _slice_step(length: int, tuning: Tuning) -> int:
    granule = tuning.block * tuning.unroll
    step = max(tuning.slice, -(-length // tuning.max_partials))
    return -(-step // granule) * granule


def _is_aligned(entry: Entry) -> bool:
    """Whether every row of all three tensors starts at a multiple of 16 bytes."""
    if entry.rows > 1 and _length(entry) % _granule(entry):
        return False
    tensors = [entry.param, entry.grad, _momentum(entry)]
    if entry.master is not None:
        tensors.append(entry.master)
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)


def _granule(entry: Entry) -> int:
    """Elements in the widest access to the narrowest of the three tensors; 4 or 8."""
    tensors = (entry.param, entry.grad, _momentum(entry))
    return ALIGNMENT // min(tensor.element_size() for tensor in tensors)


def _fits_tile(entry: Entry, aligned: bool, tuning: Tuning) -> bool:
    """Whether rows are finished in registers.

    A tile masks by the row's length, which must not cut a wide access: small aligned tensors of
    odd length are segments, which take their last entries apart.
    """
    whole = not aligned or _length(entry) % _granule(entry) == 0
    return entry.shared is None and _length(entry) <= tuning.tile and whole

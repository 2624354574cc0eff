"""First launch of a step: statistics of long segments, and short slices from start to end.

A program does one of two kinds of work:

* a slice of a segment: one pass over its gradient; the program that finishes a segment's last
  slice (an integer counter says which) merges the partial results in slice order and publishes
  the segment's fold. The order of merging never depends on the order of arrival.
* a tile, see `tiles.py`.

Traffic per gradient element of a slice: reads g (4 bytes in float32).
"""

import triton
import triton.language as tl

from .moments import lane_moments, stream_tile_moments
from .publish import TABLE_COLUMNS, publish
from .tiles import tile_of_any_shape
from .update import SEGMENT_COLUMNS

# parts of one upload: their alignment must not choose among compilations, nor their sizes
ARGUMENTS = [
    "slices_ptr", "tiles_ptr", "rows_ptr", "segments_ptr", "partials_ptr", "arrived_ptr",
    "folds_ptr", "options_ptr", "clocks_ptr", "scale_ptr", "found_ptr", "tables_ptr", "grad_ptrs",
    "param_ptrs", "momentum_ptrs", "master_ptrs",
]  # fmt: skip


@triton.jit
def _merge_partials(partials, n_partials, first, count, WIDE: tl.constexpr, MERGE: tl.constexpr):
    """Moments of ``count`` partial results from ``first`` on, in a fixed order.

    The table is five columns of ``n_partials`` float64: count, mean, M2, least, greatest.
    """
    k = tl.arange(0, MERGE)
    here = partials + first
    base = tl.load(here + n_partials)
    total = tl.zeros((MERGE,), tl.float64)
    away = tl.zeros((MERGE,), tl.float64)
    least = tl.zeros((MERGE,), tl.float64) + float("inf")
    most = tl.zeros((MERGE,), tl.float64) - float("inf")
    i = count * 0
    while i < count:
        live = k < count - i
        n = tl.load(here + i + k, mask=live, other=0.0)
        mean = tl.load(here + n_partials + i + k, mask=live, other=0.0)
        total += n
        away += n * tl.where(live, mean - base, 0.0)
        if not WIDE:
            row = here + 3 * n_partials + i + k
            least = tl.minimum(least, tl.load(row, mask=live, other=float("inf")))
            most = tl.maximum(most, tl.load(row + n_partials, mask=live, other=float("-inf")))
        i += MERGE
    n_all = tl.sum(total, 0)
    shift = tl.sum(away, 0) / n_all
    m2 = tl.zeros((MERGE,), tl.float64)
    i = count * 0
    while i < count:
        live = k < count - i
        n = tl.load(here + i + k, mask=live, other=0.0)
        mean = tl.load(here + n_partials + i + k, mask=live, other=0.0)
        d = tl.where(live, mean - base - shift, 0.0)
        m2 += tl.load(here + 2 * n_partials + i + k, mask=live, other=0.0) + n * d * d
        i += MERGE
    return n_all, base + shift, tl.sum(m2, 0), tl.min(least, 0), tl.max(most, 0)


@triton.jit
def measure_slice(
    row, segments_ptr, partials_ptr, n_partials, arrived_ptr, folds_ptr, options_ptr, scale_ptr,
    found_ptr, tables_ptr, grad_ptrs, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, WINDOWS: tl.constexpr, TABLES: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Statistics of one slice; the last one of a segment publishes it. Returns whether this did.

    TABLES leaves them in a table instead: other processes have parts of the same segments.
    """
    tensor = tl.load(row)
    start = tl.load(row + 1)
    length = tl.load(row + 2).to(tl.int32)
    slot = tl.load(row + 3)
    segment = tl.load(row + 4)
    grad = tl.load(grad_ptrs + tensor).to(tl.pointer_type(GRAD)) + start
    if WIDE:
        n, mean, m2 = lane_moments(grad, length, ALIGNED, BLOCK, UNROLL)
        least = mean
        most = mean
    else:
        n, mean, m2, least, most = stream_tile_moments(grad, length, ALIGNED, BLOCK * UNROLL)
        least = least.to(tl.float64)
        most = most.to(tl.float64)
    first = tl.load(segments_ptr + segment * SEGMENT_COLUMNS)
    count = tl.load(segments_ptr + segment * SEGMENT_COLUMNS + 1)
    arrivals = count - 1
    if count > 1:
        here = partials_ptr + slot
        tl.store(here, n)
        tl.store(here + n_partials, mean)
        tl.store(here + 2 * n_partials, m2)
        if not WIDE:
            tl.store(here + 3 * n_partials, least)
            tl.store(here + 4 * n_partials, most)
        # every lane's stores before the counter's release
        tl.debug_barrier()
        arrivals = tl.atomic_add(arrived_ptr + segment, 1, sem="acq_rel").to(tl.int64)
    last = arrivals == count - 1
    if last:
        if count > 1:
            tl.debug_barrier()
            n, mean, m2, least, most = _merge_partials(
                partials_ptr, n_partials, first, count, WIDE, MERGE
            )
            tl.store(arrived_ptr + segment, 0)
        if TABLES:
            table = tables_ptr + segment * TABLE_COLUMNS
            tl.store(table, n)
            tl.store(table + 1, mean)
            tl.store(table + 2, m2)
            tl.store(table + 3, least)
            tl.store(table + 4, most)
        else:
            publish(
                n, mean, m2, least, most, segment, segments_ptr, folds_ptr, options_ptr,
                scale_ptr, found_ptr, WIDE, WINDOWS,
            )  # fmt: skip
    return last


@triton.jit(do_not_specialize=["n_slices", "n_partials"], do_not_specialize_on_alignment=ARGUMENTS)
def _statistics_kernel(
    slices_ptr,  # int64 [n_slices, 5]: tensor, first element, elements, partial, segment
    n_slices,
    tiles_ptr,  # int64 [tiles, 5]: first tensor, rows, first row, listed, columns
    rows_ptr,  # int64 [tensors, ROW_COLUMNS]
    segments_ptr,  # int64 [segments, SEGMENT_COLUMNS]
    partials_ptr,  # float64 [5, n_partials]
    n_partials,
    arrived_ptr,  # int32 [segments], zero before and after
    folds_ptr,  # float32 [segments, FOLD_COLUMNS]
    options_ptr,  # float64 [groups, OPTION_COLUMNS]
    clocks_ptr,  # int64 [groups]
    scale_ptr,  # float32 [1], what gradients were multiplied by
    found_ptr,  # float32 [1], anything but 0 makes gradients invalid
    tables_ptr,  # float64 [segments, TABLE_COLUMNS], written instead of folds if TABLES
    grad_ptrs,  # int64 [tensors], likewise the next three
    param_ptrs,
    momentum_ptrs,
    master_ptrs,  # of the master, or the tensor's key for stochastic rounding
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TABLES: tl.constexpr,
    SOFT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    MERGE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < n_slices:
        measure_slice(
            slices_ptr + program * 5, segments_ptr, partials_ptr, n_partials, arrived_ptr,
            folds_ptr, options_ptr, scale_ptr, found_ptr, tables_ptr, grad_ptrs,
            GRAD, ALIGNED, WIDE, WINDOWS, TABLES, BLOCK, UNROLL, MERGE,
        )  # fmt: skip
    elif TILES:
        tile_of_any_shape(
            tiles_ptr + (program - n_slices) * 5, rows_ptr, options_ptr, clocks_ptr, scale_ptr,
            found_ptr, grad_ptrs, param_ptrs, momentum_ptrs, master_ptrs,
            GRAD, PARAM, BUFFER, KIND, ALIGNED, WINDOWS, SOFT, BLOCK, TILE,
        )  # fmt: skip

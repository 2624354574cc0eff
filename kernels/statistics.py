"""First launch of a step: statistics of long segments, and short slices from start to end.

A program does one of two kinds of work:

* a slice of a segment: one pass over its gradient; the program that finishes a segment's last
  slice (an integer counter says which) merges the partial results in slice order and publishes
  the segment's fold. The order of merging never depends on the order of arrival.
* a tile: whole rows, or whole small tensors, that fit in registers. Their gradient is read once,
  and parameters and momentum are moved at once.

Traffic per gradient element: reads g (4 bytes in float32) for a slice. A tile moves 20 bytes per
element in float32 with momentum, and is not touched by the second launch.
"""

import triton
import triton.language as tl

from .moments import UNIFORM, fold, lane_moments, stream_tile_moments, tile_moments
from .precision import (
    MASTER_COPY,
    REMAINDER,
    STOCHASTIC,
    hash_positions,
    narrow,
    rounding_seeds,
    store_as,
    widen,
)
from .update import (
    BUFFERED,
    CDF,
    CENTERING,
    CLOSE_ONLY,
    CLOSING,
    DECAY,
    EPS,
    FOLD_COLUMNS,
    FRESH,
    LEAVE,
    LR,
    MOMENTUM,
    NESTEROV,
    OPTION_COLUMNS,
    PROPAGATE,
    QUOTIENT,
    SEGMENT_COLUMNS,
    SIGN,
    THROUGH_CDF,
    bounded,
    move,
)

# columns of a record, as in bngd_triton/members.py
RECORD_COLUMNS = tl.constexpr(3)
MEAN = tl.constexpr(0)
STD = tl.constexpr(1)
SKIPPED = tl.constexpr(2)
# columns of the table of tiled tensors: elements of a row, option row * 2 + centred, addresses of
# record and window
ROW_COLUMNS = tl.constexpr(4)
# columns of a table of statistics, as in bngd_triton/exchange.py: entries, mean, sum of squared
# deviations, least, greatest
TABLE_COLUMNS = tl.constexpr(5)

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
def _admit(
    mean, m2, uniform, option, found_ptr, window, known, WINDOWS: tl.constexpr
):  # fmt: skip
    """What becomes of slices: mode, momentum's weight, whether each was finite or propagates.

    ``option``, ``window`` and ``known`` (whether there is a window) have the shape of ``mean``.
    """
    finite = (mean - mean == 0) & (m2 - m2 == 0)
    taken = finite | (tl.load(option + PROPAGATE) != 0)
    # a sum over devices, so anything but 0; by a product, since the interpreter cannot combine
    # the comparison of a scalar with that of a tensor
    valid = (taken.to(tl.int32) * (tl.load(found_ptr) == 0).to(tl.int32)) != 0
    cdf = tl.load(option + CDF)
    mode = tl.where(valid, tl.where((cdf != 0) & (uniform == 0), THROUGH_CDF, QUOTIENT), LEAVE)
    beta = tl.load(option + MOMENTUM)
    if WINDOWS:
        seen = tl.load(window, mask=known, other=0) != 0
        closing = tl.load(option + CLOSING) != 0
        beta = tl.where(known & (seen | (valid == 0)), 1.0, beta)
        mode = tl.where(known & (valid == 0) & closing & seen, CLOSE_ONLY, mode)
        seen = (seen | valid) & (closing == 0)
        tl.store(window, seen.to(tl.uint8), mask=known)
    return mode, beta.to(tl.float32), taken


@triton.jit
def _note(record, mean, std, taken, scale, live):
    """Fill in records: statistics of the unscaled gradient, and one more slice left out."""
    tl.store(record + MEAN, mean / scale, mask=live)
    tl.store(record + STD, std / scale, mask=live)
    left = live & (taken == 0)
    count = tl.load(record + SKIPPED, mask=left, other=0.0)
    tl.store(record + SKIPPED, count + 1.0, mask=left)


@triton.jit
def _publish(
    n, mean, m2, least, most, segment, segments_ptr, folds_ptr, options_ptr, scale_ptr, found_ptr,
    WIDE: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Store a segment's fold and record."""
    if WIDE:
        uniform = tl.sqrt(m2 / n) <= tl.abs(mean) * UNIFORM
    else:
        # extremes drop NaN, the mean never does
        uniform = (least == most) & (mean == mean)
        mean = tl.where(uniform, least, mean)
        m2 = tl.where(uniform, 0.0, m2)
    here = segments_ptr + segment * SEGMENT_COLUMNS
    coded = tl.load(here + 3)
    option = options_ptr + (coded >> 1) * OPTION_COLUMNS
    centering = tl.where((coded & 1) != 0, tl.load(option + CENTERING), 0.0)
    scale = tl.load(scale_ptr).to(tl.float64)
    up, more, high, low, inverse = fold(
        mean, m2, n, uniform, centering, tl.load(option + EPS) * scale, tl.load(option + SIGN)
    )
    window = tl.load(here + 5)
    known = window != 0
    mode, beta, taken = _admit(
        mean, m2, uniform, option, found_ptr, window.to(tl.pointer_type(tl.uint8)), known, WINDOWS
    )
    if mode == CLOSE_ONLY:
        # a gradient of 0
        high = 0.0
        low = 0.0
        inverse = 0.0
    row = folds_ptr + segment * FOLD_COLUMNS
    tl.store(row, up)
    tl.store(row + 1, more)
    tl.store(row + 2, high)
    tl.store(row + 3, low)
    tl.store(row + 4, inverse)
    tl.store(row + 5, mode.to(tl.float32))
    tl.store(row + 6, beta)
    tl.store(row + 7, tl.load(option + FRESH).to(tl.float32))
    record = tl.load(here + 4).to(tl.pointer_type(tl.float64))
    _note(record, mean, tl.sqrt(m2 / n), taken, scale, n > 0)


@triton.jit
def _slice(
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
            _publish(
                n, mean, m2, least, most, segment, segments_ptr, folds_ptr, options_ptr,
                scale_ptr, found_ptr, WIDE, WINDOWS,
            )  # fmt: skip
    return last


@triton.jit
def _tile(
    row, rows_ptr, options_ptr, clocks_ptr, scale_ptr, found_ptr, grad_ptrs, param_ptrs,
    momentum_ptrs, master_ptrs, GRAD: tl.constexpr, PARAM: tl.constexpr, BUFFER: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, WINDOWS: tl.constexpr, SOFT: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Slices of at most COLUMNS entries each, from one gradient read to the stores."""
    # one row to a thread: eight rows of float64 statistics took 255 registers and spilled
    ROWS: tl.constexpr = BLOCK // COLUMNS if BLOCK > COLUMNS else 1
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    present = r < tl.load(row + 1).to(tl.int32)
    # listed: one row per tensor of the table; else consecutive rows of one tensor
    listed = tl.load(row + 3)
    tensor = tl.load(row) + r * listed
    about = rows_ptr + tensor * ROW_COLUMNS
    length = tl.load(about, mask=present, other=0).to(tl.int32)
    coded = tl.load(about + 1, mask=present, other=0)
    index = (tl.load(row + 2) + r) * (1 - listed)
    start = index * length
    if ALIGNED:
        # plan._granule: a bound of so many elements does not cut a 16-byte access
        GRANULE: tl.constexpr = (
            4 if tl.float32 == GRAD and tl.float32 == PARAM and tl.float32 == BUFFER else 8
        )
        x_live = c < tl.multiple_of(length, (GRANULE, GRANULE))
    else:
        x_live = c < length

    base = tl.load(grad_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(GRAD))
    grad = base + start + c
    if ALIGNED:
        grad = tl.multiple_of(grad, (16, 16))
    x = tl.load(grad, mask=x_live, other=0.0, eviction_policy="evict_first").to(tl.float32)
    n = tl.maximum(length, 1).to(tl.float64)
    mean, m2, least, most = tile_moments(x, x_live, length.to(tl.float32), 1)
    # extremes drop NaN, the mean never does
    uniform = (least == most) & (mean == mean)
    mean = tl.where(uniform, least.to(tl.float64), mean)
    m2 = tl.where(uniform, 0.0, m2)

    option = options_ptr + (coded >> 1) * OPTION_COLUMNS
    centering = tl.where((coded & 1) != 0, tl.load(option + CENTERING), 0.0)
    scale = tl.load(scale_ptr).to(tl.float64)
    up, more, high, low, inverse = fold(
        mean, m2, n, uniform, centering, tl.load(option + EPS) * scale, tl.load(option + SIGN)
    )
    address = tl.load(about + 3, mask=present, other=0)
    window = address.to(tl.pointer_type(tl.uint8)) + index
    mode, beta, taken = _admit(
        mean, m2, uniform, option, found_ptr, window, present & (address != 0), WINDOWS
    )
    address = tl.load(about + 2, mask=present, other=0)
    record = address.to(tl.pointer_type(tl.float64)) + index * RECORD_COLUMNS
    _note(record, mean, tl.sqrt(m2 / n), taken, scale, present)
    lr = tl.load(option + LR).to(tl.float32)
    decay = tl.load(option + DECAY).to(tl.float32)
    fresh = tl.load(option + FRESH).to(tl.float32)
    nesterov = tl.load(option + NESTEROV).to(tl.float32)

    ghat = (((x * up) * more - high) - low) * inverse
    # CLOSE_ONLY, of another row, is greater
    if tl.max(mode) >= THROUGH_CDF:
        ghat = tl.where(mode == THROUGH_CDF, bounded(ghat), ghat)
    live = x_live & (mode != LEAVE)
    held = live & (tl.load(option + BUFFERED) != 0)
    moved = live
    if WINDOWS:
        ghat = tl.where(mode == CLOSE_ONLY, 0.0, ghat)
        moved = live & (tl.load(option + CLOSING) != 0)
    base = tl.load(param_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(PARAM))
    param = base + start + c
    base = tl.load(momentum_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(BUFFER))
    momentum = base + start + c
    if ALIGNED:
        param = tl.multiple_of(param, (16, 16))
        momentum = tl.multiple_of(momentum, (16, 16))
    p = tl.load(param, mask=moved, other=0.0, eviction_policy="evict_first")
    m = tl.load(momentum, mask=held, other=0.0, eviction_policy="evict_first").to(tl.float32)
    rest = p
    hashed = c
    if KIND == STOCHASTIC:
        key = tl.load(master_ptrs + tensor, mask=present, other=0)
        tensor_seed, step_seed = rounding_seeds(tl.load(clocks_ptr + (coded >> 1)), key)
        hashed = hash_positions(start + c, tensor_seed, step_seed)
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        STORAGE: tl.constexpr = tl.int16 if KIND == REMAINDER else tl.float32
        base = tl.load(master_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(STORAGE))
        master = base + start + c
        if ALIGNED:
            master = tl.multiple_of(master, (16, 16))
        rest = tl.load(master, mask=moved, other=0, eviction_policy="evict_first")
    old = widen(p, rest, KIND, SOFT)
    new, m = move(old, m, ghat, lr, decay, beta, fresh, nesterov)
    p, rest = narrow(new, PARAM, hashed, KIND, SOFT)
    tl.store(param, p, mask=moved, eviction_policy="evict_first")
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        tl.store(master, rest, mask=moved, eviction_policy="evict_first")
    tl.store(momentum, store_as(m, BUFFER, SOFT), mask=held, eviction_policy="evict_first")


@triton.jit
def _tile_of_any_shape(
    row, rows_ptr, options_ptr, clocks_ptr, scale_ptr, found_ptr, grad_ptrs, param_ptrs,
    momentum_ptrs, master_ptrs, GRAD: tl.constexpr, PARAM: tl.constexpr, BUFFER: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, WINDOWS: tl.constexpr, SOFT: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile by the code for its number of columns: `Tuning.tile_columns`."""
    columns = tl.load(row + 4)
    for shrink in tl.static_range(4):
        if columns == TILE >> (2 * shrink):
            _tile(
                row, rows_ptr, options_ptr, clocks_ptr, scale_ptr, found_ptr, grad_ptrs,
                param_ptrs, momentum_ptrs, master_ptrs, GRAD, PARAM, BUFFER, KIND, ALIGNED,
                WINDOWS, SOFT, BLOCK, TILE >> (2 * shrink),
            )  # fmt: skip


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
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        # the updates may start as soon as every program here has; they wait before they read
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0).to(tl.int64)
    if program < n_slices:
        _slice(
            slices_ptr + program * 5, segments_ptr, partials_ptr, n_partials, arrived_ptr,
            folds_ptr, options_ptr, scale_ptr, found_ptr, tables_ptr, grad_ptrs,
            GRAD, ALIGNED, WIDE, WINDOWS, TABLES, BLOCK, UNROLL, MERGE,
        )  # fmt: skip
    elif TILES:
        _tile_of_any_shape(
            tiles_ptr + (program - n_slices) * 5, rows_ptr, options_ptr, clocks_ptr, scale_ptr,
            found_ptr, grad_ptrs, param_ptrs, momentum_ptrs, master_ptrs,
            GRAD, PARAM, BUFFER, KIND, ALIGNED, WINDOWS, SOFT, BLOCK, TILE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["n_segments"],
    do_not_specialize_on_alignment=[
        "tables_ptr", "segments_ptr", "folds_ptr", "options_ptr", "scale_ptr", "found_ptr",
    ],
)  # fmt: skip
def _publish_kernel(
    tables_ptr,  # float64 [n_segments, TABLE_COLUMNS], of whole segments
    n_segments,
    segments_ptr,  # this and what follows as in `_statistics_kernel`
    folds_ptr,
    options_ptr,
    scale_ptr,
    found_ptr,
    WIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Folds and records of segments whose statistics were merged over processes."""
    segment = tl.program_id(0).to(tl.int64)
    if segment < n_segments:
        table = tables_ptr + segment * TABLE_COLUMNS
        _publish(
            tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3),
            tl.load(table + 4), segment, segments_ptr, folds_ptr, options_ptr, scale_ptr,
            found_ptr, WIDE, WINDOWS,
        )  # fmt: skip

"""What becomes of slices whose statistics are known: factors, mode and records.

A long segment's are published in tables, for the second launch; a tile goes on with its own.
"""

import triton
import triton.language as tl

from .moments import UNIFORM, fold
from .update import (
    CDF,
    CENTERING,
    CLOSE_ONLY,
    CLOSING,
    EPS,
    FOLD_COLUMNS,
    FRESH,
    LEAVE,
    MOMENTUM,
    OPTION_COLUMNS,
    PROPAGATE,
    QUOTIENT,
    SEGMENT_COLUMNS,
    SIGN,
    THROUGH_CDF,
)

# columns of a record, as in bngd_triton/records.py
RECORD_COLUMNS = tl.constexpr(3)
MEAN = tl.constexpr(0)
STD = tl.constexpr(1)
SKIPPED = tl.constexpr(2)
# columns of a table of statistics, as in bngd_triton/sharding/exchange.py: entries, mean, sum of
# squared deviations, least, greatest
TABLE_COLUMNS = tl.constexpr(5)


@triton.jit
def settle(
    n, mean, m2, uniform, option, centred, scale_ptr, found_ptr, window, known,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Fold the statistics of slices and decide whether they move.

    ``known`` says where there is a ``window``. Returns the factors, the mode, momentum's weight,
    whether each slice was finite or propagates, and what the gradient was multiplied by.
    """
    centering = tl.where(centred, tl.load(option + CENTERING), 0.0)
    scale = tl.load(scale_ptr).to(tl.float64)
    up, more, high, low, inverse = fold(
        mean, m2, n, uniform, centering, tl.load(option + EPS) * scale, tl.load(option + SIGN)
    )
    finite = (mean - mean == 0) & (m2 - m2 == 0)
    taken = finite | (tl.load(option + PROPAGATE) != 0)
    # a sum over devices, so anything but 0; by a product, since the interpreter cannot combine
    # the comparison of a scalar with that of a tensor
    valid = (taken.to(tl.int32) * (tl.load(found_ptr) == 0).to(tl.int32)) != 0
    cdf = tl.load(option + CDF)
    mode = tl.where(valid, tl.where((cdf != 0) & (uniform == 0), THROUGH_CDF, QUOTIENT), LEAVE)
    beta = tl.load(option + MOMENTUM)
    if WINDOWS:
        # False where there is no window
        seen = tl.load(window, mask=known, other=0) != 0
        closing = tl.load(option + CLOSING) != 0
        # momentum decays with the first valid micro-batch; it is not read where mode is LEAVE
        beta = tl.where(seen, 1.0, beta)
        mode = tl.where(seen & (valid == 0) & closing, CLOSE_ONLY, mode)
        # every thread of a slice has read what one of them now writes
        tl.debug_barrier()
        tl.store(window, ((seen | valid) & (closing == 0)).to(tl.uint8), mask=known)
    return up, more, high, low, inverse, mode, beta.to(tl.float32), taken, scale


@triton.jit
def note(record, mean, std, taken, scale, live):
    """Fill in records: statistics of the unscaled gradient, and one more slice left out."""
    tl.store(record + MEAN, mean / scale, mask=live)
    tl.store(record + STD, std / scale, mask=live)
    left = live & (taken == 0)
    # no barrier, unlike in `settle`: nobody goes on with a count but the thread that stores its own
    count = tl.load(record + SKIPPED, mask=left, other=0.0)
    tl.store(record + SKIPPED, count + 1.0, mask=left)


@triton.jit
def publish(
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
    window = tl.load(here + 5)
    up, more, high, low, inverse, mode, beta, taken, scale = settle(
        n, mean, m2, uniform, option, (coded & 1) != 0, scale_ptr, found_ptr,
        window.to(tl.pointer_type(tl.uint8)), window != 0, WINDOWS,
    )  # fmt: skip
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
    note(record, mean, tl.sqrt(m2 / n), taken, scale, n > 0)


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
        publish(
            tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3),
            tl.load(table + 4), segment, segments_ptr, folds_ptr, options_ptr, scale_ptr,
            found_ptr, WIDE, WINDOWS,
        )  # fmt: skip

"""First launch of a step: statistics of slices with spans.

A program makes one pass over the gradient of a span. The one that finishes a slice's last span (an
integer counter says which) merges the partial results in the order of the spans and publishes the
slice's factors. The order of merging never depends on the order of arrival.

Traffic per element: reads g (4 bytes in float32).
"""

import triton
import triton.language as tl

from .factors import publish
from .moments import block_moments, lane_moments

from .tables import (  # isort: skip
    MOMENT_GREATEST, MOMENT_LEAST, MOMENT_M2, MOMENT_MEAN, MOMENT_N, MOMENTS_COLUMNS, SLICE_COLUMNS,
    SLICE_FIRST, SLICE_SPANS, SPAN_COLUMNS, SPAN_LENGTH, SPAN_PARTIAL, SPAN_SLICE, SPAN_START,
    SPAN_TENSOR,
)  # fmt: skip

# parts of one upload: their alignment must not choose among compilations, nor their sizes
ARGUMENTS = [
    "slices_ptr", "partials_ptr", "arrived_ptr", "factors_ptr", "options_ptr", "scale_ptr",
    "found_ptr", "grad_ptrs",
]  # fmt: skip


@triton.jit
def _merge_partials(partials, n_partials, count, WIDE: tl.constexpr, MERGE: tl.constexpr):
    """Moments of ``count`` partial results at ``partials``, in a fixed order."""
    k = tl.arange(0, MERGE)
    means = partials + MOMENT_MEAN * n_partials
    base = tl.load(means)
    total = tl.zeros((MERGE,), tl.float64)
    away = tl.zeros((MERGE,), tl.float64)
    least = tl.zeros((MERGE,), tl.float64) + float("inf")
    greatest = tl.zeros((MERGE,), tl.float64) - float("inf")
    i = count * 0
    while i < count:
        live = k < count - i
        n = tl.load(partials + MOMENT_N * n_partials + i + k, mask=live, other=0.0)
        mean = tl.load(means + i + k, mask=live, other=0.0)
        total += n
        away += n * tl.where(live, mean - base, 0.0)
        if not WIDE:
            column = partials + MOMENT_LEAST * n_partials
            low = tl.load(column + i + k, mask=live, other=float("inf"))
            column = partials + MOMENT_GREATEST * n_partials
            high = tl.load(column + i + k, mask=live, other=float("-inf"))
            least = tl.minimum(least, low)
            greatest = tl.maximum(greatest, high)
        i += MERGE
    n_all = tl.sum(total, 0)
    shift = tl.sum(away, 0) / n_all
    m2 = tl.zeros((MERGE,), tl.float64)
    i = count * 0
    while i < count:
        live = k < count - i
        n = tl.load(partials + MOMENT_N * n_partials + i + k, mask=live, other=0.0)
        mean = tl.load(means + i + k, mask=live, other=0.0)
        d = tl.where(live, mean - base - shift, 0.0)
        column = partials + MOMENT_M2 * n_partials
        m2 += tl.load(column + i + k, mask=live, other=0.0) + n * d * d
        i += MERGE
    return n_all, base + shift, tl.sum(m2, 0), tl.min(least, 0), tl.max(greatest, 0)


@triton.jit
def _store_moments(row, stride, moments, EXTREMES: tl.constexpr):
    """One result, its columns ``stride`` apart."""
    n, mean, m2, least, greatest = moments
    tl.store(row + MOMENT_N * stride, n)
    tl.store(row + MOMENT_MEAN * stride, mean)
    tl.store(row + MOMENT_M2 * stride, m2)
    if EXTREMES:
        tl.store(row + MOMENT_LEAST * stride, least)
        tl.store(row + MOMENT_GREATEST * stride, greatest)


@triton.jit
def measure_span(
    row, slices_ptr, partials_ptr, n_partials, arrived_ptr, factors_ptr, options_ptr, scaler,
    moments_ptr, grad_ptrs, GRAD: tl.constexpr, ALIGNED: tl.constexpr, HINTS: tl.constexpr,
    WIDE: tl.constexpr, WINDOWS: tl.constexpr, TABLES: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Statistics of one span; the last one of a slice publishes it. Returns whether this did.

    TABLES leaves them in a table instead: other processes have parts of the same slices.
    """
    tensor = tl.load(row + SPAN_TENSOR)
    start = tl.load(row + SPAN_START)
    length = tl.load(row + SPAN_LENGTH).to(tl.int32)
    partial = tl.load(row + SPAN_PARTIAL)
    i_slice = tl.load(row + SPAN_SLICE)
    grad = tl.load(grad_ptrs + tensor).to(tl.pointer_type(GRAD)) + start
    if WIDE:
        n, mean, m2 = lane_moments(grad, length, ALIGNED, HINTS, BLOCK, UNROLL)
        moments = (n, mean, m2, mean, mean)
    else:
        n, mean, m2, least, greatest = block_moments(grad, length, ALIGNED, HINTS, BLOCK * UNROLL)
        moments = (n, mean, m2, least.to(tl.float64), greatest.to(tl.float64))
    first = tl.load(slices_ptr + i_slice * SLICE_COLUMNS + SLICE_FIRST)
    count = tl.load(slices_ptr + i_slice * SLICE_COLUMNS + SLICE_SPANS)
    arrivals = count - 1
    if count > 1:
        _store_moments(partials_ptr + partial, n_partials, moments, not WIDE)
        # every lane's stores before the counter's release
        tl.debug_barrier()
        arrivals = tl.atomic_add(arrived_ptr + i_slice, 1, sem="acq_rel").to(tl.int64)
    last = arrivals == count - 1
    if last:
        if count > 1:
            tl.debug_barrier()
            moments = _merge_partials(partials_ptr + first, n_partials, count, WIDE, MERGE)
            tl.store(arrived_ptr + i_slice, 0)
        if TABLES:
            _store_moments(moments_ptr + i_slice * MOMENTS_COLUMNS, 1, moments, True)
        else:
            publish(moments, i_slice, slices_ptr, factors_ptr, options_ptr, scaler, WIDE, WINDOWS)
    return last


@triton.jit(
    do_not_specialize=["n_partials"],
    do_not_specialize_on_alignment=["spans_ptr", "moments_ptr", *ARGUMENTS],
)
def _statistics_kernel(
    spans_ptr,  # int64 [programs, SPAN_COLUMNS]
    slices_ptr,  # int64 [slices, SLICE_COLUMNS]
    partials_ptr,  # float64 [MOMENTS_COLUMNS, n_partials]
    n_partials,
    arrived_ptr,  # int32 [slices], zero before and after
    factors_ptr,  # float32 [slices, FACTORS_COLUMNS]
    options_ptr,  # float64 [groups, OPTION_COLUMNS]
    scale_ptr,  # float32 [1], what gradients were multiplied by
    found_ptr,  # float32 [1], anything but 0 makes gradients invalid
    moments_ptr,  # float64 [slices, MOMENTS_COLUMNS], instead of factors if TABLES
    grad_ptrs,  # int64 [tensors]
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    HINTS: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TABLES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    measure_span(
        spans_ptr + tl.program_id(0).to(tl.int64) * SPAN_COLUMNS, slices_ptr, partials_ptr,
        n_partials, arrived_ptr, factors_ptr, options_ptr, (scale_ptr, found_ptr), moments_ptr,
        grad_ptrs, GRAD, ALIGNED, HINTS, WIDE, WINDOWS, TABLES, BLOCK, UNROLL, MERGE,
    )  # fmt: skip

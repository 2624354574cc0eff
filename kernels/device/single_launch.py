"""Statistics and updates of slices with spans in one launch: tickets drawn from one work list.

    S(w0) S(w1) U(w0) S(w2) U(w1) ... U(wn)

S are the spans, U the chunks of the slices of a wave; `work.py` lays the list out. A program draws
a ticket, does that item and draws the next. Spans, factors and chunks are the device functions of
the two-launch form, so both give the same bits.

It cannot deadlock, whatever the grid and however few programs are resident. Only a chunk waits,
and only for its slice's spans. Those have lower tickets, so each was drawn by a program that is
running; spans never wait; so all of them end, and the last one raises the slice's flag.

Every program draws exactly one ticket past the list, after its last item. Who draws the last of
those knows that nobody works or waits any more and zeroes ticket and flags: the next launch, or a
graph's replay, finds them as this one did, without a memset.

Traffic per gradient element, float32 with momentum: what two launches ask for (24 bytes), of which
the chunk's read of g (4 bytes) is meant to hit L2, where its span left it two waves ago.
"""

import triton
import triton.language as tl

from .measure import ARGUMENTS, measure_span

from .tables import (  # isort: skip
    CHUNK_SLICE, ITEM_COLUMNS, ITEM_KIND, ITEM_ROW, SPAN_ITEM, SPAN_SLICE,
)  # fmt: skip
from .update import update_chunk

# flags zeroed per trip
RESET = tl.constexpr(256)


@triton.jit
def _await(flag):
    """Return once the flag is raised; what was stored before it was is visible then."""
    # an addition of 0 is compiled to a load with acquire; `.cv` loads are not, Triton drops it
    raised = tl.atomic_add(flag, 0, sem="acquire")
    while raised == 0:
        raised = tl.atomic_add(flag, 0, sem="acquire")
    # one thread polls: the others may read only after it has seen the flag
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=["n_items", "n_partials", "first_slice", "n_slices"],
    do_not_specialize_on_alignment=[
        "items_ptr", "counters_ptr", "clocks_ptr", "param_ptrs", "momentum_ptrs", "master_ptrs",
        *ARGUMENTS,
    ],
)  # fmt: skip
def _single_kernel(
    items_ptr,  # int64 [n_items, ITEM_COLUMNS]: kind, then a row of the spans or chunks
    n_items,
    counters_ptr,  # int32 [1 + n_slices]: ticket, flags; zero before and after
    first_slice,
    n_slices,
    slices_ptr,  # this and all that follow as in `_statistics_kernel` and `_update_kernel`
    partials_ptr,
    n_partials,
    arrived_ptr,
    factors_ptr,
    options_ptr,
    clocks_ptr,
    scale_ptr,
    found_ptr,
    grad_ptrs,
    param_ptrs,
    momentum_ptrs,
    master_ptrs,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    HINTS: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    MERGE: tl.constexpr,
    UPDATE_BLOCK: tl.constexpr,
):  # fmt: skip
    # the flag of slice s is at flags + s
    flags = counters_ptr + 1 - first_slice
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < n_items:
        item = items_ptr + ticket.to(tl.int64) * ITEM_COLUMNS
        row = item + ITEM_ROW
        if tl.load(item + ITEM_KIND) == SPAN_ITEM:
            published = measure_span(
                row, slices_ptr, partials_ptr, n_partials, arrived_ptr, factors_ptr,
                options_ptr, (scale_ptr, found_ptr), partials_ptr, grad_ptrs,
                GRAD, ALIGNED, HINTS, WIDE, WINDOWS, False, BLOCK, UNROLL, MERGE,
            )  # fmt: skip
            if published:
                # every thread's stores of the factors before the one thread's release
                tl.debug_barrier()
                tl.atomic_xchg(flags + tl.load(row + SPAN_SLICE), 1, sem="release")
        else:
            _await(flags + tl.load(row + CHUNK_SLICE))
            update_chunk(
                row, slices_ptr, factors_ptr, options_ptr, clocks_ptr,
                (grad_ptrs, param_ptrs, momentum_ptrs, master_ptrs), GRAD, PARAM, BUFFER, KIND,
                ALIGNED, HINTS, WINDOWS, SOFT, UPDATE_BLOCK,
            )  # fmt: skip
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    if ticket == n_items + tl.num_programs(0) - 1:
        i = n_slices * 0
        while i <= n_slices:
            k = tl.arange(0, RESET)
            tl.store(counters_ptr + i + k, 0, mask=k <= n_slices - i)
            i += RESET

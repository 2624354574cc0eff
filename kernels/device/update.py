"""Normalise and move: the elementwise half of a step, in float32.

    ghat  = ((g * up * more) - high - low) * inverse
    m     = momentum * m + (1 - momentum) * ghat
    u     = momentum * m + (1 - momentum) * ghat if nesterov else m
    theta = (1 - lr * weight_decay) * theta - lr * u

The same operations in the same order as `reference._update_`, each rounded once.

Traffic per element, float32 with momentum: reads g, theta, m; writes theta, m (20 bytes).
Without momentum 12 bytes; bfloat16 parameters and gradients with float32 momentum 14.
"""

import triton
import triton.language as tl

from .rounding import (
    MASTER_COPY,
    REMAINDER,
    STOCHASTIC,
    hash_positions,
    narrow,
    rounding_seeds,
    store_as,
    widen,
)

# columns of the option table, float64, OPTION_COLUMNS to a row; the first four hold values
# already rounded to float32
OPTION_COLUMNS = tl.constexpr(16)
LR = tl.constexpr(0)
DECAY = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
FRESH = tl.constexpr(3)
EPS = tl.constexpr(4)
CENTERING = tl.constexpr(5)
SIGN = tl.constexpr(6)
NESTEROV = tl.constexpr(7)
CDF = tl.constexpr(8)
PROPAGATE = tl.constexpr(9)
BUFFERED = tl.constexpr(10)
CLOSING = tl.constexpr(11)
# for rates on a device, whose decay is made there
WEIGHT_DECAY = tl.constexpr(12)

# columns of the fold table, float32: up, more, high, low, inverse, mode, beta, fresh
FOLD_COLUMNS = tl.constexpr(8)

# columns of the segment table: first partial, partials, elements, option row * 2 + centred,
# address of the record, address of the window or 0
SEGMENT_COLUMNS = tl.constexpr(6)

# what a step does with a slice
LEAVE = tl.constexpr(0.0)
QUOTIENT = tl.constexpr(1.0)
THROUGH_CDF = tl.constexpr(2.0)
# an invalid gradient ends a window in which others were valid: move by what momentum holds
CLOSE_ONLY = tl.constexpr(3.0)


@triton.jit
def bounded(ghat):
    """``sqrt(3) * (2 * Phi(ghat) - 1)``."""
    return tl.erf(ghat * 0.7071067811865476) * 1.7320508075688772


@triton.jit
def move(
    param, momentum, master, p, m, rest, ghat, hashed, moved, held, lr, decay, beta, fresh,
    nesterov, KIND: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Store what becomes of the values ``p``, ``m`` (float32) and ``rest`` of three tensors.

    With ``beta`` 0 and ``m`` 0 the new momentum is ghat. Nothing is read again: evict_first.
    """
    new = ghat * fresh
    m = m * beta + new
    update = tl.where(nesterov != 0, m * beta + new, m)
    theta = widen(p, rest, KIND, SOFT) * decay - update * lr
    p, rest = narrow(theta, param.dtype.element_ty, hashed, KIND, SOFT)
    tl.store(param, p, mask=moved, eviction_policy="evict_first")
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        tl.store(master, rest, mask=moved, eviction_policy="evict_first")
    m = store_as(m, momentum.dtype.element_ty, SOFT)
    tl.store(momentum, m, mask=held, eviction_policy="evict_first")


@triton.jit
def _update_block(
    grad, param, momentum, master, offsets, fed, held, moved, place, mode, up, more, high, low,
    inverse, lr, decay, beta, fresh, nesterov, tensor_seed, step_seed,
    KIND: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """One block: load, move, store. Nothing is read again: evict_first.

    ``fed``, ``held`` and ``moved`` mask the gradient, momentum and the parameter.
    """
    g = tl.load(grad + offsets, mask=fed, other=0.0, eviction_policy="evict_first")
    p = tl.load(param + offsets, mask=moved, other=0.0, eviction_policy="evict_first")
    m = tl.load(momentum + offsets, mask=held, other=0.0, eviction_policy="evict_first")
    ghat = (((g.to(tl.float32) * up) * more - high) - low) * inverse
    if mode == THROUGH_CDF:
        ghat = bounded(ghat)
    rest = p
    hashed = offsets
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        rest = tl.load(master + offsets, mask=moved, other=0, eviction_policy="evict_first")
    if KIND == STOCHASTIC:
        hashed = hash_positions(place + offsets, tensor_seed, step_seed)
    move(
        param + offsets, momentum + offsets, master + offsets, p, m.to(tl.float32), rest, ghat,
        hashed, moved, held, lr, decay, beta, fresh, nesterov, KIND, SOFT,
    )  # fmt: skip


@triton.jit
def move_chunk(
    row, segments_ptr, folds_ptr, options_ptr, clocks_ptr, grad_ptrs, param_ptrs, momentum_ptrs,
    master_ptrs, GRAD: tl.constexpr, PARAM: tl.constexpr, BUFFER: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, WINDOWS: tl.constexpr, SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move one chunk by its segment's fold, which must have been published."""
    tensor = tl.load(row)
    start = tl.load(row + 1)
    n = tl.load(row + 2).to(tl.int32)
    segment = tl.load(row + 3)
    fold_row = folds_ptr + segment * FOLD_COLUMNS
    mode = tl.load(fold_row + 5)
    if mode != LEAVE:
        up = tl.load(fold_row)
        more = tl.load(fold_row + 1)
        high = tl.load(fold_row + 2)
        low = tl.load(fold_row + 3)
        inverse = tl.load(fold_row + 4)
        beta = tl.load(fold_row + 6)
        fresh = tl.load(fold_row + 7)
        group = tl.load(segments_ptr + segment * SEGMENT_COLUMNS + 3) >> 1
        option = options_ptr + group * OPTION_COLUMNS
        lr = tl.load(option + LR).to(tl.float32)
        decay = tl.load(option + DECAY).to(tl.float32)
        nesterov = tl.load(option + NESTEROV)
        buffered = tl.load(option + BUFFERED)
        closing = tl.load(option + CLOSING)
        grad = tl.load(grad_ptrs + tensor).to(tl.pointer_type(GRAD)) + start
        param = tl.load(param_ptrs + tensor).to(tl.pointer_type(PARAM)) + start
        momentum = tl.load(momentum_ptrs + tensor).to(tl.pointer_type(BUFFER)) + start
        tensor_seed = tensor
        step_seed = tensor
        master = param
        if KIND == STOCHASTIC:
            # in the place of a master's address: the tensor's key
            key = tl.load(master_ptrs + tensor)
            tensor_seed, step_seed = rounding_seeds(tl.load(clocks_ptr + group), key)
        elif KIND == REMAINDER:
            master = tl.load(master_ptrs + tensor).to(tl.pointer_type(tl.int16)) + start
        elif KIND == MASTER_COPY:
            master = tl.load(master_ptrs + tensor).to(tl.pointer_type(tl.float32)) + start
        offsets = tl.arange(0, BLOCK)
        whole = n // 16 * 16
        # how far each tensor is touched: bounds that are multiples of 16 keep accesses wide
        fed_to = whole
        moved_to = whole
        if WINDOWS:
            fed_to = tl.where(mode != CLOSE_ONLY, whole, 0)
            moved_to = tl.where(closing != 0, whole, 0)
        held_to = tl.where(buffered != 0, whole, 0)
        i = n * 0
        while i < whole:
            g = grad + i
            p = param + i
            m = momentum + i
            a = master + i
            if ALIGNED:
                # divisibility does not survive the cast from a table's integer
                g = tl.multiple_of(g, 16)
                p = tl.multiple_of(p, 16)
                m = tl.multiple_of(m, 16)
                a = tl.multiple_of(a, 16)
            fed = offsets < tl.multiple_of(fed_to - i, 16)
            held = offsets < tl.multiple_of(held_to - i, 16)
            moved = offsets < tl.multiple_of(moved_to - i, 16)
            _update_block(
                g, p, m, a, offsets, fed, held, moved, start + i, mode, up, more, high, low,
                inverse, lr, decay, beta, fresh, nesterov, tensor_seed, step_seed, KIND, SOFT,
            )  # fmt: skip
            i += BLOCK
        if whole < n:
            rest = tl.arange(0, 16)
            left = n - whole
            fed = rest < left
            moved = fed
            if WINDOWS:
                fed = rest < tl.where(mode != CLOSE_ONLY, left, 0)
                moved = rest < tl.where(closing != 0, left, 0)
            held = rest < tl.where(buffered != 0, left, 0)
            _update_block(
                grad + whole, param + whole, momentum + whole, master + whole, rest, fed, held,
                moved, start + whole, mode, up, more, high, low, inverse, lr, decay, beta, fresh,
                nesterov, tensor_seed, step_seed, KIND, SOFT,
            )  # fmt: skip


@triton.jit(
    do_not_specialize_on_alignment=[
        "chunks_ptr", "segments_ptr", "folds_ptr", "options_ptr", "clocks_ptr",
        "grad_ptrs", "param_ptrs", "momentum_ptrs", "master_ptrs",
    ]
)  # fmt: skip
def _update_kernel(
    chunks_ptr,  # int64 [programs, 4]: tensor, first element, elements, segment
    segments_ptr,  # int64 [segments, SEGMENT_COLUMNS]
    folds_ptr,  # float32 [segments, FOLD_COLUMNS]
    options_ptr,  # float64 [groups, OPTION_COLUMNS]
    clocks_ptr,  # int64 [groups]
    grad_ptrs,  # int64 [tensors], likewise the next three
    param_ptrs,
    momentum_ptrs,
    master_ptrs,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    WINDOWS: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # backwards: the gradients that the statistics read last are still in L2
    row = chunks_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * 4
    move_chunk(
        row, segments_ptr, folds_ptr, options_ptr, clocks_ptr, grad_ptrs, param_ptrs,
        momentum_ptrs, master_ptrs, GRAD, PARAM, BUFFER, KIND, ALIGNED, WINDOWS, SOFT, BLOCK,
    )  # fmt: skip

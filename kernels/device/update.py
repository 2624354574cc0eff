"""Normalise and update: the elementwise half of a step, in float32.

    ghat  = ((g * up * more) - high - low) * inverse
    m     = momentum * m + (1 - momentum) * ghat
    u     = momentum * m + (1 - momentum) * ghat if nesterov else m
    theta = (1 - lr * weight_decay) * theta - lr * u

The same operations in the same order as the eager twin's, each rounded once.

Traffic per element, float32 with momentum: reads g, theta, m; writes theta, m (20 bytes).
Without momentum 12 bytes; bfloat16 parameters and gradients with float32 momentum 14.
"""

import triton
import triton.language as tl

from .factors import CLOSE_ONLY, LEAVE, THROUGH_CDF
from .rounding import hash_positions, narrow, rounding_seeds, store_as, widen

from .tables import (  # isort: skip
    BUFFERED, CHUNK_COLUMNS, CHUNK_LENGTH, CHUNK_SLICE, CHUNK_START, CHUNK_TENSOR, CLOSING, DECAY,
    FACTOR_BETA, FACTOR_FRESH, FACTOR_HIGH, FACTOR_INVERSE, FACTOR_LOW, FACTOR_MODE, FACTOR_MORE,
    FACTOR_UP, FACTORS_COLUMNS, LR, MASTER_COPY, NESTEROV, OPTION_COLUMNS, REMAINDER, SLICE_CODED,
    SLICE_COLUMNS, STOCHASTIC,
)  # fmt: skip


@triton.jit
def normalize(g, factors):
    """``ghat`` of float32 gradients, before the CDF."""
    up, more, high, low, inverse = factors
    return (((g * up) * more - high) - low) * inverse


@triton.jit
def bounded(ghat):
    """``sqrt(3) * (2 * Phi(ghat) - 1)``."""
    return tl.erf(ghat * 0.7071067811865476) * 1.7320508075688772


@triton.jit
def update_options(option):
    """What `update_` follows of a row of the options."""
    lr = tl.load(option + LR).to(tl.float32)
    decay = tl.load(option + DECAY).to(tl.float32)
    nesterov = tl.load(option + NESTEROV).to(tl.float32)
    return lr, decay, nesterov


@triton.jit
def update_(
    param, momentum, master, p, m, rest, ghat, hashed, m_param, m_momentum, options, beta, fresh,
    KIND: tl.constexpr, HINTS: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Store what becomes of the values ``p``, ``m`` (float32) and ``rest`` of three tensors.

    With ``beta`` 0 and ``m`` 0 the new momentum is ghat. Nothing is read again.
    """
    ONCE: tl.constexpr = "evict_first" if HINTS else ""
    lr, decay, nesterov = options
    # momentum; beta is the group's momentum where nesterov is, which has no windows
    new = ghat * fresh
    m = m * beta + new
    u = tl.where(nesterov != 0, m * beta + new, m)
    # update
    theta = widen(p, rest, KIND, SOFT) * decay - u * lr
    # store
    p, rest = narrow(theta, param.dtype.element_ty, hashed, KIND, SOFT)
    tl.store(param, p, mask=m_param, eviction_policy=ONCE)
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        tl.store(master, rest, mask=m_param, eviction_policy=ONCE)
    m = store_as(m, momentum.dtype.element_ty, SOFT)
    tl.store(momentum, m, mask=m_momentum, eviction_policy=ONCE)


@triton.jit
def _update_block(
    places, offsets, masks, start, factors, mode, rule, seeds, KIND: tl.constexpr,
    HINTS: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """One block, from the loads to the stores; three masks say how far each tensor is touched."""
    grad, param, momentum, master = places
    m_grad, m_momentum, m_param = masks
    options, beta, fresh = rule
    ONCE: tl.constexpr = "evict_first" if HINTS else ""
    # load
    g = tl.load(grad + offsets, mask=m_grad, other=0.0, eviction_policy=ONCE)
    p = tl.load(param + offsets, mask=m_param, other=0.0, eviction_policy=ONCE)
    m = tl.load(momentum + offsets, mask=m_momentum, other=0.0, eviction_policy=ONCE)
    rest = p
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        rest = tl.load(master + offsets, mask=m_param, other=0, eviction_policy=ONCE)
    # normalise
    ghat = normalize(g.to(tl.float32), factors)
    if mode == THROUGH_CDF:
        ghat = bounded(ghat)
    hashed = offsets
    if KIND == STOCHASTIC:
        tensor_seed, step_seed = seeds
        hashed = hash_positions(start + offsets, tensor_seed, step_seed)
    update_(
        param + offsets, momentum + offsets, master + offsets, p, m.to(tl.float32), rest, ghat,
        hashed, m_param, m_momentum, options, beta, fresh, KIND, HINTS, SOFT,
    )  # fmt: skip


@triton.jit
def update_chunk(
    row, slices_ptr, factors_ptr, options_ptr, clocks_ptr, tensors, GRAD: tl.constexpr,
    PARAM: tl.constexpr, BUFFER: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    HINTS: tl.constexpr, WINDOWS: tl.constexpr, SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one chunk by its slice's factors, which must have been published."""
    grad_ptrs, param_ptrs, momentum_ptrs, master_ptrs = tensors
    tensor = tl.load(row + CHUNK_TENSOR)
    start = tl.load(row + CHUNK_START)
    n = tl.load(row + CHUNK_LENGTH).to(tl.int32)
    i_slice = tl.load(row + CHUNK_SLICE)
    published = factors_ptr + i_slice * FACTORS_COLUMNS
    mode = tl.load(published + FACTOR_MODE)
    if mode != LEAVE:
        up = tl.load(published + FACTOR_UP)
        more = tl.load(published + FACTOR_MORE)
        high = tl.load(published + FACTOR_HIGH)
        low = tl.load(published + FACTOR_LOW)
        inverse = tl.load(published + FACTOR_INVERSE)
        factors = (up, more, high, low, inverse)
        beta = tl.load(published + FACTOR_BETA)
        fresh = tl.load(published + FACTOR_FRESH)
        group = tl.load(slices_ptr + i_slice * SLICE_COLUMNS + SLICE_CODED) >> 1
        option = options_ptr + group * OPTION_COLUMNS
        rule = (update_options(option), beta, fresh)
        buffered = tl.load(option + BUFFERED)
        closing = tl.load(option + CLOSING)
        grad = tl.load(grad_ptrs + tensor).to(tl.pointer_type(GRAD)) + start
        param = tl.load(param_ptrs + tensor).to(tl.pointer_type(PARAM)) + start
        momentum = tl.load(momentum_ptrs + tensor).to(tl.pointer_type(BUFFER)) + start
        seeds = (tensor, tensor)
        master = param
        if KIND == STOCHASTIC:
            # in the place of a master's address: the tensor's key
            key = tl.load(master_ptrs + tensor)
            seeds = rounding_seeds(tl.load(clocks_ptr + group), key)
        elif KIND == REMAINDER:
            master = tl.load(master_ptrs + tensor).to(tl.pointer_type(tl.int16)) + start
        elif KIND == MASTER_COPY:
            master = tl.load(master_ptrs + tensor).to(tl.pointer_type(tl.float32)) + start
        # bytes of an access to 16-bit values: of as many as 16 bytes of float32, where there are
        # any, since of eight a thread would take every other 16 bytes
        SOME_WIDE: tl.constexpr = (
            tl.float32 == GRAD or tl.float32 == PARAM or tl.float32 == BUFFER or KIND == MASTER_COPY
        )
        NARROW: tl.constexpr = 8 if SOME_WIDE else 16
        offsets = tl.arange(0, BLOCK)
        whole = n // 16 * 16
        # how far each tensor is touched: bounds that are multiples of 16 keep accesses wide
        grad_end = whole
        param_end = whole
        if WINDOWS:
            grad_end = tl.where(mode != CLOSE_ONLY, whole, 0)
            param_end = tl.where(closing != 0, whole, 0)
        momentum_end = tl.where(buffered != 0, whole, 0)
        i = n * 0
        while i < whole:
            g = grad + i
            p = param + i
            m = momentum + i
            a = master + i
            if ALIGNED:
                # divisibility does not survive the cast from a table's integer
                g = tl.multiple_of(g, 16 if tl.float32 == GRAD else NARROW)
                p = tl.multiple_of(p, 16 if tl.float32 == PARAM else NARROW)
                m = tl.multiple_of(m, 16 if tl.float32 == BUFFER else NARROW)
                a = tl.multiple_of(a, 16 if KIND == MASTER_COPY else NARROW)
            m_grad = offsets < tl.multiple_of(grad_end - i, 16)
            m_momentum = offsets < tl.multiple_of(momentum_end - i, 16)
            m_param = offsets < tl.multiple_of(param_end - i, 16)
            masks = (m_grad, m_momentum, m_param)
            _update_block(
                (g, p, m, a), offsets, masks, start + i, factors, mode, rule, seeds, KIND, HINTS,
                SOFT,
            )  # fmt: skip
            i += BLOCK
        if whole < n:
            rest = tl.arange(0, 16)
            left = n - whole
            m_grad = rest < left
            m_param = m_grad
            if WINDOWS:
                m_grad = rest < tl.where(mode != CLOSE_ONLY, left, 0)
                m_param = rest < tl.where(closing != 0, left, 0)
            m_momentum = rest < tl.where(buffered != 0, left, 0)
            places = (grad + whole, param + whole, momentum + whole, master + whole)
            masks = (m_grad, m_momentum, m_param)
            _update_block(
                places, rest, masks, start + whole, factors, mode, rule, seeds, KIND, HINTS, SOFT
            )


@triton.jit(
    do_not_specialize_on_alignment=[
        "chunks_ptr", "slices_ptr", "factors_ptr", "options_ptr", "clocks_ptr",
        "grad_ptrs", "param_ptrs", "momentum_ptrs", "master_ptrs",
    ]
)  # fmt: skip
def _update_kernel(
    chunks_ptr,  # int64 [programs, CHUNK_COLUMNS]
    slices_ptr,  # int64 [slices, SLICE_COLUMNS]
    factors_ptr,  # float32 [slices, FACTORS_COLUMNS]
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
    HINTS: tl.constexpr,
    WINDOWS: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # backwards: the gradients that the statistics read last are still in L2
    i_chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    row = chunks_ptr + i_chunk * CHUNK_COLUMNS
    update_chunk(
        row, slices_ptr, factors_ptr, options_ptr, clocks_ptr,
        (grad_ptrs, param_ptrs, momentum_ptrs, master_ptrs), GRAD, PARAM, BUFFER, KIND, ALIGNED,
        HINTS, WINDOWS, SOFT, BLOCK,
    )  # fmt: skip

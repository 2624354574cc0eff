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

# columns of the fold table, float32
FOLD_COLUMNS = tl.constexpr(8)


@triton.jit
def store_as(x, like: tl.constexpr, SOFT: tl.constexpr):
    """Round float32 to the storage type, to nearest even.

    SOFT does it in integers for bfloat16: the interpreter's own cast truncates.
    """
    if SOFT and like == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(x != x, (bits >> 16) | 0x40, kept)
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(like)


@triton.jit
def bounded(ghat):
    """``sqrt(3) * (2 * Phi(ghat) - 1)``."""
    return tl.erf(ghat * 0.7071067811865476) * 1.7320508075688772


@triton.jit
def move(param, momentum, ghat, lr, decay, beta, fresh, nesterov):
    """The new parameter and momentum; with ``beta`` 0 and ``momentum`` 0 the latter is ghat."""
    new = ghat * fresh
    momentum = momentum * beta + new
    update = tl.where(nesterov != 0, momentum * beta + new, momentum)
    return param * decay - update * lr, momentum


@triton.jit
def _update_block(
    grad, param, momentum, offsets, live, has, mode, up, more, high, low, inverse,
    lr, decay, beta, fresh, nesterov, SOFT: tl.constexpr,
):  # fmt: skip
    """One block: load, move, store; ``has`` masks momentum. Nothing is read again: evict_first."""
    g = tl.load(grad + offsets, mask=live, other=0.0, eviction_policy="evict_first")
    p = tl.load(param + offsets, mask=live, other=0.0, eviction_policy="evict_first")
    m = tl.load(momentum + offsets, mask=has, other=0.0, eviction_policy="evict_first")
    ghat = (((g.to(tl.float32) * up) * more - high) - low) * inverse
    if mode == 2.0:
        ghat = bounded(ghat)
    new, m = move(p.to(tl.float32), m.to(tl.float32), ghat, lr, decay, beta, fresh, nesterov)
    tl.store(
        param + offsets,
        store_as(new, param.dtype.element_ty, SOFT),
        mask=live,
        eviction_policy="evict_first",
    )
    tl.store(
        momentum + offsets,
        store_as(m, momentum.dtype.element_ty, SOFT),
        mask=has,
        eviction_policy="evict_first",
    )


@triton.jit
def _chunk(
    row, segments_ptr, folds_ptr, options_ptr, grad_ptrs, param_ptrs, momentum_ptrs,
    GRAD: tl.constexpr, PARAM: tl.constexpr, BUFFER: tl.constexpr, ALIGNED: tl.constexpr,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move one chunk by its segment's fold, which must have been published."""
    tensor = tl.load(row)
    start = tl.load(row + 1)
    n = tl.load(row + 2).to(tl.int32)
    segment = tl.load(row + 3)
    fold_row = folds_ptr + segment * FOLD_COLUMNS
    mode = tl.load(fold_row + 5)
    if mode != 0.0:
        up = tl.load(fold_row)
        more = tl.load(fold_row + 1)
        high = tl.load(fold_row + 2)
        low = tl.load(fold_row + 3)
        inverse = tl.load(fold_row + 4)
        option = options_ptr + (tl.load(segments_ptr + segment * 4 + 3) >> 1) * OPTION_COLUMNS
        lr = tl.load(option + LR).to(tl.float32)
        decay = tl.load(option + DECAY).to(tl.float32)
        beta = tl.load(option + MOMENTUM).to(tl.float32)
        fresh = tl.load(option + FRESH).to(tl.float32)
        nesterov = tl.load(option + NESTEROV)
        grad = tl.load(grad_ptrs + tensor).to(tl.pointer_type(GRAD)) + start
        param = tl.load(param_ptrs + tensor).to(tl.pointer_type(PARAM)) + start
        momentum = tl.load(momentum_ptrs + tensor).to(tl.pointer_type(BUFFER)) + start
        offsets = tl.arange(0, BLOCK)
        whole = n // 16 * 16
        i = n * 0
        while i < whole:
            g = grad + i
            p = param + i
            m = momentum + i
            if ALIGNED:
                # divisibility does not survive the cast from a table's integer
                g = tl.multiple_of(g, 16)
                p = tl.multiple_of(p, 16)
                m = tl.multiple_of(m, 16)
            live = offsets < tl.multiple_of(whole - i, 16)
            has = offsets < tl.multiple_of(tl.where(beta != 0, whole - i, 0), 16)
            _update_block(
                g, p, m, offsets, live, has, mode, up, more, high, low, inverse,
                lr, decay, beta, fresh, nesterov, SOFT,
            )  # fmt: skip
            i += BLOCK
        if whole < n:
            rest = tl.arange(0, 16)
            has = rest < tl.where(beta != 0, n - whole, 0)
            _update_block(
                grad + whole, param + whole, momentum + whole, rest, rest < n - whole, has,
                mode, up, more, high, low, inverse, lr, decay, beta, fresh, nesterov, SOFT,
            )  # fmt: skip


@triton.jit(
    do_not_specialize_on_alignment=[
        "chunks_ptr", "segments_ptr", "folds_ptr", "options_ptr",
        "grad_ptrs", "param_ptrs", "momentum_ptrs",
    ]
)  # fmt: skip
def _update_kernel(
    chunks_ptr,  # int64 [programs, 4]: tensor, first element, elements, segment
    segments_ptr,  # int64 [segments, 4]: first partial, partials, elements, option row
    folds_ptr,  # float32 [segments, FOLD_COLUMNS]
    options_ptr,  # float64 [groups, OPTION_COLUMNS]
    grad_ptrs,  # int64 [tensors], likewise the next two
    param_ptrs,
    momentum_ptrs,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # backwards: the gradients that the statistics read last are still in L2
    row = chunks_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * 4
    _chunk(
        row, segments_ptr, folds_ptr, options_ptr, grad_ptrs, param_ptrs, momentum_ptrs,
        GRAD, PARAM, BUFFER, ALIGNED, SOFT, BLOCK,
    )  # fmt: skip

"""Mean and spread of a run of values in one pass.

Two forms, both merged in a fixed order without atomics on floats:

* lanes: every lane sums deviations from the first value, and their squares, in float64, as the
  eager twin does; for tiles, and for spans on GPUs whose float64 runs at full rate. The first of n
  values is at most ``sqrt(n - 1)`` spreads from the mean, so that the correction takes as many bits
  of 53 as n has: 13, where a span is not longer than 8192. Squares of any float32 stay in range.
* blocks: a block is held in registers as float32, scaled by the power of two that brings its
  largest magnitude to [1, 2), centred, and its corrected sum of squares
  ``sum(d^2) - sum(d)^2 / n`` is merged in float64 scalars. Rounding can fake a spread here, so
  blocks also carry their least and greatest value.

Traffic: reads each value once.
"""

import triton
import triton.language as tl


@triton.jit
def power_of_two_32(k):
    """``2.0**k`` for int32 k in [-126, 127]."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two_64(k):
    """``2.0**k`` for int64 k in [-1022, 1023]."""
    return ((k + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Moments of the union of two runs (Chan, Golub and LeVeque); either may be empty."""
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    away = tl.where(n_b > 0, mean_b - mean_a, 0.0)
    return n, mean_a + away * share, m2_a + m2_b + away * away * n_a * share


@triton.jit
def shifted(first, n, total, squares):
    """Mean and M2 of ``n`` values, from sums of their deviations from ``first`` and of squares."""
    shift = total / n
    # rounding may leave less than nothing; a maximum would drop NaN
    m2 = squares - shift * shift * n
    return first + shift, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def lane_moments(
    grad, n, ALIGNED: tl.constexpr, HINTS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Count, mean and M2 of ``n`` (int32) values at ``grad``; float64 sums in BLOCK lanes."""
    AGAIN: tl.constexpr = "evict_last" if HINTS else ""
    offsets = tl.arange(0, BLOCK)
    # in the place of what is masked, too: it deviates by nothing
    like = tl.load(grad)
    first = like.to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    whole = n // 16 * 16
    main = whole - whole % (UNROLL * BLOCK)
    i = n * 0
    while i < main:
        values = grad + i
        if ALIGNED:
            # divisibility does not survive the cast from a table's integer, nor a function call
            values = tl.multiple_of(values, 16)
        # all loads first: many bytes in flight
        rows = ()
        for u in tl.static_range(UNROLL):
            rows = rows + (tl.load(values + u * BLOCK + offsets, eviction_policy=AGAIN),)  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            away = rows[u].to(tl.float64) - first
            total += away
            squares = tl.fma(away, away, squares)
        i += UNROLL * BLOCK
    while i < whole:
        values = grad + i
        if ALIGNED:
            values = tl.multiple_of(values, 16)
        # a bound that is a multiple of 16 keeps the masked load as wide as the unmasked one
        live = offsets < tl.multiple_of(whole - i, 16)
        x = tl.load(values + offsets, mask=live, other=like, eviction_policy=AGAIN)
        away = x.to(tl.float64) - first
        total += away
        squares = tl.fma(away, away, squares)
        i += BLOCK
    if whole < n:
        x = tl.load(grad + whole + offsets, mask=offsets < n - whole, other=like)
        away = x.to(tl.float64) - first
        total += away
        squares = tl.fma(away, away, squares)
    mean, m2 = shifted(first, n.to(tl.float64), tl.sum(total, 0), tl.sum(squares, 0))
    return n.to(tl.float64), mean, m2


@triton.jit
def row_moments(
    grad, length, longest, ALIGNED: tl.constexpr, HINTS: tl.constexpr, GRANULE: tl.constexpr,
    COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Count, mean and M2 of ``length`` (int32 [rows]) values at each of ``grad``, in float64.

    ``longest`` is the greatest length. A row without values counts one, of mean 0.
    """
    AGAIN: tl.constexpr = "evict_last" if HINTS else ""
    c = tl.arange(0, COLUMNS)[None, :]
    like = tl.load(grad, mask=length > 0, other=0.0)[:, None]
    first = like.to(tl.float64)
    total = tl.zeros((grad.shape[0], COLUMNS), tl.float64)
    squares = total
    i = longest * 0
    while i < longest:
        left = (length - i)[:, None]
        if ALIGNED:
            left = tl.multiple_of(left, (GRANULE, GRANULE))
        rows = ()
        for u in tl.static_range(UNROLL):
            values = (grad + i)[:, None] + (u * COLUMNS + c)
            if ALIGNED:
                values = tl.multiple_of(values, (16, 16))
            live = u * COLUMNS + c < left
            x = tl.load(values, mask=live, other=like, eviction_policy=AGAIN)
            rows = rows + (x,)  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            away = rows[u].to(tl.float64) - first
            total += away
            squares = tl.fma(away, away, squares)
        i += UNROLL * COLUMNS
    n = tl.maximum(length, 1).to(tl.float64)
    # a sum of one: with a second view of what was loaded, Triton 3.7.1 fails to compile for gfx942
    mean, m2 = shifted(tl.sum(first, 1), n, tl.sum(total, 1), tl.sum(squares, 1))
    return n, mean, m2


@triton.jit
def centred_moments(x, live, n, AXIS: tl.constexpr):
    """Mean, M2 (float64), least and greatest value (float32) along an axis, which is kept.

    ``x`` is float32, 0 where not live; ``n`` float32 counts the live values. With an inf or NaN
    among them the least is NaN.
    """
    least = tl.min(tl.where(live, x, float("inf")), AXIS, keep_dims=True)
    greatest = tl.max(tl.where(live, x, float("-inf")), AXIS, keep_dims=True)
    largest = tl.maximum(tl.abs(least), tl.abs(greatest))
    biased = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    # 149: the least subnormal becomes 1
    k = tl.where(biased == 0, 149, 127 - biased)
    up = tl.minimum(tl.maximum(k, -126), 126)
    x = x * power_of_two_32(up) * power_of_two_32(k - up)
    safe = tl.maximum(n, 1.0)
    mean = tl.div_rn(tl.sum(x, AXIS, keep_dims=True), safe)
    # an extreme drops NaN, the mean never does: entries equal but for a NaN are not all equal
    least += mean - mean
    x = tl.where(live, x - mean, 0.0)
    shift = tl.sum(x, AXIS, keep_dims=True).to(tl.float64)
    square = tl.sum(x * x, AXIS, keep_dims=True).to(tl.float64)
    wide = safe.to(tl.float64)
    down = power_of_two_64(-k.to(tl.int64))
    exact_mean = (mean.to(tl.float64) + shift / wide) * down
    # rounding may take the corrected sum of squares below 0
    m2 = tl.maximum(square - shift * shift / wide, 0.0) * down * down
    # a maximum drops NaN on some targets: take it from the mean, which never does
    m2 = tl.where(exact_mean - exact_mean == 0, m2, exact_mean - exact_mean)
    return exact_mean, m2, least, greatest


@triton.jit
def _merge_block(count, mean, m2, least, greatest, x, live, size):
    """The moments of a run and of one more block of ``size`` values."""
    n = (size + tl.arange(0, 1)).to(tl.float32)
    mean_b, m2_b, least_b, greatest_b = centred_moments(x.to(tl.float32), live, n, 0)
    first_mean = tl.sum(mean_b, 0)
    mean = tl.where(count == 0, first_mean, mean)
    count, mean, m2 = merge(count, mean, m2, size.to(tl.float64), first_mean, tl.sum(m2_b, 0))
    least = tl.minimum(least, tl.sum(least_b, 0))
    greatest = tl.maximum(greatest, tl.sum(greatest_b, 0))
    return count, mean, m2, least, greatest


@triton.jit
def block_moments(
    grad, n, ALIGNED: tl.constexpr, HINTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Count, mean, M2, least and greatest of ``n`` (int32) values at ``grad``, block by block."""
    AGAIN: tl.constexpr = "evict_last" if HINTS else ""
    offsets = tl.arange(0, WIDTH)
    whole = n // 16 * 16
    i = n * 0
    count = i.to(tl.float64)
    mean = i.to(tl.float64)
    m2 = i.to(tl.float64)
    least = i.to(tl.float32) + float("inf")
    greatest = i.to(tl.float32) - float("inf")
    while i < whole:
        values = grad + i
        if ALIGNED:
            values = tl.multiple_of(values, 16)
        live = offsets < tl.multiple_of(whole - i, 16)
        x = tl.load(values + offsets, mask=live, other=0.0, eviction_policy=AGAIN)
        size = tl.minimum(whole - i, WIDTH)
        count, mean, m2, least, greatest = _merge_block(
            count, mean, m2, least, greatest, x, live, size
        )
        i += WIDTH
    if whole < n:
        rest = tl.arange(0, 16)
        live16 = rest < n - whole
        y = tl.load(grad + whole + rest, mask=live16, other=0.0)
        count, mean, m2, least, greatest = _merge_block(
            count, mean, m2, least, greatest, y, live16, n - whole
        )
    return count, mean, m2, least, greatest

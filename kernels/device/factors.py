"""From statistics to the factors that normalise slices, and which slices take part.

The twin of `bngd_triton.eager.factors`. A slice with spans has its factors published in a table,
for the second launch; a tile goes on with its own.
"""

import triton
import triton.language as tl

from .moments import power_of_two_32, power_of_two_64

from .tables import (  # isort: skip
    CDF, CENTERING, CLOSING, EPS, FACTOR_BETA, FACTOR_FRESH, FACTOR_HIGH, FACTOR_INVERSE,
    FACTOR_LOW, FACTOR_MODE, FACTOR_MORE, FACTOR_UP, FACTORS_COLUMNS, FRESH, MOMENT_GREATEST,
    MOMENT_LEAST, MOMENT_M2, MOMENT_MEAN, MOMENT_N, MOMENTS_COLUMNS, MOMENTUM, OPTION_COLUMNS,
    PROPAGATE, RECORD_MEAN, RECORD_SKIPPED, RECORD_STD, SIGN, SLICE_CODED, SLICE_COLUMNS,
    SLICE_RECORD, SLICE_WINDOW,
)  # fmt: skip

# the same bound as UNIFORM in bngd_triton/eager/factors.py
UNIFORM = tl.constexpr(8 * 2.0**-53)

# modes: what a step does with a slice
LEAVE = tl.constexpr(0.0)
QUOTIENT = tl.constexpr(1.0)
THROUGH_CDF = tl.constexpr(2.0)
# an invalid gradient ends a window in which others were valid: update by what momentum holds
CLOSE_ONLY = tl.constexpr(3.0)


@triton.jit
def factors_of(
    n, mean, m2, uniform, option, centred, scaler, record, present, window, has_window,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """The factors of slices, their mode and the weight of momentum's past.

    Records statistics and windows on the way, where they are ``present`` and ``has_window``.
    """
    scale_ptr, found_ptr = scaler
    centering = tl.where(centred, tl.load(option + CENTERING), 0.0)
    scale = tl.load(scale_ptr).to(tl.float64)
    # the gradient is as many times too large: the quotient is that of the unscaled one
    eps = tl.load(option + EPS) * scale
    factors = factors_from(mean, m2, n, uniform, centering, eps, tl.load(option + SIGN))
    mode, beta, accepted = admit(
        mean, m2, uniform, option, found_ptr, window, has_window, WINDOWS
    )  # fmt: skip
    record_moments(record, mean, tl.sqrt(m2 / n), accepted, scale, present)
    return factors, mode, beta


@triton.jit
def factors_from(mean, m2, n, uniform, centering, eps, sign):
    """Float64 statistics to float32 factors, elementwise.

    ``ghat = ((g * up * more) - high - low) * inverse``; ``up * more`` is the power of two that
    brings the divisor ``rms(v) + eps`` into [1, 2), so that nothing over- or underflows.
    """
    variance = m2 / n
    removed = tl.where(uniform, 0.0, centering)
    kept = (1.0 - removed) * mean
    divisor = tl.sqrt(variance + kept * kept) + eps
    zero = divisor == 0.0
    biased = (divisor.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    total = tl.where(zero, 0, 1023 - biased)
    up = tl.minimum(tl.maximum(total, -126), 126)
    more = tl.minimum(tl.maximum(total - up, -126), 126)
    scale = power_of_two_64(tl.minimum(tl.maximum(total, -1022), 1022))
    center = removed * mean * scale
    high = center.to(tl.float32)
    low = (center - high.to(tl.float64)).to(tl.float32)
    inverse = tl.where(zero, 0.0, sign / tl.where(zero, 1.0, divisor * scale)).to(tl.float32)
    return (
        power_of_two_32(up.to(tl.int32)),
        power_of_two_32(more.to(tl.int32)),
        high,
        low,
        inverse,
    )


@triton.jit
def admit(
    mean, m2, uniform, option, found_ptr, window, has_window, WINDOWS: tl.constexpr
):  # fmt: skip
    """Which slices take part: their mode, momentum's weight, and whether they were finite.

    Under ``nonfinite="propagate"`` all count as finite.
    """
    finite = (mean - mean == 0) & (m2 - m2 == 0)
    accepted = finite | (tl.load(option + PROPAGATE) != 0)
    # a sum over devices, so anything but 0; by a product, since the interpreter cannot combine
    # the comparison of a scalar with that of a tensor
    valid = (accepted.to(tl.int32) * (tl.load(found_ptr) == 0).to(tl.int32)) != 0
    cdf = tl.load(option + CDF)
    mode = tl.where(valid, tl.where((cdf != 0) & (uniform == 0), THROUGH_CDF, QUOTIENT), LEAVE)
    beta = tl.load(option + MOMENTUM)
    if WINDOWS:
        # False where there is no window
        seen = tl.load(window, mask=has_window, other=0) != 0
        closing = tl.load(option + CLOSING) != 0
        # momentum decays with the first valid micro-batch; it is not read where mode is LEAVE
        beta = tl.where(seen, 1.0, beta)
        mode = tl.where(seen & (valid == 0) & closing, CLOSE_ONLY, mode)
        # every thread of a slice has read what one of them now writes
        tl.debug_barrier()
        tl.store(window, ((seen | valid) & (closing == 0)).to(tl.uint8), mask=has_window)
    return mode, beta.to(tl.float32), accepted


@triton.jit
def record_moments(record, mean, std, accepted, scale, present):
    """Note the statistics of the unscaled gradient, and which slices an inf or a NaN left out."""
    tl.store(record + RECORD_MEAN, mean / scale, mask=present)
    tl.store(record + RECORD_STD, std / scale, mask=present)
    skipped = present & (accepted == 0)
    # no barrier, unlike in `admit`: nobody goes on with a count but the thread that stores its own
    count = tl.load(record + RECORD_SKIPPED, mask=skipped, other=0.0)
    tl.store(record + RECORD_SKIPPED, count + 1.0, mask=skipped)


@triton.jit
def publish(
    moments, i_slice, slices_ptr, factors_ptr, options_ptr, scaler, WIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Store a slice's factors and record."""
    n, mean, m2, least, greatest = moments
    if WIDE:
        uniform = tl.sqrt(m2 / n) <= tl.abs(mean) * UNIFORM
    else:
        # extremes drop NaN, the mean never does
        uniform = (least == greatest) & (mean == mean)
        mean = tl.where(uniform, least, mean)
        m2 = tl.where(uniform, 0.0, m2)
    row = slices_ptr + i_slice * SLICE_COLUMNS
    coded = tl.load(row + SLICE_CODED)
    option = options_ptr + (coded >> 1) * OPTION_COLUMNS
    record = tl.load(row + SLICE_RECORD).to(tl.pointer_type(tl.float64))
    window = tl.load(row + SLICE_WINDOW)
    factors, mode, beta = factors_of(
        n, mean, m2, uniform, option, (coded & 1) != 0, scaler, record, n > 0,
        window.to(tl.pointer_type(tl.uint8)), window != 0, WINDOWS,
    )  # fmt: skip
    up, more, high, low, inverse = factors
    if mode == CLOSE_ONLY:
        # a gradient of 0
        high = 0.0
        low = 0.0
        inverse = 0.0
    row = factors_ptr + i_slice * FACTORS_COLUMNS
    tl.store(row + FACTOR_UP, up)
    tl.store(row + FACTOR_MORE, more)
    tl.store(row + FACTOR_HIGH, high)
    tl.store(row + FACTOR_LOW, low)
    tl.store(row + FACTOR_INVERSE, inverse)
    tl.store(row + FACTOR_MODE, mode.to(tl.float32))
    tl.store(row + FACTOR_BETA, beta)
    tl.store(row + FACTOR_FRESH, tl.load(option + FRESH).to(tl.float32))


@triton.jit(
    do_not_specialize=["n_slices"],
    do_not_specialize_on_alignment=[
        "moments_ptr", "slices_ptr", "factors_ptr", "options_ptr", "scale_ptr", "found_ptr",
    ],
)  # fmt: skip
def _publish_kernel(
    moments_ptr,  # float64 [n_slices, MOMENTS_COLUMNS], of whole slices
    n_slices,
    slices_ptr,  # this and what follows as in `_statistics_kernel`
    factors_ptr,
    options_ptr,
    scale_ptr,
    found_ptr,
    WIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Factors and records of slices whose statistics were merged over processes."""
    i_slice = tl.program_id(0).to(tl.int64)
    if i_slice < n_slices:
        row = moments_ptr + i_slice * MOMENTS_COLUMNS
        moments = (
            tl.load(row + MOMENT_N), tl.load(row + MOMENT_MEAN), tl.load(row + MOMENT_M2),
            tl.load(row + MOMENT_LEAST), tl.load(row + MOMENT_GREATEST),
        )  # fmt: skip
        scaler = (scale_ptr, found_ptr)
        publish(moments, i_slice, slices_ptr, factors_ptr, options_ptr, scaler, WIDE, WINDOWS)

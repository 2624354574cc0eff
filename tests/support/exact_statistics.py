"""Statistics without rounding error."""

from fractions import Fraction

import mpmath


def exact(values):
    """Mean and population standard deviation of the stored values; 0 and 0 of none."""
    data = [Fraction(value) for value in values.double().flatten().tolist()] or [Fraction(0)]
    mean = sum(data) / len(data)
    variance = sum((value - mean) ** 2 for value in data) / len(data)
    with mpmath.workdps(30):
        return mean, float(mpmath.sqrt(mpmath.mpf(variance.numerator) / variance.denominator))

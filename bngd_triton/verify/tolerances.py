"""Every tolerance of the tests and of `bngd verify`, each with its reason.

EPS is float32's unit roundoff, 2**-24.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 2.0**-24

# ghat = ((g * up) - high - low) * inverse: two subtractions, one product and the rounding of
# `inverse`, and statistics off by at most one EPS more (float32 tiles): 5 EPS, next power of two 8
GHAT = 8 * EPS
# erf in float32 is good to 2 EPS on the CPU and 4 EPS in CUDA's libdevice, times sqrt(3)
CDF = 16 * EPS
# m and u: two products and a sum each on top of ghat
MOMENTUM = 4 * EPS
# theta: the product with the decay, the product with lr, the difference
THETA = 4 * EPS
# one rounding at the store, to 8 or 11 significant bits; float32's is in THETA
STORE = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# float16 and bfloat16 below their normal range, in absolute terms: half the least subnormal
FLOOR = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
# log10 of the inverse relative error of sigma that the definition asks of every backend; float32
# tiles reach 6.5 to 6.6 on a heavy tail, whose small squares a float32 sum drops
LRE = 6.5
# float64 statistics lose digits only to mean / sigma: at 2e8, one unit in a constant, 9.6 are left
LRE_FLOAT64 = 9.0
# error of the mean, in sigma: float32 tiles reach 0.9 EPS where the sum of their deviations rounds
MEAN = 2 * EPS


def ghat_bound(want: Tensor, *, normalizer: str = "zscore") -> Tensor:
    """Bound for a float32 ghat; entries near 0 are differences of numbers of size 1."""
    return (CDF if normalizer == "cdf" else GHAT) * (1 + want.abs())


def step_bounds(
    theta: Tensor,
    new_theta: Tensor,
    new_momentum: Tensor,
    dtype: torch.dtype,
    lr: float,
    cdf: bool,
    *,
    buffer: torch.dtype = torch.float32,
    stochastic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bounds for a parameter of `dtype` and its momentum after one step.

    Args:
        theta: the parameter before the step.
        new_theta: the oracle's.
        new_momentum: the oracle's; where that is not what moves the parameter (no momentum,
            Nesterov), the larger of both.
        dtype: of the parameter, or float32 for its master.
        lr: in units of the parameter.
        cdf: whether the normalizer is ``"cdf"``.
        buffer: the dtype of the momentum.
        stochastic: whether the parameter is rounded stochastically: by a whole unit in the last
            place, not half of one.
    """
    size = 1 + new_momentum.abs()
    momentum = ((CDF if cdf else GHAT) + MOMENTUM) * size
    exact = lr * (momentum + THETA * size) + THETA * (theta.abs() + new_theta.abs())
    return (
        exact + (1 + stochastic) * _stored(new_theta.abs() + exact, dtype),
        momentum + _stored(new_momentum.abs() + momentum, buffer),
    )


def _stored(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding to nearest changes at the store; float32's share is in the rest."""
    return STORE[dtype] * size + FLOOR[dtype]


# Float32 numbers between weights of sharded and of whole parameters after 20 steps: statistics are
# summed in another order and move a weight by 1e-15 of a step, which shows where it lay next to
# the middle of two floats
ULP = 2

"""Accuracy of means and standard deviations on every path, against exact arithmetic.

The sets are NIST's Statistical Reference Datasets for univariate summary statistics (StRD), those
that need no file. What is exact is taken from the data as stored in float32.
"""

import math
from fractions import Fraction

import mpmath
import pytest
import torch

from bngd_triton.eager import moments
from bngd_triton.kernels import Tuning, segment_statistics
from bngd_triton.verify.tolerances import LRE, LRE_FLOAT64, MEAN
from support.exact_statistics import exact


def _pi_digits():
    with mpmath.workdps(5010):
        return [float(digit) for digit in str(+mpmath.pi) if digit != "."][:5000]


NIST = {
    "NumAcc1": [10000001, 10000003, 10000002],
    "NumAcc2 x 10": [12] + [11, 13] * 500,
    "NumAcc3 x 10": [10000002] + [10000001, 10000003] * 500,
    "PiDigits": _pi_digits(),
}


def eager(values):
    found = moments.moments(values.view(1, -1))
    return found.mean.view(()), (found.m2 / found.n).sqrt().view(())


def kernel(wide, block):
    # 5 000 entries are one slice of a large block; of a small one 20, each of two trips or tiles
    tuning = Tuning(wide=wide, block=block, unroll=2, span=4 * block, merge=4)

    def run(values):
        found = segment_statistics([values], tuning=tuning)
        return found.mean, found.std

    return run


BACKENDS = {
    "eager": eager,
    "float64 lanes": kernel(wide=True, block=64),
    "float64 lanes, one slice": kernel(wide=True, block=4096),
    "float32 tiles": kernel(wide=False, block=64),
    "float32 tiles, one slice": kernel(wide=False, block=4096),
}


def lre(got, want):
    """Log relative error: the number of correct decimal digits."""
    return math.inf if got == want else -math.log10(abs(got - want) / abs(want))


def assert_exact(mean, std, values, digits):
    """As exact arithmetic has them, to so many digits of the deviation; without spread, exactly."""
    want_mean, want_std = exact(values)
    assert lre(std, want_std) >= digits if want_std else std == 0
    assert abs(Fraction(mean) - want_mean) <= Fraction(want_std * MEAN)


def check(backend, values):
    mean, std = map(float, BACKENDS[backend](values))
    assert_exact(mean, std, values, LRE if "float32" in backend else LRE_FLOAT64)


@pytest.mark.parametrize("name", NIST)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nist(backend, name, device):
    check(backend, torch.tensor(NIST[name], dtype=torch.float32, device=device))


def test_the_textbook_formula_fails():
    """``E[x^2] - E[x]^2`` in float32, the control."""
    values = torch.tensor(NIST["NumAcc3 x 10"], dtype=torch.float32)
    std = (values.square().mean() - values.mean().square()).clamp_min(0).sqrt()
    assert lre(float(std), exact(values)[1]) < LRE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "scale", [1e-45, 1e-40, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e38], ids=lambda c: f"{c:g}"
)
def test_range(backend, scale, device):
    """From subnormals, whose squares no float32 holds, to the largest numbers."""
    values = torch.randn(1000, dtype=torch.float64) * scale * 0.7 + scale
    check(backend, values.float().to(device))


HARD = {
    "mean 1e4, std 1e-2": lambda: torch.randn(3000) * 1e-2 + 1e4,
    "mean 1e8, std 64": lambda: torch.randn(3000) * 64 + 1e8,
    "an outlier": lambda: torch.cat([torch.randn(2999), torch.tensor([1e6])]),
    "first entry 1e30": lambda: torch.cat([torch.tensor([1e30]), torch.randn(2999)]),
    "last entry -1e30": lambda: torch.cat([torch.randn(2999), torch.tensor([-1e30])]),
    "sorted": lambda: torch.randn(3000).sort().values,
    "heavy tail": lambda: torch.randn(3000) / torch.rand(3000).square(),
    "one-hot": lambda: torch.eye(3000)[1234],
    "one ulp above a constant": lambda: torch.where(torch.arange(3000) == 7, 1 + 2**-23, 1.0),
    "one ulp below a constant": lambda: torch.where(torch.arange(3000) == 7, 1 - 2**-24, 1.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("desc", HARD)
def test_hard_data(backend, desc, device):
    check(backend, HARD[desc]().float().to(device))


@pytest.mark.parametrize("backend", BACKENDS)
# 2 200 are nine slices of the small block, merged in three trips
@pytest.mark.parametrize("n", [1, 2, 16, 17, 2200])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e-45, 3.4e38, -7.7], ids=str)
def test_equal_values_have_no_spread(backend, n, value, device):
    values = torch.full((n,), value, dtype=torch.float32, device=device)
    mean, std = BACKENDS[backend](values)
    assert float(mean) == float(values[0])
    assert float(std) == 0


@pytest.mark.parametrize("wide", [True, False], ids=["lanes", "tiles"])
def test_a_slice_knows_nothing_of_its_neighbours(wide, device):
    """Each of several slices: their partial results lie side by side."""
    tensors = [
        torch.full((1500,), 1e30),
        torch.full((1500,), 0.1),
        torch.randn(1500) * 1e-20,
        torch.full((300,), -7.7),
    ]
    tuning = Tuning(wide=wide, block=32, unroll=2, span=128, merge=4)
    found = segment_statistics([tensor.to(device) for tensor in tensors], tuning=tuning)
    for tensor, mean, std in zip(tensors, found.mean.tolist(), found.std.tolist()):
        assert_exact(mean, std, tensor, LRE_FLOAT64 if wide else LRE)


@pytest.mark.parametrize("wide", [True, False], ids=["lanes", "tiles"])
def test_granularities(wide, device):
    tensors = [torch.randn(3, 50, device=device) + 2, torch.randn(70, device=device).half()]
    tuning = Tuning(wide=wide, block=32, unroll=1, span=32, merge=4)
    wants = {
        "tensor": [tensors[0].flatten(), tensors[1]],
        "row": [*tensors[0], tensors[1]],
        "global": [torch.cat([tensor.double().flatten() for tensor in tensors])],
    }
    for granularity, slices in wants.items():
        found = segment_statistics(tensors, granularity=granularity, tuning=tuning)
        assert found.n.tolist() == [len(one) for one in slices]
        mean = torch.stack([one.double().mean() for one in slices])
        std = torch.stack([one.double().std(correction=0) for one in slices])
        digits = LRE_FLOAT64 if wide else LRE
        torch.testing.assert_close(found.std, std, rtol=10**-digits, atol=0)
        assert ((found.mean - mean).abs() <= MEAN * std).all()


def test_any_layout(device):
    base = torch.randn(6, 5, 4, device=device)
    for view in (base.permute(2, 0, 1), base[:, ::2], base[1:, 2:4, 1], base.mT[:, :, 1:]):
        for granularity in ("tensor", "row"):
            found = segment_statistics([view], granularity=granularity)
            rows = view.double().reshape(view.shape[0] if granularity == "row" else 1, -1)
            std = rows.std(1, correction=0)
            torch.testing.assert_close(found.std, std, rtol=10**-LRE, atol=0)
            assert ((found.mean - rows.mean(1)).abs() <= MEAN * std).all()


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], ValueError, "tensors of one device"),
        ([torch.zeros(0)], ValueError, r"tensors\[0\] has no entries"),
        ([torch.zeros(2, dtype=torch.int64)], TypeError, r"tensors\[0\] has dtype torch.int64"),
        ([torch.zeros(2, dtype=torch.float64)], RuntimeError, "the kernels take float16"),
    ],
    ids=["empty list", "empty tensor", "integers", "float64"],
)
def test_errors(tensors, error, message):
    with pytest.raises(error, match=message):
        segment_statistics(tensors)

"""Standardising inputs: the function on both paths, and the layer."""

import pytest
import torch

from bngd_triton import BatchStandardize, standardize
from bngd_triton.kernels.standardize import standardize_columns
from bngd_triton.verify.tolerances import GHAT
from support.closeness import assert_within


def oracle(x, dim):
    x = x.double()
    std = x.std(dim, correction=0, keepdim=True)
    return torch.where(std == 0, 0.0, (x - x.mean(dim, keepdim=True)) / std)


def assert_standardized(got, x, dim=0):
    want, x = oracle(x, dim), x.double()
    # in float64 the oracle's own rounding, on values some means away from 0, counts as well
    arithmetic = 64 * 2.0**-53 if got.dtype is torch.float64 else GHAT
    bound = (arithmetic + torch.finfo(got.dtype).eps) * (1 + want.abs())
    # the mean is subtracted as two float32, and statistics are float64
    spread = x.std(dim, correction=0, keepdim=True)
    bound = bound + 2.0**-48 * (x.mean(dim, keepdim=True) / spread).abs().nan_to_num()
    assert_within("standardize", got, want, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((50, 3), 0), ((50, 3), 1), ((5, 6, 7), -2), ((1, 4), 0), ((2, 4), 0)],
    ids=str,
)
def test_standardize(dtype, shape, dim):
    x = (torch.randn(shape) * 3 + 10).to(dtype)
    got = standardize(x, dim)
    assert got.dtype == dtype
    assert_standardized(got, x, dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (257, 5), (600, 40)], ids=str)
def test_kernel_equals_eager(dtype, shape, device):
    """Bit for bit: same factors, unless float64 sums in other orders round one differently."""
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[1]) + 1).to(dtype)
    got = standardize_columns(x.to(device)).cpu()
    assert (got == standardize(x)).double().mean() > 0.95
    assert_standardized(got, x)


@pytest.mark.parametrize("n", [3, 300])
@pytest.mark.parametrize("function", [standardize, standardize_columns], ids=["eager", "kernel"])
def test_columns_of_every_scale(function, n, device):
    """Spreads of 1e-7 of the mean, subnormals, the largest numbers; one split of rows, and two."""
    places = torch.arange(n)
    columns = [
        10_000_000 + places % 3,
        1e4 + torch.randn(n) * 1e-2,
        1e-42 * (1 + places % 7),
        3.4e38 * (1 - 2.0 * (places % 2)),
        1 + 2.0**-23 * (places == 1),
        torch.full((n,), 0.1),
        torch.zeros(n),
    ]
    x = torch.stack(columns, dim=1).float()
    assert_standardized(function(x.to(device)), x)
    for nonfinite in (torch.inf, torch.nan):
        x[1, 0] = nonfinite
        got = function(x.to(device))
        assert got[:, 0].isnan().all()
        assert_standardized(got[:, 1:].cpu(), x[:, 1:])


def test_empty_and_errors():
    assert standardize(torch.zeros(0, 3)).shape == (0, 3)
    for bad, error, message in (
        (torch.zeros(3, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        (torch.tensor(1.0), ValueError, "0-dim"),
        (torch.zeros(3, requires_grad=True), ValueError, "gives no gradient"),
    ):
        with pytest.raises(error, match=message):
            standardize(bad)
    with pytest.raises(IndexError):
        standardize(torch.zeros(3), 1)
    with torch.no_grad():
        assert not standardize(torch.zeros(3, requires_grad=True)).requires_grad


def test_batch_standardize():
    layer = BatchStandardize(3, momentum=None)
    x = torch.randn(500, 3) * torch.tensor([1e-2, 1.0, 1e3]) + 5
    out = layer(x)
    torch.testing.assert_close(out[:, 1:], standardize(x)[:, 1:], rtol=0, atol=1e-4)
    assert not list(layer.parameters())
    layer.eval()
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x[:1])[:, 1:], standardize(x)[:1, 1:], rtol=0, atol=5e-3)
    named = BatchStandardize(3, eps=0.25, momentum=0.5)
    assert (named.eps, named.momentum, named.affine) == (0.25, 0.5, False)

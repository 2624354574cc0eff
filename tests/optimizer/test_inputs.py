"""Standardising inputs: the function on both paths, and the layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bngd_triton import BatchStandardize, standardize
from bngd_triton.kernels.standardize import standardize_columns
from bngd_triton.verify.tolerances import GHAT
from support.closeness import assert_within


def oracle(x: Tensor, dim: int) -> Tensor:
    x = x.double()
    std = x.std(dim, correction=0, keepdim=True)
    return torch.where(std == 0, 0.0, (x - x.mean(dim, keepdim=True)) / std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((50, 3), 0), ((50, 3), 1), ((5, 6, 7), -2), ((1, 4), 0), ((2, 4), 0)],
    ids=str,
)
def test_standardize(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    x = (torch.randn(shape) * 3 + 10).to(dtype)
    got, want = standardize(x, dim), oracle(x, dim)
    assert got.dtype == dtype
    # in float64 the oracle's own rounding, on values some means away from 0, counts as well
    arithmetic = 64 * 2.0**-53 if dtype is torch.float64 else GHAT
    bound = (arithmetic + torch.finfo(dtype).eps) * (1 + want.abs())
    assert_within("standardize", got, want, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (257, 5), (600, 40)], ids=str)
def test_kernel_equals_eager(
    dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    """Bit for bit: same factors, unless float64 sums in other orders round one differently."""
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[1]) + 1).to(dtype).to(device)
    got, want = standardize_columns(x).cpu(), standardize(x.cpu())
    assert (got == want).double().mean() > 0.95
    bound = GHAT * (1 + want.double().abs()) + torch.finfo(dtype).eps * want.double().abs()
    assert_within("kernel", got, want, bound)


functions = pytest.mark.parametrize(
    "function", [standardize, standardize_columns], ids=["eager", "kernel"]
)


@functions
@pytest.mark.parametrize("n", [3, 300])
def test_columns_of_every_scale(
    function: Callable[[Tensor], Tensor], n: int, device: torch.device
) -> None:
    """Spreads of 1e-7 of the mean, subnormals, the largest numbers; one split of rows, and two."""
    x = torch.stack(
        [
            10_000_000 + torch.arange(n) % 3,
            1e4 + torch.randn(n) * 1e-2,
            1e-42 * (1 + torch.arange(n) % 7),
            3.4e38 * (1 - 2.0 * (torch.arange(n) % 2)),
            1 + 2.0**-23 * (torch.arange(n) == 1),
        ],
        dim=1,
    ).float()
    got, want = function(x.to(device)), oracle(x, 0)
    spread = x.double().std(0, correction=0)
    # the mean is subtracted as two float32, and statistics are float64
    bound = GHAT * (1 + want.abs()) + 2.0**-48 * (x.double().mean(0) / spread).abs()
    assert_within("standardize", got, want, bound)


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "kernel"])
def test_special_columns(fused: bool, rows: int, device: torch.device) -> None:
    function = standardize_columns if fused else standardize
    x = torch.randn(rows, 5, device=device)
    x[:, 0] = 0.1
    x[:, 1] = 0
    x[3, 2] = torch.inf
    x[3, 3] = torch.nan
    got = function(x)
    assert (got[:, :2] == 0).all()
    assert got[:, 2:4].isnan().all()
    torch.testing.assert_close(got[:, 4].double(), oracle(x[:, 4], 0), rtol=0, atol=1e-6)


def test_empty_and_errors() -> None:
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


def test_batch_standardize() -> None:
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

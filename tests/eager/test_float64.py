"""What the reference does for float64, mixed dtypes and tensors of more than one block."""

import pytest
import torch

from bngd_triton import normalize_gradient
from bngd_triton.reference import step_
from bngd_triton.verify.oracle import normalized, oracle_step
from bngd_triton.verify.tolerances import step_bounds
from support.closeness import assert_within


@pytest.mark.parametrize(
    ("scale", "eps"),
    # squares of the ends leave float64's range
    [(scale, 0.0) for scale in (1e-300, 1e-200, 1e200, 1e307)]
    # eps is in the gradient's units, whatever power of two its statistics were scaled by
    + [(scale, 0.5) for scale in (1e-300, 1e-7, 1e150, 1e300)],
)
def test_float64_at_every_scale(scale, eps):
    unit = torch.randn(30, 7, dtype=torch.float64)
    ghat = normalize_gradient(unit * scale, eps=eps * scale)
    want = normalized(unit.flatten(), eps, "zscore", 1.0).view(30, 7)
    torch.testing.assert_close(ghat, want, rtol=1e-12, atol=1e-12)


def test_subnormal_float64_is_normalised():
    ghat = normalize_gradient(torch.randn(30, 7, dtype=torch.float64) * 5e-324, eps=0.0)
    assert abs(float(ghat.square().mean().sqrt()) - 1) < 1e-12


def test_rows_of_float64_at_every_scale():
    """Each row has its own power of two, in more than one block of the CPU path."""
    unit = torch.randn(200, 500, dtype=torch.float64)
    scale = torch.logspace(-300, 300, 200, dtype=torch.float64).view(-1, 1)
    ghat = normalize_gradient(unit * scale, eps=0.0, granularity="row")
    want = (unit - unit.mean(1, True)) / unit.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(ghat, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e200], ids=lambda c: f"{c:g}")
def test_global_over_float32_and_float64(scale):
    """One power of two for both, from the largest entry."""
    grads = [torch.randn(3, 4), torch.randn(50, dtype=torch.float64) * scale]
    for order in (grads, grads[::-1]):
        params = [torch.zeros(grad.shape, dtype=torch.float64) for grad in order]
        step_(params, order, None, lr=1.0, momentum=0.0, eps=0.0, granularity="global")
        whole = torch.cat([grad.double().flatten() for grad in order])
        want = -normalized(whole / whole.abs().max(), 0.0, "zscore", 1.0)
        got = torch.cat([param.flatten() for param in params])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_spread_of_many_float64_units_is_real():
    """sigma / mu = 1e-13 is a few hundred units of rounding, sigma / mu = 1e-16 less than one."""
    steps = torch.arange(-500, 501, dtype=torch.float64)
    ghat = normalize_gradient(1 + steps * 2.0**-52, eps=0.0, center_1d=True)
    want = normalized(steps, 0.0, "zscore", 1.0)
    # the mean is rounded to 2**-53 of itself, sigma is 289 * 2**-52
    torch.testing.assert_close(ghat, want, rtol=0, atol=1 / 289)


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "scale"),
    [
        (torch.float32, torch.float64, 1e-60),
        (torch.bfloat16, torch.float64, 1e60),
        (torch.float64, torch.float32, 1.0),
        (torch.float64, torch.bfloat16, 1.0),
    ],
    ids=["fp32 of fp64", "bf16 of fp64", "fp64 of fp32", "fp64 of bf16"],
)
def test_arithmetic_is_in_the_wider_dtype(param_dtype, grad_dtype, scale):
    param = torch.zeros(6, 7, dtype=param_dtype)
    grad = (torch.randn(6, 7, dtype=torch.float64) * scale).to(grad_dtype)
    want = -normalized(grad.double().flatten(), 0.0, "zscore", 1.0).view(6, 7)
    step_([param], [grad], None, lr=1.0, momentum=0.0, eps=0.0, granularity="tensor")
    unit = torch.finfo(param_dtype).eps / 2
    assert_within("step", param, want, (unit + 8 * 2.0**-53) * (1 + want.abs()))


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_a_step_in_blocks_is_a_step_of_the_whole(granularity):
    """Each block of a large parameter moves by its own gradient and its own momentum."""
    param, grad, buffer = torch.randn(3, 300, 500).unbind()
    grad = grad * 1e-3 + 1
    options = {"lr": 0.1, "granularity": granularity, "weight_decay": 0.1}
    (want,), (want_buffer,) = oracle_step([param], [grad], [buffer], **options)
    before = param.double()
    step_([param], [grad], [buffer], **options)
    theta, momentum = step_bounds(before, want, want_buffer, torch.float32, 0.1, False)
    assert_within("momentum", buffer, want_buffer, momentum)
    assert_within("parameter", param, want, theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_lr_gives_the_bits_of_a_float(dtype):
    """The decay is formed in float64 and rounded once, in both."""
    found = []
    rate = torch.tensor(0.7, dtype=dtype)
    # 0-dim parameters: torch would promote their product with a 0-dim float64
    shapes = [(1000,)] + [()] * 20
    for lr in (rate, float(rate)):
        torch.manual_seed(0)
        params, grads = ([torch.randn(shape) for shape in shapes] for _ in range(2))
        step_(params, grads, None, lr=lr, momentum=0.0, weight_decay=1.3)
        found.append(torch.cat([param.flatten() for param in params]))
    assert torch.equal(found[0], found[1])

"""What the definition guarantees for any gradient, on both paths."""

import math

import pytest
import torch

from bngd_triton import BNGD, article_cdf, normalize_gradient
from bngd_triton.kernels import fused_normalize_gradient
from bngd_triton.verify.oracle import normalized, oracle_step
from bngd_triton.verify.tolerances import EPS, GHAT, ghat_bound
from support.closeness import assert_within

BIG = 3.4e38

GRADIENTS = {
    "normal": lambda: torch.randn(40, 33),
    "mean far above spread": lambda: torch.randn(40, 33) * 1e-3 + 10,
    "heavy tail": lambda: torch.randn(40, 33) / torch.rand(40, 33).square(),
    "one-hot": lambda: torch.eye(1320)[77].view(40, 33),
    "subnormal 1e-45": lambda: (torch.rand(40, 33) < 0.5).float() * 1e-45,
    "subnormal 1e-40": lambda: torch.randn(40, 33) * 1e-40,
    "1e-30": lambda: torch.randn(40, 33) * 1e-30,
    "1e30": lambda: torch.randn(40, 33) * 1e30,
    "largest, alternating": lambda: BIG * (1 - 2 * (torch.arange(1320) % 2)).view(40, 33),
    "all scales": lambda: torch.randn(40, 33) * torch.logspace(-40, 38, 1320).view(40, 33),
    "two entries": lambda: torch.tensor([[1.0, 3.0]]),
    "integers": lambda: torch.randint(-3, 9, (40, 33)).float(),
}


def ghat_of(path, grad, **options):
    function = fused_normalize_gradient if path.fused else normalize_gradient
    return function(grad.to(path.device), **options).cpu()


gradients = pytest.mark.parametrize("name", GRADIENTS)


@gradients
@pytest.mark.parametrize(
    "options",
    [{"eps": 0.0}, {}, {"eps": 0.0, "centering": 0.0}, {"eps": 0.0, "normalizer": "cdf"}],
    ids=["eps 0", "defaults", "RMS", "cdf"],
)
def test_equals_float64(path, name, options):
    """At every scale float32 has: no overflow where the definition has none."""
    full = {"eps": 1e-8, "normalizer": "zscore", "centering": 1.0} | options
    # three times as long: beyond a tile of the kernels, where a second launch normalises
    for times in (1, 3) if options == {"eps": 0.0} else (1,):
        grad = GRADIENTS[name]().repeat(times, 1)
        want = normalized(grad.double().flatten(), **full).view(grad.shape)
        bound = ghat_bound(want, normalizer=full["normalizer"]) + split_mean(grad)
        assert_within("ghat", ghat_of(path, grad, **options), want, bound)


def split_mean(grad):
    """The mean is subtracted as two float32: what is left of it is 2**-48 of mean / sigma."""
    return 2.0**-48 * (grad.double().mean() / grad.double().std(correction=0)).abs()


@gradients
def test_step_is_bounded(path, name):
    """RMS of a step <= lr from the first step on; entries <= sqrt(3) * lr under the CDF."""
    lr = 2.0**-6
    for options in ({}, {"granularity": "row"}, {"momentum": 0.0, "nesterov": False}):
        weight = torch.zeros(GRADIENTS[name]().shape, device=path.device)
        optimizer = BNGD([weight], lr, fused=path.fused, eps=0.0, **options)
        for _ in range(3):
            before = weight.clone()
            weight.grad = GRADIENTS[name]().to(path.device)
            optimizer.step()
            rms = (weight - before).double().square().mean().sqrt()
            assert rms <= lr * (1 + GHAT) + EPS * weight.abs().max()
    step = ghat_of(path, GRADIENTS[name](), normalizer="cdf", eps=0.0)
    assert step.abs().max() <= torch.tensor(math.sqrt(3)).float()


@gradients
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_powers_of_two_change_no_bit(path, name, granularity):
    grad = GRADIENTS[name]()
    want = ghat_of(path, grad, eps=0.0, granularity=granularity)
    for exponent in (-100, -7, 1, 30, 100):
        scaled = torch.ldexp(grad.double(), torch.tensor(exponent)).float()
        if not torch.equal(torch.ldexp(scaled.double(), torch.tensor(-exponent)), grad.double()):
            continue  # over- or underflow
        assert torch.equal(ghat_of(path, scaled, eps=0.0, granularity=granularity), want), exponent


def test_weights_do_not_depend_on_the_loss_scale(path):
    grads = torch.randn(5, 20, 9, device=path.device)
    found = []
    for scale in (1.0, 2.0**-60, 2.0**60):
        found.append(torch.ones(20, 9, device=path.device))
        optimizer = BNGD(found[-1:], 0.1, eps=0.0, weight_decay=0.01, fused=path.fused)
        for grad in grads:
            found[-1].grad = grad * scale
            optimizer.step()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_factors_change_only_rounding(path):
    grad = torch.randn(40, 33)
    want = ghat_of(path, grad, eps=0.0).double()
    for factor in (3.0, 1e-20, 0.7e15):
        # the factor's own rounding of each entry comes on top
        bound = ghat_bound(want) + 2 * EPS * want.abs()
        assert_within("ghat", ghat_of(path, grad * factor, eps=0.0), want, bound)


@gradients
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_centred_slices_keep_their_sum(path, name, granularity):
    grad = GRADIENTS[name]()
    ghat = ghat_of(path, grad, eps=0.0, granularity=granularity).double()
    # rows of equal entries are not centred
    slices = ghat[(grad != grad[:, :1]).any(1)] if granularity == "row" else ghat.view(1, -1)
    n = slices.shape[1]
    assert (slices.sum(1).abs() <= n * 1e-6).all()
    assert (slices.abs() <= math.sqrt(n - 1) * (1 + GHAT)).all()


@gradients
def test_angle_to_the_gradient(path, name):
    """cos(g, ghat) = 1 / kappa, kappa = sqrt(1 + mu^2 / sigma^2)."""
    grad = GRADIENTS[name]()
    g = grad.double() / grad.abs().max().double()
    ghat = ghat_of(path, grad, eps=0.0).double()
    kappa = (1 + (g.mean() / g.std(correction=0)).square()).sqrt()
    cosine = (g * ghat).sum() / (g.norm() * ghat.norm())
    assert abs(float(cosine - 1 / kappa)) <= 1e-6


@pytest.mark.parametrize("normalizer", ["zscore", "cdf"])
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("value", [0.0, 1e-45, -0.3, 3e38], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,), (4, 7), (300, 2)], ids=str)
def test_slices_without_spread(path, normalizer, eps, value, shape):
    """g / (|g| + eps), uncentred, under every normalizer; 0 for zeros; never NaN."""
    grad = torch.full(shape, value)
    stored = abs(float(torch.tensor(value).double()))
    size = stored / (stored + eps) if stored else 0.0
    want = torch.full(shape, math.copysign(size, value), dtype=torch.float64)
    ghat = ghat_of(path, grad, normalizer=normalizer, eps=eps, center_1d=True)
    assert_within("ghat", ghat, want, 2 * EPS * want.abs() + 2.0**-149)
    if eps == 0:
        assert torch.equal(ghat, grad.sign())


def test_nearly_equal_values_are_a_real_spread(path):
    """sigma / mu = 1e-7 is no reason to stop centring."""
    grad = torch.tensor([10000001.0, 10000003.0, 10000002.0])
    ghat = ghat_of(path, grad, eps=0.0, center_1d=True)
    torch.testing.assert_close(ghat, torch.tensor([-1.0, 1.0, 0.0]) * math.sqrt(1.5))
    constant = torch.tensor([10000000.2] + [10000000.1, 10000000.3] * 500)
    assert torch.equal(ghat_of(path, constant, eps=0.0, center_1d=True), torch.ones(1001))


def test_zero_gradients_move_by_decay_and_past_momentum_only(path):
    weight = torch.ones(3, 4, device=path.device)
    optimizer = BNGD([weight], 0.5, momentum=0.5, weight_decay=0.1, fused=path.fused)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight.cpu(), torch.full((3, 4), 1 - 0.05))


def test_same_bits_run_after_run(path):
    grad = torch.randn(70, 71)
    first = ghat_of(path, grad)
    for _ in range(3):
        assert torch.equal(ghat_of(path, grad), first)


def test_dtype_and_layout_of_ghat(path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        grad = torch.randn(6, 5, 4, 3).to(dtype).to(memory_format=torch.channels_last)
        ghat = ghat_of(path, grad, granularity="row")
        assert ghat.dtype == dtype
        assert ghat.stride() == grad.stride()
        rows = grad.double().flatten(1)
        want = (rows - rows.mean(1, True)) / (rows.std(1, correction=0, keepdim=True) + 1e-8)
        bound = want.abs() * torch.finfo(dtype).eps / 2 + ghat_bound(want)
        assert_within("ghat", ghat.flatten(1), want, bound)


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_nonfinite_ghat(path, value):
    grad = torch.randn(4, 5)
    grad[1, 2] = value
    assert ghat_of(path, grad).isnan().all()
    skipped = ghat_of(path, grad, nonfinite="skip", granularity="row")
    assert torch.equal(skipped[1], torch.zeros(5))
    assert skipped[[0, 2, 3]].isfinite().all()
    with pytest.raises(FloatingPointError, match="grad has an inf or a NaN"):
        ghat_of(path, grad, nonfinite="raise")


def test_article_cdf_is_no_optimizer():
    """All-positive whatever the gradient, and quadratic in 1 / sigma."""
    grad = torch.randn(10_000, dtype=torch.float64) * 1e-2
    update = article_cdf(grad)
    assert (update > 0).all()
    cosine = update.sum() / (update.norm() * math.sqrt(update.numel()))
    assert cosine > 0.9999
    ratio = article_cdf(grad / 1000).mean() / update.mean()
    assert abs(float(ratio) / 1e6 - 1) < 1e-3
    # as written: cdf(g) / (std * sqrt(2 * pi)) * (1 / std), with the population's std of 2
    g = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    want = (1 + torch.erf(g / math.sqrt(2))) / 2 / (4 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(article_cdf(g), want)


def test_article_variant(path):
    """Plain standardised gradient descent: no momentum, vectors centred too."""
    params = [torch.randn(shape, device=path.device) for shape in ((3, 4), (3,), (1,))]
    optimizer = BNGD.article(params, lr=0.1)
    optimizer.fused = path.fused
    for param in params:
        param.grad = torch.randn_like(param)
    options = {"granularity": "tensor", "momentum": 0.0, "center_1d": True}
    want, _ = oracle_step(params, [p.grad for p in params], [None] * 3, lr=0.1, **options)
    optimizer.step()
    for param, end in zip(params, want):
        torch.testing.assert_close(param.cpu().double(), end, rtol=0, atol=1e-6)
    assert not any(optimizer.state[param] for param in params), "no momentum, no buffer"


@pytest.mark.parametrize(
    ("options", "still"),
    [
        ({"granularity": "tensor"}, "nothing"),
        ({}, "rows"),
        ({"centering": 0.0}, "all"),
        ({"granularity": "global"}, "nothing"),
        ({"granularity": "global", "centering": 0.0}, "all"),
    ],
    ids=str,
)
def test_entries_without_gradient_move_where_they_are_centred(options, still, path):
    """Rows that a batch did not use, and entries that are masked, as the README says."""
    param = torch.nn.Parameter(torch.randn(6, 5, device=path.device))
    optimizer = BNGD([param], lr=0.1, eps=0.0, fused=path.fused, **options)
    before = param.detach().clone()
    grad = torch.rand(6, 5, device=path.device) + 0.5
    grad[4] = 0.0
    grad[:4, 2] = 0.0
    for _ in range(2):
        param.grad = grad.clone()
        optimizer.step()
    moved = param.detach() != before
    assert moved[4].any() == (still == "nothing")
    assert moved[:4, 2].any() == (still != "all")
    assert moved[:4, :2].all()

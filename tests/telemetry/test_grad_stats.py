"""`grad_stats()`: what a step has seen of the gradients, against float64."""

import copy
import math

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD

# a matrix, a vector, one whose statistics the kernels merge of two, a single entry
SHAPES = [(4, 6), (7,), (3, 2100), ()]
NAMES = ["weight", "bias", "table", "scale"]


def build(path, **options):
    params = [Parameter(torch.zeros(shape, device=path.device)) for shape in SHAPES]
    options = {"granularity": "tensor", **options}
    return params, BNGD(list(zip(NAMES, params)), fused=path.fused, **options)


def set_grads(params, seed, size=0.001):
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator) + i - 1
        param.grad = (grad * size).to(param.device)


def slices(params, granularity):
    """Each parameter's slices, flat, in float64."""
    grads = [param.grad.detach().cpu().double() for param in params]
    if granularity == "global":
        whole = torch.cat([grad.flatten() for grad in grads])
        return {name: [whole] for name in NAMES}
    return {
        name: [*grad.flatten(1)] if granularity == "row" and grad.dim() >= 2 else [grad.flatten()]
        for name, grad in zip(NAMES, grads)
    }


def assert_stats(optimizer, params, granularity):
    found = optimizer.grad_stats()
    assert list(found) == NAMES
    for (name, parts), param in zip(slices(params, granularity).items(), params):
        shape = param.shape[:1] if granularity == "row" and param.dim() >= 2 else ()
        for value in found[name]:
            assert (value.shape, value.dtype, value.device) == (shape, torch.float64, param.device)
        by_slice = torch.stack([value.reshape(-1) for value in found[name]], 1).tolist()
        for part, (mean, std, rms, kappa, _) in zip(parts, by_slice, strict=True):
            if not part.isfinite().all():
                assert not math.isfinite(std)
                continue
            size = math.sqrt(part.square().mean())
            spread = float(part.std(correction=0)) if part.unique().numel() > 1 else 0.0
            # the mean is a sum of entries of either sign
            assert mean == pytest.approx(float(part.mean()), rel=1e-6, abs=1e-6 * size)
            assert std == pytest.approx(spread, rel=1e-6, abs=1e-15 * size)
            assert rms == pytest.approx(size, rel=1e-6)
            if spread > 0:
                assert kappa == pytest.approx(size / spread, rel=1e-6)
            elif size > 0:
                assert kappa > 1e12
            assert not kappa < 1


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_statistics_of_the_last_gradient(granularity, micro_batches, path):
    options = {"granularity": granularity, "maximize": True}
    params, optimizer = build(path, accumulation_steps=micro_batches, **options)
    assert optimizer.grad_stats() == {}
    for seed, size in enumerate((1e-3, 1e20, 1e-20)):
        set_grads(params, seed, size)
        if seed == 1:
            params[0].grad[1, 1] = math.nan
        optimizer.step()
        assert_stats(optimizer, params, granularity)
    assert optimizer.skipped == 1


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_slices_without_spread(granularity, path):
    params, optimizer = build(path, granularity=granularity)
    set_grads(params, 0)
    for value in (0.1, -3.0, 0.0):
        params[0].grad.fill_(value)
        params[1].grad[0] = value
        params[2].grad[1] = value
        optimizer.step()
        assert_stats(optimizer, params, granularity)
        weight, scale = (optimizer.grad_stats()[name] for name in ("weight", "scale"))
        assert (weight.std.abs() <= 1e-15).all()
        # of a gradient of zeros there is no mean to remove
        assert (weight.kappa == 1).all() or value
        assert math.isinf(scale.kappa)


def test_slices_with_an_inf_or_nan_are_counted(path):
    params, optimizer = build(path, granularity="row")
    want = torch.zeros(4, dtype=torch.float64, device=path.device)
    for seed, rows in enumerate(([0], [0, 3], [], [3])):
        set_grads(params, seed)
        for row in rows:
            params[0].grad[row, 1] = math.nan if seed % 2 else -math.inf
            want[row] += 1
        if rows == [0, 3]:
            params[2].grad[2, 2099] = math.inf
        optimizer.step()
        assert_stats(optimizer, params, "row")
        assert torch.equal(optimizer.grad_stats()["weight"].skipped, want)
    skipped = {name: stats.skipped.sum() for name, stats in optimizer.grad_stats().items()}
    assert {name: int(count) for name, count in skipped.items()} == {
        "weight": 4, "bias": 0, "table": 1, "scale": 0,
    }  # fmt: skip
    assert optimizer.skipped == sum(skipped.values()) == 5
    # a number taken earlier does not change
    taken = optimizer.grad_stats()["weight"]
    kept = [value.clone() for value in taken]
    set_grads(params, 9)
    params[0].grad.fill_(math.nan)
    optimizer.step()
    for value, before in zip(taken, kept):
        torch.testing.assert_close(value, before, rtol=0, atol=0, equal_nan=True)


def test_only_parameters_that_have_had_a_gradient(path):
    params, optimizer = build(path)
    set_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    first = optimizer.grad_stats()
    assert list(first) == ["weight", "table", "scale"]
    # statistics of the last gradient stay while there is none
    set_grads(params, 1)
    params[0].grad = None
    optimizer.step()
    second = optimizer.grad_stats()
    assert list(second) == NAMES
    assert torch.equal(second["weight"].mean, first["weight"].mean)
    assert not torch.equal(second["table"].mean, first["table"].mean)


def test_unnamed_parameters_go_by_their_place(path):
    params = [Parameter(torch.zeros(4, 6, device=path.device)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "granularity": "row"}]
    optimizer = BNGD(groups, granularity="tensor", fused=path.fused)
    set_grads(params, 0)
    optimizer.step()
    shapes = {name: tuple(stats.mean.shape) for name, stats in optimizer.grad_stats().items()}
    assert shapes == {
        "param_groups[0]['params'][0]": (),
        "param_groups[1]['params'][0]": (4,),
        "param_groups[1]['params'][1]": (4,),
    }


def test_granularity_changed_between_steps(path):
    params, optimizer = build(path)
    skipped = 0
    for seed, granularity in enumerate(("tensor", "row", "global", "row", "tensor", "global")):
        before = optimizer.grad_stats()
        optimizer.param_groups[0]["granularity"] = granularity
        # until the next step, what there is
        for name, stats in optimizer.grad_stats().items():
            assert torch.equal(stats.mean.flatten().isnan(), before[name].mean.flatten().isnan())
        set_grads(params, seed)
        params[0].grad[1, 1] = params[1].grad[0] = math.nan
        optimizer.step()
        assert_stats(optimizer, params, granularity)
        skipped += 1 if granularity == "global" else 2
        assert optimizer.skipped == skipped


def test_a_global_group_grows(path):
    """A parameter whose first gradient comes late joins the record of the others."""
    params, optimizer = build(path, granularity="global")
    for seed in range(3):
        set_grads(params, seed)
        params[3].grad.fill_(math.nan)
        if seed < 2:
            params[0].grad = None
        optimizer.step()
    assert optimizer.skipped == 3
    assert {float(stats.skipped) for stats in optimizer.grad_stats().values()} == {3.0}


def test_an_overflow_found_by_a_scaler_is_recorded(path):
    """What a step saw is noted whether or not it moves; only slices of its own are counted."""
    params, optimizer = build(path)
    set_grads(params, 0)
    params[0].grad[1, 1] = math.inf
    optimizer.found_inf = torch.ones(1, device=path.device)
    optimizer.step()
    assert_stats(optimizer, params, "tensor")
    assert optimizer.skipped == 1
    assert not any(param.any() for param in params)


def test_statistics_of_float64_gradients(device):
    for size in (1.0, 1e200, 1e-200):
        params = [Parameter(torch.zeros(4, 6, dtype=torch.float64, device=device))]
        optimizer = BNGD([("weight", params[0])], granularity="tensor")
        grad = torch.randn(4, 6, dtype=torch.float64) + 0.5
        params[0].grad = (grad * size).to(device)
        optimizer.step()
        stats = optimizer.grad_stats()["weight"]
        assert float(stats.mean) == pytest.approx(float(grad.mean()) * size, rel=1e-12)
        assert float(stats.std) == pytest.approx(float(grad.std(correction=0)) * size, rel=1e-12)


def test_a_copy_has_its_own(path):
    params, optimizer = build(path)
    set_grads(params, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    before = optimizer.grad_stats()
    own = twin.param_groups[0]["params"]
    set_grads(own, 1)
    twin.step()
    assert_stats(twin, own, "tensor")
    assert torch.equal(optimizer.grad_stats()["weight"].mean, before["weight"].mean)

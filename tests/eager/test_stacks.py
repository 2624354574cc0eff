"""Small tensors of one shape are stacked: each fares as it would alone, and as in float64."""

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.eager import runs as eager_runs

SHAPES = [(6, 4), (3,), (6, 4), (2, 3, 2, 2), (6, 4), (3,), (1,), (3,), (6, 4), (0, 4), (70, 130)]
CASES = {
    "tensor": {},
    "row, nesterov": {"granularity": "row", "nesterov": True, "center_1d": True},
    "global": {"granularity": "global"},
    "cdf, decay": {"normalizer": "cdf", "weight_decay": 0.1},
    "no momentum": {"momentum": 0.0},
    "windows": {"accumulation_steps": 2},
    "windows of rows": {"accumulation_steps": 2, "granularity": "row"},
    "split": {"dtype": torch.bfloat16},
    "stochastic": {"dtype": torch.bfloat16, "master_weights": "stochastic"},
    "narrow momentum": {"momentum_dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


def trained(options, *, lay_out_anew):
    """Parameters, state and statistics after steps in which some slices are skipped."""
    more = dict(options)
    dtype = more.pop("dtype", torch.float32)
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    params[4].data = params[4].data.t().contiguous().t()
    optimizer = BNGD(params, 1e-2, fused=False, **more)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for place, param in enumerate(params):
            values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = torch.empty_like(param).copy_(values)
            if param.numel() and (step + place) % 4 == 3:
                param.grad[(0,) * param.dim()] = torch.nan if step % 2 else torch.inf
        if step == 4 and "accumulation_steps" not in more:
            params[2].grad = None
        if lay_out_anew:
            optimizer._stepper.replay = None
        optimizer.step()
    found = [param.detach() for param in params]
    for param in params:
        found += list(optimizer.state.get(param, {}).values())
    for stats in optimizer.grad_stats().values():
        found += list(stats)
    return found


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_stacked_tensors_fare_as_each_alone(options, monkeypatch):
    stacked = trained(options, lay_out_anew=False)
    anew = trained(options, lay_out_anew=True)
    monkeypatch.setattr(eager_runs, "SMALL", 0)
    alone = trained(options, lay_out_anew=False)
    # a transposed tensor is summed in its memory's order where it is alone
    for other, bound in ((anew, 0.0), (alone, 1e-12)):
        assert len(stacked) == len(other)
        for found, want in zip(stacked, other):
            wide = (found.double(), want.double())
            torch.testing.assert_close(*wide, rtol=bound, atol=0, equal_nan=True)
    assert all(value.isfinite().all() for value in stacked[: len(SHAPES)])


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype, granularity):
    """Rows beyond a block, slices of several pieces, and blocks that torch gives to threads."""
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            params = [Parameter(torch.randn(s, dtype=dtype)) for s in ((3, 70_001), (900, 301))]
            optimizer = BNGD(params, 1e-2, granularity=granularity, fused=False)
            for _ in range(2):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            statistics = [value for stats in optimizer.grad_stats().values() for value in stats]
            runs.append([*(param.detach() for param in params), *statistics])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for found, want in zip(runs[0], other):
            assert torch.equal(found, want)

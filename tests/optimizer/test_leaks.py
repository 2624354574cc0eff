"""What an optimizer lets go of: parameters that left its groups, and records of other slices."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from bngd_triton import BNGD


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.zero_grad()


def made(path, **options):
    params = [Parameter(torch.randn(6, 4, device=path.device)) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return params, BNGD(groups, fused=path.fused, **options)


@pytest.mark.parametrize("granularity", ["tensor", "global"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_replaced_parameter_is_freed_with_its_buffer(momentum, granularity, path):
    """As Gaussian splatting does: its state goes, and another takes its place."""
    params, optimizer = made(path, momentum=momentum, granularity=granularity)
    for _ in range(2):
        step(optimizer)
    old = [weakref.ref(param) for param in params]
    memory = [StorageWeakRef(param.untyped_storage()) for param in params]
    for i in range(4):
        optimizer.state.pop(params[i], None)
    for i in range(2):
        optimizer.param_groups[0]["params"][i] = Parameter(torch.randn(3, 4, device=path.device))
    # the other group's go without another in their place
    del params, optimizer.param_groups[1]
    step(optimizer)
    gc.collect()
    assert [one() for one in old] == [None] * 4
    assert all(one.expired() for one in memory)


def test_parameters_that_the_kernels_leave_are_freed(path):
    """The last kernels' step must not hold what only the reference serves now."""
    params, optimizer = made(path)
    step(optimizer)
    optimizer.fused = False
    old = weakref.ref(params[0])
    optimizer.state.pop(params[0])
    optimizer.param_groups[0]["params"].pop(0)
    del params
    step(optimizer)
    gc.collect()
    assert old() is None


def test_skips_of_what_is_gone_still_count(path):
    params, optimizer = made(path, granularity="row")
    for param in params:
        param.grad = torch.ones_like(param)
        param.grad[0, 0] = param.grad[5, 1] = torch.inf
    optimizer.step()
    assert optimizer.skipped == 8
    optimizer.zero_grad()
    optimizer.state.pop(params[0])
    optimizer.param_groups[0]["params"][0] = Parameter(torch.randn(3, 4, device=path.device))
    step(optimizer)
    assert optimizer.skipped == 8
    optimizer.param_groups.pop()
    step(optimizer)
    assert optimizer.skipped == 8


def test_changes_of_granularity_leave_a_number_behind(path):
    params, optimizer = made(path)
    sizes, want = [], 0
    for turn in range(9):
        granularity = ("tensor", "row", "global")[turn % 3]
        for group in optimizer.param_groups:
            group["granularity"] = granularity
        for param in params:
            param.grad = torch.randn_like(param)
            param.grad[0, 0] = torch.nan
        optimizer.step()
        want += 2 if granularity == "global" else 4
        assert optimizer.skipped == want
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) is Tensor]
        records = [t for t in tensors if t.dtype is torch.float64 and t.shape[-1:] == (3,)]
        sizes.append(sum(record.numel() for record in records))
        del tensors, records
    assert sizes[6:9] == sizes[3:6]

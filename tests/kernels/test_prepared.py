"""Steps laid out once: how many launches they take, and what may change between them."""

import itertools

import pytest
import torch

from bngd_triton import BNGD
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.options import Options
from bngd_triton.records import StepTensor, new_record
from support.kernel_cases import LR


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_launches_do_not_grow(granularity, device, launched):
    """For one tensor, 10 and 300, in one group or one each, with options of every kind."""
    kinds = [{}, {"momentum": 0.0}, {"nesterov": True}, {"maximize": True}, {"normalizer": "cdf"}]
    for n, per_group in ((1, 1), (10, 10), (10, 1), (300, 300), (300, 10)):
        params = [torch.randn(2, 8208, device=device), *torch.randn(n - 1, 16, device=device)]
        for param in params:
            param.grad = torch.randn_like(param)
        groups = [
            {"params": params[i : i + per_group], "lr": 1e-3 * (i + 1), **kind}
            for i, kind in zip(range(0, n, per_group), itertools.cycle(kinds))
        ]
        optimizer = BNGD(groups, granularity=granularity, fused=True)
        launched.clear()
        optimizer.step()
        words = ["tiles"] * (n > 1) + ["statistics", "update"]
        assert launched == [f"_{word}_kernel" for word in words], (n, per_group)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("tensors", "launches"),
    [([(100, FP32)] * 2, 1), ([(100, FP32), (9000, FP32)], 3), ([(9000, FP32), (9000, BF16)], 4)],
)
def test_launches_of_small_and_mixed_models(tensors, launches, device, launched):
    params = [torch.randn(n, device=device).to(dtype) for n, dtype in tensors]
    for param in params:
        param.grad = torch.randn_like(param)
    BNGD(params, fused=True).step()
    assert len(launched) == launches


def test_the_signature_of_a_step_tells_its_tensors_and_options_apart(device):
    """A gradient may move, by multiples of an access; whatever else changes is laid out anew."""
    param, other, grad, momentum = torch.randn(4, 6, 6, device=device).unbind()
    odd = torch.randn(37, device=device)[1:].view(6, 6)
    groups = [Options(LR), Options(LR)]
    sign = FusedStep.sign
    record = new_record(6, device)

    def made(param, grad, momentum, group):
        return StepTensor(param, grad, momentum, group, record)

    base = sign([made(param, grad, momentum, 0)], groups)
    assert sign([made(param, other, momentum, 0)], groups) == base
    assert sign([made(param, grad, momentum, 0)], [Options(1.0, eps=0.0), groups[1]]) == base
    for desc, one in (
        ("gradient off an access", made(param, odd, momentum, 0)),
        ("gradient's order", made(param, grad.T, momentum, 0)),
        ("gradient's dtype", made(param, grad.half(), momentum, 0)),
        ("parameter", made(other, grad, momentum, 0)),
        ("parameter's order", made(param.T, grad, momentum, 0)),
        ("momentum", made(param, grad, other, 0)),
        ("momentum's order", made(param, grad, momentum.T, 0)),
        ("no momentum", made(param, grad, None, 0)),
        ("group", made(param, grad, momentum, 1)),
    ):
        assert sign([one], groups) != base, desc
    for options in (
        Options(LR, granularity="tensor"), Options(LR, center_1d=True), Options(LR, momentum=0.0)
    ):  # fmt: skip
        assert sign([made(param, grad, momentum, 0)], [options, groups[1]]) != base, options


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"granularity": "tensor"}, "granularity of group 1"),
        ({"center_1d": True}, "center_1d of group 1"),
        ({"momentum": 0.0}, "momentum of group 1"),
        ({"accumulation_steps": 4}, "accumulation_steps of group 1"),
        ({"master_weights": None}, "master_weights of group 1"),
        ({"seed": 3}, "seed of group 1"),
        ({"nonfinite": "raise"}, "nonfinite='raise' of group 1"),
        (None, "2 groups were captured, there are 3 now"),
    ],
    ids=str,
)
def test_a_sync_refuses_what_no_replay_follows(change, named, device):
    params = [torch.nn.Parameter(torch.randn(16, device=device)) for _ in range(3)]
    optimizer = BNGD([{"params": params[:1]}, {"params": params[1:2]}], fused=True)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    (prepared,) = optimizer._stepper.prepared
    before = prepared.table.clone()
    if change is None:
        optimizer.add_param_group({"params": params[2:]})
    else:
        # of another group, and one that a replay could follow
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.param_groups[1].update(change)
    with pytest.raises(RuntimeError, match=named):
        optimizer.sync_hyperparameters()
    assert torch.equal(prepared.table, before)
    optimizer.step()
    if change != {"nonfinite": "raise"}:
        optimizer.sync_hyperparameters()

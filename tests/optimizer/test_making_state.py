"""Steps that torch.distributed.checkpoint takes to make state, and steps that only look so."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bngd_triton import BNGD
from support.exact_runs import assert_bits, state_of
from support.runs import everything
from support.steps import take_steps

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
option_sets = pytest.mark.parametrize(
    ("options", "tensor_rate"),
    [
        ({"accumulation_steps": 2}, False),
        ({"accumulation_steps": 2, "granularity": "row", "weight_decay": 0.1}, True),
        ({"accumulation_steps": 3, "granularity": "global"}, False),
        ({"master_weights": "stochastic"}, True),
    ],
    ids=str,
)


def make(path, tensor_rate, **options):
    torch.manual_seed(0)
    model = nn.Linear(6, 5).to(path.device, torch.bfloat16)
    lr = torch.tensor(0.1) if tensor_rate else 0.1
    return model, BNGD(model.parameters(), lr=lr, fused=path.fused, **options)


def counts(optimizer):
    (group,) = optimizer.state_dict()["param_groups"]
    return group["micro_step"], group["rounding_steps"]


@option_sets
def test_asking_a_fresh_optimizer_for_its_state_changes_no_run(options, tensor_rate, path):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    plain, asked, loaded = (make(path, tensor_rate, **options) for _ in range(3))
    saved = get_optimizer_state_dict(*asked)
    assert counts(asked[1]) == (0, 0)
    assert not any(state.any() for state in state_of(asked[1], list(asked[0].parameters())))
    set_optimizer_state_dict(*loaded, saved)
    for seed in range(1, 6):
        runs = []
        for model, optimizer in (plain, asked, loaded):
            params = list(model.parameters())
            take_steps(optimizer, params, [seed])
            optimizer.zero_grad()
            runs.append(everything(optimizer, params))
            assert counts(optimizer) == counts(plain[1])
        assert_bits(runs[1], runs[0])
        assert_bits(runs[2], runs[0])


@option_sets
def test_a_first_step_of_zeros_at_rate_0_counts_as_any_other(options, tensor_rate, path):
    """As under a warm-up from 0 where a hinge loss is 0."""
    model, optimizer = make(path, tensor_rate, **options)
    params, (group,) = list(model.parameters()), optimizer.param_groups
    rate, group["lr"] = group["lr"], torch.tensor(0.0) if tensor_rate else 0.0
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_bits(params, before)
    group["lr"] = rate
    size = options.get("accumulation_steps", 1)
    assert counts(optimizer) == ((1, 0) if size > 1 else (0, 1))
    for call in range(2, 8):
        weights = params[0].detach().clone()
        take_steps(optimizer, params, [call])
        assert torch.equal(weights, params[0]) == (call % size != 0)

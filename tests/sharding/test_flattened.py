"""Parameters that a wrapper has merged and cut are refused by name, before anything changes."""

import sys
import types

import pytest
import torch
from torch import nn

from bngd_triton import BNGD
from bngd_triton.reference import step_
from support.processes import needs_gloo, run
from support.runs import refused


def fsdp1(use_orig_params, strategy, made_first):
    """Wrap a model in FSDP1, and make or use an optimizer over it."""
    # imported by the workers alone: it takes a second
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = BNGD(net.parameters()) if made_first else None
    net = FullyShardedDataParallel(
        net, use_orig_params=use_orig_params, sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )  # fmt: skip
    net(torch.randn(4, 6)).square().mean().backward()
    match = r"belongs to FSDP1 \(FullyShardedDataParallel\).*use fully_shard \(FSDP2\) or Distrib"
    act = optimizer.step if optimizer else lambda: BNGD(net.parameters())
    with refused(NotImplementedError, match, optimizer, list(net.parameters())):
        act()


def fsdp1_cases():
    fsdp1(False, "FULL_SHARD", made_first=False)
    fsdp1(True, "FULL_SHARD", made_first=False)
    # the parameters stay the objects that the optimizer knows, and turn into pieces
    fsdp1(True, "FULL_SHARD", made_first=True)
    fsdp1(True, "SHARD_GRAD_OP", made_first=False)
    fsdp1(False, "NO_SHARD", made_first=False)


@pytest.mark.slow
@needs_gloo
def test_fsdp1():
    run(2, fsdp1_cases)


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_deepspeed_marks(mark):
    param = nn.Parameter(torch.randn(42))
    optimizer = BNGD([("weight", param)])
    # DeepSpeed counts its ids from 0
    setattr(param, mark, 0)
    param.grad = torch.randn(42)
    for act in (
        optimizer.step,
        lambda: BNGD([("weight", param)]),
        lambda: step_([param], [param.grad], None, lr=0.1, momentum=0.0),
    ):
        match = r"of shape \(42,\), belongs to DeepSpeed"
        with refused(NotImplementedError, match, optimizer, [param]):
            act()
    # as DeepSpeed's destroy() leaves a parameter that is whole again
    setattr(param, mark, None)
    assert_moves([param], optimizer)


def assert_moves(params, optimizer):
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert not any(map(torch.equal, before, params))


@pytest.fixture
def deepspeed(monkeypatch):
    assert "deepspeed" not in sys.modules
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))


@pytest.mark.usefixtures("deepspeed")
def test_deepspeed_partition():
    """What ZeRO 1 and 2 do to a group: one flat tensor, without a mark, for all its parameters."""
    optimizer = BNGD(nn.Linear(6, 8).named_parameters())
    partition = torch.randn(56, requires_grad=True)
    partition.grad = torch.randn_like(partition)
    optimizer.param_groups[0]["params"] = [partition]
    match = r"^weight, of shape \(56,\), belongs to Deep"
    with refused(NotImplementedError, match, optimizer, [partition]):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.usefixtures("deepspeed")
def test_whole_parameters_beside_deepspeed():
    # a vector of one's own; a matrix; at stage 0 with bfloat16, float32 copies of the parameters,
    # each of its own shape
    for params in (
        [nn.Parameter(torch.randn(8))],
        [torch.randn(8, 6, requires_grad=True)],
        [torch.randn(size, requires_grad=True) for size in (6, 8)],
    ):
        assert_moves(params, BNGD(params))

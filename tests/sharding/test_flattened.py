"""Parameters that a wrapper has merged and cut are refused by name, before anything changes."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bngd_triton import BNGD
from bngd_triton.reference import step_
from support.processes import run


def fsdp1(use_orig_params: bool, strategy: str, made_first: bool) -> str:
    """Wrap a model in FSDP1, make or use an optimizer over it, and return the error's text."""
    # imported by the workers alone: it takes a second
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = BNGD(net.parameters()) if made_first else None
    net = FullyShardedDataParallel(
        net,
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )
    net(torch.randn(4, 6)).square().mean().backward()
    before = [param.detach().clone() for param in net.parameters()]
    act = optimizer.step if optimizer else lambda: BNGD(net.parameters())
    with pytest.raises(NotImplementedError) as raised:
        act()
    assert all(map(torch.equal, before, net.parameters()))
    return str(raised.value)


def fsdp1_cases() -> list[str]:
    return [
        fsdp1(False, "FULL_SHARD", made_first=False),
        fsdp1(True, "FULL_SHARD", made_first=False),
        # the parameters stay the objects that the optimizer knows, and turn into pieces
        fsdp1(True, "FULL_SHARD", made_first=True),
        fsdp1(True, "SHARD_GRAD_OP", made_first=False),
        fsdp1(False, "NO_SHARD", made_first=False),
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_fsdp1() -> None:
    for rank in run(2, fsdp1_cases):
        for message in rank:
            assert "belongs to FSDP1 (FullyShardedDataParallel)" in message
            assert "use fully_shard (FSDP2) or DistributedDataParallel" in message
    # the first names its piece: 83 entries and a padded one, halved
    assert "params'][0], of shape (42,)" in rank[0]


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_deepspeed_marks(mark: str) -> None:
    param = nn.Parameter(torch.randn(42))
    optimizer = BNGD([("weight", param)])
    # DeepSpeed counts its ids from 0
    setattr(param, mark, 0)
    param.grad = torch.randn(42)
    before = param.detach().clone()
    for act in (
        optimizer.step,
        lambda: BNGD([("weight", param)]),
        lambda: step_([param], [param.grad], None, lr=0.1, momentum=0.0),
    ):
        with pytest.raises(NotImplementedError, match=r"of shape \(42,\), belongs to DeepSpeed"):
            act()
    assert torch.equal(param, before)
    # as DeepSpeed's destroy() leaves a parameter that is whole again
    setattr(param, mark, None)
    optimizer.step()
    assert not torch.equal(param, before)


def swap_in_partition(optimizer: BNGD, partition: torch.Tensor) -> None:
    """What ZeRO 1 and 2 do to a group: one flat tensor, without a mark, for all its parameters."""
    partition.grad = torch.randn_like(partition)
    optimizer.param_groups[0]["params"] = [partition]


def test_deepspeed_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(6, 8)
    optimizer = BNGD(net.named_parameters())
    partition = torch.randn(56, requires_grad=True)
    before = partition.detach().clone()
    swap_in_partition(optimizer, partition)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with pytest.raises(NotImplementedError, match=r"^weight, of shape \(56,\), belongs to Deep"):
        optimizer.step()
    assert torch.equal(partition, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: [nn.Parameter(torch.randn(8))], id="a vector of one's own"),
        pytest.param(lambda: [torch.randn(8, 6, requires_grad=True)], id="a matrix"),
        # stage 0 with bfloat16: float32 copies of the parameters, each of its own shape
        pytest.param(
            lambda: [torch.randn(size, requires_grad=True) for size in (6, 8)], id="whole copies"
        ),
    ],
)
def test_whole_parameters_beside_deepspeed(monkeypatch: pytest.MonkeyPatch, make) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    params = make()
    optimizer = BNGD(params)
    for param in params:
        param.grad = torch.randn_like(param)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(map(torch.equal, before, params))


def test_plain_vector_without_deepspeed() -> None:
    assert "deepspeed" not in sys.modules
    vector = torch.randn(8, requires_grad=True)
    vector.grad = torch.randn(8)
    before = vector.detach().clone()
    BNGD([vector]).step()
    assert not torch.equal(vector, before)

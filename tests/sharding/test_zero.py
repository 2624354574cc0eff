"""`ZeroRedundancyOptimizer` keeps tensors whole, so BNGD inside it does what it does alone."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bngd_triton import BNGD
from support.processes import run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

# workers inherit the variable
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "granularity": "row"}


class Outcome(NamedTuple):
    """What a rank reports: the weights after three runs of 6 steps, and what ZeRO saved."""

    alone: list[Tensor]
    inside: list[Tensor]
    resumed: list[Tensor]
    # parameters whose state this rank holds
    held: int
    # of every momentum buffer in the consolidated checkpoint
    saved: list[torch.Size]


def wrapped_model() -> DistributedDataParallel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)
    return DistributedDataParallel(net)


def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(10 * seed + dist.get_rank())
    for _ in range(3):
        x, y = torch.randn(4, 6).to(DEVICE), torch.randn(4, 3).to(DEVICE)
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()


def weights(module: nn.Module) -> list[Tensor]:
    return [param.detach().cpu().clone() for param in module.parameters()]


def alone(fused: bool) -> list[Tensor]:
    ddp = wrapped_model()
    optimizer = BNGD(ddp.parameters(), fused=fused, **OPTIONS)
    train(ddp, optimizer, 1)
    train(ddp, optimizer, 2)
    return weights(ddp)


def compare(fused: bool, bucket_view: bool) -> Outcome:
    # imported by the workers alone: it compiles TorchScript
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def zero(ddp: nn.Module) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(
            ddp.parameters(),
            optimizer_class=BNGD,
            parameters_as_bucket_view=bucket_view,
            fused=fused,
            **OPTIONS,
        )

    ddp = wrapped_model()
    optimizer = zero(ddp)
    train(ddp, optimizer, 1)
    middle = {key: value.clone() for key, value in ddp.state_dict().items()}
    # rank 0 gathers every rank's momentum, and its file serves all
    optimizer.consolidate_state_dict(to=0)
    file = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), file)
    files = [file.getvalue()]
    dist.broadcast_object_list(files, src=0)
    checkpoint = torch.load(io.BytesIO(files[0]), weights_only=True, map_location=DEVICE)
    saved = [state["momentum_buffer"].shape for state in checkpoint["state"].values()]
    train(ddp, optimizer, 2)

    again = wrapped_model()
    again.load_state_dict(middle)
    resumed = zero(again)
    resumed.load_state_dict(checkpoint)
    train(again, resumed, 2)

    held = sum(len(group["params"]) for group in optimizer.optim.param_groups)
    return Outcome(alone(fused), weights(ddp), weights(again), held, saved)


def compare_cases() -> list[Outcome]:
    return [compare(*case) for case in [(False, False), (True, False), (True, True)]]


@pytest.mark.slow
def test_the_same_bits_as_without_it() -> None:
    for first, second in zip(*run(2, compare_cases), strict=True):
        for rank in (first, second):
            assert all(map(torch.equal, rank.inside, first.alone))
            assert all(map(torch.equal, rank.resumed, first.alone))
        # the ranks share the four parameters' state, and the checkpoint has all of it
        assert first.held > 0
        assert second.held > 0
        assert first.held + second.held == 4
        assert first.saved == [weight.shape for weight in first.alone]

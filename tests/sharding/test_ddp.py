"""DistributedDataParallel over gloo: several processes train as one process does.

DDP averages gradients over ranks. The average of the ranks' mean gradients is the mean gradient of
the whole batch up to the rounding of its sums: weights agree with one process to that rounding,
and between ranks bit for bit.
"""

from __future__ import annotations

import os
from typing import NamedTuple

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
STEPS = 4
LR = 0.1
# An entry of the gradient sums 12 products in an order that depends on the number of ranks: 12
# units of 2**-24 in ghat. A step turns them into 1.2 units of the weights, and the weights' error
# into more of the next gradient's: 2**-18, 64 units, is 10 times what was seen, and a thousandth
# of what local gradients would change.
CLOSE = 2.0**-18


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)


def batch() -> tuple[Tensor, Tensor]:
    """Rows that 2 and 3 ranks, with 2 micro-batches on each, divide evenly."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 6, generator=generator), torch.randn(12, 3, generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def shard() -> tuple[Tensor, Tensor]:
    """This rank's part of the batch."""
    x, y = (part.chunk(dist.get_world_size()) for part in batch())
    return x[dist.get_rank()], y[dist.get_rank()]


def weights(module: nn.Module) -> list[Tensor]:
    return [param.detach().cpu().clone() for param in module.parameters()]


def alone(*, fused: bool) -> list[Tensor]:
    """The weights that one process reaches with the whole batch."""
    net = model()
    # where nothing moves, to hold flat buffers under DDP to it
    optimizer = BNGD(net.parameters(), LR, granularity="row", fused=fused, flatten=False)
    x, y = batch()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return weights(net)


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=CLOSE)


def train(fused: bool, view: bool, wrapped_first: bool, flatten: bool | None) -> list[Tensor]:
    """Train on this rank's shard; every rank but 0 starts from weights of its own."""
    net = model(seed=dist.get_rank())

    def wrap() -> DistributedDataParallel:
        return DistributedDataParallel(net, gradient_as_bucket_view=view)

    ddp = wrap() if wrapped_first else None
    optimizer = BNGD(net.parameters(), LR, granularity="row", fused=fused, flatten=flatten)
    ddp = ddp or wrap()
    x, y = shard()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), y).backward()
        if view:
            storages = {param.grad.untyped_storage().data_ptr() for param in net.parameters()}
            assert len(storages) == 1, "DDP has one bucket here, and gradients are its views"
        optimizer.step()
    return weights(net)


# fused, gradient_as_bucket_view, DDP made first, flatten (True: every parameter moves or an error)
CASES = [
    (fused, view, first, True if fused else None)
    for fused in (False, True)
    for view in (False, True)
    for first in (False, True)
]


def accumulate(fused: bool) -> list[Tensor]:
    net = model(seed=dist.get_rank())
    ddp = DistributedDataParallel(net)
    optimizer = BNGD(net.parameters(), LR, granularity="row", fused=fused)
    micro = [part.chunk(2) for part in shard()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        with ddp.no_sync():
            nn.functional.mse_loss(ddp(micro[0][0]), micro[1][0]).backward()
        nn.functional.mse_loss(ddp(micro[0][1]), micro[1][1]).backward()
        optimizer.step()
    return weights(net)


def micro_batch(rank: int, ranks: int, index: int) -> tuple[Tensor, Tensor]:
    """One of the two micro-batches of a rank."""
    x, y = (part.chunk(ranks)[rank].chunk(2)[index] for part in batch())
    return x, y


def windows(fused: bool) -> list[Tensor]:
    """Two micro-batches to a step, each averaged over ranks and normalised by itself."""
    net = model(seed=dist.get_rank())
    ddp = DistributedDataParallel(net)
    optimizer = BNGD(net.parameters(), LR, granularity="row", accumulation_steps=2, fused=fused)
    for step in range(2 * STEPS):
        x, y = micro_batch(dist.get_rank(), dist.get_world_size(), step % 2)
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()
    return weights(net)


def windows_alone(ranks: int, *, fused: bool) -> list[Tensor]:
    """The same in one process, with the micro-batches of all ranks together."""
    net = model()
    optimizer = BNGD(net.parameters(), LR, granularity="row", accumulation_steps=2, fused=fused)
    for step in range(2 * STEPS):
        parts = [micro_batch(rank, ranks, step % 2) for rank in range(ranks)]
        x, y = (torch.cat(part) for part in zip(*parts))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return weights(net)


def poison(fused: bool) -> tuple[int, list[Tensor], list[Tensor]]:
    """One step in which rank 1 finds a NaN in the gradient of the first weight matrix only."""
    net = model()
    ddp = DistributedDataParallel(net)
    optimizer = BNGD(net.parameters(), LR, granularity="row", fused=fused)
    before = weights(net)
    x, y = shard()
    loss = nn.functional.mse_loss(ddp(x), y)
    if dist.get_rank() == 1:
        loss = loss + float("nan") * net[0].weight[2].sum()
    loss.backward()
    optimizer.step()
    return optimizer.skipped, before, weights(net)


def train_narrow(fused: bool) -> list[Tensor]:
    """Train bfloat16 weights whose steps are rounded stochastically."""
    net = model(seed=dist.get_rank()).bfloat16()
    # made first, so before DDP gives all ranks the same weights, and with its default seed
    optimizer = BNGD(net.parameters(), LR, fused=fused, master_weights="stochastic")
    # ranks draw random numbers of their own, for dropout as a rule
    torch.manual_seed(dist.get_rank())
    ddp = DistributedDataParallel(net)
    x, y = (part.bfloat16() for part in shard())
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()
    return weights(net)


class Outcome(NamedTuple):
    """What a rank reports; a worker takes seconds to start, so one does all."""

    trained: list[list[Tensor]]
    accumulated: list[list[Tensor]]
    windowed: list[list[Tensor]]
    poisoned: list[tuple[int, list[Tensor], list[Tensor]]]
    narrow: list[list[Tensor]]


def everything() -> Outcome:
    return Outcome(
        [train(*case) for case in CASES],
        [accumulate(fused) for fused in (False, True)],
        [windows(fused) for fused in (False, True)],
        [poison(fused) for fused in (False, True)],
        [train_narrow(fused) for fused in (False, True)],
    )


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="{} ranks".format
)
def ranks(request: pytest.FixtureRequest) -> list[Outcome]:
    return run(request.param, everything)


def test_trains_as_one_process_does(ranks: list[Outcome]) -> None:
    want = {fused: alone(fused=fused) for fused in (False, True)}
    for i, (fused, *_) in enumerate(CASES):
        first = ranks[0].trained[i]
        assert_close(first, want[fused])
        for rank in ranks[1:]:
            assert same_bits(rank.trained[i], first), CASES[i]
        # where DDP keeps gradients, and which was made first, changes no bit
        assert same_bits(first, ranks[0].trained[4 * fused]), CASES[i]


def test_micro_batches_summed_under_no_sync(ranks: list[Outcome]) -> None:
    # the sum is twice the mean, which a z-score does not see but for eps: 1e-8 is a rounding of
    # the rows' rms of about 0.1
    for fused in (False, True):
        first = ranks[0].accumulated[fused]
        assert_close(first, alone(fused=fused))
        for rank in ranks[1:]:
            assert same_bits(rank.accumulated[fused], first)


def test_micro_batches_normalised_one_by_one(ranks: list[Outcome]) -> None:
    for fused in (False, True):
        first = ranks[0].windowed[fused]
        assert_close(first, windows_alone(len(ranks), fused=fused))
        # the sum of the micro-batches is another step
        assert not all(map(torch.allclose, first, ranks[0].accumulated[fused]))
        for rank in ranks[1:]:
            assert same_bits(rank.windowed[fused], first)


def test_a_nan_on_one_rank_is_skipped_on_all(ranks: list[Outcome]) -> None:
    for fused in (False, True):
        skipped, before, after = ranks[0].poisoned[fused]
        assert skipped == 1
        for rank in ranks[1:]:
            assert rank.poisoned[fused][0] == skipped
            assert same_bits(rank.poisoned[fused][2], after)
        still = before[0] == after[0]
        assert still[2].all()
        assert not still[torch.arange(len(still)) != 2].any()
        for old, new in zip(before[1:], after[1:]):
            assert not torch.equal(old, new)


def test_ranks_round_alike(ranks: list[Outcome]) -> None:
    start = weights(model().bfloat16())
    for fused in (False, True):
        first = ranks[0].narrow[fused]
        assert not any(map(torch.equal, first, start))
        for rank in ranks[1:]:
            assert same_bits(rank.narrow[fused], first)

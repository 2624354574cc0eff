"""DistributedDataParallel and ZeRO over gloo: several processes train as one process does.

DDP averages gradients over ranks. The average of the ranks' mean gradients is the mean gradient of
the whole batch up to the rounding of its sums: weights agree with one process to that rounding,
and between ranks bit for bit. `ZeroRedundancyOptimizer` keeps tensors whole, so BNGD inside it does
what it does alone.
"""

import io
import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bngd_triton import BNGD
from support.processes import needs_gloo, run

pytestmark = needs_gloo

# workers inherit the variable
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
STEPS = 4
LR = 0.1
# An entry of the gradient sums 12 products in an order that depends on the number of ranks: 12
# units of 2**-24 in ghat. A step turns them into 1.2 units of the weights, and the weights' error
# into more of the next gradient's: 2**-18, 64 units, is 10 times what was seen, and a thousandth
# of what local gradients would change.
CLOSE = 2.0**-18
PATHS = (False, True)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)


def replica(**options):
    """Of rank 0's weights; every other rank starts from weights of its own."""
    return DistributedDataParallel(model(seed=dist.get_rank()), **options)


def batch():
    """Rows that 2 and 3 ranks, with 2 micro-batches on each, divide evenly."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 6, generator=generator), torch.randn(12, 3, generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def shard():
    """This rank's part of the batch."""
    x, y = (part.chunk(dist.get_world_size()) for part in batch())
    return x[dist.get_rank()], y[dist.get_rank()]


def micro_batches(rank, ranks):
    """The two micro-batches of a rank."""
    x, y = (part.chunk(ranks)[rank].chunk(2) for part in batch())
    return list(zip(x, y))


def weights(module):
    return [param.detach().cpu().clone() for param in module.parameters()]


def fit(net, optimizer, data):
    """The weights after a few times through the data, with a step after each item."""
    for _ in range(STEPS):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    return weights(net)


def alone(fused, data, **options):
    """The weights that one process reaches."""
    net = model()
    # where nothing moves, to hold flat buffers under DDP to it
    optimizer = BNGD(net.parameters(), LR, fused=fused, flatten=False, **options)
    return fit(net, optimizer, data)


def train(fused, view, wrapped_first):
    """Train on this rank's shard."""
    net = model(seed=dist.get_rank())

    def wrap():
        return DistributedDataParallel(net, gradient_as_bucket_view=view)

    ddp = wrap() if wrapped_first else None
    # True: every parameter moves, or an error
    optimizer = BNGD(net.parameters(), LR, fused=fused, flatten=True if fused else None)
    found = fit(ddp or wrap(), optimizer, [shard()])
    storages = {param.grad.untyped_storage().data_ptr() for param in net.parameters()}
    assert (len(storages) == 1) == view, "DDP has one bucket here, and gradients are its views"
    return found


# fused, gradient_as_bucket_view, DDP made first
CASES = [(fused, view, first) for fused in PATHS for view in PATHS for first in PATHS]


def accumulate(fused):
    ddp = replica()
    optimizer = BNGD(ddp.parameters(), LR, fused=fused)
    (x, y), (last_x, last_y) = micro_batches(dist.get_rank(), dist.get_world_size())
    for _ in range(STEPS):
        optimizer.zero_grad()
        with ddp.no_sync():
            nn.functional.mse_loss(ddp(x), y).backward()
        nn.functional.mse_loss(ddp(last_x), last_y).backward()
        optimizer.step()
    return weights(ddp)


def windows(fused):
    """Two micro-batches to a step, each averaged over ranks and normalised by itself."""
    ddp = replica()
    optimizer = BNGD(ddp.parameters(), LR, accumulation_steps=2, fused=fused)
    return fit(ddp, optimizer, micro_batches(dist.get_rank(), dist.get_world_size()))


def poison(fused):
    """One step in which rank 1 finds a NaN in the gradient of the first weight matrix only."""
    ddp = replica()
    optimizer = BNGD(ddp.parameters(), LR, fused=fused)
    x, y = shard()
    loss = nn.functional.mse_loss(ddp(x), y)
    if dist.get_rank() == 1:
        loss = loss + float("nan") * ddp.module[0].weight[2].sum()
    loss.backward()
    optimizer.step()
    return optimizer.skipped, weights(ddp)


def train_narrow(fused):
    """Train bfloat16 weights whose steps are rounded stochastically."""
    net = model(seed=dist.get_rank()).bfloat16()
    # made first, so before DDP gives all ranks the same weights, and with its default seed
    optimizer = BNGD(net.parameters(), LR, fused=fused, master_weights="stochastic")
    # ranks draw random numbers of their own, for dropout as a rule
    torch.manual_seed(dist.get_rank())
    x, y = shard()
    return fit(DistributedDataParallel(net), optimizer, [(x.bfloat16(), y.bfloat16())])


class Outcome(NamedTuple):
    """What a rank reports; a worker takes seconds to start, so one does all."""

    trained: list[list[Tensor]]
    accumulated: list[list[Tensor]]
    windowed: list[list[Tensor]]
    poisoned: list[tuple[int, list[Tensor]]]
    narrow: list[list[Tensor]]


def everything():
    return Outcome(
        [train(*case) for case in CASES],
        *([part(fused) for fused in PATHS] for part in (accumulate, windows, poison, train_narrow)),
    )


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="{} ranks".format
)
def ranks(request):
    return run(request.param, everything)


def same_bits(*runs):
    return all(torch.equal(*pair) for other in runs[1:] for pair in zip(runs[0], other))


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0.0, atol=CLOSE)


def test_trains_as_one_process_does(ranks):
    for i, (fused, *_) in enumerate(CASES):
        first = ranks[0].trained[i]
        assert_close(first, alone(fused, [batch()]))
        # where DDP keeps gradients, and which was made first, changes no bit
        assert same_bits(ranks[0].trained[4 * fused], *(rank.trained[i] for rank in ranks)), i


def test_micro_batches_summed_under_no_sync(ranks):
    # the sum is twice the mean, which a z-score does not see but for eps: 1e-8 is a rounding of
    # the rows' rms of about 0.1
    for fused in PATHS:
        assert_close(ranks[0].accumulated[fused], alone(fused, [batch()]))
        assert same_bits(*(rank.accumulated[fused] for rank in ranks))


def test_micro_batches_normalised_one_by_one(ranks):
    parts = [micro_batches(rank, len(ranks)) for rank in range(len(ranks))]
    data = [tuple(map(torch.cat, zip(*micro))) for micro in zip(*parts)]
    for fused in PATHS:
        first = ranks[0].windowed[fused]
        assert_close(first, alone(fused, data, accumulation_steps=2))
        # the sum of the micro-batches is another step
        assert not all(map(torch.allclose, first, ranks[0].accumulated[fused]))
        assert same_bits(*(rank.windowed[fused] for rank in ranks))


def test_a_nan_on_one_rank_is_skipped_on_all(ranks):
    before = weights(model())
    for fused in PATHS:
        assert [rank.poisoned[fused][0] for rank in ranks] == [1] * len(ranks)
        after = ranks[0].poisoned[fused][1]
        assert same_bits(*(rank.poisoned[fused][1] for rank in ranks))
        still = before[0] == after[0]
        assert still[2].all()
        assert not still[torch.arange(len(still)) != 2].any()
        assert not any(map(torch.equal, before[1:], after[1:]))


def test_ranks_round_alike(ranks):
    for fused in PATHS:
        assert not any(map(torch.equal, ranks[0].narrow[fused], weights(model().bfloat16())))
        assert same_bits(*(rank.narrow[fused] for rank in ranks))


class Zero(NamedTuple):
    """The weights after runs of twice 4 steps, and what ZeRO saved."""

    alone: list[Tensor]
    inside: list[Tensor]
    resumed: list[Tensor]
    # parameters whose state this rank holds
    held: int
    # of every momentum buffer in the consolidated checkpoint
    saved: list[torch.Size]


def inside_zero(fused, bucket_view):
    # imported by the workers alone: it compiles TorchScript
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"lr": LR, "momentum": 0.8, "fused": fused}

    def zero(ddp):
        return ZeroRedundancyOptimizer(
            ddp.parameters(), optimizer_class=BNGD, parameters_as_bucket_view=bucket_view, **options
        )

    ddp, again, plain = replica(), replica(), replica()
    optimizer, resumed, own = zero(ddp), zero(again), BNGD(plain.parameters(), **options)
    fit(ddp, optimizer, [shard()])
    again.load_state_dict(ddp.state_dict())
    # rank 0 gathers every rank's momentum, and its file serves all
    optimizer.consolidate_state_dict(to=0)
    file = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), file)
    files = [file.getvalue()]
    dist.broadcast_object_list(files, src=0)
    checkpoint = torch.load(io.BytesIO(files[0]), weights_only=True, map_location=DEVICE)
    saved = [state["momentum_buffer"].shape for state in checkpoint["state"].values()]
    resumed.load_state_dict(checkpoint)
    fit(plain, own, [shard()])
    return Zero(
        *(fit(*one, [shard()]) for one in ((plain, own), (ddp, optimizer), (again, resumed))),
        sum(len(group["params"]) for group in optimizer.optim.param_groups),
        saved,
    )


def zero_cases():
    return [inside_zero(*case) for case in [(False, False), (True, False), (True, True)]]


@pytest.mark.slow
def test_zero_has_the_same_bits_as_bngd_without_it():
    for first, second in zip(*run(2, zero_cases), strict=True):
        for rank in (first, second):
            assert same_bits(first.alone, rank.inside, rank.resumed)
        # the ranks share the four parameters' state, and the checkpoint has all of it
        assert sorted([first.held, second.held]) in ([1, 3], [2, 2])
        assert first.saved == [weight.shape for weight in first.alone]

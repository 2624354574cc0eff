"""What only a GPU can show: graphs that replay, programs that run at the same time.

Without one the same lines run in the interpreter, on less and with an ordinary call for a replay: a
rehearsal, so that the first run on a GPU does not fail for a reason of the test's own.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from bngd_triton import BNGD
from bngd_triton.kernels import fused_step, fused_step_, launch
from bngd_triton.kernels.devices import tuning_for
from bngd_triton.options import Options
from support.exact_runs import assert_bits, make_params, state_of, take_steps
from support.kernel_cases import LANES, LR
from support.processes import through_a_queue
from support.twins import Twins

GPU = torch.cuda.is_available()
# ordinary iterations before a capture, replays after it, batches of an iteration that learns
WARM, REPLAYS, BATCHES = (3, 6, 10) if GPU else (1, 2, 3)
# of a captured and an ordinary backward pass, whose matrix products may be summed differently
PRODUCTS = 2.0**-12


def warmed(iteration, graphed):
    """An iteration, or the replay of a graph of it, after some ordinary ones."""
    if not graphed or not GPU:
        for _ in range(WARM):
            iteration()
        return iteration
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(WARM):
            iteration()
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            iteration()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


def start(shapes, device, lr=LR, **options):
    """The same parameters and gradients at every call, and generators in the same state."""
    torch.manual_seed(1)
    dtype = options.pop("dtype", torch.float32)
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params, BNGD(params, lr, fused=True, **options)


SHAPES = [(300, 70), (70,), (5,), (3, 2048), (200_000,)] if GPU else [(9, 7), (70,), (2500,)]


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"granularity": "row", "nesterov": True},
        {"granularity": "global", "normalizer": "cdf"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "master_weights": "stochastic"},
        {"tensor_lr": True},
        {"tuning": {"form": "single-launch"}},
    ],
    ids=str,
)
def test_a_captured_step_follows_a_schedule(options, device, monkeypatch):
    """Replays equal ordinary steps bit for bit, at learning rates set after the capture."""
    more = dict(options)
    tuning, tensor_lr = more.pop("tuning", {}), more.pop("tensor_lr", False)
    sizes = dataclasses.replace(tuning_for(device), **tuning)
    monkeypatch.setattr(fused_step, "tuning_for", lambda device: sizes)
    runs = []
    for graphed in (False, True):
        lr = torch.tensor(LR, device=device) if tensor_lr else LR
        params, optimizer = start(SHAPES, device, lr, **more)
        replay = warmed(optimizer.step, graphed)
        for step in range(REPLAYS):
            rate = LR * (REPLAYS - step) / REPLAYS
            if isinstance(lr, Tensor):
                lr.fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            optimizer.sync_hyperparameters()
            for param in params:
                param.grad.copy_(torch.randn_like(param))
            if step == REPLAYS // 2:
                params[1].grad[2] = torch.inf
            replay()
        assert optimizer.skipped > 0
        runs.append([*params, torch.tensor(optimizer.skipped)])
    assert all(map(torch.equal, *runs))


def test_ordinary_steps_between_replays_leave_the_graph_as_it_is(device):
    """An odd last batch has gradients of its own, and one without a gradient another plan."""
    runs = []
    for graphed in (False, True):
        params, optimizer = start(SHAPES, device)
        static = [param.grad for param in params]
        replay = warmed(optimizer.step, graphed)
        for step in range(REPLAYS):
            for place, param in enumerate(params):
                odd = step % 2 and place == 1
                param.grad = None if odd else torch.randn_like(param)
            optimizer.step()
            # what a freed table would be filled with
            filled = [torch.full((n,), -1, device=device) for n in (64, 512, 4096)]
            for param, grad in zip(params, static):
                param.grad = grad.copy_(torch.randn_like(grad))
            optimizer.param_groups[0]["lr"] = LR / (step + 1)
            optimizer.sync_hyperparameters()
            replay()
            del filled
        runs.append(params)
    assert all(map(torch.equal, *runs))


def test_a_whole_training_iteration_is_captured(device):
    data = torch.randn(BATCHES, 32, 24, device=device)
    losses = []
    for graphed in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 24)).to(device)
        optimizer = BNGD(model.parameters(), 1e-2, fused=True)
        x, loss = data[0].clone(), torch.zeros((), device=device)

        def iteration(model=model, optimizer=optimizer, x=x, loss=loss):
            optimizer.zero_grad(set_to_none=False)
            found = (model(x) - x).square().mean()
            found.backward()
            optimizer.step()
            loss.copy_(found.detach())

        run, seen = warmed(iteration, graphed), []
        for batch in data:
            x.copy_(batch)
            run()
            seen.append(float(loss))
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=PRODUCTS)
    assert losses[1][-1] < losses[1][0]


def test_a_hundred_runs_give_the_same_bits(device, monkeypatch):
    """Every other one without hints to the caches."""
    tunings = [dataclasses.replace(tuning_for(device), hints=hints) for hints in (True, False)]
    shapes = [(1000, 1000), (3000,), (64, 3, 3, 3), (300_001,)] if GPU else [(50, 60), (9, 3)]
    first = None
    for k in range(100 if GPU else 3):
        monkeypatch.setattr(fused_step, "tuning_for", lambda device, k=k: tunings[k % 2])
        params, optimizer = start(shapes, device)
        optimizer.step()
        optimizer.step()
        first = first or params
        assert all(map(torch.equal, params, first))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_every_thread_of_a_slice_sees_the_window_that_it_found(granularity, device):
    """Windows in which each first and last micro-batch counts, bit for bit with the reference."""
    # slices of which several warps hold a part
    if granularity == "row":
        shapes = [(1000 if GPU else 3, n) for n in (200, 2000)]
    else:
        shapes = [(n,) for n in (130, 200, 1000, 2000)] * (100 if GPU else 3)
    runs = []
    for fused in (False, True):
        params = make_params(device, shapes=shapes)
        optimizer = BNGD(
            params, LR, granularity=granularity, accumulation_steps=4, center_1d=True, fused=fused
        )
        take_steps(optimizer, params, range(12))
        runs.append([*params, *state_of(optimizer, params)])
    assert_bits(*runs)


# the work of the device's sizes are a few dozen items, and more programs than items never run
@pytest.mark.parametrize(
    ("small", "programs"),
    [(False, 1), (False, 7), (False, 10_000)] + [(True, n) for n in (1, 2, 7, 132, 1000, 10_000)],
)
def test_waiting_programs_always_end(small, programs, device, monkeypatch):
    """The single launch beside a busy stream, against two launches."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    torch.manual_seed(4)
    sizes = (400_003, 17, 5000, 90_000, 3, 16_384) if GPU else (1003, 17, 300)
    tensors = [torch.randn(3, n, device=device).unbind() for n in sizes]
    twins = Twins(tensors, Options(LR), LANES if small else tuning_for(device), programs)
    busy = contextlib.nullcontext()
    if GPU:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        busy = torch.cuda.stream(beside)
    noise = torch.randn(2048 if GPU else 8, 2048 if GPU else 8, device=device)
    for _ in range(20 if GPU else 2):
        with busy:
            noise = (noise @ noise).tanh()
        twins.step()


@pytest.mark.parametrize("flatten", [False, True])
def test_parameters_reach_another_process(flatten, device):
    """CUDA IPC goes by the allocator's blocks, in which flat parameters lie somewhere."""
    (params, optimizer), (twins, other) = (
        start([(300, 7), (70,)], device, flatten=flatten) for _ in range(2)
    )
    try:
        found = through_a_queue(params[1])
    except RuntimeError as error:
        found = str(error)
    refused = flatten and "invalid device pointer" in found
    assert refused or found == params[1].tolist()
    # what was sent is trained on
    optimizer.step()
    other.step()
    assert all(map(torch.equal, params, twins))


def test_more_entries_than_32_bits_can_count(device):
    """Every entry of a step over 2.2e9 of them, half of which a signed 32-bit index cannot reach.

    In bfloat16: 18 GB of tensors, and what the comparison of a piece takes.
    """
    n, piece = (2_200_000_000, 1 << 27) if GPU else (22_000, 1 << 12)
    if GPU and torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free memory")
    param, grad, momentum = (torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(3))
    for tensor in (param, grad):
        for part in tensor.split(piece):
            part.normal_()
    # an offset that the mean must remove, and that wraps around if an index does
    for part in grad[n // 2 :].split(piece):
        part.add_(0.5)
    before, lr = param.clone(), 0.5
    total = sum(part.double().sum() for part in grad.split(piece))
    squares = sum(part.double().square().sum() for part in grad.split(piece))
    mean = total / n
    std = (squares / n - mean * mean).sqrt()
    momentum.zero_()
    with torch.no_grad():
        fused_step_([param], [grad], [momentum], lr=lr, center_1d=True)
    for got, start, g in zip(param.split(piece), before.split(piece), grad.split(piece)):
        moved = ((g.double() - mean) / std * 0.1).float()
        want = start.float() - lr * moved
        # one rounding at the store, of 8 bits
        assert ((got.float() - want).abs() <= 2.0**-8 * want.abs() + 2.0**-20).all()

"""Steps in CUDA graphs and in compiled functions."""

import gc

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD, release_gradients
from bngd_triton.engine.step import inputs_of
from bngd_triton.kernels import launch
from bngd_triton.verify.tolerances import CDF
from support import capture
from support.exact_runs import exact_gradient, give, make_params, state_of, take_steps
from support.runs import refused


def test_capture_refuses_what_it_could_not_replay(device, monkeypatch):
    """As in a CUDA graph: nothing may be uploaded, and nothing changes when that is refused."""
    param = Parameter(torch.randn(60, 5, device=device))
    optimizer = BNGD([param], 1e-2, fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    capture.pretend(monkeypatch)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.raises(RuntimeError, match="sync_hyperparameters"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    # the old one is held, so that its address is not used again
    held, param.grad = param.grad, param.grad.clone()
    with pytest.raises(RuntimeError, match="a gradient moved"):
        optimizer.step()
    assert torch.equal(param, before)
    del held


def test_capture_needs_a_step_before_and_every_gradient(device, monkeypatch):
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD([("weight", params[0]), ("head", params[1])], fused=True)
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    capture.pretend(monkeypatch)
    with refused(RuntimeError, "head has no gradient while a CUDA graph", optimizer, params):
        optimizer.step()
    params[1].grad = torch.randn_like(params[1])
    with refused(RuntimeError, "must repeat the one before", optimizer, params):
        optimizer.step()


CHANGES = [
    {"lr": 1e-1}, {"lr": 0.0}, {"momentum": 0.5}, {"nesterov": True}, {"weight_decay": 0.5},
    {"eps": 0.1}, {"centering": 0.3}, {"normalizer": "cdf"}, {"maximize": True},
    {"nonfinite": "propagate"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_sync_hyperparameters_reaches_a_replay(change, device):
    """A replay runs the launches alone; options reach it through the device table."""
    params, twins = make_params(device), make_params(device)
    optimizer = BNGD(params, 1e-2, granularity="tensor", fused=True)
    eager = BNGD(twins, 1e-2, granularity="tensor", fused=False)
    for one, its in ((optimizer, params), (eager, twins)):
        take_steps(one, its, range(2))
        one.param_groups[0].update(change)
    (step,) = optimizer._stepper.prepared
    optimizer.sync_hyperparameters()
    for place, (param, twin) in enumerate(zip(params, twins)):
        for one in (param, twin):
            one.grad.copy_(exact_gradient(one, 200 + place))
    # left alone unless it is to propagate
    params[-1].grad[3] = twins[-1].grad[3] = torch.inf
    assert step.plan.point_at([param.grad.data_ptr() for param in params])
    step.update_again(inputs_of(optimizer, [True]))
    eager.step()
    # of an erf, which both have of their own
    bound = CDF if "normalizer" in change else 0.0
    same = {"rtol": 0.0, "atol": bound, "equal_nan": True}
    torch.testing.assert_close(params, twins, **same)
    torch.testing.assert_close(state_of(optimizer, params), state_of(eager, twins), **same)


def captured(optimizer):
    """The step that a graph holds from now on."""
    with pytest.MonkeyPatch.context() as patch:
        capture.pretend(patch)
        optimizer.step()
    return optimizer._stepper.captured[-1]


def replayed(optimizer):
    """What a graph's replay does: the captured launches, and nothing on the host."""
    step = optimizer._stepper.captured[-1]
    launch.update(step.plan, step.held[-1][0])


def other_gradients(params, optimizer):
    """An odd last batch."""
    for place, param in enumerate(params):
        give(param, exact_gradient(param, 300 + place))


def one_gradient_less(params, optimizer):
    params[1].grad = None


def another_group(params, optimizer):
    """One that the graph does not know of; the seeds' table is made anew."""
    optimizer.add_param_group({"params": [Parameter(torch.ones(3, device=params[0].device))]})


@pytest.mark.parametrize("between", [other_gradients, one_gradient_less, another_group])
def test_an_ordinary_step_leaves_a_captured_one_as_it_is(between, device):
    runs = []
    for fused in (True, False):
        params = make_params(device)
        optimizer = BNGD(params, 1e-2, granularity="tensor", fused=fused)
        take_steps(optimizer, params, range(2))
        static = [param.grad for param in params]
        captured(optimizer) if fused else optimizer.step()
        for _ in range(2):
            between(params, optimizer)
            optimizer.step()
        gc.collect()
        for place, (param, grad) in enumerate(zip(params, static)):
            param.grad = grad.copy_(exact_gradient(param, 400 + place))
        if between is not another_group:
            optimizer.param_groups[0]["lr"] = 3e-3
            optimizer.sync_hyperparameters()
        if fused:
            replayed(optimizer)
        else:
            del optimizer.param_groups[1:]
            optimizer.step()
        runs.append([*params, *state_of(optimizer, params)])
    torch.testing.assert_close(*runs, rtol=0.0, atol=0.0)


def test_gradients_of_a_captured_step_find_it_again(device, layouts):
    """Eager steps between replays, on the graph's gradients and on others, in turns."""
    params = make_params(device)
    optimizer = BNGD(params, 1e-2, granularity="tensor", fused=True)
    take_steps(optimizer, params, range(2))
    static = [param.grad for param in params]
    held = captured(optimizer)
    other_gradients(params, optimizer)
    optimizer.step()
    (own,) = optimizer._stepper.prepared
    assert own is not held
    for param, grad in zip(params, static):
        param.grad = grad
    layouts()
    optimizer.step()
    # the other plan follows: the graph's stays as it was captured
    assert layouts() == 0
    assert optimizer._stepper.prepared == [own]
    captured(optimizer)
    assert optimizer._stepper.captured == [held, own]


def test_a_sync_reaches_every_captured_step_that_can_follow(device):
    params = make_params(device)
    optimizer = BNGD(params, 1e-2, granularity="tensor", fused=True)
    take_steps(optimizer, params, range(2))
    tables = []
    for _ in range(2):
        tables.append(captured(optimizer).table)
        other_gradients(params, optimizer)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.sync_hyperparameters()
    assert [float(table[0, 0]) for table in tables] == [0.25, 0.25]
    optimizer.param_groups[0]["granularity"] = "row"
    with pytest.raises(RuntimeError, match="cannot follow granularity of group 0"):
        optimizer.sync_hyperparameters()


def test_gradient_release_cannot_be_captured(device, monkeypatch):
    model = torch.nn.Linear(4, 3, device=device)
    optimizer = BNGD(model.parameters(), fused=True)
    release_gradients(model, optimizer)
    capture.pretend(monkeypatch)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="gradient release cannot be captured"):
        model(torch.randn(2, 4, device=device)).sum().backward()
    assert torch.equal(model.weight, before)


def test_compiled_training_step(device):
    """torch.compile breaks its graph at `step`, and compiles once under any schedule."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = torch.nn.Linear(8, 8, device=device)
    optimizer = BNGD(model.parameters(), 1e-2, fused=True, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

    @torch.compile(backend=backend)
    def train(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x = torch.randn(16, 8, device=device)
    losses, counts = [], []
    for _ in range(8):
        losses.append(float(train(x).detach()))
        counts.append(len(compiled))
        schedule.step()
    assert counts[1] == counts[-1] > 0
    assert losses[-1] < losses[0]

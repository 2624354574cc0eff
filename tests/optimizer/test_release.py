"""Gradient release: the same weights, without the gradients' memory."""

import gc

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bngd_triton import BNGD, release_gradients
from support.exact_runs import assert_bits
from support.paths import StepPath
from support.runs import everything, refused
from support.steps import values

WIDTH = 12


def make(path, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 5)).to(path.device, dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return model, BNGD(model.parameters(), fused=path.fused, **options)


def backward(model, path):
    model(torch.ones(2, WIDTH, device=path.device)).sum().backward()


def train(path, *, released, dtype=torch.float32, scaled=False, spoilt=(), **options):
    """Parameters and state in the end; the count of skips and the scale."""
    model, optimizer = make(path, dtype, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    scaler = torch.amp.GradScaler(path.device.type, init_scale=1024.0) if scaled else None
    handle = release_gradients(model, optimizer, grad_scaler=scaler) if released else None
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, WIDTH, generator=generator).to(path.device, dtype)
        loss = model(x).square().mean() * (float("inf") if step in spoilt else 1.0)
        (scaler.scale(loss) if scaler else loss).backward()
        assert all((param.grad is None) == released for param in model.parameters())
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()
    numbers = [optimizer.skipped, scaler.get_scale() if scaler else 1.0]
    return everything(optimizer, list(model.parameters())), numbers


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"granularity": "row", "nesterov": True},
        {"momentum": 0.0, "normalizer": "cdf"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "master_weights": "stochastic"},
        {"dtype": torch.float16},
        {"accumulation_steps": 4},
        {"accumulation_steps": 3, "scaled": True},
        {"spoilt": (2,)},
        {"spoilt": (2,), "scaled": True},
        {"spoilt": (0, 3), "scaled": True, "accumulation_steps": 2},
    ],
    ids=str,
)
def test_weights_are_those_without_release(how, path):
    plain, released = (train(path, released=on, **how) for on in (False, True))
    assert_bits(plain[0], released[0])
    assert plain[1] == released[1]


def peak(path, *, released):
    """Bytes that a backward pass and a step allocate at most, and those of the gradients."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    optimizer = BNGD(model.parameters(), fused=path.fused)
    if released:
        release_gradients(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            model(torch.randn(2, 256)).sum().backward()
            optimizer.step()
    now = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most, sum(param.nbytes for param in model.parameters())


def test_memory_falls_by_the_gradients(device):
    path = StepPath(False, device)
    if device.type != "cpu":
        pytest.skip("counts the CPU allocator's calls")
    (plain, gradients), (released, _) = (peak(path, released=on) for on in (False, True))
    # all but the one gradient that is alive
    assert plain - released >= gradients * 6 // 8, (plain, released, gradients)


def test_removing_ends_it(path):
    model, optimizer = make(path)
    handle = release_gradients(model, optimizer)
    with pytest.raises(RuntimeError, match="released already"):
        release_gradients(model, optimizer)
    handle.remove()
    before = values(list(model.parameters()))
    backward(model, path)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(param.grad is not None for param in model.parameters())
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    release_gradients(model, optimizer).remove()


def test_a_second_backward_is_refused(path):
    """Released gradients are not summed: it would be a step of its own."""
    model, optimizer = make(path)
    release_gradients(model, optimizer)
    backward(model, path)
    before = values(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"has moved since the last optimizer.step\(\)"):
        backward(model, path)
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_parameter_without_gradient_closes_its_window(path):
    """Its first micro-batch moves it with the others, although the second gives it nothing."""
    runs = []
    for released in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(path.device)
        optimizer = BNGD(model.parameters(), 1e-2, accumulation_steps=2, fused=path.fused)
        if released:
            release_gradients(model, optimizer)
        before = model[1].weight.detach().clone()
        x = torch.randn(4, 3, device=path.device)
        for part in (model, model[:1]):
            part(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(model[1].weight, before)
        runs.append(list(model.parameters()))
    assert_bits(*runs)


def test_what_cannot_be_served_is_refused(path, monkeypatch):
    for options, match in (
        ({"granularity": "global"}, "granularity='global', which needs all gradients"),
        ({"nonfinite": "raise"}, "nonfinite='raise', but other parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            release_gradients(*make(path, **options))
    model, optimizer = make(path)
    with pytest.raises(ValueError, match=r"\['params'\]\[2\] is not a parameter of the model"):
        release_gradients(model[0], optimizer)
    assert optimizer._release is None

    class DistributedDataParallel(nn.Sequential):
        """Stands in for torch's, which needs a process group."""

    match = "DistributedDataParallel writes the reduced gradient"
    with pytest.raises(RuntimeError, match=match):
        release_gradients(DistributedDataParallel(model), optimizer)
    with pytest.raises(TypeError, match=r"need a torch\.nn\.Module and a BNGD"):
        release_gradients(model, torch.optim.SGD(model.parameters(), 0.1))

    # who is wrapped later, or given without the wrapper, is refused in the first backward
    release_gradients(model, optimizer)
    wrapped = DistributedDataParallel(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with refused(RuntimeError, match, None, list(model.parameters())):
        backward(wrapped[0], path)


def test_a_scaler_that_is_not_known_is_refused(path):
    model, optimizer = make(path)
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler(path.device.type)
    scaler.scale(model(torch.ones(2, WIDTH, device=path.device)).sum()).backward()
    with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
        scaler.step(optimizer)


def test_options_are_checked_again_in_backward(path):
    model, optimizer = make(path)
    release_gradients(model, optimizer)
    optimizer.param_groups[0]["granularity"] = "global"
    with pytest.raises(ValueError, match="granularity='global'"):
        backward(model, path)

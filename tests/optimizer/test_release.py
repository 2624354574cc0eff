"""Gradient release: the same weights, without the gradients' memory."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bngd_triton import BNGD, release_gradients
from support.paths import StepPath

WIDTH = 12


class Run(NamedTuple):
    """What is left of a training run."""

    weights: list[Tensor]
    state: dict[int, Any]
    skipped: int
    scale: float | None


def make(path: StepPath, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 5)).to(path.device, dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return model, BNGD(model.parameters(), fused=path.fused, **options)


def train(
    path: StepPath, *, released: bool, dtype: torch.dtype = torch.float32, scaled: bool = False,
    spoilt: tuple[int, ...] = (), steps: int = 6, **options: Any,
) -> Run:  # fmt: skip
    model, optimizer = make(path, dtype, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    scaler = torch.amp.GradScaler(path.device.type, init_scale=1024.0) if scaled else None
    handle = release_gradients(model, optimizer, grad_scaler=scaler) if released else None
    for step in range(steps):
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
    weights = [param.detach() for param in model.parameters()]
    scale = scaler.get_scale() if scaler else None
    return Run(weights, optimizer.state_dict()["state"], optimizer.skipped, scale)


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
def test_weights_are_those_without_release(how: dict[str, Any], path: StepPath) -> None:
    plain, released = (train(path, released=on, **how) for on in (False, True))
    for a, b in zip(plain.weights, released.weights):
        assert torch.equal(a, b)
    for key, entry in plain.state.items():
        for name, value in entry.items():
            assert torch.equal(value, released.state[key][name]), name
    assert plain.skipped == released.skipped
    assert plain.scale == released.scale


def peak(path: StepPath, *, released: bool) -> tuple[int, int]:
    """Bytes that a backward pass and a step allocate at most, and those of the gradients."""
    layers = [nn.Linear(256, 256, bias=False) for _ in range(8)]
    model = nn.Sequential(*layers).to(path.device)
    optimizer = BNGD(model.parameters(), fused=path.fused)
    if released:
        release_gradients(model, optimizer)
    x = torch.randn(2, 256, device=path.device)
    for _ in range(2):
        optimizer.zero_grad()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            model(x).sum().backward()
            optimizer.step()
    now = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most, sum(param.nbytes for param in model.parameters())


def test_memory_falls_by_the_gradients(device: torch.device) -> None:
    path = StepPath(False, device)
    if device.type != "cpu":
        pytest.skip("counts the CPU allocator's calls")
    (plain, gradients), (released, _) = (peak(path, released=on) for on in (False, True))
    # all but the one gradient that is alive
    assert plain - released >= gradients * 6 // 8, (plain, released, gradients)


def test_removing_ends_it(path: StepPath) -> None:
    model, optimizer = make(path)
    handle = release_gradients(model, optimizer)
    with pytest.raises(RuntimeError, match="released already"):
        release_gradients(model, optimizer)
    handle.remove()
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.ones(2, WIDTH, device=path.device)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(param.grad is not None for param in model.parameters())
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    release_gradients(model, optimizer).remove()


def test_a_second_backward_is_refused(path: StepPath) -> None:
    """Released gradients are not summed: it would be a step of its own."""
    model, optimizer = make(path)
    release_gradients(model, optimizer)
    x = torch.ones(2, WIDTH, device=path.device)
    model(x).sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"has moved since the last optimizer.step\(\)"):
        model(x).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_parameter_without_gradient_closes_its_window(path: StepPath) -> None:
    """Its first micro-batch moves it with the others, although the second gives it nothing."""
    runs = []
    for released in (False, True):
        torch.manual_seed(1)
        model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).to(path.device)
        optimizer = BNGD(model.parameters(), 1e-2, accumulation_steps=2, fused=path.fused)
        if released:
            release_gradients(model, optimizer)
        before = model[1].weight.detach().clone()
        x = torch.randn(4, 3, device=path.device)
        for parts in (model, model[:1]):
            y = x
            for part in parts:
                y = part(y)
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(model[1].weight, before)
        runs.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_what_cannot_be_served_is_refused(path: StepPath, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make(path, granularity="global")
    with pytest.raises(ValueError, match="granularity='global', which needs all gradients"):
        release_gradients(model, optimizer)
    model, optimizer = make(path, nonfinite="raise")
    with pytest.raises(ValueError, match="nonfinite='raise', but other parameters"):
        release_gradients(model, optimizer)
    model, optimizer = make(path)
    with pytest.raises(ValueError, match=r"\['params'\]\[2\] is not a parameter of the model"):
        release_gradients(model[0], optimizer)
    assert optimizer._release is None

    class DistributedDataParallel(nn.Module):
        """Stands in for torch's, which needs a process group."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(RuntimeError, match="DistributedDataParallel writes the reduced gradient"):
        release_gradients(DistributedDataParallel(model), optimizer)
    with pytest.raises(TypeError, match=r"need a torch\.nn\.Module and a BNGD"):
        release_gradients(model, torch.optim.SGD(model.parameters(), 0.1))

    # who is wrapped later, or given without the wrapper, is refused in the first backward
    release_gradients(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    wrapped = DistributedDataParallel(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="DistributedDataParallel writes the reduced gradient"):
        wrapped.module(torch.ones(2, WIDTH, device=path.device)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_scaler_that_is_not_known_is_refused(path: StepPath) -> None:
    model, optimizer = make(path)
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler(path.device.type)
    scaler.scale(model(torch.ones(2, WIDTH, device=path.device)).sum()).backward()
    with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
        scaler.step(optimizer)


def test_options_are_checked_again_in_backward(path: StepPath) -> None:
    model, optimizer = make(path)
    release_gradients(model, optimizer)
    optimizer.param_groups[0]["granularity"] = "global"
    with pytest.raises(ValueError, match="granularity='global'"):
        model(torch.ones(2, WIDTH, device=path.device)).sum().backward()

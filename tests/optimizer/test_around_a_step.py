"""Hooks, the profiler, schedulers, copies and pickles: what others do with an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bngd_triton import BNGD
from bngd_triton.verify.oracle import oracle_step
from support.paths import StepPath
from support.steps import (
    COPIES,
    OPTION_NAMES,
    assert_close,
    assert_equal,
    make_grads,
    make_params,
    momenta,
    take_steps,
    values,
)


def test_step_hooks_run_around_the_step(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    start = values(params)
    calls: list[str] = []

    def note(name: str, moved: bool) -> Callable[..., None]:
        def hook(hooked: Any, args: Any, kwargs: Any) -> None:
            assert hooked is optimizer
            assert torch.equal(params[0], start[0]) is not moved
            calls.append(name)

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre", False)),
        optimizer.register_step_post_hook(note("post", True)),
        register_optimizer_step_pre_hook(note("global pre", False)),
        register_optimizer_step_post_hook(note("global post", True)),
    ]
    try:
        take_steps(optimizer, params, [0])
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"]
    take_steps(optimizer, params, [1])
    assert len(calls) == 4


def test_a_pre_hook_may_change_gradients_and_options(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    expected = values(params)

    def hook(hooked: Any, args: Any, kwargs: Any) -> None:
        hooked.param_groups[0]["lr"] = 0.3
        for param in params:
            param.grad = param.grad.flip(0) if param.dim() else param.grad

    optimizer.register_step_pre_hook(hook)
    take_steps(optimizer, params, [0])
    grads = [grad.flip(0) if grad.dim() else grad for grad in make_grads(params, 0)]
    assert_close(params, oracle_step(expected, grads, [None] * 3, lr=0.3)[0])


def test_the_profiler_sees_step_and_zero_grad(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_steps(optimizer, params, [0])
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#BNGD.step", "Optimizer.zero_grad#BNGD.zero_grad"} <= names


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor: bool, path: StepPath) -> None:
    params = make_params(path.device)
    expected, buffers = values(params), [None] * 3
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    optimizer = BNGD(params, lr=lr, weight_decay=0.1, fused=path.fused)
    scheduler = SCHEDULERS[name](optimizer)
    used = []
    for seed in range(5):
        group = optimizer.param_groups[0]
        used.append((float(group["lr"]), group["momentum"]))
        options = {"lr": used[-1][0], "momentum": used[-1][1], "weight_decay": 0.1}
        expected, buffers = oracle_step(expected, make_grads(params, seed), buffers, **options)
        take_steps(optimizer, params, [seed])
        if seed < 4:
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert_close(params, expected)
    assert len({lr for lr, _ in used}) >= 4
    assert (len({momentum for _, momentum in used}) > 1) == (name == "one_cycle")


@pytest.mark.parametrize("schedule", ["fixed", "in_place"])
def test_a_tensor_lr_equals_the_float_of_its_value(schedule: str, path: StepPath) -> None:
    rates = [0.1, 0.1, 0.1] if schedule == "fixed" else [0.1, 0.03, 0.0]
    lr = torch.tensor(rates[0])
    by_tensor, by_float = make_params(path.device), make_params(path.device)
    a = BNGD(by_tensor, lr=lr, weight_decay=0.3, fused=path.fused)
    b = BNGD(by_float, weight_decay=0.3, fused=path.fused)
    assert a.param_groups[0]["lr"] is lr
    for seed, rate in enumerate(rates):
        lr.fill_(rate)
        b.param_groups[0]["lr"] = lr.item()
        take_steps(a, by_tensor, [seed])
        take_steps(b, by_float, [seed])
        assert_equal(by_tensor, by_float)


@pytest.mark.parametrize(
    "lr", [np.float64(0.1), np.float32(0.125), np.int64(1), 1], ids=["f64", "f32", "i64", "int"]
)
def test_lr_may_be_any_real_number(lr: Any, path: StepPath) -> None:
    # LambdaLR with NumPy 2 makes a float32 of a float32 factor
    params = make_params(path.device)
    expected = values(params)
    optimizer = BNGD(params, fused=path.fused)
    optimizer.param_groups[0]["lr"] = lr
    take_steps(optimizer, params, [0])
    assert_close(params, oracle_step(expected, make_grads(params, 0), [None] * 3, lr=float(lr))[0])


@pytest.mark.parametrize("when", ["before_first_step", "after_two_steps"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_alike_and_apart(how: str, when: str, path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, granularity="row", fused=path.fused, flatten=False)
    seeds = [0, 1] if when == "after_two_steps" else []
    take_steps(optimizer, params, seeds)
    twin_params, twin = COPIES[how]((params, optimizer))
    assert (twin.fused, twin.flatten) == (path.fused, False)

    before = values(twin_params)
    take_steps(optimizer, params, [2, 3])
    assert_equal(twin_params, before)
    take_steps(twin, twin_params, [2, 3])
    assert_equal(twin_params, params)
    assert_equal(momenta(twin, twin_params), momenta(optimizer, params))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_optimizer_alone_holds_its_parameters(how: str, path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    twin = COPIES[how](optimizer)
    own = twin.param_groups[0]["params"]
    assert_equal(own, params)
    take_steps(twin, own, [1])
    take_steps(optimizer, params, [1])
    assert_equal(own, params)


@pytest.mark.parametrize("option", OPTION_NAMES)
def test_an_old_pickle_without_an_option_gets_its_default(option: str, path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    state = optimizer.__getstate__()
    state["defaults"] = {k: v for k, v in optimizer.defaults.items() if k != option}
    state["param_groups"] = [
        {k: v for k, v in group.items() if k != option} for group in optimizer.param_groups
    ]
    old = BNGD.__new__(BNGD)
    old.__setstate__(state)
    assert old.param_groups[0][option] == optimizer.defaults[option]
    take_steps(old, params, [0])
    same = make_params(path.device)
    take_steps(BNGD(same, fused=path.fused), same, [0])
    assert_equal(params, same)


def test_an_old_pickle_takes_new_groups_and_steps(path: StepPath) -> None:
    state = BNGD(make_params(path.device), fused=path.fused).__getstate__()
    del state["fused"], state["flatten"]
    del state["defaults"]["center_1d"], state["param_groups"][0]["center_1d"]
    old = BNGD.__new__(BNGD)
    old.__setstate__(state)
    assert (old.fused, old.flatten) == (None, None)
    old.add_param_group({"params": make_params(path.device)})
    assert old.param_groups[1]["center_1d"] is False
    take_steps(old, old.param_groups[0]["params"], [0])


def test_repr_shows_the_options(path: StepPath) -> None:
    text = repr(BNGD(make_params(path.device), fused=path.fused))
    assert text.startswith("BNGD (")
    assert "granularity: row" in text

"""What users of torch.optim rely on, on both paths, and every refusal."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from paths import StepPath
from snapshots import snapshot
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bngd_triton import BNGD
from bngd_triton.checkpoint import COUNTS
from bngd_triton.oracle import oracle_step

# parameters are below 4, where half a unit of float32 is 1.2e-7; a few steps of rounding
ATOL = 2e-6
OPTION_NAMES = (
    "lr", "momentum", "nesterov", "weight_decay", "eps", "granularity", "normalizer", "centering",
    "center_1d", "nonfinite", "maximize", "master_weights", "momentum_dtype", "accumulation_steps",
    "seed",
)  # fmt: skip


def make_params(device: torch.device) -> list[Parameter]:
    """A matrix, a vector and a scalar, the same at every call."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 3), (5,), ()]
    return [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def make_grads(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(param.shape, generator=generator).to(param.device, param.dtype) + 0.25
        for param in params
    ]


def set_grads(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    grads = make_grads(params, seed)
    for param, grad in zip(params, grads):
        param.grad = grad
    return grads


def take_steps(optimizer: BNGD, params: Sequence[Tensor], seeds: Iterable[int]) -> None:
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Bit for bit."""
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], atol: float = ATOL) -> None:
    for a, b in zip(got, want):
        torch.testing.assert_close(a.detach().cpu().double(), b, rtol=0, atol=atol)


def momenta(optimizer: BNGD, params: Sequence[Tensor]) -> list[Tensor]:
    return [optimizer.state[param]["momentum_buffer"] for param in params]


def test_closure_runs_with_grad_enabled_and_its_loss_is_returned(path: StepPath) -> None:
    params = make_params(path.device)
    before = values(params)
    optimizer = BNGD(params, fused=path.fused)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True]
    assert loss.item() == pytest.approx(float(sum(p.square().sum() for p in before)))
    grads = [2 * value for value in before]
    assert_close(params, oracle_step(before, grads, [None] * 3)[0])


def test_step_without_closure_returns_none(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    set_grads(params, 0)
    assert optimizer.step() is None


def test_none_gradients_leave_parameter_momentum_and_state_alone(path: StepPath) -> None:
    params = make_params(path.device)
    # decay would show that a parameter without a gradient was moved
    optimizer = BNGD(params, lr=0.1, weight_decay=0.5, fused=path.fused)
    set_grads(params, 0)
    params[1].grad = None
    first = values(params)
    optimizer.step()
    assert_equal([params[1]], [first[1]])
    assert params[1] not in optimizer.state
    assert not torch.equal(params[0], first[0])

    take_steps(optimizer, params, [1])
    then, buffer = values(params), optimizer.state[params[1]]["momentum_buffer"].clone()
    params[1].grad = None
    optimizer.step()
    assert_equal([params[1], optimizer.state[params[1]]["momentum_buffer"]], [then[1], buffer])


def test_step_without_any_gradient_does_nothing(path: StepPath) -> None:
    params = make_params(path.device)
    before = values(params)
    optimizer = BNGD(params, weight_decay=0.5, fused=path.fused)
    optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_late_first_gradient_starts_as_in_a_new_optimizer(
    granularity: str, path: StepPath
) -> None:
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity, "fused": path.fused}
    params = make_params(path.device)
    optimizer = BNGD(params, **options)
    for seed in range(4):
        set_grads(params, seed)
        if seed < 2:
            params[0].grad = None
        optimizer.step()

    late = make_params(path.device)[:1]
    fresh = BNGD(late, **options)
    for seed in (2, 3):
        late[0].grad = make_grads(params, seed)[0]
        fresh.step()
    assert_equal(params[:1], late)
    assert_equal(momenta(optimizer, params[:1]), momenta(fresh, late))


def test_zero_grad_to_none(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    before = values(params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    optimizer.step()
    assert_equal(params, before)


def test_zero_grad_to_zeros_leaves_the_momentum_to_act(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    before, buffers = values(params), values(momenta(optimizer, params))
    addresses = [param.grad.data_ptr() for param in params]
    optimizer.zero_grad(set_to_none=False)
    assert [param.grad.data_ptr() for param in params] == addresses
    optimizer.step()
    # the default momentum is 0.9
    assert_close(params, [p.cpu().double() - 0.1 * 0.9 * m for p, m in zip(before, buffers)])


def test_gradients_are_read_only(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, maximize=True, fused=path.fused)
    grads = values(set_grads(params, 0))
    optimizer.step()
    assert_equal([param.grad for param in params], grads)


def test_autograd_notices_the_step(path: StepPath) -> None:
    (param, *_) = make_params(path.device)
    optimizer = BNGD([param], fused=path.fused)
    loss = param.square().sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_stay_leaves_that_require_grad(path: StepPath) -> None:
    params = make_params(path.device)
    ids = [id(param) for param in params]
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    assert all(param.is_leaf and param.requires_grad for param in params)
    assert [id(param) for group in optimizer.param_groups for param in group["params"]] == ids


def test_automatic_path_on_the_cpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("kernels were used")

    monkeypatch.setattr("bngd_triton.stepper.FusedStep", refuse)
    params = make_params(torch.device("cpu"))
    addresses = [param.data_ptr() for param in params]
    optimizer = BNGD(params)
    take_steps(optimizer, params, [0])
    # nothing is flattened for the reference
    assert [param.data_ptr() for param in params] == addresses


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
def test_empty_parameters(shape: tuple[int, ...], granularity: str, path: StepPath) -> None:
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity, "fused": path.fused}
    params = make_params(path.device)
    empty = Parameter(torch.empty(shape, device=path.device))
    optimizer = BNGD([params[0], empty, *params[1:]], **options)
    empty.grad = torch.empty_like(empty)
    take_steps(optimizer, params, [0, 1])
    assert empty.shape == shape

    without = make_params(path.device)
    take_steps(BNGD(without, **options), without, [0, 1])
    assert_equal(params, without)
    BNGD(params[:1], **options).load_state_dict(BNGD([empty], **options).state_dict())


def test_only_empty_parameters(path: StepPath) -> None:
    empty = Parameter(torch.empty(0, 3, device=path.device))
    optimizer = BNGD([empty], fused=path.fused)
    empty.grad = torch.empty_like(empty)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_scalar_parameter_moves_by_the_sign_of_its_gradient(
    granularity: str, path: StepPath
) -> None:
    param = Parameter(torch.tensor(2.0, device=path.device))
    options: dict[str, Any] = {"eps": 0.0, "momentum": 0.0, "center_1d": True}
    optimizer = BNGD([param], lr=0.5, granularity=granularity, fused=path.fused, **options)
    for gradient, expected in ((1e-30, 1.5), (-7.0, 2.0), (0.0, 2.0)):
        param.grad = torch.tensor(gradient, device=path.device)
        optimizer.step()
        assert param.item() == expected
    assert param.shape == ()


GROUPS: list[dict[str, Any]] = [
    {"lr": 0.2},
    {"momentum": 0.0},
    {"momentum": 0.5, "nesterov": True},
    {"weight_decay": 0.3, "eps": 1e-2},
    {"granularity": "row"},
    {"granularity": "global"},
    {"granularity": "global", "lr": 0.3},
    {"normalizer": "cdf"},
    {"centering": 0.5, "center_1d": True},
    {"centering": 0.0},
    {"maximize": True},
    {"nonfinite": "propagate"},
]


def test_every_group_steps_with_its_own_options(path: StepPath) -> None:
    together = [make_params(path.device) for _ in GROUPS]
    optimizer = BNGD(
        [{"params": params, **options} for params, options in zip(together, GROUPS)],
        lr=0.1,
        fused=path.fused,
    )
    starts = [values(params) for params in together]
    for seed in range(2):
        for index, params in enumerate(together):
            set_grads(params, 100 * index + seed)
        optimizer.step()

    for index, (params, options) in enumerate(zip(together, GROUPS)):
        expected, buffers = starts[index], [None] * 3
        for seed in range(2):
            grads = make_grads(params, 100 * index + seed)
            expected, buffers = oracle_step(expected, grads, buffers, **{"lr": 0.1, **options})
        assert_close(params, expected)
        assert ("momentum_buffer" in optimizer.state[params[0]]) == (options.get("momentum") != 0)


@pytest.mark.parametrize("index", range(len(GROUPS)), ids=[str(group) for group in GROUPS])
def test_a_group_does_not_feel_the_others(index: int, path: StepPath) -> None:
    options, neighbour = GROUPS[index], GROUPS[index - 1]
    joint, others, alone = (make_params(path.device) for _ in range(3))
    groups = [{"params": others, **neighbour}, {"params": joint, **options}]
    optimizer = BNGD(groups, lr=0.1, fused=path.fused)
    single = BNGD([{"params": alone, **options}], lr=0.1, fused=path.fused)
    for seed in range(2):
        set_grads(others, 50 + seed)
        take_steps(optimizer, joint, [seed])
        take_steps(single, alone, [seed])
    assert_equal(joint, alone)


class Change(NamedTuple):
    before: dict[str, Any]
    after: dict[str, Any]


CHANGES = [
    Change({"lr": 0.1}, {"lr": 0.02}),
    Change({"lr": 0.1}, {"lr": 0.0}),
    Change({"lr": torch.tensor(0.1)}, {"lr": 0.02}),
    Change({"lr": torch.tensor(0.1)}, {"lr": 0.0}),
    Change({"lr": 0.1}, {"lr": torch.tensor(0.02)}),
    Change({"momentum": 0.9}, {"momentum": 0.5}),
    Change({"momentum": 0.0}, {"momentum": 0.9}),
    Change({"nesterov": False}, {"nesterov": True}),
    Change({"weight_decay": 0.0}, {"weight_decay": 0.5}),
    Change({"weight_decay": 0.5, "lr": torch.tensor(0.1)}, {"weight_decay": 0.0}),
    Change({"eps": 0.0}, {"eps": 0.5}),
    Change({"granularity": "tensor"}, {"granularity": "row"}),
    Change({"granularity": "row"}, {"granularity": "global"}),
    Change({"granularity": "global"}, {"granularity": "tensor"}),
    Change({"normalizer": "zscore"}, {"normalizer": "cdf"}),
    Change({"centering": 0.0}, {"centering": 1.0}),
    Change({"centering": 1.0}, {"centering": 0.0}),
    Change({"center_1d": False}, {"center_1d": True}),
    Change({"maximize": False}, {"maximize": True}),
    Change({"nonfinite": "raise"}, {"nonfinite": "skip"}),
]


@pytest.mark.parametrize("change", CHANGES, ids=[f"{a}_to_{b}" for a, b in CHANGES])
def test_an_option_changed_between_steps_takes_effect(change: Change, path: StepPath) -> None:
    base = {"lr": 0.1, **copy.deepcopy(change.before)}
    params = make_params(path.device)
    expected, buffers = values(params), [None] * 3
    optimizer = BNGD(params, fused=path.fused, **base)
    for seed in range(4):
        if seed == 2:
            base |= change.after
            optimizer.param_groups[0].update(change.after)
        expected, buffers = oracle_step(expected, make_grads(params, seed), buffers, **base)
        take_steps(optimizer, params, [seed])
    assert_close(params, expected)


def test_momentum_set_to_0_and_back_keeps_its_buffer(path: StepPath) -> None:
    params = make_params(path.device)
    expected, buffers = values(params), [None] * 3
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    for seed, momentum in enumerate((0.9, 0.0, 0.0, 0.9)):
        optimizer.param_groups[0]["momentum"] = momentum
        kept = values(momenta(optimizer, params)) if seed else []
        grads = make_grads(params, seed)
        expected, buffers = oracle_step(expected, grads, buffers, lr=0.1, momentum=momentum)
        take_steps(optimizer, params, [seed])
        if momentum == 0:
            assert_equal(momenta(optimizer, params), kept)
    assert_close(params, expected)


def test_without_momentum_there_is_no_state(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, momentum=0.0, fused=path.fused)
    take_steps(optimizer, params, [0, 1])
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_state_is_float32_momentum_and_a_master(dtype: torch.dtype, path: StepPath) -> None:
    masters = {torch.float16: ["master"], torch.bfloat16: ["master_remainder"], torch.float32: []}
    params = [Parameter(param.detach().to(dtype)) for param in make_params(path.device)]
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    for param in params:
        assert list(optimizer.state[param]) == ["momentum_buffer", *masters[dtype]]
        buffer = optimizer.state[param]["momentum_buffer"]
        assert (buffer.dtype, buffer.shape) == (torch.float32, param.shape)
        assert not buffer.requires_grad


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row", "normalizer": "cdf"}, {"granularity": "global", "nesterov": True}],
    ids=str,
)
def test_maximize_equals_negated_gradients_bit_for_bit(
    options: dict[str, Any], path: StepPath
) -> None:
    up, down = make_params(path.device), make_params(path.device)
    climb = BNGD(up, lr=0.1, maximize=True, fused=path.fused, **options)
    fall = BNGD(down, lr=0.1, fused=path.fused, **options)
    for seed in range(3):
        set_grads(up, seed)
        for param, grad in zip(down, make_grads(down, seed)):
            param.grad = -grad
        climb.step()
        fall.step()
    assert_equal(up, down)


def test_named_parameters_are_kept_and_named_in_errors(path: StepPath) -> None:
    model = torch.nn.Linear(3, 2).to(path.device)
    optimizer = BNGD(model.named_parameters(), nonfinite="raise", fused=path.fused)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    model.bias.grad[1] = math.inf
    with pytest.raises(FloatingPointError, match=r"gradient of bias has"):
        optimizer.step()


def test_unnamed_parameters_are_named_by_their_place(path: StepPath) -> None:
    params = make_params(path.device)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = BNGD(groups, nonfinite="raise", fused=path.fused)
    set_grads(params, 0)
    params[2].grad.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"param_groups\[1\]\['params'\]\[1\]"):
        optimizer.step()


def test_add_param_group_takes_defaults_and_steps(path: StepPath) -> None:
    params, more = make_params(path.device), make_params(path.device)
    optimizer = BNGD(params, lr=0.1, granularity="row", fused=path.fused)
    take_steps(optimizer, params, [0])
    first, second = values(params), values(more)
    buffers = values(momenta(optimizer, params))
    optimizer.add_param_group({"params": more, "momentum": 0.5})
    added = {key: value for key, value in optimizer.param_groups[1].items() if key != "params"}
    kept = {key: optimizer.param_groups[0][key] for key in (*OPTION_NAMES, *COUNTS)}
    assert added == {**kept, "momentum": 0.5}

    set_grads(more, 7)
    take_steps(optimizer, params, [1])
    options = {"lr": 0.1, "granularity": "row"}
    assert_close(params, oracle_step(first, make_grads(first, 1), buffers, **options)[0])
    grads = make_grads(second, 7)
    assert_close(more, oracle_step(second, grads, [None] * 3, momentum=0.5, **options)[0])


def test_unknown_group_keys_survive(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD([{"params": params, "tag": "head", "initial_lr": 0.5}], fused=path.fused)
    take_steps(optimizer, params, [0])
    for group in (
        optimizer.param_groups[0],
        optimizer.state_dict()["param_groups"][0],
        copy.deepcopy(optimizer).param_groups[0],
    ):
        assert (group["tag"], group["initial_lr"]) == ("head", 0.5)
    other = BNGD(make_params(path.device), fused=path.fused)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["tag"] == "head"


def test_fused_and_flatten_are_attributes_only(path: StepPath) -> None:
    optimizer = BNGD(make_params(path.device), fused=path.fused, flatten=False)
    assert (optimizer.fused, optimizer.flatten) == (path.fused, False)
    (group,) = optimizer.param_groups
    (saved,) = optimizer.state_dict()["param_groups"]
    assert set(group) == set(saved) == {"params", *OPTION_NAMES, *COUNTS}
    assert set(optimizer.defaults) == set(OPTION_NAMES)


def test_article_is_centred_without_momentum(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD.article(params, lr=0.1)
    expected = values(params)
    take_steps(optimizer, params, [0])
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "center_1d": True, "eps": 1e-8}
    assert_close(params, oracle_step(expected, make_grads(params, 0), [None] * 3, **options)[0])
    assert {key: optimizer.param_groups[0][key] for key in options} == options


# the interpreter computes with NaN in NumPy
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_skipped_slices_are_counted(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, granularity="row", weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    assert optimizer.skipped == 0
    before = values([*params, *momenta(optimizer, params)])
    set_grads(params, 1)
    params[0].grad[1, 2] = math.nan
    params[0].grad[3, 0] = -math.inf
    params[1].grad[0] = math.inf
    optimizer.step()
    assert optimizer.skipped == 3
    after = [*params, *momenta(optimizer, params)]
    for index in (0, 3):
        assert_equal([after[index][[1, 3]]], [before[index][[1, 3]]])
        assert (after[index][[0, 2]] != before[index][[0, 2]]).all()
    assert_equal([after[1], after[4]], [before[1], before[4]])
    assert after[2] != before[2]


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


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


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


def test_an_old_pickle_without_an_option_takes_new_groups(path: StepPath) -> None:
    state = BNGD(make_params(path.device), fused=path.fused).__getstate__()
    del state["defaults"]["center_1d"], state["param_groups"][0]["center_1d"]
    old = BNGD.__new__(BNGD)
    old.__setstate__(state)
    old.add_param_group({"params": make_params(path.device)})
    assert old.param_groups[1]["center_1d"] is False


def test_an_old_pickle_without_fused_and_flatten_gets_none(path: StepPath) -> None:
    state = BNGD(make_params(path.device), fused=path.fused).__getstate__()
    del state["fused"], state["flatten"]
    old = BNGD.__new__(BNGD)
    old.__setstate__(state)
    assert (old.fused, old.flatten) == (None, None)
    take_steps(old, old.param_groups[0]["params"], [0])


def test_repr_shows_the_options(path: StepPath) -> None:
    text = repr(BNGD(make_params(path.device), fused=path.fused))
    assert text.startswith("BNGD (")
    assert "granularity: tensor" in text


def test_a_swapped_storage_is_noticed(path: StepPath) -> None:
    swapped, kept = make_params(path.device), make_params(path.device)
    a, b = (BNGD(p, lr=0.1, fused=path.fused) for p in (swapped, kept))
    take_steps(a, swapped, [0])
    take_steps(b, kept, [0])
    old = [param.data for param in swapped]
    for param in swapped:
        param.data = param.data.clone()
    frozen = values(old)
    take_steps(a, swapped, [1])
    take_steps(b, kept, [1])
    assert_equal(swapped, kept)
    assert_equal(old, frozen)


def test_new_values_assigned_to_data_are_used(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    fresh, buffers = [torch.randn_like(p) for p in params], values(momenta(optimizer, params))
    for param, value in zip(params, fresh):
        param.data = value.clone()
    take_steps(optimizer, params, [1])
    assert_close(params, oracle_step(fresh, make_grads(fresh, 1), buffers, lr=0.1)[0])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_other_strides_at_the_same_address_are_noticed(granularity: str, path: StepPath) -> None:
    # square, so that the transposed view has the same shape, address and entries
    param = Parameter(torch.randn(6, 6, device=path.device))
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity}
    optimizer = BNGD([param], fused=path.fused, **options)
    expected, buffers = values([param]), [None]
    for seed in range(3):
        if seed == 1:
            param.grad = None
            param.data = param.data.t()
            expected = [expected[0].t()]
        grads = make_grads([param], seed)
        expected, buffers = oracle_step(expected, grads, buffers, **options)
        param.grad = grads[0]
        optimizer.step()
    assert_close([param, *momenta(optimizer, [param])], [*expected, *buffers])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_gradient_of_other_strides_at_the_same_address_is_noticed(
    granularity: str, path: StepPath
) -> None:
    (param,) = (Parameter(torch.randn(6, 6, device=path.device)),)
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity}
    optimizer = BNGD([param], fused=path.fused, **options)
    expected, buffers = values([param]), [None]
    memory = torch.randn(6, 6, device=path.device)
    for view in (memory, memory.t(), memory):
        param.grad = view
        expected, buffers = oracle_step(expected, [view], buffers, **options)
        optimizer.step()
    assert_close([param], expected)


def test_gradients_that_change_memory_in_every_step(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    expected, buffers, kept = values(params), [None] * 3, []
    shifts = [lambda g: g.clone(), lambda g: g.t().clone().t() if g.dim() == 2 else g.clone()]
    shifts.append(lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape))
    for seed, shift in enumerate([*shifts, *shifts]):
        grads = [shift(grad) for grad in make_grads(params, seed)]
        # kept alive, so that no address is used twice
        kept += grads
        for param, grad in zip(params, grads):
            param.grad = grad
        expected, buffers = oracle_step(expected, grads, buffers, lr=0.1)
        optimizer.step()
    assert_close(params, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gradient_of_another_dtype_is_noticed(dtype: torch.dtype, path: StepPath) -> None:
    params = make_params(path.device)
    # the kernels do not read float64: those gradients need the choice left open
    fused = None if dtype == torch.float64 else path.fused
    optimizer = BNGD(params, lr=0.1, fused=fused)
    expected, buffers = values(params), [None] * 3
    for seed in range(3):
        grads = make_grads(params, seed)
        if seed == 1:
            grads = [grad.to(dtype) for grad in grads]
        for param, grad in zip(params, grads):
            param.grad = grad.to(param.dtype)
            param.grad.data = grad
        expected, buffers = oracle_step(expected, grads, buffers, lr=0.1)
        optimizer.step()
    assert_close(params, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_cast_to_another_dtype_steps_on(dtype: torch.dtype, path: StepPath) -> None:
    model = torch.nn.Linear(5, 4).to(path.device)
    params = list(model.parameters())
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    model.to(dtype)
    start, buffers = values(params), values(momenta(optimizer, params))
    grads = make_grads(params, 1)
    take_steps(optimizer, params, [1])
    expected, moved = oracle_step(start, grads, buffers, lr=0.1)
    # one unit of the storage type for values below 1: a GPU rounds, the interpreter truncates
    assert_close(params, expected, atol=torch.finfo(dtype).eps)
    assert_close(momenta(optimizer, params), moved)
    assert all(buffer.dtype == torch.float32 for buffer in momenta(optimizer, params))


def test_a_gradient_wider_than_the_kernels_is_refused_by_name(device: torch.device) -> None:
    param = Parameter(torch.ones(3, device=device))
    optimizer = BNGD([("bias", param)], lr=0.1, fused=True)
    param.grad = torch.ones_like(param)
    param.grad.data = param.grad.double()
    with pytest.raises(RuntimeError, match=r"fused=True cannot serve bias .* got torch.float64"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    assert not optimizer.state


def test_momentum_wider_than_the_kernels_is_served(device: torch.device) -> None:
    # a float64 model trained eagerly, then cast: its momentum stays float64
    model = torch.nn.Linear(5, 4).to(device, torch.float64)
    params = list(model.parameters())
    optimizer = BNGD(params, lr=0.1)
    take_steps(optimizer, params, [0])
    model.float()
    start, buffers = values(params), values(momenta(optimizer, params))
    optimizer.fused = True
    with pytest.raises(RuntimeError, match="fused=True cannot serve"):
        take_steps(optimizer, params, [1])
    optimizer.fused = None
    take_steps(optimizer, params, [1])
    assert_close(params, oracle_step(start, make_grads(start, 1), buffers, lr=0.1)[0])


def test_duplicate_parameters_are_refused(path: StepPath) -> None:
    param = Parameter(torch.ones(3, device=path.device))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        BNGD([param, param], fused=path.fused)


def test_parameters_that_overlap_themselves_are_refused(path: StepPath) -> None:
    memory = torch.zeros(6, device=path.device)
    for view in (memory.as_strided((3, 3), (1, 1)), memory[:1].expand(4)):
        with pytest.raises(ValueError, match="overlaps itself in memory"):
            BNGD([view], fused=path.fused)


def test_flatten_true_is_an_error_where_the_kernels_do_not_serve() -> None:
    with pytest.raises(RuntimeError, match=r"flatten=True cannot move .* do not serve it"):
        BNGD([torch.zeros(3)], flatten=True, fused=False)


class BadOption(NamedTuple):
    options: dict[str, Any]
    error: type[Exception]
    match: str


NAN, INF = math.nan, math.inf
BAD_OPTIONS = [
    BadOption({"lr": -1.0}, ValueError, r"lr must be >= 0.*, got -1\.0"),
    BadOption({"lr": NAN}, ValueError, r"lr must be >= 0 and finite, got nan"),
    BadOption({"lr": INF}, ValueError, r"lr must be >= 0 and finite, got inf"),
    BadOption({"maximize": "no"}, TypeError, r"maximize must be True or False, got 'no'"),
    BadOption({"nesterov": None}, TypeError, "nesterov must be True or False, got None"),
    BadOption({"center_1d": 2}, TypeError, "center_1d must be True or False, got 2"),
    BadOption({"lr": True}, TypeError, r"lr must be a number, got True"),
    BadOption({"lr": "0.1"}, TypeError, r"lr must be a number, got '0\.1'"),
    BadOption({"lr": None}, TypeError, r"lr must be a number, got None"),
    BadOption({"lr": 1j}, TypeError, r"lr must be a number, got 1j"),
    BadOption({"lr": torch.tensor([0.1])}, ValueError, r"lr must be .* 0-dim .* shape \(1,\)"),
    BadOption({"lr": torch.tensor(1)}, ValueError, r"lr must be .* floating .*torch\.int64"),
    BadOption({"lr": torch.tensor(-0.5)}, ValueError, r"lr must be >= 0.*, got -0\.5"),
    BadOption({"lr": torch.tensor(NAN)}, ValueError, r"lr must be >= 0.*, got nan"),
    BadOption({"momentum": -0.1}, ValueError, r"momentum must be >= 0 and < 1, got -0\.1"),
    BadOption({"momentum": 1.0}, ValueError, r"momentum must be >= 0 and < 1, got 1\.0"),
    BadOption({"momentum": NAN}, ValueError, r"momentum must be >= 0 and < 1, got nan"),
    BadOption({"momentum": INF}, ValueError, r"momentum must be >= 0 and < 1, got inf"),
    BadOption({"momentum": False}, TypeError, r"momentum must be a number, got False"),
    BadOption({"momentum": (0.9, 0.99)}, TypeError, r"momentum must be a number, got \(0\.9"),
    BadOption({"weight_decay": -0.1}, ValueError, r"weight_decay must be >= 0.*, got -0\.1"),
    BadOption({"weight_decay": NAN}, ValueError, r"weight_decay must be >= 0.*, got nan"),
    BadOption({"weight_decay": INF}, ValueError, r"weight_decay must be >= 0.*, got inf"),
    BadOption({"weight_decay": "0"}, TypeError, r"weight_decay must be a number, got '0'"),
    BadOption({"eps": -1e-8}, ValueError, r"eps must be >= 0.*, got -1e-08"),
    BadOption({"eps": NAN}, ValueError, r"eps must be >= 0.*, got nan"),
    BadOption({"eps": INF}, ValueError, r"eps must be >= 0.*, got inf"),
    BadOption({"eps": None}, TypeError, r"eps must be a number, got None"),
    BadOption({"centering": -0.1}, ValueError, r"centering must be >= 0 and <= 1, got -0\.1"),
    BadOption({"centering": 1.1}, ValueError, r"centering must be >= 0 and <= 1, got 1\.1"),
    BadOption({"centering": NAN}, ValueError, r"centering must be >= 0 and <= 1, got nan"),
    BadOption({"centering": True}, TypeError, r"centering must be a number, got True"),
    BadOption(
        {"granularity": "column"},
        ValueError,
        r"granularity must be one of 'tensor', 'row', 'global', got 'column'",
    ),
    BadOption(
        {"normalizer": "minmax"},
        ValueError,
        r"normalizer must be one of 'zscore', 'cdf', got 'minmax'",
    ),
    BadOption(
        {"nonfinite": "ignore"},
        ValueError,
        r"nonfinite must be one of 'skip', 'propagate', 'raise', got 'ignore'",
    ),
    BadOption(
        {"nesterov": True, "momentum": 0.0}, ValueError, r"nesterov needs momentum > 0, got .*0\.0"
    ),
]
bad_options = pytest.mark.parametrize(
    "bad",
    BAD_OPTIONS,
    ids=[", ".join(f"{k}={v}" for k, v in b.options.items()) for b in BAD_OPTIONS],
)


@bad_options
@pytest.mark.parametrize("where", ["defaults", "group"])
def test_constructor_refuses_option(bad: BadOption, where: str, path: StepPath) -> None:
    params = make_params(path.device)
    before = snapshot(None, params)
    defaults = bad.options if where == "defaults" else {}
    group = bad.options if where == "group" else {}
    with pytest.raises(bad.error, match=bad.match):
        BNGD([{"params": params, **group}], fused=path.fused, **defaults)
    assert snapshot(None, params) == before


@bad_options
def test_add_param_group_refuses_option(bad: BadOption, path: StepPath) -> None:
    params, more = make_params(path.device), make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    before = snapshot(optimizer, [*params, *more])
    with pytest.raises(bad.error, match=bad.match):
        optimizer.add_param_group({"params": more, **bad.options})
    assert snapshot(optimizer, [*params, *more]) == before
    # and the parameters may still be added
    optimizer.add_param_group({"params": more})


@bad_options
@pytest.mark.parametrize("steps", [0, 1], ids=["first_step", "second_step"])
def test_step_refuses_option_changed_since(bad: BadOption, steps: int, path: StepPath) -> None:
    params, more = make_params(path.device), make_params(path.device)
    optimizer = BNGD([{"params": params}, {"params": more}], fused=path.fused)
    take_steps(optimizer, [*params, *more], range(steps))
    set_grads([*params, *more], 9)
    # the last group is the bad one: the first must not have moved either
    optimizer.param_groups[1].update(bad.options)
    before = snapshot(optimizer, [*params, *more])
    with pytest.raises(bad.error, match=bad.match):
        optimizer.step()
    assert str(snapshot(optimizer, [*params, *more])) == str(before)


@pytest.mark.parametrize("name", ["fused", "flatten"])
@pytest.mark.parametrize("value", ["auto", 2, 0.5], ids=repr)
def test_constructor_refuses_switch(name: str, value: Any, device: torch.device) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be None, True or False, got {value!r}"):
        BNGD(make_params(device), **{name: value})


def test_a_refused_constructor_moves_no_storage(device: torch.device) -> None:
    params, more = make_params(device), make_params(device)
    before = snapshot(None, [*params, *more])
    with pytest.raises(ValueError, match="lr must be"):
        BNGD([{"params": params}, {"params": more, "lr": -1.0}], fused=True)
    assert snapshot(None, [*params, *more]) == before


def no_grad(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)


class BadParameter(NamedTuple):
    desc: str
    make: Callable[[], Tensor]
    error: type[Exception]
    match: str
    # refused by the kernels only; the reference serves it
    fused_only: bool = False


FLOAT8 = "torch.float8_e4m3fn"
BAD_PARAMETERS = [
    BadParameter(
        "integer", lambda: no_grad(torch.ones(3).long()), TypeError, r"has dtype torch\.int64"
    ),
    BadParameter("bool", lambda: no_grad(torch.ones(3).bool()), TypeError, r"dtype torch\.bool"),
    BadParameter(
        "float8",
        lambda: no_grad(torch.ones(3).to(torch.float8_e4m3fn)),
        TypeError,
        r"dtype torch\.float8_e4m3fn; BNGD takes float16, bfloat16, float32, float64",
    ),
    BadParameter(
        "complex",
        lambda: Parameter(torch.ones(3, dtype=torch.complex64)),
        TypeError,
        r"dtype torch\.complex64.*view_as_real",
    ),
    BadParameter(
        "sparse",
        lambda: no_grad(torch.eye(3).to_sparse()),
        TypeError,
        r"is torch\.sparse_coo; BNGD needs dense",
    ),
    BadParameter(
        "float64_fused",
        lambda: Parameter(torch.ones(3, dtype=torch.float64)),
        RuntimeError,
        r"fused=True cannot serve {name}: .*float16, bfloat16, float32, got torch\.float64; use",
        fused_only=True,
    ),
    BadParameter(
        "meta_fused",
        lambda: Parameter(torch.ones(3, device="meta")),
        RuntimeError,
        r"fused=True cannot serve {name}: .*meta",
        fused_only=True,
    ),
]


@pytest.mark.parametrize("way", ["constructor", "named", "add_param_group"])
@pytest.mark.parametrize("bad", BAD_PARAMETERS, ids=[bad.desc for bad in BAD_PARAMETERS])
def test_refuses_parameter(bad: BadParameter, way: str, path: StepPath) -> None:
    if bad.fused_only and not path.fused:
        BNGD([bad.make()], fused=path.fused)
        return
    params, more = make_params(path.device), make_params(path.device)
    offender = bad.make()
    index = {"constructor": 0, "named": 0, "add_param_group": 1}[way]
    name = "odd one" if way == "named" else rf"param_groups\[{index}\]\['params'\]\[3\]"
    match = bad.match.format(name=name) if "{name}" in bad.match else rf"^{name} .*{bad.match}"
    if way == "add_param_group":
        optimizer = BNGD(params, fused=path.fused)
        take_steps(optimizer, params, [0])
        before = snapshot(optimizer, [*params, *more])
        with pytest.raises(bad.error, match=match):
            optimizer.add_param_group({"params": [*more, offender]})
        assert snapshot(optimizer, [*params, *more]) == before
        take_steps(optimizer, params, [1])
        return
    before = snapshot(None, params)
    given: list[Any] = [*params, offender]
    if way == "named":
        given = list(zip(["a", "b", "c", "odd one"], given))
    with pytest.raises(bad.error, match=match):
        BNGD(given, fused=path.fused)
    assert snapshot(None, params) == before


def test_add_param_group_refuses_known_parameters(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params[:2], fused=path.fused)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[1:]})
    assert snapshot(optimizer, params) == before


@pytest.mark.parametrize("way", ["constructor", "step"])
def test_global_granularity_refuses_two_devices(way: str, device: torch.device) -> None:
    params = [*make_params(device), Parameter(torch.ones(3, device="meta"))]
    before = snapshot(None, params)
    match = rf"granularity='global' needs .* one device, got {device.type}.*meta"
    if way == "constructor":
        with pytest.raises(ValueError, match=match):
            BNGD(params, granularity="global")
        assert snapshot(None, params) == before
        return
    optimizer = BNGD(params)
    optimizer.param_groups[0]["granularity"] = "global"
    set_grads(params, 0)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert snapshot(optimizer, params) == before


class BadStep(NamedTuple):
    desc: str
    # what happens to the second group's matrix, whose gradient is set
    spoil: Callable[[Parameter, BNGD], None]
    error: type[Exception]
    match: str
    # refused by the kernels only; the reference serves it
    fused_only: bool = False
    # the case needs momentum to be there
    later: bool = False


def sparse_gradient(param: Parameter, _: BNGD) -> None:
    param.grad = torch.ones_like(param).to_sparse()


def complex_gradient(param: Parameter, _: BNGD) -> None:
    param.grad.data = torch.ones_like(param, dtype=torch.complex64)


def integer_gradient(param: Parameter, _: BNGD) -> None:
    param.grad.data = torch.ones_like(param, dtype=torch.int32)


def gradient_of_another_shape(param: Parameter, _: BNGD) -> None:
    param.grad.data = torch.ones(3, 4, device=param.device)


def parameter_of_another_shape(param: Parameter, _: BNGD) -> None:
    param.data = torch.ones(2, 3, device=param.device)


def momentum_of_another_shape(param: Parameter, _: BNGD) -> None:
    param.data = torch.ones(2, 3, device=param.device)
    param.grad = torch.ones_like(param)


def integer_momentum(param: Parameter, optimizer: BNGD) -> None:
    optimizer.state[param]["momentum_buffer"] = torch.ones_like(param, dtype=torch.int64)


def expanded_parameter(param: Parameter, _: BNGD) -> None:
    param.data = torch.ones(1, 3, device=param.device).expand(4, 3)


def integer_parameter(param: Parameter, _: BNGD) -> None:
    param.requires_grad_(False)
    param.data = param.data.long()


def wide_parameter(param: Parameter, _: BNGD) -> None:
    param.data = param.data.double()
    param.grad = torch.ones_like(param)


def nonfinite_gradient(value: float) -> Callable[[Parameter, BNGD], None]:
    def spoil(param: Parameter, optimizer: BNGD) -> None:
        optimizer.param_groups[1]["nonfinite"] = "raise"
        param.grad[2, 1] = value

    return spoil


BAD_STEPS = [
    BadStep(
        "sparse_gradient", sparse_gradient, TypeError, r"gradient of {name} is torch\.sparse_coo"
    ),
    BadStep("complex_gradient", complex_gradient, TypeError, r"gradient of {name} has .*complex64"),
    BadStep("integer_gradient", integer_gradient, TypeError, r"gradient of {name} has .*int32"),
    BadStep(
        "gradient_of_another_shape",
        gradient_of_another_shape,
        ValueError,
        r"gradient of {name} has shape \(3, 4\), the parameter \(4, 3\)",
    ),
    BadStep(
        "parameter_of_another_shape",
        parameter_of_another_shape,
        ValueError,
        r"gradient of {name} has shape \(4, 3\), the parameter \(2, 3\)",
    ),
    BadStep(
        "momentum_of_another_shape",
        momentum_of_another_shape,
        ValueError,
        r"momentum buffer of {name} has shape \(4, 3\), the parameter \(2, 3\)",
        later=True,
    ),
    BadStep(
        "integer_momentum",
        integer_momentum,
        TypeError,
        r"momentum buffer of {name} has dtype torch\.int64",
        later=True,
    ),
    BadStep("expanded_parameter", expanded_parameter, ValueError, r"{name} overlaps itself"),
    BadStep("integer_parameter", integer_parameter, TypeError, r"{name} has dtype torch\.int64"),
    BadStep(
        "float64_parameter_fused",
        wide_parameter,
        RuntimeError,
        r"fused=True cannot serve {name}: .*float64",
        fused_only=True,
    ),
    *(
        BadStep(
            f"{value}_gradient",
            nonfinite_gradient(value),
            FloatingPointError,
            r"gradient of {name} has an inf or a NaN; nothing was changed",
        )
        for value in (NAN, INF, -INF)
    ),
]


@pytest.mark.parametrize("names", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize(
    ("bad", "steps"),
    [
        pytest.param(bad, steps, id=f"{bad.desc}-after_{steps}")
        for bad in BAD_STEPS
        for steps in (0, 1)
        if steps or not bad.later
    ],
)
def test_step_refuses_and_changes_nothing(
    bad: BadStep, names: bool, steps: int, path: StepPath
) -> None:
    first, second = make_params(path.device), make_params(path.device)
    everything = [*first, *second]
    groups: list[dict[str, Any]] = [{"params": first}, {"params": second[::-1]}]
    if names:
        groups[0]["params"] = [(f"first.{i}", param) for i, param in enumerate(first)]
        groups[1]["params"] = [(f"second.{i}", param) for i, param in enumerate(second[::-1])]
    optimizer = BNGD(groups, lr=0.1, weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, everything, range(steps))
    set_grads(everything, 9)
    bad.spoil(second[0], optimizer)
    if bad.fused_only and not path.fused:
        optimizer.step()
        return
    before = snapshot(optimizer, everything)
    name = r"second\.2" if names else r"param_groups\[1\]\['params'\]\[2\]"
    with pytest.raises(bad.error, match=bad.match.replace("{name}", name)):
        optimizer.step()
    assert snapshot(optimizer, everything) == before
    assert optimizer.skipped == 0


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_a_refused_nonfinite_step_leaves_the_run_as_if_it_never_was(
    granularity: str, path: StepPath
) -> None:
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity, "nonfinite": "raise"}
    hit, spared = make_params(path.device), make_params(path.device)
    a, b = (BNGD(params, fused=path.fused, **options) for params in (hit, spared))
    for seed in range(3):
        set_grads(hit, 50 + seed)
        hit[1].grad[3] = math.inf
        with pytest.raises(FloatingPointError, match=r"\['params'\]\[1\]"):
            a.step()
        take_steps(a, hit, [seed])
        take_steps(b, spared, [seed])
    assert_equal(hit, spared)
    assert_equal(momenta(a, hit), momenta(b, spared))


def test_fused_on_the_cpu_needs_the_interpreter() -> None:
    code = (
        "import torch\n"
        "from bngd_triton import BNGD\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "BNGD([p])\n"
        "try:\n"
        "    BNGD([p], fused=True)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    # the interpreter is chosen once per process
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fused=True cannot serve param_groups[0]['params'][0]: ")
    assert "it is on the CPU" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
    assert "fused=False" in done.stdout


@pytest.mark.parametrize("name", ["fused", "flatten"])
def test_options_of_the_optimizer_are_refused_in_groups(name: str, device: torch.device) -> None:
    params = make_params(device)
    with pytest.raises(ValueError, match=f"{name} is an option of the whole optimizer"):
        BNGD([{"params": params, name: False}])
    BNGD([{"params": params, name: False}], **{name: False})

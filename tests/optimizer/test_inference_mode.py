"""Optimizers that are made, stepped or loaded under `torch.inference_mode`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from support.exact_runs import assert_bits, state_of
from support.paths import StepPath
from support.snapshots import snapshot
from support.steps import assert_equal, make_params, set_grads, take_steps

OPTION_SETS: list[dict[str, Any]] = [
    {},
    {"granularity": "row", "accumulation_steps": 2},
    {"granularity": "global", "momentum": 0.0},
    {"master_weights": "stochastic"},
]
option_sets = pytest.mark.parametrize("options", OPTION_SETS, ids=str)


def make(path: StepPath) -> list[Parameter]:
    return [Parameter(param.detach().bfloat16()) for param in make_params(path.device)]


def everything(optimizer: BNGD, params: list[Parameter]) -> list[Tensor]:
    return [t.detach().clone() for t in (*params, *state_of(optimizer, params))]


@pytest.mark.parametrize("way", ["constructor", "add_param_group"])
def test_parameters_can_be_trained_by_an_optimizer_made_under_inference_mode(
    way: str, path: StepPath
) -> None:
    params, more = make(path), make(path)
    if way == "constructor":
        with torch.inference_mode():
            optimizer = BNGD([*params, *more], lr=0.1, fused=path.fused)
    else:
        optimizer = BNGD(params, lr=0.1, fused=path.fused)
        with torch.inference_mode():
            optimizer.add_param_group({"params": more})
    before = [param.detach().clone() for param in (*params, *more)]
    sum(((param + 1).square() * param).sum() for param in (*params, *more)).backward()
    optimizer.step()
    assert not any(map(torch.equal, [*params, *more], before))


@option_sets
def test_a_step_under_inference_mode_is_as_any_other(
    options: dict[str, Any], path: StepPath
) -> None:
    """Whichever step, the first, which makes the state, or one that repeats others."""
    runs = []
    for inside in ((), (0,), (0, 1, 2, 3, 4), (2, 4)):
        params = make(path)
        optimizer = BNGD(params, lr=0.1, fused=path.fused, **options)
        for seed in range(6):
            with torch.inference_mode(seed in inside):
                take_steps(optimizer, params, [seed])
        assert not any(state.is_inference() for state in state_of(optimizer, params))
        sum(param.square().sum() for param in params).backward()
        runs.append(everything(optimizer, params))
    for run in runs[1:]:
        assert_bits(run, runs[0])


@option_sets
def test_a_checkpoint_loaded_under_inference_mode(options: dict[str, Any], path: StepPath) -> None:
    params, twins = make(path), make(path)
    a, b = (BNGD(p, lr=torch.tensor(0.1), fused=path.fused, **options) for p in (params, twins))
    take_steps(a, params, range(3))
    with torch.inference_mode():
        saved = a.state_dict()
        b.load_state_dict(saved)
    assert not b.param_groups[0]["lr"].is_inference()
    with torch.no_grad():
        for param, twin in zip(params, twins):
            twin.copy_(param)
    for optimizer, of in ((a, params), (b, twins)):
        take_steps(optimizer, of, range(3, 6))
    assert_bits(everything(b, twins), everything(a, params))


def test_what_was_made_under_inference_mode_is_refused(path: StepPath) -> None:
    params = make_params(path.device)
    with torch.inference_mode():
        inside = Parameter(torch.ones(3, device=path.device), requires_grad=False)
        buffer = torch.zeros(5, device=path.device)
    # nobody looks at it before it has a gradient
    optimizer = BNGD([*params, inside], lr=0.1, fused=path.fused)
    take_steps(optimizer, params, range(2))
    set_grads(params, 3)
    with torch.inference_mode():
        inside.grad = torch.ones_like(inside)
    before = snapshot(optimizer, params)
    match = r"\['params'\]\[3\], of shape \(3,\), was made under torch\.inference_mode\(\)"
    for mode in (False, True):
        with torch.inference_mode(mode), pytest.raises(RuntimeError, match=match):
            optimizer.step()
        assert snapshot(optimizer, params) == before
    with torch.inference_mode():
        inside.grad = None
    optimizer.state[params[1]]["momentum_buffer"] = buffer
    weights = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"momentum buffer of .*\[1\], of .* was made"):
        optimizer.step()
    assert_equal(params, weights)

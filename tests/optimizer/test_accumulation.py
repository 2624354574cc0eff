"""Micro-batches: how windows open, close, resume and are given up, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.engine.step import Stepper
from support import capture
from support.checkpoints import through_a_file
from support.exact_runs import (
    assert_bits,
    exact_gradient,
    give,
    make_params,
    state_of,
    take_steps,
)
from support.paths import StepPath
from support.snapshots import snapshot

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_one_micro_batch_is_a_step(granularity: str, path: StepPath) -> None:
    """K equal micro-batches too, if the momentum's past is nothing."""
    params, twins = (make_params(path.device) for _ in range(2))
    one = BNGD(params, 0.1, granularity=granularity, fused=path.fused)
    four = BNGD(twins, 0.1, granularity=granularity, accumulation_steps=4, fused=path.fused)
    take_steps(one, params, [1])
    take_steps(four, twins, [1] * 4)
    for a, b in zip(params, twins):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("into", [False, True], ids=["into_eager", "into_fused"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (FLOAT32, {"granularity": "row"}),
        (BFLOAT16, {"master_weights": "split"}),
        (BFLOAT16, {"master_weights": "stochastic", "momentum": 0.0}),
        (torch.float16, {"master_weights": "split", "granularity": "row"}),
    ],
    ids=str,
)
def test_resuming_within_a_window(
    dtype: torch.dtype, options: dict[str, Any], into: bool, path: StepPath
) -> None:
    params = make_params(path.device, dtype)
    optimizer = BNGD(
        params, 0.1, weight_decay=0.1, accumulation_steps=3, seed=2, fused=path.fused, **options
    )

    def go_on(optimizer: BNGD, params: list[Parameter]) -> None:
        for seed in range(4, 8):
            for i, param in enumerate(params):
                # the end of the open window finds no gradient of the first
                absent = i == 0 and seed < 6
                give(param, None if absent else exact_gradient(param, seed + i).to(dtype))
            optimizer.step()

    take_steps(optimizer, params, range(4))
    saved = through_a_file([optimizer.state_dict(), [param.detach() for param in params]])
    go_on(optimizer, params)
    twins = make_params(path.device, dtype)
    with torch.no_grad():
        for param, value in zip(twins, saved[1]):
            param.copy_(value)
    again = BNGD(twins, fused=into)
    again.load_state_dict(saved[0])
    go_on(again, twins)
    assert_bits([param.detach() for param in twins], [param.detach() for param in params])
    assert not torch.equal(twins[0], saved[1][0])
    assert_bits(state_of(again, twins), state_of(optimizer, params))
    assert again.param_groups[0]["micro_step"] == 2


def test_a_partial_window_goes_on(path: StepPath) -> None:
    """An epoch of five micro-batches, K = 4: its fifth opens the window of the next epoch."""
    params, twins = (make_params(path.device) for _ in range(2))
    done = []
    for group, epochs in ((params, 2), (twins, 1)):
        optimizer = BNGD(group, 0.1, accumulation_steps=4, fused=path.fused)
        for epoch in range(epochs):
            take_steps(optimizer, group, range(10 * epoch // epochs, 10 * (epoch + 1) // epochs))
            optimizer.zero_grad()
        done.append([*(param.detach() for param in group), *state_of(optimizer, group)])
    assert_bits(*done)


@pytest.mark.parametrize("mode", ["split", "stochastic"])
def test_masters_and_windows(mode: str, device: torch.device) -> None:
    """Both paths agree; a split master is what float32 training gives."""
    done = []
    for fused in (False, True):
        params = make_params(device, BFLOAT16)
        optimizer = BNGD(
            params, 1e-3, accumulation_steps=2, master_weights=mode, weight_decay=0.1, fused=fused
        )
        take_steps(optimizer, params, range(5))
        done.append([*(param.detach() for param in params), *state_of(optimizer, params)])
    assert_bits(*done)
    twins = [Parameter(param.detach().float()) for param in make_params(device, BFLOAT16)]
    wide = BNGD(twins, 1e-3, accumulation_steps=2, weight_decay=0.1, fused=False)
    take_steps(wide, twins, range(5))
    if mode == "split":
        for param, twin in zip(params, twins):
            rest = optimizer.state[param]["master_remainder"]
            bits = (param.detach().view(torch.int16).int() << 16) + rest
            assert torch.equal(bits.view(FLOAT32), twin)
    else:
        for param, twin in zip(params, twins):
            torch.testing.assert_close(param.float(), twin, rtol=2.0**-6, atol=0)


def test_groups_of_different_windows(path: StepPath) -> None:
    """A group that steps, one with K = 2 and one with K = 3 do as they would alone."""
    ks = (1, 2, 3)
    shapes = [(4, 6), (10,)]
    together = [make_params(path.device, shapes=shapes) for _ in ks]
    groups = [{"params": p, "accumulation_steps": k} for p, k in zip(together, ks)]
    optimizer = BNGD(groups, 0.1, fused=path.fused)
    alone = [make_params(path.device, shapes=shapes) for _ in ks]
    optimizers = [BNGD(p, 0.1, accumulation_steps=k, fused=path.fused) for p, k in zip(alone, ks)]
    for seed in range(7):
        for params in together:
            for i, param in enumerate(params):
                give(param, exact_gradient(param, 100 * seed + i))
        optimizer.step()
        for params, one in zip(alone, optimizers):
            take_steps(one, params, [seed])
    for params, twins in zip(together, alone):
        assert_bits(params, twins)
    assert [group.get("micro_step", 0) for group in optimizer.param_groups] == [0, 1, 1]


def test_a_window_given_up_leaves_no_count(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, 0.1, accumulation_steps=4, fused=path.fused)
    (group,) = optimizer.param_groups
    take_steps(optimizer, params, [0])
    group["accumulation_steps"] = 1
    take_steps(optimizer, params, [1])
    group["accumulation_steps"] = 4
    before = [param.detach().clone() for param in params]
    take_steps(optimizer, params, [2, 3, 4])
    assert_bits([param.detach() for param in params], before)
    take_steps(optimizer, params, [5])
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_window_given_up_leaves_nothing_on_a_parameter_without_gradient(
    granularity: str, path: StepPath
) -> None:
    params = make_params(path.device)
    optimizer = BNGD(
        params, 0.1, accumulation_steps=4, granularity=granularity, fused=path.fused
    )  # fmt: skip
    (group,) = optimizer.param_groups
    take_steps(optimizer, params, [0])
    group["accumulation_steps"] = 1
    for param in params[1:]:
        give(param, torch.ones_like(param))
    params[0].grad = None
    optimizer.step()
    group["accumulation_steps"] = 4
    buffer = optimizer.state[params[0]]["momentum_buffer"]
    before = buffer.clone()
    # ghat = 0 everywhere: what is left is the decay that a window brings once
    for param in params:
        give(param, torch.zeros_like(param))
    optimizer.step()
    assert_bits([buffer], [before * 0.9])


def test_a_master_that_is_new_when_a_window_ends(path: StepPath) -> None:
    params = make_params(path.device, BFLOAT16)
    optimizer = BNGD(params, 0.1, accumulation_steps=2, master_weights=None, fused=path.fused)
    take_steps(optimizer, params, [0])
    before = params[0].detach().clone()
    optimizer.param_groups[0]["master_weights"] = "split"
    params[0].grad = None
    optimizer.step()
    assert not torch.equal(params[0], before)
    assert "master_remainder" in optimizer.state[params[0]]


def test_nesterov_is_refused(path: StepPath) -> None:
    params = make_params(path.device)
    with pytest.raises(ValueError, match=r"nesterov needs accumulation_steps=1.*got.*=2"):
        BNGD(params, nesterov=True, accumulation_steps=2, fused=path.fused)
    optimizer = BNGD(params, accumulation_steps=2, fused=path.fused)
    take_steps(optimizer, params, [0])
    optimizer.param_groups[0]["nesterov"] = True
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="nesterov"):
        take_steps(optimizer, params, [1])
    assert snapshot(optimizer, params) == before


def test_a_global_slice_needs_all_its_gradients(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(
        [(f"layer{i}", param) for i, param in enumerate(params)],
        granularity="global", accumulation_steps=2, fused=path.fused,
    )  # fmt: skip
    take_steps(optimizer, params, [0])
    params[2].grad = None
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"needs a gradient of every parameter.*layer2 has none"):
        optimizer.step()
    assert snapshot(optimizer, params) == before


def test_capture_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params(device)
    optimizer = BNGD(params, accumulation_steps=2, fused=True)
    take_steps(optimizer, params, [0])
    before = snapshot(optimizer, params)
    capture.pretend(monkeypatch)
    with pytest.raises(RuntimeError, match="accumulation_steps > 1 cannot be captured"):
        optimizer.step()
    assert snapshot(optimizer, params) == before


def test_windows_are_laid_out_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[None] = []
    full = Stepper.lay_out_and_step
    monkeypatch.setattr(
        Stepper, "lay_out_and_step", lambda *args: (layouts.append(None), full(*args))
    )
    params = make_params(device)
    optimizer = BNGD(params, granularity="tensor", accumulation_steps=3, fused=True)
    take_steps(optimizer, params, range(7))
    assert len(layouts) == 1
    # a gradient that is missing once costs its step, the end of its window and one to settle
    params[0].grad = None
    optimizer.step()
    take_steps(optimizer, params, range(6))
    assert len(layouts) <= 4

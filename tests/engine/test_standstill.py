"""One warning of a run in which nothing moves any more, without waiting for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD, release_gradients, standstill
from support.paths import StepPath
from support.steps import make_params, set_grads

NAN = torch.nan
# in place of `standstill.EVERY`, 16
EVERY = 4


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that a run of a few steps says as much as one of many."""
    monkeypatch.setattr(standstill, "EVERY", EVERY)


quickly = pytest.mark.usefixtures("quick")


def said(
    optimizer: BNGD,
    params: list[Parameter],
    bad: Iterable[int],
    steps: int = 3 * EVERY + 1,
    **spoil: Any,
) -> list[int]:
    """In which steps there was a warning, when every gradient of some was NaN."""
    bad, found = set(bad), []
    for step in range(steps):
        set_grads(params, step)
        for param in params:
            if step in bad:
                param.grad[spoil.get("where", ...)] = NAN
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found += [step for one in caught if "moved nothing" in str(one.message)]
    return found


@quickly
@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row"}, {"granularity": "global"}, {"accumulation_steps": 2}],
    ids=str,
)
def test_a_run_that_moves_nothing_is_warned_of_once(
    options: dict[str, Any], path: StepPath
) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused, **options)
    (step,) = said(optimizer, params, range(100), steps=7 * EVERY)
    assert 2 * EVERY <= step + 2 < 3 * EVERY


@quickly
def test_nothing_waits_for_an_answer(path: StepPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU answers come some steps later."""

    def there(answer: Any) -> bool:
        answer.asked = getattr(answer, "asked", 0) + 1
        return bool(answer.asked > 3)

    monkeypatch.setattr(standstill._Answer, "there", there)
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    # looked at in a step and the three after it, watched from then on
    last = 2 * EVERY + 3
    (step,) = said(optimizer, params, range(last), steps=5 * EVERY)
    assert last <= step < last + 5
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    assert not said(optimizer, params, range(last - 1), steps=5 * EVERY)


@quickly
def test_it_is_noticed_wherever_it_begins(path: StepPath) -> None:
    for start in (EVERY - 2, EVERY):
        params = make_params(path.device)
        optimizer = BNGD(params, lr=0.1, fused=path.fused)
        (step,) = said(optimizer, params, range(start, 100), steps=start + 4 * EVERY)
        assert step < start + 3 * EVERY


@quickly
def test_a_parameter_that_no_longer_has_a_gradient_does_not_hide_it(path: StepPath) -> None:
    params = make_params(path.device)
    spare = Parameter(torch.ones(3, device=path.device))
    optimizer = BNGD([*params, spare], lr=0.1, fused=path.fused)
    spare.grad = torch.arange(3.0, device=path.device)
    optimizer.step()
    spare.grad = None
    assert said(optimizer, params, range(100))


@quickly
@pytest.mark.parametrize(
    "bad",
    [
        range(EVERY - 1),
        range(EVERY - 1, 4 * EVERY, EVERY),
        [step for step in range(2 * EVERY + EVERY // 2) if step != EVERY + 1],
    ],
    ids=["a_handful", "looked_at", "all_but_one"],
)
def test_what_moves_now_and_then_is_not_warned_of(bad: Sequence[int], path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    steps = bad[-1] + 1 if len(bad) > EVERY else 4 * EVERY
    assert not said(optimizer, params, bad, steps=steps)


@quickly
@pytest.mark.parametrize("options", [{"granularity": "row"}, {"nonfinite": "propagate"}], ids=str)
def test_slices_that_move_beside_others_are_not_warned_of(
    options: dict[str, Any], path: StepPath
) -> None:
    params = make_params(path.device)[:1]
    optimizer = BNGD(params, lr=0.1, fused=path.fused, **options)
    where: Any = ... if "nonfinite" in options else slice(1)
    assert not said(optimizer, params, range(100), where=where)
    # beside a parameter that is skipped
    optimizer = BNGD(make_params(path.device), lr=0.1, fused=path.fused)
    skipped, moving = optimizer.param_groups[0]["params"][:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4 * EVERY):
            skipped.grad = torch.full_like(skipped, NAN)
            moving.grad = torch.randn_like(moving)
            optimizer.step()


class Scaled:
    def __init__(self, path: StepPath, scale: float) -> None:
        self.param = Parameter(torch.ones(4, 3, device=path.device))
        self.optimizer = BNGD([self.param], lr=0.1, fused=path.fused)
        self.scaler = torch.amp.GradScaler(path.device.type, init_scale=scale)

    def step(self, overflows: bool) -> bool:
        """Whether there was a warning."""
        self.param.grad = torch.randn_like(self.param)
        if overflows:
            # other slices are finite
            self.param.grad[0, 0] = torch.inf
        self.scaler.scale(torch.ones((), device=self.param.device))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return any("moved nothing" in str(one.message) for one in caught)


def test_a_scaler_that_looks_for_its_scale_is_not_warned_of(path: StepPath) -> None:
    run = Scaled(path, 2.0**24)
    assert not any(run.step(step < 24) for step in range(70))


def test_overflows_without_end_are_warned_of_once(path: StepPath) -> None:
    run = Scaled(path, 2.0**16)
    assert sum(run.step(True) for _ in range(70)) == 1


@quickly
def test_with_gradient_release(path: StepPath) -> None:
    for factor, count in ((NAN, 1), (1.0, 0)):
        model = torch.nn.Linear(3, 2).to(path.device)
        optimizer = BNGD(model.parameters(), lr=0.1, fused=path.fused)
        release_gradients(model, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4 * EVERY):
                (model(torch.randn(4, 3, device=path.device)) * factor).sum().backward()
                optimizer.step()
        assert sum("moved nothing" in str(one.message) for one in caught) == count


@quickly
def test_released_gradients_of_which_some_overflow_are_not_warned_of(path: StepPath) -> None:
    """A scaler's overflow then skips a tensor, not the step."""
    model = torch.nn.Linear(3, 2).to(path.device)
    optimizer = BNGD(model.parameters(), lr=0.1, fused=path.fused)
    scaler = torch.amp.GradScaler(path.device.type)
    release_gradients(model, optimizer, grad_scaler=scaler)
    x = torch.full((4, 3), torch.inf, device=path.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4 * EVERY):
            # the bias has a gradient of numbers
            scaler.scale((torch.nn.functional.linear(x, model.weight) * 0).sum()).backward()
            scaler.scale((model.bias * torch.randn_like(model.bias)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert not any("moved nothing" in str(one.message) for one in caught)

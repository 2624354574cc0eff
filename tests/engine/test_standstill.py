"""One warning of a run in which nothing moves any more, without waiting for the device."""

import warnings

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD, release_gradients, standstill
from support.steps import SHAPES, make_params, set_grads

NAN = torch.nan
# in place of `standstill.EVERY`, 16
EVERY = 4


@pytest.fixture
def quick(monkeypatch):
    """Look often, so that a run of a few steps says as much as one of many."""
    monkeypatch.setattr(standstill, "EVERY", EVERY)


quickly = pytest.mark.usefixtures("quick")


def warned(step):
    """How often a call says that nothing moves."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return sum("moved nothing" in str(one.message) for one in caught)


def said(path, bad, where=..., shapes=SHAPES, **options):
    """In which steps of a run there was a warning, when every gradient of some was NaN."""
    params = make_params(path.device, shapes=shapes)
    optimizer = BNGD(params, lr=0.1, fused=path.fused, **options)
    bad, found = set(bad), []
    for step in range(7 * EVERY):
        set_grads(params, step)
        for param in params if step in bad else []:
            param.grad[where] = NAN
        found += [step] * warned(optimizer.step)
    return found


ALWAYS = range(100)
MOVES_AGAIN = [step for step in range(2 * EVERY + EVERY // 2) if step != EVERY + 1]
SOON, NEVER = range(2 * EVERY - 2, 3 * EVERY - 2), range(0)
RUNS = {
    "every_step": (ALWAYS, {}, SOON),
    "every_step_by_row": (ALWAYS, {"granularity": "row"}, SOON),
    "every_step_of_one_slice": (ALWAYS, {"granularity": "global"}, SOON),
    "every_micro_batch": (ALWAYS, {"accumulation_steps": 2}, SOON),
    "before_it_is_looked_at": (range(EVERY - 2, 100), {}, range(EVERY, 4 * EVERY - 2)),
    "when_it_was_looked_at": (range(EVERY, 100), {}, range(EVERY, 4 * EVERY)),
    "a_handful": (range(EVERY - 1), {}, NEVER),
    "those_looked_at": (range(EVERY - 1, 4 * EVERY, EVERY), {}, NEVER),
    "all_but_one": (MOVES_AGAIN, {}, NEVER),
    "one_row": (ALWAYS, {"granularity": "row", "where": slice(1), "shapes": [(4, 3)]}, NEVER),
    "none_where_it_propagates": (ALWAYS, {"nonfinite": "propagate"}, NEVER),
}


@quickly
@pytest.mark.parametrize(("bad", "options", "when"), RUNS.values(), ids=RUNS)
def test_a_run_that_moves_nothing_is_warned_of_once(bad, options, when, path):
    """In which steps every gradient is skipped, and in which of them a warning is due."""
    found = said(path, bad, **options)
    assert len(found) == bool(when)
    assert set(found) <= set(when)


@quickly
def test_nothing_waits_for_an_answer(path, monkeypatch):
    """On a GPU answers come some steps later."""

    right = standstill._answer

    def late(flag):
        for _ in range(3):
            yield
        return (yield from right(flag))

    monkeypatch.setattr(standstill, "_answer", late)
    # looked at in a step and the three after it, watched from then on
    last = 2 * EVERY + 3
    (step,) = said(path, range(last))
    assert last <= step < last + 5
    assert not said(path, range(last - 1))


@quickly
def test_a_parameter_that_no_longer_has_a_gradient_does_not_hide_it(path):
    params = make_params(path.device)
    spare = Parameter(torch.ones(3, device=path.device))
    optimizer = BNGD([*params, spare], lr=0.1, fused=path.fused)
    spare.grad = torch.arange(3.0, device=path.device)
    optimizer.step()
    spare.grad = None
    for param in params:
        param.grad = torch.full_like(param, NAN)
    assert sum(warned(optimizer.step) for _ in range(3 * EVERY)) == 1


@quickly
def test_a_parameter_that_moves_beside_one_that_is_skipped_is_not_warned_of(path):
    params = make_params(path.device, shapes=[(5,), (4, 3)])
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    for seed in range(4 * EVERY):
        set_grads(params, seed)
        # all of the first, one row of the second
        params[0].grad.fill_(NAN)
        params[1].grad[0] = NAN
        assert not warned(optimizer.step)


@pytest.mark.parametrize(
    ("scale", "overflows", "warnings"),
    [(2.0**24, 24, 0), (2.0**16, 70, 1)],
    ids=["looks_for_its_scale", "without_end"],
)
def test_overflows_without_end_are_warned_of_once(scale, overflows, warnings, path):
    """Those of a scaler that looks for its scale are not."""
    param = Parameter(torch.ones(4, 3, device=path.device))
    optimizer = BNGD([param], lr=0.1, fused=path.fused)
    scaler = torch.amp.GradScaler(path.device.type, init_scale=scale)
    found = 0
    for step in range(70):
        param.grad = torch.randn_like(param)
        if step < overflows:
            # other slices are finite
            param.grad[0, 0] = torch.inf
        scaler.scale(torch.ones((), device=path.device))
        found += warned(lambda: scaler.step(optimizer))
        scaler.update()
    assert found == warnings


@quickly
@pytest.mark.parametrize(("factor", "warnings"), [(NAN, 1), (1.0, 0)])
def test_with_gradient_release(factor, warnings, path):
    model = torch.nn.Linear(3, 2).to(path.device)
    optimizer = BNGD(model.parameters(), lr=0.1, fused=path.fused)
    release_gradients(model, optimizer)
    found = 0
    for _ in range(4 * EVERY):
        (model(torch.randn(4, 3, device=path.device)) * factor).sum().backward()
        found += warned(optimizer.step)
    assert found == warnings


@quickly
def test_released_gradients_of_which_some_overflow_are_not_warned_of(path):
    """A scaler's overflow then skips a tensor, not the step."""
    model = torch.nn.Linear(3, 2).to(path.device)
    optimizer = BNGD(model.parameters(), lr=0.1, fused=path.fused)
    scaler = torch.amp.GradScaler(path.device.type)
    release_gradients(model, optimizer, grad_scaler=scaler)
    x = torch.full((4, 3), torch.inf, device=path.device)
    for _ in range(4 * EVERY):
        # the bias has a gradient of numbers
        scaler.scale((torch.nn.functional.linear(x, model.weight) * 0).sum()).backward()
        scaler.scale((model.bias * torch.randn_like(model.bias)).sum()).backward()
        assert not warned(lambda: scaler.step(optimizer))
        scaler.update()

"""Gradients that stay the tensors they are: recognised, and never by mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import CHANGES, IN_PLACE, assert_same, give_gradients
from torch.nn import Parameter

from bngd_triton import BNGD, kept


@pytest.mark.parametrize("patience", [2, 10**9], ids=["known to stay", "looked at anew"])
@pytest.mark.parametrize("change", [*CHANGES, *IN_PLACE], ids=lambda change: change.__name__)
def test_a_change_is_noticed_among_gradients_that_stay(
    change: Callable[..., None],
    patience: int,
    device: torch.device,
    layouts: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As above, but that gradients are tensors that stay, with new values."""
    monkeypatch.setattr(kept, "PATIENCE", patience)
    done = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = [
            Parameter(torch.randn(shape, device=device)) for shape in ((8, 8), (600, 5), (16,))
        ]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
        optimizer = BNGD(groups, fused=fused)
        give_gradients(params, 0)
        for step in range(6):
            for param in params:
                if param.grad is not None:
                    param.grad.mul_(0.5)
            if step == 5:
                steady_step = optimizer._stepper.steady
                if fused:
                    assert steady_step is not None
                    assert (steady_step.kept is not None) == (patience == 2)
                layouts()
                change(*([params[0]] if change in IN_PLACE else [params, optimizer]))
            optimizer.step()
            if step == 5 and fused:
                assert layouts() == 1
        done.append(params)
    assert_same(*done)


def test_gradients_that_stay_are_looked_at_ever_more_seldom(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stays and another does not: looking at all of them takes far longer than a step."""
    made = []
    step = 0

    class Counting(kept.Kept):
        def __init__(self, *args: Any) -> None:
            made.append(step)
            super().__init__(*args)

    monkeypatch.setattr(kept, "Kept", Counting)
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD(params, fused=True)
    give_gradients(params, 0)
    for step in range(60):  # noqa: B007
        params[1].grad = torch.randn(16, device=device)
        optimizer.step()
    assert made == [9, 25, 57]


def test_new_gradients_in_the_place_of_freed_ones(
    device: torch.device, layouts: Callable[[], int]
) -> None:
    """They have the number, and often the address, of those before them."""
    params = [Parameter(torch.randn(16, device=device)) for _ in range(3)]
    optimizer = BNGD(params, fused=True)
    values = torch.randn(16, device=device)
    numbers = set()
    for step in range(60):
        # from the middle on they are new; until then they stay
        if not step or step > 20:
            optimizer.zero_grad()
            for param in params:
                param.grad = values.clone()
        assert params[0].grad is not None
        numbers.add(id(params[0].grad))
        optimizer.step()
        steady_step = optimizer._stepper.steady
        assert steady_step is not None
        assert (steady_step.kept is not None) == (9 <= step <= 20)
    assert layouts() == 1
    assert len(numbers) < 40


def test_gradients_that_stay_are_not_held(device: torch.device) -> None:
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD(params, fused=True)
    give_gradients(params, 0)
    for _ in range(12):
        optimizer.step()
    steady_step = optimizer._stepper.steady
    assert steady_step is not None
    assert steady_step.kept is not None
    memory = [
        torch.multiprocessing.reductions.StorageWeakRef(param.grad.untyped_storage())
        for param in params
        if param.grad is not None
    ]
    optimizer.zero_grad()
    assert [one.expired() for one in memory] == [True, True]


def test_parameters_without_gradients_beside_gradients_that_stay(
    device: torch.device, layouts: Callable[[], int]
) -> None:
    params = [Parameter(torch.randn(n, device=device)) for n in (16, 16, 0)]
    optimizer = BNGD(params, fused=True)
    give_gradients(params, 0)
    params[1].grad = None
    for _ in range(12):
        optimizer.step()
    assert layouts() == 1
    steady_step = optimizer._stepper.steady
    assert steady_step is not None
    assert steady_step.kept is not None
    before = params[1].detach().clone()
    params[1].grad = torch.arange(16.0, device=device)
    optimizer.step()
    assert layouts() == 1
    assert not torch.equal(params[1], before)


def test_gradients_from_backward_stay(device: torch.device, layouts: Callable[[], int]) -> None:
    model = torch.nn.Linear(4, 3, device=device)
    optimizer = BNGD(model.parameters(), fused=True)
    for _ in range(14):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(5, 4, device=device)).square().mean().backward()
        optimizer.step()
    assert layouts() == 1
    steady_step = optimizer._stepper.steady
    assert steady_step is not None
    assert steady_step.kept is not None

"""A window whose gradients are summed by mistake brings one warning; other windows bring none."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from bngd_triton import BNGD
from support.paths import StepPath


def train(path: StepPath, clear: Callable[[BNGD, int], None], calls: int = 6, k: int = 3) -> None:
    model = torch.nn.Linear(4, 4).to(path.device)
    optimizer = BNGD(model.parameters(), accumulation_steps=k, fused=path.fused)
    for call in range(calls):
        clear(optimizer, call)
        model(torch.randn(5, 4, device=path.device)).square().mean().backward()
        optimizer.step()


def test_gradients_zeroed_once_a_window_bring_one_warning(path: StepPath) -> None:
    def once_a_window(optimizer: BNGD, call: int) -> None:
        if call % 3 == 0:
            optimizer.zero_grad()

    with pytest.warns(RuntimeWarning, match="seem to be summed over micro-batches") as caught:
        train(path, once_a_window)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "clear",
    [
        lambda optimizer, _: optimizer.zero_grad(),
        lambda optimizer, _: optimizer.zero_grad(set_to_none=False),
    ],
    ids=["none", "zeroed"],
)
def test_fresh_gradients_bring_none(clear: Callable[[BNGD, int], None], path: StepPath) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(path, clear, calls=9)


def test_sums_without_windows_bring_none(path: StepPath) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(path, lambda *_: None, k=1)

"""Micro-batches: windows of different groups, masters, what is refused or warned of."""

import warnings

import pytest
import torch

from bngd_triton import BNGD
from support import capture
from support.exact_runs import SHAPES, assert_bits, exact_gradient, give, make_params, take_steps
from support.paths import StepPath
from support.runs import refused, start


def test_groups_of_different_windows(path):
    """A group that steps, one with K = 2 and one with K = 3 do as they would alone."""
    sizes, shapes = (1, 2, 3), [(4, 6), (10,)]
    alone = [start(path, shapes=shapes, lr=0.1, accumulation_steps=k) for k in sizes]
    together = [make_params(path.device, shapes=shapes) for _ in sizes]
    groups = [{"params": p, "accumulation_steps": k} for p, k in zip(together, sizes)]
    optimizer = BNGD(groups, 0.1, fused=path.fused)
    for seed in range(7):
        for params in together:
            for i, param in enumerate(params):
                give(param, exact_gradient(param, 100 * seed + i))
        optimizer.step()
        for params, one in alone:
            take_steps(one, params, [seed])
    for params, (twins, _) in zip(together, alone):
        assert_bits(params, twins)
    assert [group["micro_step"] for group in optimizer.param_groups] == [0, 1, 1]


def test_a_master_that_is_new_when_a_window_ends(path):
    params, optimizer = start(path, torch.bfloat16, SHAPES, accumulation_steps=2, lr=0.1)
    optimizer.param_groups[0]["master_weights"] = None
    take_steps(optimizer, params, [0])
    before = params[0].detach().clone()
    optimizer.param_groups[0]["master_weights"] = "split"
    params[0].grad = None
    optimizer.step()
    assert not torch.equal(params[0], before)
    assert "master_remainder" in optimizer.state[params[0]]


def test_a_global_slice_needs_all_its_gradients(path):
    params = make_params(path.device)
    named = [(f"layer{i}", param) for i, param in enumerate(params)]
    optimizer = BNGD(named, granularity="global", accumulation_steps=2, fused=path.fused)
    take_steps(optimizer, params, [0])
    params[2].grad = None
    match = "needs a gradient of every parameter.*layer2 has none"
    with refused(RuntimeError, match, optimizer, params):
        optimizer.step()


def test_capture_is_refused(device, monkeypatch):
    params, optimizer = start(StepPath(True, device), shapes=SHAPES, accumulation_steps=2)
    take_steps(optimizer, params, [0])
    capture.pretend(monkeypatch)
    match = "accumulation_steps > 1 cannot be captured"
    with refused(RuntimeError, match, optimizer, params):
        optimizer.step()


def test_windows_are_laid_out_once(device, layouts):
    options = {"granularity": "tensor", "accumulation_steps": 3}
    params, optimizer = start(StepPath(True, device), shapes=SHAPES, **options)
    take_steps(optimizer, params, range(7))
    assert layouts() == 1
    # a gradient that is missing once costs its step, the end of its window and one to settle
    params[0].grad = None
    optimizer.step()
    take_steps(optimizer, params, range(6))
    assert layouts() <= 3


def train(path, clear, k=3):
    model = torch.nn.Linear(4, 4).to(path.device)
    optimizer = BNGD(model.parameters(), accumulation_steps=k, fused=path.fused)
    for call in range(9):
        clear(optimizer, call)
        model(torch.randn(5, 4, device=path.device)).square().mean().backward()
        optimizer.step()


def test_gradients_zeroed_once_a_window_bring_one_warning(path):
    def once_a_window(optimizer, call):
        if call % 3 == 0:
            optimizer.zero_grad()

    with pytest.warns(RuntimeWarning, match="seem to be summed over micro-batches") as caught:
        train(path, once_a_window)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("clear", "k"),
    [
        (lambda optimizer, _: optimizer.zero_grad(), 3),
        (lambda optimizer, _: optimizer.zero_grad(set_to_none=False), 3),
        (lambda *_: None, 1),
    ],
    ids=["none", "zeroed", "sums_without_windows"],
)
def test_other_gradients_bring_no_warning(clear, k, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(path, clear, k)

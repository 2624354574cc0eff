"""Steps that torch.distributed.checkpoint takes to make state, and steps that only look so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bngd_triton import BNGD
from support.exact_runs import assert_bits, state_of
from support.paths import StepPath
from support.steps import make_grads

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
OPTION_SETS: list[dict[str, Any]] = [
    {"accumulation_steps": 2},
    {"accumulation_steps": 2, "granularity": "row", "weight_decay": 0.1},
    {"accumulation_steps": 3, "granularity": "global"},
    {"master_weights": "stochastic"},
]
option_sets = pytest.mark.parametrize(
    ("options", "tensor_rate"), list(zip(OPTION_SETS, itertools.cycle((False, True)))), ids=str
)


class Run:
    def __init__(self, path: StepPath, tensor_rate: bool, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(6, 5).to(path.device, torch.bfloat16)
        self.lr = torch.tensor(0.1) if tensor_rate else 0.1
        self.optimizer = BNGD(self.model.parameters(), lr=self.lr, fused=path.fused, **options)
        self.params = list(self.model.parameters())

    def step(self, seed: int | None) -> None:
        """By gradients of a seed, or of zeros."""
        for param, grad in zip(self.params, make_grads(self.params, seed or 0)):
            param.grad = torch.zeros_like(param) if seed is None else grad
        self.optimizer.step()
        self.optimizer.zero_grad()

    def counts(self) -> tuple[int, int]:
        (group,) = self.optimizer.state_dict()["param_groups"]
        return group["micro_step"], group["rounding_steps"]

    def everything(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.params, *state_of(self.optimizer, self.params))]


@option_sets
def test_asking_a_fresh_optimizer_for_its_state_changes_no_run(
    options: dict[str, Any], tensor_rate: bool, path: StepPath
) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    plain, asked, loaded = (Run(path, tensor_rate, **options) for _ in range(3))
    saved = get_optimizer_state_dict(asked.model, asked.optimizer)
    assert asked.counts() == (0, 0)
    assert not any(state.any() for state in state_of(asked.optimizer, asked.params))
    set_optimizer_state_dict(loaded.model, loaded.optimizer, saved)
    for seed in range(1, 6):
        for run in (plain, asked, loaded):
            run.step(seed)
        assert_bits(asked.everything(), plain.everything())
        assert_bits(loaded.everything(), plain.everything())
        assert asked.counts() == loaded.counts() == plain.counts()


@option_sets
def test_a_first_step_of_zeros_at_rate_0_counts_as_any_other(
    options: dict[str, Any], tensor_rate: bool, path: StepPath
) -> None:
    """As under a warm-up from 0 where a hinge loss is 0."""
    run = Run(path, tensor_rate, **options)
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.0) if tensor_rate else 0.0
    before = run.everything()
    run.step(None)
    assert_bits(run.everything()[: len(before)], before)
    run.optimizer.param_groups[0]["lr"] = run.lr
    size = options.get("accumulation_steps", 1)
    assert run.counts() == ((1, 0) if size > 1 else (0, 1))
    moved = []
    for call in range(2, 8):
        weights = run.params[0].detach().clone()
        run.step(call)
        moved.append(not torch.equal(weights, run.params[0]))
    assert moved == [call % size == 0 for call in range(2, 8)]

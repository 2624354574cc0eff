"""Names from the model where the optimizer has none, and plain numbers for any logger."""

from __future__ import annotations

import math

import torch

from bngd_triton import BNGD
from bngd_triton.telemetry.log import COLUMNS, GradStatsLogger


def test_a_model_names_parameters_that_the_optimizer_got_unnamed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    # in another order, in groups, and one that is no parameter of the model
    stranger = torch.nn.Parameter(torch.ones(3))
    groups = [
        {"params": [model[2].weight, stranger]},
        {"params": [model[2].bias, *model[0].parameters()]},
    ]
    optimizer = BNGD(groups)
    logger = GradStatsLogger(optimizer, every=1, model=model)
    assert logger.latest() == {}
    (model(torch.randn(5, 4)).square().sum() + stranger.square().sum()).backward()
    optimizer.step()
    logger.step()
    named = dict(model.named_parameters())
    latest = logger.latest()
    for name, param in named.items():
        assert math.isclose(
            latest[f"grad_std/{name}"], float(param.grad.double().std(correction=0)), rel_tol=1e-9
        )
    assert len(latest) == len(COLUMNS) * (len(named) + 1)
    assert all(type(value) is float for value in latest.values())


def test_a_dead_row_has_a_kappa_of_one() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = BNGD(model.named_parameters(), granularity="row")
    logger = GradStatsLogger(optimizer, every=1)
    model.weight.grad = torch.randn(3, 4)
    model.weight.grad[1] = 0.0
    optimizer.step()
    logger.step()
    kappa = optimizer.grad_stats()["weight"].kappa
    assert kappa[1] == 1.0
    assert kappa.isfinite().all()
    model.weight.grad.zero_()
    optimizer.step()
    logger.step()
    assert logger.latest()["grad_kappa/weight"] == 1.0

"""Steps in CUDA graphs and in compiled functions."""

from __future__ import annotations

from typing import Any

import capture
import pytest
import torch
from runs import exact_gradient, make_params, state_of, take_steps
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.tolerances import CDF


def test_capture_refuses_what_it_could_not_replay(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a CUDA graph: nothing may be uploaded, and nothing changes when that is refused."""
    param = Parameter(torch.randn(600, 5, device=device))
    optimizer = BNGD([param], 1e-2, fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    capture.pretend(monkeypatch)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.raises(RuntimeError, match="sync_hyperparameters"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    held: list[Tensor] = [param.grad]
    param.grad = param.grad.clone()
    with pytest.raises(RuntimeError, match="a gradient moved"):
        optimizer.step()
    assert torch.equal(param, before)
    assert held


def test_capture_needs_a_step_before_and_every_gradient(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD([("weight", params[0]), ("head", params[1])], fused=True)
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    before = [param.detach().clone() for param in params]
    capture.pretend(monkeypatch)
    with pytest.raises(RuntimeError, match="head has no gradient while a CUDA graph"):
        optimizer.step()
    params[1].grad = torch.randn_like(params[1])
    with pytest.raises(RuntimeError, match="must repeat the one before"):
        optimizer.step()
    for param, old in zip(params, before):
        assert torch.equal(param, old)
    assert params[1] not in optimizer.state


CHANGES: list[dict[str, Any]] = [
    {"lr": 1e-1},
    {"lr": 0.0},
    {"momentum": 0.5},
    {"nesterov": True},
    {"weight_decay": 0.5},
    {"eps": 0.1},
    {"centering": 0.3},
    {"normalizer": "cdf"},
    {"maximize": True},
    {"nonfinite": "propagate"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_sync_hyperparameters_reaches_a_replay(
    change: dict[str, Any], device: torch.device
) -> None:
    """A replay runs the launches alone; options reach it through the device table."""
    params, twins = make_params(device), make_params(device)
    optimizer = BNGD(params, 1e-2, fused=True)
    eager = BNGD(twins, 1e-2, fused=False)
    for one, its in ((optimizer, params), (eager, twins)):
        take_steps(one, its, range(2))
        one.param_groups[0].update(change)
    step = optimizer._stepper.prepared
    assert step is not None
    optimizer.sync_hyperparameters()
    for place, (param, twin) in enumerate(zip(params, twins)):
        for one in (param, twin):
            one.grad.copy_(exact_gradient(one, 200 + place))
    # left alone unless it is to propagate
    params[-1].grad[3] = twins[-1].grad[3] = torch.inf
    assert step.point_at([param.grad.data_ptr() for param in params])
    step.run_again(optimizer._pass([True]))
    eager.step()
    # of an erf, which both have of their own
    bound = CDF if "normalizer" in change else 0.0
    same = {"rtol": 0.0, "atol": bound, "equal_nan": True}
    torch.testing.assert_close(params, twins, **same)
    torch.testing.assert_close(state_of(optimizer, params), state_of(eager, twins), **same)


def test_compiled_training_step(device: torch.device) -> None:
    """torch.compile breaks its graph at `step`, and compiles once under any schedule."""
    torch._dynamo.reset()
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    model = torch.nn.Linear(8, 8, device=device)
    optimizer = BNGD(model.parameters(), 1e-2, fused=True, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    @torch.compile(backend=backend)
    def train(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x = torch.randn(16, 8, device=device)
    losses = [float(train(x).detach())]
    losses += [float(train(x).detach())]
    after_two = compiled
    for _ in range(6):
        schedule.step()
        losses.append(float(train(x).detach()))
    assert compiled == after_two > 0
    assert losses[-1] < losses[0]

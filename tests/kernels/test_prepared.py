"""Steps laid out once: how many launches they take, and what may change between them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bngd_triton import BNGD
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.options import Options
from bngd_triton.records import StepTensor, new_record
from bngd_triton.verify.tolerances import GHAT, THETA
from support.closeness import assert_within
from support.kernel_cases import LR
from support.paths import StepPath


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_launches_do_not_grow(granularity: str, device: torch.device, launched: list[str]) -> None:
    """For one tensor, 10 and 300, in one group or one each, with options of every kind."""
    for n, per_group in ((1, 1), (10, 10), (10, 1), (300, 300), (300, 10)):
        params = [
            torch.randn(2, 8208, device=device) if i == 0 else torch.randn(16, device=device)
            for i in range(n)
        ]
        for param in params:
            param.grad = torch.randn_like(param)
        kinds = itertools.cycle(
            [{}, {"momentum": 0.0}, {"nesterov": True}, {"maximize": True}, {"normalizer": "cdf"}]
        )
        groups = [
            {"params": params[i : i + per_group], "lr": 1e-3 * (i + 1), **next(kinds)}
            for i in range(0, n, per_group)
        ]
        optimizer = BNGD(groups, granularity=granularity, fused=True)
        launched.clear()
        optimizer.step()
        words = ["tiles"] * (n > 1) + ["statistics", "update"]
        assert launched == [f"_{word}_kernel" for word in words], (n, per_group)


def test_launches_of_small_and_mixed_models(device: torch.device, launched: list[str]) -> None:
    def count(*shapes_and_dtypes: tuple[tuple[int, ...], torch.dtype]) -> int:
        params = [torch.randn(s, device=device).to(dtype) for s, dtype in shapes_and_dtypes]
        for param in params:
            param.grad = torch.randn_like(param)
        launched.clear()
        BNGD(params, fused=True).step()
        return len(launched)

    tiny, large = (100,), (9000,)
    assert count((tiny, torch.float32), (tiny, torch.float32)) == 1
    assert count((tiny, torch.float32), (large, torch.float32)) == 3
    assert count((large, torch.float32), (large, torch.bfloat16)) == 4


def test_several_steps_of_a_prepared_step(device: torch.device) -> None:
    """Gradients move, learning rates change, a group is frozen for a while."""
    shapes = [(300, 3), (40, 7), (5000,), (9,)]
    params = [torch.randn(shape, device=device) for shape in shapes]
    twins = [param.clone() for param in params]
    groups = ([params[:2], params[2:]], [twins[:2], twins[2:]])
    optimizers = [
        BNGD(
            [{"params": a, "lr": 1e-2}, {"params": b, "granularity": "row", "nesterov": True}],
            granularity="tensor",
            fused=fused,
            weight_decay=0.01,
        )
        for (a, b), fused in zip(groups, (True, False))
    ]
    for step in range(6):
        keep = []
        for param, twin in zip(params, twins):
            if step == 2 and param.dim() == 1:
                param.grad = twin.grad = None
                continue
            keep.append(torch.randn(step * 16, device=device))
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.7
            optimizer.step()
        for param, twin in zip(params, twins):
            # statistics one rounding apart, in a step of size lr, and a rounding of the parameter
            bound = 1e-2 * 8 * GHAT + 2 * THETA * twin.cpu().abs()
            assert_within(f"step {step}", param, twin.cpu(), bound)
            twin.copy_(param)


def test_a_parameter_moved_to_the_next_group_takes_its_options(path: StepPath) -> None:
    """In the lists themselves, which leaves the parameters' order and addresses as they were."""
    params = [torch.zeros(4, 4, device=path.device) for _ in range(3)]
    groups = [{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 8.0}]
    optimizer = BNGD(groups, momentum=0.0, eps=0.0, fused=path.fused)
    moved = params[1]
    for rate in (1.0, 1.0, 8.0):
        if rate == 8.0:
            first, second = (group["params"] for group in optimizer.param_groups)
            second.insert(0, first.pop())
        for param in params:
            param.grad = torch.randn_like(param)
        before = moved.clone()
        optimizer.step()
        rms = (moved - before).double().square().mean().sqrt()
        assert float(rms) == pytest.approx(rate, rel=1e-5)


def test_the_signature_of_a_step_tells_its_tensors_and_options_apart(device: torch.device) -> None:
    """A gradient may move, by multiples of an access; whatever else changes is laid out anew."""
    param, other, grad, momentum = torch.randn(4, 6, 6, device=device).unbind()
    odd = torch.randn(37, device=device)[1:].view(6, 6)
    groups = [Options(LR), Options(LR)]
    sign = FusedStep.sign
    record = new_record(6, device)

    def made(param: Tensor, grad: Tensor, momentum: Tensor | None, group: int) -> StepTensor:
        return StepTensor(param, grad, momentum, group, record)

    base = sign([made(param, grad, momentum, 0)], groups)
    assert sign([made(param, other, momentum, 0)], groups) == base
    assert sign([made(param, grad, momentum, 0)], [Options(1.0, eps=0.0), groups[1]]) == base
    for desc, one in (
        ("gradient off an access", made(param, odd, momentum, 0)),
        ("gradient's order", made(param, grad.T, momentum, 0)),
        ("gradient's dtype", made(param, grad.half(), momentum, 0)),
        ("parameter", made(other, grad, momentum, 0)),
        ("parameter's order", made(param.T, grad, momentum, 0)),
        ("momentum", made(param, grad, other, 0)),
        ("momentum's order", made(param, grad, momentum.T, 0)),
        ("no momentum", made(param, grad, None, 0)),
        ("group", made(param, grad, momentum, 1)),
    ):
        assert sign([one], groups) != base, desc
    for options in (
        Options(LR, granularity="tensor"), Options(LR, center_1d=True), Options(LR, momentum=0.0)
    ):  # fmt: skip
        assert sign([made(param, grad, momentum, 0)], [options, groups[1]]) != base, options


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"granularity": "tensor"}, "granularity of group 1"),
        ({"center_1d": True}, "center_1d of group 1"),
        ({"momentum": 0.0}, "momentum of group 1"),
        ({"accumulation_steps": 4}, "accumulation_steps of group 1"),
        ({"master_weights": None}, "master_weights of group 1"),
        ({"seed": 3}, "seed of group 1"),
        ({"nonfinite": "raise"}, "nonfinite='raise' of group 1"),
        (None, "2 groups were captured, there are 3 now"),
    ],
    ids=str,
)
def test_a_sync_refuses_what_no_replay_follows(
    change: dict[str, Any] | None, named: str, device: torch.device
) -> None:
    params = [torch.nn.Parameter(torch.randn(16, device=device)) for _ in range(3)]
    optimizer = BNGD([{"params": params[:1]}, {"params": params[1:2]}], fused=True)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    prepared = optimizer._stepper.prepared
    assert prepared is not None
    (part,) = prepared._devices
    before = part.table.clone()
    if change is None:
        optimizer.add_param_group({"params": params[2:]})
    else:
        # of another group, and one that a replay could follow
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.param_groups[1].update(change)
    with pytest.raises(RuntimeError, match=named):
        optimizer.sync_hyperparameters()
    assert torch.equal(part.table, before)
    optimizer.step()
    if change != {"nonfinite": "raise"}:
        optimizer.sync_hyperparameters()


def test_autograd_notices_the_write(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4, device=device))
    optimizer = BNGD([weight], fused=True)
    loss = (weight.sin() * weight).sum()
    weight.grad = torch.randn_like(weight)
    before = weight._version
    optimizer.step()
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

"""What users of torch.optim rely on, on both paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.verify.oracle import oracle_step
from support.paths import StepPath
from support.steps import (
    assert_close,
    assert_equal,
    make_grads,
    make_params,
    momenta,
    set_grads,
    take_steps,
    values,
)


def test_closure_runs_with_grad_enabled_and_its_loss_is_returned(path: StepPath) -> None:
    params = make_params(path.device)
    before = values(params)
    optimizer = BNGD(params, fused=path.fused)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True]
    assert loss.item() == pytest.approx(float(sum(p.square().sum() for p in before)))
    grads = [2 * value for value in before]
    assert_close(params, oracle_step(before, grads, [None] * 3)[0])


def test_step_without_closure_returns_none(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    set_grads(params, 0)
    assert optimizer.step() is None


def test_none_gradients_leave_parameter_momentum_and_state_alone(path: StepPath) -> None:
    params = make_params(path.device)
    # decay would show that a parameter without a gradient was moved
    optimizer = BNGD(params, lr=0.1, weight_decay=0.5, fused=path.fused)
    set_grads(params, 0)
    params[1].grad = None
    first = values(params)
    optimizer.step()
    assert_equal([params[1]], [first[1]])
    assert params[1] not in optimizer.state
    assert not torch.equal(params[0], first[0])

    take_steps(optimizer, params, [1])
    then, buffer = values(params), optimizer.state[params[1]]["momentum_buffer"].clone()
    params[1].grad = None
    optimizer.step()
    assert_equal([params[1], optimizer.state[params[1]]["momentum_buffer"]], [then[1], buffer])


def test_step_without_any_gradient_does_nothing(path: StepPath) -> None:
    params = make_params(path.device)
    before = values(params)
    optimizer = BNGD(params, weight_decay=0.5, fused=path.fused)
    optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_late_first_gradient_starts_as_in_a_new_optimizer(
    granularity: str, path: StepPath
) -> None:
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity, "fused": path.fused}
    params = make_params(path.device)
    optimizer = BNGD(params, **options)
    for seed in range(4):
        set_grads(params, seed)
        if seed < 2:
            params[0].grad = None
        optimizer.step()

    late = make_params(path.device)[:1]
    fresh = BNGD(late, **options)
    for seed in (2, 3):
        late[0].grad = make_grads(params, seed)[0]
        fresh.step()
    assert_equal(params[:1], late)
    assert_equal(momenta(optimizer, params[:1]), momenta(fresh, late))


def test_zero_grad_to_none(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    before = values(params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    optimizer.step()
    assert_equal(params, before)


def test_zero_grad_to_zeros_leaves_the_momentum_to_act(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    before, buffers = values(params), values(momenta(optimizer, params))
    addresses = [param.grad.data_ptr() for param in params]
    optimizer.zero_grad(set_to_none=False)
    assert [param.grad.data_ptr() for param in params] == addresses
    optimizer.step()
    # the default momentum is 0.9
    assert_close(params, [p.cpu().double() - 0.1 * 0.9 * m.cpu() for p, m in zip(before, buffers)])


def test_gradients_are_read_only(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, maximize=True, fused=path.fused)
    grads = values(set_grads(params, 0))
    optimizer.step()
    assert_equal([param.grad for param in params], grads)


def test_autograd_notices_the_step(path: StepPath) -> None:
    (param, *_) = make_params(path.device)
    optimizer = BNGD([param], fused=path.fused)
    loss = param.square().sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_stay_leaves_that_require_grad(path: StepPath) -> None:
    params = make_params(path.device)
    ids = [id(param) for param in params]
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    assert all(param.is_leaf and param.requires_grad for param in params)
    assert [id(param) for group in optimizer.param_groups for param in group["params"]] == ids


def test_automatic_path_on_the_cpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("kernels were used")

    monkeypatch.setattr("bngd_triton.engine.step.FusedStep", refuse)
    params = make_params(torch.device("cpu"))
    addresses = [param.data_ptr() for param in params]
    optimizer = BNGD(params)
    take_steps(optimizer, params, [0])
    # nothing is flattened for the reference
    assert [param.data_ptr() for param in params] == addresses


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
def test_empty_parameters(shape: tuple[int, ...], granularity: str, path: StepPath) -> None:
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity, "fused": path.fused}
    params = make_params(path.device)
    empty = Parameter(torch.empty(shape, device=path.device))
    optimizer = BNGD([params[0], empty, *params[1:]], **options)
    empty.grad = torch.empty_like(empty)
    take_steps(optimizer, params, [0, 1])
    assert empty.shape == shape

    without = make_params(path.device)
    take_steps(BNGD(without, **options), without, [0, 1])
    assert_equal(params, without)
    BNGD(params[:1], **options).load_state_dict(BNGD([empty], **options).state_dict())


def test_only_empty_parameters(path: StepPath) -> None:
    empty = Parameter(torch.empty(0, 3, device=path.device))
    optimizer = BNGD([empty], fused=path.fused)
    empty.grad = torch.empty_like(empty)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_scalar_parameter_moves_by_the_sign_of_its_gradient(
    granularity: str, path: StepPath
) -> None:
    param = Parameter(torch.tensor(2.0, device=path.device))
    options: dict[str, Any] = {"eps": 0.0, "momentum": 0.0, "center_1d": True}
    optimizer = BNGD([param], lr=0.5, granularity=granularity, fused=path.fused, **options)
    for gradient, expected in ((1e-30, 1.5), (-7.0, 2.0), (0.0, 2.0)):
        param.grad = torch.tensor(gradient, device=path.device)
        optimizer.step()
        assert param.item() == expected
    assert param.shape == ()


def test_without_momentum_there_is_no_state(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, momentum=0.0, fused=path.fused)
    take_steps(optimizer, params, [0, 1])
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_state_is_float32_momentum_and_a_master(dtype: torch.dtype, path: StepPath) -> None:
    masters = {torch.float16: ["master"], torch.bfloat16: ["master_remainder"], torch.float32: []}
    params = [Parameter(param.detach().to(dtype)) for param in make_params(path.device)]
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    for param in params:
        assert list(optimizer.state[param]) == ["momentum_buffer", *masters[dtype]]
        buffer = optimizer.state[param]["momentum_buffer"]
        assert (buffer.dtype, buffer.shape) == (torch.float32, param.shape)
        assert not buffer.requires_grad


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row", "normalizer": "cdf"}, {"granularity": "global", "nesterov": True}],
    ids=str,
)
def test_maximize_equals_negated_gradients_bit_for_bit(
    options: dict[str, Any], path: StepPath
) -> None:
    up, down = make_params(path.device), make_params(path.device)
    climb = BNGD(up, lr=0.1, maximize=True, fused=path.fused, **options)
    fall = BNGD(down, lr=0.1, fused=path.fused, **options)
    for seed in range(3):
        set_grads(up, seed)
        for param, grad in zip(down, make_grads(down, seed)):
            param.grad = -grad
        climb.step()
        fall.step()
    assert_equal(up, down)


def test_article_is_centred_without_momentum(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD.article(params, lr=0.1)
    expected = values(params)
    take_steps(optimizer, params, [0])
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "center_1d": True, "eps": 1e-8}
    options["granularity"] = "tensor"
    assert_close(params, oracle_step(expected, make_grads(params, 0), [None] * 3, **options)[0])
    assert {key: optimizer.param_groups[0][key] for key in options} == options


# the interpreter computes with NaN in NumPy
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_skipped_slices_are_counted(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, granularity="row", weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    assert optimizer.skipped == 0
    before = values([*params, *momenta(optimizer, params)])
    set_grads(params, 1)
    params[0].grad[1, 2] = math.nan
    params[0].grad[3, 0] = -math.inf
    params[1].grad[0] = math.inf
    optimizer.step()
    assert optimizer.skipped == 3
    after = [*params, *momenta(optimizer, params)]
    for index in (0, 3):
        assert_equal([after[index][[1, 3]]], [before[index][[1, 3]]])
        assert (after[index][[0, 2]] != before[index][[0, 2]]).all()
    assert_equal([after[1], after[4]], [before[1], before[4]])
    assert after[2] != before[2]

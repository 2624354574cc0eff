"""What users of torch.optim rely on, on both paths."""

import math

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.verify.oracle import oracle_step
from support import steps
from support.runs import start
from support.steps import assert_close, assert_equal, make_grads, make_params, take_steps, values


def test_closure_runs_with_grad_enabled_and_its_loss_is_returned(path):
    params, optimizer = start(path)
    before = values(params)
    seen = []

    def closure():
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


def test_none_gradients_leave_parameter_momentum_and_state_alone(path):
    # decay would show that a parameter without a gradient was moved
    params, optimizer = start(path, lr=0.1, weight_decay=0.5)
    steps.set_grads(params, 0)
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


def test_step_without_any_gradient_does_nothing(path):
    params, optimizer = start(path, weight_decay=0.5)
    before = values(params)
    assert optimizer.step() is None
    assert_equal(params, before)
    assert not optimizer.state
    take_steps(optimizer, params, [0])
    before = values(params)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(params, before)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_late_first_gradient_starts_as_in_a_new_optimizer(granularity, path):
    options = {"lr": 0.1, "granularity": granularity, "fused": path.fused}
    params, optimizer = start(path, **options)
    for seed in range(4):
        steps.set_grads(params, seed)
        if seed < 2:
            params[0].grad = None
        optimizer.step()

    late = make_params(path.device)[:1]
    fresh = BNGD(late, **options)
    for seed in (2, 3):
        late[0].grad = make_grads(params, seed)[0]
        fresh.step()
    assert_equal(params[:1], late)
    assert_equal(steps.momenta(optimizer, params[:1]), steps.momenta(fresh, late))


def test_gradients_are_read_only(path):
    params, optimizer = start(path, maximize=True)
    grads = values(steps.set_grads(params, 0))
    optimizer.step()
    assert_equal([param.grad for param in params], grads)


def test_autograd_notices_the_step(path):
    params, optimizer = start(path)
    loss = params[0].square().sum()
    take_steps(optimizer, params, [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_automatic_path_on_the_cpu_is_the_reference(monkeypatch):
    def refuse(*_):
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
def test_empty_parameters(shape, granularity, path):
    options = {"lr": 0.1, "granularity": granularity, "fused": path.fused}
    params = make_params(path.device)
    empty = Parameter(torch.empty(shape, device=path.device))
    optimizer = BNGD([params[0], empty, *params[1:]], **options)
    empty.grad = torch.empty_like(empty)
    take_steps(optimizer, params, [0, 1])
    assert empty.shape == shape

    without = make_params(path.device)
    take_steps(BNGD(without, **options), without, [0, 1])
    assert_equal(params, without)
    alone = BNGD([empty], **options)
    alone.step()
    alone.load_state_dict(alone.state_dict())
    alone.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_state_is_float32_momentum_and_a_master(dtype, path):
    masters = {torch.float16: ["master"], torch.bfloat16: ["master_remainder"], torch.float32: []}
    params, optimizer = start(path, dtype)
    take_steps(optimizer, params, [0])
    for param in params:
        assert list(optimizer.state[param]) == ["momentum_buffer", *masters[dtype]]
        buffer = optimizer.state[param]["momentum_buffer"]
        assert (buffer.dtype, buffer.shape) == (torch.float32, param.shape)
        assert not buffer.requires_grad


# the interpreter computes with NaN in NumPy
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_skipped_slices_are_counted(path):
    params, optimizer = start(path, granularity="row", weight_decay=0.1)
    take_steps(optimizer, params, [0])
    assert optimizer.skipped == 0
    before = values([*params, *steps.momenta(optimizer, params)])
    steps.set_grads(params, 1)
    params[0].grad[1, 2] = math.nan
    params[0].grad[3, 0] = -math.inf
    params[1].grad[0] = math.inf
    optimizer.step()
    assert optimizer.skipped == 3
    after = [*params, *steps.momenta(optimizer, params)]
    for index in (0, 3):
        assert_equal([after[index][[1, 3]]], [before[index][[1, 3]]])
        assert (after[index][[0, 2]] != before[index][[0, 2]]).all()
    assert_equal([after[1], after[4]], [before[1], before[4]])
    assert after[2] != before[2]

"""Parameters and gradients whose memory, strides or dtype change between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
    take_steps,
    values,
)


def test_a_swapped_storage_is_noticed(path: StepPath) -> None:
    swapped, kept = make_params(path.device), make_params(path.device)
    a, b = (BNGD(p, lr=0.1, fused=path.fused) for p in (swapped, kept))
    take_steps(a, swapped, [0])
    take_steps(b, kept, [0])
    old = [param.data for param in swapped]
    for param in swapped:
        param.data = param.data.clone()
    frozen = values(old)
    take_steps(a, swapped, [1])
    take_steps(b, kept, [1])
    assert_equal(swapped, kept)
    assert_equal(old, frozen)


def test_new_values_assigned_to_data_are_used(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    fresh, buffers = [torch.randn_like(p) for p in params], values(momenta(optimizer, params))
    for param, value in zip(params, fresh):
        param.data = value.clone()
    take_steps(optimizer, params, [1])
    assert_close(params, oracle_step(fresh, make_grads(fresh, 1), buffers, lr=0.1)[0])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_other_strides_at_the_same_address_are_noticed(granularity: str, path: StepPath) -> None:
    # square, so that the transposed view has the same shape, address and entries
    param = Parameter(torch.randn(6, 6, device=path.device))
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity}
    optimizer = BNGD([param], fused=path.fused, **options)
    expected, buffers = values([param]), [None]
    for seed in range(3):
        if seed == 1:
            param.grad = None
            param.data = param.data.t()
            expected = [expected[0].t()]
        grads = make_grads([param], seed)
        expected, buffers = oracle_step(expected, grads, buffers, **options)
        param.grad = grads[0]
        optimizer.step()
    assert_close([param, *momenta(optimizer, [param])], [*expected, *buffers])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_gradient_of_other_strides_at_the_same_address_is_noticed(
    granularity: str, path: StepPath
) -> None:
    (param,) = (Parameter(torch.randn(6, 6, device=path.device)),)
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity}
    optimizer = BNGD([param], fused=path.fused, **options)
    expected, buffers = values([param]), [None]
    memory = torch.randn(6, 6, device=path.device)
    for view in (memory, memory.t(), memory):
        param.grad = view
        expected, buffers = oracle_step(expected, [view], buffers, **options)
        optimizer.step()
    assert_close([param], expected)


def test_gradients_that_change_memory_in_every_step(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    expected, buffers, kept = values(params), [None] * 3, []
    shifts = [lambda g: g.clone(), lambda g: g.t().clone().t() if g.dim() == 2 else g.clone()]
    shifts.append(lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape))
    for seed, shift in enumerate([*shifts, *shifts]):
        grads = [shift(grad) for grad in make_grads(params, seed)]
        # kept alive, so that no address is used twice
        kept += grads
        for param, grad in zip(params, grads):
            param.grad = grad
        expected, buffers = oracle_step(expected, grads, buffers, lr=0.1)
        optimizer.step()
    assert_close(params, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gradient_of_another_dtype_is_noticed(dtype: torch.dtype, path: StepPath) -> None:
    params = make_params(path.device)
    # the kernels do not read float64: those gradients need the choice left open
    fused = None if dtype == torch.float64 else path.fused
    optimizer = BNGD(params, lr=0.1, fused=fused)
    expected, buffers = values(params), [None] * 3
    for seed in range(3):
        grads = make_grads(params, seed)
        if seed == 1:
            grads = [grad.to(dtype) for grad in grads]
        for param, grad in zip(params, grads):
            param.grad = grad.to(param.dtype)
            param.grad.data = grad
        expected, buffers = oracle_step(expected, grads, buffers, lr=0.1)
        optimizer.step()
    assert_close(params, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_cast_to_another_dtype_steps_on(dtype: torch.dtype, path: StepPath) -> None:
    model = torch.nn.Linear(5, 4).to(path.device)
    params = list(model.parameters())
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    model.to(dtype)
    start, buffers = values(params), values(momenta(optimizer, params))
    grads = make_grads(params, 1)
    take_steps(optimizer, params, [1])
    expected, moved = oracle_step(start, grads, buffers, lr=0.1)
    # one unit of the storage type for values below 1: a GPU rounds, the interpreter truncates
    assert_close(params, expected, atol=torch.finfo(dtype).eps)
    assert_close(momenta(optimizer, params), moved)
    assert all(buffer.dtype == torch.float32 for buffer in momenta(optimizer, params))


def test_a_gradient_wider_than_the_kernels_is_refused_by_name(device: torch.device) -> None:
    param = Parameter(torch.ones(3, device=device))
    optimizer = BNGD([("bias", param)], lr=0.1, fused=True)
    param.grad = torch.ones_like(param)
    param.grad.data = param.grad.double()
    with pytest.raises(RuntimeError, match=r"fused=True cannot serve bias .* got torch.float64"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    assert not optimizer.state


def test_momentum_wider_than_the_kernels_is_served(device: torch.device) -> None:
    # a float64 model trained eagerly, then cast: its momentum stays float64
    model = torch.nn.Linear(5, 4).to(device, torch.float64)
    params = list(model.parameters())
    optimizer = BNGD(params, lr=0.1)
    take_steps(optimizer, params, [0])
    model.float()
    start, buffers = values(params), values(momenta(optimizer, params))
    optimizer.fused = True
    with pytest.raises(RuntimeError, match="fused=True cannot serve"):
        take_steps(optimizer, params, [1])
    optimizer.fused = None
    take_steps(optimizer, params, [1])
    assert_close(params, oracle_step(start, make_grads(start, 1), buffers, lr=0.1)[0])

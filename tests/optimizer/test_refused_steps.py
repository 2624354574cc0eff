"""Steps that are refused, and change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from support.paths import StepPath
from support.snapshots import snapshot
from support.steps import (
    assert_equal,
    make_params,
    momenta,
    set_grads,
    take_steps,
)


class BadStep(NamedTuple):
    # what happens to the second group's matrix, whose gradient is set
    spoil: Callable[[Parameter, BNGD], None]
    error: type[Exception]
    match: str
    # refused by the kernels only; the reference serves it
    fused_only: bool = False
    # the case needs momentum to be there
    later: bool = False


def sparse_gradient(param: Parameter, _: BNGD) -> None:
    param.grad = torch.ones_like(param).to_sparse()


def complex_gradient(param: Parameter, _: BNGD) -> None:
    param.grad.data = torch.ones_like(param, dtype=torch.complex64)


def integer_gradient(param: Parameter, _: BNGD) -> None:
    param.grad.data = torch.ones_like(param, dtype=torch.int32)


def gradient_of_another_shape(param: Parameter, _: BNGD) -> None:
    param.grad.data = torch.ones(3, 4, device=param.device)


def parameter_of_another_shape(param: Parameter, _: BNGD) -> None:
    param.data = torch.ones(2, 3, device=param.device)


def momentum_of_another_shape(param: Parameter, _: BNGD) -> None:
    param.data = torch.ones(2, 3, device=param.device)
    param.grad = torch.ones_like(param)


def integer_momentum(param: Parameter, optimizer: BNGD) -> None:
    optimizer.state[param]["momentum_buffer"] = torch.ones_like(param, dtype=torch.int64)


def expanded_parameter(param: Parameter, _: BNGD) -> None:
    param.data = torch.ones(1, 3, device=param.device).expand(4, 3)


def integer_parameter(param: Parameter, _: BNGD) -> None:
    param.requires_grad_(False)
    param.data = param.data.long()


def wide_parameter(param: Parameter, _: BNGD) -> None:
    param.data = param.data.double()
    param.grad = torch.ones_like(param)


def nonfinite_gradient(value: float) -> Callable[[Parameter, BNGD], None]:
    def spoil(param: Parameter, optimizer: BNGD) -> None:
        optimizer.param_groups[1]["nonfinite"] = "raise"
        param.grad[2, 1] = value

    return spoil


BAD_STEPS = [
    BadStep(sparse_gradient, TypeError, r"gradient of {name} is torch\.sparse_coo"),
    BadStep(complex_gradient, TypeError, r"gradient of {name} has .*complex64"),
    BadStep(integer_gradient, TypeError, r"gradient of {name} has .*int32"),
    BadStep(
        gradient_of_another_shape, ValueError,
        r"gradient of {name} has shape \(3, 4\), the parameter \(4, 3\)",
    ),
    BadStep(
        parameter_of_another_shape, ValueError,
        r"gradient of {name} has shape \(4, 3\), the parameter \(2, 3\)",
    ),
    BadStep(
        momentum_of_another_shape, ValueError,
        r"momentum buffer of {name} has shape \(4, 3\), the parameter \(2, 3\)", later=True,
    ),
    BadStep(
        integer_momentum, TypeError, r"momentum buffer of {name} has dtype torch\.int64", later=True
    ),
    BadStep(expanded_parameter, ValueError, r"{name} overlaps itself"),
    BadStep(integer_parameter, TypeError, r"{name} has dtype torch\.int64"),
    BadStep(
        wide_parameter, RuntimeError, r"fused=True cannot serve {name}: .*float64", fused_only=True
    ),
]  # fmt: skip
BAD_STEPS += [
    BadStep(
        nonfinite_gradient(value),
        FloatingPointError,
        r"gradient of {name} has an inf or a NaN; nothing was changed",
    )
    for value in (math.nan, math.inf, -math.inf)
]


@pytest.mark.parametrize("names", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize(
    ("bad", "steps"),
    [
        pytest.param(bad, steps, id=f"{bad.spoil.__name__}-after_{steps}")
        for bad in BAD_STEPS
        for steps in (0, 1)
        if steps or not bad.later
    ],
)
def test_step_refuses_and_changes_nothing(
    bad: BadStep, names: bool, steps: int, path: StepPath
) -> None:
    first, second = make_params(path.device), make_params(path.device)
    everything = [*first, *second]
    groups: list[dict[str, Any]] = [{"params": first}, {"params": second[::-1]}]
    if names:
        groups[0]["params"] = [(f"first.{i}", param) for i, param in enumerate(first)]
        groups[1]["params"] = [(f"second.{i}", param) for i, param in enumerate(second[::-1])]
    optimizer = BNGD(groups, lr=0.1, weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, everything, range(steps))
    set_grads(everything, 9)
    bad.spoil(second[0], optimizer)
    if bad.fused_only and not path.fused:
        optimizer.step()
        return
    before = snapshot(optimizer, everything)
    name = r"second\.2" if names else r"param_groups\[1\]\['params'\]\[2\]"
    with pytest.raises(bad.error, match=bad.match.replace("{name}", name)):
        optimizer.step()
    assert snapshot(optimizer, everything) == before
    assert optimizer.skipped == 0


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_a_refused_nonfinite_step_leaves_the_run_as_if_it_never_was(
    granularity: str, path: StepPath
) -> None:
    options: dict[str, Any] = {"lr": 0.1, "granularity": granularity, "nonfinite": "raise"}
    hit, spared = make_params(path.device), make_params(path.device)
    a, b = (BNGD(params, fused=path.fused, **options) for params in (hit, spared))
    for seed in range(3):
        set_grads(hit, 50 + seed)
        hit[1].grad[3] = math.inf
        with pytest.raises(FloatingPointError, match=r"\['params'\]\[1\]"):
            a.step()
        take_steps(a, hit, [seed])
        take_steps(b, spared, [seed])
    assert_equal(hit, spared)
    assert_equal(momenta(a, hit), momenta(b, spared))


def test_a_parameter_whose_memory_was_freed_is_refused(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused, flatten=False)
    set_grads(params, 0)
    before = snapshot(optimizer, params[1:])
    params[0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"\[0\], .* storage of 0 bytes and needs 48; bring"):
        optimizer.step()
    assert snapshot(optimizer, params[1:]) == before

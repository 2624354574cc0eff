"""Parameters and steps that are refused, and change nothing."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from support.runs import everything, refused, start
from support.steps import assert_equal, make_params, set_grads, take_steps


def test_duplicate_parameters_are_refused(path):
    params, optimizer = start(path)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        BNGD([params[0], params[0]], fused=path.fused)
    more = make_params(path.device)
    match = "more than one parameter group"
    with refused(ValueError, match, optimizer, [*params, *more]):
        optimizer.add_param_group({"params": [*more, params[1]]})


# float tensors that the reference serves, and the kernels do not
NOT_FUSED = {
    r".*float16, bfloat16, float32, got torch\.float64; use": lambda: torch.ones(3).double(),
    ".*meta": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("why", NOT_FUSED)
def test_fused_refuses_a_parameter_that_kernels_do_not_serve(why, device):
    offender = Parameter(NOT_FUSED[why]())
    BNGD([offender], fused=False)
    params, more = make_params(device), make_params(device)
    match = rf"^fused=True cannot serve {{}}: {why}"
    place = r"param_groups\[{}\]\['params'\]\[3\]"
    with refused(RuntimeError, match.format(place.format(0)), None, params):
        BNGD([*params, offender], fused=True)
    with refused(RuntimeError, match.format("odd one"), None, params):
        BNGD(zip(["a", "b", "c", "odd one"], [*params, offender]), fused=True)
    optimizer = BNGD(params, fused=True)
    take_steps(optimizer, params, [0])
    with refused(RuntimeError, match.format(place.format(1)), optimizer, [*params, *more]):
        optimizer.add_param_group({"params": [*more, offender]})
    take_steps(optimizer, params, [1])


def test_global_granularity_refuses_two_devices(device):
    params = [*make_params(device), Parameter(torch.ones(3, device="meta"))]
    match = rf"granularity='global' needs .* one device, got {device.type}.*meta"
    with refused(ValueError, match, None, params):
        BNGD(params, granularity="global")
    optimizer = BNGD(params)
    optimizer.param_groups[0]["granularity"] = "global"
    set_grads(params, 0)
    with refused(ValueError, match, optimizer, params):
        optimizer.step()


class BadStep(NamedTuple):
    desc: str
    # what happens to the second group's matrix, whose gradient is set
    spoil: Callable[[Parameter, BNGD], Any]
    match: str
    error: type[Exception] = ValueError
    # refused by the kernels only; the reference serves it
    fused_only: bool = False
    # the case needs momentum to be there
    later: bool = False


def with_gradient(change):
    def spoil(param, _):
        # torch checks shape and dtype only on assignment
        param.grad.data = change(torch.ones_like(param))

    return spoil


def sparse_gradient(param, _):
    param.grad = torch.ones_like(param).to_sparse()


def other_shape(param, _):
    param.data = torch.ones(2, 3, device=param.device)


def other_momentum(param, _):
    param.data = torch.ones(2, 3, device=param.device)
    param.grad = torch.ones_like(param)


def integer_momentum(param, optimizer):
    optimizer.state[param]["momentum_buffer"] = torch.ones_like(param, dtype=torch.int64)


def expanded_parameter(param, _):
    param.data = torch.ones(1, 3, device=param.device).expand(4, 3)


def integer_parameter(param, _):
    param.requires_grad_(False)
    param.data = param.data.long()


def wide_parameter(param, _):
    param.data = param.data.double()
    param.grad = torch.ones_like(param)


def nonfinite_gradient(value):
    def spoil(param, optimizer):
        optimizer.param_groups[1]["nonfinite"] = "raise"
        param.grad[2, 1] = value

    return spoil


WIDE, TALL = r"\(3, 4\)", r"\(4, 3\)"
GRADIENT, MOMENTUM = "gradient of {name} has", "momentum buffer of {name} has"
BAD_STEPS = [
    BadStep("sparse_gradient", sparse_gradient, r"of {name} is torch\.sparse_coo", TypeError),
    BadStep("complex", with_gradient(Tensor.cfloat), f"{GRADIENT} .*complex64", TypeError),
    BadStep("integer", with_gradient(Tensor.int), f"{GRADIENT} .*int32", TypeError),
    BadStep("other_gradient", with_gradient(Tensor.t), rf"{GRADIENT} shape {WIDE}, .* {TALL}$"),
    BadStep("other_parameter", other_shape, rf"{GRADIENT} shape {TALL}, .* \(2, 3\)$"),
    BadStep("other_both", other_momentum, rf"{MOMENTUM} shape {TALL}, .* \(2, 3\)$", later=True),
    BadStep("momentum", integer_momentum, rf"{MOMENTUM} .*int64", TypeError, later=True),
    BadStep("expanded", expanded_parameter, "{name} overlaps itself"),
    BadStep("integer_parameter", integer_parameter, r"{name} has dtype torch\.int64", TypeError),
    BadStep("wide", wide_parameter, "serve {name}: .*float64", RuntimeError, fused_only=True),
]  # fmt: skip
BAD_STEPS += [
    BadStep(str(value), nonfinite_gradient(value), f"{GRADIENT} an inf or a NaN; nothing was chang",
            FloatingPointError)
    for value in (math.nan, math.inf, -math.inf)
]  # fmt: skip


@pytest.mark.parametrize("names", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("bad", BAD_STEPS, ids=lambda bad: bad.desc)
def test_step_refuses_and_changes_nothing(bad, steps, names, path):
    if bad.later and not steps:
        pytest.skip("there is no momentum yet")
    first, second = make_params(path.device), make_params(path.device)
    params = [*first, *second]
    groups = [{"params": first}, {"params": second[::-1]}]
    if names:
        groups[0]["params"] = [(f"first.{i}", param) for i, param in enumerate(first)]
        groups[1]["params"] = [(f"second.{i}", param) for i, param in enumerate(second[::-1])]
    optimizer = BNGD(groups, lr=0.1, weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, params, range(steps))
    set_grads(params, 9)
    bad.spoil(second[0], optimizer)
    if bad.fused_only and not path.fused:
        optimizer.step()
        return
    name = r"second\.2" if names else r"param_groups\[1\]\['params'\]\[2\]"
    with refused(bad.error, bad.match.replace("{name}", name), optimizer, params):
        optimizer.step()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_a_refused_nonfinite_step_leaves_the_run_as_if_it_never_was(granularity, path):
    options = {"lr": 0.1, "granularity": granularity, "nonfinite": "raise"}
    (hit, a), (spared, b) = (start(path, **options) for _ in range(2))
    for seed in range(3):
        set_grads(hit, 50 + seed)
        hit[1].grad[3] = math.inf
        with pytest.raises(FloatingPointError, match=r"\['params'\]\[1\]"):
            a.step()
        take_steps(a, hit, [seed])
        take_steps(b, spared, [seed])
    assert_equal(everything(a, hit), everything(b, spared))


def test_a_parameter_whose_memory_was_freed_is_refused(path):
    params, optimizer = start(path, lr=0.1, flatten=False)
    set_grads(params, 0)
    params[0].untyped_storage().resize_(0)
    match = r"\[0\], .* storage of 0 bytes and needs 48; bring"
    with refused(ValueError, match, optimizer, params[1:]):
        optimizer.step()

"""Parameters that are refused, by the constructor and by `add_param_group`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from support.paths import StepPath
from support.snapshots import snapshot
from support.steps import (
    make_params,
    set_grads,
    take_steps,
)


def test_duplicate_parameters_are_refused(path: StepPath) -> None:
    param = Parameter(torch.ones(3, device=path.device))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        BNGD([param, param], fused=path.fused)


class BadParameter(NamedTuple):
    desc: str
    make: Callable[[], Tensor]
    match: str


# float tensors that the reference serves, and the kernels do not
NOT_FUSED = [
    BadParameter(
        "float64",
        lambda: Parameter(torch.ones(3, dtype=torch.float64)),
        r".*float16, bfloat16, float32, got torch\.float64; use",
    ),
    BadParameter("meta", lambda: Parameter(torch.ones(3, device="meta")), r".*meta"),
]


@pytest.mark.parametrize("way", ["constructor", "named", "add_param_group"])
@pytest.mark.parametrize("bad", NOT_FUSED, ids=[bad.desc for bad in NOT_FUSED])
def test_fused_refuses_a_parameter_that_kernels_do_not_serve(
    bad: BadParameter, way: str, device: torch.device
) -> None:
    BNGD([bad.make()], fused=False)
    params, more = make_params(device), make_params(device)
    offender = bad.make()
    index = {"constructor": 0, "named": 0, "add_param_group": 1}[way]
    name = "odd one" if way == "named" else rf"param_groups\[{index}\]\['params'\]\[3\]"
    match = f"^fused=True cannot serve {name}: {bad.match}"
    if way == "add_param_group":
        optimizer = BNGD(params, fused=True)
        take_steps(optimizer, params, [0])
        before = snapshot(optimizer, [*params, *more])
        with pytest.raises(RuntimeError, match=match):
            optimizer.add_param_group({"params": [*more, offender]})
        assert snapshot(optimizer, [*params, *more]) == before
        take_steps(optimizer, params, [1])
        return
    before = snapshot(None, params)
    given: list[Any] = [*params, offender]
    if way == "named":
        given = list(zip(["a", "b", "c", "odd one"], given))
    with pytest.raises(RuntimeError, match=match):
        BNGD(given, fused=True)
    assert snapshot(None, params) == before


def test_add_param_group_refuses_known_parameters(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params[:2], fused=path.fused)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[1:]})
    assert snapshot(optimizer, params) == before


@pytest.mark.parametrize("way", ["constructor", "step"])
def test_global_granularity_refuses_two_devices(way: str, device: torch.device) -> None:
    params = [*make_params(device), Parameter(torch.ones(3, device="meta"))]
    before = snapshot(None, params)
    match = rf"granularity='global' needs .* one device, got {device.type}.*meta"
    if way == "constructor":
        with pytest.raises(ValueError, match=match):
            BNGD(params, granularity="global")
        assert snapshot(None, params) == before
        return
    optimizer = BNGD(params)
    optimizer.param_groups[0]["granularity"] = "global"
    set_grads(params, 0)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert snapshot(optimizer, params) == before

"""Parameters that are refused, by the constructor and by `add_param_group`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from paths import StepPath
from snapshots import snapshot
from steps import (
    make_params,
    set_grads,
    take_steps,
)
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD


def test_duplicate_parameters_are_refused(path: StepPath) -> None:
    param = Parameter(torch.ones(3, device=path.device))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        BNGD([param, param], fused=path.fused)


def test_parameters_that_overlap_themselves_are_refused(path: StepPath) -> None:
    memory = torch.zeros(6, device=path.device)
    for view in (memory.as_strided((3, 3), (1, 1)), memory[:1].expand(4)):
        with pytest.raises(ValueError, match="overlaps itself in memory"):
            BNGD([view], fused=path.fused)


def no_grad(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)


class BadParameter(NamedTuple):
    desc: str
    make: Callable[[], Tensor]
    error: type[Exception]
    match: str
    # refused by the kernels only; the reference serves it
    fused_only: bool = False


FLOAT8 = "torch.float8_e4m3fn"
BAD_PARAMETERS = [
    BadParameter(
        "integer", lambda: no_grad(torch.ones(3).long()), TypeError, r"has dtype torch\.int64"
    ),
    BadParameter("bool", lambda: no_grad(torch.ones(3).bool()), TypeError, r"dtype torch\.bool"),
    BadParameter(
        "float8",
        lambda: no_grad(torch.ones(3).to(torch.float8_e4m3fn)),
        TypeError,
        r"dtype torch\.float8_e4m3fn; BNGD takes float16, bfloat16, float32, float64",
    ),
    BadParameter(
        "complex",
        lambda: Parameter(torch.ones(3, dtype=torch.complex64)),
        TypeError,
        r"dtype torch\.complex64.*view_as_real",
    ),
    BadParameter(
        "sparse",
        lambda: no_grad(torch.eye(3).to_sparse()),
        TypeError,
        r"is torch\.sparse_coo; BNGD needs dense",
    ),
    BadParameter(
        "float64_fused",
        lambda: Parameter(torch.ones(3, dtype=torch.float64)),
        RuntimeError,
        r"fused=True cannot serve {name}: .*float16, bfloat16, float32, got torch\.float64; use",
        fused_only=True,
    ),
    BadParameter(
        "meta_fused",
        lambda: Parameter(torch.ones(3, device="meta")),
        RuntimeError,
        r"fused=True cannot serve {name}: .*meta",
        fused_only=True,
    ),
]


@pytest.mark.parametrize("way", ["constructor", "named", "add_param_group"])
@pytest.mark.parametrize("bad", BAD_PARAMETERS, ids=[bad.desc for bad in BAD_PARAMETERS])
def test_refuses_parameter(bad: BadParameter, way: str, path: StepPath) -> None:
    if bad.fused_only and not path.fused:
        BNGD([bad.make()], fused=path.fused)
        return
    params, more = make_params(path.device), make_params(path.device)
    offender = bad.make()
    index = {"constructor": 0, "named": 0, "add_param_group": 1}[way]
    name = "odd one" if way == "named" else rf"param_groups\[{index}\]\['params'\]\[3\]"
    match = bad.match.format(name=name) if "{name}" in bad.match else rf"^{name} .*{bad.match}"
    if way == "add_param_group":
        optimizer = BNGD(params, fused=path.fused)
        take_steps(optimizer, params, [0])
        before = snapshot(optimizer, [*params, *more])
        with pytest.raises(bad.error, match=match):
            optimizer.add_param_group({"params": [*more, offender]})
        assert snapshot(optimizer, [*params, *more]) == before
        take_steps(optimizer, params, [1])
        return
    before = snapshot(None, params)
    given: list[Any] = [*params, offender]
    if way == "named":
        given = list(zip(["a", "b", "c", "odd one"], given))
    with pytest.raises(bad.error, match=match):
        BNGD(given, fused=path.fused)
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

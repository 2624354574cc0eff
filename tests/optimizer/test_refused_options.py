"""Options that are refused, wherever they are given."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bngd_triton import BNGD, reference
from bngd_triton.kernels import fused_step_
from support.paths import StepPath
from support.snapshots import snapshot
from support.steps import (
    make_params,
    set_grads,
    take_steps,
)


def test_flatten_true_is_an_error_where_the_kernels_do_not_serve() -> None:
    with pytest.raises(RuntimeError, match=r"flatten=True cannot move .* do not serve it"):
        BNGD([torch.nn.Parameter(torch.zeros(3))], flatten=True, fused=False)


class BadOption(NamedTuple):
    options: dict[str, Any]
    error: type[Exception]
    match: str


BAD_OPTIONS = [
    BadOption({"lr": -1.0}, ValueError, r"lr must be >= 0.*, got -1\.0"),
    BadOption({"lr": math.nan}, ValueError, r"lr must be >= 0 and finite, got nan"),
    BadOption({"lr": math.inf}, ValueError, r"lr must be >= 0 and finite, got inf"),
    BadOption({"maximize": "no"}, TypeError, r"maximize must be True or False, got 'no'"),
    BadOption({"nesterov": None}, TypeError, "nesterov must be True or False, got None"),
    BadOption({"center_1d": 2}, TypeError, "center_1d must be True or False, got 2"),
    BadOption({"lr": True}, TypeError, r"lr must be a number, got True"),
    BadOption({"lr": "0.1"}, TypeError, r"lr must be a number, got '0\.1'"),
    BadOption({"lr": None}, TypeError, r"lr must be a number, got None"),
    BadOption({"lr": 1j}, TypeError, r"lr must be a number, got 1j"),
    BadOption({"lr": torch.tensor([0.1])}, ValueError, r"lr must be .* 0-dim .* shape \(1,\)"),
    BadOption({"lr": torch.tensor(1)}, ValueError, r"lr must be .* floating .*torch\.int64"),
    BadOption({"lr": torch.tensor(-0.5)}, ValueError, r"lr must be >= 0.*, got -0\.5"),
    BadOption({"lr": torch.tensor(math.nan)}, ValueError, r"lr must be >= 0.*, got nan"),
    BadOption({"momentum": -0.1}, ValueError, r"momentum must be >= 0 and < 1, got -0\.1"),
    BadOption({"momentum": 1.0}, ValueError, r"momentum must be >= 0 and < 1, got 1\.0"),
    BadOption({"momentum": math.nan}, ValueError, r"momentum must be >= 0 and < 1, got nan"),
    BadOption({"momentum": math.inf}, ValueError, r"momentum must be >= 0 and < 1, got inf"),
    BadOption({"momentum": False}, TypeError, r"momentum must be a number, got False"),
    BadOption({"momentum": (0.9, 0.99)}, TypeError, r"momentum must be a number, got \(0\.9"),
    BadOption({"weight_decay": -0.1}, ValueError, r"weight_decay must be >= 0.*, got -0\.1"),
    BadOption({"weight_decay": math.nan}, ValueError, r"weight_decay must be >= 0.*, got nan"),
    BadOption({"weight_decay": math.inf}, ValueError, r"weight_decay must be >= 0.*, got inf"),
    BadOption({"weight_decay": "0"}, TypeError, r"weight_decay must be a number, got '0'"),
    BadOption({"eps": -1e-8}, ValueError, r"eps must be >= 0.*, got -1e-08"),
    BadOption({"eps": math.nan}, ValueError, r"eps must be >= 0.*, got nan"),
    BadOption({"eps": math.inf}, ValueError, r"eps must be >= 0.*, got inf"),
    BadOption({"eps": None}, TypeError, r"eps must be a number, got None"),
    BadOption({"centering": -0.1}, ValueError, r"centering must be >= 0 and <= 1, got -0\.1"),
    BadOption({"centering": 1.1}, ValueError, r"centering must be >= 0 and <= 1, got 1\.1"),
    BadOption({"centering": math.nan}, ValueError, r"centering must be >= 0 and <= 1, got nan"),
    BadOption({"centering": True}, TypeError, r"centering must be a number, got True"),
    BadOption(
        {"granularity": "column"},
        ValueError,
        r"granularity must be one of 'tensor', 'row', 'global', got 'column'",
    ),
    BadOption(
        {"normalizer": "minmax"},
        ValueError,
        r"normalizer must be one of 'zscore', 'cdf', got 'minmax'",
    ),
    BadOption(
        {"nonfinite": "ignore"},
        ValueError,
        r"nonfinite must be one of 'skip', 'propagate', 'raise', got 'ignore'",
    ),
    BadOption(
        {"lr": 0.5, "weight_decay": 2.0},
        ValueError,
        r"lr \* weight_decay must be < 1.*got lr=0\.5 and weight_decay=2",
    ),
    BadOption(
        {"lr": torch.tensor(0.5), "weight_decay": 3.0},
        ValueError,
        r"lr \* weight_decay must be < 1",
    ),
    BadOption(
        {"nesterov": True, "momentum": 0.0}, ValueError, r"nesterov needs momentum > 0, got .*0\.0"
    ),
]
bad_options = pytest.mark.parametrize(
    "bad",
    BAD_OPTIONS,
    ids=[", ".join(f"{k}={v}" for k, v in b.options.items()) for b in BAD_OPTIONS],
)


@bad_options
@pytest.mark.parametrize("where", ["defaults", "group"])
def test_constructor_refuses_option(bad: BadOption, where: str, path: StepPath) -> None:
    params = make_params(path.device)
    before = snapshot(None, params)
    defaults = bad.options if where == "defaults" else {}
    group = bad.options if where == "group" else {}
    with pytest.raises(bad.error, match=bad.match):
        BNGD([{"params": params, **group}], fused=path.fused, **defaults)
    assert snapshot(None, params) == before


@bad_options
def test_add_param_group_refuses_option(bad: BadOption, path: StepPath) -> None:
    params, more = make_params(path.device), make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    before = snapshot(optimizer, [*params, *more])
    with pytest.raises(bad.error, match=bad.match):
        optimizer.add_param_group({"params": more, **bad.options})
    assert snapshot(optimizer, [*params, *more]) == before
    # and the parameters may still be added
    optimizer.add_param_group({"params": more})


@bad_options
@pytest.mark.parametrize("steps", [0, 1], ids=["first_step", "second_step"])
def test_step_refuses_option_changed_since(bad: BadOption, steps: int, path: StepPath) -> None:
    params, more = make_params(path.device), make_params(path.device)
    optimizer = BNGD([{"params": params}, {"params": more}], fused=path.fused)
    take_steps(optimizer, [*params, *more], range(steps))
    set_grads([*params, *more], 9)
    # the last group is the bad one: the first must not have moved either
    optimizer.param_groups[1].update(bad.options)
    before = snapshot(optimizer, [*params, *more])
    with pytest.raises(bad.error, match=bad.match):
        optimizer.step()
    assert str(snapshot(optimizer, [*params, *more])) == str(before)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_rate_that_would_turn_parameters_round_is_refused(steps: int, path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=1e-3, weight_decay=10.0, fused=path.fused)
    take_steps(optimizer, params, range(steps))
    set_grads(params, 9)
    optimizer.param_groups[0]["lr"] = 0.1
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be < 1"):
        optimizer.step()
    assert str(snapshot(optimizer, params)) == str(before)
    optimizer.param_groups[0]["lr"] = 0.0999
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"betas": (0.9, 0.99)}, r"no option betas; write momentum=betas\[0\]"),
        ({"foreach": True}, "no option foreach; leave it out"),
        ({"capturable": True}, "no option capturable; leave it out"),
        ({"dampening": 0.1}, "no option dampening; leave it out"),
        ({"granularty": "row"}, r"no option granularty; did you mean granularity\?"),
        ({"Momentum": 0.5}, r"no option Momentum; did you mean momentum\?"),
        ({"rho": 0.5}, "no option rho; it has lr, momentum, nesterov"),
    ],
)
def test_what_is_no_option_is_refused_with_what_to_write(
    options: dict[str, Any], match: str
) -> None:
    with pytest.raises(TypeError, match=match):
        BNGD(make_params(torch.device("cpu")), **options)


def test_options_by_position_are_refused() -> None:
    params: Any = make_params(torch.device("cpu"))
    with pytest.raises(TypeError, match=r"got also 0\.01; write options by their names"):
        BNGD(params, 1e-3, 0.9, 0.01)


@pytest.mark.parametrize("name", [
    "weightdecay", "weight_decays", "weight_decay_", "granularty", "LR", "centring",
])  # fmt: skip
def test_a_key_that_is_nearly_an_options_name_is_refused(name: str) -> None:
    params = make_params(torch.device("cpu"))
    with pytest.raises(ValueError, match=f"the key '{name}', which BNGD would not follow"):
        BNGD([{"params": params, name: 0.5}])
    # what schedules and libraries put into groups is left alone
    theirs = (
        "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "lr_scale", "name",
        "no_weight_decay", "max_weight_decay", "weight_decay_end",
    )  # fmt: skip
    BNGD([{"params": params, **dict.fromkeys(theirs, 0.5)}])


@pytest.mark.parametrize("name", ["fused", "flatten"])
@pytest.mark.parametrize("value", ["auto", 2, 0.5], ids=repr)
def test_constructor_refuses_switch(name: str, value: Any, device: torch.device) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be None, True or False, got {value!r}"):
        BNGD(make_params(device), **{name: value})


def test_a_refused_constructor_moves_no_storage(device: torch.device) -> None:
    params, more = make_params(device), make_params(device)
    before = snapshot(None, [*params, *more])
    with pytest.raises(ValueError, match="lr must be"):
        BNGD([{"params": params}, {"params": more, "lr": -1.0}], fused=True)
    assert snapshot(None, [*params, *more]) == before


def test_fused_on_the_cpu_needs_the_interpreter() -> None:
    code = (
        "import torch\n"
        "from bngd_triton import BNGD\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "BNGD([p])\n"
        "try:\n"
        "    BNGD([p], fused=True)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    # the interpreter is chosen once per process
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fused=True cannot serve param_groups[0]['params'][0]: ")
    assert "it is on the CPU" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
    assert "fused=False" in done.stdout


@pytest.mark.parametrize("step", [reference.step_, fused_step_], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", ["momentums", "master_weights", "seed"])
def test_functional_steps_refuse_what_is_not_theirs(
    name: str, step: Callable[..., Tensor], device: torch.device
) -> None:
    """Of a misspelt option, or one of the optimizer alone; nothing has changed."""
    param, grad = (torch.randn(3, device=device) for _ in range(2))
    before = param.clone()
    with pytest.raises(TypeError, match=f"has no option {name}; it takes momentum, .*maximize"):
        step([param], [grad], [torch.zeros_like(param)], lr=0.1, **{name: 1})
    assert torch.equal(param, before)

"""Options that are refused, wherever they are given."""

import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

from bngd_triton import BNGD, reference
from bngd_triton.kernels import fused_step_
from support.runs import refused, start
from support.steps import make_params, set_grads, take_steps


class BadOption(NamedTuple):
    options: dict[str, Any]
    match: str
    error: type[Exception] = ValueError


# a number that each option may not be
BOUNDS = {
    "lr": (">= 0", -1.0),
    "weight_decay": (">= 0", -0.1),
    "eps": (">= 0", -1e-8),
    "momentum": (">= 0 and < 1", -0.1, 1.0),
    "centering": (">= 0 and <= 1", -0.1, 1.1),
}
BAD_OPTIONS = [
    BadOption({name: value}, rf"{name} must be {bound}( and finite)?, got {value}$")
    for name, (bound, *bad) in BOUNDS.items()
    for value in (*bad, math.nan, math.inf)
]
BAD_OPTIONS += [
    BadOption({name: value}, rf"{name} must be a number, got {shown}", TypeError)
    for name, value, shown in (
        ("lr", True, "True"), ("lr", "0.1", r"'0\.1'"), ("lr", None, "None"), ("lr", 1j, "1j"),
        ("momentum", False, "False"), ("momentum", (0.9, 0.99), r"\(0\.9"),
        ("weight_decay", "0", "'0'"), ("eps", None, "None"), ("centering", True, "True"),
    )
]  # fmt: skip
BAD_OPTIONS += [
    BadOption({"maximize": "no"}, r"maximize must be True or False, got 'no'", TypeError),
    BadOption({"nesterov": None}, "nesterov must be True or False, got None", TypeError),
    BadOption({"center_1d": 2}, "center_1d must be True or False, got 2", TypeError),
    BadOption({"lr": torch.tensor([0.1])}, r"lr must be .* 0-dim .* shape \(1,\)"),
    BadOption({"lr": torch.tensor(1)}, r"lr must be .* floating .*torch\.int64"),
    BadOption({"lr": torch.tensor(-0.5)}, r"lr must be >= 0.*, got -0\.5"),
    BadOption({"lr": torch.tensor(math.nan)}, "lr must be >= 0 and finite, got nan"),
    BadOption({"granularity": "column"}, "must be one of 'tensor', 'row', 'global', got 'column'"),
    BadOption({"normalizer": "minmax"}, "must be one of 'zscore', 'cdf', got 'minmax'"),
    BadOption({"nonfinite": "no"}, "must be one of 'skip', 'propagate', 'raise', got 'no'"),
    BadOption({"master_weights": "all"}, "must be one of 'split', 'stochastic', None, got 'all'"),
    BadOption({"momentum_dtype": torch.float16}, r"momentum_dtype must be .* got torch\.float16"),
    BadOption({"accumulation_steps": 0}, "accumulation_steps must be >= 1 .* got 0"),
    BadOption({"accumulation_steps": 2.0}, "accumulation_steps must be .* got 2.0", TypeError),
    BadOption({"accumulation_steps": True}, "accumulation_steps must be .* got True", TypeError),
    BadOption({"seed": -1}, "seed must be >= 0.* got -1"),
    BadOption({"lr": 0.5, "weight_decay": 2.0}, r"lr \* weight_decay must be < 1.*=0\.5 and .*=2"),
    BadOption({"lr": torch.tensor(0.5), "weight_decay": 3.0}, r"lr \* weight_decay must be < 1"),
    BadOption({"nesterov": True, "momentum": 0.0}, r"nesterov needs momentum > 0, got .*0\.0"),
    BadOption({"nesterov": True, "accumulation_steps": 2}, "needs accumulation_steps=1.*got.*=2"),
]
bad_options = pytest.mark.parametrize("bad", BAD_OPTIONS, ids=lambda bad: str(bad.options))


@bad_options
def test_what_is_given_refuses_option(bad, path):
    """To the constructor or in a group, first or added."""
    params, more = make_params(path.device), make_params(path.device)
    for group, defaults in ((bad.options, {}), ({}, bad.options)):
        # the first group must not have moved to a flat buffer either
        groups = [{"params": more}, {"params": params, **group}]
        with refused(bad.error, bad.match, None, [*params, *more]):
            BNGD(groups, fused=path.fused, **defaults)
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    with refused(bad.error, bad.match, optimizer, [*params, *more]):
        optimizer.add_param_group({"params": more, **bad.options})
    # and the parameters may still be added
    optimizer.add_param_group({"params": more})


@bad_options
@pytest.mark.parametrize("steps", [0, 1], ids=["first_step", "second_step"])
def test_step_refuses_option_changed_since(bad, steps, path):
    params, more = make_params(path.device), make_params(path.device)
    optimizer = BNGD([{"params": params}, {"params": more}], fused=path.fused)
    take_steps(optimizer, [*params, *more], range(steps))
    set_grads([*params, *more], 9)
    # the last group is the bad one: the first must not have moved either
    optimizer.param_groups[1].update(bad.options)
    with refused(bad.error, bad.match, optimizer, [*params, *more]):
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_rate_that_would_turn_parameters_round_is_refused(steps, path):
    params, optimizer = start(path, lr=1e-3, weight_decay=10.0)
    take_steps(optimizer, params, range(steps))
    set_grads(params, 9)
    optimizer.param_groups[0]["lr"] = 0.1
    with refused(ValueError, r"lr \* weight_decay must be < 1", optimizer, params):
        optimizer.step()
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
def test_what_is_no_option_is_refused_with_what_to_write(options, match):
    with pytest.raises(TypeError, match=match):
        BNGD(make_params(torch.device("cpu")), **options)


def test_options_by_position_are_refused():
    params = make_params(torch.device("cpu"))
    with pytest.raises(TypeError, match=r"got also 0\.01; write options by their names"):
        BNGD(params, 1e-3, 0.9, 0.01)


@pytest.mark.parametrize("name", [
    "weightdecay", "weight_decays", "weight_decay_", "granularty", "LR", "centring",
])  # fmt: skip
def test_a_key_that_is_nearly_an_options_name_is_refused(name):
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
def test_options_of_the_whole_optimizer(name, device):
    params = make_params(device)
    for value in ("auto", 2, 0.5):
        match = rf"{name} must be None, True or False, got {value!r}"
        with pytest.raises(ValueError, match=match):
            BNGD(params, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is an option of the whole optimizer"):
        BNGD([{"params": params, name: False}])
    BNGD([{"params": params, name: False}], **{name: False})


def test_fused_on_the_cpu_needs_the_interpreter():
    code = "import torch; from bngd_triton import BNGD; p = torch.nn.Parameter(torch.ones(3))\n"
    # the interpreter is chosen once per process
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}BNGD([p]); print('served'); BNGD([p], fused=True)"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "served\n"
    error = done.stderr.splitlines()[-1]
    assert error.startswith(
        "RuntimeError: fused=True cannot serve param_groups[0]['params'][0]: it is on the CPU"
    )
    assert "TRITON_INTERPRET=1" in error
    assert "fused=False" in error


@pytest.mark.parametrize("step", [reference.step_, fused_step_], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", ["momentums", "master_weights", "seed"])
def test_functional_steps_refuse_what_is_not_theirs(name, step, device):
    """Of a misspelt option, or one of the optimizer alone; nothing has changed."""
    param, grad = (torch.randn(3, device=device) for _ in range(2))
    with refused(TypeError, f"has no option {name}; it takes momentum, .*maximize", None, [param]):
        step([param], [grad], [torch.zeros_like(param)], lr=0.1, **{name: 1})

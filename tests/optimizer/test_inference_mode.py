"""Optimizers that are made, stepped or loaded under `torch.inference_mode`."""

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from support.checkpoints import load_params
from support.exact_runs import assert_bits, state_of
from support.runs import everything, refused, start
from support.steps import make_params, set_grads, take_steps, values

OPTION_SETS = [
    {},
    {"granularity": "row", "accumulation_steps": 2},
    {"granularity": "global", "momentum": 0.0},
    {"master_weights": "stochastic"},
]
option_sets = pytest.mark.parametrize("options", OPTION_SETS, ids=str)


def test_parameters_can_be_trained_by_an_optimizer_made_under_inference_mode(path):
    params, more = (make_params(path.device, torch.bfloat16) for _ in range(2))
    with torch.inference_mode():
        optimizer = BNGD(params, lr=0.1, fused=path.fused)
        optimizer.add_param_group({"params": more})
    params += more
    before = values(params)
    sum(((param + 1).square() * param).sum() for param in params).backward()
    optimizer.step()
    assert not any(map(torch.equal, params, before))


@option_sets
def test_a_step_under_inference_mode_is_as_any_other(options, path):
    """Whichever step, the first, which makes the state, or one that repeats others."""
    runs = []
    for inside in ((), (0,), (0, 1, 2, 3, 4), (2, 4)):
        params, optimizer = start(path, torch.bfloat16, lr=0.1, **options)
        for seed in range(6):
            with torch.inference_mode(seed in inside):
                take_steps(optimizer, params, [seed])
        assert not any(state.is_inference() for state in state_of(optimizer, params))
        sum(param.square().sum() for param in params).backward()
        runs.append(everything(optimizer, params))
    for run in runs[1:]:
        assert_bits(run, runs[0])


@option_sets
def test_a_checkpoint_loaded_under_inference_mode(options, path):
    options = {"lr": torch.tensor(0.1), **options}
    (params, a), (twins, b) = (start(path, torch.bfloat16, **options) for _ in range(2))
    take_steps(a, params, range(3))
    with torch.inference_mode():
        saved = a.state_dict()
        b.load_state_dict(saved)
    assert not b.param_groups[0]["lr"].is_inference()
    load_params(twins, params)
    for optimizer, of in ((a, params), (b, twins)):
        take_steps(optimizer, of, range(3, 6))
    assert_bits(everything(b, twins), everything(a, params))


def test_what_was_made_under_inference_mode_is_refused(path):
    params = make_params(path.device)
    with torch.inference_mode():
        inside = Parameter(torch.ones(3, device=path.device), requires_grad=False)
        buffer = torch.zeros(5, device=path.device)
    # nobody looks at it before it has a gradient
    optimizer = BNGD([*params, inside], lr=0.1, fused=path.fused)
    take_steps(optimizer, params, range(2))
    set_grads(params, 3)
    with torch.inference_mode():
        inside.grad = torch.ones_like(inside)
    match = r"\['params'\]\[3\], of shape \(3,\), was made under torch\.inference_mode\(\)"
    for mode in (False, True):
        with refused(RuntimeError, match, optimizer, params), torch.inference_mode(mode):
            optimizer.step()
    with torch.inference_mode():
        inside.grad = None
    optimizer.state[params[1]]["momentum_buffer"] = buffer
    with refused(RuntimeError, r"momentum buffer of .*\[1\], of .* was made", None, params):
        optimizer.step()

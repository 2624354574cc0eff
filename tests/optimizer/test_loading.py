"""What loading a state dict leaves as it is: options that it lacks, hooks, state of others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bngd_triton import BNGD
from support.checkpoints import make_params, through_a_file
from support.paths import StepPath
from support.steps import OPTION_NAMES, assert_equal, momenta, take_steps


# a group without a granularity is another optimizer's
@pytest.mark.parametrize("name", [name for name in OPTION_NAMES if name != "granularity"])
def test_an_option_that_a_checkpoint_lacks_stays_as_it_is(name: str, path: StepPath) -> None:
    ours: dict[str, Any] = {
        "lr": 0.3, "momentum": 0.7, "weight_decay": 0.1, "eps": 1e-3, "normalizer": "cdf",
        "centering": 0.5, "center_1d": True, "nonfinite": "raise",
        "maximize": True, "master_weights": None, "momentum_dtype": torch.bfloat16,
        "accumulation_steps": 2, "seed": 3, "nesterov": True,
    }  # fmt: skip
    mine = {name: ours[name]}
    for where in ("constructor", "group"):
        params = make_params(path.device)
        optimizer = BNGD(params, fused=path.fused)
        take_steps(optimizer, params, [0])
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][0][name]
        twins = make_params(path.device)
        if where == "constructor":
            again = BNGD(twins, fused=path.fused, **mine)
        else:
            again = BNGD([{"params": twins, **mine}], fused=path.fused)
        again.load_state_dict(saved)
        assert again.param_groups[0][name] == ours[name]
        take_steps(again, twins, [1])


def test_an_unpickled_group_without_an_option_has_the_constructors(path: StepPath) -> None:
    optimizer = BNGD(make_params(path.device), lr=0.3, momentum=0.7, fused=path.fused)
    for name in ("lr", "momentum"):
        del optimizer.param_groups[0][name]
    again = copy.deepcopy(optimizer)
    assert again.param_groups[0]["lr"] == 0.3
    assert again.param_groups[0]["momentum"] == 0.7


def test_hooks_of_the_user_run(path: StepPath) -> None:
    params, twins = make_params(path.device), make_params(path.device)
    optimizer, again = (BNGD(p, lr=0.1, fused=path.fused) for p in (params, twins))
    take_steps(optimizer, params, [0])
    calls = []

    def before(hooked: Any, incoming: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        # what a hook changes is what is loaded, momentum included
        changed = copy.deepcopy(incoming)
        changed["param_groups"][0]["lr"] = 0.4
        for state in changed["state"].values():
            state["momentum_buffer"] *= 2
        return changed

    def after(hooked: BNGD) -> None:
        # the momentum is in place by then
        assert torch.equal(
            hooked.state[twins[0]]["momentum_buffer"],
            2 * optimizer.state[params[0]]["momentum_buffer"],
        )
        calls.append("post")

    again.register_load_state_dict_pre_hook(before)
    again.register_load_state_dict_post_hook(after)
    again.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post"]
    assert again.param_groups[0]["lr"] == 0.4
    assert_equal(momenta(again, twins), [2 * buffer for buffer in momenta(optimizer, params)])

    saved = []
    optimizer.register_state_dict_pre_hook(lambda hooked: saved.append("pre"))
    optimizer.register_state_dict_post_hook(lambda hooked, result: {**result, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1
    assert saved == ["pre"]


def test_hooks_of_the_loader_do_not_pile_up(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="BNGD"):
        optimizer.load_state_dict(torch.optim.SGD(params).state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_state_that_others_keep_beside_momentum_survives(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    # wrappers (an average of the weights, a step counter) store their own entries there
    optimizer.state[params[0]]["average"] = params[0].detach().clone()
    optimizer.state[params[0]]["count"] = 3
    optimizer.state["of no parameter"] = 4
    again = BNGD(make_params(path.device), fused=path.fused)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    state = again.state[again.param_groups[0]["params"][0]]
    assert set(state) == {"momentum_buffer", "average", "count"}
    assert state["count"] == 3
    assert again.state["of no parameter"] == 4
    assert torch.equal(state["average"], params[0])

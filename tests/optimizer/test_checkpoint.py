"""State dicts: what they hold, and runs that go on from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from support.checkpoints import load_params, make_params, through_a_file
from support.paths import StepPath
from support.steps import assert_equal, momenta, take_steps

# eager against fused: a few roundings of float32 in values below 4
ATOL = 2e-6
OPTION_SETS: list[dict[str, Any]] = [
    {},
    {"granularity": "row", "nesterov": True, "weight_decay": 0.1},
    {"granularity": "global", "normalizer": "cdf"},
    {"momentum": 0.0},
]
option_sets = pytest.mark.parametrize("options", OPTION_SETS, ids=str)
# BNGD(..., fused=) of a run that the other path goes on with
other_path = pytest.mark.parametrize("other", [False, True], ids=["into_eager", "into_fused"])


@option_sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resuming_is_bit_identical_to_an_uninterrupted_run(
    dtype: torch.dtype, options: dict[str, Any], path: StepPath
) -> None:
    params = make_params(path.device, dtype)
    optimizer = BNGD(params, lr=0.1, fused=path.fused, **options)
    take_steps(optimizer, params, [0, 1])
    saved = through_a_file({"optimizer": optimizer.state_dict(), "params": list(params)})
    take_steps(optimizer, params, [2, 3])

    resumed = make_params(path.device, dtype)
    load_params(resumed, saved["params"])
    # other options on purpose: those of the checkpoint count
    again = BNGD(resumed, lr=0.7, weight_decay=0.7, eps=0.7, fused=path.fused)
    again.load_state_dict(saved["optimizer"])
    take_steps(again, resumed, [2, 3])
    assert_equal(resumed, params)
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    if options.get("momentum") != 0.0:
        assert_equal(momenta(again, resumed), momenta(optimizer, params))


@option_sets
@other_path
def test_a_checkpoint_loads_into_either_path(
    other: bool, options: dict[str, Any], path: StepPath
) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, fused=path.fused, **options)
    take_steps(optimizer, params, [0, 1])
    saved = through_a_file(optimizer.state_dict())
    resumed = make_params(path.device)
    load_params(resumed, params)
    again = BNGD(resumed, fused=other)
    again.load_state_dict(saved)
    assert again.fused is other
    take_steps(optimizer, params, [2])
    take_steps(again, resumed, [2])
    if other == path.fused:
        assert_equal(resumed, params)
    for a, b in zip(resumed, params):
        torch.testing.assert_close(a, b, rtol=0, atol=ATOL)


def test_the_state_dict_is_plain(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, fused=path.fused)
    take_steps(optimizer, params, [0])
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert [list(state) for state in saved["state"].values()] == [["momentum_buffer"]] * 4
    (group,) = saved["param_groups"]
    assert "fused" not in group
    assert "flatten" not in group
    assert group["params"] == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_momentum_of_narrow_parameters_stays_float32(dtype: torch.dtype, path: StepPath) -> None:
    params, twins = (make_params(path.device, dtype) for _ in range(2))
    optimizer, again = (BNGD(p, fused=path.fused) for p in (params, twins))
    take_steps(optimizer, params, [0, 1])
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    got, want = momenta(again, twins), momenta(optimizer, params)
    assert all(buffer.dtype == torch.float32 for buffer in got)
    # the values need more digits than the parameters have
    assert any(not torch.equal(buffer, buffer.to(dtype).float()) for buffer in want)
    assert_equal(got, want)


def test_momentum_of_float64_parameters_stays_float64(device: torch.device) -> None:
    params, twins = (make_params(device, torch.float64) for _ in range(2))
    optimizer, again = (BNGD(p) for p in (params, twins))
    take_steps(optimizer, params, [0, 1])
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all(buffer.dtype == torch.float64 for buffer in momenta(again, twins))
    assert_equal(momenta(again, twins), momenta(optimizer, params))


def test_a_float64_run_goes_on_in_float32(path: StepPath) -> None:
    wide = make_params(path.device, torch.float64)
    optimizer = BNGD(wide, lr=0.1)
    take_steps(optimizer, wide, [0, 1])
    params = make_params(path.device)
    load_params(params, wide)
    again = BNGD(params, fused=path.fused)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all(buffer.dtype == torch.float64 for buffer in momenta(again, params))
    if path.fused:
        with pytest.raises(RuntimeError, match=r"fused=True cannot serve .* got torch.float64"):
            take_steps(again, params, [2])
        again.fused = None
    take_steps(optimizer, wide, [2])
    take_steps(again, params, [2])
    for a, b in zip(params, wide):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=ATOL)


def test_loaded_state_is_a_copy(path: StepPath) -> None:
    params, twins = make_params(path.device), make_params(path.device)
    optimizer, again = (BNGD(p, fused=path.fused) for p in (params, twins))
    take_steps(optimizer, params, [0])
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    again.load_state_dict(saved)
    addresses = {buffer.untyped_storage().data_ptr() for buffer in momenta(again, twins)}
    assert addresses.isdisjoint(b.untyped_storage().data_ptr() for b in momenta(optimizer, params))

    take_steps(again, twins, [1])
    again.param_groups[0]["lr"] = 5.0
    assert_equal(
        [saved["state"][i]["momentum_buffer"] for i in range(4)],
        [kept["state"][i]["momentum_buffer"] for i in range(4)],
    )
    assert saved["param_groups"] == kept["param_groups"]
    # and the other way round
    before = [buffer.clone() for buffer in momenta(again, twins)]
    for state in saved["state"].values():
        state["momentum_buffer"].fill_(9.0)
    assert_equal(momenta(again, twins), before)


def test_state_takes_the_strides_of_the_parameter_it_meets(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.1, granularity="row", fused=path.fused)
    take_steps(optimizer, params, [0])
    assert momenta(optimizer, params)[1].stride() == params[1].stride()

    # a checkpoint of a channels_last model, loaded into a contiguous one
    twins = [Parameter(param.detach().clone().contiguous()) for param in params]
    assert twins[1].stride() != params[1].stride()
    again = BNGD(twins, fused=path.fused)
    again.load_state_dict(optimizer.state_dict())
    for param, got, want in zip(twins, momenta(again, twins), momenta(optimizer, params)):
        assert got.stride() == param.stride()
        assert torch.equal(got, want)
    take_steps(optimizer, params, [1])
    take_steps(again, twins, [1])
    for a, b in zip(twins, params):
        torch.testing.assert_close(a, b, rtol=0, atol=ATOL)


def test_a_checkpoint_before_the_first_step_loads(path: StepPath) -> None:
    params, twins = make_params(path.device), make_params(path.device)
    used = BNGD(twins, lr=0.3, fused=path.fused)
    take_steps(used, twins, [0])
    used.load_state_dict(through_a_file(BNGD(params, lr=0.1).state_dict()))
    # loading replaces: the momentum that was there is gone
    assert used.state_dict()["state"] == {}
    assert used.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "has_stepped"])
@pytest.mark.parametrize("have", [slice(4), slice(1, 3)], ids=["all", "some"])
def test_groups_and_momentum_of_some_parameters_go_on(
    have: slice, stepped: bool, path: StepPath
) -> None:
    def build() -> tuple[list[Parameter], BNGD]:
        params = make_params(path.device)
        return params, BNGD([{"params": params[:2]}, {"params": params[2:]}], fused=path.fused)

    (params, optimizer), (twins, again) = build(), build()
    optimizer.param_groups[0].update(lr=0.1, granularity="row")
    optimizer.param_groups[1].update(lr=0.3, momentum=0.5, maximize=True)
    take_steps(optimizer, params[have], [0, 1])
    if stepped:
        take_steps(again, twins, [5, 6])
    load_params(twins, params)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [param in again.state for param in twins] == [
        place in range(4)[have] for place in range(4)
    ]
    for param in (*params, *twins):
        param.grad = None
    take_steps(optimizer, params, [2])
    take_steps(again, twins, [2])
    assert_equal(twins, params)


def test_parameter_names_survive(path: StepPath) -> None:
    params, twins = make_params(path.device), make_params(path.device)
    optimizer = BNGD(zip("abcd", params), fused=path.fused)
    again = BNGD(zip("abcd", twins), nonfinite="raise", fused=path.fused)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert again.param_groups[0]["param_names"] == list("abcd")


def test_a_tensor_lr_is_saved_and_loaded_as_its_own(path: StepPath) -> None:
    params, twins = make_params(path.device), make_params(path.device)
    lr = torch.tensor(0.1)
    optimizer = BNGD(params, lr=lr, weight_decay=0.1, fused=path.fused)
    take_steps(optimizer, params, [0])
    again = BNGD(twins, lr=0.7, fused=path.fused)
    load_params(twins, params)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    loaded = again.param_groups[0]["lr"]
    assert isinstance(loaded, Tensor)
    assert loaded.item() == lr.item()
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] is not lr
    take_steps(optimizer, params, [1])
    take_steps(again, twins, [1])
    assert_equal(twins, params)


@pytest.mark.parametrize("stochastic", [0, 1, 3])
def test_a_checkpoint_waits_once_and_only_for_stochastic_rounding(
    stochastic: int, path: StepPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params(path.device)
    groups = [{"params": [param]} for param in params[:3]]
    for group in groups[:stochastic]:
        group["master_weights"] = "stochastic"
    optimizer = BNGD(groups, fused=path.fused)
    take_steps(optimizer, params[:3], [0])
    waits = 0

    def counting(read: Any) -> Any:
        def counted(tensor: Tensor, *args: Any) -> Any:
            nonlocal waits
            waits += 1
            return read(tensor, *args)

        return counted

    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu", "__int__", "__bool__", "__float__", "__index__"):
            patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
        saved = optimizer.state_dict()
    assert waits == (stochastic > 0)
    counts = [group["rounding_steps"] for group in saved["param_groups"]]
    assert counts == [1] * stochastic + [0] * (3 - stochastic)

"""State dicts: what they hold, runs that go on from them, and what loading leaves as it is."""

import copy
import functools

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from support import exact_runs
from support.checkpoints import SHAPES, load_params, through_a_file
from support.exact_runs import assert_bits, exact_gradient, give
from support.runs import everything, start
from support.steps import OPTION_NAMES, assert_equal, momenta, take_steps

# eager against fused: a few roundings of float32 in values below 4
ATOL = 2e-6
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
start = functools.partial(start, shapes=SHAPES)


@pytest.mark.parametrize("into", [False, True], ids=["into_eager", "into_fused"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (FLOAT32, {}),
        (FLOAT32, {"granularity": "row", "nesterov": True}),
        (FLOAT32, {"granularity": "global", "normalizer": "cdf"}),
        (FLOAT32, {"momentum": 0.0}),
        (FLOAT32, {"accumulation_steps": 3, "granularity": "row"}),
        (BFLOAT16, {"master_weights": "split", "momentum_dtype": BFLOAT16}),
        (BFLOAT16, {"master_weights": "split", "accumulation_steps": 3}),
        (BFLOAT16, {"master_weights": "stochastic", "granularity": "tensor"}),
        (BFLOAT16, {"master_weights": "stochastic", "accumulation_steps": 3, "momentum": 0.0}),
        (BFLOAT16, {"master_weights": None, "momentum_dtype": BFLOAT16}),
        (FLOAT16, {"master_weights": "split", "accumulation_steps": 3, "granularity": "row"}),
        (FLOAT16, {"master_weights": "stochastic", "momentum_dtype": BFLOAT16}),
        (FLOAT16, {"master_weights": None}),
    ],
    ids=str,
)
def test_a_run_goes_on_from_a_checkpoint_in_the_same_bits(dtype, options, into, path):
    """In either path, and in the middle of a window whose end finds no gradient of the first."""
    options = {"lr": 0.01, "weight_decay": 0.1, "seed": 2, **options}
    begin = functools.partial(start, path, dtype, shapes=exact_runs.SHAPES)

    def go_on(optimizer, params):
        for seed in range(4, 8):
            for i, param in enumerate(params):
                absent = i == 0 and seed < 6
                give(param, None if absent else exact_gradient(param, seed + i).to(dtype))
            optimizer.step()

    params, optimizer = begin(**options)
    exact_runs.take_steps(optimizer, params, range(4))
    saved = through_a_file([optimizer.state_dict(), [param.detach() for param in params]])
    go_on(optimizer, params)
    # other options on purpose: those of the checkpoint count
    other = "split" if options.get("master_weights") is None else None
    twins, again = begin(fused=into, lr=0.7, eps=0.7, master_weights=other, seed=5)
    load_params(twins, saved[1])
    again.load_state_dict(saved[0])
    assert again.fused is into
    go_on(again, twins)
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert not torch.equal(twins[0], saved[1][0])
    if into == path.fused or "normalizer" not in options:
        assert_bits(everything(again, twins), everything(optimizer, params))
    torch.testing.assert_close(twins, params, rtol=0, atol=ATOL)


def test_float64_momentum_stays_so_in_a_float32_run(path):
    wide, optimizer = start(path, torch.float64, fused=None, lr=0.1)
    take_steps(optimizer, wide, [0, 1])
    params, again = start(path)
    load_params(params, wide)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal(momenta(again, params), momenta(optimizer, wide))
    if path.fused:
        with pytest.raises(RuntimeError, match=r"fused=True cannot serve .* got torch.float64"):
            take_steps(again, params, [2])
        again.fused = None
    take_steps(optimizer, wide, [2])
    take_steps(again, params, [2])
    torch.testing.assert_close(params, wide, rtol=0, atol=ATOL, check_dtype=False)


def test_loaded_state_is_a_copy(path):
    (params, optimizer), (twins, again) = start(path), start(path)
    take_steps(optimizer, params, [0])
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    again.load_state_dict(saved)
    take_steps(again, twins, [1])
    again.param_groups[0]["lr"] = 5.0
    for i in range(4):
        assert torch.equal(*(s["state"][i]["momentum_buffer"] for s in (saved, kept)))
    assert saved["param_groups"] == kept["param_groups"]
    # and the other way round
    before = [buffer.clone() for buffer in momenta(again, twins)]
    for state in saved["state"].values():
        state["momentum_buffer"].fill_(9.0)
    assert_equal(momenta(again, twins), before)


def test_state_takes_the_strides_of_the_parameter_it_meets(path):
    params, optimizer = start(path, lr=0.1, granularity="row")
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
    torch.testing.assert_close(twins, params, rtol=0, atol=ATOL)


def test_a_checkpoint_before_the_first_step_replaces_momentum(path):
    params, optimizer = start(path, lr=0.3)
    take_steps(optimizer, params, [0])
    optimizer.load_state_dict(through_a_file(start(path, lr=0.1)[1].state_dict()))
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "has_stepped"])
@pytest.mark.parametrize("have", [slice(4), slice(1, 3)], ids=["all", "some"])
def test_groups_and_momentum_of_some_parameters_go_on(have, stepped, path):
    def build():
        params, _ = start(path, flatten=False)
        return params, BNGD([{"params": params[:2]}, {"params": params[2:]}], fused=path.fused)

    (params, optimizer), (twins, again) = build(), build()
    optimizer.param_groups[0].update(lr=0.1, granularity="row")
    optimizer.param_groups[1].update(lr=0.3, momentum=0.5, maximize=True)
    take_steps(optimizer, params[have], [0, 1])
    if stepped:
        take_steps(again, twins, [5, 6])
    load_params(twins, params)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [param in again.state for param in twins] == [i in range(4)[have] for i in range(4)]
    for param in (*params, *twins):
        param.grad = None
    take_steps(optimizer, params, [2])
    take_steps(again, twins, [2])
    assert_equal(twins, params)


def test_a_tensor_lr_is_saved_and_loaded_as_its_own(path):
    lr = torch.tensor(0.1)
    (params, optimizer), (twins, again) = start(path, lr=lr, weight_decay=0.1), start(path, lr=0.7)
    take_steps(optimizer, params, [0])
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
def test_a_checkpoint_waits_once_and_only_for_stochastic_rounding(stochastic, path, monkeypatch):
    params, _ = start(path, flatten=False)
    groups = [{"params": [param]} for param in params[:3]]
    for group in groups[:stochastic]:
        group["master_weights"] = "stochastic"
    optimizer = BNGD(groups, fused=path.fused)
    take_steps(optimizer, params[:3], [0])
    waits = []

    def noting(name):
        read = getattr(Tensor, name)
        return lambda *args: (waits.append(name), read(*args))[1]

    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu", "__int__", "__bool__", "__float__", "__index__"):
            patch.setattr(Tensor, name, noting(name))
        saved = optimizer.state_dict()
    assert len(waits) == (stochastic > 0)
    counts = [group["rounding_steps"] for group in saved["param_groups"]]
    assert counts == [1] * stochastic + [0] * (3 - stochastic)


# a group without a granularity is another optimizer's
@pytest.mark.parametrize("name", [name for name in OPTION_NAMES if name != "granularity"])
def test_an_option_that_a_checkpoint_lacks_stays_as_it_is(name, path):
    ours = {
        "lr": 0.3, "momentum": 0.7, "weight_decay": 0.1, "eps": 1e-3, "normalizer": "cdf",
        "centering": 0.5, "center_1d": True, "nonfinite": "raise",
        "maximize": True, "master_weights": None, "momentum_dtype": BFLOAT16,
        "accumulation_steps": 2, "seed": 3, "nesterov": True,
    }  # fmt: skip
    params, optimizer = start(path)
    take_steps(optimizer, params, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0][name]
    twins, _ = start(path, flatten=False)
    # the group's own counts, not the constructor's
    again = BNGD([{"params": twins, name: ours[name]}], fused=path.fused)
    again.load_state_dict(saved)
    assert again.param_groups[0][name] == ours[name]
    take_steps(again, twins, [1])


def test_hooks_of_the_user_run(path):
    (params, optimizer), (twins, again) = start(path, lr=0.1), start(path)
    take_steps(optimizer, params, [0])
    calls = []

    def before(hooked, incoming):
        calls.append("pre")
        # what a hook changes is what is loaded, momentum included
        changed = copy.deepcopy(incoming)
        changed["param_groups"][0]["lr"] = 0.4
        for state in changed["state"].values():
            state["momentum_buffer"] *= 2
        return changed

    def after(hooked):
        # the momentum is in place by then
        assert_equal(momenta(hooked, twins), [2 * buffer for buffer in momenta(optimizer, params)])
        calls.append("post")

    again.register_load_state_dict_pre_hook(before)
    again.register_load_state_dict_post_hook(after)
    again.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post"]
    assert again.param_groups[0]["lr"] == 0.4


def test_state_that_others_keep_beside_momentum_survives(path):
    params, optimizer = start(path)
    take_steps(optimizer, params, [0])
    # wrappers (an average of the weights, a step counter) store their own entries there
    optimizer.state[params[0]] |= {"average": params[0].detach().clone(), "count": 3}
    optimizer.state["of no parameter"] = 4
    twins, again = start(path)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    state = again.state[twins[0]]
    assert set(state) == {"momentum_buffer", "average", "count"}
    assert state["count"] == 3
    assert again.state["of no parameter"] == 4
    assert torch.equal(state["average"], params[0])

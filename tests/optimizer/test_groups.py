"""Groups of parameters: each has its own options, which may change between steps."""

import copy

import numpy
import pytest
import torch

from bngd_triton import BNGD
from bngd_triton.foreign import FOREIGN
from bngd_triton.state_dicts import COUNTS
from bngd_triton.verify.oracle import oracle_step
from support import steps
from support.runs import start
from support.steps import assert_close, assert_equal, make_grads, make_params, take_steps, values

GROUPS = [
    {"lr": 0.2},
    {"momentum": 0.0},
    {"momentum": 0.5, "nesterov": True},
    {"weight_decay": 0.3, "eps": 1e-2},
    {"granularity": "row"},
    {"granularity": "global"},
    {"granularity": "global", "lr": 0.3},
    {"normalizer": "cdf"},
    {"centering": 0.5, "center_1d": True},
    {"centering": 0.0},
    {"maximize": True},
    {"nonfinite": "propagate"},
]


def test_every_group_steps_with_its_own_options(path):
    together = [make_params(path.device) for _ in GROUPS]
    groups = [{"params": params, **options} for params, options in zip(together, GROUPS)]
    optimizer = BNGD(groups, lr=0.1, fused=path.fused)
    starts = [values(params) for params in together]
    for seed in range(2):
        for index, params in enumerate(together):
            steps.set_grads(params, 100 * index + seed)
        optimizer.step()

    for index, (params, options) in enumerate(zip(together, GROUPS)):
        expected, buffers = starts[index], [None] * 3
        for seed in range(2):
            grads = make_grads(params, 100 * index + seed)
            expected, buffers = oracle_step(expected, grads, buffers, **{"lr": 0.1, **options})
        assert_close(params, expected)
        assert ("momentum_buffer" in optimizer.state[params[0]]) == (options.get("momentum") != 0)


CHANGES = [
    ({"lr": 0.1}, {"lr": 0.02}),
    ({"lr": 0.1}, {"lr": 0.0}),
    ({"lr": torch.tensor(0.1)}, {"lr": 0.02}),
    ({"lr": torch.tensor(0.1)}, {"lr": 0.0}),
    ({"lr": 0.1}, {"lr": torch.tensor(0.02)}),
    ({"momentum": 0.9}, {"momentum": 0.5}),
    ({"momentum": 0.0}, {"momentum": 0.9}),
    ({"nesterov": False}, {"nesterov": True}),
    ({"weight_decay": 0.0}, {"weight_decay": 0.5}),
    ({"weight_decay": 0.5, "lr": torch.tensor(0.1)}, {"weight_decay": 0.0}),
    ({"eps": 0.0}, {"eps": 0.5}),
    ({"granularity": "tensor"}, {"granularity": "row"}),
    ({"granularity": "row"}, {"granularity": "global"}),
    ({"granularity": "global"}, {"granularity": "tensor"}),
    ({"normalizer": "zscore"}, {"normalizer": "cdf"}),
    ({"centering": 0.0}, {"centering": 1.0}),
    ({"centering": 1.0}, {"centering": 0.0}),
    ({"center_1d": False}, {"center_1d": True}),
    ({"maximize": False}, {"maximize": True}),
    ({"nonfinite": "raise"}, {"nonfinite": "skip"}),
]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_an_option_changed_between_steps_takes_effect(before, after, path):
    base = {"lr": 0.1, **copy.deepcopy(before)}
    params, optimizer = start(path, **base)
    expected, buffers = values(params), [None] * 3
    for seed in range(4):
        if seed == 2:
            base |= after
            optimizer.param_groups[0].update(after)
        expected, buffers = oracle_step(expected, make_grads(params, seed), buffers, **base)
        take_steps(optimizer, params, [seed])
    assert_close(params, expected)


def test_momentum_set_to_0_and_back_keeps_its_buffer(path):
    params, optimizer = start(path, lr=0.1)
    expected, buffers = values(params), [None] * 3
    for seed, momentum in enumerate((0.9, 0.0, 0.0, 0.9)):
        optimizer.param_groups[0]["momentum"] = momentum
        kept = values(steps.momenta(optimizer, params)) if seed else []
        grads = make_grads(params, seed)
        expected, buffers = oracle_step(expected, grads, buffers, lr=0.1, momentum=momentum)
        take_steps(optimizer, params, [seed])
        if momentum == 0:
            assert_equal(steps.momenta(optimizer, params), kept)
    assert_close(params, expected)


def test_add_param_group_takes_defaults_and_steps(path):
    params, optimizer = start(path, lr=0.1, granularity="row")
    more = make_params(path.device)
    take_steps(optimizer, params, [0])
    first, second = values(params), values(more)
    buffers = values(steps.momenta(optimizer, params))
    optimizer.add_param_group({"params": more, "momentum": 0.5})
    old, added = ({**group, "params": None} for group in optimizer.param_groups)
    assert added == {**old, "momentum": 0.5}

    steps.set_grads(more, 7)
    take_steps(optimizer, params, [1])
    options = {"lr": 0.1, "granularity": "row"}
    assert_close(params, oracle_step(first, make_grads(first, 1), buffers, **options)[0])
    grads = make_grads(second, 7)
    assert_close(more, oracle_step(second, grads, [None] * 3, momentum=0.5, **options)[0])


def test_the_state_dict_is_plain(path):
    params, optimizer = start(path, flatten=False)
    assert (optimizer.fused, optimizer.flatten) == (path.fused, False)
    assert set(optimizer.defaults) == set(steps.OPTION_NAMES)
    take_steps(optimizer, params, [0])
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert [list(state) for state in saved["state"].values()] == [["momentum_buffer"]] * 3
    (group,) = saved["param_groups"]
    assert set(group) == {"params", *steps.OPTION_NAMES, *COUNTS}
    assert group["params"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (torch.optim.AdamW, "amsgrad, betas, capturable, differentiable, foreach"),
        (torch.optim.SGD, "dampening, differentiable, foreach"),
        (torch.optim.LBFGS, "max_iter"),
        (torch.optim.SparseAdam, "betas"),
        (torch.optim.Adafactor, "foreach"),
        (torch.optim.Muon, "ns_steps"),
    ],
)
def test_groups_of_another_optimizer_are_refused(kind, named, device):
    params = make_params(device)
    other = kind(params[:1], lr=0.1)
    match = rf"\[\d\] has options of another optimizer: {named}; "
    with pytest.raises(ValueError, match=match):
        BNGD(other.param_groups)
    with pytest.raises(ValueError, match=match):
        BNGD(params[1:]).add_param_group(other.param_groups[0])
    # it has not been completed with options of ours
    assert "granularity" not in other.param_groups[0]
    # the way out
    BNGD([{"params": group["params"], "lr": 0.1} for group in other.param_groups])


def test_every_optimizer_of_torch_is_known_by_its_groups():
    base = torch.optim.Optimizer
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base:
            (group,) = kind([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1).param_groups
            assert FOREIGN.keys() & group.keys(), kind


@pytest.mark.parametrize("steps", [0, 3], ids=["first", "when_steps_repeat"])
def test_a_rate_may_be_a_number_of_numpys(steps, path):
    """Also an array, whose value may change in place."""
    array = numpy.array(0.25)
    others = [numpy.float64(0.5), numpy.int64(1), 1]
    runs = []
    for rates in ([0.25, 0.25, 0.5, 0.5, 1.0, 1.0], [numpy.float32(0.25), array, array, *others]):
        array[...] = 0.25
        params, optimizer = start(path, lr=rates[0], momentum=0.5)
        take_steps(optimizer, params, range(steps))
        for seed, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            if seed == 2:
                array[...] = 0.5
            take_steps(optimizer, params, [seed])
        runs.append(values(params))
    assert_equal(*runs)
    with pytest.raises(TypeError, match="lr must be a number"):
        BNGD(make_params(path.device), lr=numpy.array([0.1]))
    with pytest.raises(ValueError, match="lr must be >= 0"):
        BNGD(make_params(path.device), lr=numpy.array(-0.1))

"""Hooks, schedulers, copies and pickles: what others do with an optimizer."""

import pytest
import torch
from torch.optim import lr_scheduler

from bngd_triton import BNGD
from bngd_triton.state_dicts import COUNTS
from bngd_triton.verify.oracle import oracle_step
from support import exact_runs, steps
from support.exact_runs import assert_bits
from support.runs import everything, start
from support.steps import assert_close, assert_equal, make_grads, make_params, take_steps, values


def test_hooks_run_around_the_step_and_may_change_it(path):
    params, optimizer = start(path, lr=0.1)
    before = values(params)
    moved = []

    def pre(hooked, args, kwargs):
        moved.append(not torch.equal(params[0], before[0]))
        hooked.param_groups[0]["lr"] = 0.3
        for param in params:
            param.grad = param.grad.flip(0) if param.dim() else param.grad

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(
        lambda *_: moved.append(not torch.equal(params[0], before[0]))
    )
    take_steps(optimizer, params, [0])
    assert moved == [False, True]
    grads = [grad.flip(0) if grad.dim() else grad for grad in make_grads(params, 0)]
    assert_close(params, oracle_step(before, grads, [None] * 3, lr=0.3)[0])


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor, path):
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    params, optimizer = start(path, lr=lr, weight_decay=0.1)
    (group,) = optimizer.param_groups
    assert group["lr"] is lr
    expected, buffers = values(params), [None] * 3
    scheduler = SCHEDULERS[name](optimizer)
    used = []
    for seed in range(5):
        used.append((float(group["lr"]), group["momentum"]))
        options = {"lr": used[-1][0], "momentum": used[-1][1], "weight_decay": 0.1}
        expected, buffers = oracle_step(expected, make_grads(params, seed), buffers, **options)
        take_steps(optimizer, params, [seed])
        if seed < 4:
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert_close(params, expected)
    assert len({lr for lr, _ in used}) >= 4
    assert (len({momentum for _, momentum in used}) > 1) == (name == "one_cycle")


@pytest.mark.parametrize("seeds", [[], [0, 1]], ids=["before_first_step", "after_two_steps"])
@pytest.mark.parametrize("how", steps.COPIES)
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        (torch.float32, None),
        (torch.bfloat16, "split"),
        (torch.bfloat16, "stochastic"),
        (torch.float16, "split"),
        (torch.float16, "stochastic"),
    ],
    ids=str,
)
def test_a_copy_goes_on_alike_and_apart(dtype, mode, how, seeds, path):
    options = {"lr": 0.1, "granularity": "row", "seed": 11, "master_weights": mode}
    params, optimizer = start(path, dtype, exact_runs.SHAPES, flatten=False, **options)
    exact_runs.take_steps(optimizer, params, seeds)
    twin_params, twin = steps.COPIES[how]((params, optimizer))
    assert (twin.fused, twin.flatten) == (path.fused, False)
    before = everything(twin, twin_params)
    exact_runs.take_steps(optimizer, params, [2, 3])
    assert_bits(everything(twin, twin_params), before)
    exact_runs.take_steps(twin, twin_params, [2, 3])
    assert_bits(everything(twin, twin_params), everything(optimizer, params))


@pytest.mark.parametrize("option", steps.OPTION_NAMES)
def test_an_old_pickle_without_an_option_gets_its_default(option, path):
    params, optimizer = start(path, lr=0.3, momentum=0.7)
    state = optimizer.__getstate__()
    defaults, group = (
        {k: v for k, v in options.items() if k not in (option, *COUNTS)}
        for options in (optimizer.defaults, optimizer.param_groups[0])
    )
    old, newer = (BNGD.__new__(BNGD) for _ in range(2))
    newer.__setstate__({**state, "param_groups": [dict(group)]})
    assert newer.param_groups[0][option] == optimizer.defaults[option]
    del state["fused"], state["flatten"]
    old.__setstate__({**state, "defaults": defaults, "param_groups": [group]})
    assert (old.fused, old.flatten) == (None, None)
    assert [old.param_groups[0][count] for count in COUNTS] == [0, 0]
    old.add_param_group({"params": make_params(path.device)})
    (fresh,) = start(path)[1].param_groups
    assert [group[option] for group in old.param_groups] == [fresh[option]] * 2
    old.fused = path.fused
    take_steps(old, params, [0])
    twins, want = start(path, **{"lr": 0.3, "momentum": 0.7, option: fresh[option]})
    take_steps(want, twins, [0])
    assert_equal(params, twins)

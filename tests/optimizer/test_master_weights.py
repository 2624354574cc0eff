"""Training in bfloat16 and float16: parameters that really move, and go on from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.eager.rounding import widen
from support.checkpoints import through_a_file
from support.exact_runs import (
    assert_bits,
    bits,
    exact_gradient,
    give,
    make_params,
    state_of,
    take_steps,
)
from support.paths import StepPath
from support.snapshots import snapshot
from support.steps import COPIES

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
narrow = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
MODES = ["split", "stochastic", None]
modes = pytest.mark.parametrize("mode", MODES, ids=str)


def masters(optimizer: BNGD, params: list[Parameter]) -> list[Tensor]:
    """The float32 masters of split parameters; float32 parameters are their own."""
    found = []
    for param in params:
        state = optimizer.state[param]
        kept = state.get("master_remainder", state.get("master"))
        found.append(widen(param.detach(), kept).clone())
    return found


def test_small_decay_is_not_lost(path: StepPath) -> None:
    """(1 - 1e-5) ** 2000 = 0.980, though each step is far below half a unit in the last place."""
    # 2e-4 is below half an ulp of float16 too
    steps, rate = {"split": 2000, "stochastic": 400, None: 400}, {"split": 1e-5, None: 5e-5}
    if path.fused:
        # kernels agree with the reference in every bit, so fewer and larger steps do for them
        steps, rate = dict.fromkeys(MODES, 20), dict.fromkeys(MODES, 2e-4)
    n = 1024
    for mode in MODES:
        count, share = steps[mode], rate.get(mode, 5e-5)
        want = (1 - share) ** count
        params = [
            Parameter(torch.ones(n, dtype=dtype, device=path.device))
            for dtype in (BFLOAT16, FLOAT16)
        ]
        optimizer = BNGD(
            params, lr=share, weight_decay=1.0, momentum=0.0, master_weights=mode, fused=path.fused
        )
        for param in params:
            param.grad = torch.zeros_like(param)
        for _ in range(count):
            optimizer.step()
        for param in params:
            value = param.detach()
            if mode is None:
                assert torch.equal(value, torch.ones_like(value)), "the control"
            elif mode == "split":
                # roundings of float32 below 1: at most 2**-25 each
                (master,) = masters(optimizer, [param])
                assert float((master - want).abs().max()) <= count * 2.0**-25
                assert torch.equal(value, master.to(param.dtype))
            else:
                # a step goes down by one ulp with probability share / ulp
                sigma = (count * share * torch.finfo(param.dtype).eps / 2 / n) ** 0.5
                assert abs(float(value.float().mean()) - want) <= 5 * sigma


@narrow
@pytest.mark.parametrize(
    ("grads", "options"),
    [
        (FLOAT32, {"weight_decay": 0.1}),
        (BFLOAT16, {"granularity": "row", "nesterov": True}),
        (FLOAT16, {"granularity": "global", "maximize": True}),
        (BFLOAT16, {"normalizer": "cdf", "momentum": 0.0}),
    ],
    ids=str,
)
def test_split_training_is_float32_training(
    grads: torch.dtype, options: dict[str, Any], dtype: torch.dtype, path: StepPath
) -> None:
    params = make_params(path.device, dtype)
    twins = [Parameter(param.detach().float()) for param in params]
    optimizer, twin = (BNGD(p, lr=1e-3, fused=path.fused, **options) for p in (params, twins))
    for step in range(3):
        take_steps(optimizer, params, [step], grads)
        take_steps(twin, twins, [step], FLOAT32)
        assert_bits(masters(optimizer, params), [param.detach() for param in twins])
    # that needs more bits than the parameters have
    assert not torch.equal(params[0].float(), twins[0])


@pytest.mark.parametrize("grads", [BFLOAT16, FLOAT16], ids=str)
def test_narrow_gradients_of_float32_parameters(grads: torch.dtype, path: StepPath) -> None:
    params, twins = (make_params(path.device) for _ in range(2))
    optimizer, twin = (BNGD(p, lr=1e-2, fused=path.fused) for p in (params, twins))
    take_steps(optimizer, params, range(3), grads)
    take_steps(twin, twins, range(3))
    assert_bits(params, twins)
    assert {tuple(state) for state in optimizer.state.values()} == {("momentum_buffer",)}


@narrow
def test_both_paths_agree_in_every_bit(dtype: torch.dtype, device: torch.device) -> None:
    """Whatever is kept, with decay, momentum and parameters of any strides."""
    for mode in MODES:
        done = []
        for fused in (False, True):
            params = make_params(device, dtype)
            optimizer = BNGD(
                params, lr=0.01, weight_decay=0.1, granularity="row", master_weights=mode,
                momentum_dtype=BFLOAT16 if mode is None else None, seed=3, fused=fused,
            )  # fmt: skip
            take_steps(optimizer, params, range(2))
            done.append([*params, *state_of(optimizer, params)])
        assert_bits(*done)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_momentum_in_bfloat16(dtype: torch.dtype, path: StepPath) -> None:
    params, twins = (make_params(path.device, dtype) for _ in range(2))
    narrow_ = BNGD(params, lr=1e-2, momentum_dtype=BFLOAT16, fused=path.fused)
    wide = BNGD(twins, lr=1e-2, fused=path.fused)
    for seed in range(3):
        take_steps(narrow_, params, [seed])
        take_steps(wide, twins, [seed])
        for param, twin in zip(params, twins):
            kept = narrow_.state[param]["momentum_buffer"]
            want = wide.state[twin]["momentum_buffer"]
            assert (kept.dtype, want.dtype) == (BFLOAT16, FLOAT32)
            # half a unit in the last place for each step, of values below 1
            assert float((kept.float() - want).abs().max()) <= (seed + 1) * 2.0**-9
            if seed == 0:
                assert torch.equal(kept, want.to(BFLOAT16))


@narrow
def test_a_parameter_written_between_steps(dtype: torch.dtype, path: StepPath) -> None:
    """`load_state_dict`, pruning, ...: the new value counts, not the master of the old one."""
    params = make_params(path.device, dtype)
    model = torch.nn.ParameterList(params)
    optimizer = BNGD(params, lr=1e-3, momentum=0.0, fused=path.fused)
    take_steps(optimizer, params, range(3))
    remainders = [value for value in state_of(optimizer, params) if value.dtype == torch.int16]
    assert all((value < 0).any() and (value > 0).any() for value in remainders)
    new = {key: value.roll(1) * 1.5 for key, value in model.state_dict().items()}
    for value in new.values():
        value.flatten()[0] = 0.0
        value.view(-1)[::2] = 0.0
    model.load_state_dict(new)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, master, want in zip(params, masters(optimizer, params), new.values()):
        assert torch.equal(param, want)
        if dtype == FLOAT16:
            assert torch.equal(master, want.float())
        else:
            size = want.float().abs().clamp(min=2.0**-126)
            assert ((master - want.float()).abs() <= size * 2.0**-8).all()


def run(
    mode: str | None, dtype: torch.dtype, fused: bool, device: torch.device, **options: Any
) -> tuple[list[Parameter], BNGD]:
    params = make_params(device, dtype)
    optimizer = BNGD(
        params, lr=0.01, weight_decay=0.1, master_weights=mode, seed=11, fused=fused, **options
    )
    return params, optimizer


@narrow
@modes
@pytest.mark.parametrize("into", [False, True], ids=["into_eager", "into_fused"])
def test_resuming_is_bit_identical(
    into: bool, mode: str | None, dtype: torch.dtype, path: StepPath
) -> None:
    params, optimizer = run(mode, dtype, path.fused, path.device, momentum_dtype=BFLOAT16)
    take_steps(optimizer, params, [0, 1, 2])
    saved = through_a_file([optimizer.state_dict(), [param.detach() for param in params]])
    take_steps(optimizer, params, [3, 4])

    # another seed and another way on purpose: those of the checkpoint count
    twins = make_params(path.device, dtype)
    again = BNGD(twins, master_weights="split" if mode is None else None, fused=into)
    with torch.no_grad():
        for param, value in zip(twins, saved[1]):
            param.copy_(value)
    again.load_state_dict(saved[0])
    take_steps(again, twins, [3, 4])
    assert_bits(twins, params)
    assert_bits(state_of(again, twins), state_of(optimizer, params))
    want = {"momentum_buffer": BFLOAT16}
    if mode == "split":
        master = ("master_remainder", torch.int16) if dtype == BFLOAT16 else ("master", FLOAT32)
        want[master[0]] = master[1]
    assert {key: value.dtype for key, value in again.state[twins[0]].items()} == want
    if mode == "stochastic":
        assert again.state_dict()["param_groups"][0]["rounding_steps"] == 5


@narrow
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_alike(how: str, dtype: torch.dtype, path: StepPath) -> None:
    for mode in ("split", "stochastic"):
        params, optimizer = run(mode, dtype, path.fused, path.device)
        take_steps(optimizer, params, [0, 1])
        twins, twin = COPIES[how]((params, optimizer))
        take_steps(optimizer, params, [2, 3])
        take_steps(twin, twins, [2, 3])
        assert_bits(twins, params)
        assert_bits(state_of(twin, twins), state_of(optimizer, params))


Spoil = Callable[[dict[str, Any]], None]


def with_state(key: str, change: Callable[[Tensor], Any]) -> Spoil:
    def spoil(saved: dict[str, Any]) -> None:
        state = saved["state"][1]
        state[key] = change(state.get(key, state["momentum_buffer"]))

    return spoil


def with_group(**values: Any) -> Spoil:
    return lambda saved: saved["param_groups"][0].update(values)


REFUSED: list[tuple[torch.dtype, Spoil, str]] = [
    (BFLOAT16, with_state("master_remainder", lambda t: t[:1]), "master_remainder of .* shape"),
    (BFLOAT16, with_state("master_remainder", lambda t: t.float()), "dtype torch.float32.*int16"),
    (BFLOAT16, with_state("master_remainder", lambda t: t.int()), "dtype torch.int32"),
    (BFLOAT16, with_state("master_remainder", lambda t: 3), "is a int, not a tensor"),
    (BFLOAT16, with_state("master", lambda t: t.float()), "holds a master, which belongs to"),
    (FLOAT16, with_state("master", lambda t: t.half()), "dtype torch.float16"),
    (FLOAT16, with_state("master_remainder", lambda t: t.short()), "holds a master_remainder"),
    (BFLOAT16, with_group(master_weights="all"), "master_weights must be one of"),
    (BFLOAT16, with_group(momentum_dtype=FLOAT16), "momentum_dtype must be one of"),
    (BFLOAT16, with_group(seed=-1), "seed must be >= 0"),
    (BFLOAT16, with_group(rounding_steps="many"), "rounding_steps"),
    (BFLOAT16, with_group(micro_step=-1), "micro_step"),
]


@pytest.mark.parametrize(("dtype", "spoil", "message"), REFUSED)
def test_refused_checkpoints_change_nothing(
    dtype: torch.dtype, spoil: Spoil, message: str, path: StepPath
) -> None:
    params, optimizer = run("split", dtype, path.fused, path.device)
    take_steps(optimizer, params, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    take_steps(optimizer, params, [1])
    before = snapshot(optimizer, params)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer, params) == before
    take_steps(optimizer, params, [2])


@narrow
def test_momentum_of_another_optimizer_is_refused(dtype: torch.dtype, path: StepPath) -> None:
    params, optimizer = run("split", dtype, path.fused, path.device)
    take_steps(optimizer, params, [0])
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    sgd.step()
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="not a BNGD checkpoint"):
        optimizer.load_state_dict(sgd.state_dict())
    assert snapshot(optimizer, params) == before


@narrow
def test_master_weights_changed_between_steps(dtype: torch.dtype, path: StepPath) -> None:
    """A master that was given up starts anew from the parameter."""
    params, optimizer = run("split", dtype, path.fused, path.device)
    (group,) = optimizer.param_groups
    for seed, mode in enumerate(["split", None, "split", "stochastic", "split"]):
        group["master_weights"] = mode
        old = [param.detach().clone() for param in params]
        for param in params:
            give(param, exact_gradient(param, seed).to(dtype))
        optimizer.step()
        kept = {key for key in optimizer.state[params[0]] if key.startswith("master")}
        assert bool(kept) == (mode == "split")
        if mode == "split" and seed > 0:
            for param, value, master in zip(params, old, masters(optimizer, params)):
                buffer = optimizer.state[param]["momentum_buffer"]
                want = value.float() * (1 - 0.01 * 0.1) - buffer * 0.01
                torch.testing.assert_close(master, want, rtol=2.0**-22, atol=1e-9)


@narrow
def test_a_seed_changed_between_steps(dtype: torch.dtype, device: torch.device) -> None:
    done: dict[int, list[list[Tensor]]] = {11: [], 12: []}
    for seed, ends in done.items():
        for fused in (False, True):
            params, optimizer = run("stochastic", dtype, fused, device)
            take_steps(optimizer, params, [0, 1])
            optimizer.param_groups[0]["seed"] = seed
            take_steps(optimizer, params, [2, 3])
            ends.append([bits(param) for param in params])
            assert optimizer.state_dict()["param_groups"][0]["rounding_steps"] == 4
    for ends in done.values():
        assert_bits(*ends)
    assert not torch.equal(done[11][0][0], done[12][0][0])


def test_parameters_of_an_optimizer_round_apart(path: StepPath) -> None:
    params = [Parameter(torch.ones(256, dtype=BFLOAT16, device=path.device)) for _ in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    # halfway to the next value below 1
    optimizer = BNGD(
        groups, 2.0**-9, 0.0, weight_decay=1.0, master_weights="stochastic", fused=path.fused
    )
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    one, other, of_another_group = (param.detach() == 1 for param in params)
    for more in (other, of_another_group):
        assert not torch.equal(one, more)


def test_a_model_cast_to_the_other_narrow_type(path: StepPath) -> None:
    params, optimizer = run("split", FLOAT16, path.fused, path.device)
    model = torch.nn.ParameterList(params)
    take_steps(optimizer, params, [0])
    model.to(BFLOAT16)
    take_steps(optimizer, params, [1])
    assert set(optimizer.state[params[0]]) == {"momentum_buffer", "master_remainder"}
    # so that the checkpoint loads
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))

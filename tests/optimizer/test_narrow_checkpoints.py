"""Checkpoints and copies of optimizers of bfloat16 and float16 parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bngd_triton import BNGD
from support.checkpoints import through_a_file
from support.exact_runs import (
    assert_bits,
    make_params,
    state_of,
    take_steps,
)
from support.narrow_runs import BFLOAT16, FLOAT16, FLOAT32, modes, narrow, run
from support.paths import StepPath
from support.snapshots import snapshot
from support.steps import COPIES


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

"""State dicts that are refused, and change nothing."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support.checkpoints import SHAPES
from support.runs import everything, refused, start
from support.steps import assert_equal, make_params, set_grads, take_steps

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
start = functools.partial(start, shapes=SHAPES)
Spoil = Callable[[dict[str, Any]], Any]


class Refused(NamedTuple):
    desc: str
    # makes a good checkpoint a bad one
    spoil: Spoil
    match: str
    error: type[Exception] = ValueError
    dtype: torch.dtype = torch.float32


def of_another(kind, **options):
    def spoil(saved):
        params = make_params(torch.device("cpu"), shapes=SHAPES)
        optimizer = kind(params, **options)
        set_grads(params, 0)
        optimizer.step()
        saved.update(optimizer.state_dict())

    return spoil


def with_state(key, change):
    def spoil(saved):
        state = saved["state"][1]
        state[key] = change(state.get(key, state["momentum_buffer"]))

    return spoil


def with_option(**options):
    return lambda saved: saved["param_groups"][0].update(options)


def with_entry(entry):
    return lambda saved: saved["state"].update({1: entry})


def one_group_more(saved):
    saved["param_groups"].append({**saved["param_groups"][0], "params": [9]})


MOMENTUM, REST, MASTER = "momentum_buffer", "master_remainder", "master"
SECOND = r"param_groups\[0\]\['params'\]\[1\]"
# of a wrapper: torch's loader copies it
UNCOPYABLE = {MOMENTUM: torch.ones(3, 2, 2, 5), "file": (x for x in "ab")}
REFUSED = [
    Refused("SGD", of_another(torch.optim.SGD, lr=0.1), r"param_groups\[0\] .*not a BNGD check"),
    Refused("SGD_momentum", of_another(torch.optim.SGD, momentum=0.9), "not a BNGD checkpoint"),
    Refused("AdamW", of_another(torch.optim.AdamW), "not a BNGD checkpoint"),
    Refused(
        "momentum_of_another_shape", with_state(MOMENTUM, lambda m: m[:2]),
        rf"momentum_buffer of {SECOND} has shape \(2, 2, 2, 5\), the parameter \(3, 2, 2, 5\)",
    ),
    # it would broadcast
    Refused("momentum_of_one_entry", with_state(MOMENTUM, Tensor.sum), r"_buffer .* shape \(\)"),
    # as many entries, elsewhere
    Refused("momentum_flattened", with_state(MOMENTUM, Tensor.flatten), r"_buffer .*shape \(60,\)"),
    Refused("integer_momentum", with_state(MOMENTUM, Tensor.long), r"_buffer .* torch\.int64"),
    Refused("complex_momentum", with_state(MOMENTUM, Tensor.cfloat), r"_buffer .*torch\.complex64"),
    Refused(
        "sparse_momentum", with_state(MOMENTUM, Tensor.to_sparse),
        rf"momentum_buffer of {SECOND} is torch\.sparse_coo; .*to_dense",
    ),
    Refused(
        "momentum_on_meta", with_state(MOMENTUM, lambda m: m.to("meta")),
        r"momentum_buffer of .*\[1\] is on the meta device and has no values",
    ),
    Refused("no_entry", with_entry(None), r"the state of .*\[1\] is a NoneType, not a dict"),
    Refused("tensor_entry", with_entry(torch.ones(3)), r"the state of .*\[1\] is a Tensor, not a"),
    Refused("what_cannot_be_copied", with_entry(UNCOPYABLE), "generator", TypeError),
    Refused("no_state", lambda saved: saved.pop("state"), r"got a dict of 'param_groups'"),
    Refused(
        "one_parameter_less", lambda saved: saved["param_groups"][0]["params"].pop(),
        "doesn't match the size",
    ),
    Refused("one_group_more", one_group_more, "different number of parameter groups"),
    Refused("bad_lr", with_option(lr=-1.0), r"lr must be >= 0.*, got -1\.0"),
    Refused("bad_lr_type", with_option(lr="0.1"), r"lr must be a number, got '0\.1'", TypeError),
    Refused("granularity", with_option(granularity="column"), "granularity must be .* got .column"),
    Refused("master_weights", with_option(master_weights="all"), "master_weights must be one of"),
    Refused("momentum_dtype", with_option(momentum_dtype=FLOAT16), "momentum_dtype must be one of"),
    Refused("seed", with_option(seed=-1), "seed must be >= 0"),
    Refused("rounding_steps", with_option(rounding_steps="many"), "rounding_steps"),
    Refused("micro_step", with_option(micro_step=-1), "micro_step"),
]  # fmt: skip
REFUSED += [
    Refused(*case, ValueError, BFLOAT16)
    for case in (
        ("rest_of_another_shape", with_state(REST, lambda t: t[:1]), "master_remainder of .*shape"),
        ("float_rest", with_state(REST, Tensor.float), r"dtype torch\.float32.*int16"),
        ("wide_rest", with_state(REST, Tensor.int), r"dtype torch\.int32"),
        ("number", with_state(REST, lambda t: 3), "is a int, not a tensor"),
        ("master_of_float16", with_state(MASTER, Tensor.float), "holds a master, which belongs"),
    )
]
REFUSED += [
    Refused(*case, ValueError, FLOAT16)
    for case in (
        ("narrow_master", with_state(MASTER, Tensor.half), r"dtype torch\.float16"),
        ("rest_of_bfloat16", with_state(REST, Tensor.short), "holds a master_remainder"),
    )
]


@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
@pytest.mark.parametrize("case", REFUSED, ids=[case.desc for case in REFUSED])
def test_refused_checkpoints_change_nothing(case, steps, path):
    source, good = start(path, case.dtype, lr=0.1)
    take_steps(good, source, [7])
    bad = copy.deepcopy(good.state_dict())
    case.spoil(bad)
    (params, optimizer), (twins, untouched) = (start(path, case.dtype, lr=0.2) for _ in range(2))
    take_steps(optimizer, params, range(steps))
    with refused(case.error, case.match, optimizer, params):
        optimizer.load_state_dict(bad)
    # and it goes on as if nothing had been tried
    take_steps(untouched, twins, range(steps + 1))
    take_steps(optimizer, params, [steps])
    assert_equal(everything(optimizer, params), everything(untouched, twins))


def no_memory(*_):
    raise torch.OutOfMemoryError("no memory left")


def test_a_load_that_breaks_off_changes_nothing(path, monkeypatch):
    source, good = start(path, lr=0.1, accumulation_steps=2)
    take_steps(good, source, [7])
    (params, optimizer), (twins, untouched) = (start(path, lr=0.2) for _ in range(2))
    take_steps(optimizer, params, range(4))
    groups = optimizer.param_groups

    def load_and_fail():
        with refused(torch.OutOfMemoryError, "no memory left", optimizer, params):
            optimizer.load_state_dict(good.state_dict())
        assert optimizer.param_groups is groups

    for register in (
        optimizer.register_load_state_dict_pre_hook,
        optimizer.register_load_state_dict_post_hook,
    ):
        handle = register(no_memory)
        load_and_fail()
        handle.remove()
    for name in ("zeros_like", "as_window"):
        with monkeypatch.context() as patch:
            patch.setattr(f"bngd_triton.state_dicts.{name}", no_memory)
            load_and_fail()
    # the loader's own hooks do not pile up
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    take_steps(untouched, twins, range(5))
    take_steps(optimizer, params, [4])
    assert_equal(params, twins)


def test_options_of_checkpoint_and_optimizer_that_do_not_go_together(path):
    params, optimizer = start(path, nesterov=True)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["nesterov"]
    saved["param_groups"][0]["momentum"] = 0.0
    with refused(ValueError, "nesterov needs momentum > 0", optimizer, params):
        optimizer.load_state_dict(saved)

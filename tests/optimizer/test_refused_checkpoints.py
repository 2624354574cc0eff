"""State dicts that are refused, and change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from support.checkpoints import make_params
from support.paths import StepPath
from support.snapshots import snapshot
from support.steps import assert_equal, take_steps


class Refused(NamedTuple):
    desc: str
    # from a good checkpoint of the same parameters to a bad one
    spoil: Callable[[dict[str, Any], list[Parameter]], dict[str, Any]]
    error: type[Exception]
    match: str


def of_another_optimizer(
    kind: type[torch.optim.Optimizer], **options: Any
) -> Callable[[dict[str, Any], list[Parameter]], dict[str, Any]]:
    def spoil(_: dict[str, Any], params: list[Parameter]) -> dict[str, Any]:
        optimizer = kind(params, **options)
        for param in params:
            param.grad = torch.ones_like(param)
        with torch.no_grad():
            optimizer.step()
        return optimizer.state_dict()

    return spoil


def with_momentum(
    change: Callable[[Tensor], Tensor],
) -> Callable[[dict[str, Any], list[Parameter]], dict[str, Any]]:
    def spoil(saved: dict[str, Any], _: list[Parameter]) -> dict[str, Any]:
        state = saved["state"][1]
        state["momentum_buffer"] = change(state["momentum_buffer"])
        return saved

    return spoil


def with_option(
    **options: Any,
) -> Callable[[dict[str, Any], list[Parameter]], dict[str, Any]]:
    def spoil(saved: dict[str, Any], _: list[Parameter]) -> dict[str, Any]:
        saved["param_groups"][0].update(options)
        return saved

    return spoil


def with_entry(entry: Any) -> Callable[[dict[str, Any], list[Parameter]], dict[str, Any]]:
    def spoil(saved: dict[str, Any], _: list[Parameter]) -> dict[str, Any]:
        saved["state"][1] = entry
        return saved

    return spoil


def one_parameter_less(saved: dict[str, Any], _: list[Parameter]) -> dict[str, Any]:
    saved["param_groups"][0]["params"].pop()
    return saved


def one_group_more(saved: dict[str, Any], _: list[Parameter]) -> dict[str, Any]:
    saved["param_groups"].append({**saved["param_groups"][0], "params": [9]})
    return saved


REFUSED = [
    Refused(
        "SGD",
        of_another_optimizer(torch.optim.SGD, lr=0.1),
        ValueError,
        r"param_groups\[0\] .*not a BNGD checkpoint",
    ),
    Refused(
        "SGD_with_momentum",
        of_another_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
        ValueError,
        r"not a BNGD checkpoint",
    ),
    Refused("AdamW", of_another_optimizer(torch.optim.AdamW), ValueError, r"not a BNGD checkpoint"),
    Refused(
        "momentum_of_another_shape",
        with_momentum(lambda m: m[:2]),
        ValueError,
        r"momentum_buffer of param_groups\[0\]\['params'\]\[1\] has shape \(2, 2, 2, 5\), "
        r"the parameter \(3, 2, 2, 5\)",
    ),
    Refused(
        # it would broadcast
        "momentum_of_one_entry",
        with_momentum(lambda m: m.sum()),
        ValueError,
        r"momentum_buffer of .* has shape \(\)",
    ),
    Refused(
        # as many entries, elsewhere
        "momentum_flattened",
        with_momentum(lambda m: m.flatten()),
        ValueError,
        r"momentum_buffer of .* has shape \(60,\)",
    ),
    Refused(
        "integer_momentum",
        with_momentum(lambda m: m.long()),
        ValueError,
        r"momentum_buffer of .* has dtype torch\.int64",
    ),
    Refused(
        "complex_momentum",
        with_momentum(lambda m: m.to(torch.complex64)),
        ValueError,
        r"momentum_buffer of .* has dtype torch\.complex64",
    ),
    Refused("bad_lr", with_option(lr=-1.0), ValueError, r"lr must be >= 0.*, got -1\.0"),
    Refused("bad_lr_type", with_option(lr="0.1"), TypeError, r"lr must be a number, got '0\.1'"),
    Refused(
        "unknown_granularity",
        with_option(granularity="column"),
        ValueError,
        r"granularity must be one of .*, got 'column'",
    ),
    Refused(
        "sparse_momentum",
        with_momentum(lambda m: m.to_sparse()),
        ValueError,
        r"momentum_buffer of param_groups\[0\]\['params'\]\[1\] is torch\.sparse_coo; .*to_dense",
    ),
    Refused(
        "momentum_on_meta",
        with_momentum(lambda m: m.to("meta")),
        ValueError,
        r"momentum_buffer of .*\[1\] is on the meta device and has no values",
    ),
    Refused("no_entry", with_entry(None), ValueError, r"the state of .*\[1\] is a NoneType, not"),
    Refused(
        "tensor_entry",
        with_entry(torch.ones(3)),
        ValueError,
        r"the state of .*\[1\] is a Tensor, not a dict",
    ),
    Refused(
        # of a wrapper: torch's loader copies it
        "what_cannot_be_copied",
        with_entry({"momentum_buffer": torch.ones(3, 2, 2, 5), "file": (x for x in "ab")}),
        TypeError,
        "generator",
    ),
    Refused(
        "no_state",
        lambda saved, _: {"param_groups": saved["param_groups"]},
        ValueError,
        r"a state dict has .* got a dict of 'param_groups'",
    ),
    Refused("one_parameter_less", one_parameter_less, ValueError, "doesn't match the size"),
    Refused("one_group_more", one_group_more, ValueError, "different number of parameter groups"),
]


@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
@pytest.mark.parametrize("case", REFUSED, ids=[case.desc for case in REFUSED])
def test_refused_checkpoints_change_nothing(case: Refused, steps: int, path: StepPath) -> None:
    source = make_params(path.device)
    good = BNGD(source, lr=0.1, fused=path.fused)
    take_steps(good, source, [7])
    bad = case.spoil(copy.deepcopy(good.state_dict()), make_params(path.device))

    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.2, fused=path.fused)
    take_steps(optimizer, params, range(steps))
    before = snapshot(optimizer, params)
    with pytest.raises(case.error, match=case.match):
        optimizer.load_state_dict(bad)
    assert snapshot(optimizer, params) == before
    # and it goes on as if nothing had been tried
    twins = make_params(path.device)
    untouched = BNGD(twins, lr=0.2, fused=path.fused)
    take_steps(untouched, twins, range(steps + 1))
    take_steps(optimizer, params, [steps])
    assert_equal(params, twins)


def test_names_of_parameters_are_in_the_refusal(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(zip("abcd", params), fused=path.fused)
    take_steps(optimizer, params, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"momentum_buffer of c has shape \(3,\)"):
        optimizer.load_state_dict(saved)


def no_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("no memory left")


def test_a_load_that_breaks_off_changes_nothing(
    path: StepPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_params(path.device)
    good = BNGD(source, lr=0.1, accumulation_steps=2, fused=path.fused)
    take_steps(good, source, [7])
    params = make_params(path.device)
    optimizer = BNGD(params, lr=0.2, fused=path.fused)
    take_steps(optimizer, params, range(4))
    before, groups = snapshot(optimizer, params), optimizer.param_groups

    def refused(error: type[Exception]) -> None:
        with pytest.raises(error):
            optimizer.load_state_dict(good.state_dict())
        assert snapshot(optimizer, params) == before
        assert optimizer.param_groups is groups
        assert not optimizer._optimizer_load_state_dict_post_hooks

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    for register in (
        optimizer.register_load_state_dict_pre_hook,
        optimizer.register_load_state_dict_post_hook,
    ):
        handle = register(stop)
        with pytest.raises(ZeroDivisionError):
            optimizer.load_state_dict(good.state_dict())
        handle.remove()
        assert snapshot(optimizer, params) == before
    for name in ("zeros_like", "as_window"):
        with monkeypatch.context() as patch:
            patch.setattr(f"bngd_triton.state_dicts.{name}", no_memory)
            refused(torch.OutOfMemoryError)
    twins = make_params(path.device)
    untouched = BNGD(twins, lr=0.2, fused=path.fused)
    take_steps(untouched, twins, range(5))
    take_steps(optimizer, params, [4])
    assert_equal(params, twins)


def test_options_of_checkpoint_and_optimizer_that_do_not_go_together(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD([{"params": params, "nesterov": True}], fused=path.fused)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["nesterov"]
    saved["param_groups"][0]["momentum"] = 0.0
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"nesterov needs momentum > 0"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer, params) == before

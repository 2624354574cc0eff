"""Parameters without a gradient: of any kind, and not looked at before one comes."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from bngd_triton import BNGD
from support.runs import refused, start
from support.steps import assert_equal, make_params, set_grads, take_steps, values

WAY_OUT = r".*; without a gradient \(requires_grad_\(False\), \.grad = None\) it is left alone$"


class Odd(NamedTuple):
    """A parameter of a kind that no step knows."""

    desc: str
    make: Callable[[], Tensor]
    match: str
    error: type[Exception] = TypeError


def no_grad(tensor):
    return Parameter(tensor, requires_grad=False)


OVERLAPS = "overlaps itself in memory"
ODD = [
    Odd("uint8", lambda: no_grad(torch.ones(3).byte()), r"has dtype torch\.uint8"),
    Odd("int8", lambda: no_grad(torch.ones(3).char()), r"has dtype torch\.int8"),
    Odd("bool", lambda: no_grad(torch.ones(3).bool()), r"has dtype torch\.bool"),
    Odd(
        "float8", lambda: no_grad(torch.ones(3).to(torch.float8_e4m3fn)),
        r"dtype torch\.float8_e4m3fn; BNGD takes float16, bfloat16, float32, float64",
    ),
    Odd(
        "complex", lambda: Parameter(torch.ones(3).cfloat()),
        r"dtype torch\.complex64.*last dimension of 2, and use torch\.view_as_complex\(parameter\)",
    ),
    Odd("sparse", lambda: no_grad(torch.eye(3).to_sparse()), r"is torch\.sparse_coo; BNGD needs"),
    Odd("expanded", lambda: no_grad(torch.ones(1, 3).expand(4, 3)), OVERLAPS, ValueError),
    Odd(
        "overlapping", lambda: Parameter(torch.ones(9).as_strided((3, 3), (1, 1))), OVERLAPS,
        ValueError,
    ),
]  # fmt: skip
odd_ones = pytest.mark.parametrize("odd", ODD, ids=[odd.desc for odd in ODD])


@odd_ones
@pytest.mark.parametrize("added", [False, True], ids=["constructor", "add_param_group"])
def test_parameters_of_any_kind_are_left_alone_until_a_gradient_comes(added, odd, path):
    options = {"lr": 0.1, "granularity": "global" if added else "row"}
    params, one = make_params(path.device), odd.make()
    alone, plain = start(path, **options)
    given = [no_grad(torch.ones(1))] if added else [*params, one]
    optimizer = BNGD(given, fused=path.fused, **options)
    if added:
        optimizer.add_param_group({"params": [*params, one]})
    for seed in range(4):
        take_steps(optimizer, params, [seed])
        take_steps(plain, alone, [seed])
    assert_equal(params, alone)
    assert one not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())

    set_grads(params, 9)
    one.grad = one.detach().clone()
    match = rf"^param_groups\[{int(added)}\]\['params'\]\[3\] .*{odd.match}{WAY_OUT}"
    with refused(odd.error, match, optimizer, params):
        optimizer.step()
    # the way out
    one.grad = None
    optimizer.step()


@odd_ones
def test_the_kernels_may_be_insisted_on_beside_frozen_parameters(odd, device):
    params, one = make_params(device), odd.make().requires_grad_(False)
    address = None if one.is_sparse else one.data_ptr()
    optimizer = BNGD([*params, one], lr=0.1, fused=True, flatten=True)
    optimizer.add_param_group({"params": [odd.make().requires_grad_(False)]})
    take_steps(optimizer, params, range(3))
    assert one.is_sparse or one.data_ptr() == address


def test_frozen_float64_beside_the_kernels(device):
    params, frozen = make_params(device), no_grad(torch.ones(3, dtype=torch.float64).to(device))
    optimizer = BNGD([*params, frozen], lr=0.1, fused=True, flatten=True)
    take_steps(optimizer, params, range(3))
    set_grads([*params, frozen], 4)
    with pytest.raises(RuntimeError, match=r"fused=True cannot serve .*\[3\]: .*got torch.float64"):
        optimizer.step()
    # and it is no reason against the kernels in a group of one slice
    optimizer = BNGD([*make_params(device), frozen], granularity="global", fused=True)


def test_a_frozen_parameter_on_another_device_in_a_group_of_one_slice(path):
    params = make_params(path.device)
    frozen = no_grad(torch.ones(3, device="meta"))
    optimizer = BNGD([*params, frozen], lr=0.1, granularity="global", fused=path.fused)
    before = values(params)
    take_steps(optimizer, params, range(3))
    assert not any(map(torch.equal, params, before))


@pytest.mark.parametrize("options", [{}, {"granularity": "global"}, {"accumulation_steps": 2}])
def test_lazy_modules_are_served_once_they_have_shapes(options, path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)).to(path.device)

    x = torch.randn(8, 6, device=path.device)
    early, late = make(), make()
    a = BNGD(early.named_parameters(), lr=0.1, fused=path.fused, **options)
    a.add_param_group({"params": [("spare", nn.LazyLinear(2).weight)]})
    assert a.state_dict()["state"] == {}
    for model in (early, late):
        torch.manual_seed(1)
        model(x)
    b = BNGD(late.named_parameters(), lr=0.1, fused=path.fused, **options)
    for _ in range(4):
        for model, optimizer in ((early, a), (late, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert_equal(list(early.parameters()), list(late.parameters()))
    assert not torch.equal(early[0].weight, make()(x).detach())


def test_lazy_parameters_have_no_place_in_a_flat_buffer(device):
    params = list(nn.LazyLinear(4).to(device).parameters())
    with pytest.raises(RuntimeError, match=r"flatten=True cannot move .* before one forward pass"):
        BNGD(params, fused=True, flatten=True)


def test_state_for_a_lazy_parameter_waits_for_its_shape(path):
    model, again = nn.LazyLinear(4).to(path.device), nn.LazyLinear(4).to(path.device)
    optimizer = BNGD(model.parameters(), fused=path.fused)
    model(torch.ones(2, 3, device=path.device)).sum().backward()
    optimizer.step()
    loaded = BNGD(again.named_parameters(), fused=path.fused)
    with pytest.raises(ValueError, match=r"weight has no shape yet.*one forward pass"):
        loaded.load_state_dict(optimizer.state_dict())
    again(torch.ones(2, 3, device=path.device))
    loaded.load_state_dict(optimizer.state_dict())

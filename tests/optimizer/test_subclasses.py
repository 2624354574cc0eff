"""Tensors whose entries are not what lies at their address: the reference's, never the kernels'."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from bngd_triton import BNGD
from bngd_triton.kernels import fused_step_
from bngd_triton.kernels.support import why_not
from support import steps
from support.paths import StepPath
from support.runs import start
from support.steps import assert_equal, make_grads, make_params, momenta, take_steps, values


def twice(tensor):
    """A subclass that carries every operation out on two tensors."""
    return TwoTensor(tensor.detach().clone(), tensor.detach().clone())


class NoArithmetic(TwoTensor):
    """As the states of optimizers with few bits, which are only copied from and to."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mul.Tensor:
            raise NotImplementedError(f"no {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_kernels_serve_only_plain_memory():
    odd = {
        "subclass": twice(torch.ones(3)),
        "zeros_without_memory": torch._efficientzerotensor((3,)),
        "functional": torch._to_functional_tensor(torch.ones(3)),
        "meta": torch.ones(3, device="meta"),
    }
    assert [desc for desc, tensor in odd.items() if why_not(tensor) is None] == []
    with FakeTensorMode():
        assert "FakeTensor" in str(why_not(torch.ones(3)))
    reasons = []

    def note(x):
        reasons.append(why_not(x))
        return x.sum()

    torch.func.grad(note)(torch.ones(3))
    torch.func.vmap(note)(torch.ones(2, 3))
    assert all("torch.func" in str(reason) for reason in reasons)


def test_classes_without_operations_of_their_own_are_served(device):
    class MyParam(Parameter):
        """A class of a user's own."""

    for kind in (torch.Tensor, Parameter, torch.nn.Buffer, MyParam):
        plain = torch.ones(3, device=device)
        assert why_not(plain if kind is torch.Tensor else kind(plain)) is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "row", "nesterov": True},
        {"granularity": "global", "weight_decay": 0.1},
        {"accumulation_steps": 2},
        {"momentum": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subclasses_are_stepped_as_what_they_hold(dtype, options, device):
    plain = make_params(device, dtype)
    odd = [Parameter(twice(param)) for param in plain]
    a = BNGD(plain, lr=0.1, fused=False, **options)
    b = BNGD(odd, lr=0.1, **options)
    for seed in range(4):
        for param, twin, grad in zip(plain, odd, make_grads(plain, seed)):
            if seed == 2:
                grad.view(-1)[0] = torch.inf
            param.grad, twin.grad = grad, twice(grad)
        a.step()
        b.step()
    for half in ("a", "b"):
        assert_equal([getattr(param, half) for param in odd], plain)
    assert b.skipped == a.skipped > 0


def test_fused_refuses_a_subclass_by_name(device):
    with pytest.raises(RuntimeError, match=r"cannot serve odd: it is a TwoTensor, whose entries"):
        BNGD([("odd", Parameter(twice(torch.ones(3, device=device))))], fused=True)
    plain = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="it is a TwoTensor"):
        fused_step_([plain], [twice(plain)], None, lr=0.1, momentum=0.0)


@pytest.mark.parametrize("count", [1, 4], ids=["early", "when_steps_repeat"])
@pytest.mark.parametrize("what", ["gradient", "momentum_buffer", "master_remainder"])
def test_a_gradient_or_state_that_becomes_a_subclass_is_noticed(what, count, device):
    params, optimizer = start(StepPath(True, device), torch.bfloat16, lr=0.1)
    take_steps(optimizer, params, range(count))
    steps.set_grads(params, 9)
    if what == "gradient":
        params[0].grad = twice(params[0].grad)
    else:
        state = optimizer.state[params[0]]
        state[what] = twice(state[what])
    before = values(params)
    match = r"fused=True cannot serve param_groups\[0\]\['params'\]\[0\] .* is a TwoTensor"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert_equal(params, before)
    optimizer.fused = None
    optimizer.step()
    assert not any(map(torch.equal, params, before))


def test_state_without_arithmetic_is_refused_before_anything_changes(path):
    params, optimizer = start(path, lr=0.1)
    take_steps(optimizer, params, [0])
    state = optimizer.state[params[2]]
    buffer = state["momentum_buffer"]
    state["momentum_buffer"] = NoArithmetic(buffer.clone(), buffer.clone())
    steps.set_grads(params, 1)
    before = values(params)
    with pytest.raises(TypeError, match=r"momentum buffer of .*\[2\] is a NoArithmetic, which"):
        optimizer.step()
    assert_equal(params, before)


def test_a_parameter_with_a_negative_bit_is_not_the_kernels(device):
    def negative():
        values = torch.arange(6.0, device=device)
        return Parameter(torch.complex(values, values).conj().imag)

    param = negative()
    assert param.is_neg()
    with pytest.raises(RuntimeError, match=r"cannot serve .*negative bit"):
        BNGD([param], fused=True)
    plain = Parameter(param.detach().resolve_neg().clone())
    a, b = BNGD([param], lr=0.1), BNGD([plain], lr=0.1, fused=False)
    for one, optimizer in ((param, a), (plain, b)):
        take_steps(optimizer, [one], range(2))
    assert torch.equal(param, plain)
    assert torch.equal(*momenta(a, [param]), *momenta(b, [plain]))

"""Steps that repeat the one before: replayed, and never by mistake."""

import sys

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.engine import step as engine_step
from bngd_triton.engine.replay import same_kinds
from support.changes import CHANGES, pair, unaligned
from support.steps import set_grads


@pytest.fixture(params=["torch's guards", "in Python"])
def _ways(request, monkeypatch):
    if request.param == "in Python":
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)


def compare(device, layouts, steps, before, laid_out, **options):
    """Kernels and reference agree in steps with something `before` each, laid out in some only."""
    done = []
    for params, optimizer in pair(device, **options):
        for step in range(steps):
            set_grads(params, step)
            before(step, params, optimizer)
            layouts()
            optimizer.step()
            assert layouts() == laid_out(step, optimizer), step
        done.append(params)
    torch.testing.assert_close(*done, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("stay", [False, True], ids=["new gradients", "gradients that stay"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change, stay, device, layouts):
    done = []
    for params, optimizer in pair(device):
        set_grads(params, 0)
        for step in range(4):
            if not stay:
                set_grads(params, step)
            if step == 2:
                layouts()
                change(params, optimizer)
            optimizer.step()
            if step == 2:
                # the reference reads gradients wherever they lie
                assert layouts() == (optimizer.fused or change is not unaligned)
        done.append(params)
    torch.testing.assert_close(*done, rtol=0, atol=1e-6)


def test_tensors_of_two_devices_are_stepped_one_after_the_other(device, layouts, monkeypatch):
    """As if every other one lay elsewhere: a prepared step for each device, repeated as one."""
    right = engine_step._divided

    def divided(*args):
        found = right(*args)
        for pairs in list(found.served.values()):
            found.served.update({device: pairs[::2], torch.device("meta"): pairs[1::2]})
        return found

    def laid_out(step, optimizer):
        assert len(optimizer._stepper.prepared) == 2 * optimizer.fused
        return step == 0

    def other_rate(step, params, optimizer):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)

    monkeypatch.setattr(engine_step, "_divided", divided)
    compare(device, layouts, 4, other_rate, laid_out)


def test_an_empty_parameter_that_grows(device, layouts):
    params = [Parameter(torch.randn(n, device=device)) for n in (8, 0)]
    optimizer = BNGD(params, momentum=0.0, fused=True)
    set_grads(params, 0)
    for _ in range(6):
        optimizer.step()
    assert layouts() == 1
    params[1].data = torch.zeros(8, device=device)
    params[1].grad = torch.arange(8.0, device=device)
    optimizer.step()
    assert layouts() == 1
    assert params[1].abs().max() > 0


def test_state_of_the_users_own(device, layouts):
    param = Parameter(torch.randn(8, device=device))
    optimizer = BNGD([param], fused=True)
    optimizer.state["epoch"] = 3
    set_grads([param], 0)
    for _ in range(3):
        optimizer.step()
    assert layouts() == 1


@pytest.mark.parametrize("flatten", [None, False])
@pytest.mark.parametrize("by", ["conversion", "loading"])
def test_modules_are_changed_by_swapping(by, flatten, device, layouts):
    """torch refuses to swap tensors that have weak references."""
    model = torch.nn.Linear(4, 3, device=device)
    optimizer = BNGD(model.parameters(), fused=True, flatten=flatten)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _ in range(3):
            set_grads(list(model.parameters()), 0)
            optimizer.step()
        layouts()
        optimizer.zero_grad()
        if by == "conversion":
            model.bfloat16()
        else:
            model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = model.weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    # a state dict is copied to the memory that the new objects share with the old
    assert layouts() == (by == "conversion")
    assert not torch.equal(model.weight, before)


def test_a_late_gradient_is_noticed(device, layouts):
    def without(step, params, optimizer):
        if step < 2:
            params[2].grad = None

    compare(device, layouts, 4, without, lambda step, _: step in (0, 2))


def test_an_option_changed_alone_or_with_the_rate(device, layouts):
    def change(step, params, optimizer):
        first, second = optimizer.param_groups
        if step in (2, 3):
            first["lr"] = 1e-2 / step
        if step == 4:
            first["weight_decay"], second["lr"] = 0.3, 1e-2
        if step == 5:
            second["eps"], second["momentum"] = 1e-3, 0.5
        if step == 6:
            second["lr"] = torch.tensor(2e-3, device=device)
        if step == 7:
            second["lr"].fill_(4e-3)

    compare(device, layouts, 8, change, lambda step, _: step == 0, weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("lr", True, TypeError), ("eps", True, TypeError), ("lr", -1.0, ValueError)],
)
def test_a_bad_option_between_steps_is_refused(name, value, error, device):
    """Also one that equals the good one before it, as True equals 1."""
    param = Parameter(torch.randn(16, device=device))
    optimizer = BNGD([param], lr=1.0, eps=1.0, fused=True)
    for seed in range(3):
        set_grads([param], seed)
        optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0][name] = value
    for call in (optimizer.step, optimizer.sync_hyperparameters):
        with pytest.raises(error, match=name):
            call()
    assert torch.equal(param, before)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_unaligned_gradients_that_move_are_replayed(shift, device, layouts):
    """As views of a DDP bucket behind a parameter of odd length."""
    held = []

    def move(step, params, optimizer):
        for param in params[1:] if step < 5 else []:
            held.append(torch.empty(param.numel() + shift, device=device))
            param.grad = held[-1][shift:].view_as(param).copy_(param.grad)

    # 16 divides again what it did not: other kernels, which sum in another order
    compare(device, layouts, 6, move, lambda step, o: step == 0 or (step == 5 and bool(o.fused)))


def test_gradients_are_not_held(device):
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD(params, fused=True)
    for _ in range(3):
        set_grads(params, 0)
        optimizer.step()
    memory = [
        torch.multiprocessing.reductions.StorageWeakRef(param.grad.untyped_storage())
        for param in params
    ]
    optimizer.zero_grad()
    assert [one.expired() for one in memory] == [True, True]


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize(
    ("other", "desc"),
    [
        (torch.ones(3, 3).half(), "dtype"),
        (torch.ones(3, 4), "shape"),
        (torch.ones(3, 4)[:, :3], "strides"),
        (torch.ones(3, 3).to_sparse(), "layout"),
        (torch.ones(3, 3, device="meta"), "device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind(other, desc):
    one, two = torch.ones(3, 3), torch.ones(2)
    same = same_kinds([one, two])
    assert same(torch.zeros(3, 3), torch.zeros(2))
    assert not same(other, two), desc
    assert not same(two, one)

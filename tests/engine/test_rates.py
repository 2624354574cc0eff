"""Learning rates that are tensors on the device: one launch brings them to the table of options."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from bngd_triton import BNGD
from bngd_triton.kernels import fused_step, tables
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.kernels.rates import RATE_DTYPES, Rates
from bngd_triton.options import Options
from support import capture
from support.handmade_plans import member
from support.steps import make_params, take_steps


@pytest.fixture
def rates_on_a_device(monkeypatch):
    """Tensor rates are left to the kernel, as on a GPU."""
    for module in (tables, fused_step):
        monkeypatch.setattr(module, "on_a_device", lambda lr: isinstance(lr, Tensor))


# the last has no code: it is read through a copy
DTYPES = (*RATE_DTYPES, torch.float8_e5m2)


def laid_out(groups, device):
    """A step of one tensor."""
    one = member(*(torch.randn(16, device=device) for _ in range(3)))
    return FusedStep([one], groups)


def test_rates_on_a_device_are_those_of_floats_in_one_launch(device, launched, rates_on_a_device):
    """Bit for bit, `lr` and its product with the decay, in the row of its group only."""
    rates = [torch.tensor(0.1, device=device).to(dtype) for dtype in DTYPES]
    groups = [Options(lr, weight_decay=0.3) for lr in (0.7, *rates)]
    assert tables.encode(groups[1])[0] == 0, "not read"
    part = laid_out(groups, device)
    for value in (0.1, 0.0, 3e-5):
        for rate in rates:
            rate.copy_(torch.tensor(value, dtype=torch.float64))
        launched.clear()
        part.write(groups, [True] * len(groups))
        assert launched == ["_rates_kernel"]
        floats = [Options(float(lr), weight_decay=0.3) for lr in (0.7, *rates)]
        assert part.table.tolist() == list(map(tables.encode, floats))


def test_a_run_with_rates_on_a_device_has_the_bits_of_one_with_floats(
    device, launched, rates_on_a_device
):
    runs = []
    for on_a_device in (False, True):
        params = make_params(device)
        groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(params)]
        optimizer = BNGD(groups, fused=True)
        rates = [torch.tensor(0.1, device=device) for _ in groups]
        for step in range(5):
            for group, rate in zip(optimizer.param_groups, rates):
                rate.fill_(0.1 / (1 + step))
                group["lr"] = rate if on_a_device else float(rate)
            launched.clear()
            take_steps(optimizer, params, [step])
            assert launched.count("_rates_kernel") == on_a_device
        runs.append(params)
    assert all(map(torch.equal, *runs))


def test_a_rate_may_become_another_tensor_or_a_number(device, launched, rates_on_a_device):
    """What a captured launch reads is changed in place: a replay goes by it too."""
    part = laid_out([Options()], device)
    moved, *rates = (torch.tensor(lr, device=device) for lr in (0.3, 0.1, 0.2, 0.0, 0.4))
    replay = None
    for lr in (*rates[:2], moved, moved, 0.0, rates[2], 0.25, rates[3]):
        if lr is moved:
            moved.data = torch.tensor(float(lr) + 0.1, device=device)
        part.write([Options(lr, weight_decay=0.3)], [True])
        assert (launched[-1:] == ["_rates_kernel"]) == isinstance(lr, Tensor)
        want = tables.encode(Options(float(lr), weight_decay=0.3))
        assert part.table.tolist() == [want], lr
        replay = replay or part.rates._launch
        replay(None)
        assert part.table.tolist() == [want], lr
        launched.clear()


def test_a_rate_lives_as_long_as_it_is_read(device):
    lr = torch.tensor(0.1, device=device)
    kept = weakref.ref(lr)
    table = torch.zeros(1, tables.OPTION_COLUMNS, dtype=torch.float64, device=device)
    rates = Rates(table)
    rates.point_at([lr])
    del lr
    gc.collect()
    assert kept() is not None
    rates.point_at([None])
    gc.collect()
    assert kept() is None


def test_another_rate_is_refused_in_a_capture(device, monkeypatch, rates_on_a_device):
    first, second = (Options(torch.tensor(0.1, device=device)) for _ in range(2))
    step = laid_out([first], device)
    step.write([first], [True])
    capture.pretend(monkeypatch)
    step.write([first], [True])
    with pytest.raises(RuntimeError, match="an option changed while a CUDA graph"):
        step.write([second], [True])


def test_a_decay_set_after_a_capture_reaches_a_rate_on_a_device(device, rates_on_a_device):
    """A replay repeats what the host queued: with the options of the table."""
    rate = torch.tensor(0.1, device=device)
    part = laid_out([Options(rate)], device)
    part.write([Options(rate, weight_decay=0.3)], [True])
    now = tables.encode(Options(float(rate), weight_decay=0.9))
    part.table.copy_(torch.tensor([now], dtype=torch.float64))
    part.rates.write()
    assert part.table.tolist() == [now]

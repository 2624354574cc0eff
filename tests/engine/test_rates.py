"""Learning rates that are tensors on the device: one launch brings them to the table of options."""

from __future__ import annotations

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


@pytest.fixture
def rates_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor rates are left to the kernel, as on a GPU."""
    for module in (tables, fused_step):
        monkeypatch.setattr(module, "on_a_device", lambda lr: isinstance(lr, Tensor))


# the last has no code: it is read through a copy
DTYPES = (*RATE_DTYPES, torch.float8_e5m2)


def test_rates_on_a_device_are_those_of_floats_in_one_launch(
    device: torch.device, launched: list[str], rates_on_a_device: None
) -> None:
    """Bit for bit, `lr` and its product with the decay, in the row of its group only."""
    rates = [torch.tensor(0.1, device=device).to(dtype) for dtype in DTYPES]
    groups = [Options(lr, weight_decay=0.3) for lr in (0.7, *rates)]
    assert tables.encode(groups[1])[0] == 0, "not read"
    one = member(*(torch.randn(16, device=device) for _ in range(3)))
    (part,) = FusedStep([one], groups)._devices
    for value in (0.1, 0.0, 3e-5):
        for rate in rates:
            rate.copy_(torch.tensor(value, dtype=torch.float64))
        launched.clear()
        part.write(groups, [True] * len(groups))
        assert launched == ["_rates_kernel"]
        floats = [Options(float(lr), weight_decay=0.3) for lr in (0.7, *rates)]
        assert part.table.tolist() == list(map(tables.encode, floats))


def test_a_run_with_rates_on_a_device_has_the_bits_of_one_with_floats(
    device: torch.device, launched: list[str], rates_on_a_device: None
) -> None:
    torch.manual_seed(1)
    start = [torch.randn(300, device=device), torch.randn(4, 70, device=device)]
    grads = [[torch.randn_like(value) for value in start] for _ in range(5)]
    runs = []
    for on_a_device in (False, True):
        params = [torch.nn.Parameter(value.clone()) for value in start]
        groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(params)]
        optimizer = BNGD(groups, fused=True)
        rates = [torch.tensor(0.1, device=device) for _ in groups]
        for step, values in enumerate(grads):
            for group, rate, param, value in zip(optimizer.param_groups, rates, params, values):
                rate.fill_(0.1 / (1 + step))
                group["lr"] = rate if on_a_device else float(rate)
                param.grad = value.clone()
            launched.clear()
            optimizer.step()
            assert launched.count("_rates_kernel") == on_a_device
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_rate_may_become_another_tensor_or_a_number(
    device: torch.device, launched: list[str], rates_on_a_device: None
) -> None:
    """What a captured launch reads is changed in place: a replay goes by it too."""

    def rate(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    one = member(*(torch.randn(16, device=device) for _ in range(3)))
    (part,) = FusedStep([one], [Options()])._devices
    moved = rate(0.3)
    replay = None
    for lr in (rate(0.1), rate(0.2), moved, moved, 0.0, rate(0.0), 0.25, rate(0.4)):
        if lr is moved:
            moved.data = rate(float(lr) + 0.1)
        options = Options(lr, weight_decay=0.3)
        part.write([options], [True])
        assert (launched[-1:] == ["_rates_kernel"]) == isinstance(lr, Tensor)
        want = tables.encode(Options(float(lr), weight_decay=0.3))
        assert part.table.tolist() == [want], lr
        replay = replay or part.rates._launch
        replay(None)
        assert part.table.tolist() == [want], lr
        launched.clear()


def test_a_rate_lives_as_long_as_it_is_read(device: torch.device) -> None:
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


def test_another_rate_is_refused_in_a_capture(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rates_on_a_device: None
) -> None:
    first, second = (torch.tensor(0.1, device=device) for _ in range(2))
    one = member(*(torch.randn(16, device=device) for _ in range(3)))
    step = FusedStep([one], [Options(first)])
    step.write([Options(first)], [True])
    capture.pretend(monkeypatch)
    step.write([Options(first)], [True])
    with pytest.raises(RuntimeError, match="an option changed while a CUDA graph"):
        step.write([Options(second)], [True])


def test_a_decay_set_after_a_capture_reaches_a_rate_on_a_device(
    device: torch.device, rates_on_a_device: None
) -> None:
    """A replay repeats what the host queued: with the options of the table."""
    rate = torch.tensor(0.1, device=device)
    one = member(*(torch.randn(16, device=device) for _ in range(3)))
    (part,) = FusedStep([one], [Options(rate)])._devices
    part.write([Options(rate, weight_decay=0.3)], [True])
    now = Options(float(rate), weight_decay=0.9)
    part.table.copy_(torch.tensor([tables.encode(now)], dtype=torch.float64))
    part.rates.write()
    assert part.table.tolist() == [tables.encode(now)]

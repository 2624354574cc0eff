"""Accelerate's gradient accumulation divides by N, which the z-score does not see."""

import pytest
import torch
from torch import nn

from bngd_triton import BNGD

accelerate = pytest.importorskip("accelerate")
MICRO_BATCHES = 4
OPTIONS = {"lr": 1e-2, "granularity": "row", "eps": 0.0}


@pytest.fixture(autouse=True)
def _fresh_state():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count):
    torch.manual_seed(1)
    return [(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(count)]


def prepared(accelerator):
    net = model()
    return accelerator.prepare(net, BNGD(net.parameters(), **OPTIONS))


def train(accelerator, net, optimizer, data):
    for x, y in data:
        with accelerator.accumulate(net):
            accelerator.backward(nn.functional.mse_loss(net(x), y))
            optimizer.step()
            optimizer.zero_grad()


def test_accumulation_is_the_sum_of_micro_batches():
    want = model()
    plain = BNGD(want.parameters(), **OPTIONS)
    data = batches(3 * MICRO_BATCHES)
    for step in range(3):
        plain.zero_grad()
        for x, y in data[step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]:
            nn.functional.mse_loss(want(x), y).backward()
        plain.step()

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=MICRO_BATCHES, cpu=True)
    net, optimizer = prepared(accelerator)
    train(accelerator, net, optimizer, data)
    # the sum against the mean: a factor of 4, a power of two, so not a bit differs
    for ours, theirs in zip(net.parameters(), want.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_saved_state(tmp_path):
    data = batches(6)
    accelerator = accelerate.Accelerator(cpu=True)
    net, optimizer = prepared(accelerator)
    train(accelerator, net, optimizer, data[:3])
    accelerator.save_state(str(tmp_path))
    train(accelerator, net, optimizer, data[3:])
    want = [param.detach().clone() for param in net.parameters()]
    accelerator.load_state(str(tmp_path))
    assert not torch.equal(next(net.parameters()), want[0])
    train(accelerator, net, optimizer, data[3:])
    assert all(map(torch.equal, net.parameters(), want))


@pytest.mark.parametrize("kind", ["BNGD", "fused SGD"])
def test_accelerate_does_not_notice_an_overflow(kind):
    """As docs/integrations.md says; the scale tells."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    net = model()
    plain = BNGD(net.parameters(), **OPTIONS)
    if kind == "fused SGD":
        plain = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    before = [param.detach().clone() for param in net.parameters()]
    (x, y), *_ = batches(1)
    scaler.scale(nn.functional.mse_loss(net(x) * torch.inf, y)).backward()
    scale = scaler.get_scale()
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))
    assert scaler.get_scale() < scale
    assert not optimizer.step_was_skipped

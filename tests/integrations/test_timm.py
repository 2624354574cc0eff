"""timm makes a BNGD by name, with its own parameter groups."""

import logging

import pytest
import torch

from bngd_triton import BNGD
from bngd_triton.integrations import register_timm

timm = pytest.importorskip("timm")
timm_optim = pytest.importorskip("timm.optim")
timm_scheduler = pytest.importorskip("timm.scheduler")


@pytest.fixture
def model():
    register_timm()
    return timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8)


def step(model, optimizer):
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_trains_with_weight_decay_on_matrices_only(model):
    optimizer = timm_optim.create_optimizer_v2(
        model, "bngd", lr=3e-3, weight_decay=0.05, momentum=0.8, granularity="row", eps=1e-7
    )
    assert type(optimizer) is BNGD
    spared = model.no_weight_decay()
    names = {id(param): name for name, param in model.named_parameters()}
    seen = 0
    given = {"lr": 3e-3, "momentum": 0.8, "granularity": "row", "eps": 1e-7}
    for group in optimizer.param_groups:
        assert given.items() <= group.items()
        for param in group["params"]:
            decays = param.dim() > 1 and names[id(param)] not in spared
            assert group["weight_decay"] == (0.05 if decays else 0.0)
            seen += 1
    assert seen == len(names)
    # chance is log(3) = 1.1
    assert step(model, optimizer) < 0.5


def test_layer_decay(model):
    optimizer = timm_optim.create_optimizer_v2(model, "bngd", lr=3e-3, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 2
    # timm's schedulers apply the scale
    scheduler = timm_scheduler.CosineLRScheduler(optimizer, t_initial=10)
    scheduler.step(5)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1.5e-3 * group["lr_scale"])
    step(model, optimizer)


def test_registers_once(caplog):
    with caplog.at_level(logging.WARNING):
        register_timm()
        register_timm()
    assert not caplog.records
    assert "bngd" in timm_optim.list_optimizers()

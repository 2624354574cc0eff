"""What users do with a model whose parameters lie in flat buffers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bngd_triton import BNGD
from support.flat_models import (
    assert_in_one_buffer,
    assert_own_storages,
    flat_model,
    make_model,
    spans,
    train,
)
from support.paths import StepPath


def test_safetensors_save_model(tmp_path: Path, device: torch.device) -> None:
    model, optimizer = flat_model(device)
    expected = train(model, optimizer)
    file = str(tmp_path / "model.safetensors")
    safetensors.torch.save_model(model, file)
    train(model, optimizer)
    # into the flattened model, in place
    for other in (make_model(device), model):
        before = spans(list(other.parameters()))
        safetensors.torch.load_model(other, file, device=str(device))
        assert all(map(torch.equal, other.parameters(), expected))
        assert spans(list(other.parameters())) == before


def test_safetensors_save_file(tmp_path: Path, device: torch.device) -> None:
    model, optimizer = flat_model(device)
    train(model, optimizer)
    tensors = model.state_dict()
    for i, param in enumerate(model.parameters()):
        tensors[f"momentum.{i}"] = optimizer.state[param]["momentum_buffer"]
    safetensors.torch.save_file(tensors, str(tmp_path / "all.safetensors"))
    loaded = safetensors.torch.load_file(str(tmp_path / "all.safetensors"), device=str(device))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_saving_one_layer_writes_one_layer(device: torch.device) -> None:
    # 400 kB in all, 400 bytes in the one that is saved
    model = torch.nn.ModuleList(
        torch.nn.Linear(*size, bias=False) for size in ((10, 10), (1000, 100))
    )
    params = list(model.to(device).parameters())
    optimizer = BNGD(params, fused=True)
    assert_in_one_buffer(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    for saved in (params[0].data, optimizer.state[params[0]]["momentum_buffer"]):
        file = io.BytesIO()
        torch.save(saved, file)
        # a zip archive with a few records takes 2 kB
        assert len(file.getvalue()) < 4096
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), saved)


def test_deepcopy_copies_each_tensor_alone(device: torch.device) -> None:
    model, optimizer = flat_model(device)
    copies = list(copy.deepcopy(model).parameters())
    before = [param.clone() for param in copies]
    assert_own_storages(copies)
    train(model, optimizer)
    assert all(map(torch.equal, copies, before))
    assert not any(map(torch.equal, copies, model.parameters()))
    # a copy is nobody's: another optimizer may flatten it
    BNGD(copies, fused=True, flatten=True)
    assert_in_one_buffer(copies)


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.share_memory(),
        lambda model: model.to(torch.float64).to(torch.float32),
    ],
    ids=["shared", "cast_and_back"],
)
def test_parameters_that_moved_are_trained_where_they_are(
    move: Callable[[Any], Any], device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("shared memory is the CPU's")
    plain = make_model(device)
    expected = train(plain, BNGD(plain.parameters(), lr=0.1, fused=True, flatten=False), range(2))
    model, optimizer = flat_model(device)
    values = train(model, optimizer)
    move(model)
    before = spans(list(model.parameters()))
    assert all(map(torch.equal, model.parameters(), values))
    assert all(map(torch.equal, train(model, optimizer, [1]), expected))
    assert spans(list(model.parameters())) == before


def test_torch_compile_sees_the_steps(device: torch.device) -> None:
    model, optimizer = flat_model(device)
    compiled = torch.compile(model, backend="aot_eager")
    plain = make_model(device)
    x = torch.randn(4, 7, device=device)
    assert torch.equal(compiled(x), plain(x))
    reference = BNGD(plain.parameters(), lr=0.1, fused=True, flatten=False)
    for _ in range(2):
        for net, opt in ((compiled, optimizer), (plain, reference)):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
        assert torch.equal(compiled(x), plain(x))


@pytest.mark.parametrize("flatten", [None, False], ids=["auto", "in_place"])
def test_views_that_exist_never_move(flatten: bool | None, device: torch.device) -> None:
    """Under a second optimizer, with a new group, and from a checkpoint."""
    model, optimizer = flat_model(device)
    views = [param.data for param in model.parameters()]
    train(model, BNGD(model.parameters(), lr=0.1, fused=True, flatten=flatten))
    optimizer.add_param_group({"params": list(make_model(device).parameters())})
    train(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    for param, view in zip(model.parameters(), views):
        assert param.data_ptr() == view.data_ptr()
        assert torch.equal(param, view)


def test_lstm_weights_step_in_place(path: StepPath) -> None:
    lstm = torch.nn.LSTM(3, 4).to(path.device)
    lstm.flatten_parameters()
    params = list(lstm.parameters())
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    before, values = spans(params), [param.detach().clone() for param in params]
    lstm(torch.randn(2, 1, 3, device=path.device))[0].square().mean().backward()
    optimizer.step()
    assert spans(params) == before
    assert not any(map(torch.equal, params, values))
    # the module's own list still holds the parameters that were stepped
    assert all(a is b for a, b in zip(lstm._flat_weights, params))

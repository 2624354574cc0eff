"""What users do with a model whose parameters lie in flat buffers."""

from __future__ import annotations

import copy
import io
from pathlib import Path

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
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    fresh = make_model(device)
    safetensors.torch.load_model(fresh, str(tmp_path / "model.safetensors"), device=str(device))
    for got, want in zip(fresh.parameters(), expected):
        assert torch.equal(got, want)
    # and into the flattened model, in place
    before = spans(list(model.parameters()))
    train(model, optimizer)
    safetensors.torch.load_model(model, str(tmp_path / "model.safetensors"), device=str(device))
    assert spans(list(model.parameters())) == before
    for got, want in zip(model.parameters(), expected):
        assert torch.equal(got, want)


def test_safetensors_save_file(tmp_path: Path, device: torch.device) -> None:
    model, optimizer = flat_model(device)
    train(model, optimizer)
    tensors = model.state_dict()
    tensors |= {
        f"momentum.{i}": optimizer.state[param]["momentum_buffer"]
        for i, param in enumerate(model.parameters())
    }
    safetensors.torch.save_file(tensors, str(tmp_path / "all.safetensors"))
    loaded = safetensors.torch.load_file(str(tmp_path / "all.safetensors"), device=str(device))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("what", ["layer", "momentum"])
def test_saving_one_layer_writes_one_layer(what: str, device: torch.device) -> None:
    # 400 kB in all, 400 bytes in the one that is saved
    model = torch.nn.ModuleList([torch.nn.Linear(10, 10, bias=False)])
    model.append(torch.nn.Linear(1000, 100, bias=False))
    model = model.to(device)
    params = list(model.parameters())
    optimizer = BNGD(params, fused=True)
    assert_in_one_buffer(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    saved = {
        "layer": model[0].state_dict(),
        "momentum": optimizer.state[params[0]]["momentum_buffer"],
    }[what]
    file = io.BytesIO()
    torch.save(saved, file)
    # a zip archive with a few records takes 2 kB
    assert len(file.getvalue()) < 4096
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    if what == "layer":
        loaded, saved = loaded["weight"], params[0]
    assert torch.equal(loaded, saved)


def test_deepcopy_copies_each_tensor_alone(device: torch.device) -> None:
    model, optimizer = flat_model(device)
    twin = copy.deepcopy(model)
    copies = list(twin.parameters())
    before = [param.clone() for param in copies]
    assert_own_storages(copies)
    train(model, optimizer)
    for param, value, other in zip(copies, before, model.parameters()):
        assert torch.equal(param, value)
        assert not torch.equal(param, other)
    # a copy is nobody's: another optimizer may flatten it
    BNGD(copies, fused=True, flatten=True)
    assert_in_one_buffer(copies)


def test_share_memory(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("shared memory is the CPU's")
    model, optimizer = flat_model(device)
    plain = make_model(device)
    expected = train(plain, BNGD(plain.parameters(), lr=0.1, fused=True, flatten=False), steps=2)
    train(model, optimizer)
    values = [param.detach().clone() for param in model.parameters()]
    model.share_memory()
    for param, value in zip(model.parameters(), values):
        assert param.is_shared()
        assert torch.equal(param, value)
    # the second of the two steps, now in shared memory; the first seed was used before
    generator = torch.Generator().manual_seed(1)
    optimizer.zero_grad()
    model(torch.randn(4, 7, generator=generator)).square().mean().backward()
    optimizer.step()
    for got, want in zip(model.parameters(), expected):
        assert torch.equal(got, want)
        assert got.is_shared()


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


def test_module_to_leaves_the_buffer_and_trains_on(device: torch.device) -> None:
    model, optimizer = flat_model(device)
    train(model, optimizer)
    model.to(torch.float64).to(torch.float32)
    plain = make_model(device)
    expected = train(plain, BNGD(plain.parameters(), lr=0.1, fused=True), steps=2)
    generator = torch.Generator().manual_seed(1)
    optimizer.zero_grad()
    model(torch.randn(4, 7, generator=generator).to(device)).square().mean().backward()
    before = spans(list(model.parameters()))
    optimizer.step()
    # re-pointed parameters are walked where they are
    assert spans(list(model.parameters())) == before
    for got, want in zip(model.parameters(), expected):
        assert torch.equal(got, want)


def test_views_that_exist_never_move(device: torch.device) -> None:
    model, optimizer = flat_model(device)
    views = [param.data for param in model.parameters()]
    late = make_model(device)
    train(model, optimizer)
    optimizer.add_param_group({"params": list(late.parameters())})
    train(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    for param, view in zip(model.parameters(), views):
        assert param.data_ptr() == view.data_ptr()
        assert torch.equal(param, view)


def test_lstm_weights_step_in_place(path: StepPath) -> None:
    lstm = torch.nn.LSTM(3, 4).to(path.device)
    lstm.flatten_parameters()
    optimizer = BNGD(lstm.parameters(), lr=0.1, fused=path.fused)
    before = spans(list(lstm.parameters()))
    values = [param.detach().clone() for param in lstm.parameters()]
    lstm(torch.randn(2, 1, 3, device=path.device))[0].square().mean().backward()
    optimizer.step()
    assert spans(list(lstm.parameters())) == before
    assert all(not torch.equal(p, v) for p, v in zip(lstm.parameters(), values))
    # the module's own list still holds the parameters that were stepped
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters()))

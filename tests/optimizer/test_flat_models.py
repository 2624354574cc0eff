"""What users do with models in flat buffers, and parameters whose memory others see: they stay."""

import copy
import io

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import Parameter

from bngd_triton import BNGD, flat_buffers
from support.flat_models import (
    assert_in_one_buffer,
    assert_own_storages,
    flat_model,
    make_model,
    spans,
    train,
)


def test_safetensors_save_model(tmp_path, device):
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
    # which refuses tensors that share memory
    states = [optimizer.state[param] for param in model.parameters()]
    momenta = {str(i): state["momentum_buffer"] for i, state in enumerate(states)}
    safetensors.torch.save_file(momenta, file)


def test_saving_one_layer_writes_one_layer(device):
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


def test_deepcopy_copies_each_tensor_alone(device):
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


def test_parameters_that_moved_to_shared_memory_are_trained_there(device):
    if device.type != "cpu":
        pytest.skip("shared memory is the CPU's")
    plain = make_model(device)
    expected = train(plain, BNGD(plain.parameters(), lr=0.1, fused=True, flatten=False), range(2))
    model, optimizer = flat_model(device)
    values = train(model, optimizer)
    model.share_memory()
    before = spans(list(model.parameters()))
    assert all(map(torch.equal, model.parameters(), values))
    assert all(map(torch.equal, train(model, optimizer, [1]), expected))
    assert spans(list(model.parameters())) == before


def test_torch_compile_sees_the_steps(device):
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
def test_views_that_exist_never_move(flatten, device):
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


class Tagged(torch.Tensor):
    """A tensor subclass, as quantisation and sharding libraries make them."""


class Marked(Parameter):
    """A parameter class with setters of its own, as inference engines make them."""


def owned(share):
    """A parameter, and what others hold of its memory."""
    param = Parameter(torch.randn(3, 4))
    return [param], share(param)


def wrapped(owner, tensor):
    """A parameter in the memory of somebody else."""
    return [Parameter(tensor(owner))], owner


def views_of_one_storage():
    # as cuDNN's flat weights of an LSTM
    flat = torch.randn(24)
    return [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:20]), Parameter(flat[20:])], flat


def two_parameters_one_storage():
    param = Parameter(torch.randn(3, 3))
    return [param, Parameter(param.data.t())], None


def flattened_before():
    params = [Parameter(torch.randn(3, 4)), Parameter(torch.randn(5))]
    flat_buffers.flatten_(params)
    return params, None


PART, SHARED = "part of a larger storage", "other tensors share its storage"
FOREIGN = "memory belongs to somebody else"
# parameters and what must be kept alive, and why they stay
STAYS = {
    "views_of_one_storage": (views_of_one_storage, PART),
    "numpy_memory": (lambda: wrapped(np.ones(3, dtype=np.float32), torch.from_numpy), FOREIGN),
    "dlpack_memory": (lambda: wrapped(torch.randn(3, 4), torch.from_dlpack), FOREIGN),
    "detached_alias": (lambda: owned(torch.Tensor.detach), SHARED),
    "data_alias": (lambda: owned(lambda p: p.data.view(-1)), SHARED),
    # Parameter(tensor) shares the tensor's storage
    "wrapped_tensor": (lambda: wrapped(torch.randn(3, 4), lambda t: t), SHARED),
    "two_parameters_one_storage": (two_parameters_one_storage, SHARED),
    "shared_memory": (lambda: ([Parameter(torch.randn(3).share_memory_())], None), "shared memory"),
    "with_gaps": (lambda: ([Parameter(torch.randn(3, 8)[:, ::2])], None), PART),
    "at_an_offset": (lambda: ([Parameter(torch.randn(13)[1:])], None), PART),
    "without_entries": (lambda: ([Parameter(torch.empty(0, 3))], None), "no entries"),
    "tensor_subclass": (lambda: ([Parameter(torch.randn(3).as_subclass(Tagged))], None), "Tagged"),
    "parameter_subclass": (lambda: ([Marked(torch.randn(3, 4))], None), "Marked"),
    "flattened_before": (flattened_before, "another flat buffer"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), STAYS.values(), ids=STAYS)
def test_the_optimizer_leaves(make, reason, monkeypatch):
    # beside a parameter that does move; the kernels are not run here
    monkeypatch.setattr("bngd_triton.engine.collect.why_not", lambda _: None)
    params, kept = make()
    free = Parameter(torch.randn(3, 4))
    before, address = [(spans([param]), param.stride()) for param in params], spans([free])
    reasons = [flat_buffers.why_not_flat(param) for param in params]
    assert all(found and reason in found for found in reasons), reasons
    match = rf"flatten=True cannot move .*{reason}.*flatten=None"
    with pytest.raises(RuntimeError, match=match):
        BNGD([free, *params], fused=True, flatten=True)
    # the refusal comes before anything moves
    assert spans([free]) == address
    BNGD([*params, free], fused=True)
    assert [(spans([param]), param.stride()) for param in params] == before
    assert spans([free]) != address
    del kept


def test_an_alias_goes_on_seeing_the_parameter(path):
    flat = torch.randn(20, device=path.device)
    params = [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:])]
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert torch.equal(flat, torch.cat([param.detach().flatten() for param in params]))


def test_where_torch_does_not_count_aliases_parameters_stay(path, monkeypatch):
    """The count is a private function, which another torch may not have."""
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    param = Parameter(torch.randn(3, 4, device=path.device))
    address = param.data_ptr()
    BNGD([param], fused=path.fused)
    assert param.data_ptr() == address
    with pytest.raises(RuntimeError, match=r"flatten=True cannot move .*torch does not tell"):
        BNGD([param], fused=True, flatten=True)

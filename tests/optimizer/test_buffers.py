"""Flat buffers: what moves into them, and what they hold."""

import gc
import weakref

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD, flat_buffers
from support.flat_models import (
    ALIGNMENT,
    assert_in_one_buffer,
    assert_own_storages,
    make_model,
    spans,
    train,
)


def test_flattening_keeps_values_shapes_and_strides():
    """In one buffer for each dtype."""
    shapes = [(5, 7), (), (3,), (4, 3, 2, 5), (6, 1), (1, 129)]
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    params = [Parameter(torch.randn(shape).to(kind)) for shape in shapes for kind in kinds]
    for param in params:
        param.data = param.data.t() if param.shape == (5, 7) else param.data
        if param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    before = [(p.detach().clone(), p.shape, p.stride(), p.dtype, id(p)) for p in params]
    assert flat_buffers.flatten_(params) == []
    for param, (value, *rest) in zip(params, before):
        assert torch.equal(param, value)
        assert [param.shape, param.stride(), param.dtype, id(param)] == rest
        assert param.requires_grad
        assert param.is_leaf
    for kind in kinds:
        assert_in_one_buffer([param for param in params if param.dtype is kind])
    assert_own_storages(params)


@pytest.mark.parametrize("flatten", [None, False])
def test_only_what_the_kernels_serve_moves(flatten, path):
    model = make_model(path.device)
    params = list(model.parameters())
    before = spans(params)
    optimizer = BNGD(params, lr=0.1, fused=path.fused, flatten=flatten)
    train(model, optimizer, range(2))
    if path.fused and flatten is None:
        assert_in_one_buffer(params)
        assert_own_storages(params)
    else:
        assert spans(params) == before
    # the momentum lies in a flat buffer all the same
    assert_in_one_buffer([optimizer.state[param]["momentum_buffer"] for param in params])


def test_each_group_has_a_buffer_and_add_param_group_too(device):
    first, second, late = (make_model(device) for _ in range(3))
    groups = [{"params": list(first.parameters())}, {"params": list(second.parameters())}]
    optimizer = BNGD(groups, fused=True)
    before = [spans(list(model.parameters())) for model in (first, second)]
    optimizer.add_param_group({"params": list(late.parameters())})
    for model in (first, second, late):
        assert_in_one_buffer(list(model.parameters()))
    assert [spans(list(model.parameters())) for model in (first, second)] == before


def test_a_buffer_lives_as_long_as_one_of_its_parameters():
    params = [Parameter(torch.full((40,), float(i))) for i in range(3)]
    flat_buffers.flatten_(params)
    memory = [weakref.ref(param) for param in params]
    last = params.pop()
    params.clear()
    gc.collect()
    # memory that was freed would be handed out again
    churn = [torch.full((40,), 9.0) for _ in range(200)]
    assert torch.equal(last, torch.full((40,), 2.0))
    del churn, last
    assert [one() for one in memory] == [None] * 3


def test_momentum_is_made_at_the_first_gradient(path):
    model = make_model(path.device)
    params = list(model.parameters())
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    assert not optimizer.state
    for param in params[:3]:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert set(optimizer.state) == set(params[:3])
    first = [optimizer.state[param]["momentum_buffer"] for param in params[:3]]
    addresses = spans(first)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    # what exists does not move, what is new shares a buffer of its own
    assert spans([optimizer.state[param]["momentum_buffer"] for param in params[:3]]) == addresses
    rest = [optimizer.state[param]["momentum_buffer"] for param in params[3:]]
    for together in (first, rest):
        assert_in_one_buffer(together)
        assert_own_storages(together)


def test_loaded_momentum_lies_in_one_buffer(path):
    model, twin = make_model(path.device), make_model(path.device)
    optimizer = BNGD(model.parameters(), fused=path.fused)
    train(model, optimizer)
    again = BNGD(twin.parameters(), fused=path.fused)
    again.load_state_dict(optimizer.state_dict())
    momenta = [again.state[param]["momentum_buffer"] for param in twin.parameters()]
    assert_in_one_buffer(momenta)
    assert_own_storages(momenta)


def test_a_tensor_over_the_limit_keeps_its_storage(device, monkeypatch):
    monkeypatch.setattr(flat_buffers, "MAX_BYTES", 160)
    # 100, 200, 60 and 40 bytes
    params = [Parameter(torch.randn(n, device=device)) for n in (25, 50, 15, 10)]
    before, values = spans(params), [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"flatten=True cannot move .*\[1\]"):
        BNGD(params, fused=True, flatten=True)
    optimizer = BNGD(params, lr=0.1, fused=True)
    assert spans(params)[1] == before[1]
    assert all(spans(params)[i] != before[i] for i in (0, 2, 3))
    assert all(map(torch.equal, params, values))
    # the first buffer is full with 160 bytes, the last parameter begins another
    assert_in_one_buffer([params[0], params[2]])
    assert_in_one_buffer([params[3]])
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert not any(map(torch.equal, params, values))
    assert_own_storages([optimizer.state[param]["momentum_buffer"] for param in params])


def test_buffers_are_of_bounded_size(monkeypatch):
    monkeypatch.setattr(flat_buffers, "MAX_BYTES", 256)
    made = []
    zeros = torch.zeros

    def note(*args, **kwargs):
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", note)
    # 128 bytes each: two to a buffer
    params = [Parameter(torch.randn(32)) for _ in range(5)]
    flat_buffers.flatten_(params)
    assert len(made) == 3
    # and an alignment's worth of slack
    assert all(buffer.numel() * 4 <= 256 + ALIGNMENT for buffer in made)


def test_buffers_are_made_on_their_own_device(device, monkeypatch):
    """DLPack refuses tensors of a GPU that is not the current one."""
    entered = []
    leave = flat_buffers.on_device

    def on_device(where):
        entered.append(where)
        return leave(where)

    monkeypatch.setattr(flat_buffers, "on_device", on_device)
    params = [Parameter(torch.randn(n, device=device)) for n in (5, 7)]
    BNGD(params, fused=True, flatten=True)
    assert entered
    assert set(entered) == {params[0].device}

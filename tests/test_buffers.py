"""Flat buffers: what moves into them, what stays where it is, and what users do afterwards."""

from __future__ import annotations

import copy
import gc
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from paths import StepPath
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD, buffers

# a line of a GPU's L2 cache: what the kernels' wide accesses and neighbours are laid out for
ALIGNMENT = 128


def make_model(device: torch.device) -> torch.nn.Sequential:
    """Odd sizes, so that views need padding; the same values at every call."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1)
    ).to(device)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> list[Tensor]:
    device = next(model.parameters()).device
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 7, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def spans(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """First byte and end of each tensor."""
    return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]


def assert_in_one_buffer(tensors: Sequence[Tensor]) -> None:
    """In order, aligned, each starting at the first aligned byte after the one before it."""
    found = spans(tensors)
    assert all(start % ALIGNMENT == 0 for start, _ in found)
    for (_, end), (start, _) in itertools.pairwise(found):
        assert start == -(-end // ALIGNMENT) * ALIGNMENT


def assert_own_storages(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().data_ptr() == tensor.data_ptr()


def flat_model(device: torch.device) -> tuple[torch.nn.Sequential, BNGD]:
    model = make_model(device)
    optimizer = BNGD(model.parameters(), lr=0.1, fused=True)
    assert_in_one_buffer(list(model.parameters()))
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_flattening_keeps_values_shapes_and_strides(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(5, 7), (), (3,), (4, 3, 2, 5), (6, 1), (1, 129)]
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    params[0].data = params[0].data.t()
    params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)
    before = [(p.detach().clone(), p.shape, p.stride(), p.dtype, id(p)) for p in params]
    assert buffers.flatten_(params) == []
    for param, (value, *rest) in zip(params, before):
        assert torch.equal(param, value)
        assert [param.shape, param.stride(), param.dtype, id(param)] == rest
        assert param.requires_grad
        assert param.is_leaf
    assert_in_one_buffer(params)
    assert_own_storages(params)


def test_flattening_has_one_buffer_for_each_dtype() -> None:
    kinds = [torch.float32, torch.bfloat16] * 3
    params = [Parameter(torch.randn(5).to(dtype)) for dtype in kinds]
    buffers.flatten_(params)
    for dtype in set(kinds):
        assert_in_one_buffer([param for param in params if param.dtype == dtype])


def test_the_optimizer_flattens_what_the_kernels_serve(path: StepPath) -> None:
    model = make_model(path.device)
    params = list(model.parameters())
    before = [param.data_ptr() for param in params]
    BNGD(params, fused=path.fused)
    if path.fused:
        assert_in_one_buffer(params)
        assert_own_storages(params)
    else:
        assert [param.data_ptr() for param in params] == before


@pytest.mark.parametrize("flatten", [None, True, False], ids=["auto", "flatten", "in_place"])
def test_flattening_does_not_change_the_training(
    flatten: bool | None, device: torch.device
) -> None:
    plain, flat = make_model(device), make_model(device)
    # one-element slices and odd sizes; the reference is another implementation: 2e-6 of rounding
    expected = train(plain, BNGD(plain.parameters(), lr=0.1, fused=False), steps=2)
    got = train(flat, BNGD(flat.parameters(), lr=0.1, fused=True, flatten=flatten), steps=2)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_flatten_false_leaves_storages_alone(path: StepPath) -> None:
    model = make_model(path.device)
    params = list(model.parameters())
    before = [param.data_ptr() for param in params]
    optimizer = BNGD(params, lr=0.1, fused=path.fused, flatten=False)
    train(model, optimizer, steps=2)
    assert [param.data_ptr() for param in params] == before
    # the momentum lies in a flat buffer all the same
    assert_in_one_buffer([optimizer.state[param]["momentum_buffer"] for param in params])


def test_each_group_has_a_buffer_and_add_param_group_too(device: torch.device) -> None:
    first, second, late = (make_model(device) for _ in range(3))
    groups = [{"params": list(first.parameters())}, {"params": list(second.parameters())}]
    optimizer = BNGD(groups, fused=True)
    before = [spans(list(model.parameters())) for model in (first, second)]
    optimizer.add_param_group({"params": list(late.parameters())})
    for model in (first, second, late):
        assert_in_one_buffer(list(model.parameters()))
    assert [spans(list(model.parameters())) for model in (first, second)] == before


def test_the_buffer_outlives_its_neighbours() -> None:
    params = [Parameter(torch.full((40,), float(i))) for i in range(3)]
    buffers.flatten_(params)
    last = params.pop()
    params.clear()
    gc.collect()
    # memory that was freed would be handed out again
    churn = [torch.full((40,), 9.0) for _ in range(200)]
    assert torch.equal(last, torch.full((40,), 2.0))
    del churn


def test_momentum_is_made_at_the_first_gradient(path: StepPath) -> None:
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


def test_loaded_momentum_lies_in_one_buffer(path: StepPath) -> None:
    model, twin = make_model(path.device), make_model(path.device)
    optimizer = BNGD(model.parameters(), fused=path.fused)
    train(model, optimizer)
    again = BNGD(twin.parameters(), fused=path.fused)
    again.load_state_dict(optimizer.state_dict())
    momenta = [again.state[param]["momentum_buffer"] for param in twin.parameters()]
    assert_in_one_buffer(momenta)
    assert_own_storages(momenta)


def test_zeros_like_starts_at_zero_with_the_dtypes_asked_for() -> None:
    params = [torch.randn(3, 4), torch.randn(5).bfloat16(), torch.randn(0, 2), torch.randn(())]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.float64]
    found = buffers.zeros_like(params, dtypes)
    assert [buffer.dtype for buffer in found] == dtypes
    for param, buffer in zip(params, found):
        assert buffer.shape == param.shape
        assert not buffer.any()


def test_momentum_of_a_parameter_with_gaps_is_dense(path: StepPath) -> None:
    param = Parameter(torch.randn(6, 8, device=path.device)[:, ::2])
    optimizer = BNGD([param], fused=path.fused)
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].stride() == (4, 1)


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


class Stays(NamedTuple):
    desc: str
    # parameters, and what must be kept alive or must go on seeing them
    make: Callable[[], tuple[list[Tensor], Any]]
    reason: str


def views_of_one_storage() -> tuple[list[Tensor], Any]:
    # as cuDNN's flat weights of an LSTM
    flat = torch.randn(24)
    return [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:20]), Parameter(flat[20:])], flat


def numpy_memory() -> tuple[list[Tensor], Any]:
    array = np.ones((3, 4), dtype=np.float32)
    return [Parameter(torch.from_numpy(array))], array


def detached_alias() -> tuple[list[Tensor], Any]:
    param = Parameter(torch.randn(3, 4))
    return [param], param.detach()


def data_alias() -> tuple[list[Tensor], Any]:
    param = Parameter(torch.randn(3, 4))
    return [param], param.data.view(-1)


def wrapped_tensor() -> tuple[list[Tensor], Any]:
    # Parameter(tensor) shares the tensor's storage
    tensor = torch.randn(3, 4)
    return [Parameter(tensor)], tensor


def two_parameters_one_storage() -> tuple[list[Tensor], Any]:
    param = Parameter(torch.randn(3, 3))
    return [param, Parameter(param.data.t())], None


def shared_memory() -> tuple[list[Tensor], Any]:
    return [Parameter(torch.randn(3, 4).share_memory_())], None


def with_gaps() -> tuple[list[Tensor], Any]:
    return [Parameter(torch.randn(3, 8)[:, ::2])], None


def at_an_offset() -> tuple[list[Tensor], Any]:
    return [Parameter(torch.randn(13)[1:])], None


def without_entries() -> tuple[list[Tensor], Any]:
    return [Parameter(torch.empty(0, 3))], None


class Tagged(torch.Tensor):
    """A tensor subclass, as quantisation and sharding libraries make them."""


class Marked(Parameter):
    """A parameter class with setters of its own, as inference engines make them."""


def tensor_subclass() -> tuple[list[Tensor], Any]:
    return [Parameter(torch.randn(3, 4).as_subclass(Tagged))], None


def parameter_subclass() -> tuple[list[Tensor], Any]:
    return [Marked(torch.randn(3, 4))], None


def flattened_before() -> tuple[list[Tensor], Any]:
    params: list[Tensor] = [Parameter(torch.randn(3, 4)), Parameter(torch.randn(5))]
    buffers.flatten_(params)
    return params, None


def dlpack_memory() -> tuple[list[Tensor], Any]:
    owner = torch.randn(3, 4)
    return [Parameter(torch.from_dlpack(owner))], owner


STAYS = [
    Stays("views_of_one_storage", views_of_one_storage, "part of a larger storage"),
    Stays("numpy_memory", numpy_memory, "memory belongs to somebody else"),
    Stays("dlpack_memory", dlpack_memory, "memory belongs to somebody else"),
    Stays("detached_alias", detached_alias, "other tensors share its storage"),
    Stays("data_alias", data_alias, "other tensors share its storage"),
    Stays("wrapped_tensor", wrapped_tensor, "other tensors share its storage"),
    Stays("two_parameters_one_storage", two_parameters_one_storage, "share its storage"),
    Stays("shared_memory", shared_memory, "shared memory"),
    Stays("with_gaps", with_gaps, "part of a larger storage"),
    Stays("at_an_offset", at_an_offset, "part of a larger storage"),
    Stays("without_entries", without_entries, "no entries"),
    Stays("tensor_subclass", tensor_subclass, "Tagged"),
    Stays("parameter_subclass", parameter_subclass, "Marked"),
    Stays("flattened_before", flattened_before, "flattened before"),
]
stays = pytest.mark.parametrize("case", STAYS, ids=[case.desc for case in STAYS])


@stays
def test_flatten_leaves(case: Stays) -> None:
    params, kept = case.make()
    before = [(spans([param]), param.stride()) for param in params]
    reasons = [buffers.why_not_flat(param) for param in params]
    assert all(reason and case.reason in reason for reason in reasons), reasons
    left = buffers.flatten_(params)
    assert [id(param) for param in left] == [id(param) for param in params]
    assert [(spans([param]), param.stride()) for param in params] == before
    del kept


@stays
def test_the_optimizer_leaves(case: Stays, monkeypatch: pytest.MonkeyPatch) -> None:
    # beside a parameter that does move; the kernels are not run here
    monkeypatch.setattr("bngd_triton.gathering.why_not", lambda _: None)
    params, kept = case.make()
    free = Parameter(torch.randn(3, 4))
    before, address = spans(params), free.data_ptr()
    BNGD([*params, free], fused=True)
    assert spans(params) == before
    assert free.data_ptr() != address
    del kept


@stays
def test_flatten_true_says_why(case: Stays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bngd_triton.gathering.why_not", lambda _: None)
    params, kept = case.make()
    free = Parameter(torch.randn(3, 4))
    before = spans([*params, free])
    with pytest.raises(
        RuntimeError, match=rf"flatten=True cannot move .*{case.reason}.*flatten=None"
    ):
        BNGD([free, *params], fused=True, flatten=True)
    # the refusal comes before anything moves
    assert spans([*params, free]) == before
    del kept


def test_an_alias_goes_on_seeing_the_parameter(path: StepPath) -> None:
    flat = torch.randn(20, device=path.device)
    params = [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:])]
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert torch.equal(flat, torch.cat([param.detach().flatten() for param in params]))


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


@pytest.mark.parametrize("flatten", [None, False], ids=["auto", "in_place"])
def test_a_second_optimizer_does_not_move_parameters(
    flatten: bool | None, device: torch.device
) -> None:
    model, optimizer = flat_model(device)
    views = [param.data for param in model.parameters()]
    second = BNGD(model.parameters(), lr=0.1, fused=True, flatten=flatten)
    train(model, second)
    train(model, optimizer)
    for param, view in zip(model.parameters(), views):
        assert param.data_ptr() == view.data_ptr()
        assert torch.equal(param, view)
    with pytest.raises(RuntimeError, match="flattened before"):
        BNGD(model.parameters(), fused=True, flatten=True)


def test_a_repointed_parameter_is_never_flattened_again(device: torch.device) -> None:
    model, _ = flat_model(device)
    for param in model.parameters():
        param.data = param.data.clone()
    before = spans(list(model.parameters()))
    BNGD(model.parameters(), fused=True)
    assert spans(list(model.parameters())) == before


def test_a_tensor_over_the_limit_keeps_its_storage(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "MAX_BYTES", 160)
    # 100, 200, 60 and 40 bytes
    params = [Parameter(torch.randn(n, device=device)) for n in (25, 50, 15, 10)]
    before, values = spans(params), [param.detach().clone() for param in params]
    optimizer = BNGD(params, lr=0.1, fused=True)
    assert spans(params)[1] == before[1]
    assert all(spans(params)[i] != before[i] for i in (0, 2, 3))
    assert all(torch.equal(param, value) for param, value in zip(params, values))
    # the first buffer is full with 160 bytes, the last parameter begins another
    assert_in_one_buffer([params[0], params[2]])
    assert_in_one_buffer([params[3]])
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert all(not torch.equal(param, value) for param, value in zip(params, values))
    assert_own_storages([optimizer.state[param]["momentum_buffer"] for param in params])


def test_buffers_are_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "MAX_BYTES", 256)
    made = []
    zeros = torch.zeros

    def note(*args: Any, **kwargs: Any) -> Tensor:
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", note)
    # 128 bytes each: two to a buffer
    params = [Parameter(torch.randn(32)) for _ in range(5)]
    buffers.flatten_(params)
    assert len(made) == 3
    # and an alignment's worth of slack
    assert all(buffer.numel() * 4 <= 256 + ALIGNMENT for buffer in made)


def test_flatten_true_refuses_a_tensor_over_the_limit(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "MAX_BYTES", 160)
    param = Parameter(torch.randn(50, device=device))
    with pytest.raises(RuntimeError, match="flatten=True cannot move"):
        BNGD([param], fused=True, flatten=True)


def test_the_registry_does_not_keep_parameters_alive() -> None:
    known = len(buffers._flattened)
    params = [Parameter(torch.randn(4)) for _ in range(3)]
    buffers.flatten_(params)
    assert len(buffers._flattened) == known + 3
    keys = {id(param) for param in params}
    del params
    gc.collect()
    # a later tensor may get the same id: an entry that stayed would keep it out of buffers
    assert keys.isdisjoint(buffers._flattened)

"""Parameters whose memory others see: they stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD, flat_buffers
from support.flat_models import (
    spans,
)
from support.paths import StepPath


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
    flat_buffers.flatten_(params)
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
    Stays("flattened_before", flattened_before, "another flat buffer"),
]
stays = pytest.mark.parametrize("case", STAYS, ids=[case.desc for case in STAYS])


@stays
def test_flatten_leaves(case: Stays) -> None:
    params, kept = case.make()
    before = [(spans([param]), param.stride()) for param in params]
    reasons = [flat_buffers.why_not_flat(param) for param in params]
    assert all(reason and case.reason in reason for reason in reasons), reasons
    left = flat_buffers.flatten_(params)
    assert [id(param) for param in left] == [id(param) for param in params]
    assert [(spans([param]), param.stride()) for param in params] == before
    del kept


@stays
def test_the_optimizer_leaves(case: Stays, monkeypatch: pytest.MonkeyPatch) -> None:
    # beside a parameter that does move; the kernels are not run here
    monkeypatch.setattr("bngd_triton.engine.collect.why_not", lambda _: None)
    params, kept = case.make()
    free = Parameter(torch.randn(3, 4))
    before, address = spans(params), free.data_ptr()
    BNGD([*params, free], fused=True)
    assert spans(params) == before
    assert free.data_ptr() != address
    del kept


@stays
def test_flatten_true_says_why(case: Stays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bngd_triton.engine.collect.why_not", lambda _: None)
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

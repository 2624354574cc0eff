"""Parameters whose memory others see: they stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD, flat_buffers
from support.flat_models import spans
from support.paths import StepPath


class Tagged(torch.Tensor):
    """A tensor subclass, as quantisation and sharding libraries make them."""


class Marked(Parameter):
    """A parameter class with setters of its own, as inference engines make them."""


def owned(share: Callable[[Tensor], Any]) -> tuple[list[Tensor], Any]:
    """A parameter, and what others hold of its memory."""
    param = Parameter(torch.randn(3, 4))
    return [param], share(param)


def wrapped(owner: Any, tensor: Callable[[Any], Tensor]) -> tuple[list[Tensor], Any]:
    """A parameter in the memory of somebody else."""
    return [Parameter(tensor(owner))], owner


def views_of_one_storage() -> tuple[list[Tensor], Any]:
    # as cuDNN's flat weights of an LSTM
    flat = torch.randn(24)
    return [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:20]), Parameter(flat[20:])], flat


def two_parameters_one_storage() -> tuple[list[Tensor], Any]:
    param = Parameter(torch.randn(3, 3))
    return [param, Parameter(param.data.t())], None


def flattened_before() -> tuple[list[Tensor], Any]:
    params: list[Tensor] = [Parameter(torch.randn(3, 4)), Parameter(torch.randn(5))]
    flat_buffers.flatten_(params)
    return params, None


PART, SHARED = "part of a larger storage", "other tensors share its storage"
FOREIGN = "memory belongs to somebody else"
# parameters and what must be kept alive, and why they stay
Made = Callable[[], tuple[list[Tensor], Any]]
STAYS: dict[str, tuple[Made, str]] = {
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
def test_the_optimizer_leaves(make: Made, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_alias_goes_on_seeing_the_parameter(path: StepPath) -> None:
    flat = torch.randn(20, device=path.device)
    params = [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:])]
    optimizer = BNGD(params, lr=0.1, fused=path.fused)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert torch.equal(flat, torch.cat([param.detach().flatten() for param in params]))


def test_where_torch_does_not_count_aliases_parameters_stay(
    path: StepPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count is a private function, which another torch may not have."""
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    param = Parameter(torch.randn(3, 4, device=path.device))
    address = param.data_ptr()
    BNGD([param], fused=path.fused)
    assert param.data_ptr() == address
    with pytest.raises(RuntimeError, match=r"flatten=True cannot move .*torch does not tell"):
        BNGD([param], fused=True, flatten=True)

"""Parameters that checkpoints are saved from and loaded into."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def make_params(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """The same values at every call; the second is channels_last."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 3), (3, 2, 2, 5), (5,), ()]
    params = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    params[1] = params[1].contiguous(memory_format=torch.channels_last)
    return [Parameter(param) for param in params]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load_params(params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(params, saved):
            param.copy_(value)


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Bit for bit, dtypes and strides included."""
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, check_stride=True)

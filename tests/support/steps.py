"""Small parameters, and steps of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD

# parameters are below 4, where half a unit of float32 is 1.2e-7; a few steps of rounding
ATOL = 2e-6
OPTION_NAMES = (
    "lr", "momentum", "nesterov", "weight_decay", "eps", "granularity", "normalizer", "centering",
    "center_1d", "nonfinite", "maximize", "master_weights", "momentum_dtype", "accumulation_steps",
    "seed",
)  # fmt: skip


def make_params(device: torch.device) -> list[Parameter]:
    """A matrix, a vector and a scalar, the same at every call."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 3), (5,), ()]
    return [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def make_grads(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(param.shape, generator=generator).to(param.device, param.dtype) + 0.25
        for param in params
    ]


def set_grads(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    grads = make_grads(params, seed)
    for param, grad in zip(params, grads):
        param.grad = grad
    return grads


def take_steps(optimizer: BNGD, params: Sequence[Tensor], seeds: Iterable[int]) -> None:
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Bit for bit."""
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], atol: float = ATOL) -> None:
    for a, b in zip(got, want):
        torch.testing.assert_close(a.detach().cpu().double(), b, rtol=0, atol=atol)


def momenta(optimizer: BNGD, params: Sequence[Tensor]) -> list[Tensor]:
    return [optimizer.state[param]["momentum_buffer"] for param in params]

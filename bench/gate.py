"""The correctness gate: one step of an arm against float64; no time is taken behind a red gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from .arms import MOMENTUM, Arm, Storage, UnavailableError, start

# one entry, vectors, odd lengths, more than two dimensions, and several slices of a long row
SHAPES = ((48, 32), (37, 19), (130,), (1,), (3, 5, 7), (2, 4097))
LR = 0.5
# float32 statistics by torch.compile are good to about 2**-20 at these sizes; a step with a wrong
# mean, a forgotten momentum weight or a swapped tensor is off by more than 2**-4
EXACT = 2.0**-17
# one rounding at the store; Triton's interpreter truncates
STORED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}


def _standardized(grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = grad if grad.dim() < 2 else grad - grad.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True).sqrt() + 1e-8)


def _bngd(grad: Tensor) -> Tensor:
    return (1 - MOMENTUM) * _standardized(grad, tuple(range(grad.dim())))


def _bngd_row(grad: Tensor) -> Tensor:
    dims = tuple(range(1, grad.dim())) if grad.dim() > 1 else (0,)
    return (1 - MOMENTUM) * _standardized(grad, dims)


# what the first step subtracts, over lr; adam's bias corrections leave the gradient's sign, and
# StableAdamW's RMS of it is 1
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "bngd": _bngd,
    "bngd-row": _bngd_row,
    "sgd": lambda grad: grad,
    "adam": lambda grad: grad / (grad.abs() + 1e-8),
    "stableadamw": lambda grad: grad / (grad.abs() + 1e-6),
}


def check(arm: Arm, storage: Storage, device: torch.device) -> None:
    """Raise `UnavailableError` unless the arm's first step is right."""
    generator = torch.Generator().manual_seed(7)
    params, wanted = [], []
    for shape in SHAPES:
        # three of four entries positive, so that a mean that is not removed shows; none near 0,
        # where adam's quotient would amplify roundings
        sign = (torch.rand(shape, generator=generator) < 0.75) * 2.0 - 1
        grad = (sign * (0.5 + torch.rand(shape, generator=generator))).to(storage.param)
        value = torch.randn(shape, generator=generator).to(storage.param)
        param = Parameter(value.to(device))
        param.grad = grad.to(device)
        params.append(param)
        wanted.append(value.double() - LR * RULES[arm.rule](grad.double()))
    start(arm, params, 1, storage, LR)
    for param, want in zip(params, wanted):
        got = param.detach().cpu().double()
        bound = (EXACT + STORED[storage.param]) * (1 + want.abs())
        error = (got - want).abs()
        # written so that a NaN fails
        if not bool((error <= bound).all()):
            raise UnavailableError(
                f"gate: a tensor of shape {tuple(param.shape)} is off by {float(error.max()):.3g}"
            )

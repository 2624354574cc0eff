"""Which memory the kernels walk: the tensors themselves, or row-major copies of them.

The kernels treat a parameter, its gradient and its momentum as runs of equal length and order. A
dense tensor is walked in its own memory order, whatever its strides. What cannot be walked in
place is copied: a gradient whose strides differ from the parameter's, and parameters and momentum
that are not dense or whose rows are not contiguous runs; those are copied back afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import same_order, walked_in_place


class Walk(NamedTuple):
    """The tensors to walk, in one common memory order; `rows` contiguous runs each."""

    param: Tensor
    momentum: Tensor | None
    master: Tensor | None
    rows: int

    def gradient(self, grad: Tensor) -> Tensor:
        """`grad` in this order: itself, or a copy."""
        # the negative bit of `z.conj().imag` is not in its memory
        if same_order(grad, self.param) and not grad.is_neg():
            return grad
        return torch.empty_like(self.param, dtype=grad.dtype).copy_(grad)


def walk(param: Tensor, momentum: Tensor | None, master: Tensor | None, rows: int) -> Walk:
    """What to walk for a parameter; tensors other than its own are copies to be kept in step."""
    walked = param
    if not walked_in_place(param, rows):
        walked = torch.empty(param.shape, dtype=param.dtype, device=param.device)
    return Walk(walked, _like(momentum, walked), _like(master, walked), rows)


def _like(state: Tensor | None, param: Tensor) -> Tensor | None:
    """`state` where it lies as `param` does, else room for a copy that does."""
    if state is None or same_order(state, param):
        return state
    return torch.empty_like(param, dtype=state.dtype)

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


class Walk(NamedTuple):
    """The tensors to walk, in one common memory order; `rows` contiguous runs each."""

    param: Tensor
    momentum: Tensor | None
    rows: int

    def gradient(self, grad: Tensor) -> Tensor:
        """`grad` in this order: itself, or a copy."""
        # the negative bit of `z.conj().imag` is not in its memory
        if same_order(grad, self.param) and not grad.is_neg():
            return grad
        return torch.empty_like(self.param, dtype=grad.dtype).copy_(grad)


def walk(param: Tensor, momentum: Tensor | None, *, by_row: bool) -> Walk:
    """What to walk for a parameter; tensors other than its own are copies to be kept in step."""
    rows = param.shape[0] if by_row and param.dim() >= 2 else 1
    runs = rows == 1 or param.stride(0) * rows == param.numel()
    here = param if is_dense(param) and runs else _row_major(param)
    if momentum is not None and not same_order(momentum, here):
        momentum = torch.empty_like(here, dtype=momentum.dtype)
    return Walk(here, momentum, rows)


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill one run of memory, each in a place of its own."""
    if tensor.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != filled:
            return False
        filled *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are dense and lie in memory in the same order."""
    if a.stride() == b.stride():
        return is_dense(a)
    pairs = zip(a.shape, a.stride(), b.stride())
    return all(size == 1 or s == t for size, s, t in pairs) and is_dense(a)


def _row_major(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

"""Training runs of which two can be compared bit for bit, whichever implementation makes them.

Gradients have entries 1 and 3 times a power of two, as many of each in every row: mean and spread
are exact in any order of summation, so that eager and fused steps agree in every bit.
"""

import functools

import torch
from torch import Tensor

from support import steps

# rows of even length
SHAPES = [(4, 6), (2, 4, 3, 2), (6, 4), (10,)]
make_params = functools.partial(steps.make_params, shapes=SHAPES)


def exact_gradient(like, seed):
    """Float32, contiguous; entries 1 and 3 times 2**-k, half of each in every row."""
    generator = torch.Generator().manual_seed(seed)
    rows = like.shape[0] if like.dim() > 1 else 1
    order = torch.rand(rows, like.numel() // rows, generator=generator).argsort(1)
    values = (order % 2 * 2 + 1) * 2.0 ** -(seed % 5)
    return values.view(like.shape).to(like.device)


def give(param, grad):
    """Set a gradient of any dtype, in the parameter's memory order."""
    if grad is None:
        param.grad = None
        return
    param.grad = torch.empty_like(param, requires_grad=False).copy_(grad)
    if grad.dtype != param.dtype:
        # torch checks the dtype only on assignment
        param.grad.data = torch.empty_like(param.grad, dtype=grad.dtype).copy_(grad)


def take_steps(optimizer, params, seeds, dtype=None):
    """One step for each seed; gradients of the parameters' dtype, or of `dtype`."""
    for seed in seeds:
        for place, param in enumerate(params):
            grad = exact_gradient(param, 100 * seed + place)
            give(param, grad.to(dtype or param.dtype))
        optimizer.step()


def bits(tensor):
    """A copy as integers, which compare NaN and signed zeros too."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()]).clone()


def assert_bits(got, want):
    """Equal dtypes and bits."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        assert a.dtype == b.dtype
        different = bits(a) != bits(b)
        assert not different.any(), f"tensor {i}: {int(different.sum())} of {a.numel()} differ"


def state_of(optimizer, params):
    """Every state tensor, in a fixed order."""
    return [
        value
        for param in params
        for _, value in sorted(optimizer.state.get(param, {}).items())
        if isinstance(value, Tensor)
    ]

"""Small parameters, and steps of them."""

import copy
import pickle

import torch
from torch.nn import Parameter

# parameters are below 4, where half a unit of float32 is 1.2e-7; a few steps of rounding
ATOL = 2e-6
SHAPES = [(4, 3), (5,), ()]
OPTION_NAMES = (
    "lr", "momentum", "nesterov", "weight_decay", "eps", "granularity", "normalizer", "centering",
    "center_1d", "nonfinite", "maximize", "master_weights", "momentum_dtype", "accumulation_steps",
    "seed",
)  # fmt: skip
# how an optimizer, or all of a run, is copied
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


def make_params(device, dtype=torch.float32, shapes=SHAPES):
    """The same values at every call; four dimensions are channels_last, (6, 4) is transposed."""
    generator = torch.Generator().manual_seed(5)
    params = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator).to(device, dtype)
        if len(shape) == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        if shape == (6, 4):
            value = value.t().contiguous().t()
        params.append(Parameter(value))
    return params


def make_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(param.shape, generator=generator).to(param.device, param.dtype) + 0.25
        for param in params
    ]


def set_grads(params, seed):
    grads = make_grads(params, seed)
    for param, grad in zip(params, grads):
        param.grad = grad
    return grads


def take_steps(optimizer, params, seeds):
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def values(params):
    return [param.detach().clone() for param in params]


def assert_equal(got, want):
    """Bit for bit, dtypes and strides included."""
    assert len(got) == len(want)
    for a, b in zip(got, want):
        a, b = a.detach(), b.detach()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=True)


def assert_close(got, want, atol=ATOL):
    for a, b in zip(got, want):
        torch.testing.assert_close(a.detach().cpu().double(), b, rtol=0, atol=atol)


def momenta(optimizer, params):
    return [optimizer.state[param]["momentum_buffer"] for param in params]

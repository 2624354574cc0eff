"""Gradients that lie where a step writes are those from before the step."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD, reference
from bngd_triton.kernels import fused_step_
from support.steps import assert_equal, momenta, take_steps, values

# above a block of the eager step, 32767 entries, and above the kernels' chunks
SHAPE = (190, 190)


def make(path):
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(190 * 190 + 64, generator=generator).to(path.device)
    other = torch.randn(SHAPE, generator=generator).to(path.device)
    # two parameters; the second has room before and behind it
    return [Parameter(other), Parameter(memory[32:-32].view(SHAPE))]


def shifted(tensor, by):
    return tensor.detach().as_strided(SHAPE, (190, 1), tensor.storage_offset() + by)


SHARING = {
    "itself": lambda o, p: (p[0].detach(), p[1].detach()),
    "transposed": lambda o, p: (p[0].detach().t(), p[1].detach().t()),
    "the_other": lambda o, p: (p[1].detach(), p[0].detach()),
    "shifted_up": lambda o, p: (p[0].detach().clone(), shifted(p[1], 17)),
    "shifted_down": lambda o, p: (p[0].detach().clone(), shifted(p[1], -17)),
    "momentum": lambda o, p: (momenta(o, p)[0].t(), momenta(o, p)[0]),
}
# groups, and steps before: of those that repeat, the second might be taken for the first
WHEN = {"early": (2, 0), "when_steps_repeat": (1, 2), "in_the_functions": (1, 0)}


@pytest.mark.parametrize(
    ("sharing", "when"),
    # before a step there is no momentum
    [(name, when) for name in SHARING for when in WHEN if name != "momentum" or WHEN[when][1]],
)
def test_a_step_reads_gradients_before_it_writes(sharing, when, path):
    groups, before = WHEN[when]
    step_ = fused_step_ if path.fused else reference.step_
    runs = []
    for copied in (False, True):
        params = make(path)
        given = [{"params": params}] if groups == 1 else [{"params": [p]} for p in params]
        optimizer = BNGD(given, lr=0.1, granularity="tensor", fused=path.fused, flatten=False)
        for step in range(before + 2):
            # of small whole numbers, whose statistics are the same in every order
            grads = [torch.arange(36_100.0, device=path.device).view(SHAPE) % 7 for _ in params]
            if step >= before:
                shared = SHARING[sharing](optimizer, params)
                grads = [grad.clone() if copied else grad for grad in shared]
            if when == "in_the_functions":
                tensors = [param.detach() for param in params]
                step_(tensors, grads, None, lr=0.1, momentum=0.0, granularity="tensor")
                continue
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
        runs.append(values(params))
    assert_equal(*runs)


def test_gradients_apart_are_not_copied(path, monkeypatch):
    params = make(path)
    optimizer = BNGD(params, lr=0.1, granularity="tensor", fused=path.fused)
    monkeypatch.setattr(Tensor, "clone", None)
    take_steps(optimizer, params, range(2))

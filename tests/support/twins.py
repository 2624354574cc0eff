"""A step prepared in two launches and in one, on equal tensors."""

import dataclasses

import torch

from bngd_triton.kernels.fused_step import FusedStep
from support.exact_runs import assert_bits
from support.handmade_plans import member, nothing_new
from support.kernel_cases import make

# a few slices to a wave, and slices longer than one
SINGLE = {"form": "single-launch", "wave": 1024}


class Twins:
    """The same step prepared in both forms, on equal tensors that lie as the first ones do."""

    def __init__(self, tensors, options, tuning, programs):
        self.options = options
        self.device = tensors[0][0].device
        self.steps = []
        one = dataclasses.replace(tuning, programs_per_sm=programs, **SINGLE)
        for form in (dataclasses.replace(tuning, form="two-launch"), one):
            members = [
                member(like(p), like(g), like(m) if options.momentum else None)
                for p, g, m in tensors
            ]
            prepared = FusedStep(members, [options], form)
            self.steps.append((members, prepared))

    @property
    def plan(self):
        """The single launch's."""
        return self.steps[1][1].plan

    def step(self):
        """Take a step in both forms, and compare all bits."""
        for members, prepared in self.steps:
            prepared.update(members, [self.options], nothing_new(self.device))
        two, one = (
            [*(part for each in members for part in (each.param, each.momentum, each.record)),
             prepared.plan.factors]
            for members, prepared in self.steps
        )  # fmt: skip
        assert_bits(*([part for part in parts if part is not None] for parts in (two, one)))
        # counters are as the next step wants them
        assert not self.plan.arrived.any()
        for batch in self.plan.batches:
            assert not batch.work(self.plan.tuning).counters.any()

    def new_gradients(self):
        for two, one in zip(self.steps[0][0], self.steps[1][0]):
            two.grad.normal_()
            one.grad.copy_(two.grad)


def like(tensor):
    """A copy at an address with the same remainder modulo 16."""
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    whole = torch.empty(tensor.numel() + 16, dtype=tensor.dtype, device=tensor.device)
    copy = whole[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert copy.data_ptr() % 16 == tensor.data_ptr() % 16
    return copy


def random_tensors(shapes, device, dtype=torch.float32):
    params, grads, buffers, _ = make(dtype, dtype, device, shapes)
    return list(zip(params, grads, buffers))

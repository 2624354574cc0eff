"""Work for the kernels, made by hand."""

import torch

from bngd_triton.kernels.launch import LaunchInputs
from bngd_triton.kernels.plan import Entry
from bngd_triton.kernels.tables import encode
from bngd_triton.records import StepTensor, functional_inputs, new_record, slices_of


def member(param, grad, momentum, group=0, granularity="row"):
    """A member with a record of its own, large enough for any granularity."""
    record = new_record(slices_of(param.shape, granularity), param.device)
    return StepTensor(param, grad, momentum, group, record)


def entry(param, grad, momentum=None, rows=1, *, centred=True, shared=None):
    """An entry of the first option row, with a record of its own."""
    record = new_record(rows, param.device)
    return Entry(param, grad, momentum, record, 0, rows, centred, shared)


def nothing_new(device):
    """A step of one group that closes its window, unscaled."""
    return functional_inputs([torch.empty(0, device=device)], True, None, None, None)


def inputs(device, options):
    """What the kernels read besides the plan."""
    table = torch.tensor([encode(options)], dtype=torch.float64, device=device)
    clocks = torch.zeros(1, dtype=torch.int64, device=device)
    return LaunchInputs(table, clocks, torch.ones(1, device=device), torch.zeros(1, device=device))

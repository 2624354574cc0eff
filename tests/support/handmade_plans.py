"""Work for the kernels, made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from bngd_triton.kernels.launch import LaunchInputs
from bngd_triton.kernels.plan import Entry
from bngd_triton.kernels.tables import encode
from bngd_triton.options import Options
from bngd_triton.records import StepInputs, StepTensor, functional_inputs, new_record, slices_of


def member(
    param: Tensor, grad: Tensor, momentum: Tensor | None, group: int = 0, granularity: str = "row"
) -> StepTensor:
    """A member with a record of its own, large enough for any granularity."""
    record = new_record(slices_of(param.shape, granularity), param.device)
    return StepTensor(param, grad, momentum, group, record)


def entry(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None = None,
    rows: int = 1,
    *,
    centred: bool = True,
    shared: int | None = None,
) -> Entry:
    """An entry of the first option row, with a record of its own."""
    record = new_record(rows, param.device)
    return Entry(param, grad, momentum, record, 0, rows, centred, shared)


def nothing_new(device: torch.device) -> StepInputs:
    """A step of one group that closes its window, unscaled."""
    return functional_inputs([torch.empty(0, device=device)], True, None, None, None)


def inputs(device: torch.device, options: Options) -> LaunchInputs:
    """What the kernels read besides the plan."""
    table = torch.tensor([encode(options)], dtype=torch.float64, device=device)
    clocks = torch.zeros(1, dtype=torch.int64, device=device)
    return LaunchInputs(table, clocks, torch.ones(1, device=device), torch.zeros(1, device=device))

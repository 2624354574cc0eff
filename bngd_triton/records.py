"""What a step works on, whichever implementation makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options

# columns of a record: mean and population standard deviation of the slice's last gradient, in the
# units of the unscaled gradient; how often the slice was left as it was for an inf or a NaN
RECORD = ("mean", "std", "skipped")
MEAN, STD, SKIPPED = range(len(RECORD))
# the storage types that do not hold a master's bits
NARROW = (torch.float16, torch.bfloat16)


class StepTensor(NamedTuple):
    """One tensor of a step. All but `grad` are written; s is the number of its slices.

    Attributes:
        param: the parameter.
        grad: of the parameter's shape. None closes a window of micro-batches without one more.
        momentum: of the parameter's shape; None where the group has no buffer.
        group: index into the list of `Options`.
        record: float64 [s, 3], see `RECORD`.
        master: what the parameter lacks of its float32 master: int16, see `eager.rounding`, or
            all of it: float32. None without a master.
        window: uint8 [s]; whether the slice has had a valid micro-batch in this window. None
            without accumulation.
        key: tells this tensor's stochastic rounding from the others'.
    """

    param: Tensor
    grad: Tensor | None
    momentum: Tensor | None
    group: int
    record: Tensor
    master: Tensor | None = None
    window: Tensor | None = None
    key: int = 0


class StepInputs(NamedTuple):
    """What differs from one step to the next besides gradients and options.

    Attributes:
        closing: for each group, whether this is the last micro-batch of its window.
        clocks: int64 [groups] for each device: the seeds of stochastic rounding.
        grad_scale: float32 of one element; gradients are this many times too large. None is 1.
        found_inf: float32 of one element; anything but 0 leaves everything as it is.
    """

    closing: Sequence[bool]
    clocks: dict[torch.device, Tensor]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def slices_of(shape: Sequence[int], granularity: str) -> int:
    """How many slices a parameter of a shape has."""
    return shape[0] if granularity == "row" and len(shape) >= 2 else 1


def new_record(slices: int, device: torch.device) -> Tensor:
    """A record of slices that were never seen: NaN statistics."""
    record = torch.full((slices, len(RECORD)), torch.nan, dtype=torch.float64, device=device)
    record[:, SKIPPED] = 0.0
    return record


def rounds_stochastically(param: Tensor, options: Options) -> bool:
    """Whether a step ends in stochastic rounding."""
    return options.master_weights == "stochastic" and param.dtype in NARROW


def functional_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    masters: Sequence[Tensor | None] | None,
    windows: Sequence[Tensor] | None,
    options: Options,
) -> list[StepTensor]:
    """The members of the functional twins; tensor i rounds with key i."""
    return [
        StepTensor(
            param=param,
            grad=grads[i],
            momentum=momentum_buffers[i] if options.buffered and momentum_buffers else None,
            group=0,
            master=masters[i] if masters else None,
            window=windows[i] if options.accumulation_steps > 1 and windows else None,
            record=new_record(slices_of(param.shape, options.granularity), param.device),
            key=i,
        )
        for i, param in enumerate(params)
    ]


def functional_inputs(
    params: Sequence[Tensor],
    closing: bool,
    rounding_key: int | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> StepInputs:
    """The `StepInputs` of the functional twins."""
    clocks = {
        param.device: torch.full((1,), rounding_key or 0, dtype=torch.int64, device=param.device)
        for param in params
    }
    return StepInputs([closing], clocks, grad_scale, found_inf)


def skipped_slices(members: Sequence[StepTensor]) -> Tensor:
    """How many slices were left as they were: 0-dim int64 on the first parameter's device."""
    if not members:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    device = members[0].param.device
    counts = [member.record[:, SKIPPED].sum().to(device) for member in members]
    return torch.stack(counts).sum().long()

"""The fused step as functions of tensors: the twins of `bngd_triton.reference`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..checks import check_float, check_masters, check_step, check_tensors
from ..options import (
    Granularity,
    Nonfinite,
    Normalizer,
    Options,
    StepOptions,
    functional_options,
)  # fmt: skip
from ..records import (
    MEAN,
    STD,
    StepTensor,
    functional_inputs,
    functional_tensors,
    skipped_slices,
)
from ..tensors import apart
from .devices import Tuning
from .fused_step import FusedStep
from .support import why_not

if TYPE_CHECKING:
    # typing has it from Python 3.11 on
    from typing_extensions import Unpack


@torch.no_grad()
def fused_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    masters: Sequence[Tensor | None] | None = None,
    rounding_key: int | None = None,
    windows: Sequence[Tensor] | None = None,
    closing: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    tuning: Tuning | None = None,
    **step_options: Unpack[StepOptions],
) -> Tensor:
    """One step of BNGD by the kernels, in place; the twin of `bngd_triton.reference.step_`.

    Every call lays out its work anew; `bngd_triton.BNGD` does so once.

    Args:
        params: n dense tensors of float16, bfloat16 or float32 on devices that Triton serves (on
            the CPU with TRITON_INTERPRET=1), written in place.
        grads: n tensors of the same shapes, of any of these dtypes and any layout.
        momentum_buffers: n tensors of the same shapes, written; None where there is no momentum.
        lr: as in `reference.step_`, like all that follow but the last two.
        masters: see there.
        rounding_key: see there.
        windows: see there.
        closing: see there.
        grad_scale: see there.
        found_inf: see there.
        tuning: sizes of the work items; None takes those of the device.
        **step_options: the options of `bngd_triton.BNGD` by their names, with its defaults:
            momentum, nesterov, weight_decay, eps, granularity, normalizer, centering, center_1d,
            nonfinite, maximize and accumulation_steps.

    Returns:
        The number of slices skipped, a 0-dim int64 tensor on the first parameter's device.

    Raises:
        ValueError: an option is out of bounds, or the lists do not belong together.
        TypeError: a tensor is sparse, complex or not of a supported dtype.
        RuntimeError: the kernels cannot serve a tensor; says why and what to do.
        FloatingPointError: a non-finite gradient with ``nonfinite="raise"``.
    """
    options = functional_options(lr, rounding_key, step_options)
    check_tensors(params, grads, momentum_buffers, buffered=options.buffered)
    check_masters(params, masters, windows, options)
    grads = apart(grads, [*params, *(momentum_buffers or ()), *(masters or ())])
    members = functional_tensors(params, grads, momentum_buffers, masters, windows, options)
    check_served([*params, *grads, *(m.momentum for m in members if m.momentum is not None)])
    check_step(params, grads, options)
    inputs = functional_inputs(params, closing, rounding_key, grad_scale, found_inf)
    filled: dict[torch.device, list[StepTensor]] = {}
    for member in members:
        if member.param.numel():
            filled.setdefault(member.param.device, []).append(member)
    for of_device in filled.values():
        FusedStep(of_device, [options], tuning).update(of_device, [options], inputs)
    return skipped_slices(members)


def check_served(tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError for the first tensor that the kernels cannot serve."""
    for tensor in tensors:
        reason = why_not(tensor)
        if reason:
            shape = tuple(tensor.shape)
            raise RuntimeError(f"the kernels cannot serve a tensor of shape {shape}: {reason}")


@torch.no_grad()
def fused_normalize_gradient(
    grad: Tensor,
    *,
    eps: float = 1e-8,
    granularity: Granularity = "tensor",
    normalizer: Normalizer = "zscore",
    centering: float = 1.0,
    center_1d: bool = False,
    nonfinite: Nonfinite = "propagate",
    maximize: bool = False,
) -> Tensor:
    """The normalised gradient of one tensor; the twin of `reference.normalize_gradient`.

    Args:
        grad: a dense tensor of float16, bfloat16 or float32; not written.
        eps: as in `reference.normalize_gradient`, like all that follow.
        granularity: see there.
        normalizer: see there.
        centering: see there.
        center_1d: see there.
        nonfinite: see there.
        maximize: see there.

    Returns:
        A tensor of the shape, dtype and dense strides of `grad`.

    Raises:
        ValueError: an option is out of bounds.
        TypeError: `grad` is sparse, complex or not of a supported dtype.
        RuntimeError: the kernels cannot serve `grad`.
        FloatingPointError: a non-finite entry with ``nonfinite="raise"``.
    """
    options = Options(nonfinite=nonfinite, granularity=granularity)
    check_float("grad", grad)
    check_step([grad], [grad], options, names=["grad"])
    out = torch.zeros_like(grad)
    # from 0, a step of 1 uphill without momentum is ghat itself, rounded once
    fused_step_(
        [out], [grad], None, lr=1.0, momentum=0.0, eps=eps, granularity=granularity,
        normalizer=normalizer, centering=centering, center_1d=center_1d,
        nonfinite="skip" if nonfinite == "raise" else nonfinite, maximize=not maximize,
    )  # fmt: skip
    return out


class SegmentStatistics(NamedTuple):
    """Statistics of s slices: float64 [s] each, in the tensors' units."""

    n: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def segment_statistics(
    tensors: Sequence[Tensor], *, granularity: Granularity = "tensor", tuning: Tuning | None = None
) -> SegmentStatistics:
    """Entries, mean and population standard deviation of every slice, in one launch per dtype.

    Args:
        tensors: non-empty dense tensors of one device, of float16, bfloat16 or float32.
        granularity: ``"tensor"``, ``"row"`` or ``"global"``, as in `reference.step_`.
        tuning: sizes of the work items; None takes those of the device.

    Returns:
        One entry per slice, in the order of `tensors` and of their rows, on their device.

    Raises:
        ValueError: an empty list or tensor, several devices, an unknown granularity.
        TypeError: a tensor is sparse, complex or not of a supported dtype.
        RuntimeError: the kernels cannot serve a tensor.
    """
    options = Options(granularity=granularity, momentum=0.0)
    for i, tensor in enumerate(tensors):
        check_float(f"tensors[{i}]", tensor)
        if not tensor.numel():
            raise ValueError(f"tensors[{i}] has no entries (shape {tuple(tensor.shape)})")
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"need tensors of one device, got {sorted(map(str, devices))}")
    check_served(tensors)
    members = functional_tensors(tensors, tensors, None, None, None, options)
    inputs = functional_inputs(tensors, True, None, None, None)
    entries = FusedStep(members, [options], tuning, tiles=False).statistics(
        members, [options], inputs
    )
    records = [member.record for member in members]
    record = torch.cat(records[:1] if granularity == "global" else records)
    return SegmentStatistics(entries.double(), record[:, MEAN], record[:, STD])

"""The fused step as functions of tensors: the twins of `bngd_triton.reference`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Options, check_float, check_step, check_tensors
from .launch import encode, launch, on_device, statistics, tuning_for, why_not, write_rates
from .layout import Walk, walk
from .plan import Entry, Plan, Tuning, build


class Member(NamedTuple):
    """One tensor of a step: what `FusedStep` is made of.

    Attributes:
        param: non-empty, of a dtype and device that `launch.why_not` serves; written.
        grad: of the parameter's shape; read.
        momentum: of the parameter's shape; written. None when its group has no momentum.
        group: index into the list of `Options`.
    """

    param: Tensor
    grad: Tensor
    momentum: Tensor | None
    group: int


class FusedStep:
    """A step prepared for tensors that stay where they are; gradients may move.

    Args:
        members: the tensors; those of one device share launches.
        groups: the options, one `Options` for each group that a member names.
        tuning: sizes of the work items; None takes those of the device.
    """

    def __init__(
        self, members: Sequence[Member], groups: Sequence[Options], tuning: Tuning | None = None
    ) -> None:
        self.signature = self.sign(members, groups)
        self._devices: list[_Device] = []
        for device in dict.fromkeys(member.param.device for member in members):
            here = [i for i, member in enumerate(members) if member.param.device == device]
            self._devices.append(_Device(device, here, members, groups, tuning))

    @staticmethod
    def sign(members: Sequence[Member], groups: Sequence[Options]) -> list[object]:
        """All that a prepared step depends on; equal lists may share one."""
        parts: list[object] = [
            (options.granularity, options.center_1d, options.momentum > 0) for options in groups
        ]
        parts += [
            (
                group,
                param.data_ptr(), param.dtype, param.shape, param.stride(), param.device,
                None if momentum is None else
                (momentum.data_ptr(), momentum.dtype, momentum.stride()),
                grad.dtype, grad.stride(), grad.data_ptr() % 16,
            )
            for param, grad, momentum, group in members
        ]  # fmt: skip
        return parts

    def run(
        self,
        members: Sequence[Member],
        groups: Sequence[Options],
        skipped: dict[torch.device, Tensor],
    ) -> None:
        """Move the parameters.

        Args:
            members: of the same signature as those this step was prepared for.
            groups: this step's options.
            skipped: int64 [1] for each device, to which slices left as they were are added.
        """
        for device in self._devices:
            device.run(members, groups, skipped)
        written = [
            tensor for m in members for tensor in (m.param, m.momentum) if tensor is not None
        ]
        torch.autograd.graph.increment_version(written)


class _Device:
    """The part of a step that runs on one device."""

    def __init__(
        self,
        device: torch.device,
        order: list[int],
        members: Sequence[Member],
        groups: Sequence[Options],
        tuning: Tuning | None,
    ) -> None:
        self.device = device
        self.order = order
        self.walks: list[Walk] = []
        entries: list[Entry] = []
        for i in order:
            param, grad, momentum, group = members[i]
            options = groups[group]
            path = walk(param, momentum, by_row=options.granularity == "row")
            self.walks.append(path)
            entries.append(
                Entry(
                    param=path.param,
                    grad=path.gradient(grad),
                    momentum=path.momentum,
                    option=group,
                    rows=path.rows,
                    centred=options.centres(param.dim()),
                    shared=group if options.granularity == "global" else None,
                )
            )
        self.plan: Plan = build(entries, tuning or tuning_for(device))
        self.written: list[tuple[list[float], bool]] = []
        self.table = torch.empty(len(groups), 16, dtype=torch.float64, device=device)

    def run(
        self,
        members: Sequence[Member],
        groups: Sequence[Options],
        skipped: dict[torch.device, Tensor],
    ) -> None:
        rows = [encode(options) for options in groups]
        # a row of a tensor lr differs from that of the float it may be replaced by
        written = [(row, isinstance(options.lr, Tensor)) for row, options in zip(rows, groups)]
        if written != self.written:
            self.table.copy_(torch.tensor(rows, dtype=torch.float64))
            self.written = written
        for row, options in enumerate(groups):
            write_rates(self.table, row, options)
        here = [members[i] for i in self.order]
        # copies live until the launches are queued; the allocator orders their reuse after them
        grads = [path.gradient(member.grad) for path, member in zip(self.walks, here)]
        copies = [
            (mine, theirs)
            for path, member in zip(self.walks, here)
            for mine, theirs in ((path.param, member.param), (path.momentum, member.momentum))
            if mine is not None and theirs is not None and mine.data_ptr() != theirs.data_ptr()
        ]
        for mine, theirs in copies:
            mine.copy_(theirs)
        self.plan.point_at(grads)
        launch(self.plan, self.table, skipped[self.device])
        for mine, theirs in copies:
            theirs.copy_(mine)


@torch.no_grad()
def fused_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    granularity: str = "tensor",
    normalizer: str = "zscore",
    centering: float = 1.0,
    center_1d: bool = False,
    nonfinite: str = "skip",
    maximize: bool = False,
    tuning: Tuning | None = None,
) -> Tensor:
    """One step of BNGD by the kernels, in place; the twin of `bngd_triton.reference.step_`.

    Every call lays out its work anew; `bngd_triton.BNGD` does so once.

    Args:
        params: n dense tensors of float16, bfloat16 or float32 on devices that Triton serves (on
            the CPU with TRITON_INTERPRET=1), written in place.
        grads: n tensors of the same shapes, of any of these dtypes and any layout.
        momentum_buffers: n tensors of the same shapes, written; None when `momentum` is 0.
        lr: as in `reference.step_`, like all that follow but the last.
        momentum: see there.
        nesterov: see there.
        weight_decay: see there.
        eps: see there.
        granularity: see there.
        normalizer: see there.
        centering: see there.
        center_1d: see there.
        nonfinite: see there.
        maximize: see there.
        tuning: sizes of the work items; None takes those of the device.

    Returns:
        The number of slices skipped, a 0-dim int64 tensor on the first parameter's device.

    Raises:
        ValueError: an option is out of bounds, or the lists do not belong together.
        TypeError: a tensor is sparse, complex or not of a supported dtype.
        RuntimeError: the kernels cannot serve a tensor; says why and what to do.
        FloatingPointError: a non-finite gradient with ``nonfinite="raise"``.
    """
    options = Options(
        lr, momentum, nesterov, weight_decay, eps, granularity, normalizer, centering, center_1d,
        nonfinite, maximize,
    )  # fmt: skip
    check_tensors(params, grads, momentum_buffers, momentum=momentum)
    check_served([*params, *grads])
    check_step(params, grads, options)
    buffers = (
        momentum_buffers if momentum and momentum_buffers is not None else [None] * len(params)
    )
    members = [
        Member(param, grad, buffer, 0)
        for param, grad, buffer in zip(params, grads, buffers)
        if param.numel()
    ]
    skipped = {param.device: new_counter(param.device) for param in params}
    if members:
        FusedStep(members, [options], tuning).run(members, [options], skipped)
    if not skipped:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack([count[0].to(params[0].device) for count in skipped.values()]).sum()


def new_counter(device: torch.device) -> Tensor:
    """A counter of skipped slices."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def check_served(tensors: Iterable[Tensor], names: Sequence[str] | None = None) -> None:
    """Raise RuntimeError for the first tensor that the kernels cannot serve."""
    for i, tensor in enumerate(tensors):
        reason = why_not(tensor)
        if reason:
            what = names[i] if names else f"a tensor of shape {tuple(tensor.shape)}"
            raise RuntimeError(f"fused kernels cannot serve {what}: {reason}")


@torch.no_grad()
def fused_normalize_gradient(
    grad: Tensor,
    *,
    eps: float = 1e-8,
    granularity: str = "tensor",
    normalizer: str = "zscore",
    centering: float = 1.0,
    center_1d: bool = False,
    nonfinite: str = "propagate",
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
        normalizer=normalizer, centering=centering, center_1d=center_1d, nonfinite=nonfinite,
        maximize=not maximize,
    )  # fmt: skip
    return out


class SegmentStatistics(NamedTuple):
    """Statistics of s slices: float64 [s] each, in the tensors' units."""

    n: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def segment_statistics(
    tensors: Sequence[Tensor], *, granularity: str = "tensor", tuning: Tuning | None = None
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
    options = Options(granularity=granularity)
    for i, tensor in enumerate(tensors):
        check_float(f"tensors[{i}]", tensor)
        if not tensor.numel():
            raise ValueError(f"tensors[{i}] has no entries (shape {tuple(tensor.shape)})")
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"need tensors of one device, got {sorted(map(str, devices))}")
    check_served(tensors)
    (device,) = devices
    entries = []
    for tensor in tensors:
        path = walk(tensor, None, by_row=granularity == "row")
        values = path.gradient(tensor)
        shared = 0 if granularity == "global" else None
        entries.append(Entry(values, values, None, 0, path.rows, False, shared))
    plan = build(entries, tuning or tuning_for(device), tiles=False)
    plan.point_at([entry.grad for entry in entries])
    table = torch.tensor([encode(options)], dtype=torch.float64).to(device)
    with on_device(device):
        for batch in plan.batches:
            statistics(plan, batch, table, new_counter(device))
    n = plan.segments[:, 2].double()
    return SegmentStatistics(n, plan.moments[:, 0], (plan.moments[:, 1] / n).sqrt())

"""A step laid out once and run many times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from struct import pack

import torch
from torch import Tensor

from ..options import Options, on_a_device
from ..records import StepInputs, StepTensor, rounds_stochastically, slices_of
from .build_plan import build
from .devices import Tuning, tuning_for
from .launch import LaunchInputs, measure, statistics, update, update_by
from .layout import Walk, walk
from .plan import ALIGNMENT, Entry, capturing, upload
from .rates import Rates
from .tables import OPTION_COLUMNS, SLICE_LENGTH, encode

# what may be walked in a copy that is copied back
_written = attrgetter("param", "momentum", "master")


class FusedStep:
    """A step prepared for tensors of one device that stay where they are; gradients may move.

    Args:
        members: the tensors.
        groups: the options, one `Options` for each group that a member names.
        tuning: sizes of the work items; None takes those of the device.
        sharded: every tensor is a slice, or rows of slices, of which other processes may hold more:
            for `measure` and `update_by` in the place of `update`.
        tiles: whether short rows and small tensors are finished in a launch of their own; not for
            `statistics` in the place of `update`.
    """

    def __init__(
        self,
        members: Sequence[StepTensor],
        groups: Sequence[Options],
        tuning: Tuning | None = None,
        *,
        sharded: bool = False,
        tiles: bool = True,
    ) -> None:
        self.signature = self.sign(members, groups)
        self.layouts = [options.layout for options in groups]
        self.params = [member.param for member in members]
        self.device = device = self.params[0].device
        self.walks: list[Walk] = []
        entries: list[Entry] = []
        for member in members:
            param, options = member.param, groups[member.group]
            rows = slices_of(param.shape, options.granularity)
            path = walk(param, member.momentum, member.master, rows)
            self.walks.append(path)
            entries.append(
                Entry(
                    param=path.param,
                    grad=path.gradient(gradient_of(member)),
                    momentum=path.momentum,
                    master=path.master,
                    window=member.window,
                    record=member.record,
                    key=member.key if rounds_stochastically(param, options) else None,
                    option=member.group,
                    rows=rows,
                    centred=options.centres(param.dim()),
                    shared=member.group
                    if options.granularity == "global" and not sharded
                    else None,
                )
            )
        # whether every tensor is walked where it is
        self.in_place = all(
            entry.grad is member.grad and all(map(is_, _written(entry), _written(member)))
            for entry, member in zip(entries, members)
        )
        self.plan = build(entries, tuning or tuning_for(device), tiles=tiles and not sharded)
        # of the table: what was written, and the options and ends of windows it was made from
        self.rows: list[list[float]] = [[]] * len(groups)
        self.written: Sequence[tuple[Options | None, bool]] = [(None, False)] * len(groups)
        self.table = torch.empty(len(groups), OPTION_COLUMNS, dtype=torch.float64, device=device)
        self.rates = Rates(self.table)
        self.unscaled = torch.ones(1, dtype=torch.float32, device=device)
        self.finite = torch.zeros(1, dtype=torch.float32, device=device)
        self.last_inputs: LaunchInputs | None = None
        # of captured launches: what they read besides, and what they write
        self.held: list[tuple[LaunchInputs | None, list[Tensor]]] = []
        # while a step is made: gradients, and copies that are walked beside what they stand for
        self._staged: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def fitting(
        cls,
        laid_out: Iterable[FusedStep | None],
        members: Sequence[StepTensor],
        groups: Sequence[Options],
        *,
        sharded: bool = False,
    ) -> FusedStep:
        """The first of some steps that fits, else one laid out anew."""
        signature = cls.sign(members, groups)
        for prepared in laid_out:
            if prepared is not None and prepared.signature == signature:
                addresses = [gradient_of(member).data_ptr() for member in members]
                if not prepared.plan.fixed or prepared.plan.point_at(addresses):
                    return prepared
        return cls(members, groups, sharded=sharded)

    @staticmethod
    def sign(members: Sequence[StepTensor], groups: Sequence[Options]) -> list[object]:
        """All that a prepared step depends on; equal lists may share one."""
        parts: list[object] = [options.layout for options in groups]
        for member in members:
            grad = gradient_of(member)
            aligned = grad.data_ptr() % ALIGNMENT == 0
            parts.append((member.group, member.key))
            parts.append((grad.dtype, grad.stride(), grad.is_neg(), aligned))
            parts += map(_place, (*_written(member), member.window, member.record))
        return parts

    def fix(self, written: list[Tensor]) -> None:
        """From now on hold all that launches read and write, and point at no other gradients."""
        self.plan.fixed = True
        self.held.append((self.last_inputs, written))

    def write(self, groups: Sequence[Options], closing: Sequence[bool]) -> None:
        """Bring the option table up to date; an upload only where a value changed."""
        written = list(zip(groups, closing))
        rows = [
            row
            if new is old and last == old_last and not isinstance(new.lr, Tensor)
            else encode(new, last)
            for (new, last), (old, old_last), row in zip(written, self.written, self.rows)
        ]
        given = [options.lr if on_a_device(options.lr) else None for options in groups]
        follows = self.rates.are(given)
        if rows != self.rows or not follows:
            if capturing(self.device):
                raise RuntimeError(
                    "an option changed while a CUDA graph is being captured; call "
                    "sync_hyperparameters() before the capture, and before each replay"
                )
            flat = [value for row in rows for value in row]
            values = torch.frombuffer(bytearray(pack(f"{len(flat)}d", *flat)), dtype=torch.float64)
            upload(self.table, values.view(len(rows), -1))
            if not follows:
                self.rates.point_at(given)
        self.rows, self.written = rows, written
        self.rates.write()

    def update(
        self, members: Sequence[StepTensor], groups: Sequence[Options], inputs: StepInputs
    ) -> None:
        """Update the parameters.

        Args:
            members: of the same signature as those this step was prepared for.
            groups: this step's options.
            inputs: what else is new in this step.
        """
        self._stage(members, groups, inputs)
        self.update_again(inputs)

    def update_again(self, inputs: StepInputs) -> None:
        """As `update`, after `plan.point_at`; options are those last written."""
        update(self.plan, self._launch_inputs(inputs))
        self._unstage()

    def measure(
        self, members: Sequence[StepTensor], groups: Sequence[Options], inputs: StepInputs
    ) -> list[Tensor]:
        """The statistics of what is at hand of each member's slices; see `launch.measure`.

        Args:
            members: as for `update`, like what follows.
            groups: see there.
            inputs: see there.

        Returns:
            float64 [slices, MOMENTS_COLUMNS] for each member, in order.
        """
        self._stage(members, groups, inputs)
        return self.measure_again(inputs)

    def measure_again(self, inputs: StepInputs) -> list[Tensor]:
        """As `measure`, after `plan.point_at`; options are those last written."""
        moments = measure(self.plan, self._launch_inputs(inputs))
        return list(moments.split([path.rows for path in self.walks]))

    def update_by(self, moments: Sequence[Tensor], inputs: StepInputs) -> None:
        """Update the parameters by the statistics of whole slices, after `measure`."""
        update_by(self.plan, self._launch_inputs(inputs), torch.cat(list(moments)))
        self._unstage()

    def statistics(
        self, members: Sequence[StepTensor], groups: Sequence[Options], inputs: StepInputs
    ) -> Tensor:
        """Fill in the records, and update nothing; as for `update`, without tiles.

        Returns:
            The entries of each slice.
        """
        self._stage(members, groups, inputs)
        statistics(self.plan, self._launch_inputs(inputs))
        self._staged, self._copies = [], []
        return self.plan.slices[:, SLICE_LENGTH]

    def _launch_inputs(self, inputs: StepInputs) -> LaunchInputs:
        """What the kernels read besides the plan."""
        scale, found_inf = inputs.grad_scale, inputs.found_inf
        # a GradScaler's, where and as the kernels read them
        scale = self.unscaled if scale is None else scale.to(self.unscaled)
        found_inf = self.finite if found_inf is None else found_inf.to(self.finite)
        made = LaunchInputs(self.table, inputs.clocks[self.device], scale, found_inf)
        # the same object where its tensors are the same: launches take it as it is
        if self.last_inputs is None or not all(map(is_, made, self.last_inputs)):
            self.last_inputs = made
        return self.last_inputs

    def _stage(
        self, members: Sequence[StepTensor], groups: Sequence[Options], inputs: StepInputs
    ) -> None:
        """Write options, point at gradients, and fill the copies that are walked in their place."""
        self.write(groups, inputs.closing)
        pairs = list(zip(self.walks, members))
        self._staged = [path.gradient(gradient_of(member)) for path, member in pairs]
        self._copies = [
            (copy, tensor)
            for path, member in pairs
            for copy, tensor in zip(_written(path), _written(member))
            if copy is not None and copy.data_ptr() != tensor.data_ptr()
        ]
        for copy, tensor in self._copies:
            copy.copy_(tensor)
        self.plan.point_at([grad.data_ptr() for grad in self._staged])

    def _unstage(self) -> None:
        """Copy back; the launches are queued, and the allocator orders reuse after them."""
        for copy, tensor in self._copies:
            tensor.copy_(copy)
        self._staged, self._copies = [], []
        torch.autograd.graph.increment_version(self.params)


def _place(tensor: Tensor | None) -> object:
    """Where a tensor lies, and of what kind it is."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def gradient_of(member: StepTensor) -> Tensor:
    """The gradient, which the kernels cannot do without."""
    assert member.grad is not None, "a member without gradient is the reference's"
    return member.grad

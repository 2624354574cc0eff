"""A step laid out once and run many times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from struct import pack

import torch
from torch import Tensor

from ..options import Options, on_a_device
from ..records import StepInputs, StepTensor, rounds_stochastically, slices_of
from .build_plan import build
from .devices import Tuning, tuning_for
from .launch import LaunchInputs, measure, update, update_by
from .layout import Walk, walk
from .plan import ALIGNMENT, Entry, Plan, capturing, upload
from .rates import Rates
from .tables import OPTION_COLUMNS, encode


class FusedStep:
    """A step prepared for tensors that stay where they are; gradients may move.

    Args:
        members: the tensors; those of one device share launches.
        groups: the options, one `Options` for each group that a member names.
        tuning: sizes of the work items; None takes those of the device.
        sharded: every tensor is a slice, or rows of slices, of which other processes may hold more:
            for `measure` and `update_by` in the place of `update`.
    """

    def __init__(
        self,
        members: Sequence[StepTensor],
        groups: Sequence[Options],
        tuning: Tuning | None = None,
        *,
        sharded: bool = False,
    ) -> None:
        self.signature = self.sign(members, groups)
        self.layouts = [options.layout for options in groups]
        self.params = [member.param for member in members]
        self._devices: list[_Device] = []
        for device in dict.fromkeys(member.param.device for member in members):
            order = [i for i, member in enumerate(members) if member.param.device == device]
            self._devices.append(_Device(device, order, members, groups, tuning, sharded))

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
                if not prepared.fixed or prepared.point_at(addresses):
                    return prepared
        return cls(members, groups, sharded=sharded)

    @staticmethod
    def sign(members: Sequence[StepTensor], groups: Sequence[Options]) -> list[object]:
        """All that a prepared step depends on; equal lists may share one."""
        parts: list[object] = [options.layout for options in groups]
        parts += [
            (
                group,
                param.data_ptr(), param.dtype, param.shape, param.stride(), param.device,
                *(
                    None if state is None else (state.data_ptr(), state.dtype, state.stride())
                    for state in (momentum, master, window, record)
                ),
                grad.dtype, grad.stride(), grad.is_neg(), grad.data_ptr() % ALIGNMENT == 0, key,
            )
            for member in members
            for param, _, momentum, group, record, master, window, key in (member,)
            for grad in (gradient_of(member),)
        ]  # fmt: skip
        return parts

    @property
    def in_place(self) -> bool:
        """Whether every tensor is walked where it is."""
        return all(device.in_place for device in self._devices)

    @property
    def fixed(self) -> bool:
        """Whether a CUDA graph reads this step's tables, so that gradients must not move."""
        return any(device.plan.fixed for device in self._devices)

    def fix(self) -> None:
        """Hold all that the launches read, and refuse to point at other gradients, from now on."""
        for device in self._devices:
            device.plan.fixed = True
            device.held.append(device.last_inputs)

    def write(self, groups: Sequence[Options], closing: Sequence[bool]) -> None:
        """Bring the option tables up to date; an upload only where a value changed."""
        for device in self._devices:
            device.write(groups, closing)

    def update(
        self, members: Sequence[StepTensor], groups: Sequence[Options], inputs: StepInputs
    ) -> None:
        """Update the parameters.

        Args:
            members: of the same signature as those this step was prepared for.
            groups: this step's options.
            inputs: what else is new in this step.
        """
        self.write(groups, inputs.closing)
        for device in self._devices:
            device.update(members, inputs)
        torch.autograd.graph.increment_version(self.params)

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
        self.write(groups, inputs.closing)
        for device in self._devices:
            device.stage(members)
        return self.measure_again(inputs)

    def measure_again(self, inputs: StepInputs) -> list[Tensor]:
        """As `measure`, after `point_at`; options are those last written."""
        moments: dict[int, Tensor] = {}
        for device in self._devices:
            whole = measure(device.plan, device.launch_inputs(inputs))
            moments |= dict(zip(device.order, whole.split([path.rows for path in device.walks])))
        return [moments[i] for i in range(len(moments))]

    def update_by(self, moments: Sequence[Tensor], inputs: StepInputs) -> None:
        """Update the parameters by the statistics of whole slices, after `measure`."""
        for device in self._devices:
            whole = torch.cat([moments[i] for i in device.order])
            update_by(device.plan, device.launch_inputs(inputs), whole)
            device.unstage()
        torch.autograd.graph.increment_version(self.params)

    def update_again(self, inputs: StepInputs) -> None:
        """Update the parameters, after `point_at`; options are those last written."""
        for device in self._devices:
            update(device.plan, device.launch_inputs(inputs))
        torch.autograd.graph.increment_version(self.params)

    def point_at(self, addresses: list[int]) -> bool:
        """Read gradients of the same kind elsewhere from now on, when `in_place`.

        Args:
            addresses: of the gradients, in the order of the members.

        Returns:
            Whether the kernels can: where 16 divides the addresses that it divided, and no graph
            reads this step's tables.
        """
        for device in self._devices:
            its_own = addresses
            if len(self._devices) > 1:
                its_own = [addresses[i] for i in device.order]
            if not device.plan.point_at(its_own):
                return False
        return True


class _Device:
    """The part of a step that runs on one device."""

    def __init__(
        self,
        device: torch.device,
        order: list[int],
        members: Sequence[StepTensor],
        groups: Sequence[Options],
        tuning: Tuning | None,
        sharded: bool,
    ) -> None:
        self.device = device
        self.order = order
        self.walks: list[Walk] = []
        entries: list[Entry] = []
        copied = False
        for i in order:
            param, _, momentum, group, record, master, window, key = members[i]
            grad = gradient_of(members[i])
            options = groups[group]
            path = walk(param, momentum, master, slices_of(param.shape, options.granularity))
            self.walks.append(path)
            values = path.gradient(grad)
            copied |= path.param is not param or path.momentum is not momentum
            copied |= path.master is not master
            copied |= values is not grad
            entries.append(
                Entry(
                    param=path.param,
                    grad=values,
                    momentum=path.momentum,
                    master=path.master,
                    window=window,
                    record=record,
                    key=key if rounds_stochastically(param, options) else None,
                    option=group,
                    rows=path.rows,
                    centred=options.centres(param.dim()),
                    shared=group if options.granularity == "global" and not sharded else None,
                )
            )
        self.in_place = not copied
        self.plan: Plan = build(entries, tuning or tuning_for(device), tiles=not sharded)
        # of the table: what was written, and the options and ends of windows it was made from
        self.rows: list[list[float]] = [[]] * len(groups)
        self.written: Sequence[tuple[Options | None, bool]] = [(None, False)] * len(groups)
        self.table = torch.empty(len(groups), OPTION_COLUMNS, dtype=torch.float64, device=device)
        self.rates = Rates(self.table)
        self.unscaled = torch.ones(1, dtype=torch.float32, device=device)
        self.finite = torch.zeros(1, dtype=torch.float32, device=device)
        self.last_inputs: LaunchInputs | None = None
        # of captured launches
        self.held: list[LaunchInputs | None] = []

    def write(self, groups: Sequence[Options], closing: Sequence[bool]) -> None:
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

    def launch_inputs(self, inputs: StepInputs) -> LaunchInputs:
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

    def update(self, members: Sequence[StepTensor], inputs: StepInputs) -> None:
        self.stage(members)
        update(self.plan, self.launch_inputs(inputs))
        self.unstage()

    def stage(self, members: Sequence[StepTensor]) -> None:
        """Point the plan at the gradients, and fill the copies that are walked in their place."""
        pairs = [(path, members[i]) for path, i in zip(self.walks, self.order)]
        self._staged = [path.gradient(gradient_of(member)) for path, member in pairs]
        self._copies = [
            (copy, tensor)
            for path, member in pairs
            for copy, tensor in (
                (path.param, member.param),
                (path.momentum, member.momentum),
                (path.master, member.master),
            )
            if copy is not None and tensor is not None and copy.data_ptr() != tensor.data_ptr()
        ]
        for copy, tensor in self._copies:
            copy.copy_(tensor)
        self.plan.point_at([grad.data_ptr() for grad in self._staged])

    def unstage(self) -> None:
        """Copy back; the launches are queued, and the allocator orders reuse after them."""
        for copy, tensor in self._copies:
            tensor.copy_(copy)
        self._staged, self._copies = [], []


def gradient_of(member: StepTensor) -> Tensor:
    """The gradient, which the kernels cannot do without."""
    assert member.grad is not None, "a member without gradient is the reference's"
    return member.grad

"""A step laid out once and run many times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from struct import pack

import torch
from torch import Tensor

from ..options import Options
from ..records import StepInputs, StepTensor, rounds_stochastically, slices_of
from .build_plan import build
from .devices import tuning_for
from .launch import LaunchInputs, launch, measure, move
from .layout import Walk, walk
from .plan import ALIGNMENT, Entry, Plan, capturing, upload
from .tables import Rates, encode, on_a_device
from .tuning import Tuning


class FusedStep:
    """A step prepared for tensors that stay where they are; gradients may move.

    Args:
        members: the tensors; those of one device share launches.
        groups: the options, one `Options` for each group that a member names.
        tuning: sizes of the work items; None takes those of the device.
        apart: every tensor is a slice, or rows of slices, of which other processes may hold more:
            for `measure` and `move` in the place of `run`.
    """

    def __init__(
        self,
        members: Sequence[StepTensor],
        groups: Sequence[Options],
        tuning: Tuning | None = None,
        *,
        apart: bool = False,
    ) -> None:
        self.signature = self.sign(members, groups)
        self.layouts = [options.layout for options in groups]
        self.params = [member.param for member in members]
        self._devices: list[_Device] = []
        for device in dict.fromkeys(member.param.device for member in members):
            here = [i for i, member in enumerate(members) if member.param.device == device]
            self._devices.append(_Device(device, here, members, groups, tuning, apart))

    @classmethod
    def fitting(
        cls,
        laid_out: Iterable[FusedStep | None],
        members: Sequence[StepTensor],
        groups: Sequence[Options],
        *,
        apart: bool = False,
    ) -> FusedStep:
        """The first of some steps that fits, else one laid out anew."""
        signature = cls.sign(members, groups)
        for prepared in laid_out:
            if prepared is not None and prepared.signature == signature:
                addresses = [gradient_of(member).data_ptr() for member in members]
                if not prepared.fixed or prepared.point_at(addresses):
                    return prepared
        return cls(members, groups, apart=apart)

    @staticmethod
    def sign(members: Sequence[StepTensor], groups: Sequence[Options]) -> list[object]:
        """All that a prepared step depends on; equal lists may share one."""
        parts: list[object] = [options.layout for options in groups]
        parts += [
            (
                group,
                param.data_ptr(), param.dtype, param.shape, param.stride(), param.device,
                *(
                    None if one is None else (one.data_ptr(), one.dtype, one.stride())
                    for one in (momentum, master, window, record)
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

    def run(
        self, members: Sequence[StepTensor], groups: Sequence[Options], inputs: StepInputs
    ) -> None:
        """Move the parameters.

        Args:
            members: of the same signature as those this step was prepared for.
            groups: this step's options.
            inputs: what else is new in this step.
        """
        self.write(groups, inputs.closing)
        for device in self._devices:
            device.run(members, inputs)
        torch.autograd.graph.increment_version(self.params)

    def measure(
        self, members: Sequence[StepTensor], groups: Sequence[Options], inputs: StepInputs
    ) -> list[Tensor]:
        """The statistics of what is at hand of each member's slices; see `launch.measure`.

        Args:
            members: as for `run`, like what follows.
            groups: see there.
            inputs: see there.

        Returns:
            float64 [slices, 5] for each member, in order.
        """
        self.write(groups, inputs.closing)
        for device in self._devices:
            device.stage(members)
        return self.measure_again(inputs)

    def measure_again(self, inputs: StepInputs) -> list[Tensor]:
        """As `measure`, after `point_at`; options are those last written."""
        found: dict[int, Tensor] = {}
        for device in self._devices:
            tables = measure(device.plan, device.launch_inputs(inputs))
            found |= dict(zip(device.order, tables.split([path.rows for path in device.walks])))
        return [found[i] for i in range(len(found))]

    def move(self, tables: Sequence[Tensor], inputs: StepInputs) -> None:
        """Move the parameters by the statistics of whole slices, after `measure`."""
        for device in self._devices:
            whole = torch.cat([tables[i] for i in device.order])
            move(device.plan, device.launch_inputs(inputs), whole)
            device.unstage()
        torch.autograd.graph.increment_version(self.params)

    def run_again(self, inputs: StepInputs) -> None:
        """Move the parameters, after `point_at`; options are those last written."""
        for device in self._devices:
            launch(device.plan, device.launch_inputs(inputs))
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
            here = addresses
            if len(self._devices) > 1:
                here = [addresses[i] for i in device.order]
            if not device.plan.point_at(here):
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
        apart: bool,
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
                    shared=group if options.granularity == "global" and not apart else None,
                )
            )
        self.in_place = not copied
        self.plan: Plan = build(entries, tuning or tuning_for(device), tiles=not apart)
        # of the table: what was written, and the options and ends of windows it was made from
        self.rows: list[list[float]] = [[]] * len(groups)
        self.written: Sequence[tuple[Options | None, bool]] = [(None, False)] * len(groups)
        self.table = torch.empty(len(groups), 16, dtype=torch.float64, device=device)
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
        scale, found = inputs.grad_scale, inputs.found_inf
        # a GradScaler's, where and as the kernels read them
        scale = self.unscaled if scale is None else scale.to(self.unscaled)
        found = self.finite if found is None else found.to(self.finite)
        made = LaunchInputs(self.table, inputs.clocks[self.device], scale, found)
        # the same object where its tensors are the same: launches take it as it is
        if self.last_inputs is None or not all(map(is_, made, self.last_inputs)):
            self.last_inputs = made
        return self.last_inputs

    def run(self, members: Sequence[StepTensor], inputs: StepInputs) -> None:
        self.stage(members)
        launch(self.plan, self.launch_inputs(inputs))
        self.unstage()

    def stage(self, members: Sequence[StepTensor]) -> None:
        """Point the plan at the gradients, and fill the copies that are walked in their place."""
        here = [members[i] for i in self.order]
        self._staged = [
            path.gradient(gradient_of(member)) for path, member in zip(self.walks, here)
        ]
        self._copies = [
            (mine, theirs)
            for path, member in zip(self.walks, here)
            for mine, theirs in (
                (path.param, member.param),
                (path.momentum, member.momentum),
                (path.master, member.master),
            )
            if mine is not None and theirs is not None and mine.data_ptr() != theirs.data_ptr()
        ]
        for mine, theirs in self._copies:
            mine.copy_(theirs)
        self.plan.point_at([grad.data_ptr() for grad in self._staged])

    def unstage(self) -> None:
        """Copy back; the launches are queued, and the allocator orders reuse after them."""
        for mine, theirs in self._copies:
            theirs.copy_(mine)
        self._staged, self._copies = [], []


def gradient_of(member: StepTensor) -> Tensor:
    """The gradient, which the kernels cannot do without."""
    assert member.grad is not None, "a member without gradient is the reference's"
    return member.grad

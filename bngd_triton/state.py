"""What an optimizer keeps for each parameter, made when it first has a gradient.

In ``optimizer.state``, so in checkpoints: momentum, the master or its remainder, and which slices
of an unfinished window have had a valid micro-batch. Beside it: records of statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager.rounding import master_dtype, new_master
from .flat_buffers import zeros_like
from .options import Options
from .records import SKIPPED, new_record, slices_of
from .tensors import is_sharded, local

MOMENTUM = "momentum_buffer"
REMAINDER = "master_remainder"
MASTER = "master"
WINDOW = "window"
KEYS = (MOMENTUM, REMAINDER, MASTER, WINDOW)


class GradStats(NamedTuple):
    """Statistics of a parameter's last gradient, in the units of the unscaled gradient.

    Float64 tensors on the parameter's device, 0-dim, or [rows] with ``granularity="row"``. Under
    ``"global"`` those of the whole group.

    Attributes:
        mean: mean.
        std: population standard deviation.
        rms: ``sqrt(mean**2 + std**2)``.
        kappa: ``sqrt(1 + mean**2 / std**2)``, at least 1; the cosine of gradient and centred
            gradient is ``1 / kappa``. Infinite without spread, 1 for zeros, which have no mean.
        skipped: how often the slice was left as it was because of an inf or NaN.
    """

    mean: Tensor
    std: Tensor
    rms: Tensor
    kappa: Tensor
    skipped: Tensor


def grad_stats(record: Tensor, *, scalar: bool) -> GradStats:
    """The statistics that a record holds, as new tensors; nothing waits for the device."""
    copy = record.clone()
    # rows that a group had before its granularity was changed remain rows
    mean, std, skipped = (copy[0] if scalar and len(copy) == 1 else copy).unbind(-1)
    rms = torch.hypot(mean, std)
    return GradStats(mean, std, rms, kappa_of(rms, std), skipped)


def kappa_of(rms: Tensor, std: Tensor) -> Tensor:
    """``rms / std``, 1 where both are 0."""
    return (rms / std).masked_fill(rms == 0, 1.0)


def master_key(param: Tensor) -> str:
    """Under which key a parameter's master is kept."""
    return REMAINDER if param.dtype is torch.bfloat16 else MASTER


def master_of(state: dict[str, Any], param: Tensor, options: Options) -> Tensor | None:
    """A parameter's master where its options ask for one."""
    if master_dtype(param, options.master_weights) is None:
        return None
    found: Tensor = state[master_key(param)]
    return found


def make_state(state: dict[Tensor, Any], params: Sequence[Tensor], options: Options) -> None:
    """Complete the state of parameters that have a gradient; zeros, and masters of their values."""
    wanted: list[tuple[str, Tensor, torch.dtype]] = []
    for param in params:
        entry = state.get(param, {})
        if options.buffered and MOMENTUM not in entry:
            dtype = options.momentum_dtype or torch.promote_types(param.dtype, torch.float32)
            wanted.append((MOMENTUM, param, dtype))
        dtype_of_master = master_dtype(param, options.master_weights)
        if dtype_of_master is not None and master_key(param) not in entry:
            wanted.append((master_key(param), param, dtype_of_master))
        for key in (REMAINDER, MASTER):
            if dtype_of_master is None or key != master_key(param):
                # it would be stale when it is asked for again
                entry.pop(key, None)
        slices = slices_of(local(param).shape, options.granularity)
        if options.accumulation_steps > 1:
            window = entry.get(WINDOW)
            if window is None or local(window).numel() != slices:
                seen = torch.zeros(slices, dtype=torch.uint8, device=param.device)
                if window is not None and window.numel() and not is_sharded(param):
                    # the granularity was changed within the window
                    seen += window.amax()
                state[param][WINDOW] = as_window(param, seen, options)
        else:
            entry.pop(WINDOW, None)
    parts = [local(param) for _, param, _ in wanted]
    made = zeros_like(parts, [dtype for _, _, dtype in wanted])
    for (key, param, _), part, tensor in zip(wanted, parts, made):
        state[param][key] = as_state(param, tensor if key == MOMENTUM else new_master(part, tensor))


def as_state(param: Tensor, part: Tensor) -> Tensor:
    """State shaped as a parameter: for a DTensor one with its placements."""
    if not is_sharded(param):
        return part
    from .sharding.placements import like

    return like(param, part)


def as_window(param: Tensor, part: Tensor, options: Options) -> Tensor:
    """State with one entry for each slice; a tensor's only slice is every rank's."""
    if not is_sharded(param) or options.granularity != "row" or param.dim() < 2:
        return part
    from .sharding.placements import rows_like

    return rows_like(param, part)


class Records:
    """The records of an optimizer's parameters; see `records.RECORD`."""

    def __init__(self) -> None:
        self._of: dict[Tensor, Tensor] = {}
        # ids of records that a global group shares
        self._shared: set[int] = set()
        # of the parameters that were kept last
        self._ids: list[int] = []
        # on each device, float64: skips of records that are gone
        self._retired: dict[torch.device, Tensor] = {}

    def make(self, params: Sequence[Tensor], options: Options) -> None:
        """Give each parameter a record of its slices; those of a global group share one."""
        if options.granularity == "global":
            self._share(params)
            return
        new = []
        for param in params:
            slices = slices_of(local(param).shape, options.granularity)
            old = self._of.get(param)
            fits = old is not None and len(old) == slices and old.device == param.device
            if not fits or id(old) in self._shared:
                new.append((param, slices))
        for device in {param.device for param, _ in new}:
            here = [(param, slices) for param, slices in new if param.device == device]
            flat = new_record(sum(slices for _, slices in here), device)
            parts = flat.split([slices for _, slices in here])
            self._replace({param: part for (param, _), part in zip(here, parts)})

    def _share(self, params: Sequence[Tensor]) -> None:
        """One record for all: that of an earlier step if there is one."""
        held = [self._of[param] for param in params if id(self._of.get(param)) in self._shared]
        held = [record for record in held if record.device == params[0].device]
        if params:
            record = held[0] if held else new_record(1, params[0].device)
            self._shared.add(id(record))
            self._replace(dict.fromkeys(params, record))

    def keep(self, params: Iterable[Tensor]) -> None:
        """Let go of all other parameters; how often their slices were skipped still counts."""
        ids = list(map(id, params))
        if ids != self._ids:
            self._ids, kept = ids, set(ids)
            gone = [param for param in self._of if id(param) not in kept]
            self._retire([self._of.pop(param) for param in gone])

    def _replace(self, new: dict[Tensor, Tensor]) -> None:
        old = [self._of[param] for param in new if param in self._of]
        self._of.update(new)
        self._retire(old)

    def _retire(self, records: Sequence[Tensor]) -> None:
        """Count the skips of records that no parameter has any more; nothing waits."""
        used = set(map(id, self._of.values()))
        distinct = {id(record): record for record in records}
        for key in distinct.keys() - used:
            record = distinct[key]
            self._shared.discard(key)
            count, device = record[:, SKIPPED].sum(), record.device
            self._retired[device] = count + self._retired.get(device, 0.0)

    def __getitem__(self, param: Tensor) -> Tensor:
        return self._of[param]

    def get(self, param: Tensor) -> Tensor | None:
        """The record of a parameter that has had a gradient."""
        return self._of.get(param)

    def skipped(self) -> int:
        """Slices left as they were, so far, as far as this process has parts of them; waits."""
        distinct = {id(record): record for record in self._of.values()}
        counts = [record[:, SKIPPED].sum() for record in distinct.values()]
        return sum(int(count) for count in (*counts, *self._retired.values()))

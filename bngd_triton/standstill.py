"""Warn once of a run in which step after step moves nothing; never wait for the device.

``nonfinite="skip"`` passes over single infs and NaNs in silence, as it should; where every slice is
skipped in every step, the run is over and says nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.plan import capturing
from .records import SKIPPED
from .tensors import local

# every so many steps one record is looked at, and where that was skipped, all of them over as many
# steps more. A GradScaler comes from its first scale of 2**16 down to 1 in 16 overflows
EVERY = 16


class Standstill:
    """Looks, after every step of an optimizer, whether steps still move something."""

    def __init__(self) -> None:
        self._steps = 0
        self._warned = False
        # what the device was asked, and what follows from a yes
        self._asked: tuple[_Answer, Callable[[], None]] | None = None
        # since when steps are watched; their skips until then, or the GradScaler's overflows since
        self._since: int | None = None
        self._before: list[Tensor] = []
        self._overflows: Tensor | None = None

    def look(self, optimizer: Any) -> None:
        """Note a step that was made."""
        self._steps += 1
        if self._since is not None:
            self._watch(optimizer, self._steps - self._since)
        elif self._steps % EVERY == 0 and not self._warned and self._asked is None:
            self._sample(optimizer)
        if self._asked is not None and self._asked[0].there():
            (answer, act), self._asked = self._asked, None
            if answer.yes():
                act()

    @torch.no_grad()
    def _sample(self, optimizer: Any) -> None:
        """Ask whether the first parameter was skipped just now."""
        found = _overflow(optimizer)
        counts = _skips(optimizer, 1)
        if found is not None:
            flag = found != 0
        elif counts:
            flag = ~counts[0][:, :SKIPPED].sum(-1).isfinite().any()
        else:
            return
        self._asked = _Answer(flag), lambda: self._start(optimizer)

    @torch.no_grad()
    def _start(self, optimizer: Any) -> None:
        """Watch all parameters from the next step on."""
        self._since = self._steps
        found = _overflow(optimizer)
        self._overflows = None if found is None else torch.zeros_like(found)
        self._before = [record[:, SKIPPED].clone() for record in _skips(optimizer)]

    @torch.no_grad()
    def _watch(self, optimizer: Any, steps: int) -> None:
        found = _overflow(optimizer)
        if found is not None and self._overflows is not None:
            self._overflows = self._overflows + (found != 0)
        if steps < EVERY:
            return
        self._since = None
        if self._overflows is not None:
            self._asked = _Answer(self._overflows == EVERY), self._warn
            return
        counts = _skips(optimizer)
        if found is not None or list(map(len, counts)) != list(map(len, self._before)):
            return
        missed = [
            (record[:, SKIPPED] - before != EVERY).any()
            for record, before in zip(counts, self._before)
        ]
        if missed:
            here = missed[0].device
            flags = torch.stack([one.to(here, non_blocking=True) for one in missed])
            self._asked = _Answer(~flags.any()), self._warn

    def _warn(self) -> None:
        self._warned = True
        warnings.warn(
            f"BNGD moved nothing in the last {EVERY} steps: each had an inf or a NaN in every "
            "slice, or an overflow that a GradScaler found. Look at the loss; "
            "nonfinite='raise' names the first parameter (optimizer.skipped counts slices)",
            RuntimeWarning,
            stacklevel=2,
        )


class _Answer:
    """A flag on its way from the device to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag
        self._event: Any = None
        if flag.device.type != "cpu":
            self._flag = torch.empty(flag.shape, dtype=flag.dtype, device="cpu", pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._event = torch.get_device_module(flag.device).Event()
            self._event.record(torch.get_device_module(flag.device).current_stream(flag.device))

    def there(self) -> bool:
        """Whether it has come; nothing waits."""
        return self._event is None or bool(self._event.query())

    def yes(self) -> bool:
        return bool(self._flag)


def _overflow(optimizer: Any) -> Tensor | None:
    """What a GradScaler found before this step; with gradient release it leaves the number 0."""
    found = optimizer.__dict__.get("found_inf")
    return found if isinstance(found, Tensor) else None


def _skips(optimizer: Any, most: int | None = None) -> list[Tensor]:
    """The records of parameters that were stepped, all or the first few."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            record = optimizer._records.get(param)
            stepped = param.grad is not None or optimizer._release is not None
            if record is None or not stepped or capturing(record.device):
                continue
            if not local(param).numel():
                continue
            found.append(record)
            if len(found) == most:
                return found
    return found

"""Warn once of a run in which step after step moves nothing; never wait for the device.

``nonfinite="skip"`` passes over single infs and NaNs in silence, as it should; where every slice is
skipped in every step, the run is over and says nothing.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Generator, Iterator
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

    def __init__(self, optimizer: Any) -> None:
        # or the two would keep each other alive until Python looks for circles
        self._watch = _watch(weakref.proxy(optimizer))

    def look(self) -> None:
        """Note a step that was made."""
        # it has ended once it has warned
        next(self._watch, None)


def _watch(optimizer: Any) -> Iterator[None]:
    """Wait for the next step at each `yield`, until there is something to say."""
    for step in itertools.count(1):
        doubtful = step % EVERY == 0 and (yield from _answer(_skipped_just_now(optimizer)))
        if doubtful and (yield from _stands_still(optimizer)):
            break
        yield
    warnings.warn(
        f"BNGD moved nothing in the last {EVERY} steps: each had an inf or a NaN in every "
        "slice, or an overflow that a GradScaler found. Look at the loss; "
        "nonfinite='raise' names the first parameter (optimizer.skipped counts slices)",
        RuntimeWarning,
        stacklevel=2,
    )


def _stands_still(optimizer: Any) -> Generator[None, None, bool]:
    """Whether the next steps move nothing at all."""
    found = _overflow(optimizer)
    overflows = None if found is None else torch.zeros_like(found)
    before = _counts(optimizer)
    for _ in range(EVERY):
        yield
        found = _overflow(optimizer)
        if found is not None and overflows is not None:
            overflows = overflows + (found != 0)
    if overflows is not None:
        return (yield from _answer(overflows == EVERY))
    if found is not None:
        return False
    return (yield from _answer(_all_skipped(before, _counts(optimizer))))


def _answer(flag: Tensor | None) -> Generator[None, None, bool]:
    """What a flag says, as soon as the host has it; steps go on meanwhile."""
    if flag is None:
        return False
    if flag.device.type == "cpu":
        return bool(flag)
    here = torch.empty(flag.shape, dtype=flag.dtype, device="cpu", pin_memory=True)
    here.copy_(flag, non_blocking=True)
    event = torch.get_device_module(flag.device).Event()
    event.record(torch.get_device_module(flag.device).current_stream(flag.device))
    while not event.query():
        yield
    return bool(here)


def _overflow(optimizer: Any) -> Tensor | None:
    """What a GradScaler found before this step; with gradient release it leaves the number 0."""
    found = optimizer.__dict__.get("found_inf")
    return found if isinstance(found, Tensor) else None


@torch.no_grad()
def _skipped_just_now(optimizer: Any) -> Tensor | None:
    """Whether the first parameter was skipped in the last step."""
    found = _overflow(optimizer)
    if found is not None:
        return found != 0
    for record in _stepped(optimizer):
        return ~record[:, :SKIPPED].sum(-1).isfinite().any()
    return None


def _all_skipped(before: list[Tensor], now: list[Tensor]) -> Tensor | None:
    """Whether every slice was skipped in every step between two counts."""
    if not now or list(map(len, now)) != list(map(len, before)):
        return None
    missed = [(new - old != EVERY).any() for old, new in zip(before, now)]
    here = missed[0].device
    return ~torch.stack([one.to(here, non_blocking=True) for one in missed]).any()


@torch.no_grad()
def _counts(optimizer: Any) -> list[Tensor]:
    """How often each slice of the parameters that were stepped has been skipped."""
    return [record[:, SKIPPED].clone() for record in _stepped(optimizer)]


def _stepped(optimizer: Any) -> Iterator[Tensor]:
    """The records of parameters that were stepped."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            record = optimizer._records.get(param)
            stepped = param.grad is not None or optimizer._release is not None
            if record is None or not stepped or capturing(record.device):
                continue
            if local(param).numel():
                yield record

"""The seeds of stochastic rounding: a group's seed, and how often the group has rounded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


class Clocks(dict[torch.device, Tensor]):
    """For each device int64 [groups]: the seed in the upper 32 bits, the count in the lower.

    They are on the device, so that the replay of a CUDA graph rounds anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seeds: list[int] = []

    def wind(self, groups: Sequence[dict[str, Any]], devices: Collection[torch.device]) -> None:
        """Make the clocks that devices lack; all of them anew where a seed or a group changed."""
        seeds = [group["seed"] for group in groups]
        if seeds != self._seeds:
            self.note(groups)
            self.clear()
            self._seeds = seeds
        for device in set(devices) - set(self):
            values = [(group["seed"] << 32) + group["rounding_steps"] for group in groups]
            self[device] = torch.tensor(values, dtype=torch.int64, device=device)

    def note(self, groups: Sequence[dict[str, Any]]) -> None:
        """Read how often each group has rounded: a CUDA graph's replays count on the device."""
        rounding = [group["master_weights"] == "stochastic" for group in groups]
        if not any(rounding):
            # nothing to wait for
            return
        clocks = [clock.tolist() for clock in self.values()]
        for index, group in enumerate(groups):
            counts = [clock[index] & 0xFFFFFFFF for clock in clocks if index < len(clock)]
            if rounding[index] and counts:
                group["rounding_steps"] = max(counts)

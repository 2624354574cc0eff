"""What a launch did: warps' requests, sectors and bank conflicts by instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from support.ptx.arithmetic import s64
from support.ptx.memory import WARP, Site

SECTOR = 32
BANKS = 32


@dataclass
class Touched:
    """Of one instruction.

    Attributes:
        site: the instruction.
        requests: of warps.
        threads: that took part.
        units: sectors of global memory, or wavefronts of shared memory.
        least: units that would do.
    """

    site: Site
    requests: int = 0
    threads: int = 0
    units: int = 0
    least: int = 0


class Profile:
    """Notes what each instruction touches; see `execute.launch`."""

    def __init__(self) -> None:
        self.touched: dict[int, Touched] = {}
        # sectors that were loaded, and that were stored
        self.sectors: tuple[set[int], set[int]] = (set(), set())

    def note(self, site: Site, addresses: Any, mask: Any, n: int) -> None:
        of_site = self.touched.setdefault(site.number, Touched(site))
        every = np.broadcast_to(addresses, (n,)).astype(s64).reshape(-1, WARP)
        taking = np.broadcast_to(True if mask is None else mask, (n,)).reshape(-1, WARP)
        of_site.threads += int(taking.sum())
        for at, here in zip(every, taking):
            if not here.any():
                continue
            of_site.requests += 1
            if site.space == "shared":
                self._wavefronts(of_site, at, here)
            else:
                sectors = np.unique(at[here] // SECTOR)
                of_site.units += len(sectors)
                self.sectors[site.stores].update(sectors.tolist())
                of_site.least += -(-len(np.unique(at[here])) * site.size // SECTOR)

    @staticmethod
    def _wavefronts(touched: Touched, at: Any, here: Any) -> None:
        """A warp is served in as many groups of threads as each thread has words."""
        each = max(1, touched.site.size // 4)
        for group in np.split(np.arange(WARP), each):
            words = at[group][here[group]]
            if len(words):
                used = np.unique((words[:, None] // 4 + np.arange(each)).ravel())
                touched.units += int(np.bincount(used % BANKS).max())
                touched.least += 1

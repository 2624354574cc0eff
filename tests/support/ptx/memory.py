"""Global memory, which is that of CPU tensors, shared memory, and what touches either."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.ptx import races
from support.ptx.arithmetic import DTYPES, PtxError, s64, u8, u64

WARP = 32
# what a program finds in shared memory is anything
LEFT = 0xA5


@dataclass
class Site:
    """An instruction that touches memory.

    Attributes:
        number: in the list of all.
        text: the instruction.
        line: of the Triton source.
        space: "global" or "shared".
        size: bytes of one thread.
        stores: whether it changes anything.
        region: which allocation it touched last, in this launch.
    """

    number: int
    text: str
    line: str
    space: str
    size: int
    stores: bool
    region: int | None = None


class Memory:
    """Allocations of the host; everything else is out of bounds."""

    def __init__(self) -> None:
        self._allocations: dict[int, tuple[int, str, int]] = {}
        self.shadow: races.Shadow | None = None
        # `races.Shadow.unguarded` of a run before: what those threads load is made something else
        self.poisoned: dict[tuple[int, int], tuple[int, Any]] = {}

    def add(self, address: int, size: int, name: str = "", granule: int = 1) -> None:
        """One more, whose entries have at least `granule` bytes."""
        if size:
            old = self._allocations.get(address, (0, name, granule))
            self._allocations[address] = (max(size, old[0]), old[1], min(granule, old[2]))

    def build(self, programs: int, watched: bool) -> None:
        """Ready for a launch.

        Args:
            programs: of the grid.
            watched: whether to look for races.
        """
        items: list[tuple[int, int, str, int]] = []
        for at, (size, name, granule) in sorted(self._allocations.items()):
            start, whole, other, least = items[-1] if items else (0, 0, "", 0)
            if at >= start + whole:
                items.append((at, size, name, granule))
            elif at + size <= start + whole:
                # a part of a flat buffer
                items[-1] = (start, whole, other, min(least, granule))
            else:
                raise PtxError(f"{other} at {start:#x} and {name} at {at:#x} overlap")
        self.starts = np.array([at for at, *_ in items], u64)
        self.ends = np.array([at + size for at, size, *_ in items], u64)
        self.names = [name for _, _, name, _ in items]
        self.granules = np.array([granule for *_, granule in items], s64)
        sizes = -(-(self.ends - self.starts).astype(s64) // self.granules)
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        self.low = int(self.starts[0]) & ~4095
        size = ((int(self.ends[-1]) - self.low) | 4095) + 1
        raw = np.frombuffer((ctypes.c_uint8 * size).from_address(self.low), dtype=u8)
        self.views = {dtype: raw.view(dtype) for dtype in set(DTYPES.values())}
        self.shadow = races.Shadow(int(self.first[-1]), programs) if watched else None

    def view(self, dtype: Any) -> Any:
        """All from `low` on, as values of some dtype."""
        return self.views[dtype]

    def copy(self) -> list[Any]:
        """The bytes of each allocation."""
        raw, low = self.views[u8], u64(self.low)
        return [raw[start - low : end - low].copy() for start, end in zip(self.starts, self.ends)]

    def restore(self, copies: list[Any]) -> None:
        for start, copy in zip(self.starts.tolist(), copies):
            self.views[u8][start - self.low : start - self.low + len(copy)] = copy

    def check(self, addresses: Any, site: Site) -> None:
        """Raise unless an array of addresses is aligned and inside an allocation each."""
        size = u64(site.size)
        if (addresses & (size - u64(1))).any():
            self._refuse(addresses, site, "misaligned")
        if site.region is not None:
            start, end = self.starts[site.region], self.ends[site.region]
            if end - start >= size and not ((addresses - start) > end - start - size).any():
                return
        region = self.starts.searchsorted(addresses, "right") - 1
        outside = (region < 0) | (addresses + size > self.ends[np.maximum(region, 0)])
        if outside.any():
            self._refuse(addresses[outside], site, "out of bounds")
        site.region = int(region[0]) if (region == region[0]).all() else None

    def _refuse(self, addresses: Any, site: Site, what: str) -> None:
        address = int(addresses.min())
        region = int(self.starts.searchsorted(u64(address), "right")) - 1
        near = "before all allocations"
        if region >= 0:
            start, end = int(self.starts[region]), int(self.ends[region])
            near = f"{self.names[region]} + {address - start} of {end - start}"
        raise PtxError(
            f"{what}: {site.size} bytes at {address:#x} ({near}) in {site.text} [{site.line}]"
        )

    def places(self, addresses: Any, site: Site) -> Any:
        """Locations of the shadow, [addresses, of each]."""
        region: Any = site.region
        if region is None:
            region = self.starts.searchsorted(addresses, "right") - 1
        granule = self.granules[region]
        place = (addresses - self.starts[region]).astype(s64) // granule + self.first[region]
        each = np.maximum(site.size // granule, 1)
        if not each.ndim:
            return place[:, None] + np.arange(each)
        return place[:, None] + np.minimum(np.arange(each.max()), each[:, None] - 1)


class Shared:
    """Shared memory of one program, used as `Memory` is."""

    low = 0
    # what threads load without a barrier is a race at once
    poisoned: Any = None

    def __init__(self, size: int, programs: int, watched: bool) -> None:
        self._bytes = np.full((size + 15) // 16 * 16 or 16, LEFT, u8)
        self.shadow = races.Shadow(len(self._bytes), programs) if watched else None

    def view(self, dtype: Any) -> Any:
        return self._bytes.view(dtype)

    def check(self, addresses: Any, site: Site) -> None:
        size = self._bytes.size
        if (addresses % site.size).any() or (addresses > size - site.size).any():
            raise PtxError(
                f"shared memory of {size} bytes, {site.size} at {addresses.min()} to "
                f"{addresses.max()}: {site.text} [{site.line}]"
            )

    def places(self, addresses: Any, site: Site) -> Any:
        return addresses.astype(s64)[:, None] + np.arange(site.size)

"""Loads, stores, atomics and shuffles of a program's threads, as its blocks call them."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.ptx import races
from support.ptx.arithmetic import UNSIGNED, WIDTHS, PtxError, s64, u32, u64
from support.ptx.memory import WARP, Site


class Access:
    """Who touches what: the threads of a mask, and the address of each.

    Where the address is that of all threads, there is one of each, and the threads are `SEVERAL`
    unless the mask leaves one.
    """

    def __init__(self, state: Any, site: Site, addresses: Any, mask: Any) -> None:
        if state.profile is not None:
            state.profile.note(site, addresses, mask, state.n)
        self.state, self.site, self.space = state, site, state.spaces[site.space]
        self.uniform = addresses.ndim == 0
        if mask is not None and mask.all():
            mask = None
        self.mask = mask
        self.nobody = mask is not None and not mask.any()
        if self.nobody:
            return
        if self.uniform:
            self.addresses = addresses[None]
            one = mask is not None and int(mask.sum()) == 1
            self.threads: Any = int(np.flatnonzero(mask)[0]) if one else races.SEVERAL
        else:
            self.addresses = addresses if mask is None else addresses[mask]
            self.threads = state.lanes if mask is None else state.lanes[mask]
        self.space.check(self.addresses, site)

    def places(self) -> tuple[Any, Any]:
        """Locations of the shadow in one dimension, and the threads of each."""
        places = self.space.places(self.addresses, self.site)
        if self.uniform or places.shape[1] == 1:
            return places.ravel(), self.threads
        return places.ravel(), np.repeat(self.threads, places.shape[1])

    def first(self, dtype: Any) -> Any:
        """Where each thread's first value is in the space."""
        return ((self.addresses - u64(self.space.low)) // u64(WIDTHS[dtype])).astype(s64)

    def report(self, found: Any) -> None:
        """Raise for a race; in shared memory whatever another thread loads counts."""
        shadow = self.space.shadow
        if found is None and shadow is not None and self.site.space == "shared":
            found = next((race for _, (race, _) in shadow.unguarded.values()), None)
        self.state.report(found, self.site)

    def spread(self, values: Any, dtype: Any) -> Any:
        """Loaded values as a register: a scalar, or one for each thread."""
        if self.uniform:
            return values[0]
        if self.mask is None:
            return values
        spread = np.zeros(self.state.n, dtype)
        spread[self.mask] = values
        return spread

    def values(self, value: Any) -> Any:
        """What is stored at each address."""
        if not value.ndim:
            return value
        value = value if self.mask is None else value[self.mask]
        if not self.uniform:
            return value
        self.refuse_different(value != value[0])
        return value[:1]

    def refuse_different(self, different: Any) -> None:
        if different.any():
            site = self.site
            raise PtxError(
                f"threads store different values to one address: {site.text} [{site.line}]"
            )


def load(state: Any, site: Site, addresses: Any, dtype: Any, count: int, mask: Any) -> Any:
    """`count` values for each thread that the mask leaves; zeros for the others."""
    access = Access(state, site, addresses, mask)
    if access.nobody:
        return (np.zeros(() if access.uniform else state.n, dtype)[()],) * count
    space = access.space
    if space.shadow is not None:
        access.report(space.shadow.load(state.clock, *access.places(), site.number))
    view, first = space.view(dtype), access.first(dtype)
    loaded = [view[first + i] for i in range(count)]
    if space.poisoned:
        access, loaded = _poison(access, loaded)
    return tuple(access.spread(values, dtype) for values in loaded)


def _poison(access: Access, loaded: list[Any]) -> tuple[Access, list[Any]]:
    """Other values for threads that load what another stores: 0 for all but 0, and the reverse."""
    state, site, space = access.state, access.site, access.space
    places = space.places(access.addresses, site)
    owners = [space.poisoned.get((state.clock.program, int(at))) for at in places[:, 0]]
    if not any(owners):
        return access, loaded
    if access.uniform:
        # now each thread has a value of its own
        mask = None if access.mask is None else np.broadcast_to(access.mask, (state.n,))
        access = Access(state, site, np.broadcast_to(access.addresses, (state.n,)), mask)
        owners *= len(access.threads)
        loaded = [np.repeat(values, len(access.threads)) for values in loaded]
    others = [
        owner is not None and owner[0] != thread
        for owner, thread in zip(owners, access.threads.tolist())
    ]
    for values in loaded:
        bits = values.view(UNSIGNED[values.itemsize])
        bits[others] = np.where(bits[others] == 0, ~bits[others], 0)
    return access, loaded


def store(state: Any, site: Site, addresses: Any, dtype: Any, values: Any, mask: Any) -> None:
    access = Access(state, site, addresses, mask)
    if access.nobody:
        return
    space, found = access.space, None
    view, first = space.view(dtype), access.first(dtype)
    values = [access.values(value) for value in values]
    if space.shadow is not None:
        places, threads = access.places()
        changed = np.any([view[first + i] != value for i, value in enumerate(values)], axis=0)
        changed = np.repeat(changed, len(places) // len(first))
        found = space.shadow.store(state.clock, places, threads, site.number, changed)
    for i, value in enumerate(values):
        view[first + i] = value
    for i, value in enumerate(values):
        access.refuse_different(view[first + i] != value)
    access.report(found)


def _whole_warps(state: Any, mask: Any, text: str) -> None:
    """Refuse a warp of which some threads are missing."""
    if mask is None:
        return
    warps = np.broadcast_to(mask, (state.n,)).reshape(-1, WARP)
    if (warps.any(1) != warps.all(1)).any():
        raise PtxError(f"threads of a warp missing: {text}")


def _matrix_addresses(state: Any, addresses: Any, count: int, mask: Any, text: str) -> list[Any]:
    """Where each thread's word of each 8 x 8 matrix of 16 bits is; rows are 16 bytes.

    The first 8 threads of a warp have the rows of the first matrix, and so on.
    """
    _whole_warps(state, mask, text)
    rows = np.broadcast_to(addresses, (state.n,)).reshape(-1, WARP)[:, : 8 * count]
    if (rows % u32(16)).any():
        raise PtxError(f"rows of a matrix are not aligned: {text}")
    lane = np.arange(WARP)
    rows = rows.reshape(-1, count, 8)
    return [(rows[:, j, lane // 4] + (lane % 4 * 4).astype(u32)).reshape(-1) for j in range(count)]


def load_matrix(state: Any, site: Site, addresses: Any, count: int, mask: Any) -> Any:
    each = _matrix_addresses(state, addresses, count, mask, site.text)
    return tuple(load(state, site, at, u32, 1, mask)[0] for at in each)


def store_matrix(state: Any, site: Site, addresses: Any, values: Any, mask: Any) -> None:
    each = _matrix_addresses(state, addresses, len(values), mask, site.text)
    for at, value in zip(each, values):
        store(state, site, at, u32, (value,), mask)


def atomic(
    state: Any, site: Site, addresses: Any, dtype: Any, operation: str, value: Any, mask: Any,
    order: tuple[bool, bool],
) -> Any:  # fmt: skip
    """One thread after the other; `load` is an atomic that changes nothing.

    Args:
        state: of the program.
        site: of the instruction.
        addresses: of the threads.
        dtype: of the values.
        operation: add, exch or load.
        value: of the threads.
        mask: which of them take part.
        order: whether it acquires, and whether it releases.
    """
    found = np.zeros(state.n, dtype)
    access = Access(state, site, np.broadcast_to(addresses, (state.n,)), mask)
    if access.nobody:
        return found
    memory, values = access.space, np.broadcast_to(value, (state.n,))
    view = memory.view(dtype)
    places = memory.places(access.addresses, site)[:, 0]
    for thread, at, place in zip(
        access.threads.tolist(), access.first(dtype).tolist(), places.tolist()
    ):
        if memory.shadow is not None:
            access.report(
                memory.shadow.atomic(state.clock, place, thread, operation != "load", *order)
            )
        found[thread] = view[at]
        if operation == "add":
            view[at] += values[thread]
        elif operation == "exch":
            view[at] = values[thread]
        elif operation != "load":
            raise PtxError(f"atomic {operation}: {site.text}")
    return found


def shuffle(state: Any, value: Any, lane_mask: int, mask: Any, text: str) -> Any:
    """`shfl.sync.bfly` of whole warps."""
    _whole_warps(state, mask, text)
    if value.ndim == 0:
        return value
    return value.reshape(-1, WARP)[:, np.arange(WARP) ^ lane_mask].reshape(-1)

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

    def __init__(self, state: Any, addresses: Any, mask: Any) -> None:
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

    def threads_by_place(self, places: Any) -> tuple[Any, Any]:
        """Locations in one dimension, and the threads of each."""
        if self.uniform or places.shape[1] == 1:
            return places.ravel(), self.threads
        return places.ravel(), np.repeat(self.threads, places.shape[1])

    def values(self, site: Site, value: Any) -> Any:
        """What is stored at each address."""
        if not value.ndim:
            return value
        value = value if self.mask is None else value[self.mask]
        if not self.uniform:
            return value
        if (value != value[0]).any():
            refuse_different(site)
        return value[:1]


def refuse_different(site: Site) -> None:
    raise PtxError(f"threads store different values to one address: {site.text} [{site.line}]")


def _spread(access: Access, values: Any, dtype: Any, n: int) -> Any:
    """Loaded values as a register: a scalar, or one for each thread."""
    if access.uniform:
        return values[0]
    if access.mask is None:
        return values
    spread = np.zeros(n, dtype)
    spread[access.mask] = values
    return spread


def load_global(state: Any, site: Site, addresses: Any, dtype: Any, count: int, mask: Any) -> Any:
    """`count` values for each thread that the mask leaves; zeros for the others."""
    memory = state.memory
    if state.profile is not None:
        state.profile.note(site, addresses, mask, state.n)
    access = Access(state, addresses, mask)
    if access.nobody:
        return (np.zeros(() if access.uniform else state.n, dtype)[()],) * count
    memory.check(access.addresses, site)
    if memory.shadow is not None:
        where, threads = access.threads_by_place(memory.places(access.addresses, site))
        state.report(memory.shadow.load(state.clock, where, threads, site.number), site)
    view = memory.views[dtype]
    first = ((access.addresses - u64(memory.low)) // u64(WIDTHS[dtype])).astype(s64)
    loaded = [view[first + i] for i in range(count)]
    if memory.poisoned:
        access, loaded = _poison(state, site, access, loaded)
    return tuple(_spread(access, values, dtype, state.n) for values in loaded)


def _poison(state: Any, site: Site, access: Access, loaded: list[Any]) -> tuple[Access, list[Any]]:
    """Other values for threads that load what another stores: 0 for all but 0, and the reverse."""
    memory, program = state.memory, state.clock.program
    places = memory.places(access.addresses, site)
    owners = [memory.poisoned.get((program, int(at))) for at in places[:, 0]]
    if not any(owners):
        return access, loaded
    if access.uniform:
        # now each thread has a value of its own
        addresses = np.broadcast_to(access.addresses, (state.n,))
        owners, loaded = owners * state.n, [np.repeat(values, state.n) for values in loaded]
        mask = None if access.mask is None else np.broadcast_to(access.mask, (state.n,))
        access = Access(state, addresses, mask)
        if access.mask is not None:
            loaded = [values[access.mask] for values in loaded]
            owners = [owner for owner, here in zip(owners, access.mask) if here]
    others = [
        owner is not None and owner[0] != thread
        for owner, thread in zip(owners, access.threads.tolist())
    ]
    for values in loaded:
        bits = values.view(UNSIGNED[values.itemsize])
        bits[others] = np.where(bits[others] == 0, ~bits[others], 0)
    return access, loaded


def store_global(
    state: Any, site: Site, addresses: Any, dtype: Any, values: Any, mask: Any
) -> None:
    memory = state.memory
    if state.profile is not None:
        state.profile.note(site, addresses, mask, state.n)
    access = Access(state, addresses, mask)
    if access.nobody:
        return
    memory.check(access.addresses, site)
    first = ((access.addresses - u64(memory.low)) // u64(WIDTHS[dtype])).astype(s64)
    where = None
    if memory.shadow is not None:
        where = access.threads_by_place(memory.places(access.addresses, site))
    found = _store(state, memory.shadow, site, memory.views[dtype], first, access, values, where)
    state.report(found, site)


def _store(
    state: Any, shadow: Any, site: Site, view: Any, first: Any, access: Access, values: Any,
    where: Any,
) -> Any:  # fmt: skip
    """Store, and note it in the shadow: what it races with."""
    values = [access.values(site, value) for value in values]
    found = None
    if shadow is not None:
        places, threads = where
        changed = np.any([view[first + i] != value for i, value in enumerate(values)], axis=0)
        changed = np.repeat(changed, len(places) // len(first))
        found = shadow.store(state.clock, places, threads, site.number, changed)
    for i, value in enumerate(values):
        view[first + i] = value
    for i, value in enumerate(values):
        if (view[first + i] != value).any():
            refuse_different(site)
    return found


def _shared(state: Any, site: Site, access: Access, width: int) -> tuple[Any, Any]:
    """Indices of values in shared memory, and locations in its shadow with their threads."""
    at = access.addresses.astype(s64)
    if (at % site.size).any() or (at < 0).any() or (at + site.size > state.shared.size).any():
        raise PtxError(
            f"shared memory of {state.shared.size} bytes, {site.size} at {at.min()} to {at.max()}: "
            f"{site.text} [{site.line}]"
        )
    granule = state.shared_granule
    places = at[:, None] // granule + np.arange(max(1, site.size // granule))
    return at // width, access.threads_by_place(places)


def load_shared(state: Any, site: Site, addresses: Any, dtype: Any, count: int, mask: Any) -> Any:
    if state.profile is not None:
        state.profile.note(site, addresses, mask, state.n)
    access = Access(state, addresses, mask)
    if access.nobody:
        return (np.zeros(() if access.uniform else state.n, dtype)[()],) * count
    first, (places, threads) = _shared(state, site, access, WIDTHS[dtype])
    if state.shared_shadow is not None:
        found = state.shared_shadow.load(state.clock, places, threads, site.number)
        state.report(found or unguarded(state), site)
    view = state.shared.view(dtype)
    return tuple(_spread(access, view[first + i], dtype, state.n) for i in range(count))


def store_shared(
    state: Any, site: Site, addresses: Any, dtype: Any, values: Any, mask: Any
) -> None:
    if state.profile is not None:
        state.profile.note(site, addresses, mask, state.n)
    access = Access(state, addresses, mask)
    if access.nobody:
        return
    first, where = _shared(state, site, access, WIDTHS[dtype])
    view = state.shared.view(dtype)
    found = _store(state, state.shared_shadow, site, view, first, access, values, where)
    state.report(found or unguarded(state), site)


def unguarded(state: Any) -> Any:
    """A race in shared memory, where whatever is loaded counts."""
    shadow = state.shared_shadow
    return next((race for _, (race, _) in shadow.unguarded.values()), None) if shadow else None


def matrix_addresses(state: Any, addresses: Any, count: int, mask: Any, text: str) -> list[Any]:
    """Where each thread's word of each 8 x 8 matrix of 16 bits is; rows are 16 bytes.

    The first 8 threads of a warp have the rows of the first matrix, and so on.
    """
    warps = np.ones(state.n, bool) if mask is None else np.broadcast_to(mask, (state.n,))
    warps = warps.reshape(-1, WARP)
    if (warps.any(1) != warps.all(1)).any():
        raise PtxError(f"threads of a warp missing: {text}")
    rows = np.broadcast_to(addresses, (state.n,)).reshape(-1, WARP)[:, : 8 * count]
    if (rows % u32(16)).any():
        raise PtxError(f"rows of a matrix are not aligned: {text}")
    lane = np.arange(WARP)
    rows = rows.reshape(-1, count, 8)
    return [(rows[:, j, lane // 4] + (lane % 4 * 4).astype(u32)).reshape(-1) for j in range(count)]


def load_matrix(state: Any, site: Site, addresses: Any, count: int, mask: Any) -> Any:
    each = matrix_addresses(state, addresses, count, mask, site.text)
    return tuple(load_shared(state, site, at, u32, 1, mask)[0] for at in each)


def store_matrix(state: Any, site: Site, addresses: Any, values: Any, mask: Any) -> None:
    each = matrix_addresses(state, addresses, len(values), mask, site.text)
    for at, value in zip(each, values):
        store_shared(state, site, at, u32, (value,), mask)


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
    memory = state.memory
    if state.profile is not None:
        state.profile.note(site, addresses, mask, state.n)
    addresses = np.broadcast_to(addresses, (state.n,))
    values = np.broadcast_to(value, (state.n,))
    taking = state.lanes if mask is None else state.lanes[np.broadcast_to(mask, (state.n,))]
    found = np.zeros(state.n, dtype)
    if not len(taking):
        return found
    memory.check(addresses[taking], site)
    view = memory.views[dtype]
    for thread in taking.tolist():
        if memory.shadow is not None:
            place = int(memory.places(addresses[[thread]], site)[0, 0])
            racing = memory.shadow.atomic(state.clock, place, thread, operation != "load", *order)
            state.report(racing, site)
        at = (int(addresses[thread]) - memory.low) // WIDTHS[dtype]
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
    if mask is not None and mask.ndim:
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise PtxError(f"threads of a warp missing: {text}")
    if value.ndim == 0:
        return value
    return value.reshape(-1, WARP)[:, np.arange(WARP) ^ lane_mask].reshape(-1)

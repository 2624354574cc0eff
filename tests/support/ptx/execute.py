"""Run a grid: who goes on when.

Threads of a program that diverged go on at the first of their blocks in reverse post-order, so that
they meet again where their paths do. A barrier holds a thread until all that have not returned are
at one. Programs run one after the other, or several at a time, switched at random at every barrier,
atomic and acquire; warps of a program, too, block by block.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.ptx.arithmetic import PtxError, s64, u32
from support.ptx.memory import WARP, Memory, Shared, Site
from support.ptx.parse import Block
from support.ptx.races import Clock, describe
from support.ptx.translate import Program

# where a thread is that returned
END = 1 << 30


@dataclass(frozen=True)
class Schedule:
    """How a grid is run.

    Attributes:
        order: in which programs begin: "in", "random" or "reversed".
        resident: how many run at a time.
        warps: whether those of a program are interleaved, too.
        seed: of all choices.
        races: whether to look for them.
        most_blocks: after so many the grid hangs.
    """

    order: str = "in"
    resident: int = 1
    warps: bool = False
    seed: int = 0
    races: bool = True
    most_blocks: int = 20_000_000


class State:
    """What the functions of blocks see of a running program."""

    def __init__(self, program: Program, grid: Any, number: int, params: Any, memory: Memory):
        x, y, _ = grid
        self.program, self.params = program, params
        self.n = program.threads
        self.lanes = np.arange(self.n)
        self.grid = tuple(map(u32, grid))
        self.index = (u32(number % x), u32(number // x % y), u32(number // (x * y)))
        self.profile: Any = None
        programs = int(np.prod(grid))
        self.clock = Clock(number, programs)
        shared = Shared(program.shared, programs, memory.shadow is not None)
        self.spaces = {"global": memory, "shared": shared}

    def report(self, found: Any, site: Site) -> None:
        """Raise for a race."""
        if found is not None:
            raise PtxError(describe(found, self.clock.program, site, self.program.sites))


class Counts:
    """How often each block ran: by warps, and by threads."""

    def __init__(self, blocks: int, most: int) -> None:
        self._left = most
        self.warps = np.zeros(blocks, s64)
        self.threads = np.zeros(blocks, s64)
        self.notes: Counter[str] = Counter()
        # the blocks in the order in which they ran, of each program; None where nobody asked
        self.traces: list[list[int]] | None = None

    def note(self, block: Block, warps: int, threads: int) -> None:
        self.warps[block.index] += warps
        self.threads[block.index] += threads
        self._left -= 1
        if self._left < 0:
            raise PtxError(f"hangs: {block.body[-1].text} [{block.body[-1].line}]")


class Running:
    """One program."""

    def __init__(self, state: State, counts: Counts) -> None:
        self.state, self.counts = state, counts
        self.program = state.program
        self.blocks = self.program.kernel.blocks
        # the last is for threads that returned
        self._barriers = np.array([block.sync == "barrier" for block in self.blocks] + [False])
        self.registers = [dtype(0) for dtype in self.program.types.values()]
        # where the threads are: one block for all, or one for each
        self.at: Any = 0
        self.trace: list[int] | None = None
        if counts.traces is not None:
            self.trace = []
            counts.traces.append(self.trace)

    def run(self, stops: bool, rng: Any = None) -> bool:
        """To the end, or to the next place to switch at; whether it ended.

        Args:
            stops: whether to come back before blocks at which others may go on.
            rng: interleaves warps.
        """
        if rng is not None:
            return self._by_warps(stops, rng)
        first = True
        while True:
            block, mask = self._choose()
            if block is None:
                return True
            if stops and block.sync and not first:
                return False
            first = False
            if block.sync == "barrier":
                self.state.clock.barrier()
            self._go(block, mask)

    def _choose(self) -> tuple[Block | None, Any]:
        """The block that goes on, and which threads run it: all, if None; no block at the end."""
        if not isinstance(self.at, np.ndarray):
            return None if self.at == END else self.blocks[self.at], None
        waiting = self._waiting()
        able = (self.at < END) & ~waiting
        if not able.any():
            if not waiting.any():
                return None, None
            able = waiting
            apart = len(set(self.at[waiting].tolist())) > 1 or (self.at == END).any()
            self.counts.notes["diverged at a barrier"] += int(apart)
        lowest = self._lowest(able)
        mask = able & (self.at == lowest)
        return self.blocks[lowest], None if mask.all() else mask

    def _waiting(self) -> Any:
        return self._barriers[np.minimum(self.at, len(self.blocks))]

    def _lowest(self, able: Any) -> int:
        some = np.unique(self.at[able])
        return int(some[self.program.kernel.rank[some].argmin()])

    def _go(self, block: Block, mask: Any) -> None:
        """Run a block by the threads of a mask, or by all."""
        value = self.program.function(block, mask is not None)(self.registers, self.state, mask)
        threads = self.state.n if mask is None else int(mask.sum())
        warps = self.state.n // WARP if mask is None else int(mask.reshape(-1, WARP).any(1).sum())
        self.counts.note(block, warps, threads)
        if self.trace is not None:
            self.trace.append(block.index)
        if mask is None:
            self.at = self._after(block, value)
        else:
            self.at = self.at.copy()
            self.at[mask] = self._after(block, value[mask] if np.ndim(value) else value)

    @staticmethod
    def _after(block: Block, value: Any) -> Any:
        """Where a block's threads go by its last value: one place for all, or one for each."""
        if block.kind in ("return", "fall"):
            return END if block.kind == "return" else block.following[0]
        which = value if block.kind == "table" else value == block.negated
        if which.ndim and (which != which[0]).any():
            return np.array(block.following)[which.astype(s64)]
        return block.following[int(which.flat[0])]

    def _by_warps(self, stops: bool, rng: Any) -> bool:
        """One block of one warp at a time."""
        n = self.state.n
        if not isinstance(self.at, np.ndarray):
            self.at = np.full(n, self.at)
        warp = np.arange(n) // WARP
        while True:
            waiting = self._waiting()
            able = (self.at < END) & ~waiting
            if able.any():
                mine = able & (warp == rng.choice(np.unique(warp[able])))
                lowest = self._lowest(mine)
                self._go(self.blocks[lowest], mine & (self.at == lowest))
                if stops and self.blocks[lowest].sync:
                    return False
                continue
            if not waiting.any():
                return True
            # all have arrived
            self.state.clock.barrier()
            for which in rng.permutation(n // WARP):
                while (mine := waiting & (warp == which)).any():
                    lowest = self._lowest(mine)
                    mine &= self.at == lowest
                    waiting = waiting & ~mine
                    self._go(self.blocks[lowest], mine)
            if stops:
                return False


def launch(
    program: Program,
    grid: tuple[int, int, int],
    params: list[Any],
    memory: Memory,
    schedule: Schedule | None = None,
    *,
    profile: Any = None,
    traces: bool = False,
) -> Counts:
    """Run a grid on some memory.

    Where threads load what another of their program stores later, without a barrier between, the
    grid is run again with other values in their place: it is a race if that changes anything.

    Args:
        program: the kernel.
        grid: programs in each dimension.
        params: of the kernel, uint64 each.
        memory: what it may touch.
        schedule: who goes on when.
        profile: notes what each instruction touches; see `counting.Profile`.
        traces: whether to keep which blocks each program ran.

    Raises:
        PtxError: a fault, a race, something unknown, or a grid that hangs.
    """
    schedule = schedule or Schedule()
    memory.build(int(np.prod(grid)), schedule.races)
    before = memory.copy() if schedule.races else []
    counts = _run(program, grid, params, memory, schedule, profile, traces)
    unguarded = memory.shadow.unguarded if memory.shadow is not None else {}
    if unguarded:
        after = memory.copy()
        memory.restore(before)
        memory.build(int(np.prod(grid)), True)
        memory.poisoned = unguarded
        _run(program, grid, params, memory, schedule, None, False)
        if any((a != b).any() for a, b in zip(memory.copy(), after)):
            (mine, _), (_, (race, site)) = next(iter(unguarded.items()))
            raise PtxError(describe(race, mine, program.sites[site], program.sites))
    return counts


def _run(
    program: Program, grid: tuple[int, int, int], params: list[Any], memory: Memory,
    schedule: Schedule, profile: Any, traces: bool,
) -> Counts:  # fmt: skip
    rng = np.random.default_rng(schedule.seed)
    counts = Counts(len(program.kernel.blocks), schedule.most_blocks)
    counts.traces = [] if traces else None
    for site in program.sites:
        site.region = None
    programs = int(np.prod(grid))
    order = np.arange(programs)
    if schedule.order == "random":
        order = rng.permutation(programs)
    elif schedule.order == "reversed":
        order = order[::-1]
    todo, running = order.tolist()[::-1], []
    by_warps = rng if schedule.warps else None
    with np.errstate(all="ignore"):
        while todo or running:
            while todo and len(running) < schedule.resident:
                state = State(program, grid, todo.pop(), params, memory)
                state.profile = profile
                running.append(Running(state, counts))
            k = int(rng.integers(len(running)))
            if running[k].run(True, by_warps):
                running.pop(k)
    return counts

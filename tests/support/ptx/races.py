"""Which accesses nothing orders: vector clocks of programs, and who touched what last.

A program's time goes on at each of its barriers and releases. Of an access it is kept which program
and thread made it, and when. Ordered before a thread's access are

* all of its own, and its program's up to the last barrier;
* another program's that an acquire has brought: what that program's threads did before their last
  barrier, and what the thread that released did itself, thread 0 in all that Triton makes. Thread 0
  knows it at once, the others after the next barrier.

Atomics are no race among each other. A store over what was read or changed by atomics need only
follow them by control: an atomic, relaxed too, is performed before a store that a branch on its
result decides on. That is hardware's rule, not PTX's, and the reset of counters rests on it. Loads
have no such rule: they may be early.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from support.ptx.arithmetic import PtxError

# in the place of a thread: several did
SEVERAL = -1


class Clock:
    """What a program knows of the others' time; see above.

    Attributes:
        now: its own time.
        fence: the time of its last barrier.
        known: of each program, the time up to which all its threads' accesses are ordered.
        lead: of each program, the time up to which those of its thread 0 are.
        follows: of each program, the time up to which its atomics precede by control.
    """

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.now, self.fence = program, 1, 0
        # the last one is nobody, whom nothing orders
        self.known = np.zeros(programs + 1, np.int32)
        self.known[-1] = -1
        self.lead = self.known.copy()
        self.follows = self.known.copy()
        # what thread 0 has acquired since the last barrier
        self.acquired: tuple[Any, Any] | None = None

    def barrier(self) -> None:
        """Every thread waited for all."""
        self.fence, self.now = self.now, self.now + 1
        if self.acquired is not None:
            self.known, self.lead = self.acquired
            self.acquired = None
        self.known[self.program] = self.fence

    def of_thread_0(self) -> tuple[Any, Any]:
        return self.acquired or (self.known, self.lead)

    def acquire(self, known: Any, lead: Any) -> None:
        mine = self.of_thread_0()
        self.acquired = (np.maximum(mine[0], known), np.maximum(mine[1], lead))
        self.acquired[0][self.program] = self.fence

    def release(self) -> tuple[Any, Any]:
        known, lead = (times.copy() for times in self.of_thread_0())
        known[self.program], lead[self.program] = self.fence, self.now
        self.now += 1
        return known, lead


class Shadow:
    """Who touched each location of a space last, in one launch.

    Args:
        locations: of the space.
        programs: of the grid.
    """

    def __init__(self, locations: int, programs: int) -> None:
        self.programs = programs

        def times() -> dict[str, Any]:
            names = ("program", "time", "thread", "site")
            return {name: np.zeros(locations, np.int32) for name in names}

        self.stored, self.loaded = times(), times()
        # where several programs loaded without an order: (time, site) by program
        self.readers: dict[int, dict[int, tuple[int, int]]] = {}
        # the times of atomics by program, and what releases left there
        self.atomics: dict[int, dict[int, int]] = {}
        self.released: dict[int, tuple[Any, Any]] = {}
        self.followed: dict[int, Any] = {}
        self.has_atomics = np.zeros(locations, bool)
        # by program and location: the thread that stored what others of its program load, without a
        # barrier between; the race that it is if what they load matters
        self.unguarded: dict[tuple[int, int], tuple[int, Any]] = {}

    def _unordered(self, clock: Clock, record: dict[str, Any], at: Any, threads: Any) -> Any:
        """Whether what is recorded at some locations races with what these threads do now."""
        program, time = record["program"][at], record["time"][at]
        ordered = time <= clock.known[program]
        if ordered.all():
            return None
        thread = record["thread"][at]
        ordered |= (program == clock.program) & (thread == threads) & (thread != SEVERAL)
        ordered |= (thread == 0) & (time <= clock.lead[program])
        if clock.acquired is not None:
            known, lead = clock.acquired
            brought = (time <= known[program]) | ((thread == 0) & (time <= lead[program]))
            ordered |= (np.asarray(threads) == 0) & brought
        return None if ordered.all() else ~ordered

    def load(self, clock: Clock, at: Any, threads: Any, site: int) -> Any:
        """Note loads; what they race with, if anything: see `describe`.

        Args:
            clock: of the program.
            at: locations.
            threads: of each, or one for all.
            site: of the instruction.
        """
        racing = self._unordered(clock, self.stored, at, threads)
        if racing is not None:
            foreign = racing & (self.stored["program"][at] != clock.program)
            if foreign.any():
                return self._first(self.stored, at, foreign)
            self._note_unguarded(self.stored, clock, at, racing, self.stored["thread"][at], site)
        record = self.loaded
        before = self._unordered(clock, record, at, threads)
        if before is None:
            program, thread = clock.program, threads
        else:
            # of other threads of this program, or of other programs
            program, thread = np.full(at.shape, clock.program), np.broadcast_to(threads, at.shape)
            thread = np.where(before, SEVERAL, thread)
            foreign = before & (record["program"][at] != clock.program)
            for k in np.flatnonzero(foreign):
                place = int(at[k])
                several = self.readers.setdefault(place, {})
                if record["program"][place] < self.programs:
                    last = int(record["time"][place]), int(record["site"][place])
                    several[int(record["program"][place])] = last
                several[clock.program] = clock.now, site
            program[foreign] = self.programs
        record["program"][at], record["time"][at] = program, clock.now
        record["thread"][at], record["site"][at] = thread, site
        twice = record["thread"][at] != thread
        if twice.any():
            record["thread"][at[twice]] = SEVERAL
        if self.has_atomics[at].any():
            return self._against_atomics(clock, at, by_control=False)
        return None

    def store(self, clock: Clock, at: Any, threads: Any, site: int, changed: Any) -> Any:
        """Note stores; likewise. Loads of its own program go to `unguarded`.

        Args:
            clock: of the program.
            at: locations.
            threads: of each, or one for all.
            site: of the instruction.
            changed: where the value is not the one that is there: threads of a program may all
                store the same.
        """
        racing = self._unordered(clock, self.stored, at, threads)
        if racing is not None:
            racing &= changed | (self.stored["program"][at] != clock.program)
            if racing.any():
                return self._first(self.stored, at, racing)
        racing = self._unordered(clock, self.loaded, at, threads)
        if racing is not None:
            for k in np.flatnonzero(racing & (self.loaded["program"][at] == self.programs)):
                several = self.readers[int(at[k])]
                late = [
                    (program, SEVERAL, where)
                    for program, (time, where) in several.items()
                    if time > clock.known[program]
                ]
                if late:
                    return (int(at[k]), *late[0])
                racing[k] = False
            foreign = racing & (self.loaded["program"][at] != clock.program)
            if foreign.any():
                return self._first(self.loaded, at, foreign)
            self._note_unguarded(self.loaded, clock, at, racing, threads, site)
        record = self.stored
        record["program"][at], record["time"][at] = clock.program, clock.now
        record["thread"][at], record["site"][at] = threads, site
        if self.has_atomics[at].any():
            return self._against_atomics(clock, at, by_control=True)
        return None

    def atomic(
        self, clock: Clock, at: int, thread: int, changes: bool, acquires: bool, releases: bool
    ) -> Any:
        """Note an atomic of one thread: what plain access it races with, and what it brings."""
        if thread and (acquires or releases):
            raise PtxError("an acquire or release of a thread other than 0")
        place = np.array([at])
        for record in (self.stored, self.loaded) if changes else (self.stored,):
            racing = self._unordered(clock, record, place, thread)
            if racing is not None:
                return self._first(record, place, racing)
        self.has_atomics[at] = True
        self.atomics.setdefault(at, {})[clock.program] = clock.now
        follows = np.maximum(clock.follows, self.followed.get(at, clock.follows))
        clock.follows = follows
        if acquires and at in self.released:
            clock.acquire(*self.released[at])
        if changes:
            self.followed[at] = follows.copy()
            self.followed[at][clock.program] = clock.now
            if releases:
                # what others released stays with the chain of atomics that change the location
                before = self.released.get(at)
                after = clock.release()
                self.released[at] = (
                    after if before is None else tuple(map(np.maximum, before, after))
                )
        return None

    def _note_unguarded(
        self, record: dict[str, Any], clock: Clock, at: Any, racing: Any, threads: Any, site: int
    ) -> None:
        storing = np.broadcast_to(threads, at.shape)
        for k in np.flatnonzero(racing):
            race = self._first(record, at[k : k + 1], racing[k : k + 1])
            self.unguarded[clock.program, int(at[k])] = int(storing[k]), (race, site)

    def _against_atomics(self, clock: Clock, at: Any, by_control: bool) -> Any:
        known = np.maximum(clock.known, clock.lead)
        known = np.maximum(known, clock.follows) if by_control else known
        for place in at[self.has_atomics[at]].tolist():
            for program, time in self.atomics[place].items():
                mine = program == clock.program and time <= clock.now
                if not mine and time > known[program]:
                    return place, program, 0, -1
        return None

    @staticmethod
    def _first(record: dict[str, Any], at: Any, racing: Any) -> tuple[int, int, int, int]:
        k = int(np.flatnonzero(racing)[0])
        place = int(at[k])
        return (place, *(int(record[name][place]) for name in ("program", "thread", "site")))


def describe(found: tuple[int, int, int, int], mine: int, site: Any, sites: list[Any]) -> str:
    """A race in words."""
    _, program, thread, other = found
    before = f"{sites[other].text} [{sites[other].line}]" if other >= 0 else "an atomic"
    who = "several threads" if thread == SEVERAL else f"thread {thread}"
    where = "this program" if program == mine else f"program {program}"
    order = "no barrier" if program == mine else "no release and acquire"
    return (
        f"race, {order} between: {site.text} [{site.line}] of program {mine} and, before, "
        f"{before} of {where}, {who}"
    )

"""Races of threads and of programs are found in every order they run in; nothing else is."""

from __future__ import annotations

import numpy as np
import pytest

from support.ptx.arithmetic import PtxError, u8, u32
from support.ptx.execute import Schedule
from support.ptx.handmade import run

ORDERS = [
    Schedule(),
    Schedule("reversed"),
    Schedule("random", 3, seed=1),
    Schedule("random", 3, warps=True, seed=2),
]
everywhere = pytest.mark.parametrize("schedule", ORDERS, ids=str)
FIRST_THREAD = "setp.eq.u32 %p1, %r90, 0;\nsetp.eq.u32 %p2, %r91, 0;\n"

# thread k stores for thread k + 1 of 64
NEIGHBOUR = """
shl.b32 %r1, %r90, 2;
st.shared.b32 [ %r1 + 0 ], %r90;
BARRIER
add.s32 %r2, %r1, 4;
and.b32 %r2, %r2, 255;
ld.shared.b32 %r3, [ %r2 + 0 ];
"""
IN_GLOBAL = """
add.s64 %rd1, %rd80, %rd90;
st.global.b32 [ %rd1 + 0 ], { %r90 };
BARRIER
xor.b32 %r2, %r90, 63;
mad.wide.u32 %rd2, %r2, 4, %rd80;
ld.global.b32 { %r3 }, [ %rd2 + 0 ];
add.s64 %rd3, %rd81, %rd90;
st.global.b32 [ %rd3 + 0 ], { %r3 };
"""


@everywhere
@pytest.mark.parametrize("body", [NEIGHBOUR, IN_GLOBAL], ids=["shared", "global"])
def test_threads_of_a_program_need_a_barrier(body: str, schedule: Schedule) -> None:
    arrays = np.zeros(64, u32), np.zeros(64, u32)
    how = {"threads": 64, "shared": 256, "schedule": schedule}
    run(body.replace("BARRIER", "bar.sync 0;"), *arrays, **how)
    with pytest.raises(PtxError, match="race, no barrier"):
        run(body.replace("BARRIER", ""), *arrays, **how)


# all load what thread 0 then stores; others store what they make of it where USED
FLAGS = (
    FIRST_THREAD
    + """
ld.global.b32 { %r1 }, [ %rd80 + 0 ];
add.s32 %r2, %r1, 1;
BARRIER
@%p1 st.global.b32 [ %rd80 + 0 ], { %r2 };
add.s64 %rd1, %rd81, %rd90;
USED st.global.b32 [ %rd1 + 0 ], { %r2 };
"""
)


@everywhere
def test_a_load_that_may_be_late_is_a_race_where_it_matters(schedule: Schedule) -> None:
    def run_it(barrier: str, used: str) -> None:
        body = FLAGS.replace("BARRIER", barrier).replace("USED", used)
        run(body, np.zeros(1, u32), np.zeros(64, u32), threads=64, schedule=schedule)

    run_it("bar.sync 0;", "")
    run_it("", "@%p1")
    with pytest.raises(PtxError, match="race, no barrier"):
        run_it("", "")


# thread 40 goes on with what it loads; then thread 0 loads and stores
ONE_BY_ONE = """
setp.eq.u32 %p1, %r90, 0;
setp.eq.u32 %p2, %r90, 40;
@%p2 ld.global.b32 { %r1 }, [ %rd80 + 0 ];
@%p2 st.global.b32 [ %rd81 + 0 ], { %r1 };
@%p1 ld.global.b32 { %r2 }, [ %rd80 + 0 ];
add.s32 %r2, %r2, 1;
BARRIER
@%p1 st.global.b32 [ %rd80 + 0 ], { %r2 };
"""
# all load one of two entries; the last to load each is who stores it
TWO_ENTRIES = """
and.b32 %r1, %r90, 1;
mad.wide.u32 %rd1, %r1, 4, %rd80;
ld.global.b32 { %r2 }, [ %rd1 + 0 ];
add.s64 %rd2, %rd81, %rd90;
st.global.b32 [ %rd2 + 0 ], { %r2 };
setp.ge.u32 %p1, %r90, 62;
BARRIER
@%p1 st.global.b32 [ %rd1 + 0 ], { %r90 };
"""


@everywhere
@pytest.mark.parametrize("body", [ONE_BY_ONE, TWO_ENTRIES], ids=["one by one", "two entries"])
def test_of_several_threads_that_load_none_is_forgotten(body: str, schedule: Schedule) -> None:
    arrays = np.zeros(2, u32), np.zeros(64, u32)
    run(body.replace("BARRIER", "bar.sync 0;"), *arrays, threads=64, schedule=schedule)
    with pytest.raises(PtxError, match="race, no barrier"):
        run(body.replace("BARRIER", ""), *arrays, threads=64, schedule=schedule)


@everywhere
def test_threads_may_store_the_same_and_no_two_values(schedule: Schedule) -> None:
    same = "mov.u32 %r1, 7;\nst.global.b32 [ %rd80 + 0 ], { %r1 };\n"
    run(same + same, np.zeros(1, u32), threads=64, schedule=schedule)
    two = "setp.lt.u32 %p1, %r90, 32;\n@%p1 st.global.b32 [ %rd80 + 0 ], { 7 };\n"
    two += "@!%p1 st.global.b32 [ %rd80 + 0 ], { 8 };"
    with pytest.raises(PtxError, match="race, no barrier"):
        run(two, np.zeros(1, u32), threads=64, schedule=schedule)


# each program stores an entry and announces it; the last to arrive adds all up
ELECTION = (
    FIRST_THREAD
    + """
mad.wide.u32 %rd1, %r91, 4, %rd81;
@STORES st.global.b32 [ %rd1 + 0 ], { 5 };
BEFORE
@%p1 atom.global.gpu.ORDER.add.u32 %r1, [ %rd80 + 0 ], 1;
@%p1 st.shared.b32 [ %r90 + 0 ], %r1;
bar.sync 0;
mov.u32 %r3, 0;
ld.shared.b32 %r2, [ %r3 + 0 ];
setp.ne.u32 %p3, %r2, 2;
@%p3 bra $END;
ld.global.b32 { %r4 }, [ %rd81 + 0 ];
ld.global.b32 { %r5 }, [ %rd81 + 4 ];
add.s32 %r4, %r4, %r5;
add.s64 %rd2, %rd82, %rd90;
st.global.b32 [ %rd2 + 0 ], { %r4 };
$END:
"""
)


def elect(order: str, schedule: Schedule, stores: str = "%p1", before: str = "") -> list[int]:
    body = ELECTION.replace("ORDER", order).replace("STORES", stores).replace("BEFORE", before)
    # a thread that is not thread 0, in the second warp
    body = body.replace("setp.eq.u32 %p2, %r91, 0;", "setp.eq.u32 %p2, %r90, 40;")
    sums = np.zeros(64, u32)
    arrays = np.zeros(1, u32), np.zeros(3, u32), sums
    run(body, *arrays, threads=64, programs=3, shared=16, schedule=schedule)
    return sums.tolist()


@everywhere
def test_programs_need_release_and_acquire(schedule: Schedule) -> None:
    assert elect("acq_rel", schedule) == [10] * 64
    for order in ("relaxed", "acquire", "release"):
        with pytest.raises(PtxError, match="race, no release and acquire"):
            elect(order, schedule)


@everywhere
def test_a_release_covers_other_threads_after_a_barrier_alone(schedule: Schedule) -> None:
    assert elect("acq_rel", schedule, stores="%p2", before="bar.sync 0;") == [10] * 64
    with pytest.raises(PtxError, match="race, no release and acquire"):
        elect("acq_rel", schedule, stores="%p2")


# program 0 writes and raises a flag; the others wait for it
FLAG = (
    FIRST_THREAD
    + """
@!%p2 bra $WAIT;
@%p1 st.global.b32 [ %rd81 + 0 ], { 5 };
@%p1 atom.global.gpu.RELEASE.exch.b32 %r1, [ %rd80 + 0 ], 1;
ret;
$WAIT:
mov.u32 %r2, 0;
@%p1 ld.global.gpu.acquire.b32 { %r2 }, [ %rd80 + 0 ];
@%p1 st.shared.b32 [ %r90 + 0 ], %r2;
bar.sync 0;
mov.u32 %r3, 0;
ld.shared.b32 %r2, [ %r3 + 0 ];
AGAIN
setp.eq.u32 %p3, %r2, 0;
@%p3 bra $WAIT;
ld.global.b32 { %r4 }, [ %rd81 + 0 ];
mad.wide.u32 %rd1, %r91, 4, %rd82;
st.global.b32 [ %rd1 + 0 ], { %r4 };
"""
)


@pytest.mark.parametrize("schedule", [o for o in ORDERS if o.order != "reversed"], ids=str)
def test_a_flag_brings_what_was_stored_before_it(schedule: Schedule) -> None:
    def wait(release: str, again: str = "bar.sync 0;") -> list[int]:
        body = FLAG.replace("RELEASE", release).replace("AGAIN", again)
        out = np.zeros(3, u32)
        arrays = np.zeros(1, u32), np.zeros(1, u32), out
        run(body, *arrays, threads=64, programs=3, shared=16, schedule=schedule)
        return out.tolist()

    assert wait("release") == [0, 5, 5]
    with pytest.raises(PtxError, match="race, no release and acquire"):
        wait("relaxed")


def test_a_thread_that_polls_again_may_overtake_the_others() -> None:
    """The flag's value in shared memory is stored anew while others load the one before."""
    body = FLAG.replace("RELEASE", "release").replace("AGAIN", "")
    arrays = np.zeros(1, u32), np.zeros(1, u32), np.zeros(3, u32)
    with pytest.raises(PtxError, match=r"race, no barrier.*st\.shared"):
        run(body, *arrays, threads=64, programs=3, shared=16, schedule=Schedule(resident=3, seed=1))


# tickets without an order; whoever draws the last one resets the counter, or reads what it counted
TICKETS = (
    FIRST_THREAD
    + """
@%p1 atom.global.gpu.relaxed.add.u32 %r1, [ %rd80 + 0 ], 1;
setp.eq.u32 %p3, %r1, 2;
and.pred %p3, %p3, %p1;
@%p3 LAST;
"""
)


@everywhere
def test_a_store_follows_atomics_by_control_and_a_load_does_not(schedule: Schedule) -> None:
    counter = np.zeros(1, u32)
    reset = TICKETS.replace("LAST", "st.global.b32 [ %rd80 + 0 ], { 0 }")
    run(reset, counter, threads=64, programs=3, schedule=schedule)
    assert counter.tolist() == [0]
    load = TICKETS.replace("LAST", "ld.global.b32 { %r4 }, [ %rd80 + 0 ]")
    with pytest.raises(PtxError, match="race, no release and acquire"):
        run(load, counter, threads=64, programs=3, schedule=schedule)


@everywhere
def test_a_reset_without_a_condition_is_a_race(schedule: Schedule) -> None:
    body = (
        FIRST_THREAD
        + """
    @%p1 st.global.b32 [ %rd80 + 0 ], { 0 };
    @%p1 atom.global.gpu.acq_rel.add.u32 %r1, [ %rd80 + 0 ], 1;
    """
    )
    with pytest.raises(PtxError, match="race, no release and acquire"):
        run(body, np.zeros(1, u32), threads=64, programs=3, schedule=schedule)


@everywhere
@pytest.mark.parametrize("size", [1, 2, 4])
def test_neighbours_in_one_word_are_no_race(size: int, schedule: Schedule) -> None:
    body = f"mad.wide.u32 %rd1, %r91, {size}, %rd80;\n" + FIRST_THREAD
    body += f"mov.b16 %rs1, 1;\nmov.u32 %r1, 1;\n@%p1 st.global.b{8 * size} [ %rd1 + 0 ], "
    body += "{ %r1 };" if size == 4 else "{ %rs1 };"
    array = np.zeros(12, u8)
    run(body, array, programs=3, granule=size, schedule=schedule)
    assert array[: 3 * size : size].tolist() == [1, 1, 1]
    # and in one entry they are
    with pytest.raises(PtxError, match="race, no release and acquire"):
        run(body.replace(f", {size}, %rd80", ", 0, %rd80"), array, programs=3, schedule=schedule)


@everywhere
def test_all_may_read_and_none_then_write(schedule: Schedule) -> None:
    """Whichever of three programs writes what all have read: several readers are kept."""
    read = "ld.global.b32 { %r1 }, [ %rd80 + 0 ];\n"
    run(read, np.zeros(1, u32), programs=3, schedule=schedule)
    for writer in range(3):
        write = f"setp.eq.u32 %p1, %r91, {writer};\n@%p1 st.global.b32 [ %rd80 + 0 ], {{ 1 }};"
        with pytest.raises(PtxError, match="race, no release and acquire"):
            run(read + write, np.zeros(1, u32), programs=3, schedule=schedule)

"""Threads that diverge, shared memory, atomics, and what is outside memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.ptx.arithmetic import PtxError, u8, u16, u32, u64
from support.ptx.counting import Profile
from support.ptx.execute import Schedule, launch
from support.ptx.handmade import program, run
from support.ptx.memory import Memory

SCHEDULES = [Schedule(), Schedule("reversed"), Schedule("random", 3, warps=True, seed=5)]

LOOP = """
mov.u32 %r1, 0;
mov.u32 %r2, 0;
$LOOP:
setp.ge.u32 %p1, %r1, %r90;
@%p1 bra $DONE;
add.s32 %r2, %r2, %r1;
add.s32 %r1, %r1, 1;
bra $LOOP;
$DONE:
add.s64 %rd1, %rd80, %rd90;
st.global.b32 [ %rd1 + 0 ], { %r2 };
"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_threads_leave_a_loop_one_by_one_and_meet_again(schedule: Schedule) -> None:
    out = np.zeros(64, u32)
    counts = run(LOOP, out, threads=64, schedule=schedule)
    assert out.tolist() == [k * (k - 1) // 2 for k in range(64)]
    # all threads of a warp store together
    assert counts.threads.max() >= 64 > counts.notes["diverged at a barrier"]


def test_a_branch_table_and_threads_that_return_early() -> None:
    body = """
    and.b32 %r1, %r90, 3;
    add.s64 %rd1, %rd80, %rd90;
    $TABLE: .branchtargets $ZERO, $ONE, $TWO, $THREE;
    brx.idx %r1, $TABLE;
    $ZERO: ret;
    $ONE: mov.u32 %r2, 10; bra $STORE;
    $TWO: mov.u32 %r2, 20; bra $STORE;
    $THREE: mov.u32 %r2, 30;
    $STORE: st.global.b32 [ %rd1 + 0 ], { %r2 };
    """
    out = np.full(32, 7, u32)
    run(body, out)
    assert out.tolist() == [7, 10, 20, 30] * 8


REVERSED = """
shl.b32 %r1, %r90, 2;
st.shared.b32 [ %r1 + 0 ], %r90;
bar.sync 0;
sub.s32 %r2, 508, %r1;
ld.shared.b32 %r3, [ %r2 + 0 ];
add.s64 %rd1, %rd80, %rd90;
st.global.b32 [ %rd1 + 0 ], { %r3 };
"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_shared_memory_behind_a_barrier(schedule: Schedule) -> None:
    out = np.zeros(128, u32)
    run(REVERSED, out, threads=128, shared=512, schedule=schedule)
    assert out.tolist() == list(range(128))[::-1]


def test_a_shuffle_exchanges_within_warps() -> None:
    body = """
    shfl.sync.bfly.b32 %r1, %r90, 5, 31, -1;
    add.s64 %rd1, %rd80, %rd90;
    st.global.b32 [ %rd1 + 0 ], { %r1 };
    """
    out = np.zeros(64, u32)
    run(body, out, threads=64)
    assert out.tolist() == [k ^ 5 for k in range(64)]
    with pytest.raises(PtxError, match="threads of a warp missing"):
        run(f"setp.lt.u32 %p1, %r90, 5;\n@%p1 bra $END;\n{body}\n$END:", out, threads=64)


def test_matrices_in_shared_memory_come_back_by_rows() -> None:
    """Two threads' words of 8 x 8 entries of 16 bits: row `lane / 4`, columns `lane % 4 * 2`."""
    body = """
    and.b32 %r1, %r90, 7;
    shl.b32 %r1, %r1, 4;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [ %r1 + 0 ], {%r90};
    bar.sync 0;
    shl.b32 %r2, %r90, 2;
    ld.shared.b32 %r3, [ %r2 + 0 ];
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [ %r1 + 0 ];
    add.s64 %rd1, %rd80, %rd90;
    st.global.b32 [ %rd1 + 0 ], { %r3 };
    add.s64 %rd2, %rd81, %rd90;
    st.global.b32 [ %rd2 + 0 ], { %r4 };
    """
    stored, loaded = np.zeros(32, u32), np.zeros(32, u32)
    run(body, stored, loaded, shared=128)
    assert stored.tolist() == loaded.tolist() == list(range(32))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_atomics_of_all_threads_and_programs(schedule: Schedule) -> None:
    body = """
    atom.global.gpu.relaxed.add.u32 %r1, [ %rd80 + 0 ], %r90;
    atom.global.gpu.acq_rel.exch.b32 %r2, [ %rd80 + 4 ], 9;
    """.replace("acq_rel", "relaxed")
    out = np.zeros(2, u32)
    run(body, out, threads=64, programs=5, schedule=schedule)
    assert out.tolist() == [5 * 64 * 63 // 2, 9]


def test_programs_find_their_place_in_the_grid() -> None:
    body = """
    mov.u32 %r1, %nctaid.x;
    mad.lo.s32 %r2, %r1, 100, %r91;
    mul.wide.u32 %rd1, %r91, 4;
    add.s64 %rd1, %rd80, %rd1;
    st.global.b32 [ %rd1 + 0 ], { %r2 };
    """
    out = np.zeros(3, u32)
    run(body, out, programs=3, schedule=Schedule("reversed"))
    assert out.tolist() == [300, 301, 302]


def store_at(offset: str, width: int = 32) -> str:
    store = f"st.global.b{width} [ %rd1 + 0 ], {{ %rd2 }};"
    return f"mov.b64 %rd2, 1;\nadd.s64 %rd1, %rd80, {offset};\n{store}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (store_at("32", 64), "out of bounds"),
        (store_at("-8", 64), "out of bounds"),
        (store_at("28", 64), "misaligned"),
        ("add.s64 %rd1, %rd80, %rd90;\nld.global.b32 { %r1 }, [ %rd1 + 4 ];", "out of bounds"),
        ("add.s64 %rd1, %rd80, 2;\nld.global.b32 { %r1 }, [ %rd1 + 0 ];", "misaligned"),
        ("ld.shared.b32 %r1, [ %r90 + 0 ];", "shared memory of 64 bytes"),
        ("st.shared.b64 [ 64 ], %rd80;", "address"),
        ("mov.u32 %r1, 64;\nst.shared.b64 [ %r1 + 0 ], %rd80;", "shared memory of 64 bytes"),
        ("st.global.b32 [ %rd80 + 0 ], { %r90 };", "different values to one address"),
        (
            "and.b32 %r1, %r90, 7;\nmad.wide.u32 %rd1, %r1, 4, %rd80;\n"
            "st.global.b32 [ %rd1 + 0 ], { %r90 };",
            "different values to one address",
        ),
        ("$LOOP:\nadd.s32 %r1, %r1, 1;\nbra $LOOP;", "hangs"),
        (
            "setp.eq.u32 %p1, %r90, 0;\n"
            "$LOOP:\n@%p1 ld.global.gpu.acquire.b32 { %r1 }, [ %rd80 + 0 ];\nbra $LOOP;",
            "hangs",
        ),
    ],
)
def test_faults_are_refused(body: str, message: str) -> None:
    memory = np.zeros(8, u32)
    with pytest.raises(PtxError, match=message):
        run(body, memory, shared=64, schedule=Schedule(most_blocks=1000))


def test_the_last_entry_of_memory_is_inside_and_masked_threads_touch_nothing() -> None:
    body = """
    setp.lt.u32 %p1, %r90, 8;
    add.s64 %rd1, %rd80, %rd90;
    @%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    add.s32 %r1, %r1, 1;
    @%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };
    """
    memory = np.arange(8, dtype=u32)
    run(body, memory)
    assert memory.tolist() == list(range(1, 9))


def test_parts_of_an_allocation_belong_to_it_and_others_do_not_overlap() -> None:
    memory, array = Memory(), np.zeros(8, u32)
    memory.add(array.ctypes.data, 32, "all", 4)
    memory.add(array.ctypes.data + 16, 16, "half", 2)
    memory.build(1, False)
    assert memory.names == ["all"]
    assert memory.granules.tolist() == [2]
    memory.add(array.ctypes.data + 16, 32, "beyond")
    with pytest.raises(PtxError, match="overlap"):
        memory.build(1, False)


def profiled(body: str, *arrays: Any, shared: int = 0) -> dict[str, tuple[int, int, int]]:
    """Requests, units and the least of them, by instruction."""
    memory, profile = Memory(), Profile()
    for array in arrays:
        memory.add(array.ctypes.data, array.nbytes)
    made = program(body, len(arrays), 32, shared)
    launch(made, (1, 1, 1), [u64(a.ctypes.data) for a in arrays], memory, profile=profile)
    return {
        touched.site.text.split()[0]: (touched.requests, touched.units, touched.least)
        for touched in profile.touched.values()
    }


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors_are_those_that_a_warp_touches(stride: int, sectors: int) -> None:
    body = f"mad.wide.u32 %rd1, %r90, {stride}, %rd80;\nld.global.b32 {{ %r1 }}, [ %rd1 + 0 ];"
    whole = np.zeros(2048 + 32, u8)
    array = whole[-whole.ctypes.data % 32 :][:2048].view(u32)
    least = 1 if stride == 0 else 4
    assert profiled(body, array) == {"ld.global.b32": (1, sectors, least)}


@pytest.mark.parametrize(("stride", "waves"), [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
def test_wavefronts_are_the_most_words_of_a_bank(stride: int, waves: int) -> None:
    body = f"mul.lo.s32 %r1, %r90, {stride};\nld.shared.b32 %r2, [ %r1 + 0 ];"
    assert profiled(body, np.zeros(1, u16), shared=8192) == {"ld.shared.b32": (1, waves, 1)}

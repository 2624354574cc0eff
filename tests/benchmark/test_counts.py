"""docs/performance.md shows the committed counts, and the kernels still give them."""

import json
import re

import pytest

pytest.importorskip("triton")
import support.bench_folder  # noqa: F401
from bench.counts import bounds, h200, page, whole_steps
from bench.counts.__main__ import RESULT
from support.checkout import ROOT
from support.compiling import python

RESULT_ROWS = json.loads(RESULT.read_text())
KERNELS = {(row["case"], row["kernel"]): row for row in RESULT_ROWS["kernels"]}
FP32, SPLIT = ("fp32", "statistics"), ("bf16 split", "statistics")
SINGLE, SPLIT_UPDATE = ("fp32, one launch", "single"), ("bf16 split", "update")
SPLIT_TILES = ("bf16 split, rows of 768", "tiles")


def rows_of(length):
    return f"fp32, rows of {length}", "tiles"


def counted(kernel, what):
    """A figure of a kernel as docs/performance.md has it."""
    row = KERNELS[kernel]
    if what == "float64":
        return float(row["instructions"]["float64"] + row["instructions"]["divide"])
    figures = {
        "instructions": row["instructions"]["all"],
        "modelled": bounds.slowest(row),
        "latency": (row["bounds"]["latency"] or [0.0])[-1],
        "gaps": row["sector_bytes"] - row["least_bytes"],
    }
    return float(figures[what] if what in figures else row[what])


def test_the_page_shows_the_committed_counts():
    text = page.PAGE.read_text()
    assert page.filled(text, json.loads(RESULT.read_text())) == text


@pytest.mark.parametrize(
    ("kernel", "what", "most"),
    [
        *((kernel, "instructions", 12) for kernel in (FP32, SPLIT)),
        *((kernel, "float64", 5.5) for kernel in (FP32, SPLIT)),
        *((kernel, "registers", 71) for kernel in (FP32, SPLIT)),
        # the time of the bytes alone, and a little more for half of them
        (FP32, "modelled", 0.93),
        (SPLIT, "modelled", 0.60),
        *((rows_of(n), "instructions", 45) for n in (576, 768, 2048)),
        (SINGLE, "registers", 110),
        (("bf16 split, one launch", "single"), "registers", 110),
        (SPLIT_UPDATE, "gaps", 0),
    ],
    ids=str,
)
def test_what_the_kernels_take_stays_within_its_target(kernel, what, most):
    assert round(counted(kernel, what), 2) <= most


@pytest.mark.parametrize("step", RESULT_ROWS["steps"], ids=lambda step: step["workload"])
def test_a_step_by_row_takes_little_more_than_its_bytes(step):
    assert step["modelled_us"] <= 1.15 * step["memory_us"]


def test_the_targets_of_steps_are_of_these_workloads():
    assert [step["workload"] for step in RESULT_ROWS["steps"]] == list(whole_steps.STEPS)


@pytest.mark.parametrize(
    ("change", "after"),
    [
        ("tiles have a launch", [(FP32, "registers"), (SINGLE, "registers")]),
        ("tiles loop over columns", [(rows_of(n), "instructions") for n in (576, 768, 2048)]),
        ("sums of deviations", [(FP32, "instructions"), (FP32, "float64")]),
        ("the same, as time", [(FP32, "latency")]),
        ("accesses of mixed", [(SPLIT_UPDATE, "sector_bytes"), (SPLIT_UPDATE, "registers")]),
        ("what is of a row", [(rows_of(576), "registers")]),
        ("five shapes", [(rows_of(2048), "instructions")]),
        ("a NaN is made", [(SPLIT_UPDATE, "instructions"), (SPLIT_TILES, "instructions")]),
    ],
)
def test_the_ledger_says_what_was_counted_last(change, after):
    ledger = (ROOT / "docs" / "kernels.md").read_text()
    (line,) = re.findall(rf"^\| {change}.*\|$", ledger, re.M)
    cell = re.sub(r"\([^)]*\)", "", line.split(" | ")[-1])
    # what is over stands before a semicolon
    said = re.findall(r"\d[\d.]*", cell.rpartition(";")[2] if "since" in cell else cell)
    places = {"registers": 0, "latency": 2}
    assert said == [f"{counted(k, what):.{places.get(what, 1)}f}" for k, what in after]


# 65 536 registers among warps that get 8 to a thread at a time
@pytest.mark.parametrize(
    ("registers", "programs"), [(32, 16), (39, 12), (48, 10), (64, 8), (80, 6), (168, 3), (255, 2)]
)
def test_programs_share_the_registers_of_a_processor(registers, programs):
    assert h200.programs(registers) == programs


@pytest.mark.slow
def test_the_kernels_still_give_the_committed_counts():
    code, printed = python("-m", "bench.counts", "--check")
    assert code == 0, printed

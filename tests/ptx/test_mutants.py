"""The kernels' waits, orders and barriers are needed: without any one of them there is a race."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.ptx.cases import CASES

PROGRAMS = "race, no release and acquire"
THREADS = "race, no barrier"


@pytest.mark.parametrize("schedule", ["random", "warps"])
@pytest.mark.parametrize(
    ("mutant", "case", "form", "race"),
    [
        ("updates that do not wait", "long fp32", "single-launch", PROGRAMS),
        ("partial results announced without an order", "long fp32", "two-launch", PROGRAMS),
        ("partial results announced without an order", "long fp32", "single-launch", PROGRAMS),
        ("factors announced without an order", "long fp32", "single-launch", PROGRAMS),
        # of tiles: of a span, one thread alone makes anything of the window
        ("windows stored while others may yet read them", "fp32 windows", "two-launch", THREADS),
    ],
)
def test_a_mutant_races(
    execute: Callable[..., str], mutant: str, case: str, form: str, race: str, schedule: str
) -> None:
    assert race in execute("mutants:refusal", mutant, CASES[case], form, schedule)

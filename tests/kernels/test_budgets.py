"""What the ahead-of-time check says of registers: no budget is below or above what is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")
from support import compiled_cases
from support.compiled_cases import ALWAYS, TARGETS, Case, cases, find_loose
from support.machine_code import Report


def every_case() -> Iterator[Case]:
    return cases(False, list(TARGETS), list(compiled_cases.BUDGETS))


def report(case: Case, registers: int, spill: int = 0) -> Report:
    """What is right but for its registers."""
    none: Counter[int] = Counter()
    machine_hints = None if case.target == "gfx942" else sorted(case.hints)
    return Report(
        registers, 0, spill, 0, case.hints, machine_hints, none, none, none, none, 1, 9, 9, 9, 0,
        int(case.windowed), 0, 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("version", [(3, 6), (3, 7), (3, 9)])
def test_what_takes_one_more_than_its_budget_fails(
    version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_cases, "VERSION", version)
    for case in every_case():
        assert report(case, case.budget, case.spill).complaints(case, (3, 9)) == []
        (complaint,) = report(case, case.budget + 1).complaints(case, (3, 9))
        assert complaint == f"{case.budget + 1} registers > {case.budget}"
        (complaint,) = report(case, case.budget, case.spill + 1).complaints(case, (3, 9))
        assert complaint.startswith("spills")


def test_a_budget_a_step_above_what_is_taken_is_loose() -> None:
    case = Case("tiles", "sm_90", "fp32", "fp32", "fp32")
    assert find_loose([(case, case.budget - 20), (case, case.budget - 7)]) == []
    (text,) = find_loose([(case, case.budget - 20), (case, case.budget - 8)])
    assert text.startswith("tiles on sm_90: ")


def test_every_case_has_a_budget_for_its_target() -> None:
    assert all(0 < case.budget < 256 for case in every_case())
    assert {case.target for case in every_case() if not case.aligned} == set(ALWAYS)

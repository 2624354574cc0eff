"""What docs/performance.md and README say of a step on a CPU: the committed result, no more."""

from __future__ import annotations

import json

import pytest

from support.checkout import ROOT

RESULT = ROOT / "bench" / "results" / "cpu" / "one-thread.json"

if not RESULT.is_file():
    pytest.skip("bench/ is in the checkout only", allow_module_level=True)


def table() -> list[str]:
    rows = json.loads(RESULT.read_text())["rows"]
    arms = [name for name in next(iter(rows.values())) if name != "SGD fused"]
    lines = [f"| parameters | {' | '.join(arms)} |", "| --- |" + " --- |" * len(arms)]
    for case, found in rows.items():
        cells = [f"{found[arm]['ratio']:.1f}" for arm in arms]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def test_the_table_is_what_was_measured() -> None:
    assert "\n" + "\n".join(table()) + "\n" in (ROOT / "docs" / "performance.md").read_text()


def test_the_range_in_readme_is_that_of_the_table() -> None:
    rows = json.loads(RESULT.read_text())["rows"].values()
    ratios = [row[arm]["ratio"] for row in rows for arm in ("BNGD tensor", "BNGD row")]
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {min(ratios):.1f} to {max(ratios):.1f} times as long as fused SGD's" in said


def test_the_aims_are_met() -> None:
    """Of both granularities; the last case has 3000 tensors."""
    rows = json.loads(RESULT.read_text())["rows"]
    for found, most in zip(rows.values(), (8.0, 6.0, 6.0, 12.0)):
        assert max(found[name]["ratio"] for name in ("BNGD tensor", "BNGD row")) <= most

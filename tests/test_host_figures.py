"""What docs/kernels.md says of a repeated step's time on the host: committed results, no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "host"
BUILDS = ("cpu-build", "cuda-build")
AIMS = {"kept": 3.0, "new": 4.5, "moved": 4.5}
Row = dict[str, Any]

if not RESULTS.is_dir():
    pytest.skip("bench/ is in the checkout only", allow_module_level=True)


def rows(build: str, groups: int, gradients: str, folder: Path = RESULTS) -> list[Row]:
    documents = [json.loads(file.read_text()) for file in folder.glob(f"{build}-*.json")]
    found = [
        row
        for document in documents
        for row in document["rows"]
        if (row["groups"], row["gradients"]) == (groups, gradients)
    ]
    assert len(found) == 3
    return found


def span(found: list[Row], figure: Callable[[Row], float], digits: int = 2) -> str:
    figures = list(map(figure, found))
    return f"{min(figures):.{digits}f} to {max(figures):.{digits}f}"


def without_launches(row: Row) -> float:
    return float(row["ratio"])


def launching(row: Row) -> float:
    return float(row["ratio, launching"])


def new_rates(row: Row) -> float:
    return float(row["step, new rates"] / row["bare loop"])


@pytest.mark.parametrize(("groups", "name"), [(1, "1 group"), (28, "28 groups")])
def test_the_table_is_what_was_measured(groups: int, name: str) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    for gradients, aim in AIMS.items():
        cells = " | ".join(
            span(rows(build, groups, gradients), figure)
            for build in BUILDS
            for figure in (without_launches, launching)
        )
        assert f"| in {name} | {gradients} | {cells} | {aim:g} |\n" in page
    cells = " | ".join(f"| {span(rows(build, groups, 'kept'), new_rates, 1)}" for build in BUILDS)
    assert f"| in {name}, a new `lr` in each | kept {cells} | |\n" in page
    every = [row for build in BUILDS for kind in AIMS for row in rows(build, groups, kind)]
    assert all(49 <= row["bare loop"] <= 104.5 for row in every)


def test_the_quiet_figures_are_what_was_measured() -> None:
    page = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    found = {
        (build, kind): [
            row
            for groups in (1, 28)
            for row in rows(build, groups, kind, RESULTS / "quiet")
        ]
        for build in BUILDS
        for kind in ("kept", "new")
    }  # fmt: skip
    kept = [span(found[build, "kept"], without_launches) for build in BUILDS]
    moved = [span(found[build, "new"], without_launches) for build in BUILDS]
    assert f"took {kept[0]} times the bare loop with the CPU build and {kept[1]} with" in page
    assert f"moved ones {moved[0]} and {moved[1]}." in page
    for (_, kind), several in found.items():
        assert all(without_launches(row) <= AIMS[kind] for row in several)
        assert all(37 <= row["bare loop"] <= 44.5 for row in several)


@pytest.mark.parametrize("gradients", AIMS)
@pytest.mark.parametrize("groups", [1, 28])
def test_the_aims_are_met_with_the_build_for_gpus(groups: int, gradients: str) -> None:
    for row in rows("cuda-build", groups, gradients):
        assert without_launches(row) <= AIMS[gradients]

"""What docs/kernels.md says of a repeated step's time on the host: committed results, no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "host"
BUILDS = ("cpu-build", "cuda-build")
AIMS = {"kept": 3.0, "new": 4.5}

if not RESULTS.is_dir():
    pytest.skip("bench/ is in the checkout only", allow_module_level=True)


def rows(build: str, groups: int, gradients: str) -> list[dict[str, Any]]:
    documents = [json.loads(file.read_text()) for file in RESULTS.glob(f"{build}-*.json")]
    return [
        row
        for document in documents
        for row in document["rows"]
        if (row["groups"], row["gradients"]) == (groups, gradients)
    ]


def cell(build: str, groups: int, gradients: str, loop: str, digits: int) -> str:
    found = [row[loop] / row["bare loop"] for row in rows(build, groups, gradients)]
    assert len(found) == 3
    return f"{min(found):.{digits}f} to {max(found):.{digits}f}"


@pytest.mark.parametrize(("groups", "name"), [(1, "1 group"), (28, "28 groups")])
def test_the_table_is_what_was_measured(groups: int, name: str) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    for gradients, aim in AIMS.items():
        cells = " | ".join(cell(build, groups, gradients, "step", 2) for build in BUILDS)
        assert f"| in {name} | {gradients} | {cells} | {aim:g} |\n" in page
    cells = " | ".join(cell(build, groups, "kept", "step, new rates", 1) for build in BUILDS)
    assert f"| in {name}, a new `lr` in each | kept | {cells} | |\n" in page
    every = [row for build in BUILDS for kind in AIMS for row in rows(build, groups, kind)]
    assert all(37 <= row["bare loop"] <= 44.5 for row in every)


@pytest.mark.parametrize("gradients", AIMS)
@pytest.mark.parametrize("groups", [1, 28])
@pytest.mark.parametrize("build", BUILDS)
def test_the_aims_are_met(build: str, groups: int, gradients: str) -> None:
    for row in rows(build, groups, gradients):
        assert row["step"] <= AIMS[gradients] * row["bare loop"]

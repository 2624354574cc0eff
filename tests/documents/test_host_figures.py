"""What docs/kernels.md says of a repeated step's time on the host: committed results, no more."""

from __future__ import annotations

import json

import pytest

from support.checkout import ROOT

RESULTS = ROOT / "bench" / "results" / "host"

if not RESULTS.is_dir():
    pytest.skip("bench/ is in the checkout only", allow_module_level=True)


def ratios(groups: int, gradients: str) -> list[float]:
    documents = [json.loads(file.read_text()) for file in RESULTS.glob("run-*.json")]
    found = [
        row["ratio"]
        for document in documents
        for row in document["rows"]
        if (row["groups"], row["gradients"]) == (groups, gradients)
    ]
    assert len(found) == 3
    return found


@pytest.mark.parametrize(("groups", "name"), [(1, "1 group"), (28, "28 groups")])
def test_the_table_is_what_was_measured(groups: int, name: str) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    cells = []
    for gradients in ("kept", "new", "moved"):
        found = ratios(groups, gradients)
        cells.append(f"{min(found):.2f} to {max(found):.2f}")
        # the aim: no slower than torch's own
        assert max(found) < 1
    assert f"| in {name} | {' | '.join(cells)} |\n" in page

"""Figures in README and docs are those of the committed results, no more."""

import json

import pytest

from support.checkout import BENCH, DOCS, ROOT

RESULTS = BENCH / "results"
if not RESULTS.is_dir():
    pytest.skip("bench/ is in the checkout only", allow_module_level=True)

DEMO = [json.loads((RESULTS / "demo-cpu" / f"seed{seed}.json").read_text()) for seed in range(3)]
CPU = json.loads((RESULTS / "cpu" / "one-thread.json").read_text())["rows"]
HOST = [json.loads(file.read_text())["rows"] for file in (RESULTS / "host").glob("run-*.json")]


def table(*rows):
    """Lines as they stand on a page."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_accuracies_on_the_exploding_network():
    rows = []
    for arm, run in enumerate(DEMO[0]["exploding"]):
        finals = [seed["exploding"][arm]["accuracies"][-1] for seed in DEMO]
        figures = " / ".join(f"{final:.1f}" for final in finals)
        rows.append([run["optimizer"], f"{run['lr']:g}", figures])
    assert table(*rows) in (DOCS / "demo.md").read_text()


def test_accuracies_by_loss_scale():
    finals = {}
    for run in (run for seed in DEMO for run in seed["loss_scale"]):
        row = finals.setdefault(run["loss_scale"], {})
        row.setdefault(run["optimizer"], []).append(run["accuracies"][-1])
    rows = [
        [f"{scale:g}"]
        + ["NaN" if None in of else f"{min(of):.1f} to {max(of):.1f}" for of in row.values()]
        for scale, row in finals.items()
    ]
    assert table(*rows) in (DOCS / "demo.md").read_text()


def test_a_step_on_a_cpu():
    """The table, the range of it in README, and the aims; the last case has 3000 tensors."""
    arms = [name for name in next(iter(CPU.values())) if name != "SGD fused"]
    cells = [[case, *(f"{row[arm]['ratio']:.1f}" for arm in arms)] for case, row in CPU.items()]
    want = table(["parameters", *arms], ["---"] * (1 + len(arms)), *cells)
    assert want in (DOCS / "performance.md").read_text()
    ratios = [[row[arm]["ratio"] for arm in ("BNGD tensor", "BNGD row")] for row in CPU.values()]
    least, most = min(map(min, ratios)), max(map(max, ratios))
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {least:.1f} to {most:.1f} times as long as fused SGD's" in said
    assert all(max(found) <= aim for found, aim in zip(ratios, (8.0, 6.0, 6.0, 12.0), strict=True))


@pytest.mark.parametrize(("groups", "name"), [(1, "1 group"), (28, "28 groups")])
def test_time_of_a_repeated_step_on_the_host(groups, name):
    assert len(HOST) == 3
    cells = [f"in {name}"]
    for gradients in ("kept", "new", "moved"):
        found = [
            row["ratio"]
            for rows in HOST
            for row in rows
            if (row["groups"], row["gradients"]) == (groups, gradients)
        ]
        cells.append(f"{min(found):.2f} to {max(found):.2f}")
        # the aim: no slower than torch's own
        assert max(found) < 1
    assert table(cells) in (DOCS / "kernels.md").read_text()

"""The comparison of optimizers: rates are found where they are, and documents show the results."""

import json

import pytest
import torch

pytest.importorskip("sklearn")

from bench.tasks import report
from bench.tasks.contestants import CONTESTANTS
from bench.tasks.problems import TASKS, Run, Task
from bench.tasks.sweep import best_third, fill, rate_of, third_of, train
from bngd_triton.options import Options
from support.checkout import BENCH

ROOT = BENCH.parent


def valley(seed):
    """Its loss after 20 steps depends on the rate alone."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    return Run(
        model, lambda: model.weight.square().sum(), lambda _: float(model.weight.square()) + 1e-3
    )


def test_a_sweep_widens_until_both_ends_are_worse():
    task = Task("valley", 20, False, valley)
    found = {}
    far_off = CONTESTANTS["sgd"]._replace(centre=1e-4)
    assert fill(task, far_off, found, [0, 1])
    choice = {int(third): scores for third, scores in found["choice"].items()}
    best = best_third(task, found["choice"])
    assert min(choice) < best < max(choice)
    for end in (min(choice), max(choice)):
        assert choice[end][0] > 1.05 * choice[best][0]
    assert set(found["test"]) == {str(rate_of(best)), "0.001"}
    # all is there: nothing is trained again
    assert not fill(task, far_off, found, [0, 1])


def test_a_training_that_diverges_is_the_worst():
    task = Task("valley", 200, False, valley)
    assert train(task, CONTESTANTS["sgd"], 1e4, 0, "test") == float("inf")


def test_rates_are_thirds_of_decades():
    assert [rate_of(third) for third in (-3, -2, -1, 0)] == [0.1, 0.22, 0.46, 1.0]
    assert [third_of(rate) for rate in (0.1, 0.22, 0.46, 1.0)] == [-3, -2, -1, 0]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_learns(name):
    """A few steps, and a score that is finite on both parts."""
    task = TASKS[name]._replace(steps=3)
    for part in ("choice", "test"):
        assert train(task, CONTESTANTS["bngd-row"], 1e-3, 0, part) < 1000


def test_documents_show_the_committed_results():
    found = json.loads((BENCH / "results" / "tasks" / "tasks.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert report.table(found, report.FIRST, report.tested) in readme
    for cell in (report.tested, report.rate, report.span):
        assert report.table(found, report.OURS, cell) in page


def test_the_default_granularity_is_what_the_written_rule_chooses():
    found = json.loads((BENCH / "results" / "tasks" / "tasks.json").read_text())
    places = report.ranks(found)
    best = min(places, key=lambda who: (max(places[who]), sum(places[who])))
    assert best == f"bngd-{Options().granularity}"
    assert Options().centering == 1.0
    assert not Options().center_1d

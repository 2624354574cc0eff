"""Every section of docs/integrations.md trains as it says, after the page's first block alone."""

import re

import pytest
import torch

from bngd_triton import BNGD
from support.checkout import DOCS, blocks, needs_docs
from support.processes import needs_gloo, run

PAGE = DOCS / "integrations.md"
pytestmark = needs_docs


def snippets():
    """The page's code by heading, of which each has one block."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    found = {section.partition("\n")[0]: blocks(section) for section in sections}
    assert max(map(len, found.values())) == 1
    return {heading: code[0] for heading, code in found.items() if code}


def preamble():
    """The page's first block: a model, batches and a loss function."""
    torch.manual_seed(0)
    names = {}
    first, *_ = blocks(PAGE.read_text())
    exec(first, names)
    return names


def loss(names, model):
    x, y = names["batches"][0]
    device = next(model.parameters()).device
    return names["loss_fn"](model(x.to(device)), y.to(device)).item()


def test_every_snippet_has_a_test():
    assert list(snippets()) == [
        "Transformers", "Lightning", "Accelerate", "timm", "DistributedDataParallel",
        "ZeroRedundancyOptimizer",
    ]  # fmt: skip


def test_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    # the snippet writes to "out"
    monkeypatch.chdir(tmp_path)
    names = preamble()
    exec(snippets()["Transformers"], names)
    assert type(names["trainer"].optimizer.optimizer) is BNGD
    assert names["trainer"].state.global_step == 20


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    names = preamble()
    before = loss(names, names["model"])
    exec(snippets()["Lightning"], names)
    assert loss(names, names["net"].net) < before
    # the schedule has come to its end
    (optimizer,) = names["trainer"].optimizers
    assert type(optimizer) is BNGD
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    names = preamble()
    before = loss(names, names["model"])
    exec(snippets()["Accelerate"], names)
    assert loss(names, names["model"]) < before


def test_timm():
    pytest.importorskip("timm")
    names = preamble()
    exec(snippets()["timm"], names)
    assert type(names["optimizer"]) is BNGD
    assert [group["weight_decay"] for group in names["optimizer"].param_groups] == [0.0, 0.05]


def run_snippets(sections):
    """The loss before and after the last snippet of each, on one rank of several."""
    losses = []
    for *first, last in sections:
        names = preamble()
        for code in first:
            exec(code, names)
        before = loss(names, names["model"])
        exec(last, names)
        losses.append((before, loss(names, names["model"])))
    return losses


@needs_gloo
def test_distributed():
    data_parallel = snippets()["DistributedDataParallel"]
    zero = snippets()["ZeroRedundancyOptimizer"]
    for rank in run(2, run_snippets, [[data_parallel], [data_parallel, zero]]):
        assert all(after < before for before, after in rank)

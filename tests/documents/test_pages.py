"""The code of the pages of docs/ runs as it stands, and their figures are those of the examples."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.checkout import DOCS, EXAMPLES

TRAINING, DISTRIBUTED, TELEMETRY = (
    DOCS / f"{name}.md" for name in ("training", "distributed", "telemetry")
)
pytestmark = pytest.mark.skipif(
    not DOCS.exists(), reason="the tests run without the checkout around them"
)
NUMBER = r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\w)"


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_the_code_of_the_training_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    setup, *sections = blocks(TRAINING)
    assert len(sections) == 7
    for section in sections:
        scope: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(compile(setup, str(TRAINING), "exec"), scope)
        if "BNGD(" not in section:
            # these speak of an optimizer that has stepped
            exec(compile(sections[2], str(TRAINING), "exec"), scope)
        if "graph.replay" in section:
            # a graph needs a GPU; its replay is a step
            step = scope["optimizer"].step
            scope |= {"batches": range(2), "graph": SimpleNamespace(replay=step)}
            scope["scheduler"] = torch.optim.lr_scheduler.LinearLR(scope["optimizer"])
        before = scope["model"][0].weight.detach().clone()
        exec(compile(section, str(TRAINING), "exec"), scope)
        assert scope["model"][0].weight.isfinite().all()
        if "BNGD(" in section:
            assert not torch.equal(scope["model"][0].weight.to(before.dtype), before), section
    assert (tmp_path / "run.pt").exists()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_the_code_of_the_distributed_page_runs(tmp_path: Path) -> None:
    sharding, saving = blocks(DISTRIBUTED)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        scope: dict[str, Any] = {"world": 1, "folder": str(tmp_path)}
        exec(compile(sharding, str(DISTRIBUTED), "exec"), scope)
        model, optimizer = scope["model"], scope["optimizer"]
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = [param.full_tensor().clone() for param in model.parameters()]
        exec(compile(saving, str(DISTRIBUTED), "exec"), scope)
        assert (tmp_path / "step-100" / ".metadata").exists()
        for param, old in zip(model.parameters(), before):
            assert torch.equal(param.full_tensor(), old)
    finally:
        dist.destroy_process_group()


def test_links_of_the_distributed_page_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", DISTRIBUTED.read_text())
    assert len(links) > 3
    for link in links:
        assert (DOCS / link).exists(), link


def test_the_code_of_the_telemetry_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    watch, save = blocks(TELEMETRY)
    model = torch.nn.Linear(3, 2)
    names: dict[str, Any] = {
        "model": model,
        "batches": [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)],
        "loss_fn": torch.nn.functional.mse_loss,
        "step": 3,
    }
    # tensorboard is not among the packages of these tests
    exec(watch.replace(', path="runs/first"', ""), names)
    optimizer = names["optimizer"]
    names["scheduler"] = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=9)
    exec(save, names)
    assert sorted(os.listdir()) == ["grad-stats.png", "run.pt"]
    assert names["saved"]["step"] == 3


def test_figures_of_the_telemetry_page_are_the_example_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import find_exploding_layer as example

    split, model = example.exploding_task(example.SEED)
    # the first step comes before any difference that training could make
    rows = example.batches(split, 1)
    log = example.train(split, model, steps=len(rows))
    example.show(log, 0)
    _, printed = capsys.readouterr().out.split("\n", 1)
    (shown,) = blocks(TELEMETRY, "text")
    assert re.sub(NUMBER, "#", shown) == re.sub(NUMBER, "#", printed)
    got, want = ([float(x) for x in re.findall(NUMBER, text)] for text in (shown, printed))
    assert len(got) == 11
    # of another processor: one unit of the last digit
    assert got == pytest.approx(want, rel=0.06)
    prose = TELEMETRY.read_text()
    assert f"are {got[9]} decades larger" in prose
    assert f"{got[-1]} times is the most" in prose


def test_the_picture_is_small() -> None:
    picture = DOCS / "grad-stats.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 100_000

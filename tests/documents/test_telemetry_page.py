"""docs/telemetry.md: its code runs, and its figures are those of the example."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkout import ROOT

PAGE = ROOT / "docs" / "telemetry.md"
pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the tests run without the checkout around them"
)
NUMBER = r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\w)"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    watch, save = blocks("python")
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


def test_figures_are_the_example_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import find_exploding_layer as example

    split, model = example.exploding_task(example.SEED)
    # the first step comes before any difference that training could make
    rows = example.batches(split, 1)
    log = example.train(split, model, steps=len(rows))
    example.show(log, 0)
    _, printed = capsys.readouterr().out.split("\n", 1)
    (shown,) = blocks("text")
    assert re.sub(NUMBER, "#", shown) == re.sub(NUMBER, "#", printed)
    got, want = ([float(x) for x in re.findall(NUMBER, text)] for text in (shown, printed))
    assert len(got) == 11
    # of another processor: one unit of the last digit
    assert got == pytest.approx(want, rel=0.06)
    prose = PAGE.read_text()
    assert f"are {got[9]} decades larger" in prose
    assert f"{got[-1]} times is the most" in prose


def test_the_picture_is_small() -> None:
    picture = ROOT / "docs" / "grad-stats.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 100_000

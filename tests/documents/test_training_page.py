"""The code of docs/training.md runs as it stands, section after section."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.checkout import DOCS

PAGE = DOCS / "training.md"
pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the tests run without the checkout around them"
)


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setup, *sections = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(sections) == 7
    for section in sections:
        scope: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(compile(setup, str(PAGE), "exec"), scope)
        if "BNGD(" not in section:
            # these speak of an optimizer that has stepped
            exec(compile(sections[2], str(PAGE), "exec"), scope)
        if "graph.replay" in section:
            # a graph needs a GPU; its replay is a step
            step = scope["optimizer"].step
            scope |= {"batches": range(2), "graph": SimpleNamespace(replay=step)}
            scope["scheduler"] = torch.optim.lr_scheduler.LinearLR(scope["optimizer"])
        before = scope["model"][0].weight.detach().clone()
        exec(compile(section, str(PAGE), "exec"), scope)
        assert scope["model"][0].weight.isfinite().all()
        if "BNGD(" in section:
            assert not torch.equal(scope["model"][0].weight.to(before.dtype), before), section
    assert (tmp_path / "run.pt").exists()

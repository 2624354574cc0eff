"""The code of docs/distributed.md runs as it stands, in a group of one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.checkout import DOCS

PAGE = DOCS / "distributed.md"
pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the checkout around them"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
]


def test_code_runs(tmp_path: Path) -> None:
    sharding, saving = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        scope: dict[str, Any] = {"world": 1, "folder": str(tmp_path)}
        exec(compile(sharding, str(PAGE), "exec"), scope)
        model, optimizer = scope["model"], scope["optimizer"]
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = [param.full_tensor().clone() for param in model.parameters()]
        exec(compile(saving, str(PAGE), "exec"), scope)
        assert (tmp_path / "step-100" / ".metadata").exists()
        for param, old in zip(model.parameters(), before):
            assert torch.equal(param.full_tensor(), old)
    finally:
        dist.destroy_process_group()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text())
    assert len(links) > 3
    for link in links:
        assert (DOCS / link).exists(), link

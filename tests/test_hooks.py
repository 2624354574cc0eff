"""`step` by the short way, and by torch's wrapper where something listens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.profiler import ExecutionTraceObserver

from bngd_triton import BNGD

LABEL = "Optimizer.step#BNGD.step"


def ready(kind: type[Optimizer] = BNGD) -> Any:
    param = Parameter(torch.ones(4))
    param.grad = torch.arange(4.0)
    return kind([param], lr=0.1)


def test_torchs_wrapper_is_left_out_while_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = ready()
    entered = []
    labelled = torch.autograd.profiler.record_function

    def noting(name: str) -> Any:
        entered.append(name)
        return labelled(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", noting)
    optimizer.step()
    assert entered == []
    handle = optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step()
    handle.remove()
    assert entered == [LABEL]
    with torch.autograd.profiler.profile():
        optimizer.step()
    assert entered == [LABEL] * 2


def test_a_profilers_execution_trace_has_the_label(tmp_path: Path) -> None:
    optimizer = ready()
    file = tmp_path / "trace.json"
    observer = ExecutionTraceObserver().register_callback(str(file))
    with torch.profiler.profile(execution_trace_observer=observer):
        optimizer.step()
    assert LABEL in {node["name"] for node in json.loads(file.read_text())["nodes"]}


def test_a_subclass_runs_hooks_as_often_as_torchs_optimizers_do() -> None:
    def count(kind: Any) -> int:
        ready(kind)  # torch wraps a class when its first optimizer is made

        class Sub(kind):  # type: ignore[misc]
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        calls = 0

        def hook(*_: object) -> None:
            nonlocal calls
            calls += 1

        optimizer = ready(Sub)
        optimizer.register_step_pre_hook(hook)
        optimizer.step()
        return calls

    assert count(BNGD) == count(SGD)


def test_a_closure_and_what_it_returns_pass_through() -> None:
    optimizer = ready()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert optimizer.step(closure=lambda: 4.0) == 4.0

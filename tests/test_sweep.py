"""bench.sweep: every tuning it names can be laid out, and a sweep of two runs on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "bench" / "sweep.py").is_file():
    # at the end: the root also holds the folder `kernels`, which is not to be imported by that name
    sys.path.append(str(ROOT))
pytest.importorskip("bench.sweep", reason="bench/ is in the checkout only")

from bench import arms, cases, report, sweep  # noqa: E402
from bench.models import WORKLOADS  # noqa: E402
from bngd_triton.kernels.launch import FORMS  # noqa: E402
from bngd_triton.kernels.tuning import Tuning, gpu_tuning  # noqa: E402

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled where there is a GPU"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sweep.QUESTIONS)
def test_tunings_are_what_a_plan_can_have(name: str) -> None:
    question = sweep.QUESTIONS[name]
    tunings = [{**question.base, **change} for change in ({}, *question.changes)]
    labels = [arms.label(tuning) for tuning in tunings]
    assert len(set(labels)) == len(labels) >= 2
    for tuning in tunings:
        found = dataclasses.replace(gpu_tuning(wide=True, wave=32), **tuning)
        assert found.form in FORMS
        # a change that the base already has would be measured against itself
        assert tuning is tunings[0] or found != dataclasses.replace(
            gpu_tuning(wide=True, wave=32), **tunings[0]
        )
        for field in dataclasses.fields(Tuning):
            value = getattr(found, field.name)
            if field.name not in ("programs_per_sm",) and type(value) is int:
                assert value & (value - 1) == 0, (field.name, value)
        assert found.slice % (found.block * found.unroll) == 0
        assert found.chunk % found.update_block == 0
    for workload, dtype in question.places:
        assert workload in WORKLOADS
        assert dtype in arms.STORAGES


@interpreted
def test_a_sweep_of_two_tunings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--device", "cpu", "--only", "wide", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    report.check(found)
    assert path.name.endswith("-sweep.json")
    assert found["finished"]
    assert [row["tuning"] for row in found["rows"]] == [
        {"form": "two-launch"}, {"form": "two-launch", "wide": False},
    ]  # fmt: skip
    assert [row["base"] for row in found["rows"]] == [True, False]
    assert {row["question"] for row in found["rows"]} == {"wide"}
    assert all(row["median_us"] > 0 for row in found["rows"])
    assert "wide          dry-run" in printed
    assert "best of all: dry-run fp32" in printed


def row(question: str, arm: str, us: float, base: bool = False) -> dict[str, Any]:
    where = {"question": question, "workload": "w", "dtype": "fp32", "base": base}
    return {**where, "arm": arm, "median_us": us, "host_us": 7.0}


def test_the_fastest_is_named_with_its_ratio() -> None:
    rows = [row("a", "x", 10.0, True), row("a", "y", 8.0), row("b", "x", 11.0, True),
            row("b", "z", 12.0), row("c", "z", 9.0)]  # fmt: skip
    missing = {"question": "c", "workload": "w", "dtype": "fp32", "arm": "x", "reason": "broken"}
    table = sweep.table({"rows": rows, "unavailable": [missing], "not_run": ["d"]}).splitlines()
    assert table[1].split() == ["a", "w", "fp32", "10.0", "8.0", "0.800", "7", "7", "y"]
    assert table[2].split()[3:6] == ["11.0", "11.0", "1.000"]
    assert "the base did not run" in table[3]
    assert table[4] == "best of all: w fp32: 8.0 us with y"
    assert table[5].startswith("not available: c, w fp32, x: broken")
    assert table[6] == "not run: d"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_question_that_breaks_off_leaves_the_others(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(case: cases.Case) -> cases.Outcome:
        seen.append([arm.name for arm in case.arms])
        if len(seen) == 1:
            raise error("boom")
        return cases.Outcome([], [])

    monkeypatch.setattr(cases, "run", run)
    command = ["--device", "cpu", "--only", "form,wide", "--out", str(tmp_path)]
    assert sweep.main(command) == (130 if error is KeyboardInterrupt else 1)
    assert len(seen) == (1 if error is KeyboardInterrupt else 2)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert not found["finished"]
    if error is RuntimeError:
        assert found["not_run"] == ["form: dry-run fp32: RuntimeError: boom"]


def test_a_spent_budget_and_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--device", "cpu", "--budget", "0", "--out", str(tmp_path)]
    assert sweep.main(command) == 0
    (path,) = tmp_path.iterdir()
    assert len(json.loads(path.read_text())["not_run"]) == len(sweep.QUESTIONS)
    assert sweep.main([*command, "--only", "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweep.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_only_keeps_questions_and_workloads() -> None:
    places = [("moe-10k", "fp32"), ("resnet50", "fp32")]
    assert list(sweep._chosen("form", places, set())) == places
    assert list(sweep._chosen("form", places, {"wide"})) == []
    assert list(sweep._chosen("form", places, {"form", "moe-10k"})) == places[:1]
    assert list(sweep._chosen("form", places, {"resnet50"})) == places[1:]

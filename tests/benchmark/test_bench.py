"""bench/run.py: the whole measuring code on the CPU, and what the command shows of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import arms, report, run, timing
from bngd_triton import cli
from support.bench_folder import CPU, ROOT, interpreted


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What a dry run of everything writes."""
    out = tmp_path_factory.mktemp("dry")
    command = ["--device", "cpu", "--out", str(out), "--tuning", "form=single-launch", "--chart"]
    assert run.main(command) == 0
    (path,) = out.glob("*.json")
    # NaN is not JSON
    return path, json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.slow
@interpreted
def test_dry_run_validates(document):
    path, found = document
    report.check(found)
    assert re.fullmatch(r"cpu-\d{4}-\d\d-\d\d\.json", path.name)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert found["finished"]
    assert found["kernels_sha256"] == report.kernels_hash()
    assert found["environment"]["torch"] == torch.__version__
    assert found["copy_gbps"] > 0


@pytest.mark.slow
@interpreted
def test_no_arm_is_lost(document):
    found = document[1]
    names = {*arms.ARMS, "bngd:form=single-launch"}
    for item in run.DRY:
        ran = {row["arm"] for row in found["rows"] if (row["workload"], row["dtype"]) == item}
        missing = {
            entry["arm"]: entry["reason"]
            for entry in found["unavailable"]
            if (entry["workload"], entry["dtype"]) == item
        }
        assert ran | set(missing) == names
        assert not ran & set(missing)
        assert {"bngd", "bngd-row", "bngd-global", "bngd-eager"} <= ran
        assert all(missing.values())
        assert "optimi" in missing["optimi-sgd"]
    fp32 = {row["arm"] for row in found["rows"] if row["dtype"] == "fp32"}
    assert {"compile", "torch-sgd-fused", "torch-sgd-foreach", "torch-adamw-fused"} <= fp32
    wrong = [m["reason"] for m in found["unavailable"] if m["dtype"] == "bf16-fp32m"]
    assert any("it keeps bfloat16" in reason for reason in wrong)


@pytest.mark.slow
@interpreted
def test_table_and_chart(document, tmp_path, capsys):
    path, found = document
    printed = report.table(found)
    assert all(row["arm"] in printed for row in found["rows"])
    assert "not available: optimi-sgd" in printed
    copy = tmp_path / "a.json"
    copy.write_text(path.read_text())
    assert report.chart([str(copy)]) == 0
    assert copy.with_suffix(".png").exists()
    copy.write_text('{"rows": [{}]}')
    assert report.chart([str(copy)]) == 2
    assert "is not a result file" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_line(tmp_path, monkeypatch, capsys):
    command = ["--device", "cpu", "--only", "bngd-eager,fp32", "--out", str(tmp_path), "--chart"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run.main(command) == 0
    assert "pip install matplotlib" in capsys.readouterr().out.splitlines()[-1]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_run_keeps_finished_rows(error, tmp_path, monkeypatch):
    whole, seen = timing.times, []

    def stop(step, device):
        seen.append(step)
        # the first is the copy
        if len(seen) == 3:
            raise error("boom")
        return whole(step, device)

    monkeypatch.setattr(timing, "times", stop)
    command = ["--device", "cpu", "--only", "bngd-eager,fp32,bf16", "--out", str(tmp_path)]
    interrupted = error is KeyboardInterrupt
    assert run.main(command) == (130 if interrupted else 1)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    report.check(found)
    # what only broke one arm off leaves the others
    others = [] if interrupted else [("dry-run-groups", "fp32")]
    ran = [(row["workload"], row["dtype"]) for row in found["rows"]]
    assert ran == [("dry-run", "fp32"), *others]
    line = "dry-run bf16 bngd-eager: RuntimeError: boom"
    assert found["not_run"] == ([] if interrupted else [line])
    assert not found["finished"]


def test_spent_budget_is_said(tmp_path):
    command = ["--device", "cpu", "--only", "bngd-eager", "--budget", "0", "--out", str(tmp_path)]
    assert run.main(command) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert len(found["not_run"]) == len(run.DRY)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--only", "no-such", "no-such"),
        ("--tuning", "no_such=1", "no_such"),
        ("--tuning", "hints=maybe", "Tuning.hints is of type bool, got 'maybe'"),
        ("--tuning", "hints=1", "bool, got 1"),
        ("--tuning", "span=True", "int, got True"),
        ("--tuning", "form=3", "str, got 3"),
    ],
)
def test_what_is_not_there_is_refused(option, value, message, capsys):
    assert run.main(["--device", "cpu", option, value]) == 2
    assert message in capsys.readouterr().err


def test_only():
    every = list(arms.ARMS.values())
    args = run._parser().parse_args(["--only", "moe-10k,fp32,bngd", "--suite", "full"])
    assert run._selection(args, every) == ([("moe-10k", "fp32")], [arms.ARMS["bngd"]])
    args = run._parser().parse_args(["--only", "bngd-row"])
    assert run._selection(args, every) == (run.QUICK, [arms.ARMS["bngd-row"]])


def test_no_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == 1
    assert "there is no GPU" in capsys.readouterr().err


def test_launches_and_graphs_are_not_claimed_without_a_gpu():
    found = timing.times(lambda: None, CPU)
    assert found["host_us"] is found["launches"] is found["replay_us"] is None
    assert 0 < found["p20_us"] <= found["median_us"] <= found["p80_us"]


def test_command(monkeypatch, capsys, tmp_path):
    ran = []

    def noting(command, cwd, **more):
        ran.append((command[1:], cwd))
        return SimpleNamespace(returncode=7)

    monkeypatch.setattr(cli, "_ROOT", ROOT)
    monkeypatch.setattr(cli.subprocess, "run", noting)
    assert cli.main(["bench", "--suite", "full", "--out", str(tmp_path)]) == 7
    assert cli.main(["bench", "--plot", str(tmp_path / "a.json")]) == 7
    given = f"--suite full --only  --chart --out {tmp_path} --device cuda"
    assert ran == [
        (["-m", "bench.run", *given.split(" ")], ROOT),
        (["-m", "bench.report", str(tmp_path / "a.json")], ROOT),
    ]
    monkeypatch.setattr(cli, "_ROOT", tmp_path)
    assert cli.main(["bench"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "clone the repository" in error


def session(folder, limit):
    """What a session prints with a Python that only notes what it is asked, in folder/asked."""
    stub = folder / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncase "$*" in *rows*) exit 3;; esac\n')
    stub.chmod(0o755)
    checkout = folder / "checkout"
    (checkout / "bench").mkdir(parents=True, exist_ok=True)
    (checkout / "bngd_triton").mkdir(exist_ok=True)
    script = shutil.copy(ROOT / "bench" / "session.sh", checkout / "bench")
    environment = {**os.environ, "PYTHON": str(stub), "LIMIT": limit}
    command = ["bash", script, str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_session_goes_on_where_a_step_fails_and_says_what_was_not_run(tmp_path):
    lines = session(tmp_path, limit="300")
    steps = ["tests", "fp32", "rows", "bf16", "forms", "hints", "memcheck"]
    assert [line.split(":")[0] for line in lines] == steps
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[1] for line in asked] == ["pytest", *["bench.run"] * 5]
    names = {name for line in asked[1:] for name in line.split("--only ")[1].split()[0].split(",")}
    assert names <= {*arms.ARMS, *arms.STORAGES, *run.WORKLOADS, *run.DRY_RUN}
    tunings = [text for line in asked for text in line.split("--tuning ")[1:]]
    made = [dict(arms.tuned("bngd", run._tuning(text.strip())).tuning) for text in tunings]
    assert [tuning["wave"] >> 20 for tuning in made if "wave" in tuning] == [2, 4, 8]
    assert [tuning["hints"] for tuning in made if "hints" in tuning] == [False, False]
    assert [line.split()[:2] for line in session(tmp_path, limit="5")] == [["not", "run:"]] * 7


def test_the_steps_of_a_session_take_nine_minutes_at_most():
    text = (ROOT / "bench" / "session.sh").read_text()
    assert sum(map(int, re.findall(r"^step \w+ (\d+)", text, re.M))) <= 540

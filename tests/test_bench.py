"""bench/gpu.py: suites, the whole measuring code on the CPU, and what the command shows of it."""

import json
import re
import sys

import pytest
import torch
from benching import ROOT, interpreted

import bench
from bench import arms, cases, compiled, gpu, plot, report
from bngd_triton import cli


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What a dry run of everything writes."""
    out = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as patch:
        # one process is enough
        patch.setattr(gpu, "COLD", gpu.COLD[:1])
        assert gpu.main(["--device", "cpu", "--out", str(out)]) == 0
    (path,) = out.iterdir()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return path, json.loads(path.read_text(), parse_constant=refuse)


@interpreted
def test_dry_run_validates(document):
    path, found = document
    report.check(found)
    assert re.fullmatch(r"cpu-\d{4}-\d\d-\d\d\.json", path.name)
    assert found["finished"]
    assert found["kernels_sha256"] == report.kernels_hash()
    assert found["environment"]["torch"] == torch.__version__
    ran = {(row["workload"], row["dtype"], row["arm"]) for row in found["rows"]}
    for arm in ("bngd", "bngd-row", "bngd-two-launch", "eager", "compile", "torch-sgd-fused"):
        assert ("dry-run", "fp32", arm) in ran
    assert ("dry-run-groups", "fp32", "bngd") in ran
    assert ("dry-run", "bf16-fp32m", "bngd") in ran
    variants = next(row["variants"] for row in found["rows"] if row["arm"] == "compile")
    assert all(isinstance(time, float) for time in variants.values())
    assert {row["model"] for row in found["training"]} == {"gpt2-blocks", "resnet50-convs"}
    assert [start["arm"] for start in found["cold_start"]] == ["bngd"]
    assert found["cold_start"][0]["first_step_s"] > 0


@interpreted
def test_no_arm_is_lost(document):
    found = document[1]
    for item in gpu.DRY_RUN:
        ran = {row["arm"] for row in found["rows"] if (row["workload"], row["dtype"]) == item}
        missing = {
            entry["arm"]: entry["reason"]
            for entry in found["unavailable"]
            if (entry["workload"], entry["dtype"]) == item
        }
        assert ran | set(missing) == set(arms.ARMS)
        assert not ran & set(missing)
        assert all(missing.values())
        assert "GPU" in missing["bngd-graph"]
        assert "optimi" in missing["optimi-sgd"]
    kept = [m["reason"] for m in found["unavailable"] if m["dtype"] == "bf16-fp32m"]
    assert any("it keeps bfloat16" in reason for reason in kept)


@interpreted
def test_table_and_plot(document, tmp_path, capsys):
    path, found = document
    printed = report.table(found)
    assert all(row["arm"] in printed for row in found["rows"])
    assert "not available: bngd-graph" in printed
    copy = tmp_path / "a.json"
    copy.write_text(path.read_text())
    assert plot.main([str(copy)]) == 0
    assert copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    copy.write_text('{"rows": [{}]}')
    assert plot.main([str(copy)]) == 2
    assert "is not a result file" in capsys.readouterr().err


def test_compiling_has_a_suite_of_its_own(tmp_path, monkeypatch):
    chosen = []

    def note(case):
        chosen.append((case.workload.name, [arm.name for arm in case.arms]))
        return cases.Outcome([], [])

    monkeypatch.setattr(cases, "run", note)
    monkeypatch.setattr(gpu, "DRY_RUN", [])
    monkeypatch.setattr(gpu, "_selection", lambda args, names: (gpu.COMPILED[:1], names))
    for suite in ("compiled", "quick"):
        command = ["--device", "cpu", "--suite", suite, "--only", "eager", "--out", str(tmp_path)]
        assert gpu.main(command) == 0
    assert chosen[0] == ("gpt2-124m", [n for n in arms.ARMS if n in gpu.COMPILED_ARMS])
    assert "compile" not in chosen[1][1]
    for suite, variants in (("compiled", compiled.VARIANTS), ("quick", ()), ("full", ())):
        effort = gpu._effort(gpu._parser().parse_args(["--suite", suite]))
        assert effort.variants == tuple(variants)


def test_a_host_time_that_is_a_target_is_taken_before_any_profiler():
    assert gpu.QUICK[0] == gpu.FULL[1][0] == ("host-300", "fp32")


def test_the_chart_is_drawn_after_a_run_that_has_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "DRY_RUN", gpu.DRY_RUN[:1])
    command = ["--device", "cpu", "--only", "eager", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert gpu.main([*command, "--chart"]) == 0
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.with_suffix(".json").exists()
    assert gpu.main([*command, "--chart", "--budget", "0"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1
    capsys.readouterr()
    monkeypatch.delattr(bench, "plot")
    monkeypatch.delitem(sys.modules, "bench.plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert gpu.main([*command, "--chart"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "No chart" in last
    assert "matplotlib" in last
    assert "pip install matplotlib" in last


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_run_keeps_finished_rows(error, tmp_path, monkeypatch, capsys):
    whole, seen = cases.run, []

    def stop(case):
        seen.append(case)
        if len(seen) == 2:
            raise error("boom")
        return whole(case)

    monkeypatch.setattr(cases, "run", stop)
    command = ["--device", "cpu", "--only", "eager", "--out", str(tmp_path)]
    interrupted = error is KeyboardInterrupt
    assert gpu.main(command) == (130 if interrupted else 1)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    report.check(found)
    # what only broke one case off leaves the others
    others = [] if interrupted else ["dry-run-groups"]
    assert [row["workload"] for row in found["rows"]] == ["dry-run", *others]
    assert found["not_run"] == ([] if interrupted else ["dry-run bf16-fp32m: RuntimeError: boom"])
    assert not found["finished"]


def test_spent_budget_is_said(tmp_path):
    command = ["--device", "cpu", "--only", "eager,cold,training", "--budget", "0"]
    assert gpu.main([*command, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert len(found["not_run"]) == len(gpu.DRY_RUN) + 2 + len(gpu.COLD)


def test_only(capsys):
    assert gpu.main(["--device", "cpu", "--only", "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err
    args = gpu._parser().parse_args(["--only", "moe-10k,fp32,bngd", "--suite", "full", "--part=3"])
    assert gpu._selection(args, list(arms.ARMS)) == ([gpu.Item("moe-10k", "fp32")], ["bngd"])
    args = gpu._parser().parse_args(["--only", "cold"])
    assert gpu._selection(args, ["bngd"]) == ([], ["bngd"])


def test_no_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_command(monkeypatch, capsys, tmp_path):
    ran = []

    class Done:
        returncode = 7

    monkeypatch.setattr(cli, "_ROOT", ROOT)
    monkeypatch.setattr(
        cli.subprocess, "run", lambda command, **more: ran.append((command, more)) or Done
    )
    assert cli.main(["bench", "--suite", "full", "--part", "2", "--out", str(tmp_path)]) == 7
    command, more = ran[0]
    assert command[1:] == [
        "-m", "bench.gpu", "--suite", "full", "--part", "2", "--only", "", "--out", str(tmp_path),
        "--device", "cuda", "--chart",
    ]  # fmt: skip
    assert more["cwd"] == ROOT
    assert cli.main(["bench", "--plot", str(tmp_path / "a.json")]) == 7
    assert ran[1][0][1:] == ["-m", "bench.plot", str(tmp_path / "a.json")]
    monkeypatch.setattr(cli, "_ROOT", tmp_path)
    assert cli.main(["bench"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "clone the repository" in error

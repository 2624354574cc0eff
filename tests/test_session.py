"""bench.session and what its parts run, without a GPU: do-nothing steps, tools that are missing."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "bench" / "session.py").is_file():
    # at the end: the root also holds the folder `kernels`, which is not to be imported by that name
    sys.path.append(str(ROOT))
pytest.importorskip("bench.session", reason="bench/ is in the checkout only")

from bench import arms, counters, machine, one, parts, session, warm  # noqa: E402


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_step_that_fails_hangs_or_has_no_tool_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "GRACE_S", 0.5)
    begin, late = time.monotonic(), tmp_path / "late"
    steps = [
        parts.Step("fails", python("import sys; print('so far', flush=True); sys.exit(3)"), 20),
        # it does not end when it is interrupted, nor does the process it started
        parts.Step(
            "hangs",
            [
                *python(
                    "import signal, subprocess, sys, time\n"
                    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                    "child = 'import pathlib, sys, time; time.sleep(4)'\n"
                    "child += '; pathlib.Path(sys.argv[1]).touch()'\n"
                    "subprocess.Popen([sys.executable, '-c', child, sys.argv[1]])\n"
                    "print('begun', flush=True); time.sleep(60)"
                ),
                str(late),
            ],
            1.5,
        ),
        parts.Step("lacks", python("1"), 20, tool="no-such-tool"),
        parts.Step("cannot", ["/no/such/program"], 20),
        parts.Step("works", python("import os; print(os.environ['A'])"), 20, None, {"A": "b"}),
    ]
    outcomes = session.run_part(steps, tmp_path / "out", 60)
    assert time.monotonic() - begin < 30
    time.sleep(max(0.0, begin + 7 - time.monotonic()))
    assert not late.exists()
    assert [o["outcome"] for o in outcomes] == [
        "failed",
        "out of time",
        "skipped",
        "failed",
        "done",
    ]
    assert [o["status"] for o in outcomes] == [3, -9, None, None, 0]
    assert outcomes[2]["why"] == "no-such-tool not found"
    logs = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.log")}
    assert logs["fails.log"] == "so far\n"
    assert logs["hangs.log"] == "begun\n"
    assert logs["works.log"] == "b\n"
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == outcomes


def test_an_interrupted_step_may_write_what_it_has(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "print('begun', flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('written', flush=True)"
    )
    # as in a shell's background job
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = session.run_step(parts.Step("late", python(code), 60), tmp_path, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome["outcome"] == "out of time"
    assert (tmp_path / "late.log").read_text() == "begun\nwritten\n"


def test_the_time_of_the_call_bounds_every_step(tmp_path: Path) -> None:
    steps = [parts.Step("sleeps", python("import time; time.sleep(30)"), 60)] * 2
    outcomes = session.run_part(steps, tmp_path, session.GRACE_S + 1.2)
    assert [o["outcome"] for o in outcomes] == ["out of time", "skipped"]
    assert outcomes[1]["why"] == "the time of this call was spent"


def test_a_long_log_keeps_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MOST_BYTES", 4000)
    step = parts.Step("talks", python("print('begin'); print('x\\n' * 9000); print('end')"), 20)
    session.run_step(step, tmp_path, 20)
    text = (tmp_path / "talks.log").read_text()
    assert text.startswith("begin\n")
    assert text.endswith("end\n")
    assert "bytes in all" in text
    assert len(text) < 4000


def test_main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"a": [parts.Step("talks", python("print('the last line')"), 20)]}
    monkeypatch.setattr(session, "parts", lambda out: steps)
    assert session.main(["--part", "a", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the last line" in printed
    assert printed.splitlines()[-1].startswith("talks")
    assert session.main(["--part", "b", "--out", str(tmp_path)]) == 2
    assert "one of a, got 'b'" in capsys.readouterr().err
    steps["a"].append(parts.Step("fails", python("raise SystemExit(1)"), 20))
    assert session.main(["--part", "a", "--out", str(tmp_path)]) == 1


def test_parts_fit_a_call_and_name_what_exists(tmp_path: Path) -> None:
    known = parts.parts(tmp_path)
    assert set(known) == {
        "first", "rest", "quick", "sweep", "counters", "compiled", "full-1", "full-2", "full-3",
    }  # fmt: skip
    for steps in known.values():
        assert sum(step.limit_s for step in steps) <= 540
        # a log each, the summary, and the result files
        results = sum("--out" in step.command for step in steps)
        assert len(steps) + results + 1 <= 8
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            for word in step.command:
                if word.startswith("tests/"):
                    assert (ROOT / word.partition("::")[0]).is_file(), word
            if "-m" in step.command:
                module = step.command[step.command.index("-m") + 1]
                assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_benchmarks_of_parts_take_their_arguments(tmp_path: Path) -> None:
    from bench import gpu

    for steps in parts.parts(tmp_path).values():
        for step in steps:
            if "bench.gpu" in step.command:
                at = step.command.index("bench.gpu") + 1
                args = gpu._parser().parse_args(step.command[at:])
                # the last case may run a minute past the budget
                assert 60 <= args.budget == step.limit_s - 60
                assert args.out == tmp_path
                gpu._selection(args, list(arms.ARMS))


def test_the_two_halves_of_the_quick_suite(tmp_path: Path) -> None:
    from bench import gpu

    asked = {word for half in (parts.FIRST, parts.OTHERS) for word in half.split(",")}
    assert asked == {item.workload for item in gpu.QUICK} | {"training"}


def test_a_part_ends_where_what_is_needed_is_not_done(tmp_path: Path) -> None:
    fails = parts.Step("fails", python("raise SystemExit(1)"), 20)
    after = parts.Step("after", python("pass"), 20)
    assert len(session.run_part([fails, after], tmp_path, 60)) == 2
    assert len(session.run_part([fails._replace(needed=True), after], tmp_path, 60)) == 1
    assert len(session.run_part([after._replace(needed=True), after], tmp_path, 60)) == 2


def test_tests_of_the_kernels_are_those_that_take_a_device() -> None:
    fixtures = re.compile(
        r"^(?:def test_.*|    [^#\n]*)\b(?:device: torch\.device|path: StepPath)", re.M
    )
    taking = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests").glob("test_*.py")
        if fixtures.search(path.read_text())
    }
    # a step of its own
    assert taking - {"session", "gpu"} == set(parts.KERNEL_TESTS)


def test_a_missing_xdist_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in parts._pytest(3)
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: name)
    assert parts._pytest(3)[-4:-2] == ["-n", "3"]


def test_machine() -> None:
    found = machine.record(torch.device("cpu"))
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert list(found["copy_gbps"]) == ["65536"]
    assert found["copy_gbps"]["65536"] > 0
    assert set(found["tools"]) >= {"nvidia-smi", "ncu --version"}
    assert machine._said(["no-such-tool"]) == "not found"
    assert machine._said([sys.executable, "-c", "print(1)"]) == "1"


def test_arms_by_name_and_by_tuning() -> None:
    assert one.arm_of("bngd-row") is arms.ARMS["bngd-row"]
    arm = one.arm_of("form=single-launch,slice=4096,pdl=True")
    assert arm.name == arms.label({"form": "single-launch", "slice": 4096, "pdl": True})
    with pytest.raises(ValueError, match="'frm' of Tuning"):
        one.arm_of("frm=1")
    assert one.main(["gate", "--arm", "no-such"]) == 2
    assert one.main(["no-such"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps are tried by the session itself there")
def test_one_gates_and_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one.main(["gate", "--arm", "eager", "form=single-launch"]) == 0
    assert capsys.readouterr().out.count("right") == 2
    assert one.main(["dry-run", "--arm", "eager"]) == 0
    wrong = arms.Arm("wrong", arms._bngd(eager=True, centering=0.0), "bngd")
    monkeypatch.setitem(arms.ARMS, "wrong", wrong)
    assert one.main(["gate", "--arm", "wrong"]) == 1
    assert "wrong fp32: gate" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the session does it there")
def test_warm_gates_its_share(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["--device", "cpu", "--only", "eager,torch-sgd-foreach,fp32,bf16"]
    assert warm.main([*only, "--workers", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    verdicts = [line for line in lines if line.endswith("right")]
    assert len(verdicts) == len(set(verdicts)) == 4
    assert lines[-1].endswith("[0, 0]")
    wrong = arms.Arm("eager", arms._bngd(eager=True, centering=0.0), "bngd")
    monkeypatch.setitem(arms.ARMS, "eager", wrong)
    assert warm.main([*only, "--share", "0/1"]) == 1
    assert "eager fp32: gate" in capfd.readouterr().out


# what Nsight Compute writes: its own lines, names, units, then a line for each kernel
TABLE = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum",\
"dram__bytes_write.sum","lts__t_sectors_op_read.sum","lts__t_sectors_op_read_lookup_hit.sum"
"","","","ns","byte","byte","sector","sector"
"0","1","_statistics_kernel","1,000","4000","0","100","0"
"1","1","_update_kernel","3000","12000","8000","300","100"
"""


def test_counters_are_read() -> None:
    kernels = counters.read(TABLE.splitlines())
    assert [kernel["kernel"] for kernel in kernels] == ["_statistics_kernel", "_update_kernel"]
    assert kernels[0]["ns"] == 1000
    assert kernels[0]["registers"] is None
    assert counters.summary(kernels) == {
        "dram_bytes": 24000, "dram_gbps": 6.0, "l2_read_hit_rate": 0.25, "us": 4.0,
    }  # fmt: skip
    kernels[0]["dram_write_bytes"] = None
    assert counters.summary(kernels)["dram_bytes"] is None
    with pytest.raises(ValueError, match="no kernel"):
        counters.read(["==PROF== nothing"])


def fake_ncu(folder: Path, body: str) -> str:
    tool = folder / "ncu"
    tool.write_text(f"#!{sys.executable}\nimport sys\nargv = sys.argv\n{body}\n")
    tool.chmod(0o755)
    return str(tool)


def test_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "CASES", counters.CASES[:1])
    out = ["--out", str(tmp_path / "out")]
    assert counters.main([*out, "--ncu", "no-such-ncu"]) == 1
    body = f"open(argv[argv.index('--log-file') + 1], 'w').write({TABLE!r})"
    assert counters.main([*out, "--ncu", fake_ncu(tmp_path, body)]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name.endswith("-counters.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["workload"], row["dram_bytes"], row["bytes_per_element"]) == (
        "gpt2-124m",
        24000,
        20,
    )
    assert row["dram_bytes_per_element"] == 24000 / 124_439_808
    body = "print('==ERROR== no permission', file=sys.stderr); sys.exit(4)"
    assert counters.main([*out, "--ncu", fake_ncu(tmp_path, body)]) == 1
    last = sorted((tmp_path / "out").iterdir())[0]
    assert "exit status 4: ==ERROR== no permission" in json.loads(last.read_text())["not_run"][0]
    assert counters.main([*out, "--ncu", fake_ncu(tmp_path, body), "--budget", "0"]) == 1

"""bench/: its parameter lists, its gate, and the whole measuring code on the CPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bngd_triton import BNGD, cli

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "bench" / "gpu.py").is_file():
    # at the end: the root also holds the folder `kernels`, which is not to be imported by that name
    sys.path.append(str(ROOT))
pytest.importorskip("bench.models", reason="bench/ is in the checkout only")

from bench import (  # noqa: E402
    arms,
    cases,
    cold,
    compiled,
    gate,
    gpu,
    measure,
    models,
    plot,
    report,
)  # fmt: skip

CPU = torch.device("cpu")
FP32 = arms.STORAGES["fp32"]
# on a GPU the arms are tried by `python -m bench.gpu` itself
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled where there is a GPU"
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        (models.resnet50, 161, 25_557_032),
        (models.vit_b16, 152, 86_567_656),
        (lambda: models.gpt2(768, 12), 148, 124_439_808),
        (lambda: models.gpt2(1600, 48), 580, 1_557_611_200),
        (models.llama3_8b, 291, 8_030_261_248),
        (models.moe_10k, 10_000, None),
        (models.detector, 465, 25_557_032 + 2 * 86_567_656),
    ],
    ids=["resnet50", "vit-b16", "gpt2-124m", "gpt2-1.5b", "llama3-8b", "moe-10k", "groups-465"],
)
def test_totals(shapes, tensors, elements):
    assert len(list(shapes())) == tensors
    assert elements is None or models.elements(shapes()) == elements


def test_workloads():
    assert set(models.WORKLOADS) == {
        "resnet50", "vit-b16", "gpt2-124m", "gpt2-1.5b", "llama3-8b-shard", "moe-10k",
        "many-1000x1000", "host-300", "one-2.2e9", "groups-465",
    }  # fmt: skip
    layer = (4096 * 2 + 1024 * 2) * 4096 + 3 * 4096 * 14336 + 2 * 4096
    shard = models.WORKLOADS["llama3-8b-shard"]
    assert models.elements(shard.shapes()) == 128256 * 4096 + 8 * layer
    assert models.elements(models.WORKLOADS["one-2.2e9"].shapes()) > 2**31
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(465)]
    assert len(arms.grouped(params, models.WORKLOADS["groups-465"].groups)) == 465
    named = {item for part in (gpu.QUICK, *gpu.FULL.values()) for item in part}
    assert {item.workload for item in named} == set(models.WORKLOADS)
    assert {item.dtype for item in named} == set(arms.STORAGES)


@pytest.mark.parametrize(
    ("arm", "once", "issued"),
    [
        # per label: fp32, bf16, bf16-fp32m, bf16-split
        ("bngd", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("bngd-two-launch", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("bngd-single-launch", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("bngd-pdl", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("bngd-direct", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("bngd-graph", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("bngd-row", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("compile", (20, 10, 14, 18), (24, 12, 16, 20)),
        ("eager", (20, 10, 14, 18), (None,) * 4),
        ("torch-sgd-fused", (20, 10, 14, 18), (20, 10, 14, 18)),
        ("optimi-sgd", (20, 10, 14, 18), (20, 10, 14, 18)),
        ("flashoptim-sgd", (20, 10, 14, 18), (20, 10, 14, 18)),
        ("torch-sgd-foreach", (20, 10, 14, 18), (32, 16, 26, 30)),
        ("torch-adamw-fused", (28, 14, 22, 26), (28, 14, 22, 26)),
        ("optimi-stableadamw", (28, 14, 22, 26), (36, 18, 30, 34)),
    ],
)
def test_ledger(arm, once, issued):
    storages = arms.STORAGES.values()
    assert tuple(arms.ARMS[arm].bytes_once(storage) for storage in storages) == once
    assert tuple(arms.ARMS[arm].bytes_issued(storage) for storage in storages) == issued


def test_every_arm_has_a_ledger_and_a_rule():
    assert len(arms.ARMS) == 15
    assert {arm.rule for arm in arms.ARMS.values()} == set(gate.RULES)


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
    assert path.name.startswith("cpu-")
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


def _wrong(groups, storage, lr):
    # the sign of centring is lost: what a broken kernel may do
    optimizer = BNGD(groups, lr=lr, momentum=arms.MOMENTUM, centering=0.0, fused=False)
    return arms.Stepper(optimizer.step, lambda: arms._state(optimizer))


def _nan(groups, storage, lr):
    stepper = _wrong(groups, storage, lr)
    once = stepper.step

    def step():
        once()
        for group in groups:
            for param in group["params"]:
                param.data.fill_(float("nan"))

    stepper.step = step
    return stepper


@pytest.mark.parametrize("build", [_wrong, _nan])
def test_gate_refuses_a_wrong_arm(build):
    wrong = arms.Arm("wrong", build, "bngd")
    right = arms.ARMS["eager"]
    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, [wrong, right], measure.CpuClock(),
        cases.Effort(2, 0.0, 1, ("combo",)), 1.0, 2048, None, lambda: True,
    )  # fmt: skip
    outcome = cases.run(case)
    assert [row["arm"] for row in outcome.rows] == ["eager"]
    (missing,) = outcome.unavailable
    assert missing["arm"] == "wrong"
    assert missing["reason"].startswith("gate: a tensor of shape")


@pytest.mark.parametrize("arm", ["eager", "compile", "torch-sgd-foreach", "torch-adamw-fused"])
def test_gate_passes(arm):
    gate.check(arms.ARMS[arm], FP32, CPU)


@pytest.mark.parametrize("label", arms.STORAGES)
def test_bngd_keeps_what_the_label_says(label):
    gate.check(arms.ARMS["eager"], arms.STORAGES[label], CPU)


@interpreted
@pytest.mark.parametrize("arm", ["two-launch", "single-launch", "pdl", "direct"])
def test_tuning_is_forced(arm):
    params = cases.make_set([(24, 16), (130,)], FP32, CPU)
    optimizers = []

    def noting(*args, **options):
        optimizers.append(BNGD(*args, **options))
        return optimizers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "BNGD", noting)
        stepper = arms.start(arms.ARMS[f"bngd-{arm}"], params, 1, FP32, 1e-3)
    (device,) = optimizers[0]._stepper.prepared._devices
    for name, value in stepper.tuning.items():
        assert getattr(device.plan.tuning, name) == value


def test_compile_keeps_the_fastest_variant(monkeypatch):
    monkeypatch.setattr(compiled, "chosen", "combo")
    times = iter([3.0, ValueError("does not lower"), 2.0])

    def time():
        value = next(times)
        if isinstance(value, Exception):
            raise value
        return value

    found = compiled.choose(time, list(compiled.VARIANTS))
    assert compiled.chosen == "foreach"
    assert found == {"combo": 3.0, "cooperative": "ValueError: does not lower", "foreach": 2.0}


def test_arms_that_do_not_fit_take_turns():
    shapes = [(1000, 1000)]
    some = [arms.ARMS[name] for name in ("eager", "torch-sgd-foreach", "torch-adamw-fused")]
    # 8 MB shared, then 4, 4 and 8 MB; 70 % of 24 MB hold the first two
    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, some, measure.CpuClock(),
        cases.Effort(2, 0.0, 1, ()), 1.0, 1000, 24_000_000, lambda: True,
    )  # fmt: skip
    assert [len(batch) for batch in cases.batches(some, case, shapes)] == [2, 1]


def test_no_arm_is_given_tensors_that_its_indices_cannot_reach():
    bounded = {name: a.most_entries for name, a in arms.ARMS.items() if a.most_entries is not None}
    assert bounded == dict.fromkeys(
        ("optimi-sgd", "optimi-stableadamw", "flashoptim-sgd"), 2**31 - 1
    )
    eager = arms.ARMS["eager"]
    short, long = (dataclasses.replace(eager, most_entries=n) for n in (383, 384))
    for arm, rows in ((short, 0), (long, 1)):
        case = cases.Case(
            models.DRY_RUN["dry-run"], FP32, [arm], measure.CpuClock(),
            cases.Effort(1, 0.0, 1, ()), 1.0, 2048, None, lambda: True,
        )  # fmt: skip
        outcome = cases.run(case)
        assert len(outcome.rows) == rows
        assert ["384 entries need" in m["reason"] for m in outcome.unavailable] == [True] * (
            1 - rows
        )


@pytest.mark.parametrize(
    ("size", "sets"), [(10_000, 1), (3_000, 2), (300, 2), (100, 4), (1, cases.MOST_SETS)]
)
def test_sets_outgrow_the_l2(size, sets):
    assert cases.n_sets(size, 100) == sets


class FakeClock(measure.CpuClock):
    """Every step takes what its arm says, so that figures can be foretold."""

    def __init__(self):
        self.now = 0.0

    def span(self, run, lead_us=0.0):
        before = self.now
        run()
        return self.now - before


def test_interleaving_and_quantiles():
    clock, calls = FakeClock(), []

    def step(name, us):
        calls.append(name)
        clock.now += us

    several = [
        measure.Series("a", [lambda: step("a0", 900.0), lambda: step("a1", 1100.0)], 10.0),
        measure.Series("b", [lambda: step("b", 5000.0)], 0.0),
    ]
    for series in several:
        measure.probe(series, clock, 3)
    assert several[0].estimate_us == 1000
    assert (several[0].per_window(), several[1].per_window()) == (2, 1)
    del calls[:]
    measure.interleave(several, clock, 8, lambda: True)
    # `b` may take no time at all and stops at the least number of windows
    assert [len(series.windows) for series in several] == [8, measure.LEAST_WINDOWS]
    assert set(several[0].windows) == {1000.0}
    assert calls.count("a0") == calls.count("a1") == 8
    assert measure.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert measure.quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    late = measure.Series("c", [lambda: step("c", 1.0)], 10.0)
    measure.probe(late, clock, 3)
    measure.interleave([late], clock, 100, lambda: False)
    assert len(late.windows) == measure.LEAST_WINDOWS


def test_launches_are_counted_after_all_host_times_and_never_of_a_long_step(monkeypatch):
    order = []
    monkeypatch.setattr(cases, "probe", lambda *a: order.append("host") or measure.probe(*a))
    monkeypatch.setattr(cases, "count", lambda *a: order.append("launches") or measure.count(*a))
    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, [arms.ARMS["eager"], arms.ARMS["torch-adamw-fused"]],
        measure.CpuClock(), cases.Effort(1, 0.0, 1, (), warm=False), 1.0, 2048, None, lambda: True,
    )  # fmt: skip
    outcome = cases.run(case)
    assert order == ["host", "host", "launches", "launches"]
    assert [row["warm_us"] for row in outcome.rows] == [None, None]

    class Counting(FakeClock):
        def launches(self, run):
            run()
            return 7, 1.0

    for us, launches in ((measure.MOST_COUNTED_US, 7), (measure.MOST_COUNTED_US + 1, None)):
        series = measure.Series("a", [lambda: None], 1.0, estimate_us=us)
        measure.count(series, Counting())
        assert series.launches == launches


def test_the_device_is_kept_busy_only_for_what_its_queue_holds():
    class Leads(FakeClock):
        def __init__(self):
            super().__init__()
            self.leads = []

        def span(self, run, lead_us=0.0):
            self.leads.append(lead_us)
            run()
            return 1.0

    for launches, lead in ((2, 63.0), (measure.QUEUE + 1, 0.0), (None, 0.0)):
        clock = Leads()
        several = [measure.Series("a", [lambda: None], 0.0, estimate_us=1e6, host_us=10.0)]
        several[0].launches = launches
        measure.interleave(several, clock, 1, lambda: True)
        assert clock.leads == [lead]


def test_no_variant_is_compiled_once_the_budget_is_spent():
    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, [arms.ARMS["compile"]], measure.CpuClock(),
        cases.Effort(1, 0.0, 1, ("combo", "foreach")), 1.0, 2048, None, lambda: False,
    )  # fmt: skip
    outcome = cases.run(case)
    assert outcome.rows == []
    assert outcome.unavailable[0]["reason"].count("the budget was spent") == 2


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


def test_queue_is_not_overfilled():
    many = measure.Series("a", [lambda: None], 1.0, estimate_us=1.0, launches=300)
    assert many.per_window() == measure.QUEUE // 300
    huge = measure.Series("a", [lambda: None], 1.0, estimate_us=1.0, launches=10_000)
    assert huge.per_window() == 1


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


@pytest.mark.parametrize(
    "change",
    [
        {"median_us": float("nan")}, {"host_us": None}, {"launches": 2.0}, {"arm": 1},
        {"p20_us": 3.0}, {"copy_fraction": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_schema_refuses(change):
    row = {
        "workload": "w", "dtype": "fp32", "arm": "a", "median_us": 2.0, "p20_us": 1.0,
        "p80_us": 3.0, "n": 5, "host_us": 1.0, "launches": 2, "bytes_per_element": 20,
        "gbps": 1.0, "copy_fraction": 0.5, "peak_extra_bytes": None,
    }  # fmt: skip
    rest = dict.fromkeys(("environment", "commit", "kernels_sha256", "copy_gbps"))
    report.check({"rows": [row], "unavailable": [], **rest})
    with pytest.raises(ValueError, match=r"row|quantiles"):
        report.check({"rows": [row | change], "unavailable": [], **rest})
    with pytest.raises(ValueError, match="two rows"):
        report.check({"rows": [row, row], "unavailable": [], **rest})


@pytest.mark.parametrize(
    ("gpu_name", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("cpu", "cpu")],
)
def test_slug(gpu_name, short):
    assert report.slug(gpu_name) == short


def test_cold_start_reports_a_failure():
    assert "KeyError" in cold.measure("bngd", "no-such", "cpu")["reason"]


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
        "--device", "cuda",
    ]  # fmt: skip
    assert more["cwd"] == ROOT
    assert cli.main(["bench", "--plot", str(tmp_path / "a.json")]) == 7
    assert ran[1][0][1:] == ["-m", "bench.plot", str(tmp_path / "a.json")]
    monkeypatch.setattr(cli, "_ROOT", tmp_path)
    assert cli.main(["bench"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "clone the repository" in error


def test_host_time_is_measured_without_a_device(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.host", "--tensors", "20", "--repeats", "3"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 tensors, 28 groups") == 2
    found = json.loads(out.read_text())
    assert [(row["groups"], row["gradients"]) for row in found["rows"]] == [
        (1, "kept"), (1, "new"), (28, "kept"), (28, "new"),
    ]  # fmt: skip
    for row in found["rows"]:
        assert 1 < row["ratio"] < 100
        # known to stay only where they do
        assert ("  gradients, kinds" in row) == (row["gradients"] == "kept")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_host_time_of_shards(tmp_path: Path) -> None:
    out = tmp_path / "shards.json"
    command = [sys.executable, "-m", "bench.shards", "--tensors", "8", "--repeats", "3"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["ms"]) == {"repeated", "laid out anew", "torch.optim.SGD(foreach=True)"}
    assert found["ms"]["repeated"] < found["ms"]["laid out anew"]

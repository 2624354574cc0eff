"""bench/: its parameter lists and arms."""

import pytest
import torch
from torch.nn import Parameter

from bench import arms, gate, report, run, workloads
from support.bench_folder import CPU, FP32, interpreted

LLAMA_LAYER = (4096 * 2 + 1024 * 2) * 4096 + 3 * 4096 * 14336 + 2 * 4096
# tensors and entries
TOTALS = {
    "resnet50": (161, 25_557_032),
    "vit-b16": (152, 86_567_656),
    "gpt2-124m": (148, 124_439_808),
    "gpt2-1.5b": (580, 1_557_611_200),
    "llama3-8b-shard": (73, 128256 * 4096 + 8 * LLAMA_LAYER),
    "groups-465": (465, 25_557_032 + 2 * 86_567_656),
}


def test_totals():
    shapes = {name: list(each.shapes()) for name, each in workloads.WORKLOADS.items()}
    found = {name: (len(shapes[name]), workloads.elements(shapes[name])) for name in TOTALS}
    assert found == TOTALS
    assert len(list(workloads.llama3_8b())) == 291
    assert workloads.elements(workloads.llama3_8b()) == 8_030_261_248
    assert len(shapes["moe-10k"]) == 10_000
    assert workloads.elements(shapes["one-2.2e9"]) > 2**31
    assert {workload for workload, _ in run.QUICK} < set(workloads.WORKLOADS)
    assert {dtype for _, dtype in run.QUICK} == set(arms.STORAGES)


# bytes per element for each label: fp32, bf16, bf16-fp32m, bf16-split
ONCE = dict.fromkeys(arms.ARMS, (20, 10, 14, 18)) | dict.fromkeys(
    ("torch-adamw-fused", "optimi-stableadamw"), (28, 14, 22, 26)
)
ISSUED = {
    **ONCE,
    **dict.fromkeys(("bngd", "bngd-row", "bngd-global", "compile"), (24, 12, 16, 20)),
    "bngd-eager": (None,) * 4,
    "torch-sgd-foreach": (32, 16, 26, 30),
    "optimi-stableadamw": (36, 18, 30, 34),
}


def test_every_arm_has_a_ledger_and_a_rule():
    every, storages = arms.ARMS.values(), arms.STORAGES.values()
    assert {arm.name: tuple(map(arm.bytes_once, storages)) for arm in every} == ONCE
    assert {arm.name: tuple(map(arm.bytes_issued, storages)) for arm in every} == ISSUED
    assert len(every) == 11
    assert {arm.rule for arm in every} == set(gate.RULES)


@interpreted
def test_a_tuning_is_that_of_the_first_step_and_stays(monkeypatch):
    made = []
    build = arms.ARMS["bngd"].build
    noting = arms.replace(
        arms.tuned("bngd", {"form": "single-launch", "span": 32768}),
        build=lambda *args: made.append(build(*args)) or made[-1],
    )
    params = run.make_params(workloads.DRY_RUN["dry-run"], FP32, CPU)
    step = arms.start(noting, params, 1, FP32, 1e-3)
    step()
    (prepared,) = made[0]._stepper.prepared
    assert prepared.plan.tuning.form == "single-launch"
    assert prepared.plan.tuning.span == 32768
    assert noting.name == "bngd:form=single-launch,span=32768"


def test_an_arm_with_32_bit_indices_is_left_out_before_it_reads_other_memory():
    params = [Parameter(torch.zeros(3))]
    arm = arms.replace(arms.ARMS["torch-sgd-foreach"], most_entries=2)
    with pytest.raises(arms.UnavailableError, match="32-bit"):
        arms.start(arm, params, 1, FP32, 1.0)


def test_files_of_a_day_stand_side_by_side(tmp_path):
    assert report.slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"
    names = []
    for _ in range(3):
        results = report.Results(tmp_path, CPU, "quick")
        results.save()
        names.append(results.path.name)
    day = names[0].removeprefix("cpu-").removesuffix(".json")
    assert names == [f"cpu-{day}{end}.json" for end in ("", "-2", "-3")]

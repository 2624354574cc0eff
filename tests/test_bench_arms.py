"""bench/: its parameter lists and arms, and which of them are timed together."""

import contextlib
import dataclasses

import pytest
import torch
from benching import CPU, FP32, interpreted

from bench import arms, cases, compiled, gate, gpu, measure, models, predictions
from bngd_triton import BNGD


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
        ("bngd-global", (20, 10, 14, 18), (24, 12, 16, 20)),
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
    assert len(arms.ARMS) == 16
    assert {arm.rule for arm in arms.ARMS.values()} == set(gate.RULES)


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


def _laid_out_anew(after):
    """A tuned arm whose parameters move after so many steps."""
    tuned = arms.tuned({"slice": 32768})

    def build(groups, storage, lr):
        stepper = tuned.build(groups, storage, lr)
        once, taken = stepper.step, 0

        def step():
            nonlocal taken
            if taken == after:
                for param in groups[0]["params"]:
                    param.data = param.data.clone()
            taken += 1
            once()

        stepper.step = step
        return stepper

    return dataclasses.replace(tuned, build=build)


@interpreted
@pytest.mark.parametrize("after", [1, 2, 1000])
def test_a_tuning_that_is_lost_is_not_timed(after):
    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, [_laid_out_anew(after)], measure.CpuClock(),
        cases.Effort(2, 0.0, 1), 1.0, 2048, None, lambda: True,
    )  # fmt: skip
    outcome = cases.run(case)
    usual = arms.prepared.tuning_for(CPU).slice
    lost = [] if after == 1000 else [f"stepped with slice={usual}, not slice=32768"]
    assert [missing["reason"] for missing in outcome.unavailable] == lost
    assert len(outcome.rows) == 1 - len(lost)
    if after == 1:
        with pytest.raises(arms.UnavailableError, match="stepped with"):
            gate.check(_laid_out_anew(after), FP32, CPU)


@interpreted
def test_a_tuning_that_never_was_is_found(monkeypatch):
    # as if the plan had its sizes from elsewhere
    monkeypatch.setattr(arms.mock.patch, "object", lambda *_: contextlib.nullcontext())
    with pytest.raises(arms.UnavailableError, match="not form=single-launch"):
        arms.start(
            arms.ARMS["bngd-single-launch"], cases.make_set([(24, 16)], FP32, CPU), 1, FP32, 1.0
        )


def test_global_granularity_reads_every_gradient_twice():
    told = {
        arm: predictions.predict("many-1000x1000", "fp32", arm, 4000.0)
        for arm in ("bngd", "bngd-global")
    }
    # a launch more, and 4 bytes of a million elements at 0.94 of the bandwidth
    assert told["bngd-global"] - told["bngd"] == pytest.approx(3 + 4e6 / (0.94 * 4e6))


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


def test_no_variant_is_compiled_once_the_budget_is_spent():
    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, [arms.ARMS["compile"]], measure.CpuClock(),
        cases.Effort(1, 0.0, 1, ("combo", "foreach")), 1.0, 2048, None, lambda: False,
    )  # fmt: skip
    outcome = cases.run(case)
    assert outcome.rows == []
    assert outcome.unavailable[0]["reason"].count("the budget was spent") == 2

"""bench/gate.py: right arms pass, wrong ones are not timed."""

import contextlib
import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from bench import arms, gate, run, workloads
from bngd_triton.kernels import build_plan
from bngd_triton.kernels.devices import TABLE
from bngd_triton.kernels.plan import Entry
from bngd_triton.kernels.work import CHUNK_ITEM
from bngd_triton.records import new_record, slices_of
from support.bench_folder import CPU, FP32


def _nan(number, params, once):
    once()
    for param in params:
        param.data.fill_(float("nan"))


def _wrapped(around):
    """BNGD whose every step, numbered from 0, goes through `around(number, params, once)`."""

    def build(groups, storage, lr):
        optimizer = arms.ARMS["bngd-eager"].build(groups, storage, lr)
        once, taken = optimizer.step, itertools.count()
        params = [param for group in groups for param in group["params"]]
        optimizer.step = lambda: around(next(taken), params, once)
        return optimizer

    return build


@pytest.mark.parametrize("build", [arms._bngd(eager=True, centering=0.0), _wrapped(_nan)])
def test_a_wrong_arm_gets_a_reason_and_no_time(build):
    document = {"rows": [], "unavailable": [], "copy_gbps": 1.0}
    for arm in (arms.Arm("wrong", build, "bngd"), arms.ARMS["bngd-eager"]):
        run._one(document, workloads.DRY_RUN["dry-run"], "fp32", arm, CPU)
    assert [row["arm"] for row in document["rows"]] == ["bngd-eager"]
    (missing,) = document["unavailable"]
    assert missing["arm"] == "wrong"
    assert missing["reason"].startswith("gate: a tensor of shape")


def test_an_arm_is_gated_until_it_is_right_once_for_each_storage(monkeypatch):
    asked = []
    failures = iter([True])

    def check(arm, storage, device):
        asked.append(storage.label)
        if next(failures, False):
            raise arms.UnavailableError("no memory just now")

    monkeypatch.setattr(gate, "check", check)
    run._gate.cache_clear()
    document = {"rows": [], "unavailable": [], "copy_gbps": 1.0}
    for dtype, rows in (("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 3)):
        dry = workloads.DRY_RUN["dry-run"]
        run._one(document, dry, dtype, arms.ARMS["bngd-eager"], CPU)
        assert len(document["rows"]) == rows
    assert asked == ["fp32", "fp32", "bf16"]
    run._gate.cache_clear()


@pytest.mark.parametrize(
    ("arm", "label"),
    [(arm, "fp32") for arm in ("compile", "torch-sgd-foreach", "torch-adamw-fused")]
    + [("bngd-eager", label) for label in arms.STORAGES],
)
def test_a_right_arm_passes(arm, label):
    gate.check(arms.ARMS[arm], arms.STORAGES[label], CPU)


def _only_first(number, params, once):
    # a counter that is not reset
    if number == 0:
        once()


def _twice_the_first_gradients(number, params, once):
    if number == 0:
        for param in params:
            param.first = param.grad.clone()
    for param in params:
        param.grad.copy_(param.first)
    once()


def _last_slice_is_not_moved(number, params, once):
    before = params[-1].detach().clone()
    once()
    with torch.no_grad():
        params[-1].flatten()[-1000:] = before.flatten()[-1000:]


def _own(standardize, *, forgets=False):
    """BNGD by the formula, but for what is wrong with it."""

    def build(groups, storage, lr):
        params = [param for group in groups for param in group["params"]]
        momenta = [torch.zeros_like(param) for param in params]

        @torch.no_grad()
        def step():
            for param, momentum in zip(params, momenta):
                ghat = standardize(param.grad.double()).to(momentum.dtype)
                kept = 0.0 if forgets else arms.MOMENTUM
                momentum.mul_(kept).add_(ghat, alpha=1 - arms.MOMENTUM)
                param.sub_(momentum, alpha=lr)

        state = {param: {"momentum": momentum} for param, momentum in zip(params, momenta)}
        return SimpleNamespace(param_groups=groups, step=step, state=state)

    return build


def _standardize(grad, share=1.0):
    """By the statistics of the first part of the entries, if there are many."""
    part = grad if grad.numel() < 10_000 else grad.flatten()[: math.ceil(share * grad.numel())]
    mean = part.mean() if grad.dim() > 1 else 0.0
    return (grad - mean) / ((part - mean).square().mean().sqrt() + 1e-8)


def checked(made, rule, reason):
    """The gate passes an arm, or says why not."""
    arm = arms.Arm("arm", made, rule, 2 if rule == "adam" else 1)
    refused = contextlib.nullcontext()
    if reason is not None:
        escaped = reason.replace("(", r"\(").replace(")", r"\)")
        refused = pytest.raises(arms.UnavailableError, match=escaped)
    with refused:
        gate.check(arm, FP32, CPU)


@pytest.mark.parametrize(
    ("made", "rule", "reason"),
    [
        (_own(_standardize), "bngd", None),
        (_own(_standardize, forgets=True), "bngd", "(48, 32) is off by .* after 2 steps"),
        (_own(functools.partial(_standardize, share=0.98)), "bngd", "(3, 40003) is off"),
        (_wrapped(_only_first), "bngd", "after 2 steps"),
        (_wrapped(_twice_the_first_gradients), "bngd", "after 2 steps"),
        (_wrapped(_last_slice_is_not_moved), "bngd", "(3, 40003) is off by .* after 1 step"),
        (arms._torch("SGD", momentum=0.9, dampening=0.9), "sgd", "after 2 steps"),
        (arms._torch("SGD", momentum=0.0), "sgd", "keeps nothing"),
        (arms._torch("AdamW", weight_decay=0.0, betas=(0.9, 0.99)), "adam", "after 2 steps"),
        (arms._bngd(eager=True), "bngd-global", "after 1 step"),
        (arms._bngd(eager=True, granularity="global"), "bngd-global", None),
        (arms._bngd(eager=True, granularity="row"), "bngd-row", None),
    ],
)  # fmt: skip
def test_gate_takes_a_second_step_and_reaches_every_slice(made, rule, reason):
    checked(made, rule, reason)


@pytest.mark.parametrize("shape", sorted(set(gate.LARGE)), ids=str)
def test_a_slice_is_missed_in_a_large_tensor(shape, monkeypatch):
    monkeypatch.setattr(gate, "SHAPES", (shape,))
    for share, reason in ((1.0, None), (0.999, "after 1 step")):
        checked(_own(functools.partial(_standardize, share=share)), "bngd", reason)


def _plan(tuning, storage, granularity, device):
    entries = []
    for shape in gate.shapes_for(torch.device(device)):
        # only sizes and addresses are looked at
        tensor = torch.empty(shape, dtype=storage.param)
        rows = slices_of(tensor.shape, granularity)
        record = new_record(rows, CPU)
        entries.append(Entry(tensor, tensor, tensor, record, 0, rows, len(shape) > 1, None))
    return build_plan.build(entries, tuning)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("label", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_a_gpu_merges_many_slices_and_waits_for_waves(architecture, label, granularity):
    tuning = TABLE[architecture].tuning
    batches = _plan(tuning, arms.STORAGES[label], granularity, "cuda").batches
    waves = []
    for batch in batches:
        # rows of 40 003 where they are slices; else 1 200 000 entries
        assert batch.spans[:, -1].bincount().max() > (64 if batch.kind.aligned else 2)
        assert batch.chunks[:, -1].bincount().max() > 2
        assert len(batch.tiles)
        kinds = batch.work(tuning).items[:, 0].unique_consecutive()
        # S(w0) T S(w1) U(w0) S(w2) U(w1) U(w2): the chunks of the last two waves are neighbours
        waves.append(1 + int((kinds == CHUNK_ITEM).sum()))
    assert max(waves) >= 3
    assert {batch.kind.aligned for batch in batches} == {True, granularity != "row"}


def test_the_interpreter_merges_slices_and_moves_chunks_too():
    for batch in _plan(TABLE["interpreter"].tuning, FP32, "tensor", "cpu").batches:
        assert all(max(table[:, -1].bincount()) > 1 for table in (batch.spans, batch.chunks))

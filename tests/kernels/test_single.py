"""The single-launch step against the two-launch step, bit for bit, and the order of its work."""

import dataclasses
import itertools

import pytest
import torch

from bngd_triton.kernels import fused_step_, launch
from bngd_triton.kernels.build_plan import build
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.kernels.tables import CHUNK_ITEM, SPAN_ITEM
from bngd_triton.options import Options
from bngd_triton.records import skipped_slices
from bngd_triton.verify.oracle import oracle_step
from bngd_triton.verify.tolerances import step_bounds
from support.closeness import assert_within
from support.handmade_plans import entry, inputs, member
from support.kernel_cases import LANES, LR, OPTIONS, TILES, assert_guards, make
from support.twins import SINGLE, Twins, random_tensors


# one form of the statistics with each: what becomes of them is the same code
@pytest.mark.parametrize(
    ("options", "tuning"),
    [
        pytest.param(*case.values, tuning, id=f"{case.id}, {('tiles', 'lanes')[tuning.wide]}")
        for case, tuning in zip(OPTIONS, itertools.cycle((LANES, TILES)))
    ],
)
def test_same_bits_as_two_launches(options, tuning, device):
    shapes = [(1,), (17,), (500,), (), (5, 8), (2, 300)]
    twins = Twins(random_tensors(shapes, device), Options(LR, **options), tuning, programs=5)
    assert launch.form_for(twins.plan) == "single-launch"
    twins.step()


@pytest.mark.parametrize(
    ("programs", "granularity", "dtype"),
    [
        (1, "row", torch.bfloat16),
        (2, "tensor", torch.float32),
        (5, "global", torch.float32),
        (5, "row", torch.bfloat16),
        (9, "tensor", torch.float32),
        (9, "global", torch.float32),
    ],
)
def test_several_steps_with_any_number_of_programs(programs, granularity, dtype, device):
    """Tiles, slices of one span and of many; counters are left as the next step wants them."""
    tensors = random_tensors([(901,), (5, 16), (2, 304), (40,)], device, dtype)
    tensors += [(p[1:], g[1:], m[1:]) for p, g, m in random_tensors([(400,)], device, dtype)]
    options = Options(LR, granularity=granularity, nesterov=True, weight_decay=0.1)
    # in one batch, so that a global group does not take two launches
    if granularity == "global":
        tensors = tensors[:-1]
    twins = Twins(tensors, options, LANES, programs)
    assert launch.form_for(twins.plan) == "single-launch"
    if granularity != "global":
        assert [batch.kind.aligned for batch in twins.plan.batches] == [True, False]
    for _ in range(2):
        twins.new_gradients()
        twins.step()


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_nonfinite(nonfinite, tuning, device):
    """A skipped slice raises its flag too; a tile, a long and a short slice are skipped."""
    tensors = random_tensors([(1001,), (300,), (16,), (1200,)], device)
    for _, grad, _ in tensors[:3]:
        grad[7] = torch.nan
    twins = Twins(tensors, Options(LR, nonfinite=nonfinite), tuning, programs=2)
    twins.step()
    assert int(skipped_slices(twins.steps[1][0])) == (3 if nonfinite == "skip" else 0)


@pytest.mark.parametrize(
    ("shapes", "kinds"),
    [
        ([(16,), (32,), (8, 4)], set()),
        ([(1500,), (901,)], {SPAN_ITEM, CHUNK_ITEM}),
        ([(7,)], {SPAN_ITEM, CHUNK_ITEM}),
    ],
    ids=["tiles only", "spans only", "one item of each"],
)
def test_kinds_of_work(shapes, kinds, device):
    twins = Twins(random_tensors(shapes, device), Options(LR), LANES, programs=5)
    (batch,) = twins.plan.batches
    assert set(batch.work(twins.plan.tuning).items[:, 0].tolist()) == kinds
    twins.step()


def plan_of(tensors, tuning):
    return build([entry(t, t) for t in tensors], tuning)


def test_order_of_the_work(device):
    """A wave's spans, the next one's, then its chunks; within a slice the newest chunk first."""
    tuning = dataclasses.replace(LANES, wave=800)
    (batch,) = plan_of([torch.randn(16, device=device)], tuning).batches
    # of tensors: slice and entries. The tensors of a global group, slice 5, are apart; slice 9 is
    # longer than a wave of 200 float32, which leaves numbers out
    tensors = [(5, 100), (6, 150), (5, 30), (7, 200), (8, 50), (9, 300), (10, 40), (10, 90)]
    pieces = [
        (tensor, start, min(100, n - start), index)
        for tensor, (index, n) in enumerate(tensors)
        for start in range(0, n, 100)
    ]
    spans = [(*piece[:3], place, piece[3]) for place, piece in enumerate(pieces)]
    batch.spans, batch.chunks = (torch.tensor(rows, device=device) for rows in (spans, pieces))
    work = batch.work(tuning)
    assert batch.work(tuning) is work
    spans_done = [row[1:] for row in work.items.tolist() if row[0] == SPAN_ITEM]
    chunks_done = [row[1:5] for row in work.items.tolist() if row[0] == CHUNK_ITEM]
    assert sorted(spans_done) == batch.spans.tolist()
    assert sorted(chunks_done) == batch.chunks.tolist()
    # span or chunk, tensor, start
    assert [f"{'SU'[kind]}{at}+{start}" for kind, at, start, *_ in work.items.tolist()] == [
        "S0+0", "S2+0", "S1+0", "S1+100",
        "S3+0", "S3+100",
        "U2+0", "U0+0", "U1+100", "U1+0",
        "S4+0", "S5+0", "S5+100", "S5+200",
        "U3+100", "U3+0",
        "S6+0", "S7+0",
        "U4+0", "U5+200", "U5+100", "U5+0",
        "U7+0", "U6+0",
    ]  # fmt: skip
    assert (work.first_slice, len(work.counters)) == (5, 1 + 6)


SINGLE_LAUNCH = dataclasses.replace(LANES, form="single-launch")
KERNELS = {"two-launch": ["statistics"] * 2 + ["update"] * 2, "single-launch": ["single"] * 2}


def test_which_form_runs(device, launched):
    grads = [torch.randn(500, device=device), torch.randn(500, device=device).bfloat16()]
    params = [grad.clone() for grad in grads]
    two, one = launch.FORMS
    for sizes, form, expected in (
        ({}, None, two),
        ({"form": one}, None, one),
        ({}, one, one),
        ({"form": one}, two, two),
        # 500 float32 and 500 bfloat16 are 3000 bytes
        ({"single_to": 3000}, None, two),
        ({"single_to": 3001}, None, one),
        ({"single_from": 3000, "single_to": 9999}, None, one),
        ({"single_from": 3001, "single_to": 9999}, None, two),
        ({"single_to": 3001}, two, two),
        ({"single_to": 3001, "form": two}, None, two),
    ):
        plan = plan_of(params, dataclasses.replace(LANES, **sizes))
        plan.point_at([grad.data_ptr() for grad in grads])
        launched.clear()
        launch.update(plan, inputs(device, Options(LR, momentum=0.0)), form)
        assert launched == [f"_{word}_kernel" for word in KERNELS[expected]], (sizes, form)


def test_no_flag_is_trusted_that_is_raised_too_early(device, monkeypatch):
    """Where releases do not wait: refused by name if asked for, never chosen, nothing moved."""
    monkeypatch.setattr(launch, "releases_wait", lambda device: False)
    param = torch.randn(500, device=device)
    before, grad = param.clone(), torch.randn_like(param)
    asked = {"lr": LR, "momentum": 0.0, "tuning": SINGLE_LAUNCH}
    with pytest.raises(RuntimeError, match=r"'single-launch' needs Triton 3\.9 .*; got Triton 3"):
        fused_step_([param], [grad], None, **asked)
    assert torch.equal(param, before)
    with pytest.raises(RuntimeError, match="'single-launch' needs"):
        launch.form_for(plan_of([param], LANES), "single-launch")
    with pytest.raises(ValueError, match="must be one of two-launch, single-launch, got 'three'"):
        launch.form_for(plan_of([param], LANES), "three")
    chosen = dataclasses.replace(LANES, single_to=1 << 30)
    assert launch.form_for(plan_of([param], chosen)) == "two-launch"
    assert launch.form_for(plan_of([param], SINGLE_LAUNCH), "two-launch") == "two-launch"
    # sharded steps never take one launch
    FusedStep([member(param, grad, None)], [Options(LR)], SINGLE_LAUNCH, sharded=True)


@pytest.mark.parametrize("form", launch.FORMS)
def test_a_global_group_across_dtypes_takes_two_launches(form, device, launched):
    params = [torch.randn(700, device=device), torch.randn(900, device=device).bfloat16()]
    grads = [torch.randn_like(param) * 3 + 1 for param in params]
    before = [param.double().cpu() for param in params]
    options = {"lr": LR, "momentum": 0.0, "granularity": "global"}
    want, _ = oracle_step(params, grads, [None, None], **options)
    fused_step_(params, grads, None, tuning=dataclasses.replace(LANES, form=form), **options)
    assert launched == [f"_{word}_kernel" for word in KERNELS["two-launch"]]
    for got, old, end in zip(params, before, want):
        bound, _ = step_bounds(old, end, torch.zeros_like(end), got.dtype, LR, False)
        assert_within("parameter", got, end, bound)


def test_nothing_outside_is_touched(device):
    shapes = [(1,), (271,), (272,), (1009,), (70, 16), (3, 0)]
    params, grads, buffers, guarded = make(torch.float32, torch.float32, device, shapes)
    tuning = dataclasses.replace(LANES, **SINGLE)
    fused_step_(params, grads, buffers, lr=LR, tuning=tuning)
    assert_guards(guarded)
    fused_step_([], [], [], lr=LR, tuning=tuning)

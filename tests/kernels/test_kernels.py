"""The kernels against the eager reference, and both against float64."""

import functools

import pytest
import torch

from bngd_triton import reference
from bngd_triton.kernels import fused_step_
from bngd_triton.kernels.device import measure, update
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.options import Options
from bngd_triton.verify.oracle import oracle_step
from bngd_triton.verify.tolerances import step_bounds
from support.closeness import assert_within
from support.exact_runs import assert_bits, exact_gradient
from support.handmade_plans import member, nothing_new
from support.kernel_cases import FEW, LANES, LR, OPTIONS, SHAPES, TILES, assert_guards, make


def check_step(options, tuning, tensors):
    """How many slices reference and kernels skip in a step that is right."""
    params, grads, buffers = tensors
    before = [param.double().cpu() for param in params]
    eager = [param.clone() for param in params], [buffer.clone() for buffer in buffers]
    want, want_buffers = oracle_step(params, grads, buffers, lr=LR, **options)
    skipped = [
        reference.step_(eager[0], grads, eager[1], lr=LR, **options),
        fused_step_(params, grads, buffers, lr=LR, tuning=tuning, **options),
    ]
    for count in skipped:
        assert (count.dtype, count.shape, count.device) == (torch.int64, (), params[0].device)
    cdf = options.get("normalizer") == "cdf"
    for i, param in enumerate(params):
        ends = want[i].nan_to_num(), want_buffers[i].nan_to_num()
        theta, momentum = step_bounds(before[i], *ends, param.dtype, LR, cdf)
        for name, got, got_buffer in (
            ("reference", eager[0][i], eager[1][i]), ("kernels", param, buffers[i]),
        ):  # fmt: skip
            shape = tuple(param.shape)
            assert_within(f"{name}, momentum {shape}", got_buffer, want_buffers[i], momentum)
            assert_within(f"{name}, parameter {shape}", got, want[i], theta)
    return list(map(int, skipped))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_float32_step(options, tuning, device):
    everywhere = options in ({}, {"momentum": 0.0}, {"granularity": "row"})
    shapes = SHAPES if everywhere else FEW
    *tensors, guarded = make(torch.float32, torch.float32, device, shapes)
    check_step(options, tuning, tensors)
    assert_guards(guarded)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=["bf16", "fp16", "bf16 with fp32 gradients", "fp32 with bf16 gradients"],
)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_other_dtypes(dtype, grad_dtype, granularity, device):
    *tensors, guarded = make(dtype, grad_dtype, device, FEW)
    check_step({"granularity": granularity, "weight_decay": 0.1}, LANES, tensors)
    assert_guards(guarded)


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_statistics_give_the_same_bits(granularity, tuning, dtype, device):
    """As the reference's; of centring in part no factor but the deviation is a power of two."""
    options = {"nesterov": True, "weight_decay": 0.1, "centering": 0.7}
    shapes = [(1,), (2,), (18,), (130,), (1010,), (), (6, 8), (3, 272), (2, 3, 4, 5)]
    params, _, buffers, _ = make(dtype, dtype, device, shapes)
    grads = [exact_gradient(param, 3).to(dtype) for param in params]
    runs = []
    for step_ in (reference.step_, functools.partial(fused_step_, tuning=tuning)):
        moved, momenta = [p.clone() for p in params], [m.clone() for m in buffers]
        step_(moved, grads, momenta, lr=LR, granularity=granularity, **options)
        runs.append([*moved, *momenta])
    assert_bits(*runs)


@pytest.mark.parametrize("granularity", ["tensor", "global"])
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_order_of_arrival_does_not_change_a_bit(tuning, granularity, device):
    """One slice over both tensors, or two whose spans arrive interleaved."""
    grads = [torch.randn(n, device=device) for n in (700, 301)]
    options = Options(LR, granularity=granularity, center_1d=True)
    found = []
    for seed in (None, 1, 2):
        params = [torch.zeros_like(grad) for grad in grads]
        members = [member(p, g, torch.zeros_like(p)) for p, g in zip(params, grads)]
        prepared = FusedStep(members, [options], tuning)
        (batch,) = prepared.plan.batches
        if seed is not None:
            torch.manual_seed(seed)
            batch.spans = batch.spans[torch.randperm(len(batch.spans))]
            batch.chunks = batch.chunks[torch.randperm(len(batch.chunks))]
        for _ in range(2):
            prepared.update(members, [options], nothing_new(device))
        done = prepared.plan
        assert not done.arrived.any(), "counters are left at zero"
        # float64, in which a sum shows its order
        found.append(torch.cat([*params, *(m.record.nan_to_num().flatten() for m in members)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_updates_start_where_the_statistics_ended(device, monkeypatch):
    """Programs start in the order of their numbers: what was read last is still in L2."""
    if device.type != "cpu":
        pytest.skip("compiled programs cannot be watched")
    tensors = [torch.randn(n, device=device) for n in (700, 301)]
    members = [member(t, t.clone(), torch.zeros_like(t)) for t in tensors]
    prepared = FusedStep(members, [Options(LR)], LANES)
    (batch,) = prepared.plan.batches

    def watch(module, name, table):
        seen = []
        do = getattr(module, name)

        def noting(row, *args):
            at = (row.handle.data.item() - table.data_ptr()) // table[0].nbytes
            seen.append(table[at, :3].tolist())
            return do(row, *args)

        monkeypatch.setattr(module, name, noting)
        return seen

    measured = watch(measure, "measure_span", batch.spans)
    moved = watch(update, "update_chunk", batch.chunks)
    prepared.update(members, [Options(LR)], nothing_new(device))
    assert [start for _, start, _ in measured] == [*range(0, 700, 128), 0, 128, 256]
    # tensor, first element, elements
    assert moved == [[1, 256, 45], [1, 0, 256], [0, 512, 188], [0, 256, 256], [0, 0, 256]]


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize(
    ("value", "tuning"),
    [
        pytest.param(torch.inf, LANES, id="inf, lanes"),
        pytest.param(-torch.inf, TILES, id="-inf, tiles"),
        pytest.param(torch.nan, LANES, id="nan, lanes"),
        pytest.param(torch.nan, TILES, id="nan, tiles"),
    ],
)
def test_nonfinite(granularity, nonfinite, value, tuning, device):
    """In a tile, in the last entries of a slice, and in one of many spans."""
    shapes = [(5, 20), (2, 300), (1001,), (40,), (3, 7)]
    params, grads, buffers, _ = make(torch.float32, torch.float32, device, shapes)
    grads[0][1, 3] = grads[1][1, 299] = grads[2][500] = value
    options = {"granularity": granularity, "nonfinite": nonfinite, "weight_decay": 0.1}
    row = params[0][1].clone()
    expected = {"tensor": 3, "row": 3, "global": 1}[granularity] if nonfinite == "skip" else 0
    assert check_step(options, tuning, [params, grads, buffers]) == [expected, expected]
    if nonfinite == "skip" and granularity == "row":
        assert torch.equal(params[0][1], row), "bits, not only values"


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_nan_among_equal_entries(nonfinite, tuning, device):
    """Equal but for a NaN, which an extreme drops: zeros where units are dead, for instance."""
    grads = [torch.full((n,), value, device=device) for n in (3, 40, 300) for value in (0.0, 2.0)]
    grads += [grad.clone() for grad in grads]
    for i, grad in enumerate(grads):
        grad[0 if i < len(grads) // 2 else -1] = torch.nan
    params = [torch.ones_like(grad) for grad in grads]
    options = {"lr": LR, "momentum": 0.0, "nonfinite": nonfinite, "tuning": tuning}
    skipped = int(fused_step_(params, grads, None, **options))
    assert skipped == (len(grads) if nonfinite == "skip" else 0)
    for param in params:
        assert (param == 1 if nonfinite == "skip" else param.isnan()).all()

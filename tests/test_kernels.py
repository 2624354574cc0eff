"""The kernels against the eager reference, and both against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from closeness import assert_close
from paths import StepPath
from torch import Tensor
from work import entry, inputs, member, nothing_new

from bngd_triton import BNGD, reference
from bngd_triton.folds import Fold, fold_moments
from bngd_triton.kernels import Tuning, fused_step_, launch, plan, statistics, update
from bngd_triton.kernels import prepared as prepared_module
from bngd_triton.kernels.prepared import FusedStep
from bngd_triton.kernels.update import store_as
from bngd_triton.members import Member, new_record
from bngd_triton.moments import Moments
from bngd_triton.options import Options
from bngd_triton.oracle import oracle_step
from bngd_triton.tolerances import GHAT, THETA, step_bounds

# small work items, so that small tensors have several slices, chunks and merges;
# rows up to 256 + 15 entries are tiles
SMALL = {
    "block": 32,
    "unroll": 2,
    "slice": 128,
    "merge": 4,
    "update_block": 64,
    "chunk": 256,
    "tile": 256,
}
LANES = Tuning(wide=True, **SMALL)
TILES = Tuning(wide=False, **SMALL)

# around the tile's 256 + 15, the slice, the 16-entry granule; primes; rows of all three kinds
SHAPES = [
    (0,), (1,), (2,), (3,), (15,), (16,), (17,), (31,), (127,), (128,), (129,), (255,), (256,),
    (257,), (271,), (272,), (1009,), (),
    (1, 1), (3, 0), (5, 7), (4, 16), (70, 16), (3, 271), (3, 272), (2, 300), (2, 3, 4, 5),
]  # fmt: skip

# one of each kind, for options that do not change which memory is walked
FEW = [(1,), (17,), (128,), (257,), (1009,), (), (5, 7), (4, 16), (3, 272), (2, 3, 4, 5)]

OPTIONS = [
    pytest.param({}, id="defaults"),
    pytest.param({"momentum": 0.0}, id="no momentum"),
    pytest.param({"nesterov": True}, id="nesterov"),
    pytest.param({"weight_decay": 0.1}, id="weight decay"),
    pytest.param({"maximize": True}, id="maximize"),
    pytest.param({"eps": 0.0}, id="eps 0"),
    pytest.param({"eps": 0.1}, id="large eps"),
    pytest.param({"centering": 0.0}, id="RMS normalisation"),
    pytest.param({"centering": 0.3, "center_1d": True}, id="partial centring"),
    pytest.param({"granularity": "row"}, id="rows"),
    pytest.param({"granularity": "row", "center_1d": True, "nesterov": True}, id="rows, centred"),
    pytest.param({"granularity": "global"}, id="global"),
    pytest.param({"normalizer": "cdf"}, id="cdf"),
    pytest.param({"normalizer": "cdf", "granularity": "row", "weight_decay": 0.1}, id="cdf, rows"),
]
LR = 1e-2


def make(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    shapes: list[tuple[int, ...]],
) -> Any:
    """Parameters, gradients and momentum inside larger buffers whose rest must not matter.

    A read outside a gradient gives NaN; a write outside a parameter changes a guard.
    """
    guarded: list[tuple[Tensor, int]] = []

    def inside(values: Tensor, guard: float) -> Tensor:
        whole = torch.full((values.numel() + 64,), guard, dtype=values.dtype, device=device)
        whole[32 : 32 + values.numel()] = values.flatten().to(device)
        guarded.append((whole, values.numel()))
        return whole[32 : 32 + values.numel()].view(values.shape)

    params = [inside(torch.randn(shape).to(dtype), 77.0) for shape in shapes]
    grads = [
        inside((torch.randn(shape) * 1e-3 + 5e-4).to(grad_dtype), torch.nan) for shape in shapes
    ]
    buffers = [inside(torch.randn(shape), 77.0) for shape in shapes]
    return params, grads, buffers, guarded


def assert_guards(guarded: list[tuple[Tensor, int]]) -> None:
    for whole, n in guarded:
        outside = torch.cat([whole[:32], whole[32 + n :]])
        assert ((outside == 77) | outside.isnan()).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_float32_step(options: dict[str, Any], tuning: Tuning, device: torch.device) -> None:
    everywhere = options in ({}, {"momentum": 0.0}, {"granularity": "row"})
    shapes = SHAPES if everywhere else FEW
    check_step(options, tuning, torch.float32, torch.float32, device, shapes)


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
def test_other_dtypes(
    dtype: torch.dtype, grad_dtype: torch.dtype, granularity: str, device: torch.device
) -> None:
    options = {"granularity": granularity, "weight_decay": 0.1}
    check_step(options, LANES, dtype, grad_dtype, device, FEW)


def check_step(
    options: dict[str, Any],
    tuning: Tuning,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    shapes: list[tuple[int, ...]],
) -> None:
    params, grads, buffers, guarded = make(dtype, grad_dtype, device, shapes)
    before = [param.double().cpu() for param in params]
    eager = [param.clone() for param in params], [buffer.clone() for buffer in buffers]
    want, want_buffers = oracle_step(params, grads, buffers, lr=LR, **options)
    reference.step_(eager[0], grads, eager[1], lr=LR, **options)
    fused_step_(params, grads, buffers, lr=LR, tuning=tuning, **options)
    assert_guards(guarded)
    cdf = options.get("normalizer") == "cdf"
    for i, shape in enumerate(shapes):
        theta, momentum = step_bounds(before[i], want[i], want_buffers[i], dtype, LR, cdf)
        for name, got, got_buffer in (
            ("reference", eager[0][i], eager[1][i]),
            ("kernels", params[i], buffers[i]),
        ):
            assert_close(f"{name}, momentum {shape}", got_buffer, want_buffers[i], momentum)
            assert_close(f"{name}, parameter {shape}", got, want[i], theta)


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_statistics_give_the_same_bits(
    granularity: str, tuning: Tuning, dtype: torch.dtype, device: torch.device
) -> None:
    options = Options(LR, nesterov=True, weight_decay=0.1, granularity=granularity, centering=0.7)
    shapes = [(1,), (2,), (17,), (129,), (1009,), (), (5, 7), (3, 272), (2, 3, 4, 5)]
    params, grads, buffers, _ = make(dtype, dtype, device, shapes)
    members = [member(p, g, m) for p, g, m in zip(params, grads, buffers)]
    eager = [
        one._replace(param=one.param.clone(), momentum=one.momentum.clone()) for one in members
    ]
    prepared = without_tiles(members, options, tuning)
    (device_part,) = prepared._devices
    prepared.run(members, [options], nothing_new(device))
    done = device_part.plan
    for one, twin, first, walk in zip(members, eager, done.first_segment, device_part.walks):
        param = twin.param
        shape = [walk.rows] + [1] * (param.dim() - 1) if param.dim() else []
        rows = slice(first, first + walk.rows)
        # a global group's is that of its first tensor
        record = members[0].record if granularity == "global" else one.record
        n = int(done.segments[first, 2])
        mean, std = (record[: walk.rows, k].view(shape) for k in (0, 1))
        m2 = std.square() * n
        up, more, high, low, inverse, mode = (done.folds[rows, k].view(shape) for k in range(6))
        if tuning.wide:
            # float32 tiles find equal values by their least and greatest, not by sigma
            centering = options.centering if options.centres(param.dim()) else 0.0
            own = fold_moments(Moments(n, mean, m2, 0), options, centering, torch.float32)
            for field, value in zip(Fold._fields, (up, more, high, low, inverse)):
                # through std and back, M2 is right to a rounding of float64
                torch.testing.assert_close(
                    getattr(own, field).view(shape), value, rtol=2.0**-23, atol=1e-12, msg=field
                )
        moves = mode != 0
        fold = Fold(up, more, high, low, inverse, mode != 2, moves, moves, options.momentum, moves)
        reference._update_(twin, ..., fold, options, nothing_new(device))
        assert torch.equal(param, one.param)
        assert torch.equal(twin.momentum, one.momentum)


def without_tiles(members: list[Member], options: Options, tuning: Tuning) -> FusedStep:
    """A prepared step in which every slice has its statistics in the tables."""
    with pytest.MonkeyPatch.context() as patch:
        build = plan.build
        patch.setattr(prepared_module, "build", lambda *args, **_: build(*args, tiles=False))
        return FusedStep(members, [options], tuning)


@pytest.mark.parametrize("granularity", ["tensor", "global"])
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_order_of_arrival_does_not_change_a_bit(
    tuning: Tuning, granularity: str, device: torch.device
) -> None:
    """One segment over both tensors, or two whose slices arrive interleaved."""
    grads = [torch.randn(n, device=device) for n in (700, 301)]
    options = Options(LR, granularity=granularity, center_1d=True)
    found = []
    for seed in (None, 1, 2):
        params = [torch.zeros_like(grad) for grad in grads]
        members = [member(p, g, torch.zeros_like(p)) for p, g in zip(params, grads)]
        prepared = FusedStep(members, [options], tuning)
        (batch,) = prepared._devices[0].plan.batches
        if seed is not None:
            torch.manual_seed(seed)
            batch.slices = batch.slices[torch.randperm(batch.n_slices)]
            batch.chunks = batch.chunks[torch.randperm(batch.n_chunks)]
        for _ in range(2):
            prepared.run(members, [options], nothing_new(device))
        done = prepared._devices[0].plan
        assert not done.arrived.any(), "counters are left at zero"
        # float64, in which a sum shows its order
        found.append(torch.cat([*params, *(m.record.nan_to_num().flatten() for m in members)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts kernel launches since the last call."""
    count = 0

    class Counting:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            nonlocal count
            count += 1
            return self.kernel[grid]

    for module, name in ((statistics, "_statistics_kernel"), (update, "_update_kernel")):
        monkeypatch.setattr(module, name, Counting(getattr(module, name)))

    def since() -> int:
        nonlocal count
        found, count = count, 0
        return found

    return since


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_launches_do_not_grow(
    granularity: str, device: torch.device, launches: Callable[[], int]
) -> None:
    """Two for one tensor, 10 and 300, in one group or one each, with options of every kind."""
    for n, per_group in ((1, 1), (10, 10), (10, 1), (300, 300), (300, 10)):
        params = [
            torch.randn(2, 4112, device=device) if i == 0 else torch.randn(16, device=device)
            for i in range(n)
        ]
        for param in params:
            param.grad = torch.randn_like(param)
        kinds = itertools.cycle(
            [{}, {"momentum": 0.0}, {"nesterov": True}, {"maximize": True}, {"normalizer": "cdf"}]
        )
        groups = [
            {"params": params[i : i + per_group], "lr": 1e-3 * (i + 1), **next(kinds)}
            for i in range(0, n, per_group)
        ]
        optimizer = BNGD(groups, granularity=granularity, fused=True)
        launches()
        optimizer.step()
        assert launches() == 2, (n, per_group)


def test_launches_of_small_and_mixed_models(
    device: torch.device, launches: Callable[[], int]
) -> None:
    def count(*shapes_and_dtypes: tuple[tuple[int, ...], torch.dtype]) -> int:
        params = [torch.randn(s, device=device).to(dtype) for s, dtype in shapes_and_dtypes]
        for param in params:
            param.grad = torch.randn_like(param)
        launches()
        BNGD(params, fused=True).step()
        return launches()

    tiny, large = (100,), (5000,)
    assert count((tiny, torch.float32), (tiny, torch.float32)) == 1
    assert count((tiny, torch.float32), (large, torch.float32)) == 2
    assert count((large, torch.float32), (large, torch.bfloat16)) == 4


def test_a_global_group_spans_dtypes(device: torch.device) -> None:
    """One slice over float32 and bfloat16 tensors, whose statistics are in two launches."""
    params = [torch.randn(700, device=device), torch.randn(900, device=device).bfloat16()]
    grads = [torch.randn_like(param) * 3 + 1 for param in params]
    buffers = [torch.zeros(param.shape, device=device) for param in params]
    want, want_buffers = oracle_step(params, grads, buffers, lr=LR, granularity="global")
    before = [param.double().cpu() for param in params]
    fused_step_(params, grads, buffers, lr=LR, granularity="global", tuning=LANES)
    for i, param in enumerate(params):
        theta, momentum = step_bounds(before[i], want[i], want_buffers[i], param.dtype, LR, False)
        assert_close("momentum", buffers[i], want_buffers[i], momentum)
        assert_close("parameter", param, want[i], theta)


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_nonfinite(
    granularity: str, nonfinite: str, value: float, tuning: Tuning, device: torch.device
) -> None:
    """In a tile, in the last entries of a segment, and in one of many slices."""
    shapes = [(5, 20), (2, 300), (1001,), (40,), (3, 7)]
    params = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]
    buffers = [torch.randn(shape, device=device) for shape in shapes]
    grads[0][1, 3] = grads[1][1, 299] = grads[2][500] = value
    options = {"granularity": granularity, "nonfinite": nonfinite, "weight_decay": 0.1}
    before = [param.double().cpu() for param in params]
    eager = [param.clone() for param in params], [buffer.clone() for buffer in buffers]
    want, want_buffers = oracle_step(params, grads, buffers, lr=LR, **options)
    counts = [
        int(reference.step_(eager[0], grads, eager[1], lr=LR, **options)),
        int(fused_step_(params, grads, buffers, lr=LR, tuning=tuning, **options)),
    ]
    expected = {"tensor": 3, "row": 3, "global": 1}[granularity] if nonfinite == "skip" else 0
    assert counts == [expected, expected]
    for i in range(len(shapes)):
        theta, momentum = step_bounds(
            before[i], want[i].nan_to_num(), want_buffers[i].nan_to_num(), torch.float32, LR, False
        )
        for got, got_buffer in ((eager[0][i], eager[1][i]), (params[i], buffers[i])):
            assert_close("momentum", got_buffer, want_buffers[i], momentum)
            assert_close("parameter", got, want[i], theta)
    if nonfinite == "skip" and granularity == "row":
        assert torch.equal(params[0][1].double().cpu(), before[0][1]), "bits, not only values"


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("tuning", [LANES, TILES], ids=["lanes", "tiles"])
def test_nan_among_equal_entries(nonfinite: str, tuning: Tuning, device: torch.device) -> None:
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


def test_several_steps_of_a_prepared_step(device: torch.device) -> None:
    """Gradients move, learning rates change, a group is frozen for a while."""
    shapes = [(300, 3), (40, 7), (5000,), (9,)]
    params = [torch.randn(shape, device=device) for shape in shapes]
    twins = [param.clone() for param in params]
    groups = ([params[:2], params[2:]], [twins[:2], twins[2:]])
    optimizers = [
        BNGD(
            [{"params": a, "lr": 1e-2}, {"params": b, "granularity": "row", "nesterov": True}],
            fused=fused,
            weight_decay=0.01,
        )
        for (a, b), fused in zip(groups, (True, False))
    ]
    for step in range(6):
        keep = []
        for param, twin in zip(params, twins):
            if step == 2 and param.dim() == 1:
                param.grad = twin.grad = None
                continue
            keep.append(torch.randn(step * 16, device=device))
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.7
            optimizer.step()
        for param, twin in zip(params, twins):
            # statistics one rounding apart, in a step of size lr, and a rounding of the parameter
            bound = 1e-2 * 8 * GHAT + 2 * THETA * twin.cpu().abs()
            assert_close(f"step {step}", param, twin.cpu(), bound)
            twin.copy_(param)


def test_a_parameter_moved_to_the_next_group_takes_its_options(path: StepPath) -> None:
    """In the lists themselves, which leaves the parameters' order and addresses as they were."""
    params = [torch.zeros(4, 4, device=path.device) for _ in range(3)]
    groups = [{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 8.0}]
    optimizer = BNGD(groups, momentum=0.0, eps=0.0, fused=path.fused)
    moved = params[1]
    for rate in (1.0, 1.0, 8.0):
        if rate == 8.0:
            first, second = (group["params"] for group in optimizer.param_groups)
            second.insert(0, first.pop())
        for param in params:
            param.grad = torch.randn_like(param)
        before = moved.clone()
        optimizer.step()
        rms = (moved - before).double().square().mean().sqrt()
        assert float(rms) == pytest.approx(rate, rel=1e-5)


def test_the_signature_of_a_step_tells_its_tensors_and_options_apart(device: torch.device) -> None:
    """A gradient may move, by multiples of an access; whatever else changes is laid out anew."""
    param, other, grad, momentum = torch.randn(4, 6, 6, device=device).unbind()
    odd = torch.randn(37, device=device)[1:].view(6, 6)
    groups = [Options(LR), Options(LR)]
    sign = FusedStep.sign
    record = new_record(6, device)

    def made(param: Tensor, grad: Tensor, momentum: Tensor | None, group: int) -> Member:
        return Member(param, grad, momentum, group, record)

    base = sign([made(param, grad, momentum, 0)], groups)
    assert sign([made(param, other, momentum, 0)], groups) == base
    assert sign([made(param, grad, momentum, 0)], [Options(1.0, eps=0.0), groups[1]]) == base
    for desc, one in (
        ("gradient off an access", made(param, odd, momentum, 0)),
        ("gradient's order", made(param, grad.T, momentum, 0)),
        ("gradient's dtype", made(param, grad.half(), momentum, 0)),
        ("parameter", made(other, grad, momentum, 0)),
        ("parameter's order", made(param.T, grad, momentum, 0)),
        ("momentum", made(param, grad, other, 0)),
        ("momentum's order", made(param, grad, momentum.T, 0)),
        ("no momentum", made(param, grad, None, 0)),
        ("group", made(param, grad, momentum, 1)),
    ):
        assert sign([one], groups) != base, desc
    for options in (
        Options(LR, granularity="row"), Options(LR, center_1d=True), Options(LR, momentum=0.0)
    ):  # fmt: skip
        assert sign([made(param, grad, momentum, 0)], [options, groups[1]]) != base, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rates_written_on_a_device_are_those_of_a_float(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, `lr` and its product with the decay, in the row of its group only."""
    monkeypatch.setattr(launch, "on_a_device", lambda lr: isinstance(lr, Tensor))
    rate = torch.tensor(0.1, dtype=dtype, device=device)
    groups = [Options(0.7, weight_decay=0.3), Options(rate, weight_decay=0.3)]
    rows = [launch.encode(options) for options in groups]
    assert rows[1][0] == 0, "not read"
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    for row, options in enumerate(groups):
        launch.write_rates(table, row, options)
    want = [rows[0], launch.encode(Options(float(rate), weight_decay=0.3))]
    assert table.tolist() == want


def test_autograd_notices_the_write(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4, device=device))
    optimizer = BNGD([weight], fused=True)
    loss = (weight.sin() * weight).sum()
    weight.grad = torch.randn_like(weight)
    before = weight._version
    optimizer.step()
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_past_two_to_the_31(device: torch.device) -> None:
    """The last items of a tensor of 2**31 + 100 entries; memory is committed only where touched."""
    n = 2**31 + 100
    grad = torch.empty(n, dtype=torch.float16, device=device)
    param = torch.empty(n, dtype=torch.float16, device=device)
    tuning = Tuning(wide=True, slice=65536, chunk=65536, update_block=4096, block=4096, unroll=1)
    whole = plan.build([entry(param, grad)], tuning)
    (batch,) = whole.batches
    for table, size in ((batch.slices, batch.n_slices), (batch.chunks, batch.n_chunks)):
        assert len(table) == size
        assert int(table[0, 1]) == 0
        assert torch.equal(table[1:, 1], table[:-1, 1] + table[:-1, 2])
        assert int(table[-1, 1] + table[-1, 2]) == n
        assert int(table[:, 2].max()) < 2**31
    assert whole.partials.shape[1] <= tuning.max_partials

    tail = 100 + 5000
    grad[-tail:] = torch.randn(tail, device=device)
    param[-tail:] = 0
    batch.slices = torch.tensor([[0, n - tail, tail, 0, 0]], device=device)
    batch.chunks = torch.tensor([[0, n - tail, tail, 0]], device=device)
    batch.n_slices = batch.n_chunks = 1
    whole.segments[0, :4] = torch.tensor([0, 1, tail, 1], device=device)
    whole.point_at([grad.data_ptr()])
    options = Options(lr=1.0, momentum=0.0, maximize=True)
    launch.launch(whole, inputs(device, options))
    want = reference.normalize_gradient(grad[-tail:], center_1d=True)
    assert torch.equal(param[-tail:], want)


def test_shape_of_a_plan(device: torch.device) -> None:
    """Every entry is in exactly one slice or tile, and in exactly one chunk or tile."""
    shapes = [shape for shape in SHAPES if 0 not in shape]
    for granularity in ("tensor", "row"):
        entries = []
        for shape in shapes:
            tensor = torch.randn(shape, device=device)
            rows = shape[0] if granularity == "row" and len(shape) > 1 else 1
            entries.append(entry(tensor, tensor, None, rows, centred=False))
        found = plan.build(entries, LANES)
        for batch in found.batches:
            sizes = {at: entries[i].param.numel() for at, i in enumerate(batch.order)}
            covered: dict[str, dict[int, int]] = {"slices": {}, "chunks": {}}
            for name, table in (("slices", batch.slices), ("chunks", batch.chunks)):
                for tensor, _, length, *_ in table.tolist():
                    covered[name][tensor] = covered[name].get(tensor, 0) + length
            for first, count, start, listed, columns in batch.tiles.tolist():
                for row in range(count):
                    at = first + row * listed
                    length = int(batch.rows[at, 0])
                    assert length - length % 16 <= columns
                    assert start + row < entries[batch.order[at]].rows or listed
                    for part in covered.values():
                        part[at] = part.get(at, 0) + length
            assert covered == {"slices": sizes, "chunks": sizes}


def test_aligned_batches_are_aligned(device: torch.device) -> None:
    """What the hints for 16-byte accesses promise: only a GPU acts on them, or faults."""

    def tensor(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        n = torch.Size(shape).numel()
        return torch.zeros(n + 8, dtype=dtype, device=device)[offset : offset + n].view(shape)

    narrow, wide = torch.bfloat16, torch.float32
    offsets = ((0, 0, 0), (1, 0, 0), (0, 4, 0), (0, 0, 2))
    shapes = [((6,), 1), ((8,), 1), ((20,), 1), ((1000,), 1), ((1001,), 1)]
    shapes += [((3, n), 3) for n in (4, 7, 8, 300, 304)]
    entries = [
        entry(*map(tensor, [shape] * 3, dtypes, offset), rows, centred=False)
        for dtypes in itertools.product((narrow, wide), repeat=3)
        for offset in offsets
        for shape, rows in shapes
    ]
    # neither the slice nor a third of 1 000 is a multiple of an access
    tuning = Tuning(**SMALL | {"slice": 100, "chunk": 104, "max_partials": 3})
    for batch in plan.build(entries, tuning).batches:
        mine = [entries[i] for i in batch.order]
        for at, one in enumerate(mine):
            length = one.param.numel() // one.rows
            starts = [row * length for row in range(one.rows)]
            assert batch.kind.aligned == all(starts_access(one, start) for start in starts)
            if batch.kind.aligned:
                for table in (batch.slices, batch.chunks):
                    assert all(starts_access(one, k) for i, k, *_ in table.tolist() if i == at)
        if batch.kind.aligned:
            # the kernel's GRANULE: a row's end cuts no access either
            granule = 4 if set(batch.kind[:3]) == {wide} else 8
            for first, count, _, listed, _ in batch.tiles.tolist():
                assert not (batch.rows[first : first + (count if listed else 1), 0] % granule).any()


def starts_access(entry: plan.Entry, element: int) -> bool:
    """Whether an element is at a multiple of 16 bytes in all three tensors."""
    tensors = (entry.param, entry.grad, entry.momentum)
    return not any((t.data_ptr() + element * t.element_size()) % 16 for t in tensors)


@triton.jit
def _store_kernel(x_ptr, out_ptr, SOFT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, store_as(x, out_ptr.dtype.element_ty, SOFT))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stores_round_to_nearest_even(dtype: torch.dtype, device: torch.device) -> None:
    """Every upper half of a float32 with lower halves around a tie; NaNs of any payload."""
    upper = torch.arange(2**16).view(-1, 1) << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (upper | lower).flatten().to(torch.int32).view(torch.float32)
    got = torch.empty(x.shape, dtype=dtype, device=device)
    _store_kernel[(1,)](x.to(device), got, SOFT=launch.interpreting(), BLOCK=x.numel())
    got, want = got.cpu(), x.to(dtype)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))
    assert torch.equal(got.isinf(), want.isinf())

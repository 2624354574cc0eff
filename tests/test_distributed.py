"""Statistics of sharded tensors against exact arithmetic on the whole tensor, on 2 to 4 ranks.

Every world starts once and exchanges all its cases together, as a step would.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple
from unittest import mock

import mpmath
import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from bngd_triton import distributed, exchange
from bngd_triton.exchange import Exchange, local_table

# float64 sums of a few hundred entries: some units of 2**-53, here in units of 1e-12
CLOSE = 1e-12
GRANULARITIES = ("tensor", "row", "global")


class Case(NamedTuple):
    """One sharded gradient. Without placements it is a plain tensor."""

    desc: str
    shape: tuple[int, ...]
    placements: tuple[Any, ...] | None
    mesh: tuple[int, ...]
    gradient: tuple[Any, ...] | None = None
    values: Callable[[Tensor], Tensor] = lambda x: x
    # whether torch's own DTensor statistics can be asked
    eager: bool = True


def _huge_and_tiny(x: Tensor) -> Tensor:
    """Squares of the first half overflow float64, those of the second half underflow."""
    scale = torch.full(x.shape, 1e-200, dtype=torch.float64)
    scale.view(-1)[: x.numel() // 2] = 1e200
    return x.double() * scale


def _nan_in_last(x: Tensor) -> Tensor:
    x.view(-1)[-1] = torch.nan
    return x


def _inf_in_last(x: Tensor) -> Tensor:
    x.view(-1)[-1] = torch.inf
    return x


TWO = (2,)
THREE = (3,)
GRID = (2, 2)
R, S0, S1 = Replicate(), Shard(0), Shard(1)

CASES = {
    2: [
        Case("plain", (5, 3), None, TWO),
        Case("even", (8, 6), (S0,), TWO),
        Case("columns", (6, 8), (S1,), TWO),
        Case("uneven columns", (4, 5), (S1,), TWO),
        Case("empty columns", (4, 1), (S1,), TWO),
        Case("replicated", (4, 5), (R,), TWO),
        Case("partial gradient", (7, 5), (S0,), TWO, (Partial(),)),
        Case("partial gradient, replicated", (3, 5), (R,), TWO, (Partial(),)),
        Case("replicated gradient", (7, 5), (S0,), TWO, (R,)),
        Case("gradient in columns", (6, 4), (S0,), TWO, (S1,)),
        Case("float64", (6, 5), (S0,), TWO, values=lambda x: x.double()),
        Case("overflow", (6, 5), (S0,), TWO, values=lambda x: x.double() * 1e200, eager=False),
        Case("underflow", (6, 4), (S1,), TWO, values=lambda x: x.double() * 1e-200, eager=False),
        Case("both ends", (6, 5), (S0,), TWO, values=_huge_and_tiny, eager=False),
        Case("nothing", (0, 5), (S0,), TWO, eager=False),
        Case("bfloat16", (9, 5), (S0,), TWO, values=lambda x: x.bfloat16()),
        Case("far from 0", (9, 5), (S0,), TWO, values=lambda x: x + 1e4),
        Case("equal", (9, 5), (S0,), TWO, values=lambda x: torch.full_like(x, 0.1)),
        Case("zero", (9, 5), (S0,), TWO, values=torch.zeros_like),
    ],
    3: [
        Case("plain", (5, 3), None, THREE),
        Case("uneven", (10, 7), (S0,), THREE),
        Case("an empty rank", (2, 9), (S0,), THREE),
        Case("two empty ranks", (1, 4), (S0,), THREE),
        Case("many entries", (64, 33), (S0,), THREE),
        Case("vector", (5,), (S0,), THREE),
        Case("0-d", (), (R,), THREE),
        Case("one entry", (1,), (S0,), THREE),
        Case("convolution", (4, 5, 3, 2), (S0,), THREE),
        Case("convolution, input channels", (4, 5, 3, 2), (S1,), THREE),
        Case("last dimension", (4, 3, 5), (Shard(2),), THREE),
        Case("empty columns", (5, 2), (S1,), THREE),
        Case("first rank empty-handed", (3, 2), (S1,), THREE, (Partial(),)),
        Case("equal, empty ranks", (2, 3), (S0,), THREE, values=lambda x: torch.full_like(x, 0.1)),
        Case("float64, empty ranks", (2, 9), (S0,), THREE, values=_huge_and_tiny, eager=False),
    ],
    4: [
        Case("plain", (5, 3), None, GRID),
        Case("on a line of four", (10, 3), (S0,), (4,)),
        Case("hybrid", (7, 5), (R, S0), GRID),
        Case("hybrid, columns", (5, 7), (R, S1), GRID),
        Case("outer only", (7, 5), (S0, R), GRID),
        Case("replicated twice", (3, 2), (R, R), GRID),
        Case("rows and columns", (7, 5), (S0, S1), GRID),
        Case("columns and rows", (7, 5), (S1, S0), GRID),
        Case("rows twice", (9, 5), (S0, S0), GRID, eager=False),
        Case("rows twice, ranks empty", (2, 5), (S0, S0), GRID, eager=False),
        Case("columns twice", (5, 9), (S1, S1), GRID, eager=False),
        Case("columns twice, ranks empty", (5, 3), (S1, S1), GRID, eager=False),
        Case("partial gradient, hybrid", (7, 5), (R, S0), GRID, (Partial(), S0)),
        Case("vector", (7,), (S0, R), GRID),
        Case("float64", (7, 5), (S0, S1), GRID, values=_huge_and_tiny, eager=False),
    ],
}
# their names end in this: one entry of the last rank is not finite
SPOILT = {
    world: [
        Case("nan on the last rank", (10, 7), (S0,), (world,), values=_nan_in_last, eager=False),
        Case("inf on the last rank", (7, 10), (S1,), (world,), values=_inf_in_last, eager=False),
    ]
    for world in CASES
}
WORLDS = sorted(CASES)
EVERY = [pytest.param(w, c, id=f"{w}: {c.desc}") for w in WORLDS for c in CASES[w] + SPOILT[w]]
# what is exchanged together: granularity, then whether a case takes part
RUNS: dict[str, tuple[str, Callable[[Case], bool]]] = {
    "tensor": ("tensor", lambda case: True),
    "row": ("row", lambda case: True),
    "global": ("global", lambda case: case.eager),
    "global, extreme": ("global", lambda case: case.values not in (_nan_in_last, _inf_in_last)),
    "global, spoilt": ("global", lambda case: True),
    "dealt out": ("tensor", lambda case: True),
    "rows dealt out": ("row", lambda case: True),
}


def whole(case: Case) -> Tensor:
    """The whole gradient: its mean drifts, so that parts have means of their own."""
    generator = torch.Generator().manual_seed(len(case.desc) + 97 * len(case.shape))
    x = torch.randn(case.shape, generator=generator)
    drift = torch.arange(x.numel(), dtype=torch.float32).view(case.shape)
    return case.values(x + 0.25 * drift)


class Found(NamedTuple):
    """What one rank found about one tensor; an item of the lists per local slice."""

    n: int
    mean: list[float]
    std: list[float]
    table: Tensor
    share: dict[str, Any]


class Collective(NamedTuple):
    name: str
    ranks: int
    sent: int
    received: int


class Result(NamedTuple):
    """What one rank returns."""

    found: dict[tuple[str, str], Found]
    collectives: dict[str, list[Collective]]
    # all that torch saw, and values read on the host
    commands: dict[str, int]
    reads: int
    repeated: bool
    rows: dict[str, Tensor]
    placed: dict[str, bool]
    eager: dict[str, tuple[float, float]]
    # of the model, which has no case
    gradients: dict[str, Tensor]


class HostReads(TorchDispatchMode):
    """Counts values read on the host, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def recording(log: list[Collective]) -> Any:
    """Notes what goes through the collectives that an exchange may use."""

    def wrap(name: str, original: Any) -> Any:
        def call(output: Tensor, given: Tensor, group: Any) -> Any:
            log.append(Collective(name, dist.get_world_size(group), given.nbytes, output.nbytes))
            return original(output, given, group=group)

        return call

    names = ("all_gather_into_tensor", "all_to_all_single")
    return mock.patch.multiple(dist, **{name: wrap(name, getattr(dist, name)) for name in names})


def sharded(case: Case, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient, whose Partial terms are 0 but for the last one."""
    full = whole(case)
    if case.placements is None:
        return torch.zeros_like(full), full
    param = distribute_tensor(torch.zeros_like(full), mesh, case.placements, src_data_rank=None)
    placements = case.gradient or case.placements
    partial = [i for i, p in enumerate(placements) if p.is_partial()]
    kept = [R if i in partial else p for i, p in enumerate(placements)]
    grad = distribute_tensor(full, mesh, kept, src_data_rank=None)
    if partial:
        last = all(mesh.get_local_rank(i) == mesh.size(i) - 1 for i in partial)
        local = grad.to_local() * (1.0 if last else 0.0)
        grad = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
        )
    return param, grad


def model_on(mesh: DeviceMesh) -> nn.Module:
    """FSDP over tensor parallelism, with gradients: `_StridedShard`, and a layer without TP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3), nn.LayerNorm(3))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    x = torch.randn(4, 6) * (1 + mesh.get_local_rank("dp"))
    model(x).square().mul(torch.arange(3.0)).sum().backward()
    return model


def visit(world: int) -> Result:
    """Everything that is asked of one world, on one rank."""
    cases = {case.desc: case for case in CASES[world] + SPOILT[world]}
    meshes = {case.mesh: None for case in cases.values()}
    on = {shape: init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
          for shape in meshes}  # fmt: skip
    tensors = {desc: sharded(case, on[case.mesh]) for desc, case in cases.items()}
    gradients = {}
    if GRID in on:
        for name, param in model_on(on[GRID]).named_parameters():
            tensors[f"model {name}"] = (param, param.grad)
            gradients[f"model {name}"] = param.grad.full_tensor()
    parts = {desc: distributed.local_parts(desc, *pair) for desc, pair in tensors.items()}

    found: dict[tuple[str, str], Found] = {}
    collectives: dict[str, list[Collective]] = {}
    commands: dict[str, int] = {}
    reads, repeated = HostReads(), True
    for run, (granularity, takes) in RUNS.items():
        names = [desc for desc in tensors if desc not in cases or takes(cases[desc])]
        shares = [distributed.share_of(d, *tensors[d], granularity) for d in names]
        plan = Exchange(shares, together=granularity == "global")
        log: list[Collective] = []
        bound = 0 if "dealt" in run else exchange.GATHERED
        with mock.patch.object(exchange, "GATHERED", bound), CommDebugMode() as counter:
            with recording(log), reads:
                tables = [local_table(parts[d][1], granularity) for d in names]
                merged = plan.run(tables)
            again, shaped = plan.run(tables), plan.moments(tables)
        collectives[run] = log
        commands[run] = counter.get_total_counts()
        for desc, share, table, same, m in zip(names, shares, merged, again, shaped):
            repeated &= torch.equal(table.view(torch.int64), same.view(torch.int64))
            down = -torch.as_tensor(m.exponent)
            std = (m.m2 / max(1, m.n)).sqrt()
            assert m.mean.dim() == share.ndim
            found[run, desc] = Found(
                m.n,
                torch.ldexp(m.mean, down).flatten().tolist(),
                torch.ldexp(std, down).flatten().tolist(),
                table,
                {k: v for k, v in share._asdict().items() if k != "groups"},
            )

    rows, placed, eager = {}, {}, {}
    for desc, (param, grad) in tensors.items():
        if param.dim():
            rows[desc] = distributed.global_rows(param)
            shape = (-1, *[1] * (param.dim() - 1))
            spread = rows[desc].view(shape).expand(parts[desc][0].shape).contiguous()
            if isinstance(param, DTensor):
                spread = distributed.like(param, spread).full_tensor()
            placed[desc] = torch.equal(
                spread, torch.arange(param.shape[0]).view(shape).expand(param.shape)
            )
        if desc in cases and cases[desc].eager and isinstance(grad, DTensor):
            values = grad.redistribute(param.device_mesh, param.placements).double()
            statistics = (values.mean(), values.std(correction=0))
            mean, std = (float(value.full_tensor()) for value in statistics)
            eager[desc] = (mean, std)
    return Result(
        found, collectives, commands, reads.count, repeated, rows, placed, eager, gradients
    )


@functools.cache
def visited(world: int) -> list[Result]:
    return processes.run(world, visit, world)


def exact(values: Tensor) -> tuple[Fraction, mpmath.mpf]:
    """Mean and population standard deviation of the stored values; 0 and 0 of none."""
    data = [Fraction(value) for value in values.double().flatten().tolist()]
    if not data:
        return Fraction(0), mpmath.mpf(0)
    mean = sum(data) / len(data)
    variance = sum((value - mean) ** 2 for value in data) / len(data)
    return mean, mpmath.sqrt(mpmath.mpf(variance.numerator) / variance.denominator)


def assert_statistics(found: Found, want: Sequence[Tensor]) -> None:
    """One slice's values for each item of `found`."""
    assert len(found.mean) == len(found.std) == len(found.table) == len(want)
    for mean, std, row, values in zip(found.mean, found.std, found.table, want):
        assert found.n == row[0] == values.numel()
        if not values.isfinite().all():
            assert not (math.isfinite(mean) and math.isfinite(std))
            continue
        with mpmath.workdps(40):
            want_mean, want_std = exact(values)
            bound = CLOSE * float(abs(want_mean) + Fraction(str(want_std)))
            assert abs(Fraction(mean) - want_mean) <= bound
            assert abs(std - want_std) <= CLOSE * want_std
        if values.numel():
            assert row[3] == values.double().min()
            assert row[4] == values.double().max()


@pytest.mark.parametrize(("world", "case"), EVERY)
@pytest.mark.parametrize("run", ["tensor", "dealt out"])
def test_tensor_statistics(world: int, case: Case, run: str) -> None:
    for result in visited(world):
        assert_statistics(result.found[run, case.desc], [whole(case)])


@pytest.mark.parametrize(("world", "case"), EVERY)
@pytest.mark.parametrize("run", ["row", "rows dealt out"])
def test_row_statistics(world: int, case: Case, run: str) -> None:
    full = whole(case)
    for result in visited(world):
        slices = [full]
        if full.dim() >= 2:
            slices = [full[row] for row in result.rows[case.desc].tolist()]
        assert_statistics(result.found[run, case.desc], slices)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("run", [run for run in RUNS if run.startswith("global")])
def test_global_statistics_span_meshes_and_plain_tensors(world: int, run: str) -> None:
    takes = RUNS[run][1]
    for result in visited(world):
        values = [whole(case) for case in CASES[world] + SPOILT[world] if takes(case)]
        values += result.gradients.values()
        union = torch.cat([value.double().flatten() for value in values])
        for (other, _), found in result.found.items():
            if other == run:
                assert_statistics(found, [union])


def test_fsdp_over_tensor_parallelism() -> None:
    for result in visited(4):
        assert len(result.gradients) == 6
        for name, full in result.gradients.items():
            assert_statistics(result.found["tensor", name], [full])
            rows = full[result.rows[name]] if full.dim() >= 2 else [full]
            assert_statistics(result.found["row", name], list(rows))


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_has_the_same_bits(world: int) -> None:
    results = visited(world)
    compared = 0
    for run, desc in results[0].found:
        seen: dict[int, Tensor] = {}
        for result in results:
            table = result.found[run, desc].table.view(torch.int64)
            by_row = RUNS[run][0] == "row" and desc in result.rows
            rows = result.rows[desc].tolist() if by_row else [0]
            for row, bits in zip(rows, table):
                compared += row in seen
                assert torch.equal(bits, seen.setdefault(row, bits)), (run, desc)
    assert compared > 100


@pytest.mark.parametrize("world", WORLDS)
def test_repeats_bit_for_bit_and_reads_nothing_on_the_host(world: int) -> None:
    for result in visited(world):
        assert result.repeated
        assert result.reads == 0


@pytest.mark.parametrize("world", WORLDS)
def test_torch_agrees(world: int) -> None:
    for result in visited(world):
        assert len(result.eager) > 8
        for desc, (mean, std) in result.eager.items():
            found = result.found["tensor", desc]
            # torch's own sums: float64, without a reference point
            assert found.mean[0] == pytest.approx(mean, rel=1e-9, abs=1e-9)
            assert found.std[0] == pytest.approx(std, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_equal_entries_have_no_spread(world: int) -> None:
    for case in CASES[world]:
        full = whole(case)
        if full.numel() < 2 or full.min() != full.max():
            continue
        for run in RUNS:
            if run.startswith("global"):
                continue
            for result in visited(world):
                found = result.found[run, case.desc]
                assert set(found.std) <= {0.0}
                assert set(found.mean) <= {full.double().min().item()}


@pytest.mark.parametrize("world", WORLDS)
def test_local_rows_have_their_global_index(world: int) -> None:
    for result in visited(world):
        assert result.placed
        assert all(result.placed.values()), result.placed


# mesh dimensions over which slices are cut: those of the mesh of four, of the grid, or of both
CUTTING = {2: 1, 3: 1, 4: 3}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("run", RUNS)
def test_one_collective_per_mesh_dimension(world: int, run: str) -> None:
    for result in visited(world):
        names = [collective.name for collective in result.collectives[run]]
        if "dealt" in run:
            assert names == ["all_to_all_single", "all_gather_into_tensor"] * CUTTING[world]
        else:
            assert names == ["all_gather_into_tensor"] * CUTTING[world]
        # three exchanges, and nothing else behind them
        assert result.commands[run] == 3 * len(names)


SHARES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "plain": ((), (), 15),
    "on a line of four": ((0,), (), 30),
    "hybrid": ((1,), (0,), 35),
    "outer only": ((0,), (1,), 35),
    "replicated twice": ((), (0, 1), 6),
    "rows and columns": ((0, 1), (), 35),
    "rows twice": ((0, 1), (), 45),
    "model 0.weight": ((0, 1), (), 60),
    "model 2.bias": ((0,), (1,), 3),
    "model 3.weight": ((0,), (), 3),
}
ROW_SHARES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "hybrid": ((), (0,), 5),
    "hybrid, columns": ((1,), (0,), 7),
    "rows and columns": ((1,), (), 5),
    "columns and rows": ((0,), (), 5),
    "rows twice": ((), (), 5),
    "columns twice": ((0, 1), (), 9),
    "vector": ((0,), (1,), 7),
    "model 0.weight": ((), (), 6),
    "model 2.weight": ((1,), (), 10),
}


@pytest.mark.parametrize(
    ("run", "desc", "want"),
    [("tensor", *item) for item in SHARES.items()]
    + [("row", *item) for item in ROW_SHARES.items()],
)
def test_which_mesh_dimensions_cut_a_slice(run: str, desc: str, want: Any) -> None:
    for result in visited(4):
        share = result.found[run, desc].share
        assert (share["spread"], share["replicated"], share["entries"]) == want

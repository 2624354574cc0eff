"""Sharded gradients on 2 to 4 ranks, and what every rank finds out about them.

Every world starts once and exchanges all its cases together, as a step would.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import processes
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
        Case("partial gradient, an empty rank", (3, 2), (S1,), THREE, (Partial(),)),
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
    # whether rows have the right index, and whether a write to a part reaches the parameter
    placed: dict[str, bool]
    eager: dict[str, tuple[float, float]]
    # of the model, which has no case
    gradients: dict[str, Tensor]
    refusals: dict[str, str]
    # slices that travel, and what carries them
    transformer: dict[str, tuple[int, list[Collective]]]


class HostReads(TorchDispatchMode):
    """Counts values read on the host, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recording(log: list[Collective]) -> Iterator[None]:
    """Notes what goes through the collectives that an exchange may use."""

    def wrap(name: str, original: Any) -> Any:
        def call(output: Tensor, given: Tensor, group: Any) -> None:
            log.append(Collective(name, dist.get_world_size(group), given.nbytes, output.nbytes))
            original(output, given, group=group)

        return call

    gather = wrap("all-gather", exchange.all_gather)
    deal = wrap("all-to-all", dist.all_to_all_single)
    with (
        mock.patch.object(exchange, "all_gather", gather),
        mock.patch.object(dist, "all_to_all_single", deal),
    ):
        yield


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
        with torch.no_grad():
            before = (param.full_tensor() if isinstance(param, DTensor) else param).clone()
            parts[desc][0].add_(1)
            after = param.full_tensor() if isinstance(param, DTensor) else param
        placed[f"{desc}, written"] = torch.equal(after, before + 1)
        if desc in cases and cases[desc].eager and isinstance(grad, DTensor):
            values = grad.redistribute(param.device_mesh, param.placements).double()
            statistics = (values.mean(), values.std(correction=0))
            mean, std = (float(value.full_tensor()) for value in statistics)
            eager[desc] = (mean, std)
    return Result(
        found, collectives, commands, reads.count, repeated, rows, placed, eager, gradients,
        refused(on[TWO]) if world == 2 else {}, transformer_on(on[(world,)]),
    )  # fmt: skip


class Transformer(NamedTuple):
    """A Llama: sizes of its layers."""

    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int

    def shapes(self) -> list[tuple[int, ...]]:
        width, inner, keys = self.width, self.inner, self.keys
        square = [(width, width)] * 2 + [(keys, width)] * 2
        layer = [*square, *[(inner, width)] * 2, (width, inner), (width,), (width,)]
        ends = [(self.vocabulary, width)] * 2 + [(width,)]
        return layer * self.layers + ends


def transformer_on(mesh: DeviceMesh) -> dict[str, tuple[int, list[Collective]]]:
    """The exchanges of one step over a line of ranks."""
    shapes = Transformer(2, 5, 7, 3, 11).shapes()
    ways: dict[str, tuple[str, Shard]] = {
        "tensor": ("tensor", S0),
        "tensor, dealt out": ("tensor", S0),
        "row": ("row", S0),
        "row, cut": ("row", S1),
        "row, cut, dealt out": ("row", S1),
        "global": ("global", S0),
    }
    counted = {}
    for way, (granularity, placement) in ways.items():
        grads = [
            distribute_tensor(
                torch.ones(shape), mesh, [placement if len(shape) > 1 else S0], src_data_rank=None
            )
            for shape in shapes
        ]
        shares = [distributed.share_of(way, grad, grad, granularity) for grad in grads]
        tables = [local_table(grad.to_local(), granularity) for grad in grads]
        log: list[Collective] = []
        bound = 0 if "dealt" in way else exchange.GATHERED
        with mock.patch.object(exchange, "GATHERED", bound), recording(log):
            Exchange(shares, together=granularity == "global").run(tables)
        counted[way] = (sum(share.slices for share in shares if share.groups), log)
    return counted


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """What is refused on a mesh, in which words."""
    full = torch.zeros(4, 2)
    other = init_device_mesh("cpu", (mesh.size(), 1))
    first = DeviceMesh("cpu", [0])
    cut = distribute_tensor(full, mesh, [S0], src_data_rank=None)
    outside = DTensor.from_local(
        full, first, [R], run_check=False, shape=full.shape, stride=full.stride()
    )
    wide = distribute_tensor(torch.zeros(4, 3), mesh, [S0], src_data_rank=None)
    elsewhere = distribute_tensor(full, other, [S0, R], src_data_rank=None)
    partial = DTensor.from_local(full, mesh, [Partial()], run_check=False)
    calls: dict[str, Callable[[], Any]] = {
        "plain gradient": lambda: distributed.local_parts("w", cut, full),
        "plain parameter": lambda: distributed.local_parts("w", full, cut),
        "shape": lambda: distributed.local_parts("w", cut, wide),
        "mesh": lambda: distributed.local_parts("w", cut, elsewhere),
        "partial parameter": lambda: distributed.local_parts("w", partial, partial),
        "outside": lambda: distributed.share_of("w", outside, full, "tensor"),
        "state": lambda: distributed.like(cut, torch.zeros(9, 2)),
    }
    words = {}
    for desc, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, NotImplementedError) as error:
            words[desc] = f"{type(error).__name__}: {error}"
    return words


@functools.cache
def visited(world: int) -> list[Result]:
    return processes.run(world, visit, world)

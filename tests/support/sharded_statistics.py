"""What every rank finds out about the gradients of `sharded_cases`.

Every world starts once and exchanges all its cases together, as a step would.
"""

import contextlib
import functools
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from bngd_triton.sharding import exchange, placements
from bngd_triton.sharding.exchange import Exchange, local_table
from support import processes
from support.host_reads import HostReads
from support.sharded_cases import CASES, RUNS, S0, S1, SPOILT, TWO, R, whole
from support.sharded_model import mesh_of


class Found(NamedTuple):
    """What one rank found about one tensor; an item of the lists per local slice."""

    n: int
    mean: list[float]
    std: list[float]
    table: Tensor


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
    refusals: dict[str, str]
    # slices that travel, and what carries them
    transformer: dict[str, tuple[int, list[Collective]]]


@contextlib.contextmanager
def recording(log):
    """Notes what goes through the collectives that an exchange may use."""

    def wrap(name, original):
        def call(output, given, group):
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


def sharded(case, mesh):
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


def share_of(name, param, grad, granularity):
    """As a step would have it of a group of all."""
    share = placements.share_of(name, param, grad, granularity)
    if isinstance(param, DTensor):
        innermost_first = param.device_mesh.get_all_groups()[::-1]
        names = [group.group_name for group in innermost_first]
        places = [names.index(group.group_name) for group in share.groups]
        assert places == sorted(places)
    return share._replace(union=0) if granularity == "global" else share


@torch.no_grad()
def global_rows(param):
    """The indices of dimension 0 that this rank holds, in the order of its local rows."""
    rows = torch.arange(param.shape[0])
    if not isinstance(param, DTensor):
        return rows
    kept = [p if getattr(p, "dim", None) == 0 else R for p in param.placements]
    # without a source rank every rank cuts its own copy: no collective
    return distribute_tensor(rows, param.device_mesh, kept, src_data_rank=None).to_local()


def visit(world):
    """Everything that is asked of one world, on one rank."""
    cases = {case.desc: case for case in CASES[world] + SPOILT[world]}
    on = {case.mesh: mesh_of(case.mesh) for case in cases.values()}
    tensors = {desc: sharded(case, on[case.mesh]) for desc, case in cases.items()}
    parts = {desc: placements.local_parts(desc, *pair) for desc, pair in tensors.items()}

    found = {}
    collectives = {}
    commands = {}
    reads, repeated = HostReads(), True
    for run, (granularity, takes) in RUNS.items():
        names = [desc for desc in tensors if takes(cases[desc])]
        shares = [share_of(d, *tensors[d], granularity) for d in names]
        plan = Exchange(shares)
        log = []
        bound = 0 if "dealt" in run else exchange.GATHERED
        with mock.patch.object(exchange, "GATHERED", bound), CommDebugMode() as counter:
            with recording(log), reads:
                tables = [local_table(parts[d][1], granularity) for d in names]
                merged = plan.run(tables)
            again = plan.run(tables)
        collectives[run] = log
        commands[run] = counter.get_total_counts()
        for i, (desc, share, table, same) in enumerate(zip(names, shares, merged, again)):
            repeated &= torch.equal(table.view(torch.int64), same.view(torch.int64))
            m = plan.moments(i, table)
            down = -torch.as_tensor(m.exponent)
            std = (m.m2 / max(1, m.n)).sqrt()
            assert m.mean.shape == (share.slices, 1)
            mean, std = (torch.ldexp(value, down).flatten().tolist() for value in (m.mean, std))
            found[run, desc] = Found(m.n, mean, std, table)

    rows = {d: global_rows(param) for d, (param, _) in tensors.items() if param.dim()}
    return Result(
        found, collectives, commands, reads.count, repeated, rows,
        refused(on[TWO]) if world == 2 else {}, transformer_on(on[(world,)]),
    )  # fmt: skip


class Transformer(NamedTuple):
    """A Llama: sizes of its layers."""

    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int

    def shapes(self):
        width, inner, keys = self.width, self.inner, self.keys
        square = [(width, width)] * 2 + [(keys, width)] * 2
        layer = [*square, *[(inner, width)] * 2, (width, inner), (width,), (width,)]
        ends = [(self.vocabulary, width)] * 2 + [(width,)]
        return layer * self.layers + ends


def transformer_on(mesh):
    """The exchanges of one step over a line of ranks."""
    shapes = Transformer(2, 5, 7, 3, 11).shapes()
    ways = {
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
        shares = [share_of(way, grad, grad, granularity) for grad in grads]
        tables = [local_table(grad.to_local(), granularity) for grad in grads]
        log = []
        bound = 0 if "dealt" in way else exchange.GATHERED
        with mock.patch.object(exchange, "GATHERED", bound), recording(log):
            Exchange(shares).run(tables)
        counted[way] = (sum(share.slices for share in shares if share.groups), log)
    return counted


def refused(mesh):
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
    calls = {
        "plain gradient": lambda: placements.local_parts("w", cut, full),
        "plain parameter": lambda: placements.local_parts("w", full, cut),
        "shape": lambda: placements.local_parts("w", cut, wide),
        "mesh": lambda: placements.local_parts("w", cut, elsewhere),
        "partial parameter": lambda: placements.local_parts("w", partial, partial),
        "outside": lambda: placements.share_of("w", outside, full, "tensor"),
        "state": lambda: placements.like(cut, torch.zeros(9, 2)),
    }
    words = {}
    for desc, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, NotImplementedError) as error:
            words[desc] = f"{type(error).__name__}: {error}"
    return words


@functools.cache
def visited(world):
    return processes.run(world, visit, world)

"""Host time of a repeated step beside torch's fused SGD, both up to the device's own work.

    python -m bench.host [--tensors 300] [--repeats 1000] [--sharded] [--out FILE]

Runs anywhere: tensors are on the CPU. Kernels are compiled for sm_90 and dispatched to a driver
that does nothing, `torch._fused_sgd_` is made to do nothing; what is left is what Python and torch
do on the host in every step. Both are timed in turns in one process, since a shared machine may
change its speed between two turns but hardly within one; a ratio is the median of those of the
turns. All tensors are tiles but one, so that there are three launches.

Gradients are "kept" (``zero_grad(set_to_none=False)``), "new" objects in every step where the last
ones were (the default, on a GPU whose allocator hands out the same places every time), or "moved":
new objects elsewhere, whose addresses are uploaded. "Sharded" steps are those of one of four ranks
of DTensors, with the collectives of torch's fake process group, beside SGD by foreach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

# read when kernels are defined: they are compiled here
os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch.nn import Parameter
from torch.optim import SGD

from bench.arms import grouped
from bench.report import commit, environment
from bngd_triton import BNGD

# a tile, and a slice with spans
ELEMENTS, MORE = 64, 16384
GRADIENTS = ("kept", "new", "moved")
RANKS = 4


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Backward:
    """Gives parameters gradients as one of `GRADIENTS` says.

    Args:
        params: the parameters.
        kind: of the gradients.
    """

    def __init__(self, params: list[Parameter], kind: str) -> None:
        self.params = params
        places = [
            [torch.empty(param.shape) for param in params]
            for _ in range(2 if kind == "moved" else 1)
        ]
        self._memory = iter(places) if kind == "kept" else itertools.cycle(places)

    def __call__(self) -> None:
        """What happens between two steps."""
        for param, memory in zip(self.params, next(self._memory, ())):
            param.grad = memory.detach()


def measure(n: int, groups: int, gradients: str, repeats: int) -> dict[str, float]:
    """Medians: the ratio, and both steps in microseconds. The driver does nothing from here on."""
    from bench import driver

    driver.as_if_on_a_gpu()
    params = [Parameter(torch.randn(ELEMENTS if i else MORE)) for i in range(n)]
    optimizer = BNGD(grouped(params, groups), fused=True, flatten=False)
    sgd = SGD(grouped(params, groups), lr=1e-3, momentum=0.9, fused=True)
    backward = Backward(params, gradients)
    times: dict[str, list[float]] = {"step": [], "SGD": [], "step, new rates": []}
    with mock.patch.object(torch, "_fused_sgd_", driver.nothing):
        for repeat in range(2 + repeats):
            for name, step in (("step", optimizer.step), ("SGD", sgd.step)):
                backward()
                times[name].append(timed(step))
            assert optimizer._stepper.replay is not None, "the step was not replayed"
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (repeat + 1)
            backward()
            times["step, new rates"].append(timed(optimizer.step))
    return _medians(times)


def measure_sharded(n: int, repeats: int) -> dict[str, float]:
    """As `measure`, of the parts of one of four ranks; and of a step that is laid out anew."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bench import driver

    driver.as_if_on_a_gpu()
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS,))

    def part() -> DTensor:
        return DTensor.from_local(torch.randn(16, 64), mesh, [Shard(0)])

    def parts() -> list[Parameter]:
        return [Parameter(part()) for _ in range(n)]

    anew = BNGD(parts(), fused=True, flatten=False)
    arms = {
        "step": BNGD(parts(), fused=True, flatten=False),
        "laid out anew": anew,
        "SGD": SGD(parts(), lr=1e-3, momentum=0.9, foreach=True),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(2 + repeats):
        for name, arm in arms.items():
            # as `fully_shard` leaves them
            for param in arm.param_groups[0]["params"]:
                param.grad = part()
            if arm is anew:
                anew._stepper.replay = None
            times[name].append(timed(arm.step))
    return _medians(times)


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    """In microseconds, and the ratio of ours to torch's."""
    # the first two steps make state, lay out and compile
    rest = {name: values[2:] for name, values in times.items()}
    ratio = statistics.median(map(operator.truediv, rest["step"], rest["SGD"]))
    return {"ratio": ratio} | {n: 1e6 * statistics.median(values) for n, values in rest.items()}


def main() -> int:
    """Print a table, and write the figures to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--sharded", action="store_true", help="one of four ranks of DTensors")
    parser.add_argument("--out", metavar="FILE", help="write the figures there, as JSON")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    cases = [(groups, kind) for groups in (1, 28) for kind in GRADIENTS]
    if args.sharded:
        cases = [(1, "sharded")]
    found = []
    for groups, kind in cases:
        # in a process of its own: none works on the heap that another leaves behind
        with context.Pool(1) as pool:
            if args.sharded:
                row = pool.apply(measure_sharded, (args.tensors, args.repeats))
            else:
                row = pool.apply(measure, (args.tensors, groups, kind, args.repeats))
        print(f"{args.tensors} tensors, {groups} groups, {kind} gradients:")
        for name, value in row.items():
            print(f"  {name:18s} {value:8.{2 if name == 'ratio' else 1}f}")
        found.append({"groups": groups, "gradients": kind, **row})
    conditions = {"environment": environment(torch.device("cpu")), "commit": commit()}
    figures = {**conditions, "tensors": args.tensors, "repeats": args.repeats, "rows": found}
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

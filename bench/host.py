"""Host time of a step up to the driver, beside what reading the addresses alone costs.

    python -m bench.host [--tensors 300] [--repeats 1000] [--out FILE]

Runs anywhere: tensors are on the CPU. Times drift with the machine, so the figure to watch is the
ratio to the bare loop ``[p.grad.data_ptr() for p in params]``, measured in turns with the step,
over gradients as new as the step's. The targets, for a launcher that does nothing, are 3 with kept
gradients and 4.5 with new ones. "Launching", kernels are compiled for sm_90 and dispatched to a
driver that does nothing; all tensors are tiles but one, so that there are two launches. A ratio is
the median of those of the turns, since a shared machine may change its speed between two turns but
hardly within one. A schedule that gives every group another rate costs what "new rates" shows.

Gradients are "kept" (``zero_grad(set_to_none=False)``), "new" objects in every step where the last
ones were (the default, on a GPU whose allocator hands out the same places every time), or "moved":
new objects elsewhere, whose addresses are uploaded.
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

# read when kernels are defined: they are compiled here
os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch.nn import Parameter

from bench.report import commit, environment
from bngd_triton import BNGD
from bngd_triton.kept import PATIENCE

# a tile, and a segment
ELEMENTS, MORE = 64, 4096
GRADIENTS = ("kept", "new", "moved")


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
    """Medians: the ratio; in microseconds the bare loop, the step, and the parts of a check.

    The driver does nothing from here on.
    """
    from bench import driver
    from bngd_triton.kernels import prepared

    driver.as_if_on_a_gpu()
    params = [Parameter(torch.randn(ELEMENTS if i else MORE)) for i in range(n)]
    size = -(-n // groups)
    parts = [{"params": params[i : i + size]} for i in range(0, n, size)]
    optimizer = BNGD(parts, fused=True, flatten=False)
    backward = Backward(params, gradients)
    # until gradients that stay are known to
    for _ in range(2 + PATIENCE):
        backward()
        optimizer.step()
    steady = optimizer._stepper.steady
    assert steady is not None, "the step was not recognised as repeatable"
    grads = [param.grad for param in params]
    (fused,) = steady.prepared
    launch = prepared.launch
    this = optimizer._pass([True] * groups)

    def bare() -> list[int]:
        return [param.grad.data_ptr() for param in params]  # type: ignore[union-attr]

    # in turns: each of these with its like
    rounds: list[dict[str, Callable[[], object]]] = [
        {"bare loop": bare, "step": optimizer.step, "step, launching": optimizer.step},
        {"step, new rates": optimizer.step},
        {
            "  gradients": lambda: [param.grad for param in params],
            "  addresses": lambda: steady.params_at.of(params),
            "  kinds": lambda: steady.same_kinds(*grads, *params),
            "  state": lambda: steady._holds(optimizer.state),
            "  options": lambda: steady.same_groups(optimizer.param_groups),
            "  launches": lambda: fused.run_again(this),
            "    autograd versions": lambda: torch.autograd.graph.increment_version(params),
        },
    ]
    if steady.kept is not None:
        same = steady.kept.grads
        rounds[-1]["  gradients, kinds"] = lambda: same(steady.lists)
    times: dict[str, list[float]] = {}
    for loops in rounds:
        for repeat, (name, loop) in itertools.product(range(repeats), loops.items()):
            if loops is not rounds[-1]:
                backward()
            if name == "step, new rates":
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 / (repeat + 1)
            prepared.launch = driver.nothing if name == "step" else launch
            times.setdefault(name, []).append(timed(loop))
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    bares = times["bare loop"]
    ratio, launching = (
        statistics.median(map(operator.truediv, times[name], bares))
        for name in ("step", "step, launching")
    )
    return {"ratio": ratio, "ratio, launching": launching, **medians}


def main() -> int:
    """Print a table, and write the figures to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--out", metavar="FILE", help="write the figures there, as JSON")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found = []
    for groups in (1, 28):
        for kind in GRADIENTS:
            # in a process of its own: none works on the heap that another leaves behind
            with context.Pool(1) as pool:
                row = pool.apply(measure, (args.tensors, groups, kind, args.repeats))
            case = f"{args.tensors} tensors, {groups} groups, {kind} gradients"
            print(f"{case}: {row['ratio']:.2f} times, {row['ratio, launching']:.2f} launching")
            for name, value in row.items():
                if not name.startswith("ratio"):
                    print(f"  {name:22s} {value:8.1f} us")
            found.append({"groups": groups, "gradients": kind, **row})
    conditions = {"environment": environment(torch.device("cpu")), "commit": commit()}
    figures = {**conditions, "tensors": args.tensors, "repeats": args.repeats, "rows": found}
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

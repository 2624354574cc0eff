"""Host time of a step up to the driver, beside what reading the addresses alone costs.

    python -m bench.host [--tensors 300] [--repeats 1000] [--out FILE]

Runs anywhere: tensors are on the CPU, kernels are compiled for sm_90 and dispatched, and the driver
does nothing. All tensors are tiles but one, so that a step has two launches. Times drift with the
machine, so the figure to watch is the ratio to the bare loop ``[p.grad.data_ptr() for p in
params]``, measured in turns with the step. The targets are 3 with kept gradients and 4.5 with new
gradient tensors in every step. A ratio is the median of those of the turns, since a shared machine
may change its speed between two turns but hardly within one. A schedule that gives every group
another rate costs what "new rates" shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
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


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def renew(params: list[Parameter]) -> None:
    """New gradient tensors, as ``zero_grad()`` and ``backward()`` leave them."""
    for param in params:
        param.grad = torch.empty(param.shape)


def measure(n: int, groups: int, *, keep: bool, repeats: int) -> dict[str, float]:
    """Medians: the ratio; in microseconds the bare loop, the step, and the parts of a check.

    The driver does nothing from here on.
    """
    from bench import driver

    driver.as_if_on_a_gpu()
    params = [Parameter(torch.randn(ELEMENTS if i else MORE)) for i in range(n)]
    size = -(-n // groups)
    parts = [{"params": params[i : i + size]} for i in range(0, n, size)]
    optimizer = BNGD(parts, fused=True, flatten=False)
    renew(params)
    # until gradients that stay are known to
    for _ in range(2 + PATIENCE):
        if not keep:
            renew(params)
        optimizer.step()
    steady = optimizer._stepper.steady
    assert steady is not None, "the step was not recognised as repeatable"
    grads = [param.grad for param in params]
    (prepared,) = steady.prepared
    this = optimizer._pass([True] * groups)

    def bare() -> list[int]:
        return [param.grad.data_ptr() for param in params]  # type: ignore[union-attr]

    # in turns: each of these with its like
    rounds: list[dict[str, Callable[[], object]]] = [
        {"bare loop": bare, "step": optimizer.step},
        {"step, new rates": optimizer.step},
        {
            "  gradients": lambda: [param.grad for param in params],
            "  addresses": lambda: steady.params_at.of(params),
            "  kinds": lambda: steady.same_kinds(*grads, *params),
            "  state": lambda: steady._holds(optimizer.state),
            "  options": lambda: steady.same_groups(optimizer.param_groups),
            "  launches": lambda: prepared.run_again(this),
            "    autograd versions": lambda: torch.autograd.graph.increment_version(params),
        },
    ]
    if steady.kept is not None:
        same = steady.kept.grads
        rounds[-1]["  gradients, kinds"] = lambda: same(steady.lists)
    times: dict[str, list[float]] = {}
    for loops in rounds:
        for repeat, (name, loop) in itertools.product(range(repeats), loops.items()):
            if name.startswith("step") and not keep:
                renew(params)
            if name == "step, new rates":
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 / (repeat + 1)
            times.setdefault(name, []).append(timed(loop))
    ratios = [step / bare for step, bare in zip(times["step"], times["bare loop"])]
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    return {"ratio": statistics.median(ratios), **medians}


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
        for keep in (True, False):
            # in a process of its own: none works on the heap that another leaves behind
            with context.Pool(1) as pool:
                how = {"keep": keep, "repeats": args.repeats}
                row = pool.apply(measure, (args.tensors, groups), how)
            kind = "kept" if keep else "new"
            case = f"{args.tensors} tensors, {groups} groups, {kind} gradients"
            print(f"{case}: {row['ratio']:.2f} times")
            for name, value in row.items():
                if name != "ratio":
                    print(f"  {name:22s} {value:8.1f} us")
            found.append({"groups": groups, "gradients": kind, **row})
    conditions = {"environment": environment(torch.device("cpu")), "commit": commit()}
    figures = {**conditions, "tensors": args.tensors, "repeats": args.repeats, "rows": found}
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a step costs on the CPU, in times of `torch.optim.SGD(fused=True)`: the eager path.

    python -m bench.cpu [--turns 60] [--out FILE]

One process, one thread, momentum 0.9, all tensors with gradients that stay. Arms take turns, since
a shared machine may change its speed between two turns but hardly within one; a ratio is the median
of those of the turns. torch-optimi takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import operator
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from bench.report import commit, environment
from bngd_triton import BNGD

BASE = "SGD fused"


def _vit_s() -> list[tuple[int, ...]]:
    """ViT-S/16 at 224 pixels: 150 tensors, 22 M entries."""
    d = 384
    layer = [
        (d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,),
        (d, 4 * d), (d,),
    ]  # fmt: skip
    ends = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)], [(d,), (d,), (1000, d), (1000,)]
    return [*ends[0], *layer * 12, *ends[1]]


CASES: dict[str, list[tuple[int, ...]]] = {
    "40 of 64 x 64 and 40 of 64": [(64, 64), (64,)] * 40,
    "ViT-S, 152 tensors": _vit_s(),
    "one of 16.8 M": [(4096, 4096)],
    "3000 of 3 x 3": [(3, 3)] * 3000,
}


def arms() -> dict[str, Callable[[list[Parameter]], Optimizer]]:
    """What is timed, by name."""
    found: dict[str, Callable[[list[Parameter]], Optimizer]] = {
        BASE: lambda params: SGD(params, 1e-3, momentum=0.9, fused=True),
        "BNGD tensor": lambda params: BNGD(params, granularity="tensor", fused=False),
        "BNGD row": lambda params: BNGD(params, granularity="row", fused=False),
        "SGD foreach": lambda params: SGD(params, 1e-3, momentum=0.9, foreach=True),
        "AdamW foreach": lambda params: AdamW(params, 1e-3, foreach=True),
        "AdamW fused": lambda params: AdamW(params, 1e-3, fused=True),
    }
    if importlib.util.find_spec("optimi"):
        import optimi

        found["optimi SGD"] = lambda params: optimi.SGD(params, 1e-3, momentum=0.9, triton=False)
        found["optimi StableAdamW"] = lambda params: optimi.StableAdamW(params, 1e-3, triton=False)
    return found


def parameters(shapes: list[tuple[int, ...]]) -> list[Parameter]:
    """Random ones with random gradients."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def measure(shapes: list[tuple[int, ...]], turns: int) -> dict[str, Any]:
    """For each arm the ratio to `BASE` and microseconds of a step: medians."""
    params = parameters(shapes)
    steps = {name: make(params).step for name, make in arms().items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    # the first two make state and fill caches
    for _ in range(2 + turns):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e6 * (time.perf_counter() - start))
    found = {}
    for name, values in times.items():
        ratios = map(operator.truediv, values[2:], times[BASE][2:])
        found[name] = {"ratio": statistics.median(ratios), "us": statistics.median(values[2:])}
    return found


def main() -> int:
    """Print a table, and write the figures to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--out", metavar="FILE", help="write the figures there, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, shapes in CASES.items():
        rows[name] = measure(shapes, args.turns)
        print(f"{name}, {BASE} {rows[name][BASE]['us']:.0f} us; in times of it:")
        for arm, row in rows[name].items():
            print(f"  {arm:20s} {row['ratio']:8.2f}")
    conditions = {"environment": environment(torch.device("cpu")), "commit": commit()}
    document = {**conditions, "threads": 1, "turns": args.turns, "rows": rows}
    if args.out:
        Path(args.out).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

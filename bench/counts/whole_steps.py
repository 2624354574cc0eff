"""Whole steps by row, modelled: every launch by its slowest bound, one after the other."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from bench.counts import kernels
from bench.counts.bounds import slowest
from bench.workloads import WORKLOADS

STEPS = ("resnet50", "vit-b16", "gpt2-124m")


def whole_step(on: Any, workload: str) -> dict[str, Any]:
    """A step by row in float32, at the pessimistic end, and the time of its bytes alone.

    Rows of a length are counted on a few of them.
    """
    rows_of: Counter[int] = Counter()
    for shape in WORKLOADS[workload].shapes():
        rows = shape[0] if len(shape) > 1 else 1
        rows_of[math.prod(shape) // rows] += rows
    pessimistic = memory = 0.0
    for length, rows in sorted(rows_of.items()):
        few = max(2, 2**15 // length)
        case = kernels.Case("", (few, length), options=kernels.ROWS)
        for row in kernels.run(on, case):
            pessimistic += rows * length * slowest(row)
            memory += rows * length * row["bounds"]["memory"]
    return {
        "workload": workload,
        "entries": sum(n * rows for n, rows in rows_of.items()),
        "modelled_us": round(pessimistic / 1e6, 1),
        "memory_us": round(memory / 1e6, 1),
    }

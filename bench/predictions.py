"""``python -m bench.predictions``: what each step should take, written before any ran on a GPU.

    time = launches + elements * bytes / (efficiency * copy bandwidth)

Bytes are those of the ledger in `bench.arms`; what is read twice counts twice unless the second
read should hit the L2. The numbers below are the prediction: a run is compared with them, they are
not fitted to it. They rest on byte counts and on compiled code alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

from .arms import ARMS, STORAGES, Storage
from .models import WORKLOADS, Shape

# share of the copy bandwidth that a kernel's own bytes reach. Two launches of 16-byte accesses:
# 1.03 to 1.10 of the time of their bytes; SGD's multi-tensor kernels: 1.05 to 1.15
EFFICIENCY = {"bngd": 0.94, "single": 0.92, "torch": 0.91, "compile": 0.85}
# the first kernel's start, ramp and tail, and the gap before a second one
LAUNCH_US = 3.0
# of a gradient that stays in the L2 between the two reads of a single launch: with a wave of 8 MiB
# it makes the 25 MB that an L2 in two halves may hold twice
WINDOW_BYTES = 16_000_000
# entries of a row or small tensor that a program keeps in registers and reads once
REGISTERS = 2048

# bandwidths that copies reach on machines of these kinds, in GB/s: for the table alone
COPY_GBPS = {"H200": 4300.0, "H100": 3000.0}


def predict(workload: str, dtype: str, arm: str, copy_gbps: float) -> float | None:
    """Microseconds of a step in device time; None where nothing was predicted."""
    rule = _RULES.get(arm)
    if rule is None or workload not in WORKLOADS:
        return None
    shapes, storage = list(WORKLOADS[workload].shapes()), STORAGES[dtype]
    if arm == "compile" and storage.low:
        return None
    count = sum(map(math.prod, shapes))
    once, efficiency, launches, again = rule(shapes, storage)
    moved = count * once + sum(math.prod(shape) for shape in again) * storage.param.itemsize
    return launches * LAUNCH_US + moved / (efficiency * copy_gbps * 1e3)


# bytes of an element that are moved for certain, efficiency, launches, gradients read again
_Rule = Callable[[list[Shape], Storage], tuple[int, float, int, Iterable[Shape]]]


def _two_launches(shapes: list[Shape], storage: Storage) -> tuple[int, float, int, list[Shape]]:
    large = [shape for shape in shapes if math.prod(shape) > REGISTERS]
    return ARMS["bngd"].bytes_once(storage), EFFICIENCY["bngd"], 2 if large else 1, large


def _single_launch(shapes: list[Shape], storage: Storage) -> tuple[int, float, int, list[Shape]]:
    size = storage.param.itemsize
    late = [shape for shape in shapes if math.prod(shape) * size > WINDOW_BYTES]
    return ARMS["bngd"].bytes_once(storage), EFFICIENCY["single"], 1, late


def _rows(shapes: list[Shape], storage: Storage) -> tuple[int, float, int, list[Shape]]:
    long = [s for s in shapes if math.prod(s[1:] if len(s) > 1 else s) > REGISTERS]
    return ARMS["bngd-row"].bytes_once(storage), EFFICIENCY["bngd"], 2 if long else 1, long


def _together(shapes: list[Shape], storage: Storage) -> tuple[int, float, int, list[Shape]]:
    return ARMS["bngd-global"].bytes_once(storage), EFFICIENCY["bngd"], 2, shapes


def _torch(arm: str) -> _Rule:
    def rule(shapes: list[Shape], storage: Storage) -> tuple[int, float, int, list[Shape]]:
        issued = ARMS[arm].bytes_issued(storage)
        assert issued is not None, f"nobody counted the bytes of {arm}"
        # tables of a launch hold about 100 tensors at two to three lists
        return issued, EFFICIENCY["torch"], -(-len(shapes) // 100), []

    return rule


def _compiled(shapes: list[Shape], storage: Storage) -> tuple[int, float, int, list[Shape]]:
    # at best: combo kernels of at most 8 tensors, two passes
    return ARMS["compile"].bytes_once(storage), EFFICIENCY["compile"], -(-len(shapes) // 4), shapes


_RULES: dict[str, _Rule] = {
    # two launches are the default
    "bngd": _two_launches,
    "bngd-two-launch": _two_launches,
    "bngd-pdl": _two_launches,
    "bngd-direct": _two_launches,
    "bngd-graph": _two_launches,
    "bngd-single-launch": _single_launch,
    "bngd-row": _rows,
    # no tensor is finished in registers: the slice ends with the last of them
    "bngd-global": _together,
    "torch-sgd-fused": _torch("torch-sgd-fused"),
    "torch-sgd-foreach": _torch("torch-sgd-foreach"),
    "torch-adamw-fused": _torch("torch-adamw-fused"),
    "compile": _compiled,
}


def main() -> int:
    """Print every prediction, by assumed bandwidth."""
    from .gpu import COMPILED, FULL, QUICK

    kinds = "".join(f"{f'{kind}, us':>12}" for kind in COPY_GBPS)
    print(f"{'workload':17}{'dtype':11}{'arm':20}{kinds}")
    for item in dict.fromkeys([*QUICK, *FULL[1], *FULL[2], *FULL[3], *COMPILED]):
        for arm in ARMS:
            if arm == "compile" and item not in COMPILED:
                continue
            times = [predict(*item, arm, copy) for copy in COPY_GBPS.values()]
            if None not in times:
                shown = "".join(f"{time:12.1f}" for time in times)
                print(f"{item.workload:17}{item.dtype:11}{arm:20}{shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

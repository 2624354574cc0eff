"""Host time of a step of sharded parameters, beside that of torch's SGD.

    python -m bench.shards [--tensors 300] [--repeats 100] [--out FILE]

Runs anywhere: one of four ranks, on the CPU; kernels are dispatched to a driver that does nothing,
and collectives of torch's fake process group return at once. Each step has new gradients, as
`fully_shard` leaves them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

# read when Triton is imported: kernels are compiled here
os.environ.pop("TRITON_INTERPRET", None)

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import driver
from bench.host import timed
from bench.report import commit, environment
from bngd_triton import BNGD

RANKS = 4
SHAPE = (16, 64)


def measure(n: int, repeats: int) -> dict[str, float]:
    """Medians in milliseconds: of a step laid out anew, of one that is repeated, of SGD's."""
    driver.as_if_on_a_gpu()
    mesh = init_device_mesh("cpu", (RANKS,))

    def part() -> DTensor:
        return DTensor.from_local(torch.randn(SHAPE), mesh, [Shard(0)])

    def optimizer(kind: Callable[..., Optimizer], **options: object) -> Optimizer:
        return kind([Parameter(part()) for _ in range(n)], lr=1e-3, momentum=0.9, **options)

    repeating = optimizer(BNGD, fused=True, flatten=False)
    anew = optimizer(BNGD, fused=True, flatten=False)
    arms = {
        "repeated": repeating,
        "laid out anew": anew,
        "torch.optim.SGD(foreach=True)": optimizer(SGD, foreach=True),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(2 + repeats):
        for name, arm in arms.items():
            for group in arm.param_groups:
                for param in group["params"]:
                    param.grad = part()
            if arm is anew:
                anew._stepper.replay = None
            times[name].append(timed(arm.step))
    assert repeating._stepper.replay is not None, "the step was not recognised as repeatable"
    # the first two make state, and fill torch's caches
    return {name: 1e3 * statistics.median(some[2:]) for name, some in times.items()}


def main() -> int:
    """Print the figures, and write them to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", metavar="FILE", help="write the figures there, as JSON")
    args = parser.parse_args()
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    found = measure(args.tensors, args.repeats)
    for name, value in found.items():
        print(f"{name:30s} {value:7.2f} ms")
    conditions = {"environment": environment(torch.device("cpu")), "commit": commit()}
    figures = {**conditions, "tensors": args.tensors, "repeats": args.repeats, "ms": found}
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.one``: few steps of one arm and nothing else, for tools that watch a process.

    python -m bench.one gate --arm bngd form=single-launch --dtype bf16  # checked against float64
    python -m bench.one gpt2-124m --arm form=two-launch                  # one step is profiled

An arm is a name of `bench.arms` or, where it has an ``=``, fields of `Tuning`.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import devices

if TYPE_CHECKING:
    from .arms import Arm, Storage
    from .models import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Step.

    Returns:
        0; 1 where the gate finds the arm wrong; 2 for bad arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.one", description=__doc__)
    parser.add_argument("workload", help="a workload, or 'gate'")
    parser.add_argument("--arm", nargs="+", default=["bngd"], help="in turn")
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args(argv)
    device = devices.use()
    from .arms import STORAGES
    from .models import DRY_RUN, WORKLOADS

    try:
        several, storage = [arm_of(text) for text in args.arm], STORAGES[args.dtype]
        workload = None if args.workload == "gate" else (WORKLOADS | DRY_RUN)[args.workload]
    except (KeyError, ValueError) as error:
        print(f"bench.one: error: unknown {error}", file=sys.stderr)
        return 2
    right = True
    for arm in several:
        if workload is None:
            right &= _gate(arm, storage, device)
        else:
            _steps(arm, storage, workload, device)
    return 0 if right else 1


def _gate(arm: Arm, storage: Storage, device: torch.device) -> bool:
    from . import gate
    from .arms import UnavailableError

    try:
        gate.check(arm, storage, device)
    except UnavailableError as error:
        print(f"{arm.name} {storage.label}: {error}")
        return False
    print(f"{arm.name} {storage.label}: right", flush=True)
    return True


def arm_of(text: str) -> Arm:
    """An arm by its name or its tuning; KeyError or ValueError for what is neither."""
    from bngd_triton.kernels.tuning import Tuning

    from .arms import ARMS, tuned

    if "=" not in text:
        return ARMS[text]
    tuning = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in Tuning.__dataclass_fields__:
            raise ValueError(f"field {name!r} of Tuning in {text!r}")
        # a form is a bare word
        tuning[name] = (
            ast.literal_eval(value) if value[:1].isdigit() or value in ("True", "False") else value
        )
    return tuned(tuning)


def _steps(arm: Arm, storage: Storage, workload: Workload, device: torch.device) -> None:
    """Rotate over as many sets as the benchmark does, then profile a step on the coldest."""
    from . import cases
    from .arms import start
    from .models import elements

    shapes = list(workload.shapes())
    size = 2 * storage.param.itemsize + storage.momentum.itemsize
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2048
    n = cases.n_sets(size * elements(iter(shapes)), l2)
    sets = [cases.make_set(shapes, storage, device) for _ in range(n)]
    steppers = [start(arm, params, workload.groups, storage, cases.LR) for params in sets]
    for stepper in steppers:
        stepper.step()
    if device.type == "cpu":
        steppers[0].step()
        return
    torch.cuda.synchronize()
    # what a profiler started with "--profile-from-start off" sees
    torch.cuda.profiler.start()
    steppers[0].step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(main())

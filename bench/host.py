"""Host time of a step without its launches, beside what reading the addresses alone costs.

    python -m bench.host [--tensors 300] [--repeats 200]

Runs anywhere: tensors are on the CPU and launches do nothing. Times drift with the machine, so the
figure to watch is the ratio to the bare loop ``[p.grad.data_ptr() for p in params]``, measured in
turns with the step. The targets are 3 with kept gradients and 4.5 with new gradient tensors in
every step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

# the kernels serve CPU tensors only in the interpreter, which the do-nothing launcher never enters
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.kept import PATIENCE
from bngd_triton.kernels import prepared

ELEMENTS = 64


def nothing(*_: object) -> None:
    """Stands in for the two launches."""


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def renew(params: list[Parameter]) -> None:
    """New gradient tensors, as ``zero_grad()`` and ``backward()`` leave them."""
    for param in params:
        param.grad = torch.empty(ELEMENTS)


def measure(n: int, groups: int, *, keep: bool, repeats: int) -> dict[str, float]:
    """Medians in microseconds of the bare loop, of the step, and of the parts of a check."""
    params = [Parameter(torch.randn(ELEMENTS)) for _ in range(n)]
    size = -(-n // groups)
    parts = [{"params": params[i : i + size]} for i in range(0, n, size)]
    optimizer = BNGD(parts, fused=True, flatten=False)
    renew(params)
    # until gradients that stay are known to
    for _ in range(2 + PATIENCE):
        optimizer.step()
    steady = optimizer._stepper.steady
    assert steady is not None, "the step was not recognised as repeatable"
    momenta = steady.held[0][2].tensors

    def grads() -> list[Tensor]:
        return [param.grad for param in params]  # type: ignore[misc]

    def addresses() -> list[int]:
        return list(map(Tensor.data_ptr, momenta))

    loops: dict[str, Callable[[], object]] = {
        "bare loop": lambda: [param.grad.data_ptr() for param in params],  # type: ignore[union-attr]
        "step": optimizer.step,
        "  gradients": grads,
        "  their addresses": addresses,
        "  state": steady._holds,
        "  kinds": lambda: steady.same_kinds(*grads(), *params),
        "  options": lambda: steady.same_groups(optimizer.param_groups),
        "  autograd versions": lambda: torch.autograd.graph.increment_version(params),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            if name == "step" and not keep:
                renew(params)
            times[name].append(timed(loop))
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def main() -> int:
    """Print a table, and the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    prepared.launch = nothing
    found = []
    for groups in (1, 28):
        for keep in (True, False):
            row = measure(args.tensors, groups, keep=keep, repeats=args.repeats)
            ratio = row["step"] / row["bare loop"]
            kind = "kept" if keep else "new"
            print(f"{args.tensors} tensors, {groups} groups, {kind} gradients: {ratio:.2f} times")
            for name, value in row.items():
                print(f"  {name:22s} {value:8.1f} us")
            found.append({"groups": groups, "gradients": kind, "ratio": ratio, **row})
    print(json.dumps({"torch": torch.__version__, "tensors": args.tensors, "rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

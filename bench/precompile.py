"""``python -m bench.precompile --out DIR``: compile what a session on a GPU launches, without one.

DIR is a cache of Triton to carry there, where ``python -m bench.precompile --moved DIR`` notes its
new place, before TRITON_CACHE_DIR points at it: `session.sh` does both (CACHE=DIR). It serves the
same version of Triton, kernels and target alone; PYTHONPATH can lead to another Triton. Kernels are
those of `bench/session.sh` and `tests/kernels/test_gpu.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# what a launch needs of a compilation; the texts on the way there are as large again
KEPT = (".cubin", ".json")
# spans of several programs, and rows that are tiles of each width
SHAPES = ((70_000,), (3, 9000), (6, 20), (4, 100), (3, 500), (2, 2000), (2051,), (16,))
OPTIONS: tuple[dict[str, Any], ...] = (
    {"granularity": "tensor"},
    {"granularity": "row"},
    {"granularity": "row", "accumulation_steps": 4},
    {"master_weights": "stochastic"},
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="compile into this folder")
    what.add_argument("--moved", type=Path, metavar="DIR", help="this folder was another's")
    parser.add_argument("--target", default="sm_90", help="sm_90 by default")
    parser.add_argument("--only", help="storage of this label, such as fp32")
    args = parser.parse_args()
    if args.moved:
        settle(args.moved.resolve())
        return 0
    begin = time.monotonic()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(args.out.resolve())
    from triton.backends.compiler import GPUTarget

    from bench import driver

    driver.TARGETS["cuda"] = GPUTarget("cuda", int(args.target.removeprefix("sm_")), 32)
    driver.as_if_on_a_gpu()
    for launched in steps(args.target, args.only):
        print(f"{launched} ({time.monotonic() - begin:.0f} s)", flush=True)
    files = [path for path in args.out.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix not in KEPT:
            path.unlink()
    kernels = list(args.out.rglob("*.cubin"))
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{len(kernels)} kernels, {size / 1e6:.1f} MB, in {args.out}")
    return 0


def settle(folder: Path) -> None:
    """Have a cache find its files where they are: Triton notes absolute paths."""
    for group in folder.rglob("__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.with_name(name)) for name in names}
        group.write_text(json.dumps({"child_paths": here}))


def steps(target: str, only: str | None) -> Iterator[str]:
    """Take each step, and say which."""
    import torch

    from bench.arms import STORAGES
    from bngd_triton import BNGD
    from bngd_triton.kernels import devices, fused_step
    from bngd_triton.kernels.launch import FORMS, rates_launch
    from support.kernel_cases import LANES

    usual = devices.TABLE[target].tuning
    # the last is an arm of the session
    unhinted = dataclasses.replace(usual, hints=False)
    bases = (usual, OPTIONS), (LANES, OPTIONS), (unhinted, OPTIONS[:1])
    rates_launch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 16).double())(None)
    for storage in [STORAGES[only]] if only else STORAGES.values():
        for form in FORMS:
            for base, chosen in bases[: 1 if storage.param is not torch.float32 else None]:
                tuning = dataclasses.replace(base, form=form)
                fused_step.tuning_for = lambda _, tuning=tuning: tuning  # type: ignore[misc]
                for options, shapes in itertools.product(chosen, (SHAPES, SHAPES[:2])):
                    more = {**storage.options, **options}
                    params = [torch.nn.Parameter(torch.zeros(s).to(storage.param)) for s in shapes]
                    for param in params:
                        param.grad = torch.zeros_like(param)
                    BNGD(params, fused=True, **more).step()
                yield f"{storage.label}, {form}"


if __name__ == "__main__":
    # LANES are the tests' own
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    sys.exit(main())

"""``python -m bench.run``: BNGD beside its rivals on a GPU, correctness first, raw results as JSON.

Every arm is held against float64 before it is timed. `--only` chooses workloads, storages and arms;
`--tuning form=single-launch,wave=4194304` adds the arm `bngd` with other sizes than the device's.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from . import gate, report, timing
from .arms import ARMS, STORAGES, Arm, Storage, UnavailableError, start, tuned
from .workloads import DRY_RUN, WORKLOADS, Workload

# small enough that thousands of steps of any arm stay finite
LR = 1e-6
# the usual targets first: a budget that runs out costs the last ones
QUICK = [
    ("host-300", "fp32"), ("resnet50", "fp32"), ("vit-b16", "fp32"), ("gpt2-124m", "fp32"),
    ("many-1000x1000", "fp32"), ("gpt2-1.5b", "bf16"), ("gpt2-1.5b", "bf16-fp32m"),
    ("gpt2-1.5b", "bf16-split"), ("moe-10k", "fp32"), ("groups-465", "fp32"), ("one-2.2e9", "fp32"),
]  # fmt: skip
FULL = [(workload, dtype) for workload in WORKLOADS for dtype in STORAGES]
DRY = [("dry-run", dtype) for dtype in STORAGES] + [("dry-run-groups", "fp32")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run.

    Returns:
        0; 1 without a GPU or where a case broke off; 2 for bad arguments; 130 after Ctrl-C, with
        what is done written.
    """
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        tries = "--device cpu tries the code on tiny workloads"
        print(f"bngd: error: there is no GPU here; {tries}", file=sys.stderr)
        return 1
    if args.device == "cpu":
        # read when the kernels are imported, with the first step
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        arms = [*ARMS.values(), *(tuned("bngd", _tuning(text)) for text in args.tuning)]
        items, arms = _selection(args, arms)
    except ValueError as error:
        print(f"bngd: error: {error}", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    results = report.Results(args.out, device, args.suite)
    results.document["copy_gbps"] = timing.copy_gbps(device)
    budget = args.budget if args.budget is not None else 420.0 if args.suite == "quick" else 1e9
    end = time.monotonic() + budget
    code = 0
    try:
        for workload, dtype in items:
            if time.monotonic() > end:
                results.document["not_run"].append(f"{workload} {dtype}: the budget was spent")
                continue
            print(f"{workload} {dtype} ...", file=sys.stderr, flush=True)
            for arm in arms:
                try:
                    _one(results.document, (WORKLOADS | DRY_RUN)[workload], dtype, arm, device)
                # out of memory, say: it must not cost the others
                except Exception as error:
                    line = f"{workload} {dtype} {arm.name}: {type(error).__name__}: {error}"
                    results.document["not_run"].append(line.partition("\n")[0][:200])
                    code = 1
                results.save()
        results.document["finished"] = not code
    except KeyboardInterrupt:
        code = 130
    finally:
        # also when an error ends the run: what is done stays
        results.save()
    print(report.table(results.document))
    print(f"Wrote {results.path}")
    if args.chart and results.document["rows"]:
        report.chart([str(results.path)])
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--suite", choices=("quick", "full"), default="quick")
    parser.add_argument("--only", default="", help="comma-separated workloads, storages, arms")
    parser.add_argument(
        "--tuning", action="append", default=[], metavar="FIELD=VALUE,...",
        help="an arm with these sizes; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument("--chart", action="store_true", help="draw a PNG beside the results")
    parser.add_argument(
        "--budget", type=float, help="seconds before cases stop: 420 for quick, else without end"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser


def _tuning(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    # a form is a bare word
    plain = r"\d+|True|False"
    return {n: ast.literal_eval(v) if re.fullmatch(plain, v) else v for n, _, v in pairs}


def _selection(
    args: argparse.Namespace, arms: Sequence[Arm]
) -> tuple[list[tuple[str, str]], list[Arm]]:
    """The cases and arms that --only leaves; ValueError for a word that names none."""
    words = {word.strip() for word in args.only.split(",") if word.strip()}
    names = {arm.name for arm in arms}
    known = {*WORKLOADS, *DRY_RUN, *STORAGES, *names}
    if words - known:
        raise ValueError(f"--only: unknown {sorted(words - known)}; known are {sorted(known)}")
    items = DRY if args.device == "cpu" else QUICK if args.suite == "quick" else FULL
    for kind in (0, 1):
        chosen = words & {item[kind] for item in FULL + DRY}
        items = [item for item in items if not chosen or item[kind] in chosen]
    # an arm that was asked for by its tuning is always there
    return items, [a for a in arms if not words & names or a.name in words or a.tuning]


# what failed is asked again: it may have lacked memory just then
@functools.cache
def _gate(arm: Arm, dtype: str, device: torch.device) -> None:
    gate.check(arm, STORAGES[dtype], device)


def _one(
    document: dict[str, Any], workload: Workload, dtype: str, arm: Arm, device: torch.device
) -> None:
    """A row of the results, or the reason why there is none."""
    storage = STORAGES[dtype]
    place = {"workload": workload.name, "dtype": dtype, "arm": arm.name}
    try:
        _gate(arm, dtype, device)
        params = make_params(workload, storage, device)
        step = start(arm, params, workload.groups, storage, LR)
    except UnavailableError as error:
        document["unavailable"].append({**place, "reason": str(error)})
        return
    finally:
        # the arm before this one must not share the memory
        gc.collect()
    count = sum(param.numel() for param in params)
    extra = timing.extra_bytes(step, device)
    row = {**place, **timing.times(step, device), "tensors": len(params), "elements": count}
    once = arm.bytes_once(storage)
    gbps = once * count / row["median_us"] / 1e3
    row |= {
        "peak_extra_bytes": extra, "bytes_per_element": once, "gbps": gbps,
        "bytes_issued_per_element": arm.bytes_issued(storage),
        "copy_fraction": gbps / document["copy_gbps"],
    }  # fmt: skip
    document["rows"].append(row)


def make_params(workload: Workload, storage: Storage, device: torch.device) -> list[Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in workload.shapes():
        values = [torch.randn(shape, generator=generator, device=device) for _ in range(2)]
        params.append(Parameter(values[0].to(storage.param)))
        params[-1].grad = values[1].to(storage.param)
    return params


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.gpu``: BNGD beside its rivals on a GPU, correctness first, raw results as JSON.

``--suite quick`` takes at most about 8 minutes, so does each of the three parts of ``--suite full``
and ``--suite compiled``. The arm `compile` is in the last of these only, beside three others: each
variant of `torch.compile` takes a minute or more, and a ratio needs both arms in one run.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import devices

if TYPE_CHECKING:
    from .arms import Arm
    from .cases import Effort
    from .report import Results

# a call of 9 minutes leaves the last case a minute past it
BUDGET_S = 420.0
# of the copied gigabyte, half of which alone dwarfs any L2
COPY_BYTES = {"cuda": 2**30, "cpu": 2**20}
_INTERRUPTED = 130


class Item(NamedTuple):
    """A workload in one storage."""

    workload: str
    dtype: str


# a profiler counts launches after each case and stays attached, which may slow the host: the case
# whose host time is a target comes first. Then come the others that the targets name, since a
# budget that runs out costs the last ones
QUICK = [
    Item("host-300", "fp32"),
    Item("gpt2-124m", "fp32"),
    Item("resnet50", "fp32"),
    Item("vit-b16", "fp32"),
    Item("many-1000x1000", "fp32"),
    Item("llama3-8b-shard", "bf16"),
    Item("gpt2-1.5b", "bf16"),
    Item("gpt2-1.5b", "bf16-fp32m"),
    Item("gpt2-1.5b", "bf16-split"),
    Item("moe-10k", "fp32"),
    Item("groups-465", "fp32"),
    Item("one-2.2e9", "fp32"),
]
FULL = {
    1: [
        *(Item(name, "fp32") for name in ("host-300", "resnet50", "vit-b16", "gpt2-124m")),
        *(Item(name, "fp32") for name in ("gpt2-1.5b", "many-1000x1000")),
    ],
    2: [
        Item(name, dtype)
        for name in ("gpt2-124m", "gpt2-1.5b", "llama3-8b-shard")
        for dtype in ("bf16", "bf16-fp32m", "bf16-split")
    ],
    3: [
        *(Item(name, "fp32") for name in ("moe-10k", "groups-465", "one-2.2e9")),
        Item("llama3-8b-shard", "fp32"),
        *(Item("moe-10k", dtype) for dtype in ("bf16", "bf16-fp32m", "bf16-split")),
        *(Item("resnet50", dtype) for dtype in ("bf16", "bf16-fp32m", "bf16-split")),
    ],
}
DRY_RUN = [Item("dry-run", "fp32"), Item("dry-run", "bf16-fp32m"), Item("dry-run-groups", "fp32")]
# each variant of each takes a minute or more of compiling
COMPILED = [Item("gpt2-124m", "fp32"), Item("gpt2-124m", "bf16-fp32m")]
COMPILED_ARMS = ("bngd", "torch-sgd-fused", "eager", "compile")
TRAINING_ARMS = ("bngd", "torch-sgd-fused", "torch-adamw-fused", "eager")
COLD = (("bngd", "resnet50"), ("bngd-row", "resnet50"), ("torch-sgd-fused", "resnet50"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite.

    Returns:
        0; 1 without a GPU or where a case broke off; 2 for bad arguments; 130 after Ctrl-C, with
        what is done written.
    """
    args = _parser().parse_args(argv)
    try:
        device = devices.use(args.device)
    except devices.NoGPUError as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 1
    from .arms import ARMS
    from .report import Results, table

    try:
        items, arms = _selection(args, list(ARMS))
    except ValueError as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 2
    suite = f"{args.suite}-{args.part}" if args.suite == "full" else args.suite
    results = Results(args.out, device, suite)
    code = 0
    try:
        whole = _run(args, items, [ARMS[name] for name in arms], device, results)
        results.document["finished"] = whole
        code = 0 if whole else 1
    except KeyboardInterrupt:
        code = _INTERRUPTED
    finally:
        # also when an error ends the run: what is done stays
        results.save()
    print(table(results.document))
    print(f"Wrote {results.path}")
    if args.chart and results.document["rows"]:
        draw(results.path)
    return code


def draw(path: Path) -> None:
    """The chart of a result file beside it, or a line that says what is missing."""
    try:
        from . import plot
    except ImportError as error:
        print(f"No chart: {error}; pip install matplotlib, then bngd bench --plot {path}")
        return
    plot.main([str(path)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--suite", choices=("quick", "full", "compiled"), default="quick",
        help="the arm of torch.compile is in compiled only",
    )  # fmt: skip
    parser.add_argument("--part", type=int, choices=(1, 2, 3), default=1, help="of the full suite")
    parser.add_argument(
        "--only", default="",
        help="comma-separated workloads, dtypes, arms, 'training' and 'cold' to keep",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument(
        "--chart", action="store_true", help="draw the results as a PNG beside them"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds before cases stop")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"),
        help="cpu tries the code on tiny workloads, kernels in Triton's interpreter",
    )  # fmt: skip
    return parser


def _selection(args: argparse.Namespace, arms: list[str]) -> tuple[list[Item], list[str]]:
    """The items and arms that --only leaves; ValueError for a word that names none."""
    from .arms import STORAGES
    from .models import DRY_RUN as TINY
    from .models import WORKLOADS

    words = {word.strip() for word in args.only.split(",") if word.strip()}
    known = {*WORKLOADS, *TINY, *STORAGES, *arms, "training", "cold"}
    if words - known:
        raise ValueError(f"--only: unknown {sorted(words - known)}; known are {sorted(known)}")
    items = {"quick": QUICK, "full": FULL[args.part], "compiled": COMPILED}[args.suite]
    if args.device == "cpu":
        items = DRY_RUN
    workloads, dtypes = words & {*WORKLOADS, *TINY}, words & set(STORAGES)
    items = [i for i in items if not workloads or i.workload in workloads]
    items = [i for i in items if not dtypes or i.dtype in dtypes]
    if words and not (workloads or dtypes or words & set(arms)):
        items = []
    return items, [arm for arm in arms if not words & set(arms) or arm in words]


def _effort(args: argparse.Namespace) -> Effort:
    from .cases import Effort
    from .compiled import VARIANTS

    if args.device == "cpu":
        return Effort(repetitions=2, most_s=0.0, host_calls=1, variants=("combo", "foreach"))
    if args.suite == "quick":
        return Effort(repetitions=25, most_s=1.0, host_calls=30)
    # with three parts, each arm of each case may take twice as long
    effort = Effort(repetitions=60, most_s=2.0, host_calls=60)
    return replace(effort, variants=tuple(VARIANTS)) if args.suite == "compiled" else effort


def _run(
    args: argparse.Namespace, items: Sequence[Item], arms: Sequence[Arm], device: torch.device,
    results: Results,
) -> bool:  # fmt: skip
    """Measure the items, then the rest; whether nothing broke off."""
    from . import cases
    from .arms import STORAGES
    from .measure import clock_for, copy_bandwidth
    from .models import DRY_RUN as TINY
    from .models import WORKLOADS

    end = time.monotonic() + args.budget
    document = results.document
    clock = clock_for(device)
    effort = _effort(args)
    document["copy_gbps"] = copy_bandwidth(clock, COPY_BYTES[device.type])
    if args.suite == "compiled":
        arms = [arm for arm in arms if arm.name in COMPILED_ARMS]
    # without a GPU there is no L2 to flush; one set would not exercise the rotation
    l2 = document["environment"].get("l2_bytes", 2048)
    whole = True
    for item in items:
        if time.monotonic() > end:
            document["not_run"].append(f"{item.workload} {item.dtype}: the budget was spent")
            continue
        compiling = args.suite == "compiled" or item in DRY_RUN
        chosen = [arm for arm in arms if arm.name != "compile" or compiling]
        if len(chosen) < len(arms):
            document["unavailable"].append(
                {
                    "workload": item.workload, "dtype": item.dtype, "arm": "compile",
                    "reason": "in --suite compiled only",
                }
            )  # fmt: skip
        print(f"{item.workload} {item.dtype} ...", file=sys.stderr, flush=True)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        case = cases.Case(
            (WORKLOADS | TINY)[item.workload], STORAGES[item.dtype], chosen, clock, effort,
            document["copy_gbps"], l2, free, lambda: time.monotonic() < end,
        )  # fmt: skip
        try:
            outcome = cases.run(case)
            document["rows"] += outcome.rows
            document["unavailable"] += outcome.unavailable
            results.save()
        except Exception as error:
            # a case that does not fit the memory, say, must not cost the others
            broke_off(f"{item.workload} {item.dtype}", error, results)
            whole = False
    whole &= _run_rest(args, arms, end, results, device)
    if whole:
        # a GPU that got warm or was throttled shows here
        document["copy_gbps_after"] = copy_bandwidth(clock, COPY_BYTES[device.type])
    return whole


def broke_off(what: str, error: Exception, results: Results) -> None:
    """Note that a part of a run ended with an error, and write what is there."""
    traceback.print_exception(error)
    line = (str(error).strip() or "no message").partition("\n")[0][:200]
    results.document["not_run"].append(f"{what}: {type(error).__name__}: {line}")
    results.save()


def _run_rest(
    args: argparse.Namespace, arms: Sequence[Arm], end: float, results: Results,
    device: torch.device,
) -> bool:  # fmt: skip
    """Training steps and cold starts; with --only, where it names them."""
    from . import cold, training
    from .measure import clock_for

    dry, whole = device.type == "cpu", True
    # the first of three parts has them
    elsewhere = args.suite == "compiled" or (args.suite == "full" and args.part > 1)
    asked = "" if elsewhere else args.only or "training,cold"
    models = list(training.MODELS) if "training" in asked.split(",") else []
    for name in models:
        if time.monotonic() > end:
            results.document["not_run"].append(f"training {name}: the budget was spent")
            continue
        size = training.DRY_RUN if dry else training.Size()
        chosen = [arm for arm in arms if arm.name in TRAINING_ARMS]
        try:
            rows, missing = training.run(name, chosen, clock_for(device), size, 1 if dry else 10)
        except Exception as error:
            broke_off(f"training {name}", error, results)
            whole = False
            continue
        results.document["training"] += rows
        results.document["unavailable"] += missing
        results.save()
    for arm, workload in COLD if "cold" in asked.split(",") else ():
        if time.monotonic() > end:
            results.document["not_run"].append(f"cold start of {arm}: the budget was spent")
            continue
        found = cold.measure(arm, "dry-run" if dry else workload, device.type)
        results.document["cold_start"].append(found)
        results.save()
    return whole


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.sweep``: the open questions of the kernels' design, one change at a time.

Each question is a case of its own: the base and its changes over the same buffers, in turns, so
that only ratios to the base of the same question mean something. Raw rows go to one JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import devices

BUDGET_S = 420.0


class Question(NamedTuple):
    """What is changed, from where, and where it is asked.

    Attributes:
        base: fields of `Tuning` of the first arm.
        changes: of the others, on top of the base.
        places: workloads and dtypes.
    """

    base: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]
    places: Sequence[tuple[str, str]]


def _each(name: str, *values: Any) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


_FP32 = [("gpt2-124m", "fp32"), ("resnet50", "fp32")]
_LARGE = [("gpt2-1.5b", "bf16"), ("llama3-8b-shard", "bf16")]
_MANY = [("moe-10k", "fp32")]
_ALL = [*_FP32, *_LARGE, ("gpt2-1.5b", "bf16-split"), *_MANY]
_TWO = {"form": "two-launch"}
_ONE = {"form": "single-launch"}

# the largest expected differences first: a budget that runs out costs the others
QUESTIONS: dict[str, Question] = {
    "form": Question(_TWO, [_ONE, {**_ONE, "slice": 4096, "chunk": 4096}], _ALL),
    "wave": Question(_ONE, _each("wave", 2 << 20, 4 << 20, 16 << 20, 32 << 20), _FP32 + _LARGE),
    "programs": Question(_ONE, _each("programs_per_sm", 2, 3, 5, 6, 8), _FP32 + _LARGE),
    "single-sizes": Question(
        _ONE,
        [{"slice": s, "chunk": c} for s, c in ((2048, 2048), (8192, 4096), (16384, 16384))],
        _FP32 + _LARGE,
    ),
    "pdl": Question(_TWO, [{"pdl": True}], [*_ALL, ("host-300", "fp32")]),
    "direct": Question(_TWO, [{"direct": False}], [("host-300", "fp32"), *_FP32]),
    "slice": Question(_TWO, _each("slice", 4096, 16384, 32768, 65536), _ALL),
    "chunk": Question(_TWO, _each("chunk", 4096, 16384, 32768, 65536), _ALL),
    "wide": Question(_TWO, [{"wide": False}], _ALL),
    "update": Question(
        _TWO,
        [{"update_block": 512}, {"update_block": 2048}, {"update_block": 2048, "update_warps": 8}],
        _FP32 + _LARGE,
    ),
    "block": Question(
        _TWO,
        [{"unroll": 2}, {"unroll": 8}, {"block": 1024}, {"block": 1024, "warps": 8}],
        _FP32 + _LARGE,
    ),
    "tile": Question(_TWO, _each("tile", 1024, 4096), _MANY),
}  # fmt: skip
TINY = [("dry-run", "fp32")]


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the questions.

    Returns:
        0; 1 without a GPU or where a case broke off; 2 for bad arguments; 130 after Ctrl-C, with
        what is done written.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("--only", default="", help="comma-separated questions and workloads")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds before cases stop")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    try:
        device = devices.use(args.device)
    except devices.NoGPUError as error:
        print(f"bench.sweep: error: {error}", file=sys.stderr)
        return 1
    words = {word.strip() for word in args.only.split(",") if word.strip()}
    known = set(QUESTIONS) | {workload for workload, _ in _ALL}
    if words - known:
        unknown = sorted(words - known)
        print(f"bench.sweep: error: --only: unknown {unknown}; known are {sorted(known)}",
              file=sys.stderr)  # fmt: skip
        return 2
    return _ask(args, words, device)


def _ask(args: argparse.Namespace, words: set[str], device: torch.device) -> int:
    from . import cases, gpu, measure, report
    from .arms import STORAGES, tuned
    from .models import DRY_RUN, WORKLOADS

    dry = device.type == "cpu"
    end = time.monotonic() + args.budget
    clock = measure.clock_for(device)
    results = report.Results(args.out, device, "sweep", kind="sweep")
    document = results.document
    code = 0
    try:
        document["copy_gbps"] = measure.copy_bandwidth(clock, gpu.COPY_BYTES[device.type])
        effort = cases.Effort(2, 0.0, 1, (), warm=False)
        if not dry:
            effort = cases.Effort(15, most_s=0.4, host_calls=15, variants=(), warm=False)
        for name, question in QUESTIONS.items():
            places = TINY if dry else question.places
            for workload, dtype in _chosen(name, places, words):
                what = f"{name}: {workload} {dtype}"
                if time.monotonic() > end:
                    document["not_run"].append(f"{what}: the budget was spent")
                    continue
                print(f"{what} ...", file=sys.stderr, flush=True)
                tunings = [dict(question.base), *({**question.base, **c} for c in question.changes)]
                arms = [tuned(tuning) for tuning in tunings]
                free = None if dry else torch.cuda.mem_get_info(device)[0]
                l2 = document["environment"].get("l2_bytes", 2048)
                case = cases.Case(
                    (WORKLOADS | DRY_RUN)[workload], STORAGES[dtype], arms, clock, effort,
                    document["copy_gbps"], l2, free, lambda: time.monotonic() < end,
                )  # fmt: skip
                try:
                    outcome = cases.run(case)
                except Exception as error:
                    gpu.broke_off(what, error, results)
                    code = 1
                    continue
                by_name = {arm.name: tuning for arm, tuning in zip(arms, tunings)}
                for row in outcome.rows:
                    document["rows"].append(
                        {"question": name, "tuning": by_name[row["arm"]],
                         "base": row["arm"] == arms[0].name, **row}
                    )  # fmt: skip
                document["unavailable"] += [{"question": name, **m} for m in outcome.unavailable]
                results.save()
        document["finished"] = code == 0
    except KeyboardInterrupt:
        code = 130
    finally:
        results.save()
    print(table(document))
    print(f"Wrote {results.path}")
    return code


def _chosen(
    name: str, places: Sequence[tuple[str, str]], words: set[str]
) -> Iterator[tuple[str, str]]:
    """The places of a question that --only leaves."""
    questions, workloads = words & set(QUESTIONS), words - set(QUESTIONS)
    if not questions or name in questions:
        yield from (place for place in places if not workloads or place[0] in workloads)


def table(document: dict[str, Any]) -> str:
    """A line for each question and place: the base, the fastest, and their ratio."""
    asked: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        asked.setdefault((row["question"], row["workload"], row["dtype"]), []).append(row)
    lines = [f"{'question':14}{'workload':17}{'dtype':11}{'base us':>10}{'best us':>10}{'ratio':>7}"
             f"{'host':>7}{'best host':>10}  fastest"]  # fmt: skip
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for (question, workload, dtype), rows in asked.items():
        fastest = min(rows, key=_us)
        first = best.setdefault((workload, dtype), fastest)
        best[workload, dtype] = min(first, fastest, key=_us)
        base = next((row for row in rows if row["base"]), None)
        if base is None:
            lines.append(f"{question:14}{workload:17}{dtype:11}  the base did not run")
            continue
        host = f"{base['host_us']:7.0f}{fastest['host_us']:10.0f}"
        lines.append(
            f"{question:14}{workload:17}{dtype:11}{_us(base):10.1f}{_us(fastest):10.1f}"
            f"{_us(fastest) / _us(base):7.3f}{host}  {fastest['arm']}"
        )
    for (workload, dtype), row in best.items():
        lines.append(f"best of all: {workload} {dtype}: {_us(row):.1f} us with {row['arm']}")
    for missing in document["unavailable"]:
        lines.append(
            f"not available: {missing['question']}, {missing['workload']} {missing['dtype']}, "
            f"{missing['arm']}: {missing['reason']}"
        )
    lines += [f"not run: {what}" for what in document["not_run"]]
    return "\n".join(lines)


def _us(row: dict[str, Any]) -> float:
    return float(row["median_us"])


if __name__ == "__main__":
    sys.exit(main())

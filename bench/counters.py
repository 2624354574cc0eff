"""``python -m bench.counters``: hardware counters of one step of an arm, by Nsight Compute.

What the times cannot say: bytes really moved, whether the second read of a gradient hits the L2,
how many warps are active, and what they wait for. Raw rows, one for each kernel, go to one JSON.

The process runs again for every pass of counters (`--replay-mode application`): nothing is saved
and restored between launches, so that the L2 is as it is in a step. Clocks are left alone.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "dram_read_bytes",
    "dram__bytes_write.sum": "dram_write_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__t_sectors_op_read.sum": "l2_read_sectors",
    "lts__t_sectors_op_read_lookup_hit.sum": "l2_read_hit_sectors",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_active_percent",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed": "issue_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled_on_memory",
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio": "stalled_on_fences",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stalled_on_barriers",
}
# by what the targets name: a model that fits waves, one whose embedding does not, the rival
CASES = (
    ("gpt2-124m", "fp32", "bngd"),
    ("gpt2-124m", "fp32", "form=single-launch"),
    ("gpt2-124m", "fp32", "form=single-launch,slice=4096,chunk=4096"),
    ("gpt2-124m", "fp32", "torch-sgd-fused"),
    ("gpt2-1.5b", "bf16", "bngd"),
    ("gpt2-1.5b", "bf16", "form=single-launch"),
    ("gpt2-1.5b", "bf16-split", "bngd"),
    ("resnet50", "fp32", "form=single-launch"),
)


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The kernels of ``ncu --csv --page raw --print-units base``; ValueError if there are none.

    A metric that the GPU does not have is None.
    """
    # lines of the profiler itself come before the table
    table = [line for line in lines if line.startswith('"')]
    found = []
    for row in csv.DictReader(table):
        # the second line of the table has the units
        if not row["ID"]:
            continue
        kernel: dict[str, Any] = {"kernel": row["Kernel Name"]}
        for metric, name in METRICS.items():
            kernel[name] = _number(row.get(metric))
        found.append(kernel)
    if not found:
        raise ValueError("the profiler saw no kernel")
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def summary(kernels: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Of a whole step: bytes moved, their rate, and the share of L2 reads that hit."""

    def total(name: str) -> float | None:
        values = [kernel[name] for kernel in kernels]
        return None if None in values else float(sum(values))

    read_bytes, written, ns = total("dram_read_bytes"), total("dram_write_bytes"), total("ns")
    sectors, hits = total("l2_read_sectors"), total("l2_read_hit_sectors")
    moved = None if read_bytes is None or written is None else read_bytes + written
    return {
        "dram_bytes": moved,
        # bytes to a nanosecond are GB to a second
        "dram_gbps": moved / ns if moved is not None and ns else None,
        "l2_read_hit_rate": hits / sectors if hits is not None and sectors else None,
        "us": None if ns is None else ns / 1e3,
    }


def profile(ncu: str, workload: str, dtype: str, arm: str, limit_s: float) -> list[dict[str, Any]]:
    """Run a step under the profiler; RuntimeError, ValueError or TimeoutExpired if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        done = subprocess.run(
            [
                ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
                "--replay-mode", "application", "--cache-control", "none",
                "--clock-control", "none", "--profile-from-start", "off",
                "--metrics", ",".join(METRICS),
                sys.executable, "-m", "bench.one", workload, "--dtype", dtype, "--arm", arm,
            ],
            capture_output=True, text=True, timeout=limit_s,
        )  # fmt: skip
        said = log.read_text() if log.exists() else ""
        if done.returncode:
            line = (done.stderr.strip() or said.strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"exit status {done.returncode}: {line[:200]}")
        return read(said.splitlines())


def main(argv: Sequence[str] | None = None) -> int:
    """Profile the cases.

    Returns:
        0; 1 where there is no profiler or a case failed.
    """
    from . import devices, report
    from .arms import ARMS, STORAGES
    from .models import WORKLOADS, elements

    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds before cases stop")
    parser.add_argument("--ncu", default="ncu")
    args = parser.parse_args(argv)
    ncu = shutil.which(args.ncu)
    if ncu is None:
        print(f"bench.counters: {args.ncu} not found: no counters", file=sys.stderr)
        return 1
    results = report.Results(args.out, devices.use(), "counters", kind="counters")
    document, end = results.document, time.monotonic() + args.budget
    for workload, dtype, name in CASES:
        left = end - time.monotonic()
        if left <= 0:
            document["not_run"].append(f"{workload} {dtype} {name}: the budget was spent")
            continue
        try:
            kernels = profile(ncu, workload, dtype, name, left)
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            document["not_run"].append(f"{workload} {dtype} {name}: {error}"[:400])
            results.save()
            continue
        whole = summary(kernels)
        count = elements(WORKLOADS[workload].shapes())
        arm = ARMS[name if name in ARMS else "bngd"]
        moved = whole["dram_bytes"]
        document["rows"].append(
            {
                "workload": workload, "dtype": dtype, "arm": name, **whole,
                "dram_bytes_per_element": None if moved is None else moved / count,
                "bytes_per_element": arm.bytes_once(STORAGES[dtype]), "kernels": kernels,
            }
        )  # fmt: skip
        results.save()
        print(_line(document["rows"][-1]), flush=True)
    document["finished"] = not document["not_run"]
    results.save()
    for what in document["not_run"]:
        print(f"not run: {what}")
    print(f"Wrote {results.path}")
    return 0 if document["finished"] else 1


def _line(row: dict[str, Any]) -> str:
    def show(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    return (
        f"{row['workload']:12}{row['dtype']:11}{row['arm']:42}{show('us', '.1f'):>9} us "
        f"{show('dram_bytes_per_element', '.2f'):>6} of {row['bytes_per_element']} B/element "
        f"{show('dram_gbps', '.0f'):>5} GB/s, L2 reads hit {show('l2_read_hit_rate', '.1%')}"
    )


if __name__ == "__main__":
    sys.exit(main())

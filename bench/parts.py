"""What one call on a rented GPU runs: steps with limits of their own, by part.

`first` and `rest` are for a quarter of an hour: five to seven minutes and four to six, by estimate.
Limits of a part add up to at most nine minutes, its files to at most eight. Tests run on the GPU as
they run anywhere; left out are those that start processes or compile for other targets, which a GPU
does not change.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

PYTHON = [sys.executable, "-m"]
# files whose tests take the fixture `device`, kernels before what is built on them
KERNEL_TESTS = (
    "kernels", "plan", "prepared", "single", "interleaving", "statistics", "precision", "inputs",
    "properties", "layout", "optimizer", "groups", "around_a_step", "repointed", "refused_options",
    "refused_parameters", "refused_steps", "accumulation", "master_weights", "masters",
    "grad_stats", "release", "buffers", "flat_models", "unflattened", "steady", "kept", "captured",
    "scaling", "checkpoint", "refused_checkpoints", "telemetry", "info", "verify", "verify_finds",
)  # fmt: skip
# memory that torch's allocator keeps hides accesses past a tensor's end
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# a profiler that is taken down and started again beside CUDA graphs has crashed in some versions
PROFILED = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
GATED = ("form=two-launch", "form=single-launch", "bngd-row")
STORAGES = "fp32,bf16,bf16-fp32m,bf16-split"
# of the quick suite: what most targets are about, and the others
FIRST = "host-300,gpt2-124m,resnet50,vit-b16,many-1000x1000"
OTHERS = "llama3-8b-shard,gpt2-1.5b,moe-10k,groups-465,one-2.2e9,training"


class Step(NamedTuple):
    """One command of a part.

    Attributes:
        name: of its log.
        command: run in the checkout's root.
        limit_s: it is stopped after so many seconds.
        tool: an executable without which it is skipped.
        environment: variables on top of the session's.
        needed: the part ends where this is not done: the time is worth more once it is mended.
    """

    name: str
    command: list[str]
    limit_s: float
    tool: str | None = None
    environment: dict[str, str] | None = None
    needed: bool = False


def parts(out: Path) -> dict[str, list[Step]]:
    """All parts; results of the benchmark go to `out`."""
    there = ["--out", str(out)]

    def timed(name: str, suite: str, limit: int, *more: str) -> Step:
        # a case begun in time may end a minute late
        budget = ["--budget", str(limit - 60)]
        command = [*PYTHON, "bench.gpu", "--suite", suite, *more, *budget, *there]
        return Step(name, command, limit, environment=PROFILED)

    def sanitized(tool: str, *more: str) -> Step:
        command = ["compute-sanitizer", "--tool", tool, *more, "--error-exitcode", "9"]
        gate = [*PYTHON, "bench.one", "gate", "--arm", *GATED]
        return Step(tool, [*command, *gate], 70, "compute-sanitizer", SANITIZED)

    found = {
        # right, then the times that most targets ask for, then the others
        "first": [
            Step("gates", [*PYTHON, "bench.warm", "--only", STORAGES], 110, needed=True),
            timed("quick-first", "quick", 125, "--only", FIRST),
            Step("gpu-tests", [*_pytest(1), "tests/test_gpu.py"], 120),
            timed("quick-others", "quick", 185, "--only", OTHERS),
        ],
        "rest": [
            Step("kernel-tests", _kernel_tests(), 200),
            # torch provokes some errors of the API and expects them
            sanitized("memcheck", "--report-api-errors", "no"),
            sanitized("racecheck"),
            # the first import of torch on a new machine takes a minute
            Step("machine", [*PYTHON, "bench.machine"], 90),
        ],
        "quick": [timed("quick", "quick", 530)],
        "sweep": [
            Step("gates-sweep", [*PYTHON, "bench.warm", "--only", "sweep"], 90),
            Step("sweep", [*PYTHON, "bench.sweep", "--budget", "380", *there], 440),
        ],
        "counters": [
            Step("counters", [*PYTHON, "bench.counters", "--budget", "300", *there], 320, "ncu")
        ],
        "compiled": [timed("compiled", "compiled", 530)],
    }
    for part in ("1", "2", "3"):
        found[f"full-{part}"] = [timed(f"full-{part}", "full", 530, "--part", part)]
    return found


def _kernel_tests() -> list[str]:
    # it compiles dozens of kernels one after the other
    but = ["--deselect", "tests/test_verify.py::test_on_a_gpu"]
    return [*_pytest(12), *but, *(f"tests/test_{name}.py" for name in KERNEL_TESTS)]


def _pytest(workers: int) -> list[str]:
    """Pytest; a test that hangs ends a worker instead of everything where pytest-xdist is there."""
    # what is slow or was skipped is in the log, results are not cached in the checkout
    command = [*PYTHON, "pytest", "-q", "-rsfE", "-p", "no:cacheprovider", "--durations", "15"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--max-worker-restart", "8"]
    return command

"""What one call on a rented GPU runs: steps with limits of their own, by part.

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
GATED = ("form=two-launch", "form=single-launch", "bngd-row")


class Step(NamedTuple):
    """One command of a part.

    Attributes:
        name: of its log.
        command: run in the checkout's root.
        limit_s: it is stopped after so many seconds.
        tool: an executable without which it is skipped.
        environment: variables on top of the session's.
    """

    name: str
    command: list[str]
    limit_s: float
    tool: str | None = None
    environment: dict[str, str] | None = None


def parts(out: Path) -> dict[str, list[Step]]:
    """All parts; results of the benchmark go to `out`."""
    there = ["--out", str(out)]
    found = {
        "correct": [
            Step("machine", [*PYTHON, "bench.machine"], 40),
            Step("gpu-tests", [*_pytest(1), "tests/test_gpu.py"], 120),
            Step("gates", [*PYTHON, "bench.warm"], 100),
            Step(
                "kernel-tests", [*_pytest(12), *(f"tests/test_{n}.py" for n in KERNEL_TESTS)], 170
            ),
            *(
                Step(
                    tool,
                    ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
                     *PYTHON, "bench.one", "gate", "--arm", *GATED],
                    limit, "compute-sanitizer", SANITIZED,
                )
                for tool, limit in (("memcheck", 50), ("racecheck", 55))
            ),
        ],
        "quick": [Step("quick", [*PYTHON, "bench.gpu", "--suite", "quick", *there], 530)],
        "sweep": [
            Step("gates-sweep", [*PYTHON, "bench.warm", "--only", "sweep"], 90),
            Step("sweep", [*PYTHON, "bench.sweep", "--budget", "380", *there], 440),
        ],
        "counters": [
            Step("counters", [*PYTHON, "bench.counters", "--budget", "300", *there], 320, "ncu")
        ],
        "compiled": [Step("compiled", [*PYTHON, "bench.gpu", "--suite", "compiled", *there], 530)],
    }  # fmt: skip
    for part in (1, 2, 3):
        command = [*PYTHON, "bench.gpu", "--suite", "full", "--part", str(part), *there]
        found[f"full-{part}"] = [Step(f"full-{part}", command, 530)]
    return found


def _pytest(workers: int) -> list[str]:
    """Pytest; a test that hangs ends a worker instead of everything where pytest-xdist is there."""
    # what is slow or was skipped is in the log, results are not cached in the checkout
    command = [*PYTHON, "pytest", "-q", "-rsfE", "-p", "no:cacheprovider", "--durations", "15"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--max-worker-restart", "8"]
    return command

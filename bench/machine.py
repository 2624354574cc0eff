"""``python -m bench.machine``: what a session's results depend on, as JSON on standard output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

from . import devices, measure, report

PACKAGES = (
    "torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis",
    "safetensors", "mpmath", "matplotlib", "torch-optimi", "flashoptim",
)  # fmt: skip
TOOLS = (
    ["nvidia-smi"],
    ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"],
    ["ncu", "--version"],
    ["compute-sanitizer", "--version"],
)
# of copies: below the L2, above it, and the one that every fraction is of
SIZES = {"cuda": (2**24, 2**26, 2**28, 2**30, 2**32), "cpu": (2**16,)}


def record(device: torch.device) -> dict[str, Any]:
    """Versions, tools, clocks and copy bandwidths."""
    clock = measure.clock_for(device)
    copies = {str(size): measure.copy_bandwidth(clock, size) for size in SIZES[device.type]}
    return {
        "environment": report.environment(device),
        "commit": report.commit(),
        "kernels_sha256": report.kernels_hash(),
        "processors": os.cpu_count(),
        "packages": {name: report.version(name) for name in PACKAGES},
        "copy_gbps": copies,
        "tools": {" ".join(command): _said(command) for command in TOOLS},
    }


def _said(command: list[str]) -> str:
    """What a tool prints, or why it does not run."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()


def main() -> int:
    """Print the record of the GPU, or of the CPU where there is none; 1 for the latter."""
    device = devices.use()
    print(json.dumps(record(device), indent=1))
    return 0 if device.type == "cuda" else 1


if __name__ == "__main__":
    sys.exit(main())

"""Cold start: an arm's first step in a fresh process whose Triton cache is empty.

``python -m bench.cold ARM WORKLOAD DEVICE`` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from .report import ROOT


def measure(arm: str, workload: str, device: str) -> dict[str, Any]:
    """Seconds of the first step, kernels compiled included; or the reason why there are none."""
    about: dict[str, Any] = {"arm": arm, "workload": workload, "dtype": "fp32"}
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bench.cold", arm, workload, device],
                cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**about, "reason": "no step after 120 s"}
    if done.returncode:
        return {**about, "reason": (done.stderr.strip() or "no message").splitlines()[-1][:200]}
    return {**about, **json.loads(done.stdout.splitlines()[-1])}


def main(arm_name: str, workload_name: str, device_name: str) -> None:
    """The fresh process."""
    begin = time.perf_counter()
    import torch

    from .arms import ARMS, STORAGES, start
    from .cases import LR, make_set
    from .measure import clock_for
    from .models import DRY_RUN, WORKLOADS

    imported = time.perf_counter()
    workload = (WORKLOADS | DRY_RUN)[workload_name]
    clock = clock_for(torch.device(device_name))
    params = make_set(list(workload.shapes()), STORAGES["fp32"], clock.device)
    clock.synchronize()
    ready = time.perf_counter()
    stepper = start(ARMS[arm_name], params, workload.groups, STORAGES["fp32"], LR)
    clock.synchronize()
    stepped = time.perf_counter()
    stepper.step()
    clock.synchronize()
    figures = {
        "import_s": imported - begin,
        "first_step_s": stepped - ready,
        "second_step_s": time.perf_counter() - stepped,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The harness of the multi-process tests tells of a rank that fails, and ends one that hangs."""

import time

import pytest
import torch.distributed as dist

from support import processes
from support.processes import needs_gloo

pytestmark = needs_gloo


def broken(hangs):
    if dist.get_rank() == 1:
        if not hangs:
            raise ValueError("broken on purpose")
        time.sleep(1000)
    # waits for a rank that is gone
    dist.barrier()


def test_a_worker_s_traceback():
    match = r"^rank 1:\n(.|\n)*in broken\n(.|\n)*ValueError: broken on purpose$"
    with pytest.raises(processes.WorkerError, match=match):
        processes.run(2, broken, False)


def test_workers_that_hang_are_killed(monkeypatch):
    monkeypatch.setenv("BNGD_TEST_TIMEOUT", "3")
    with pytest.raises(TimeoutError, match="broken: not done after 3 s"):
        processes.run(2, broken, True)

"""The harness of the multi-process tests: results by rank, tracebacks, no hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from support import processes, time_limits

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def sum_of_ranks(add: int) -> tuple[int, int, int]:
    total = torch.tensor(dist.get_rank() + add)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("broken on purpose")
    # waits for a rank that is gone
    dist.barrier()


def fail_at_length() -> None:
    raise ValueError("\n".join(f"line {i}" for i in range(1000)))


def never_join() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def test_results_in_order_of_rank() -> None:
    assert processes.run(3, sum_of_ranks, 5) == [(0, 18, 1), (1, 18, 1), (2, 18, 1)]


def test_a_worker_s_traceback() -> None:
    with pytest.raises(processes.WorkerError) as raised:
        processes.run(2, fail_on_rank_1)
    assert str(raised.value).startswith("rank 1:")
    assert "in fail_on_rank_1" in str(raised.value)
    assert "ValueError: broken on purpose" in str(raised.value)


def test_the_log_of_a_worker_is_its_last_lines() -> None:
    with pytest.raises(processes.WorkerError) as raised:
        processes.run(1, fail_at_length)
    assert str(raised.value).endswith("line 998\nline 999")
    assert len(str(raised.value).splitlines()) == 1 + processes.LOG_LINES


@pytest.mark.parametrize(("load", "want"), [(0.5, 10.0), (8.0, 20.0)])
def test_limits_grow_with_the_load(
    load: float, want: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BNGD_TEST_TIMEOUT", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert time_limits.patience(10.0) == want
    monkeypatch.setenv("BNGD_TEST_TIMEOUT", "7.5")
    assert time_limits.patience(10.0) == 7.5


def test_workers_that_hang_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNGD_TEST_TIMEOUT", "3")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="never_join: not done after 3 s"):
        processes.run(2, never_join)
    assert time.monotonic() - start < 20

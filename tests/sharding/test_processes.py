"""The harness of the multi-process tests: results by rank, tracebacks, no hang."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from support import processes

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


def test_workers_that_hang_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LIMIT", 3.0)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="never_join: not done after 3 s"):
        processes.run(2, never_join)
    assert time.monotonic() - start < 20

"""Several processes on one machine: `run` calls a function on every rank of a gloo world."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# seconds; a rank that misses a collective would keep the others waiting for ever
LIMIT = 120.0


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of `world_size` ranks, in rank order.

    Args:
        world_size: number of new processes, joined by gloo.
        function: a module's function; finds its rank with `torch.distributed.get_rank`.
        *args: picklable, as is what `function` returns.

    Raises:
        TimeoutError: not done after `LIMIT` seconds.
        torch.multiprocessing.ProcessRaisedException: with the traceback of the rank that raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        # inherited: read by the workers when they import torch
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            workers = mp.start_processes(
                _work, (world_size, folder, function, args), world_size, join=False
            )
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        assert workers is not None
        end = time.monotonic() + LIMIT
        try:
            while not workers.join(timeout=max(0.0, end - time.monotonic())):
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{function.__name__} on {world_size} ranks took over {LIMIT} s"
                    )
        finally:
            for process in workers.processes:
                process.kill()
                process.join()
        files = [Path(folder, str(rank)) for rank in range(world_size)]
        return [torch.load(file, weights_only=False) for file in files]


def _work(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=LIMIT),
    )
    result = function(*args)
    torch.save(result, Path(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()

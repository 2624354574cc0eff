"""Several processes on this machine, joined by gloo: `run` calls a function on every rank."""

import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from support.time_limits import patience

# seconds until every worker is killed: a collective that one rank never joins would wait for ever
LIMIT = 120.0
# of a worker's traceback: where it was, and the error
LOG_LINES = 20


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


class WorkerError(RuntimeError):
    """A worker raised; the message is its traceback."""


def run(world_size, function, *args):
    """Call ``function(*args)`` in `world_size` processes, each with a gloo process group.

    Args:
        world_size: number of processes; each finds its rank with `torch.distributed.get_rank`.
        function: importable by name, since a worker is a new interpreter.
        *args: picklable.

    Returns:
        What every rank returned, in order of rank.

    Raises:
        WorkerError: a worker raised; holds the traceback of the first that did.
        torch.multiprocessing.ProcessExitedException: a worker died.
        TimeoutError: the workers were not done after `patience(LIMIT)` seconds, and were killed.
    """
    limit = patience(LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        # as many workers as cores: more threads would only wait for each other. Workers inherit
        # the variable, and read it when they import torch
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OMP_NUM_THREADS", "1")
            context = torch.multiprocessing.spawn(
                _work, (world_size, folder, limit, function, args), nprocs=world_size, join=False
            )
        end = time.monotonic() + limit
        try:
            while not context.join(timeout=max(end - time.monotonic(), 0.0)):
                if time.monotonic() >= end:
                    raise TimeoutError(f"{function.__name__}: not done after {limit:g} s")
        except (ProcessRaisedException, ProcessExitedException):
            # ranks that wait for one that raised fail after it, with errors of the connection
            errors = [pickle.loads(file.read_bytes()) for file in Path(folder).glob("error*")]
            if not errors:
                raise
            raise WorkerError(min(errors)[1]) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            pickle.loads((Path(folder) / f"rank{rank}").read_bytes()) for rank in range(world_size)
        ]


def _work(rank, world_size, folder, limit, function, args):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=limit), world_size, rank)
    try:
        result = function(*args)
    except BaseException:  # pytest's own failures too
        # written while the others still see this rank
        log = "\n".join(traceback.format_exc().splitlines()[-LOG_LINES:])
        error = (time.monotonic_ns(), f"rank {rank}:\n{log}")
        (Path(folder) / f"error{rank}").write_bytes(pickle.dumps(error))
        raise
    # a rank that left early would be an error to those still at work
    dist.barrier()
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(result))
    while len(list(Path(folder).glob("rank*"))) < world_size:
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    # no teardown: after DDP with any optimizer gloo's threads abort a process there now and then
    os._exit(0)


def through_a_queue(tensor):
    """What a spawned process finds in a tensor that a queue brings it: a list of its entries.

    Raises:
        RuntimeError: torch cannot send it.
    """
    context = torch.multiprocessing.get_context("spawn")
    # it pickles in `put`; a `Queue` does in a thread, which prints what fails and goes on
    inbox, outbox = context.SimpleQueue(), context.Queue()
    worker = context.Process(target=_send_back, args=(inbox, outbox), daemon=True)
    worker.start()
    try:
        inbox.put(tensor)
        return outbox.get(timeout=patience(LIMIT))
    finally:
        worker.terminate()
        worker.join()


def _send_back(inbox, outbox):
    outbox.put(inbox.get().tolist())

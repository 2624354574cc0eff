"""A training process that is killed again and again, and goes on from its checkpoint each time.

``python killed.py FOLDER PATH``, with PATH "eager" or "fused", trains three times in processes
forked from this one, so that none has torch to import: never killed, killed at random moments, and
killed at each stage of a save. It leaves a last checkpoint of each, FOLDER/<name>.pt, and prints
as JSON how many processes died, and how many of them left the beginning of a file.
"""

from __future__ import annotations

import io
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bngd_triton import BNGD, load_checkpoint, save_checkpoint
from support.time_limits import patience

# what a first step would import, seconds in each process
for module in ("torch._dynamo", "bngd_triton.kernels.fused_step"):
    import_module(module)

# Triton's interpreter is ten times slower
MICRO_STEPS = {"eager": 30, "fused": 10}
BATCH = 4
# a process that neither ends nor gets on
LIMIT = 60.0


def train(path: Path, way: str, tell: Callable[[], Any]) -> None:
    """Train to the end, from the checkpoint where there is one; saves after each micro-batch."""
    micro_steps = MICRO_STEPS[way]
    data = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=data).bfloat16()
    y = torch.randint(3, (40,), generator=data)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    groups = [
        {"params": list(model[0].parameters()), "granularity": "row"},
        {"params": list(model[2].parameters()), "master_weights": "stochastic"},
    ]
    optimizer = BNGD(
        groups,
        lr=1e-2,
        momentum=0.9,
        weight_decay=0.1,
        accumulation_steps=2,
        fused=way == "fused",
        seed=3,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / micro_steps)
    order = torch.Generator().manual_seed(4)
    step, rows = 0, torch.empty(0, dtype=torch.long)
    if path.exists():
        saved = load_checkpoint(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        order.set_state(saved["order"])
        step, rows = saved["step"], saved["rows"]
    while step < micro_steps:
        tell()
        if not len(rows):
            rows = torch.randperm(len(x), generator=order)
        batch, rows = rows[:BATCH], rows[BATCH:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]).float(), y[batch]).backward()
        optimizer.step()
        step += 1
        if step % 2 == 0:
            schedule.step()
        save_checkpoint(
            path, model=model, optimizer=optimizer, schedule=schedule, order=order, step=step,
            rows=rows.clone(),
        )  # fmt: skip


def die(*_: Any) -> None:
    """End as if the machine did, with nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def deaths() -> Iterator[Callable[[], None]]:
    """What to break so that a process dies at each stage of its second save."""

    def at_call(module: Any, name: str, number: int, instead: Callable[..., Any]) -> None:
        real, calls = getattr(module, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return (instead if calls == number else real)(*args, **kwargs)

        setattr(module, name, counted)

    def write_half(content: Any, file: Any, real: Callable[..., Any] = torch.save) -> None:
        whole = io.BytesIO()
        real(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    def replace_and_die(*args: Any, real: Callable[..., Any] = os.replace) -> None:
        real(*args)
        die()

    # fsync is called for the file and then for its folder
    for stage in (
        (torch, "save", 2, die),
        (torch, "save", 2, write_half),
        (os, "fsync", 3, die),
        (os, "replace", 2, die),
        (os, "replace", 2, replace_and_die),
        (os, "fsync", 4, die),
    ):
        yield lambda stage=stage: at_call(*stage)


class Life:
    """A forked process that trains, and waits for leave before each step."""

    def __init__(self, path: Path, way: str, prepare: Callable[[], None]) -> None:
        self._asks, ask = os.pipe()
        leave, self._gives = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            code = 1
            try:
                # only the parent's ends stay open, so that each side sees the other's end
                os.close(self._asks)
                os.close(self._gives)
                prepare()
                train(path, way, lambda: os.write(ask, b".") and os.read(leave, 1))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        os.close(ask)
        os.close(leave)

    def steps(self, count: int) -> int:
        """Let it begin so many steps; returns how many it began before it ended."""
        for begun in range(count):
            limit = patience(LIMIT)
            ready, _, _ = select.select([self._asks], [], [], limit)
            if not ready:
                self.kill()
                raise TimeoutError(f"no step within {limit:g} s")
            if not os.read(self._asks, 1):
                return begun
            os.write(self._gives, b".")
        return count

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end, which is what `os.waitpid` says of it."""
        status = os.waitpid(self._child, 0)[1]
        os.close(self._asks)
        os.close(self._gives)
        return status


def until_done(path: Path, live: Callable[[], int]) -> tuple[int, int]:
    """Start lives until one ends by itself; how many were killed, and how many within a save."""
    killed, torn = 0, 0
    while (status := live()) != 0:
        if status != signal.SIGKILL:
            raise SystemExit(f"the training process failed: {status}")
        killed += 1
        torn += path.with_name(f"{path.name}.tmp").exists()
    return killed, torn


def main(folder: str, way: str) -> None:
    torch.set_num_threads(1)
    chance, stages = random.Random(5), deaths()
    paths = {name: Path(folder) / f"{name}.pt" for name in ("never", "random", "saves")}

    def whole(path: Path, prepare: Callable[[], None] = lambda: None) -> int:
        life = Life(path, way, prepare)
        life.steps(MICRO_STEPS[way] + 1)
        return life.end()

    start = time.monotonic()
    counts = {"never": until_done(paths["never"], lambda: whole(paths["never"]))}
    pace = (time.monotonic() - start) / MICRO_STEPS[way]

    def cut_short() -> int:
        life = Life(paths["random"], way, lambda: None)
        wanted = chance.randint(1, 4)
        if life.steps(wanted) == wanted:
            # within the step, within its save, or before the next step
            time.sleep(chance.uniform(0, pace))
            life.kill()
        return life.end()

    counts["random"] = until_done(paths["random"], cut_short)
    counts["saves"] = until_done(
        paths["saves"], lambda: whole(paths["saves"], next(stages, lambda: None))
    )
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A training process that is killed again and again, and goes on from its checkpoint each time.

``python killed.py FOLDER PATH``, with PATH "eager" or "fused", trains three times in processes
forked from this one, so that none has torch to import: never killed, killed at random moments, and
killed at each stage of a step and its save. It leaves a last checkpoint of each, FOLDER/<name>.pt,
and prints as JSON which deaths at a stage left the beginning of a file.
"""

import io
import json
import os
import random
import signal
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from bngd_triton import BNGD, load_checkpoint, save_checkpoint

# what a first step would import, seconds in each process
for module in ("torch._dynamo", "bngd_triton.kernels.fused_step"):
    import_module(module)

MICRO_STEPS = 13
BATCH = 4


def train(path, way):
    """Train to the end, from the checkpoint where there is one; saves after each micro-batch."""
    data = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=data).bfloat16()
    y = torch.randint(3, (40,), generator=data)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    groups = [
        {"params": list(model[0].parameters()), "granularity": "row"},
        {"params": list(model[2].parameters()), "master_weights": "stochastic"},
    ]
    options = {"lr": 1e-2, "weight_decay": 0.1, "accumulation_steps": 2, "seed": 3}
    optimizer = BNGD(groups, fused=way == "fused", **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / MICRO_STEPS)
    order = torch.Generator().manual_seed(4)
    step, rows = 0, torch.empty(0, dtype=torch.long)
    if path.exists():
        saved = load_checkpoint(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        order.set_state(saved["order"])
        step, rows = saved["step"], saved["rows"]
    while step < MICRO_STEPS:
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


def die(*_):
    """End as if the machine did, with nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(content, file, real=torch.save):
    whole = io.BytesIO()
    real(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()


def replace_and_die(*args, real=os.replace):
    real(*args)
    die()


# where a process dies: at which call of what. fsync is called for the file and then for its folder
STAGES = [
    (nn.functional, "cross_entropy", 3, die),
    (BNGD, "_step", 2, die),
    (torch, "save", 2, die),
    (torch, "save", 2, write_half),
    (os, "fsync", 3, die),
    (os, "replace", 2, die),
    (os, "replace", 2, replace_and_die),
    (os, "fsync", 4, die),
]


def at_call(module, name, number, instead):
    real, calls = getattr(module, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return (instead if calls == number else real)(*args, **kwargs)

    setattr(module, name, counted)


def end_of_life(path, way, prepare=lambda: None):
    """What `os.waitpid` says of a forked process that prepares its death, and trains."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            train(path, way)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main(folder, way):
    torch.set_num_threads(1)
    never, at_random, saves = (Path(folder) / f"{name}.pt" for name in ("never", "random", "saves"))
    start, chance = time.monotonic(), random.Random(5)
    assert end_of_life(never, way) == 0
    whole = time.monotonic() - start
    for _ in range(4):
        # nobody handles the alarm
        wait = partial(signal.setitimer, signal.ITIMER_REAL, chance.uniform(0, whole / 2))
        assert end_of_life(at_random, way, wait) in (0, signal.SIGALRM)
    torn = []
    for stage in STAGES:
        assert end_of_life(saves, way, partial(at_call, *stage)) == signal.SIGKILL, stage
        torn.append(saves.with_name(f"{saves.name}.tmp").exists())
    for path in (at_random, saves):
        assert end_of_life(path, way) == 0
    print(json.dumps(torn))


if __name__ == "__main__":
    main(*sys.argv[1:])

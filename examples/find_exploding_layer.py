"""Which layers' gradients explode? A `GradStatsLogger` tells while the network trains.

The network is that of `bngd demo`: 20 ReLU layers whose weights start too large. Gradients of the
biases are those of the layers' outputs, summed over a batch, so where they grow from one layer to
the one before it, the weights between the two amplify. BNGD trains through it; the logger reads
what the optimizer has measured anyway.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bngd_triton import BNGD, GradStatsLog, GradStatsLogger, plot_grad_stats
from bngd_triton.demo.tasks import Split, exploding_task, generator

SEED = 0
STEPS = 60
EVERY = 2
BATCH = 64
LR = 5e-3


class Finding(NamedTuple):
    """What one logged step says.

    Attributes:
        weights: standard deviations of the weights' gradients by name, the largest first.
        biases: those of the biases' gradients.
        steepest: the weight that amplifies most on the way back.
        factor: by how much: the biases' gradient before it over the one after it.
    """

    weights: dict[str, float]
    biases: dict[str, float]
    steepest: str
    factor: float


def batches(split: Split, steps: int) -> list[torch.Tensor]:
    """Row numbers of the batches."""
    order = generator(SEED)
    return [torch.randint(len(split.x), (BATCH,), generator=order) for _ in range(steps)]


def train(split: Split, model: nn.Module, steps: int = STEPS) -> GradStatsLog:
    """Train for a few steps; returns the log."""
    optimizer = BNGD(model.named_parameters(), lr=LR, granularity="row")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    logger = GradStatsLogger(optimizer, every=EVERY)
    for rows in batches(split, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(split.x[rows]), split.y[rows]).backward()
        optimizer.step()
        logger.step()
        schedule.step()
    return logger.log


def find(log: GradStatsLog, logged: int = 0) -> Finding:
    """Compare the layers at one logged step, by its place in the log."""
    names, _, table = log.table("std")
    stds = dict(zip(names, table[:, logged].tolist()))
    weights, biases = (
        {name: stds[name] for name in names if name.endswith(kind)} for kind in ("weight", "bias")
    )
    ratios = [before / after for before, after in pairwise(biases.values())]
    # ratio i is across the weights of layer i + 1
    growth = dict(zip(list(weights)[1:], ratios))
    steepest = max(growth, key=growth.__getitem__)
    return Finding(largest_first(weights), largest_first(biases), steepest, growth[steepest])


def largest_first(stds: dict[str, float]) -> dict[str, float]:
    """Sorted by value."""
    return dict(sorted(stds.items(), key=lambda item: -item[1]))


def show(log: GradStatsLog, logged: int) -> None:
    """Print the finding at one logged step."""
    found = find(log, logged)
    print(f"step {log.steps[logged].step}, standard deviations of gradients:")
    for kind, stds in (("weights", found.weights), ("biases", found.biases)):
        top = ", ".join(f"{name} {std:.3g}" for name, std in list(stds.items())[:3])
        (_, most), *_, (name, least) = stds.items()
        print(f"  {kind:7} {top} ... {name} {least:.3g}: {math.log10(most / least):.1f} decades")
    print(f"  {found.steepest} amplifies most on the way back: {found.factor:.2g} times")


def main(picture: Path) -> GradStatsLog:
    """Train, print what was found at the first and the last logged step, and draw all."""
    log = train(*exploding_task(SEED))
    show(log, 0)
    show(log, -1)
    plot_grad_stats(log, picture)
    print(f"wrote {picture}")
    return log


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find the exploding layer of a network.")
    parser.add_argument("--out", type=Path, default=Path("grad-stats.png"), help="the picture")
    # layers of 64 units lose more to the hand-over between threads than they gain
    torch.set_num_threads(1)
    main(parser.parse_args().out)

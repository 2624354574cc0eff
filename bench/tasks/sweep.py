"""Trains every optimizer at every rate that matters, and goes on where it stopped."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.tasks.contestants import CONTESTANTS, Contestant, state_bytes
from bench.tasks.problems import Task, worst

# seeds that choose a rate, and those that are reported
CHOICE, TEST = (100, 101), (0, 1, 2, 3, 4)
# a rate belongs to the span of good ones within this of the best score
NEAR = 0.05
# thirds of decades: 1e-5 to 10
LOWEST, HIGHEST = -15, 3

Scores = dict[str, Any]


def rate_of(third: int) -> float:
    """10 ** (third / 3) to two digits: 1, 2.2, 4.6, 10."""
    return float(f"{10 ** (third / 3):.1e}")


def third_of(rate: float) -> int:
    """The nearest rate of the grid."""
    return round(3 * math.log10(rate))


def train(task: Task, contestant: Contestant, rate: float, seed: int, part: str) -> float:
    """The score after training with a rate that falls linearly to 0; the worst if it diverged."""
    run = task.start(seed)
    optimizers = contestant.build(run.model, rate)
    for step in range(task.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / task.steps)
        loss = run.loss()
        if not loss.isfinite():
            return worst(task)
        loss.backward()
        if contestant.clip is not None:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), contestant.clip)
        for optimizer in optimizers:
            optimizer.step()
    run.model.eval()
    with torch.no_grad():
        score = run.score(part)
    return score if math.isfinite(score) else worst(task)


def mean(scores: Sequence[float]) -> float:
    """inf where one of them is."""
    return sum(scores) / len(scores)


def near(task: Task, score: float, best: float) -> bool:
    """Whether a score is within 5 % of the best."""
    return score >= (1 - NEAR) * best if task.higher else score <= (1 + NEAR) * best


def best_third(task: Task, choice: dict[str, list[float]]) -> int:
    """The rate with the best mean over the seeds that choose; the lower of two equal ones."""
    pick = max if task.higher else min
    best = pick(mean(scores) for scores in choice.values())
    return min(int(third) for third, scores in choice.items() if mean(scores) == best)


def _widen(task: Task, choice: dict[str, list[float]]) -> int | None:
    """The next rate beyond an end of the grid that is still near the best; None when none is."""
    thirds = sorted(map(int, choice))
    best = mean(choice[str(best_third(task, choice))])
    for end, following, limit in (
        (thirds[0], thirds[0] - 1, LOWEST - 1),
        (thirds[-1], thirds[-1] + 1, HIGHEST + 1),
    ):
        if following != limit and near(task, mean(choice[str(end)]), best):
            return following
    return None


def fill(task: Task, contestant: Contestant, found: Scores, seeds: Sequence[int]) -> bool:
    """Add to `found` what it lacks; say whether anything was trained."""
    choice, test = found.setdefault("choice", {}), found.setdefault("test", {})
    before = len(choice) + len(test)

    def choose(third: int) -> None:
        if str(third) not in choice:
            rate = rate_of(third)
            scores = [train(task, contestant, rate, seed, "choice") for seed in CHOICE]
            choice[str(third)] = [float(f"{score:.6g}") for score in scores]

    centre = third_of(contestant.centre)
    for third in range(centre - 2, centre + 3):
        choose(third)
    while (third := _widen(task, choice)) is not None:
        choose(third)
    rates = {rate_of(best_third(task, choice)), contestant.default}
    for rate in sorted(rate for rate in rates if rate is not None):
        if str(rate) not in test:
            scores = [train(task, contestant, rate, seed, "test") for seed in seeds]
            test[str(rate)] = [float(f"{score:.6g}") for score in scores]
    if "state" not in found:
        run = task.start(0)
        optimizers = contestant.build(run.model, 0.0 + contestant.centre)
        run.loss().backward()
        for optimizer in optimizers:
            optimizer.step()
        found["state"] = round(state_bytes(optimizers, run.model), 2)
    return len(choice) + len(test) > before


def sweep(tasks: dict[str, Task], names: Iterable[str], path: Path, seeds: Sequence[int]) -> None:
    """Fill `path`, a JSON file of results by task and optimizer, saved after each of them."""
    found = json.loads(path.read_text()) if path.exists() else {}
    for (name, task), who in itertools.product(tasks.items(), names):
        if not CONTESTANTS[who].applies(task.start(0).model):
            continue
        start = time.perf_counter()
        scores = found.setdefault(name, {}).setdefault(who, {})
        if fill(task, CONTESTANTS[who], scores, seeds):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            seconds = time.perf_counter() - start
            third = best_third(task, scores["choice"])
            score = mean(scores["choice"][str(third)])
            print(f"{name} {who}: {score:.4g} at {rate_of(third):g} ({seconds:.0f} s)", flush=True)

"""Logs of statistics that a test makes up."""

import math

import torch

from bngd_triton import GradStats, GradStatsLogger

NAN, INF = math.nan, math.inf


class Given:
    """An optimizer whose statistics are given: mean, std and skips by name."""

    def __init__(self, **stats):
        self.stats = stats

    def grad_stats(self):
        found = {}
        for name, values in self.stats.items():
            mean, std, skipped = (torch.tensor(value, dtype=torch.float64) for value in values)
            rms = torch.hypot(mean, std)
            found[name] = GradStats(mean, std, rms, rms / std, skipped)
        return found


def logged(*stats):
    """A log of one step each."""
    given = Given()
    logger = GradStatsLogger(given, every=1)
    for each in stats:
        given.stats = each
        logger.step()
    return logger.log

"""A picture of a log of gradient statistics: a heat map, parameter by step."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from .log import GradStatsLog

# more are not told apart in a picture of this width
_COLUMNS = 500
# labels and ticks that stay legible
_LABELS, _TICKS = 60, 10


def plot_grad_stats(log: GradStatsLog, file: str | os.PathLike[str]) -> None:
    """Draw log10 of the gradients' standard deviation: a line for each parameter, a column a step.

    A cross marks that a slice was skipped since the step logged before. Grey is a standard
    deviation of 0, of an inf or NaN, or a parameter without gradient so far. Of more than 500
    logged steps, neighbours share a column, which shows the largest of them.

    Args:
        log: as `GradStatsLogger` keeps it in its `log`, with at least one logged step.
        file: the picture; its suffix (.png, .svg, .pdf) says what is written.

    Raises:
        TypeError: `log` is no `GradStatsLog`.
        ValueError: `log` is empty, or matplotlib does not know the suffix.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not isinstance(log, GradStatsLog):
        raise TypeError(f"log must be a GradStatsLog (logger.log), got {type(log).__name__}")
    if not log.steps:
        raise ValueError("log is empty: let a GradStatsLogger log a step first")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "a picture needs matplotlib, which is not installed: pip install matplotlib",
            name=error.name,
        ) from error
    names, steps, heights, crosses = _cells(log)
    # the colour bar's label takes 2.6 inches
    height = max(2.6, min(1.6 + 0.17 * len(names), 12))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.75")
    image = axes.imshow(
        heights.masked_fill(~heights.isfinite(), math.nan).numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
    )
    lines, columns = crosses.nonzero(as_tuple=True)
    axes.plot(columns, lines, linestyle="none", marker="x", color="red", markersize=5)
    _label(axes, names, steps)
    figure.colorbar(image, label="log10 of the\ngradient's standard deviation")
    figure.savefig(file, dpi=100)


def _cells(log: GradStatsLog) -> tuple[list[str], list[int], Tensor, Tensor]:
    """Names, the first step of each column, log10 std and skips, both [names, columns]."""
    names, steps, std = log.table("std")
    skipped = log.table("skipped")[2].nan_to_num()
    rose = skipped.diff(dim=1, prepend=skipped.new_zeros(len(names), 1)) > 0
    share = -(-len(steps) // _COLUMNS)
    heights = std.log10()
    if share > 1:
        known = heights.nan_to_num(-math.inf, math.inf, -math.inf)
        heights = torch.stack([part.amax(1) for part in known.split(share, dim=1)], 1)
        rose = torch.stack([part.any(1) for part in rose.split(share, dim=1)], 1)
    return names, steps[::share], heights, rose


def _label(axes: Any, names: list[str], steps: list[int]) -> None:
    apart = -(-len(names) // _LABELS)
    axes.set_yticks(range(0, len(names), apart), names[::apart], fontsize=7)
    apart = -(-len(steps) // _TICKS)
    axes.set_xticks(range(0, len(steps), apart), steps[::apart])
    axes.set_xlabel("step")

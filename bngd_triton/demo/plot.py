"""What `bngd demo` leaves of its runs: two tables, one PNG of two panels and a JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import __version__, strict_json
from .results import Results, Run, Settings

# how optimizers are drawn; the colours are Okabe and Ito's
_LOOKS = {
    "SGD": ("#E69F00", "-"),
    "SGD, clip 1": ("#E69F00", "--"),
    "AdamW": ("#0072B2", "-"),
    "AdamW, clip 1": ("#0072B2", "--"),
    "BNGD tensor": ("#CC79A7", "-"),
    "BNGD row": ("#009E73", "-"),
    "BNGD row, center_1d": ("#000000", "-."),
    "BNGD, eps 0": ("#009E73", "-"),
    "BNGD, eps 1e-8": ("#000000", ":"),
}
# of the sweep that chose the rates of `run.EXPLODING`
SWEEP_EPOCHS = 15
# where the accuracy panel marks runs that ended in NaN
_NAN_HEIGHT = -8


def print_tables(results: Results, settings: Settings, console: Console) -> None:
    """One table per experiment, and what they do not say by themselves."""
    # the same for all: they share the weights and the first batch
    first = results.exploding[0].first_loss if results.exploding else math.nan
    table = _table(
        f"Exploding network: digits, 20 ReLU layers, {settings.epochs} epochs, "
        f"first loss {first:.0f}"
    )
    table.add_column("optimizer", overflow="fold")
    # the whole table has 79 columns
    with_norms = console.width >= 79
    norm_names = ("least norm", "largest norm") if with_norms else ()
    for name in ("lr", "last loss", "test %", *norm_names):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("epochs", overflow="fold")
    for run in results.exploding:
        norms = [f"{norm:.1e}" for norm in run.grad_norms] or ["-", "-"]
        table.add_row(
            run.optimizer,
            f"{run.lr:.0e}",
            _figure(run.losses[-1], ".3f") if run.losses else "-",
            _accuracy(run),
            *(norms if with_norms else ()),
            str(len(run.losses)) + ("" if run.status == "finished" else f", {run.status}"),
        )
    console.print(table)
    names = list(dict.fromkeys(run.optimizer for run in results.loss_scale))
    if names:
        console.print(_scale_table(results.loss_scale, names, settings), "")
    other = ""
    if settings.epochs != SWEEP_EPOCHS:
        other = f"With epochs = {settings.epochs} other rates may be better. "
    console.print(
        f"Norms{'' if with_norms else ', in the JSON,'} are the gradient's, before clipping. "
        f"One seed ({settings.seed}): a few points between two rows are no result. "
        "The learning rates of the first table are each "
        f"optimizer's best of a sweep (five seeds, {SWEEP_EPOCHS} epochs), where AdamW with "
        "clipping came first (93.2 %, BNGD by rows 90.3 %): clipping cures this explosion too, "
        f"with a threshold to choose. {other}Rates fall linearly to 0, which BNGD needs: "
        "its steps do not shrink by themselves."
    )


def _scale_table(runs: Sequence[Run], names: list[str], settings: Settings) -> Table:
    table = _table(
        f"Test accuracy % by factor c of the loss: {settings.scale_epochs} epochs, lr 0.01 for all"
    )
    for name in ("c", *names):
        table.add_column(name, justify="right", overflow="fold")
    cells = {(run.loss_scale, run.optimizer): _accuracy(run) for run in runs}
    for scale in settings.scales:
        table.add_row(f"{scale:g}", *(cells.get((scale, name), "-") for name in names))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, box=SIMPLE_HEAD, title_justify="left", show_edge=False, collapse_padding=True,
        pad_edge=False,
    )  # fmt: skip


def _accuracy(run: Run) -> str:
    return _figure(run.accuracies[-1], ".1f") if run.accuracies else "-"


def _figure(value: float, spec: str) -> str:
    return "NaN" if math.isnan(value) else format(value, spec)


def draw(results: Results, settings: Settings, path: Path) -> None:
    """Write the PNG: training loss on the left, accuracy against the loss scale on the right."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, results.exploding)
    _draw_scales(right, results.loss_scale, settings)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False,
                fontsize=10, labelspacing=0.7,
            )  # fmt: skip
    figure.savefig(path, dpi=110)


def _draw_losses(axes: Any, runs: Sequence[Run]) -> None:
    axes.set(
        title="Exploding network: 20 ReLU layers, weights too large",
        xlabel="epoch (0: the first batch, before any step)",
        ylabel="mean training loss",
        yscale="log",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    for run in runs:
        color, line = _LOOKS[run.optimizer]
        points = [(0, run.first_loss), *enumerate(run.losses, start=1)] if run.losses else []
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        label = f"{run.optimizer} (lr {run.lr:g}): test {_accuracy(run)}"
        label += " %" if run.status != "not finite" else f" from epoch {len(run.losses)}"
        axes.plot(
            [x for x, _ in finite], [y for _, y in finite], color=color, linestyle=line,
            linewidth=2, label=label,
        )  # fmt: skip
        if run.status == "not finite" and finite:
            axes.plot(*finite[-1], color=color, marker="x", markersize=12, markeredgewidth=3)
            axes.annotate(
                "NaN", finite[-1], (10, 0), textcoords="offset points", color=color, va="center"
            )


def _draw_scales(axes: Any, runs: Sequence[Run], settings: Settings) -> None:
    axes.set(
        title="The loss times c: a 64-64-10 network, lr 0.01 for all",
        xlabel="factor c of the loss",
        ylabel="test accuracy, %",
        xscale="log",
        xticks=settings.scales,
        xlim=(min(settings.scales) / 30, max(settings.scales) * 30),
        ylim=(-14, 104),
    )
    axes.set_yticks([_NAN_HEIGHT, *range(0, 101, 20)], ["NaN", *range(0, 101, 20)])
    axes.axhspan(-14, -2, color="0.92", zorder=0)
    names = list(dict.fromkeys(run.optimizer for run in runs))
    for place, name in enumerate(names):
        color, line = _LOOKS[name]
        mine = [run for run in runs if run.optimizer == name and run.accuracies]
        x = [run.loss_scale for run in mine]
        accuracies = [run.accuracies[-1] for run in mine]
        # at most scales most optimizers are within a point: rings in rings, the last the smallest
        axes.plot(
            x, [value if math.isfinite(value) else _NAN_HEIGHT for value in accuracies],
            color=color, linestyle="none", marker="o", markerfacecolor="none",
            markersize=20 - 4 * place, markeredgewidth=1.8, label=name,
        )  # fmt: skip
        axes.plot(x, accuracies, color=color, linestyle=line, linewidth=1, alpha=0.4)


def write_json(
    results: Results, settings: Settings, shared: dict[str, Any], path: Path, *, interrupted: bool
) -> None:
    """Write every figure, and the settings: `shared` is what all runs have in common."""
    device = torch.device(settings.device)
    about = {
        "bngd_triton": __version__,
        "torch": torch.__version__,
        "device_name": (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        ),
        **shared,
        **asdict(settings),
    }
    strict_json.write(path, {"settings": about, "interrupted": interrupted, **asdict(results)})

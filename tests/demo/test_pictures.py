"""The tables and the picture of `bngd demo`."""

import math
from io import StringIO

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from bngd_triton.demo import plot
from bngd_triton.demo import run as demo
from bngd_triton.demo.results import Run


def results():
    """One epoch of every run of a small demo; no training."""

    def ended(arm, scale, accuracy):
        return Run(
            arm.name, arm.lr, arm.clip, scale, "finished", 442.0, [1.5], [accuracy], [0.1, 5e3]
        )

    return demo.Results(
        [ended(arm, 1.0, 89.25) for arm in demo.EXPLODING],
        [
            ended(arm, scale, math.nan if scale > 1 and arm.name == "SGD" else 96.0 + i)
            for i, arm in enumerate(demo.LOSS_SCALE)
            for scale in demo.Settings().scales
        ],
    )


def printed(width, epochs=15):
    text = StringIO()
    plot.print_tables(results(), demo.Settings(epochs=epochs), Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize("epochs", [1, 15])
def test_what_the_tables_say_of_rates_holds_for_their_epochs(epochs):
    text = printed(2000, epochs)
    assert "a sweep (five seeds, 15 epochs)" in text
    assert ("With epochs = 1 other rates may be better." in text) == (epochs == 1)


@pytest.mark.parametrize("width", [40, 50, 60, 79, 100])
def test_tables_cut_nothing_off(width):
    text = printed(width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("89.2") == len(demo.EXPLODING)
    assert text.count(" NaN") == 5
    scales = demo.Settings().scales
    assert all(f"{scale:g} " in text for scale in scales)
    assert text.count("100.0") == len(scales)
    assert ("5.0e+03" in text) == (width >= 79)


def test_markers_stand_where_their_values_are():
    axes = Figure().subplots()
    found = results()
    plot._draw_scales(axes, found.loss_scale, demo.Settings())
    drawn = [line for line in axes.lines if line.get_marker() != "None"]
    assert [line.get_label() for line in drawn] == [arm.name for arm in demo.LOSS_SCALE]
    for line, arm in zip(drawn, demo.LOSS_SCALE):
        runs = [run for run in found.loss_scale if run.optimizer == arm.name]
        assert list(line.get_xdata()) == [run.loss_scale for run in runs]
        heights = [run.accuracies[-1] for run in runs]
        assert list(line.get_ydata()) == [-8 if math.isnan(y) else y for y in heights]
    # rings in rings: none hides another
    sizes = [line.get_markersize() for line in drawn]
    assert sizes == sorted(set(sizes), reverse=True)
    assert {line.get_markerfacecolor() for line in drawn} == {"none"}

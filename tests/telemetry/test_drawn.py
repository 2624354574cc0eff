"""The picture of gradient statistics."""

import sys

import pytest
import torch

from bngd_triton import GradStatsLog, GradStatsLogger, plot_grad_stats
from bngd_triton.telemetry.log import LoggedStep
from bngd_triton.telemetry.plot import _cells
from support.given_statistics import INF, NAN, Given, logged


def test_picture(tmp_path):
    pictures = []
    for skipped in (0.0, 0.0, 1.0):
        many = {f"layers.{i}.weight": (0.0, 10.0**-i, skipped) for i in range(70)}
        plot_grad_stats(logged(many, many), tmp_path / "a.png")
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1] != pictures[2]
    plot_grad_stats(logged({"only": (0.0, 0.0, 1.0)}), tmp_path / "a.svg")
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_what_the_picture_shows():
    names, steps, heights, crosses = _cells(
        logged(
            {"a": (0.0, 100.0, 0.0), "b": (NAN, NAN, 1.0)},
            {"a": (0.0, 0.01, 2.0), "b": (0.0, 0.0, 1.0)},
            {"a": (0.0, 1.0, 2.0), "b": (0.0, 10.0, 2.0), "c": (0.0, 1.0, 1.0)},
        )
    )
    assert (names, steps) == (["a", "b", "c"], [0, 1, 2])
    assert heights.tolist()[0] == pytest.approx([2, -2, 0])
    assert heights.tolist()[1] == pytest.approx([NAN, -INF, 1], nan_ok=True)
    assert heights.tolist()[2] == pytest.approx([NAN, NAN, 0], nan_ok=True)
    assert crosses.tolist() == [[False, True, False], [True, False, True], [False, False, True]]


def test_a_long_log_keeps_its_peaks_and_its_skips():
    log = GradStatsLog()
    for step in range(1200):
        values = torch.tensor([[0.0, 1.0, 1.0, 1.0, float(step >= 700)]], dtype=torch.float64)
        if step == 1000:
            values[0, 1] = 1e5
        if step % 3 == 0:
            values[0, 1] = NAN
        log.steps.append(LoggedStep(10 * step, ("a",), values))
    _, steps, heights, crosses = _cells(log)
    assert len(steps) == heights.shape[1] == crosses.shape[1] == 400
    assert steps[1] == 30
    assert heights[0, 333] == 5
    assert heights[0].sum() == 5
    assert crosses.nonzero().tolist() == [[0, 700 // 3]]


def test_bad_pictures_are_refused(tmp_path, monkeypatch):
    logger = GradStatsLogger(Given(a=(0.0, 1.0, 0.0)), every=1)
    with pytest.raises(TypeError, match=r"log must be a GradStatsLog \(logger\.log\), got GradSta"):
        plot_grad_stats(logger, tmp_path / "a.png")
    with pytest.raises(ValueError, match="log is empty"):
        plot_grad_stats(logger.log, tmp_path / "a.png")
    logger.step()
    with pytest.raises(ValueError, match="abc"):
        plot_grad_stats(logger.log, tmp_path / "a.abc")
    for module in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib"):
        plot_grad_stats(logger.log, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())

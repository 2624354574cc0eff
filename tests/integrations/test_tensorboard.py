"""TensorBoard reads what `GradStatsLogger` writes."""

import pytest
import torch
from torch import nn

from bngd_triton import BNGD, GradStatsLogger

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter


def train(folder, steps, first_step=0):
    torch.manual_seed(first_step)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    optimizer = BNGD(model.named_parameters(), granularity="row")
    logger = GradStatsLogger(optimizer, every=2, path=folder, first_step=first_step)
    for i in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        if i == 2:
            model[0].weight.grad[1] = torch.nan
        optimizer.step()
        logger.step()
    logger.close()
    return logger


def test_scalars_and_histograms(tmp_path):
    log = train(tmp_path, 5).log
    everything = {"scalars": 0, "histograms": 0}
    events = accumulator.EventAccumulator(str(tmp_path), everything).Reload()
    names, steps, table = log.table("std")
    assert steps == [0, 2, 4]
    for name, stds in zip(names, table):
        scalars = events.Scalars(f"grad_std/{name}")
        assert [event.step for event in scalars] == steps
        assert [event.value for event in scalars] == pytest.approx(stds.tolist(), rel=1e-6)
    assert [event.value for event in events.Scalars("grad_skipped/0.weight")] == [0, 1, 1]
    rows = events.Histograms("grad_rows_std/0.weight")
    assert [event.histogram_value.num for event in rows] == [3, 2, 3]
    assert len(events.Tags()["scalars"]) == 5 * 4
    assert len(events.Tags()["histograms"]) == 4 * 2


def test_a_resumed_run_hides_what_the_dead_one_wrote_beyond(tmp_path):
    train(tmp_path, 9)
    resumed = train(tmp_path, 4, first_step=4).log
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("grad_std/0.weight")
    assert [event.step for event in events] == [0, 2, 4, 6]
    stds = resumed.table("std")[2][0].tolist()
    assert [event.value for event in events][2:] == pytest.approx(stds, rel=1e-6)


def test_it_closes_its_own_files_only(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(SummaryWriter, "close", lambda writer: closed.append(writer))
    optimizer = BNGD([nn.Parameter(torch.ones(2))])
    own = GradStatsLogger(optimizer, path=tmp_path)
    given = GradStatsLogger(optimizer, writer=SummaryWriter(str(tmp_path)))
    assert not closed
    own.close()
    given.close()
    assert len(closed) == 1

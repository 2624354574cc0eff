"""`GradStatsLogger`, its log, TensorBoard's calls and the picture."""

import json
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD, GradStatsLog, GradStatsLogger
from bngd_triton.telemetry.log import COLUMNS
from support.given_statistics import INF, NAN, Given, logged


class Writer:
    """Keeps what it is told, as TensorBoard would."""

    def __init__(self):
        self.scalars = {}
        self.histograms = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def add_histogram(self, tag, values, step):
        assert values.numel()
        assert values.isfinite().all()
        self.histograms[tag, step] = values


def make(path, granularity):
    params = [Parameter(torch.randn(size, device=path.device)) for size in ((5, 7), (5,), (3, 5))]
    named = list(zip(("first.weight", "first.bias", "second.weight"), params))
    return BNGD(named, lr=1e-2, granularity=granularity, fused=path.fused), params


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_log_and_writer_have_the_statistics_of_the_gradients(granularity, path):
    optimizer, params = make(path, granularity)
    writer = Writer()
    logger = GradStatsLogger(optimizer, every=2, writer=writer)
    for _ in range(3):
        for param in params:
            # rows far apart: their means belong to the spread of the whole
            rows = torch.arange(len(param), device=path.device).view(-1, *[1] * (param.dim() - 1))
            param.grad = torch.randn_like(param) + 10 * rows
        optimizer.step()
        logger.step()
    assert [logged.step for logged in logger.log.steps] == [0, 2]
    names, values = logger.log.steps[1][1:]
    assert names == ("first.weight", "first.bias", "second.weight")
    assert (values.dtype, values.device.type) == (torch.float64, "cpu")
    grads = [param.grad.double().cpu() for param in params]
    # the kernels' statistics are float32 tiles merged in float64
    close = {"rtol": 1e-6, "atol": 1e-7}
    for name, grad, found in zip(names, grads, values):
        mean, std, rms = grad.mean(), grad.std(correction=0), grad.square().mean().sqrt()
        want = torch.stack([mean, std, rms, rms / std, torch.zeros_like(std)])
        torch.testing.assert_close(found, want, **close)
        told = [writer.scalars[f"grad_{column}/{name}", 2] for column in COLUMNS]
        assert told == found.tolist()
        if granularity == "row" and grad.dim() > 1:
            for column, rows in (("mean", grad.mean(1)), ("std", grad.std(1, correction=0))):
                told = writer.histograms[f"grad_rows_{column}/{name}", 2]
                torch.testing.assert_close(told, rows, **close)
    assert len(writer.scalars) == 2 * 3 * len(COLUMNS)
    of_rows = ("first.weight", "second.weight") if granularity == "row" else ()
    assert set(writer.histograms) == {
        (f"grad_rows_{column}/{name}", step)
        for column in COLUMNS[:-1] for name in of_rows for step in (0, 2)
    }  # fmt: skip


@pytest.mark.parametrize(("first_step", "logged"), [(0, [0, 10]), (17, [20, 30])])
def test_every_so_many_steps(first_step, logged):
    """Numbers go on from the first step."""
    logger = GradStatsLogger(Given(a=(0.0, 1.0, 0.0)), every=10, first_step=first_step)
    for _ in range(14):
        logger.step()
    assert [step.step for step in logger.log.steps] == logged


def test_a_model_names_parameters_that_the_optimizer_got_unnamed():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    # in another order, in groups, and one that is no parameter of the model
    stranger = Parameter(torch.ones(3))
    optimizer = BNGD(
        [
            {"params": [model[2].weight, stranger]},
            {"params": [model[2].bias, *model[0].parameters()]},
        ]
    )
    logger = GradStatsLogger(optimizer, every=1, model=model)
    assert logger.latest() == {}
    (model(torch.randn(5, 4)).square().sum() + stranger.square().sum()).backward()
    optimizer.step()
    logger.step()
    latest = logger.latest()
    named = dict(model.named_parameters())
    stds = {name: float(param.grad.double().std(correction=0)) for name, param in named.items()}
    assert {name: latest[f"grad_std/{name}"] for name in named} == pytest.approx(stds, rel=1e-9)
    assert len(latest) == len(COLUMNS) * (len(named) + 1)
    assert all(type(value) is float for value in latest.values())


@pytest.mark.parametrize("every", [1, 5])
def test_one_copy_to_the_host_a_logged_step(every, monkeypatch):
    given = Given(a=(0.0, 1.0, 0.0), b=([0.0, 1.0], [1.0, 2.0], [0.0, 0.0]), c=(3.0, 1.0, 1.0))
    calls = []

    def noting(name, real):
        return lambda *args: calls.append(name) or real(*args)

    monkeypatch.setattr(given, "grad_stats", noting("grad_stats", given.grad_stats))
    monkeypatch.setattr(Tensor, "cpu", noting("cpu", Tensor.cpu))
    logger = GradStatsLogger(given, every=every, writer=Writer())
    for _ in range(5):
        logger.step()
    assert calls == ["grad_stats", "cpu"] * (5 // every)


def test_whole_of_rows_without_finite_statistics():
    writer = Writer()
    rows = ([NAN, 1.0, INF, 3.0], [NAN, 2.0, NAN, 0.0], [1.0, 0.0, 2.0, 0.0])
    logger = GradStatsLogger(Given(some=rows, none=([NAN], [NAN], [4.0])), every=1, writer=writer)
    logger.step()
    some, none = logger.log.steps[0].values.tolist()
    # of the rows 1 +- 2 and 3 +- 0
    std = math.sqrt((4 + 0) / 2 + 1)
    rms = math.sqrt((1 + 4 + 9) / 2)
    assert some == pytest.approx([2, std, rms, rms / std, 3])
    assert none == pytest.approx([NAN, NAN, NAN, NAN, 4], nan_ok=True)
    assert writer.scalars["grad_skipped/some", 0] == 3
    assert writer.histograms["grad_rows_mean/some", 0].tolist() == [1, 3]
    assert writer.histograms["grad_rows_kappa/some", 0].tolist() == pytest.approx([5**0.5 / 2])
    assert not [tag for tag, _ in writer.histograms if tag.endswith("/none")]


@pytest.mark.parametrize("scale", [1e-300, 1e300, 0.0])
def test_whole_of_rows_at_the_ends_of_the_range(scale):
    log = logged({"a": ([scale, 3 * scale], [2 * scale, 0.0], [0.0, 0.0])})
    mean, std, _, kappa = log.steps[0].values[0, :4].tolist()
    assert mean == pytest.approx(2 * scale, rel=1e-12)
    assert std == pytest.approx(3**0.5 * scale, rel=1e-12)
    # nothing is removed of a dead tensor
    assert kappa == pytest.approx((7 / 3) ** 0.5 if scale else 1.0)


def test_a_parameter_without_gradient_so_far():
    later = {"b": (0.0, 2.0, 0.0), "a": (0.0, 3.0, 0.0)}
    log = logged({"a": (0.0, 1.0, 0.0)}, later)
    with pytest.raises(ValueError, match=r"column must be one of mean, std, .*, got 'max'"):
        log.table("max")
    names, steps, table = log.table("std")
    assert (names, steps) == (["a", "b"], [0, 1])
    assert table.flatten().tolist() == pytest.approx([1, 3, NAN, 2], nan_ok=True)


def test_names_are_kept_once():
    log = logged(*[{"a": (0.0, 1.0, 0.0), "b": (0.0, 1.0, 0.0)}] * 2)
    assert log.steps[0].names is log.steps[1].names


def test_through_a_file(tmp_path):
    log = logged({"a": (NAN, INF, 1.0)}, {"a": (-INF, 0.1, 2.0), "b": (1e-300, 2.0, 0.0)})
    log.save(tmp_path / "stats.json")
    text = (tmp_path / "stats.json").read_text()
    document = json.loads(text, parse_constant=pytest.fail)
    assert document["columns"] == list(COLUMNS)
    assert document["steps"][1]["stats"]["b"][1] == 2.0
    again = GradStatsLog.load(tmp_path / "stats.json")
    for got, want in zip(again.steps, log.steps, strict=True):
        assert got[:2] == want[:2]
        torch.testing.assert_close(got.values, want.values, rtol=0, atol=0, equal_nan=True)


HEAD = '{"columns": ["mean", "std", "rms", "kappa", "skipped"], "steps": '


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"columns": ["mean"], "steps": []}', HEAD + '[{"step": 1}]}',
        HEAD + '[{"step": 1, "stats": {"a": [1, 2]}}]}',
        HEAD + '[{"step": 1, "stats": {"a": [1, 2, 3, 4, "x"]}}]}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_log_is_refused(text, tmp_path):
    file = tmp_path / "stats.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"stats\.json is not a log of GradStatsLog\.save"):
        GradStatsLog.load(file)


GIVEN = Given(a=(0.0, 1.0, 0.0))
ADAM = torch.optim.Adam([Parameter(torch.ones(2))])


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "message"),
    [
        (ADAM, {}, TypeError, "optimizer must be a BNGD, got Adam, which has no grad_stats"),
        *(
            (GIVEN, {"every": bad}, ValueError, f"every must be an integer >= 1, got {bad!r}")
            for bad in (0, -1, 2.0, True, "3")
        ),
        (GIVEN, {"first_step": -1}, ValueError, "first_step must be an integer >= 0, got -1"),
        (GIVEN, {"writer": {}}, TypeError, "writer must have add_scalar, got dict"),
        (GIVEN, {"writer": Writer(), "path": "a"}, ValueError, "a writer or a path, not both"),
    ],
)
def test_bad_input_is_refused(optimizer, options, error, message):
    with pytest.raises(error, match=message):
        GradStatsLogger(optimizer, **options)


def test_a_step_before_the_optimizer_s_is_refused():
    param = Parameter(torch.ones(2))
    optimizer = BNGD([param])
    logger = GradStatsLogger(optimizer)
    with pytest.raises(RuntimeError, match=r"step 0 has no statistics.* after optimizer\.step"):
        logger.step()
    param.grad = torch.randn(2)
    optimizer.step()
    logger.step()
    assert [step.step for step in logger.log.steps] == [0]


def test_tensorboard_is_missing(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        GradStatsLogger(Given(a=(0.0, 1.0, 0.0)), path=tmp_path / "runs")
    assert not list(tmp_path.iterdir())

"""`bngd demo`: its files, its figures, its errors and Ctrl-C."""

import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from bngd_triton import cli
from bngd_triton.demo import resume
from bngd_triton.demo import run as demo

TINY = demo.Settings(epochs=1, scales=(1e-12, 1e15), scale_epochs=1)


def run(settings, out, watch=lambda run: None, results=None):
    """The exit code, the JSON (strict: no NaN) and what was printed."""
    text = StringIO()
    out.mkdir(exist_ok=True)
    code = demo.demo(settings, out, Console(file=text, width=100), watch, results)
    document = json.loads((out / demo.JSON_NAME).read_text(), parse_constant=pytest.fail)
    return code, document, text.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    return out, *run(TINY, out)


@pytest.fixture
def two_arms(monkeypatch):
    monkeypatch.setattr(demo, "EXPLODING", (demo.EXPLODING[0], demo.EXPLODING[5]))
    monkeypatch.setattr(demo, "LOSS_SCALE", (demo.LOSS_SCALE[3],))


def test_files_and_arms(tiny):
    out, code, document, printed = tiny
    assert code == 0
    assert (out / demo.PNG_NAME).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [run["optimizer"] for run in document["exploding"]] == [a.name for a in demo.EXPLODING]
    assert len(document["exploding"]) == 7
    pairs = [(run["optimizer"], run["loss_scale"]) for run in document["loss_scale"]]
    assert pairs == [(arm.name, scale) for arm in demo.LOSS_SCALE for scale in TINY.scales]
    settings = {"torch": torch.__version__, "device": "cpu", "seed": 0, "epochs": 1}
    assert settings.items() <= document["settings"].items()
    assert all(arm.name in printed for arm in demo.EXPLODING + demo.LOSS_SCALE)
    last = printed.replace("\n", " ")
    assert last.rstrip().endswith(f"Wrote {out / demo.PNG_NAME} and {out / demo.JSON_NAME}")
    assert "better than" not in printed.lower()


def test_figures(tiny):
    document = tiny[2]
    for done in document["exploding"]:
        low, high = done["grad_norms"]
        assert 10 < done["first_loss"] < 1e4
        assert 0 < low <= high
        assert high > 100
    for done in document["exploding"] + document["loss_scale"]:
        assert len(done["losses"]) == len(done["accuracies"]) == 1
        if "BNGD" in done["optimizer"]:
            assert done["status"] == "finished"
            assert math.isfinite(done["losses"][0])
            assert 0 <= done["accuracies"][0] <= 100
    by_scale = {(run["optimizer"], run["loss_scale"]): run for run in document["loss_scale"]}
    final = {arm: run["accuracies"][-1] for arm, run in by_scale.items()}
    assert final["BNGD, eps 0", 1e-12] == final["BNGD, eps 0", 1e15] > 50
    assert final["AdamW", 1e-12] < 30 < 50 < final["AdamW", 1e15]
    assert final["SGD", 1e15] is None
    assert by_scale["SGD", 1e15]["status"] == "not finite"
    assert by_scale["SGD", 1e15]["losses"] == [None]
    assert "NaN" in tiny[3]


def test_same_seed_same_json(tiny, tmp_path):
    assert run(TINY, tmp_path / "again")[1] == tiny[2]


def test_other_seed_other_figures(tiny, two_arms, tmp_path):
    other = demo.Settings(seed=1, epochs=1, scales=(1.0,), scale_epochs=1)
    assert run(other, tmp_path)[1]["exploding"][0]["losses"] != tiny[2]["exploding"][0]["losses"]


@pytest.mark.parametrize(("target", "epochs"), [(1e9, 1), (1e-9, 2)])
def test_a_target_loss_stops_early_where_it_is_reached(two_arms, tmp_path, target, epochs):
    settings = demo.Settings(epochs=2, scales=(1.0,), scale_epochs=2, target_loss=target)
    _, document, printed = run(settings, tmp_path)
    for done in document["exploding"] + document["loss_scale"]:
        assert len(done["losses"]) == epochs
        assert (done["status"] == "target loss") == (epochs == 1)
    assert ("target loss" in printed) == (epochs == 1)


def test_lr_falls_linearly_to_zero(two_arms, tmp_path, monkeypatch):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(demo, "EXPLODING", (demo.Arm("SGD", Spy, 1e-5),))
    monkeypatch.setattr(demo, "LOSS_SCALE", ())
    run(demo.Settings(epochs=2), tmp_path)
    steps = 2 * math.ceil(1347 / 64)
    assert rates == pytest.approx([1e-5 * (1 - step / steps) for step in range(steps)])


@pytest.mark.parametrize("after", [0, 1, 3], ids=["at once", "within part 1", "within part 2"])
def test_ctrl_c_keeps_what_is_done(two_arms, tmp_path, after):
    seen = []

    def watch(run):
        seen.append(run)
        if len(seen) > after:
            raise KeyboardInterrupt

    settings = demo.Settings(epochs=1, scales=(1.0, 10.0), scale_epochs=2)
    code, document, printed = run(settings, tmp_path, watch)
    assert code == 130
    assert document["interrupted"] is True
    runs = document["exploding"] + document["loss_scale"]
    assert [done["status"] for done in runs][:-1] == ["finished"] * (len(runs) - 1)
    assert runs[-1]["status"] == "interrupted"
    assert len(runs[-1]["losses"]) >= 1
    assert (tmp_path / demo.PNG_NAME).stat().st_size > 1000
    assert "Interrupted" in printed
    assert "SGD" in printed


def test_ctrl_c_before_any_epoch(two_arms, tmp_path, monkeypatch):
    threads = []

    def interrupt(*args):
        threads.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupt)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    code, document, _ = run(TINY, tmp_path)
    threads.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert threads == [1, 2]
    assert code == 130
    assert document["exploding"][0]["losses"] == []


@pytest.mark.parametrize(("epochs", "left"), [(2, 3), (4, 1)])
def test_a_killed_demo_goes_on(two_arms, tmp_path, monkeypatch, epochs, left):
    settings = demo.Settings(epochs=1, scales=(1.0, 10.0), scale_epochs=1)
    want = run(settings, tmp_path / "whole")[1]
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {demo.JSON_NAME, demo.PNG_NAME}
    out, trained, train = tmp_path / "killed", [], demo.train

    def die(run):
        # as a signal would: nothing is written after it
        if len(trained) == epochs:
            raise SystemExit

    monkeypatch.setattr(demo, "train", lambda *args: trained.append(args[0]) or train(*args))
    with pytest.raises(SystemExit):
        run(settings, out, die)
    assert [path.name for path in out.iterdir()] == [resume.NAME]
    trained.clear()
    document = run(settings, out, results=resume.finished_runs(settings, out / resume.NAME))[1]
    assert len(trained) == left
    assert document == want
    assert not (out / resume.NAME).exists()


def test_resume_is_refused_for_other_settings(two_arms, tmp_path, capsys):
    def interrupt(run):
        if run.loss_scale != 1:
            raise KeyboardInterrupt

    settings = demo.Settings(epochs=1, scales=(10.0,), scale_epochs=1)
    assert run(settings, tmp_path, interrupt)[0] == 130
    before = (tmp_path / resume.NAME).read_bytes()
    assert cli.main(["demo", "--resume", "--epochs", "3", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{resume.NAME} is of a demo with epochs = 1, not 3: give it the same arg" in error
    assert (tmp_path / resume.NAME).read_bytes() == before
    (tmp_path / resume.NAME).write_bytes(before[:500])
    assert cli.main(["demo", "--resume", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert f"{resume.NAME} (500 bytes) is incomplete" in capsys.readouterr().err


def test_resume_reaches_the_demo(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "demo", lambda *args, results: calls.append(results) or 0)
    # what is to resume is there, or nothing is
    assert cli.main(["demo", "--resume", "--out", str(tmp_path), "--device", "cpu"]) == 0
    results = demo.Results([demo.Run("SGD", 0.1, None, 1.0, "finished", losses=[math.inf])])
    resume.keep(results, demo.Settings(), tmp_path / resume.NAME)
    assert cli.main(["demo", "--resume", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert calls[0] == demo.Results()
    assert repr(calls[1]) == repr(results)


def test_a_new_demo_forgets_what_was_left(two_arms, tmp_path):
    path = tmp_path / resume.NAME
    resume.keep(demo.Results(), TINY, path)
    seen = []
    run(TINY, tmp_path, lambda run: seen.append(path.exists()))
    # the first run of the new one has finished before its second
    assert seen[:2] == [False, True]


def test_progress_is_a_line_a_run_where_no_terminal_shows_it(tiny):
    printed = tiny[3]
    assert "\x1b" not in printed
    lines = printed.splitlines()
    runs = len(demo.EXPLODING), 2 * len(demo.LOSS_SCALE)
    assert lines[0].startswith("exploding network 1/7, SGD: loss ")
    assert lines[0].endswith(" %")
    assert [line.split(",")[0] for line in lines[: sum(runs)]] == [
        f"{name} {number + 1}/{count}"
        for name, count in zip(("exploding network", "loss scale"), runs)
        for number in range(count)
    ]
    assert "exploding network" not in " ".join(lines[sum(runs) :])

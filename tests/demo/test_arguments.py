"""The command line of `bngd`, and what of it reaches the demo."""

import subprocess
import sys

import pytest

import bngd_triton
from bngd_triton import cli
from bngd_triton.demo import run as demo


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--epochs", "0"], "--epochs must be >= 1, got 0"),
        (["--epochs", "two"], "invalid int value: 'two'"),
        (["--seed", "-1"], "--seed must be in [0, 2**63), got -1"),
        (["--target-loss", "nan"], "--target-loss must be finite and > 0, got nan"),
        (["--target-loss", "0"], "--target-loss must be finite and > 0, got 0.0"),
        (["--device", "abacus"], "--device 'abacus' cannot be used: "),
        (["--device", "meta"], "--device 'meta' cannot be used: "),
        (["--out", "taken/inner"], "--out taken/inner cannot be written: "),
        (["--quick", "--epochs", "3"], "--epochs: not allowed with argument --quick"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert cli.main(["demo", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_arguments_reach_the_demo(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "demo", lambda *args, results: calls.append((args, results)) or 7)
    given = ["--device", "cpu", "--seed", "3", "--epochs", "4", "--target-loss", "0.5"]
    assert cli.main(["demo", *given, "--out", str(tmp_path / "a" / "b")]) == 7
    assert calls == [((demo.Settings("cpu", 3, 4, 0.5), tmp_path / "a" / "b"), None)]
    assert (tmp_path / "a" / "b").is_dir()


def test_missing_package(tmp_path, monkeypatch, capsys):
    for module in ("run", "tasks"):
        monkeypatch.delitem(sys.modules, f"bngd_triton.demo.{module}")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "bngd: error: sklearn is not installed: pip install scikit-learn matplotlib rich\n"
    )


def test_the_command_alone_prints_its_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr()
    assert all(f"\n    {name} " in printed.out for name in ("demo", "bench", "info", "verify"))
    assert not printed.err


def test_quick_is_a_shorter_demo(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "demo", lambda *args, results: calls.append(args[0]) or 0)
    given = ["--device", "cpu", "--out", str(tmp_path), "--seed", "3"]
    assert cli.main(["demo", "--quick", *given]) == 0
    (quick,), whole = calls, demo.Settings(seed=3)
    assert quick.seed == 3
    assert quick.epochs < whole.epochs
    assert set(quick.scales) < set(whole.scales)
    # what the help and the panel call 27 decades
    assert (min(quick.scales), max(quick.scales)) == (min(whole.scales), max(whole.scales))
    epochs = [5 * len(one.scales) * one.scale_epochs for one in (quick, whole)]
    assert epochs[0] <= epochs[1] / 10


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "bngd_triton", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"bngd-triton {bngd_triton.__version__}\n")

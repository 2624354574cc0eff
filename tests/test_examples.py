"""The files of examples/ run and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_two_layer():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "two_layer.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.M)]
    assert len(losses) >= 5
    assert losses[-1] < 1e-4 < losses[0]
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert len(re.findall(rf"^  {name} +gradient ", done.stdout, re.M)) == len(losses)
    assert len(re.findall(r"^ +parameter ", done.stdout, re.M)) == 4 * len(losses)
    (prediction,) = re.findall(r"^prediction at x = 3: (\S+)", done.stdout, re.M)
    assert float(prediction) == pytest.approx(3, abs=0.01)


def test_two_layer_is_importable(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import two_layer

    assert two_layer.main() == pytest.approx(3, abs=0.01)
    assert "gradient" in capsys.readouterr().out

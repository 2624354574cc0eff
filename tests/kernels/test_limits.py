"""A test that outlasts its limit ends pytest and says where it was."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.checkout import ROOT
from support.time_limits import patience

TEST = """
import time
from support import time_limits

def test_ends():
    with time_limits.limited(60):
        pass

def test_waits_for_ever():
    with time_limits.limited({seconds}):
        time.sleep(3)
"""


def run(folder: Path, seconds: float) -> "subprocess.CompletedProcess[str]":
    (folder / "support").mkdir()
    for name in ("conftest.py", "support/time_limits.py", "support/paths.py"):
        shutil.copy(ROOT / "tests" / name, folder / name)
    (folder / "test_it.py").write_text(TEST.format(seconds=seconds))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "."],
        cwd=folder, capture_output=True, text=True, timeout=patience(100),
    )  # fmt: skip


def test_an_endless_test_ends_pytest(tmp_path: Path) -> None:
    done = run(tmp_path, 0.5)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in test_waits_for_ever" in done.stderr
    assert "passed" not in done.stdout


def test_a_test_within_its_limit_is_left_alone(tmp_path: Path) -> None:
    done = run(tmp_path, 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout

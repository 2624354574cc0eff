"""Launches past Triton's dispatch are those that Triton's own dispatch makes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("bench", reason="bench/ is in the checkout only")

from support.checkout import ROOT

# every kernel is compiled, 15 s for each
pytestmark = pytest.mark.slow
CHECK = ROOT / "tests" / "support" / "fake_launches.py"


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_launches_agree_with_tritons(backend: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(CHECK), backend]
    done = subprocess.run(command, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launches agree" in done.stdout

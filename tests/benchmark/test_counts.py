"""docs/performance.md shows the committed counts, and the kernels still give them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
import support.bench_folder  # noqa: F401
from bench.counts import h200, page
from bench.counts.__main__ import RESULT
from support.checkout import ROOT


def test_the_page_shows_the_committed_counts() -> None:
    text = page.PAGE.read_text()
    assert page.filled(text, json.loads(RESULT.read_text())) == text


# 65 536 registers among warps that get 8 to a thread at a time
@pytest.mark.parametrize(
    ("registers", "programs"), [(32, 16), (39, 12), (48, 10), (64, 8), (80, 6), (168, 3), (255, 2)]
)
def test_programs_share_the_registers_of_a_processor(registers: int, programs: int) -> None:
    assert h200.programs(registers) == programs


@pytest.mark.slow
def test_the_kernels_still_give_the_committed_counts() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.counts", "--check"]
    done = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

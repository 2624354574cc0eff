"""Kernels compiled ahead of time are found where the cache was carried to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import support.bench_folder  # noqa: F401
from support.checkout import ROOT


def precompile(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.precompile", *arguments]
    done = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def written(folder: Path) -> dict[str, int]:
    """When each kernel was compiled."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.cubin")}


@pytest.mark.slow
def test_a_carried_cache_serves_every_kernel(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    assert " kernels, " in precompile("--out", str(there), "--only", "fp32")
    assert not list(there.rglob("*.ptx"))
    shutil.move(there, here)
    before = written(here)
    assert len(before) > 10
    precompile("--moved", str(here))
    precompile("--out", str(here), "--only", "fp32")
    assert written(here) == before

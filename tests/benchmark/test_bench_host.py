"""bench/: what runs anywhere, in processes of its own."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from support.bench_folder import ROOT
from support.compiling import python

pytestmark = pytest.mark.slow


def test_host_time_is_measured_without_a_device(tmp_path):
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.host", "--tensors", "20", "--repeats", "3"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 tensors, 28 groups") == 3
    found = json.loads(out.read_text())
    assert [(row["groups"], row["gradients"]) for row in found["rows"]] == [
        (1, "kept"), (1, "new"), (1, "moved"), (28, "kept"), (28, "new"), (28, "moved"),
    ]  # fmt: skip
    for row in found["rows"]:
        assert 0.05 < row["ratio"] < 20
        assert min(row["step"], row["SGD"], row["step, new rates"]) > 1


def test_microbenchmarks_run():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/bench_micro.py", "--benchmark-disable", "-q"]
    # every function and optimizer at its smallest sizes; larger ones take the same way
    command += ["--deselect", "bench/bench_micro.py::test_plan[10 000 tensors]"]
    command += ["-k", "not ViT and not 16.8 and not 3000 and not 1024 and not 100000"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # kernels and the host path need the interpreter
    gpu = torch.cuda.is_available()
    assert ("8 passed, 8 skipped" if gpu else "16 passed") in done.stdout


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_host_time_of_shards(tmp_path):
    out = tmp_path / "shards.json"
    command = [sys.executable, "-m", "bench.host", "--tensors", "8", "--repeats", "3", "--sharded"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["step"] < row["laid out anew"]


def written(folder):
    """When each kernel was compiled."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.cubin")}


def test_a_carried_cache_serves_every_kernel(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    code, printed = python("-m", "bench.precompile", "--out", str(there), "--only", "fp32")
    assert code == 0, printed
    assert " kernels, " in printed
    assert not list(there.rglob("*.ptx"))
    shutil.move(there, here)
    before = written(here)
    assert len(before) > 10
    for arguments in (["--moved", str(here)], ["--out", str(here), "--only", "fp32"]):
        code, printed = python("-m", "bench.precompile", *arguments)
        assert code == 0, printed
    assert written(here) == before

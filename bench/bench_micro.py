"""Microbenchmarks that need no GPU: ``python -m pytest bench/bench_micro.py --benchmark-only``.

The CPU step beside torch.optim's, kernels in Triton's interpreter, the making of plans, and a
repeated step on the host.
"""

import importlib
import os

import pytest
import torch

# Triton reads it when kernels are defined
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from bench import cpu
from bench.arms import grouped
from bench.workloads import WORKLOADS
from bngd_triton import BNGD
from bngd_triton.kernels import fused_step, fused_step_
from bngd_triton.kernels.build_plan import build
from bngd_triton.kernels.devices import gpu_tuning
from bngd_triton.kernels.plan import Entry
from bngd_triton.records import new_record, slices_of


@pytest.mark.parametrize("case", cpu.CASES)
@pytest.mark.parametrize("arm", cpu.arms())
def test_cpu_step(benchmark, arm, case):
    benchmark.group = f"CPU step, {case}"
    optimizer = cpu.arms()[arm](cpu.parameters(cpu.CASES[case]))
    optimizer.step()
    benchmark(optimizer.step)


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
)


@interpreted
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("shape", [(8, 16), (64, 1024), (2, 100_000)], ids=str)
def test_interpreted_kernels(benchmark, shape, granularity):
    benchmark.group = f"kernels in the interpreter, {shape}"
    (param,) = cpu.parameters([shape])
    momentum = torch.zeros_like(param)
    with torch.no_grad():
        benchmark.pedantic(
            fused_step_,
            args=([param], [param.grad], [momentum]),
            kwargs={"lr": 1e-3, "granularity": granularity},
            rounds=5,
            warmup_rounds=1,
        )


PLANS = {
    "300 tensors": ([(64, 64, 3, 3), (64,), (64,)] * 100, False),
    "10 000 tensors": (list(WORKLOADS["moe-10k"].shapes()), False),
    "GPT-2 by rows": (list(WORKLOADS["gpt2-124m"].shapes()), True),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(benchmark, name):
    benchmark.group = "plan building"
    shapes, by_row = PLANS[name]
    # a plan asks for sizes and addresses only: these pages are never touched
    tensors = [torch.empty(shape) for shape in shapes]
    entries = [
        Entry(t, t, t, new_record(rows, t.device), 0, rows, t.dim() > 1, None)
        for t in tensors
        for rows in (slices_of(t.shape, "row" if by_row else "tensor"),)
    ]
    tuning = gpu_tuning(wide=True, wave=32)
    benchmark.pedantic(lambda: build(entries, tuning), rounds=3, warmup_rounds=1)


@pytest.fixture
def host(monkeypatch):
    """`bench.host`, without what its import changes for processes of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])
    found = importlib.import_module("bench.host")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return found


@interpreted
@pytest.mark.parametrize("gradients", ["kept", "new", "moved"])
@pytest.mark.parametrize("groups", [1, 28])
def test_host_path(benchmark, host, monkeypatch, groups, gradients):
    benchmark.group = f"a repeated step of 300 tensors without launches, {gradients} gradients"
    monkeypatch.setattr(fused_step, "update", lambda *_: None)
    params = cpu.parameters([(host.ELEMENTS,)] * 300)
    optimizer = BNGD(grouped(params, groups), fused=True, flatten=False)
    prepare = host.Backward(params, gradients)
    for _ in range(2):
        prepare()
        optimizer.step()
    assert optimizer._stepper.replay is not None, "the step was not recognised as repeatable"
    benchmark.pedantic(optimizer.step, setup=prepare, rounds=1000)

"""Whatever torch's default device and dtype are, steps have the same bits."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bngd_triton
from bngd_triton import BNGD
from bngd_triton.kernels import fused_step, segment_statistics
from bngd_triton.kernels.build_plan import build
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.kernels.plan import Entry
from bngd_triton.options import Options
from bngd_triton.records import new_record
from bngd_triton.tensors import local
from support import processes
from support.checkpoints import through_a_file
from support.exact_runs import assert_bits, give, make_params, state_of
from support.handmade_plans import member, nothing_new
from support.kernel_cases import LANES
from support.paths import StepPath

PACKAGE = Path(bngd_triton.__file__).parent
KERNELS = Path(fused_step.__file__).parent
# what makes a tensor on the default device, or of the default dtype, where none is named
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor",
    "tensor", "zeros",
}  # fmt: skip
# `device` and `dtype` for all of a table's tensors, or of a case's
NAMED = {"INT64", "_DRAWN"}


@contextlib.contextmanager
def defaults(device: str | None, dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(usual)


def run(path: StepPath, device: str | None, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Parameters, state and statistics after a whole run, checkpoint included."""
    narrow = torch.float32 if "master_weights" not in options else torch.bfloat16
    scale = 65536.0
    torch.manual_seed(0)
    params = make_params(path.device, narrow)
    grads = [[torch.randn_like(p) * 2.0**-4 for p in params] for _ in range(7)]
    grads[5][0].view(-1)[2] = torch.inf
    with defaults(device, dtype):
        optimizer = BNGD(params, 0.01, fused=path.fused, weight_decay=0.1, eps=1e-3, **options)
        for step, values in enumerate(grads):
            if step == 4:
                state = through_a_file(optimizer.state_dict())
                optimizer = BNGD(params, 0.02, fused=path.fused, **options)
                optimizer.load_state_dict(state)
            scaled = step in (2, 3, 5)
            for param, value in zip(params, values):
                give(param, value * scale if scaled else value)
            # a number as set by hand, and a tensor as GradScaler does
            optimizer.grad_scale = None
            if scaled:
                number = torch.full((), scale, dtype=torch.float32, device=path.device)
                optimizer.grad_scale = scale if step == 2 else number
                optimizer.found_inf = 0.0
            optimizer.step()
        stats = optimizer.grad_stats()
        assert optimizer.skipped >= 1
        records = [value for one in stats.values() for value in (one.mean, one.std, one.skipped)]
    return [*params, *state_of(optimizer, params), *records]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "row", "nesterov": True, "tuning": {"form": "single-launch"}},
        {"granularity": "global", "normalizer": "cdf"},
        {"accumulation_steps": 2, "granularity": "row", "tuning": {"wide": False}},
        {"master_weights": "split", "momentum_dtype": torch.bfloat16},
        {"master_weights": "stochastic", "granularity": "row"},
    ],
    ids=str,
)
def test_a_run_has_the_same_bits_under_any_defaults(
    options: dict[str, Any], path: StepPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = dict(options)
    tuning = dataclasses.replace(LANES, **more.pop("tuning", {}))
    monkeypatch.setattr(fused_step, "tuning_for", lambda device: tuning)
    want = run(path, None, torch.float32, **more)
    assert all(param.isfinite().all() for param in want[:4])
    for device, dtype in (("meta", torch.float64), (None, torch.float16)):
        assert_bits(run(path, device, dtype, **more), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_grad_scaler_moves_parameters_under_any_default_dtype(
    dtype: torch.dtype, path: StepPath
) -> None:
    """A scale of 65536 is infinite in float16, and eps would be with it."""
    runs = []
    for default in (torch.float32, dtype):
        params = make_params(path.device)
        before = [param.detach().clone() for param in params]
        with defaults(None, default):
            optimizer = BNGD(params, 0.01, fused=path.fused)
            scaler = torch.amp.GradScaler(path.device.type, init_scale=65536.0)
            for step in range(3):
                optimizer.zero_grad()
                loss = sum(param.mul(step - 0.5).sin().sum() for param in params)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert all((param != old).any() for param, old in zip(params, before))
        runs.append([*params, *state_of(optimizer, params)])
    assert_bits(*runs)


def test_statistics_and_functions_of_tensors_under_any_defaults(device: torch.device) -> None:
    tensors = [torch.randn(300, device=device), torch.randn(4, 70, device=device)]
    want = segment_statistics(tensors, granularity="row")
    inputs = bngd_triton.standardize(tensors[1])
    normalized = bngd_triton.reference.normalize_gradient(tensors[1])
    for name, dtype in (("meta", torch.float32), (None, torch.float16)):
        with defaults(name, dtype):
            assert_bits(segment_statistics(tensors, granularity="row"), want)
            assert_bits([bngd_triton.standardize(tensors[1])], [inputs])
            assert_bits([bngd_triton.reference.normalize_gradient(tensors[1])], [normalized])


def test_the_halves_of_a_sharded_step_under_any_defaults(device: torch.device) -> None:
    options = [Options(0.01, granularity="tensor")]
    grads = [torch.randn(300, device=device), torch.randn(4, 70, device=device)]
    runs = []
    for name, dtype in ((None, torch.float32), ("meta", torch.float32), (None, torch.float16)):
        members = [member(g.sin(), g, torch.zeros_like(g), granularity="tensor") for g in grads]
        with defaults(name, dtype):
            step = FusedStep(members, options, LANES, sharded=True)
            inputs = nothing_new(device)
            step.update_by(step.measure(members, options, inputs), inputs)
        runs.append([tensor for m in members for tensor in (m.param, m.momentum, m.record)])
    assert_bits(runs[1], runs[0])
    assert_bits(runs[2], runs[0])


def sharded_runs() -> None:
    """Rows of float32 and a global group with float64, by both paths, on this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def sharded(seed: int, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(seed)
        return distribute_tensor(torch.randn(7, 6).to(dtype), mesh, [Shard(seed % 2)])

    for fused, granularity in ((False, "global"), (True, "row"), (True, "tensor")):
        dtypes = (torch.float32, torch.float32 if fused else torch.float64)
        runs = []
        for name, default in (
            (None, torch.float32),
            ("meta", torch.float32),
            (None, torch.float16),
        ):
            params = [torch.nn.Parameter(sharded(i, dtype)) for i, dtype in enumerate(dtypes)]
            grads = [[sharded(10 * step + i, d) for i, d in enumerate(dtypes)] for step in range(3)]
            with defaults(name, default):
                optimizer = BNGD(params, 0.01, granularity=granularity, fused=fused)
                for values in grads:
                    for param, value in zip(params, values):
                        param.grad = value
                    optimizer.step()
            runs.append([local(param).detach() for param in params])
        assert_bits(runs[1], runs[0])
        assert_bits(runs[2], runs[0])


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
@pytest.mark.slow
def test_sharded_steps_under_any_defaults() -> None:
    processes.run(2, sharded_runs)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a file of functions that make tensors, each with its place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = ast.unparse(node.func.value) == "torch"
            if of_torch and node.func.attr in FACTORIES:
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}", node


def test_every_tensor_that_is_made_names_its_device_and_dtype() -> None:
    found = 0
    for path in sorted({*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")}):
        if path.parent.name == "demo":
            continue
        for place, call in calls(path):
            found += 1
            shared = {ast.unparse(k.value) for k in call.keywords if k.arg is None}
            named = {keyword.arg for keyword in call.keywords}
            assert shared & NAMED or {"device", "dtype"} <= named, place
    assert found > 30


def test_addresses_of_the_upper_half_fit_the_tables(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intel's XPU gives addresses from 2**63 on, which an int64 holds as negative numbers."""
    tensors = [torch.randn(shape, device=device) for shape in ((300,), (5, 16), (3, 300))]
    entries = []
    for tensor in tensors:
        rows = 1 if tensor.dim() == 1 else len(tensor)
        master, window = tensor.clone(), torch.zeros(rows, dtype=torch.uint8, device=device)
        entries.append(
            Entry(tensor, tensor, tensor.clone(), new_record(rows, device), 0, rows, True, None,
                  master, window)
        )  # fmt: skip
    usual = build(entries, LANES)
    usual.point_at([tensor.data_ptr() for tensor in tensors])
    ask = Tensor.data_ptr
    monkeypatch.setattr(Tensor, "data_ptr", lambda tensor: ask(tensor) + 2**63)
    upper = build(entries, LANES)
    upper.point_at([tensor.data_ptr() for tensor in tensors])
    # adding 2**63 to an int64 that wraps is turning its highest bit
    turned = -(2**63)
    assert torch.equal(upper.slices[:, 4:], usual.slices[:, 4:] ^ turned)
    for one, other in zip(upper.batches, usual.batches):
        assert torch.equal(one.rows[:, 2:], other.rows[:, 2:] ^ turned)
        for name in ("param_ptrs", "momentum_ptrs", "master_ptrs", "grad_ptrs"):
            assert torch.equal(getattr(one, name), getattr(other, name) ^ turned), name

"""Whatever torch's default device and dtype are, steps have the same bits."""

import ast
import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bngd_triton
from bngd_triton import BNGD
from bngd_triton.kernels import fused_step, segment_statistics
from bngd_triton.kernels.build_plan import build
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.kernels.plan import Entry
from bngd_triton.options import Options
from bngd_triton.records import new_record
from bngd_triton.verify.oracle import oracle_step
from support.checkpoints import through_a_file
from support.exact_runs import assert_bits, give, make_params, state_of
from support.handmade_plans import member, nothing_new
from support.kernel_cases import LANES
from support.steps import assert_close

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
def defaults(device, dtype):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(usual)


def run(path, device, dtype, **options):
    """Parameters, state and statistics after a whole run, checkpoint included."""
    scale = 65536.0
    torch.manual_seed(0)
    narrow = torch.bfloat16 if "master_weights" in options else torch.float32
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
def test_a_run_has_the_same_bits_under_any_defaults(options, path, monkeypatch):
    more = dict(options)
    tuning = dataclasses.replace(LANES, **more.pop("tuning", {}))
    monkeypatch.setattr(fused_step, "tuning_for", lambda device: tuning)
    want = run(path, None, torch.float32, **more)
    assert all(param.isfinite().all() for param in want[:4])
    for device, dtype in (("meta", torch.float64), (None, torch.float16)):
        assert_bits(run(path, device, dtype, **more), want)


def test_functions_of_tensors_under_any_defaults(device):
    tensors = [torch.randn(300, device=device), torch.randn(4, 70, device=device)]

    def found():
        normalized = bngd_triton.reference.normalize_gradient(tensors[1])
        statistics = segment_statistics(tensors, granularity="row")
        return [*statistics, bngd_triton.standardize(tensors[1]), normalized]

    want = found()
    for name, dtype in (("meta", torch.float32), (None, torch.float16)):
        with defaults(name, dtype):
            assert_bits(found(), want)


def test_the_halves_of_a_sharded_step_under_any_defaults(device):
    options = [Options(0.1, granularity="tensor")]
    grads = [torch.randn(300, device=device), torch.randn(4, 70, device=device)]
    want, _ = oracle_step([g.sin() for g in grads], grads, [None] * 2, lr=0.1, granularity="tensor")
    runs = []
    for name, dtype in ((None, torch.float32), ("meta", torch.float32), (None, torch.float16)):
        members = [member(g.sin(), g, torch.zeros_like(g), granularity="tensor") for g in grads]
        with defaults(name, dtype):
            step, inputs = FusedStep(members, options, LANES, sharded=True), nothing_new(device)
            step.update_by(step.measure(members, options, inputs), inputs)
        assert_close([member.param for member in members], want)
        runs.append([tensor for m in members for tensor in (m.param, m.momentum, m.record)])
        assert_bits(runs[-1], runs[0])


def test_every_tensor_that_is_made_names_its_device_and_dtype():
    found = 0
    for path in sorted({*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")}):
        for call in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            module, _, factory = name.rpartition(".")
            if path.parent.name == "demo" or module != "torch" or factory not in FACTORIES:
                continue
            found += 1
            shared = {ast.unparse(k.value) for k in call.keywords if k.arg is None}
            named = {keyword.arg for keyword in call.keywords}
            place = f"{path.name}:{call.lineno}: {ast.unparse(call)}"
            assert shared & NAMED or {"device", "dtype"} <= named, place
    assert found > 30


def test_addresses_of_the_upper_half_fit_the_tables(device, monkeypatch):
    """Intel's XPU gives addresses from 2**63 on, which an int64 holds as negative numbers."""
    tensors = [torch.randn(shape, device=device) for shape in ((300,), (5, 16), (3, 300))]
    entries = []
    for tensor in tensors:
        rows = 1 if tensor.dim() == 1 else len(tensor)
        momentum, master, record = tensor.clone(), tensor.clone(), new_record(rows, device)
        window = torch.zeros(rows, dtype=torch.uint8, device=device)
        entries.append(Entry(tensor, tensor, momentum, record, 0, rows, True, None, master, window))
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

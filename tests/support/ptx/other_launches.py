"""Launches other than one step of one list of tensors; each gives a list of complaints.

Runs in a process of its own, see `worker`.
"""

from __future__ import annotations

import torch

from bngd_triton import BNGD, reference
from bngd_triton.kernels import fused_normalize_gradient
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.kernels.rates import RATE_DTYPES, Rates
from bngd_triton.kernels.standardize import standardize_columns
from bngd_triton.kernels.tables import encode
from bngd_triton.options import Options
from bngd_triton.records import functional_inputs, functional_tensors
from bngd_triton.verify.tolerances import ghat_bound
from support.ptx.driver import Machine
from support.ptx.steps import BF16, F16, F32, LONG, LR, SHAPES, differing, exact_gradient, prepare


def sharded(machine: Machine, granularity: str, schedule: str) -> list[str]:
    """Statistics left in a table, then factors and updates by it: as where ranks share slices."""
    tuning = prepare(machine, schedule, "two-launch")
    torch.manual_seed(0)
    params, momenta = ([torch.randn(shape) for shape in LONG] for _ in range(2))
    theirs = [t.clone() for t in params], [t.clone() for t in momenta]
    options = Options(LR, granularity=granularity, weight_decay=0.1)
    grads = [exact_gradient(shape, i, F32) for i, shape in enumerate(LONG)]
    members = functional_tensors(params, grads, momenta, None, None, options)
    inputs = functional_inputs(params, True, None, None, None)
    laid_out = FusedStep(members, [options], tuning, sharded=True)
    # the second step is past Triton's dispatch
    for _ in range(2):
        tables = laid_out.measure(members, [options], inputs)
        laid_out.update_by(tables, inputs)
        reference.step_(
            theirs[0], grads, theirs[1], lr=LR, granularity=granularity, weight_decay=0.1
        )
    return differing("param", params, theirs[0]) + differing("momentum", momenta, theirs[1])


def optimizer(machine: Machine, form: str, schedule: str) -> list[str]:
    """`BNGD` with groups of every granularity: a step laid out and two that repeat it."""
    usual, machine.tuning = machine.tuning, prepare(machine, schedule, form)
    runs = []
    try:
        for fused in (True, False):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(shape)) for shape in (*SHAPES, *LONG)]
            groups = [
                {"params": params[:5], "granularity": "row"},
                {"params": params[5:10], "granularity": "global", "weight_decay": 0.1},
                {"params": params[10:], "granularity": "tensor", "nesterov": True},
            ]
            made = BNGD(groups, LR, fused=fused)
            for k in range(3):
                for i, param in enumerate(params):
                    param.grad = exact_gradient(param.shape, 100 * k + i, F32)
                made.step()
            momenta = [made.state[param]["momentum_buffer"] for param in params]
            runs.append(([param.detach() for param in params], momenta))
    finally:
        machine.tuning = usual
    (params, momenta), (want_params, want_momenta) = runs
    found = differing("param", params, want_params) + differing("momentum", momenta, want_momenta)
    names = {launched.name for launched in machine.launched}
    if ("_single_kernel" in names) != (form == "single-launch"):
        found.append(f"launched {names}")
    return found


def rates(machine: Machine) -> list[str]:
    """Learning rates of every dtype, on their device, as the host would have written them."""
    prepare(machine, "in order", "two-launch")
    given = [torch.tensor(0.1, dtype=dtype) for dtype in RATE_DTYPES]
    want = [encode(Options(float(lr), weight_decay=0.3)) for lr in given]
    table = torch.tensor([encode(Options(0.7, weight_decay=0.3))] * 5, dtype=torch.float64)
    want.append(table[4].tolist())
    made = Rates(table)
    made.point_at([*given, None])
    made.write()
    return differing("rates", [table], [torch.tensor(want, dtype=torch.float64)])


def normalized(machine: Machine, normalizer: str, granularity: str) -> list[str]:
    """`fused_normalize_gradient` against the reference's."""
    prepare(machine, "random", "two-launch")
    torch.manual_seed(0)
    found = []
    for dtype in (F32, BF16):
        grad = (torch.randn(6, 2500) * 1e-3 + 5e-4).to(dtype)
        how = {"normalizer": normalizer, "granularity": granularity}
        got = fused_normalize_gradient(grad, **how)
        want = reference.normalize_gradient(grad, **how)
        bound = ghat_bound(want.float(), normalizer=normalizer)
        if dtype is BF16:
            bound = bound + 2.0**-8 * want.float().abs()
        if ((got.float() - want.float()).abs() > bound).any():
            found.append(f"{dtype}: beyond its tolerance")
    return found


def standardized(machine: Machine, schedule: str) -> list[str]:
    """`standardize_columns` against float64."""
    prepare(machine, schedule, "two-launch")
    torch.manual_seed(0)
    found = []
    for dtype in (F32, BF16, F16):
        for rows, columns in ((600, 70), (513, 33), (64, 1), (1, 40)):
            spread = torch.logspace(-2, 2, columns)
            x = (torch.randn(rows, columns) * spread + 100 * torch.rand(columns)).to(dtype)
            x[:, columns // 2] = 3.0
            got = standardize_columns(x).double()
            wide = x.double()
            mean, std = wide.mean(0), wide.std(0, unbiased=False)
            constant = std <= mean.abs() * 8 * 2.0**-53
            want = torch.where(constant, 0.0, (wide - mean) / std)
            # a rounding at the store, and as many of float32 as ghat has
            bound = torch.finfo(dtype).eps / 2 * want.abs() + ghat_bound(want)
            if ((got - want).abs() > bound).any() or got[:, constant].any():
                found.append(f"{dtype} {rows} x {columns}: beyond its tolerance")
    return found

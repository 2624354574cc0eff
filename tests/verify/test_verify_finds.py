"""Kernels and a reference that are broken on purpose: `bngd verify` names each."""

import pytest
import torch
import triton
import triton.language as tl

from bngd_triton.eager import eager_step
from bngd_triton.eager import update as eager_
from bngd_triton.eager.moments import moments
from bngd_triton.kernels import fused_step
from bngd_triton.kernels.device import factors as device_factors
from bngd_triton.kernels.device import rounding, tiles, update
from bngd_triton.kernels.device.factors import factors_from
from bngd_triton.kernels.tables import CENTERING, DECAY, FRESH, NESTEROV, PROPAGATE
from bngd_triton.verify import arms, judge
from bngd_triton.verify.cases import Case
from support.verify_command import run

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter lets kernels be changed while Python runs"
)


@triton.jit
def _eps_in_the_root(mean, m2, n, uniform, centering, eps, sign):
    return factors_from(mean, m2 + n * eps, n, uniform, centering, 0.0, sign)


@triton.jit
def _sample_deviation(mean, m2, n, uniform, centering, eps, sign):
    return factors_from(mean, m2 * n / tl.maximum(n - 1.0, 1.0), n, uniform, centering, eps, sign)


@triton.jit
def _worse_when_large(mean, m2, n, uniform, centering, eps, sign):
    up, more, high, low, inverse = factors_from(mean, m2, n, uniform, centering, eps, sign)
    # one or two units in the last place
    return up, more, high, low, inverse * tl.where(mean > 1e20, 1.0000001, 1.0)


@triton.jit
def _other_order(
    param, momentum, master, p, m, rest, ghat, hashed, m_param, m_momentum, options, beta, fresh,
    KIND: tl.constexpr, HINTS: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Within the bounds."""
    lr, decay, _ = options
    m = m * beta + ghat * fresh
    tl.store(param, p - (p * (1.0 - decay) + m * lr), mask=m_param)
    tl.store(momentum, m, mask=m_momentum)


@triton.jit
def _careless(x, like: tl.constexpr, SOFT: tl.constexpr):
    """Truncates to bfloat16, and falls short in float16."""
    if like == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif like == tl.float16:
        return (x * 0.998).to(like)
    else:
        return x.to(like)


def encoding(column, value):
    """`encode` with one column of the option table wrong."""
    right = fused_step.encode

    def encode(options, closing=True):
        row = right(options, closing)
        row[column] = value
        return row

    return encode


def without_tail(*args, **kwargs):
    """A plan that does not move the last entry of a tensor of 257."""
    plan = build(*args, **kwargs)
    for batch in plan.batches:
        batch.chunks[:, 2] -= (batch.chunks[:, 2] == 257).long()
    return plan


build = fused_step.build


def sample_moments(*args, **kwargs):
    found = moments(*args, **kwargs)
    return found._replace(m2=found.m2 * found.n / max(found.n - 1, 1))


def no_remainder(param, master, new, hashed):
    store(param, master, new, hashed)
    if master is not None:
        master.zero_()


store = eager_.store_
FACTORS, ENCODE = [(device_factors, "factors_from")], [(fused_step, "encode")]
# what is replaced, by what, in which case it shows, in what words
MUTANTS = {
    "eps in the root": (FACTORS, _eps_in_the_root, "eps0.1", "kernels: step"),
    "ddof 1": (FACTORS, _sample_deviation, "row", "kernels: step"),
    "worse when large": (FACTORS, _worse_when_large, "eps0,exploding", "power of"),
    "nesterov left out": (ENCODE, encoding(NESTEROV, 0.0), "nesterov", "kernels: step"),
    "momentum of whole steps": (ENCODE, encoding(FRESH, 1.0), "bf16,m16", "kernels: step"),
    "another order": (
        [(tiles, "update_"), (update, "update_")], _other_order, "exact,decay",
        "reference: other bits than the kernels'",
    ),
    "bfloat16 truncated": ([(rounding, "store_as")], _careless, "bf16,nearest", "kernels: step"),
    "float16 beside another master": ([(rounding, "store_as")], _careless, "f16", "kernels: step"),
    "missed tail": ([(fused_step, "build")], without_tail, "defaults", "(257,), entry 256"),
    "decay left out": (ENCODE, encoding(DECAY, 1.0), "decay", "kernels: step"),
    "NaN not skipped": (
        ENCODE, encoding(PROPAGATE, 1.0), "nan", "the kernels skipped 0 slices, the reference"
    ),
    "mean not removed": (ENCODE, encoding(CENTERING, 0.0), "global", "kernels: step"),
    "reference, ddof 1": ([(eager_step, "moments")], sample_moments, "row", "reference: step"),
    "reference, no remainder": ([(eager_, "store_")], no_remainder, "bf16", "reference: step"),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize(("places", "wrong", "case", "words"), MUTANTS.values(), ids=MUTANTS)
def test_what_is_broken_is_named(places, wrong, case, words, monkeypatch, capsys):
    for module, name in places:
        monkeypatch.setattr(module, name, wrong)
    # a form of its own would show the same
    monkeypatch.setattr(judge, "more_arms", lambda *_: {})
    name = Case.named(case).name
    assert run("--case", name, "--seed", "1") == 1
    printed = capsys.readouterr().out
    assert "1 failed" in printed
    assert f"bngd verify --device cpu --seed 1 --case {name}\n" in printed
    assert words in printed


@pytest.mark.parametrize(
    ("bits", "slices", "words"),
    [(1, 0, "param of shape (2, 3, 4, 5) after step 1"), (0, 1, "0 and 3 slices")],
)
def test_a_form_that_differs(bits, slices, words, monkeypatch, capsys, device):
    """In one bit of one entry, or in its count of skipped slices."""
    right = arms.fused_step_

    def wrong(params, *args, **kwargs):
        found = right(params, *args, **kwargs)
        params[-1].view(torch.int32)[(0,) * params[-1].dim()] += bits
        return found + slices

    monkeypatch.setattr(arms, "fused_step_", wrong)
    assert run("--case", "defaults", device=device) == 1
    line = f"single-launch: other bits than the kernels': {words}"
    assert line in capsys.readouterr().out

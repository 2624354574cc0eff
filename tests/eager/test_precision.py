"""Rounding to bfloat16 and float16: remainders, masters, and stochastic rounding."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from bngd_triton import reference
from bngd_triton.eager.rounding import hash_positions, new_master, store_, widen
from bngd_triton.kernels import fused_step_
from bngd_triton.kernels.device import rounding as kernels
from support.exact_runs import assert_bits, bits, make_params
from support.kernel_cases import HOW, LANES, TILES, blocks

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32

# lower halves around ties, both parities of the upper half being in `every_kind`
LOWER = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
# hashes that never and always round up, and some between
HASHES = torch.tensor([0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x12345678])

# the kinds of storage of kernels/device/rounding.py: parameter, master
KINDS = {
    "remainder": (BFLOAT16, torch.int16, kernels.REMAINDER),
    "float16 master": (FLOAT16, FLOAT32, kernels.MASTER_COPY),
    "bfloat16 master": (BFLOAT16, FLOAT32, kernels.MASTER_COPY),
    "stochastic bfloat16": (BFLOAT16, None, kernels.STOCHASTIC),
    "stochastic float16": (FLOAT16, None, kernels.STOCHASTIC),
}


def every_kind():
    """Float32 of every sign, exponent and upper mantissa: subnormals, infinities, NaNs, ..."""
    upper = torch.arange(2**16).view(-1, 1) << 16
    return (upper | LOWER).flatten().to(torch.int32).view(FLOAT32)


@triton.jit
def _narrow_kernel(
    x_ptr, hashed_ptr, param_ptr, master_ptr, KIND: tl.constexpr, SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    hashed = tl.load(hashed_ptr + at).to(tl.uint32)
    p, rest = kernels.narrow(tl.load(x_ptr + at), param_ptr.dtype.element_ty, hashed, KIND, SOFT)
    tl.store(param_ptr + at, p)
    tl.store(master_ptr + at, rest)


@triton.jit
def _widen_kernel(
    param_ptr, master_ptr, out_ptr, KIND: tl.constexpr, SOFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = kernels.widen(tl.load(param_ptr + at), tl.load(master_ptr + at), KIND, SOFT)
    tl.store(out_ptr + at, wide)


def same_values(got, want):
    """Equal bits, but for the payload of a NaN."""
    numbers = ~want.isnan()
    return torch.equal(got.isnan(), ~numbers) and torch.equal(
        bits(got)[numbers], bits(want)[numbers]
    )


def test_a_split_master_is_exact():
    x = every_kind()
    param, rest = torch.empty(x.shape, dtype=BFLOAT16), torch.empty(x.shape, dtype=torch.int16)
    store_(param, rest, x, None)
    assert same_values(widen(param, rest), x)
    numbers = ~x.isnan()
    assert torch.equal(((bits(param).int() << 16) + rest)[numbers], bits(x)[numbers])
    # the parameter is the master rounded to nearest; a tie, away from zero
    ties = (bits(x) & 0xFFFF) == 0x8000
    assert torch.equal(param[numbers & ~ties], x.to(BFLOAT16)[numbers & ~ties])
    away = ((bits(x) >> 16) + 1).to(torch.int16).view(BFLOAT16)
    assert torch.equal(param[numbers & ties], away[numbers & ties])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_narrow_as_the_reference_does(kind, device):
    dtype, master_dtype, code = KINDS[kind]
    x = every_kind().to(device)
    hashed = HASHES.repeat(x.numel() // len(HASHES) + 1)[: x.numel()].to(device)
    want = torch.empty(x.shape, dtype=dtype, device=device)
    rest = None if master_dtype is None else torch.empty_like(x, dtype=master_dtype)
    store_(want, rest, x, hashed if master_dtype is None else None)
    got, got_rest = torch.empty_like(want), torch.empty_like(x, dtype=master_dtype or FLOAT32)
    _narrow_kernel[blocks(x)](x, hashed, got, got_rest, KIND=code, **HOW)
    assert same_values(got, want)
    if rest is None:
        return
    assert torch.equal(bits(got_rest), bits(rest))
    wide = torch.empty_like(x)
    _widen_kernel[blocks(x)](got, got_rest, wide, KIND=code, **HOW)
    assert same_values(wide, x)


@pytest.mark.parametrize("kind", ["remainder", "float16 master", "bfloat16 master"])
def test_a_parameter_written_by_others_is_believed(kind, device):
    """Any parameter beside any master: its own value, or for a remainder half an ulp from it."""
    dtype, master_dtype, code = KINDS[kind]
    param = torch.arange(2**16).to(torch.int16).view(dtype).repeat_interleave(8).to(device)
    if master_dtype == torch.int16:
        rest = torch.tensor([-0x8000, -0x7FFF, -5, -1, 0, 1, 5, 0x7FFF], dtype=master_dtype)
    else:
        rest = torch.tensor([0.0, 1.0, -1.0, 1e-9, 1e9, torch.inf, torch.nan, 1 + 2.0**-12])
    rest = rest.repeat(2**16).to(device)
    got = widen(param, rest)
    assert torch.equal(got.isnan(), param.isnan())
    if master_dtype == torch.int16:
        finite = param.isfinite()
        ulp = torch.frexp(param[finite].float()).exponent.clamp(min=-125).double() - 8
        error = (got[finite].double() - param[finite].double()).abs()
        assert (error <= 0.5 * 2.0**ulp).all()
    else:
        assert torch.equal(got.to(dtype).nan_to_num(7.0), param.nan_to_num(7.0))
    wide = torch.empty_like(got)
    _widen_kernel[blocks(param)](param, rest, wide, KIND=code, **HOW)
    compared = torch.ones_like(param, dtype=torch.bool)
    if kind == "bfloat16 master":
        # the interpreter reads subnormal bfloat16 wrongly
        compared = (param == 0) | ~(param.float().abs() < 2.0**-126)
    assert same_values(wide[compared], got[compared])


def test_a_new_master_holds_the_parameter():
    for dtype, master_dtype in ((BFLOAT16, torch.int16), (FLOAT16, FLOAT32)):
        param = torch.randn(64).to(dtype)
        master = new_master(param, torch.zeros(64, dtype=master_dtype))
        assert torch.equal(widen(param, master), param.float())


# 2**-26 is far below float16's least subnormal, 2**-24
VALUES = {
    BFLOAT16: [1.001, -1.0039, 3e38, 2.0**-127 * 1.3, -(2.0**-133) * 0.25, 65519.0, -7.77],
    FLOAT16: [1.0001, -1.00048, 65500.0, 2.0**-24 * 0.25, -(2.0**-16) * 1.01, -7.77, 2.0**-26],
}


def neighbours(value, dtype):
    """The nearest representable values around a float32, towards zero first."""
    size = value.abs()
    at = bits(size.to(dtype))
    low = at - (at.view(dtype).double() > size.double()).short()
    high = low + (low.view(dtype).double() < size.double()).short()
    return low.view(dtype).copysign(value), high.view(dtype).copysign(value)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_stochastic_rounding_is_unbiased(dtype):
    hashed = hash_positions(torch.tensor(7), 3, torch.arange(4096))
    for value in VALUES[dtype]:
        exact, rounded = torch.tensor(value, dtype=FLOAT32), torch.empty(4096, dtype=dtype)
        store_(rounded, None, exact.expand(4096), hashed)
        low, high = neighbours(exact, dtype)
        assert ((rounded == low) | (rounded == high)).all()
        ulp = abs(float(high.double() - low.double()))
        error = abs(float(rounded.double().mean() - exact.double()))
        # 5 sigma of the mean of 4096 draws of at most ulp / 2 each
        assert error <= 5 * 0.5 * ulp / 64, value
        assert 0 < float((rounded == high).float().mean()) < 1


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_stochastic_rounding_gives_one_of_the_neighbours(dtype):
    """Representable values stay, NaN stays NaN, and nothing within range becomes infinite."""
    x = every_kind()
    low, high = neighbours(x, dtype)
    largest = torch.finfo(dtype).max
    for hashed in (0, 0x00010000, 0x80000000, 0xFFFFFFFF):
        got = torch.empty(x.shape, dtype=dtype)
        store_(got, None, x, torch.full(x.shape, hashed))
        assert torch.equal(got.isnan(), x.isnan())
        numbers = ~x.isnan()
        assert ((got == low) | (got == high))[numbers].all()
        assert torch.equal(got[numbers].signbit(), x[numbers].signbit())
        # the next after the largest would be 2**16 or 2**128
        within = x.abs() < (2.0**16 if dtype == FLOAT16 else torch.inf)
        assert got[within].isfinite().all()
        assert (got[within].abs() <= largest).all()
        if hashed == 0:
            assert torch.equal(got[within], low[within])


# bfloat16 2**-9 and float16 2**-12 below 1 lie halfway to the next value
HALFWAY = {BFLOAT16: 2.0**-9, FLOAT16: 2.0**-12}
# a tensor's place in the list, the step and the seed: tuples that differ in one of them
APART = {
    "tensors": ((0, 5, 1), (1, 5, 1)),
    "distant tensors": ((0, 5, 1), (2, 5, 1)),
    "steps": ((0, 5, 1), (0, 6, 1)),
    "distant steps": ((0, 0, 1), (0, 2**20, 1)),
    "seeds": ((0, 5, 1), (0, 5, 2)),
}


def coins(fused, place, step, seed, dtype, device):
    """What 4096 fair decisions of a step came to, each -1 or 1."""
    params = [torch.ones(4096, dtype=dtype, device=device) for _ in range(place + 1)]
    grads = [torch.zeros_like(param) for param in params]
    step_ = fused_step_ if fused else reference.step_
    step_(
        params, grads, None, lr=HALFWAY[dtype], weight_decay=1.0, momentum=0.0,
        rounding_key=(seed << 32) + step,
    )  # fmt: skip
    return torch.where(params[place] == 1, 1.0, -1.0).cpu()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("which", APART)
def test_rounding_of_two_is_independent(which, dtype, path):
    one, other = (coins(path.fused, *at, dtype, path.device) for at in APART[which])
    # sums of 4096 independent signs: 5 sigma is 5 / 64
    for sample in (one, other, one * other, one[1:] * one[:-1], one[64:] * one[:-64]):
        assert abs(float(sample.mean())) <= 5 / 64
    assert torch.equal(one, coins(path.fused, *APART[which][0], dtype, path.device))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_rounding_is_the_same_for_any_size_of_work(dtype, granularity, device):
    """Rows in tiles, in slices, channels_last and transposed, as in the eager reference."""
    shapes = [(3, 350), (2, 12, 3, 3), (6, 4), (900,), (), (5, 7)]

    def run(step_, **options):
        params = [param.detach() for param in make_params(device, dtype, shapes=shapes)]
        grads = [torch.zeros_like(param) for param in params]
        step_(
            params, grads, None, lr=0.1, weight_decay=0.01, momentum=0.0,
            granularity=granularity, rounding_key=(9 << 32) + 4, **options,
        )  # fmt: skip
        return params

    want = run(reference.step_)
    for tuning in (None, LANES, dataclasses.replace(TILES, form="single-launch")):
        assert_bits(run(fused_step_, tuning=tuning), want)

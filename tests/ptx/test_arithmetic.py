"""Every kind of instruction gives the bits that IEEE 754 and the PTX manual ask for."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import numpy as np
import pytest
import torch

from support.ptx import arithmetic
from support.ptx.arithmetic import PtxError, f16, f32, f64, s32, u16, u32, u64
from support.ptx.handmade import elementwise, program

N = 20_000
INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with np.errstate(all="ignore"):
        yield


def random_floats(n: int, seed: int) -> Any:
    """Float32 of any bits: all sizes, subnormals, infinities and NaN."""
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=u64).astype(u32).view(f32)


def assert_bits(got: Any, want: Any) -> None:
    """Equal, NaN for NaN."""
    bits = {2: u16, 4: u32, 8: u64}[got.itemsize]
    same = (got.view(bits) == want.view(bits)) | (np.isnan(got) & np.isnan(want))
    assert same.all(), f"{int((~same).sum())} of {same.size} differ"


@pytest.mark.parametrize("exponent", [None, 0, 3, 20, 24, 26, 29, 40])
def test_fma_rounds_once_as_the_c_library_does(exponent: int | None) -> None:
    """Operands of any bits, then sums that nearly cancel, by ever less; ties and subnormals."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = np.random.default_rng(exponent)
    a, b, c = (random_floats(N, k) for k in range(3))
    if exponent is not None:
        a, b = rng.standard_normal((2, N)).astype(f32)
        near = 1 + rng.integers(-3, 4, N) * 2.0**-exponent
        c = (-(a.astype(f64) * b) * near).astype(f32)
        if exponent > 24:
            a, b, c = a * f32(2.0**-70), b * f32(2.0**-70), c * f32(2.0**-140)
    want = np.frompyfunc(libm.fmaf, 3, 1)(a, b, c).astype(f32)
    assert_bits(arithmetic.fma32(a, b, c), want)


def test_fma_does_not_round_in_float64_first() -> None:
    """257 * 65281 is 2**24 + 1, a tie of float32 that only what float64 drops decides."""
    a, b = np.full(3, 257, f32), np.full(3, 65281, f32)
    c = np.array([2.0**-60, 0, -(2.0**-60)], f32)
    assert arithmetic.fma32(a, b, c).tolist() == [2.0**24 + 2, 2.0**24, 2.0**24]
    # and a scalar stays one
    assert arithmetic.fma32(a[0], b[0], c[0]) == 2.0**24 + 2


def test_narrowing_rounds_to_nearest_even_as_torch_does() -> None:
    x = np.concatenate([random_floats(N, 0), np.array([0.0, -0.0, 65504, 65520, 3.4e38], f32)])
    theirs = torch.from_numpy(x.copy())
    got = arithmetic.to_bf16(x)
    want = theirs.bfloat16().view(torch.int16).numpy().view(u16)
    assert ((got == want) | np.isnan(x)).all()
    assert (got[np.isnan(x)] == 0x7FFF).all()
    half = x.astype(np.float16)
    assert_bits(half, theirs.half().numpy())


EXTREMES = [
    ("max.f32", 1.0, NAN, 1.0), ("max.f32", NAN, -1.0, -1.0), ("min.f32", NAN, 2.0, 2.0),
    ("max.f32", -0.0, 0.0, 0.0), ("max.f32", 0.0, -0.0, 0.0), ("min.f32", 0.0, -0.0, -0.0),
    ("min.f32", -0.0, 0.0, -0.0), ("max.f32", -INF, 3.0, 3.0), ("max.f32", NAN, NAN, NAN),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "a", "b", "want"), EXTREMES)
def test_extremes_drop_nan_and_order_zeros(opcode: str, a: float, b: float, want: float) -> None:
    got = elementwise(
        f"{opcode} %OUT, %f0, %f1;", np.full(32, a, f32), np.full(32, b, f32), result="f32"
    )
    assert_bits(got.view(f32), np.full(32, want, f32))


A = random_floats(32, 1)
B = random_floats(32, 2)
X = (np.arange(32) * 0x9E3779B9 & 0xFFFFFFFF).astype(u32)
Y = X[::-1].copy()
WIDE = X.astype(u64) << u64(17) | Y.astype(u64)
FINITE = np.linspace(-3, 3, 32, dtype=f32)
BIG = np.array([2.0**k + 0.5 for k in range(32)], f64)
SMALL = np.array([1.0, 2.0**-127, -(2.0**-140), -0.0] * 8, f32)


def flushed(x: Any) -> Any:
    return np.where(np.abs(x) < f32(2.0**-126), np.copysign(f32(0), x), x)


# of a pair, all but one bit of sign or nothing: zeros of either sign are equal
HALVES = np.resize(np.array([0x80003C00, 0x3C00, 0x7E007E00, 0x3C003C00, 0x8000], u32), 32)


def same_halves(a: Any, b: Any) -> Any:
    equal = (a.copy().view(f16) == b.copy().view(f16)).reshape(-1, 2)
    return (equal * np.array([1, 2])).sum(1).astype(u32)


FLOATS = [
    ("add.rn.f32 %OUT, %f0, %f1;", (A, B), "f32", A + B),
    ("sub.rn.f32 %OUT, %f0, %f1;", (A, B), "f32", A - B),
    ("mul.rn.f32 %OUT, %f0, %f1;", (A, FINITE), "f32", A * FINITE),
    ("mul.rn.ftz.f32 %OUT, %f0, %f1;", (SMALL, SMALL[::-1].copy()), "f32",
     flushed(flushed(SMALL) * flushed(SMALL[::-1]))),
    ("div.rn.f32 %OUT, %f0, %f1;", (FINITE, B), "f32", FINITE / B),
    ("neg.f32 %OUT, %f0;", (A,), "f32", -A),
    ("abs.f32 %OUT, %f0;", (A,), "f32", np.abs(A)),
    ("copysign.f32 %OUT, %f0, %f1;", (A, B), "f32", np.copysign(B, A)),
    ("ex2.approx.ftz.f32 %OUT, %f0;", (FINITE,), "f32",
     np.exp2(FINITE.astype(f64)).astype(f32)),
    ("add.rn.f64 %OUT, %fd0, %fd1;", (BIG, -BIG[::-1]), "f64", BIG - BIG[::-1]),
    ("div.rn.f64 %OUT, %fd0, %fd1;", (BIG, BIG[::-1].copy()), "f64", BIG / BIG[::-1]),
    ("sqrt.rn.f64 %OUT, %fd0;", (BIG,), "f64", np.sqrt(BIG)),
    ("cvt.f64.f32 %OUT, %f0;", (A,), "f64", A.astype(f64)),
    ("cvt.rn.f32.f64 %OUT, %fd0;", (BIG,), "f32", BIG.astype(f32)),
    ("cvt.rn.f32.s32 %OUT, %r0;", (X,), "f32", X.view(s32).astype(f32)),
    ("cvt.rn.f64.u32 %OUT, %r0;", (X,), "f64", X.astype(f64)),
    ("cvt.rmi.f32.f32 %OUT, %f0;", (np.linspace(-2, 2, 32, dtype=f32),), "f32",
     np.floor(np.linspace(-2, 2, 32, dtype=f32))),
    ("cvt.rmi.ftz.f32.f32 %OUT, %f0;", (SMALL,), "f32", np.floor(flushed(SMALL))),
]  # fmt: skip


@pytest.mark.parametrize(("line", "inputs", "result", "want"), FLOATS, ids=lambda v: str(v)[:18])
def test_float_instructions(line: str, inputs: Any, result: str, want: Any) -> None:
    assert_bits(elementwise(line, *inputs, result=result).view(want.dtype), want)


INTEGERS = [
    ("add.s32 %OUT, %r0, %r1;", (X, Y), "b32", X + Y),
    ("sub.s32 %OUT, %r0, %r1;", (X, Y), "b32", X - Y),
    ("neg.s32 %OUT, %r0;", (X,), "b32", (-X.astype(np.int64)).astype(u32)),
    ("not.b32 %OUT, %r0;", (X,), "b32", ~X),
    ("and.b32 %OUT, %r0, 255;", (X,), "b32", X & u32(255)),
    ("xor.b32 %OUT, %r0, -1;", (X,), "b32", ~X),
    ("shl.b32 %OUT, %r0, 31;", (X,), "b32", X << u32(31)),
    # from the width on hardware shifts everything out
    ("shl.b32 %OUT, %r0, 32;", (X,), "b32", X * u32(0)),
    ("shr.u32 %OUT, %r0, 40;", (X,), "b32", X * u32(0)),
    ("shr.s32 %OUT, %r0, 40;", (X,), "b32", (X.view(s32) >> 31).view(u32)),
    ("shr.u64 %OUT, %rd0, 33;", (WIDE,), "b64", WIDE >> u64(33)),
    ("mul.lo.s32 %OUT, %r0, %r1;", (X, Y), "b32", X * Y),
    ("mad.lo.s32 %OUT, %r0, %r1, 5;", (X, Y), "b32", X * Y + u32(5)),
    ("mul.hi.u32 %OUT, %r0, %r1;", (X, Y), "b32",
     (X.astype(u64) * Y.astype(u64) >> u64(32)).astype(u32)),
    ("mul.wide.s32 %OUT, %r0, -3;", (X,), "b64", (X.view(s32).astype(np.int64) * -3).view(u64)),
    ("mul.wide.u32 %OUT, %r0, 3;", (X,), "b64", X.astype(u64) * u64(3)),
    ("mad.wide.u32 %OUT, %r0, 3, 7;", (X,), "b64", X.astype(u64) * u64(3) + u64(7)),
    ("min.s32 %OUT, %r0, %r1;", (X, Y), "b32", np.minimum(X.view(s32), Y.view(s32)).view(u32)),
    ("max.u32 %OUT, %r0, %r1;", (X, Y), "b32", np.maximum(X, Y)),
    ("bfe.u32 %OUT, %r0, 23, 8;", (X,), "b32", (X >> u32(23)) & u32(255)),
    ("popc.b32 %OUT, %r0;", (X,), "b32", np.array([x.bit_count() for x in X.tolist()], u32)),
    # bytes 0, 2 and 4 of the pair, and the sign of byte 3
    ("prmt.b32 %OUT, %r0, %r1, 0xB420U;", (X, Y), "b32",
     (X & 255) | (X >> 16 & 255) << 8 | (Y & 255) << 16 | (X >> 31) * u32(0xFF000000)),
    ("cvt.s64.s32 %OUT, %r0;", (X,), "b64", X.view(s32).astype(np.int64).view(u64)),
    ("cvt.u64.u32 %OUT, %r0;", (X,), "b64", X.astype(u64)),
    ("cvt.u32.u64 %OUT, %rd0;", (WIDE,), "b32", WIDE.astype(u32)),
    ("mov.b64 {%r1, %r2}, %rd0;\nadd.s32 %OUT, %r1, %r2;", (WIDE,), "b32",
     WIDE.astype(u32) + (WIDE >> u64(32)).astype(u32)),
    ("mov.b64 %OUT, {%r0, %r1};", (X, Y), "b64", X.astype(u64) | Y.astype(u64) << u64(32)),
    ("setp.lt.s32 %p1, %r0, %r1;\nselp.b32 %OUT, %r0, %r1, %p1;", (X, Y), "b32",
     np.minimum(X.view(s32), Y.view(s32)).view(u32)),
    # true where one is NaN
    ("setp.ltu.f32 %p1, %f0, %f1;\nsetp.lt.f32 %p2, %f0, %f1;\nxor.pred %p3, %p1, %p2;\n"
     "selp.b32 %OUT, 1, 0, %p3;", (np.array([1, NAN] * 16, f32), np.array([2, 2] * 16, f32)),
     "b32", np.array([0, 1] * 16, u32)),
    # the lower halves, and the upper ones
    ("setp.eq.f16x2 %p1|%p2, %r0, %r1;\nselp.b32 %r3, 1, 0, %p1;\nselp.b32 %r4, 2, 0, %p2;\n"
     "or.b32 %OUT, %r3, %r4;", (HALVES, HALVES[::-1].copy()), "b32",
     same_halves(HALVES, HALVES[::-1])),
    ("cvt.rn.f16x2.f32 %OUT, %f0, %f1;", (FINITE, SMALL), "b32",
     FINITE.astype(f16).view(u16).astype(u32) << u32(16) | SMALL.astype(f16).view(u16)),
    # a guard keeps what the others had
    ("mov.u32 %OUT, 7;\nsetp.gt.u32 %p1, %r0, %r1;\n@!%p1 add.s32 %OUT, %r0, 1;", (X, Y), "b32",
     np.where(Y < X, u32(7), X + u32(1))),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "inputs", "result", "want"), INTEGERS, ids=lambda v: str(v)[:22])
def test_integer_instructions(lines: str, inputs: Any, result: str, want: Any) -> None:
    assert (elementwise(lines, *inputs, result=result) == want).all()


UNKNOWN = [
    "sin.approx.f32 %f1, %f0;", "add.rz.f32 %f1, %f0, %f0;", "div.full.f32 %f1, %f0, %f0;",
    "fma.rm.f32 %f1, %f0, %f0, %f0;", "max.NaN.f32 %f1, %f0, %f0;", "fma.f32 %f1, %f0, %f0, %f0;",
    "add.sat.s32 %r1, %r0, %r0;", "mul.hi.s64 %rd1, %rd0, %rd0;",
    "shfl.sync.up.b32 %r1, %r0, 1, 0, -1;",
    "cvt.rz.f32.f64 %f1, %fd0;", "cvt.rni.s32.f32 %r1, %f0;", "fence.acq_rel.gpu;", "membar.gl;",
    "bar.arrive 0, 32;", "bar.sync 1;", "ld.volatile.global.b32 %r1, [%rd80];",
    "ld.global.relaxed.gpu.b32 %r1, [%rd80];", "st.global.release.gpu.b32 [%rd80], %r1;",
    "atom.global.add.u32 %r1, [%rd80], %r1;", "atom.global.cta.acq_rel.add.u32 %r1, [%rd80], %r1;",
    "atom.global.gpu.relaxed.cas.b32 %r1, [%rd80], %r1, %r2;",
    "atom.shared.gpu.add.u32 %r1, [0], %r1;",
    "ld.local.b32 %r1, [%rd80];", "@%p1 ret;", "mma.sync %r1, %r2;",
]  # fmt: skip


@pytest.mark.parametrize("line", UNKNOWN)
def test_what_is_not_known_is_refused(line: str) -> None:
    """Also in code that no thread reaches."""
    with pytest.raises(PtxError):
        program(f"bra $END;\n{line}\n$END:", 1).translate_all()

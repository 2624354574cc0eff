"""What each opcode does, as lines of Python; an opcode or modifier that is not here is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.parse import Instruction, split_operands

from support.ptx.arithmetic import (  # isort: skip
    DTYPES, NAMES, UNSIGNED, WIDTHS, PtxError, f16, f32, f64, s16, s32, s64, u16, u32, u64,
)  # fmt: skip

MakeSite = Callable[[str, int, bool], str]

# of floats; flushed where the opcode says so
FLOATS = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})",
    "fma": "fma{bits}({0}, {1}, {2})", "sqrt": "np.sqrt({0})", "neg": "np.negative({0})",
    "abs": "np.abs({0})", "min": "fmin({0}, {1})", "max": "fmax({0}, {1})",
}  # fmt: skip
# these round to nearest, where others may lack the word
ROUNDED = ("div", "sqrt", "fma")
# of the bits of integers and of predicates
BITS = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "and": "({0} & {1})", "or": "({0} | {1})",
    "xor": "({0} ^ {1})", "not": "~{0}", "neg": "np.negative({0})",
    # NumPy shifts everything out from the width on, as hardware does
    "shl": "({0} << {1})",
}  # fmt: skip
# of numbers, with their signs
NUMBERS = {
    "shr": "({0} >> {1})", "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})",
}  # fmt: skip
COMPARISONS = {
    "eq": "({0} == {1})", "ne": "({0} != {1})", "lt": "({0} < {1})", "le": "({0} <= {1})",
    "gt": "({0} > {1})", "ge": "({0} >= {1})",
}  # fmt: skip
# the last five and `neu` are true where an operand is NaN
FLOAT_COMPARISONS = {
    **COMPARISONS, "ne": "(({0} < {1}) | ({0} > {1}))", "neu": "({0} != {1})",
    "num": "~unordered({0}, {1})", "nan": "unordered({0}, {1})", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
}  # fmt: skip
# whole opcodes: the dtype of their operands, and of their result
CALLS: dict[str, tuple[Any, str, Any]] = {
    "ex2.approx.ftz.f32": (f32, "ex2({0})", f32),
    # the sign of the first, the size of the second
    "copysign.f32": (f32, "np.copysign({1}, {0})", f32),
    "popc.b32": (u32, "np.bitwise_count({0}).astype(u32)", u32),
    "bfe.u32": (u32, "(({0} >> {1}) & ((u32(1) << {2}) - u32(1)))", u32),
    "prmt.b32": (u32, "prmt({0}, {1}, int({2}))", u32),
    "cvt.f32.bf16": (u16, "from_bf16({0})", f32),
    "cvt.f64.bf16": (u16, "from_bf16({0}).astype(f64)", f64),
    "cvt.f32.f16": (u16, "{0}.view(f16).astype(f32)", f32),
    "cvt.f64.f16": (u16, "{0}.view(f16).astype(f64)", f64),
    "cvt.rn.bf16.f32": (f32, "to_bf16({0})", u16),
    "cvt.rn.f16.f32": (f32, "{0}.astype(f16).view(u16)", u16),
    "cvt.rn.f16x2.f32": (
        f32,
        "(({0}.astype(f16).view(u16).astype(u32) << u32(16)) | {1}.astype(f16).view(u16))",
        u32,
    ),
    "cvt.rn.bf16x2.f32": (f32, "((to_bf16({0}).astype(u32) << u32(16)) | to_bf16({1}))", u32),
    "cvt.f64.f32": (f32, "{0}.astype(f64)", f64),
    "cvt.rn.f32.f64": (f64, "{0}.astype(f32)", f32),
    "cvt.rmi.f32.f32": (f32, "np.floor({0})", f32),
    "cvt.rmi.ftz.f32.f32": (f32, "np.floor(ftz({0}))", f32),
    # NumPy rounds integers to nearest even
    **{
        f"cvt.rn.{to}.{source}": (DTYPES[source], f"{{0}}.astype({to})", DTYPES[to])
        for to in ("f32", "f64")
        for source in ("s32", "u32", "s64", "u64")
    },
}
# whether it acquires, and whether it releases
ORDERS = {
    "relaxed": (False, False),
    "acquire": (True, False),
    "release": (False, True),
    "acq_rel": (True, True),
}
WIDER: dict[Any, Any] = {s32: s64, u32: u64, s16: s32, u16: u32}


def unknown(ins: Instruction) -> PtxError:
    return PtxError(f"unknown: {ins.text}")


def dtype_of(ins: Instruction) -> Any:
    """The last dtype that an opcode names."""
    named = [part for part in ins.parts[1:] if part in DTYPES]
    if not named:
        raise unknown(ins)
    return DTYPES[named[-1]]


def lines_of(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    """An instruction of a `translate.Program`, under a mask, with the site if it needs one."""
    root, parts = ins.root, ins.parts
    if root in ("ret", "exit"):
        return []
    if root in ("bar", "barrier"):
        if parts[1:] != ["sync"] or ins.operands != ["0"]:
            raise unknown(ins)
        return []
    if not ins.operands:
        raise unknown(ins)
    if root in MEMORY:
        return MEMORY[root](t, ins, mask, site)
    target, *operands = ins.operands
    if root == "createpolicy":
        return t.assign(target, t.constant(u64(0)), u64)
    if root == "mov":
        return _move(t, ins)
    if ins.opcode in CALLS:
        dtype, text, result = CALLS[ins.opcode]
        return t.assign(target, text.format(*(t.value(o, dtype) for o in operands)), result)
    if root == "setp":
        return _compare(t, ins)
    if parts[-1] == "pred":
        dtype, texts = np.bool_, {k: BITS[k] for k in ("and", "or", "xor", "not")}
    else:
        dtype, texts = dtype_of(ins), {}
    if root == "selp":
        bits = UNSIGNED[WIDTHS[dtype]]
        a, b = (t.value(operand, bits) for operand in operands[:2])
        return t.assign(target, f"select({t.value(operands[2], np.bool_)}, {a}, {b})", bits)
    if root == "cvt":
        return _convert(t, ins)
    if dtype in (f32, f64):
        return _floats(t, ins, dtype)
    if root in ("mul", "mad"):
        return _products(t, ins, dtype)
    if dtype is not np.bool_:
        signless = root in BITS
        texts, dtype = BITS | NUMBERS, UNSIGNED[WIDTHS[dtype]] if signless else dtype
    if len(parts) != 2 or root not in texts:
        raise unknown(ins)
    values = [t.value(operand, dtype) for operand in operands]
    if root in ("shl", "shr"):
        values[1] = f"{t.value(operands[1], u32)}.astype({NAMES[dtype]})"
    return t.assign(target, texts[root].format(*values), dtype)


def _compare(t: Any, ins: Instruction) -> list[str]:
    _, compare, *flags, kind = ins.parts
    targets, *operands = ins.operands
    dtype = f16 if kind == "f16x2" else dtype_of(ins)
    texts = FLOAT_COMPARISONS if dtype in (f16, f32, f64) else COMPARISONS
    if flags or compare not in texts:
        raise unknown(ins)
    lines = []
    for k, target in enumerate(targets.split("|")):
        values = [t.value(operand, dtype) for operand in operands]
        if kind == "f16x2":
            values = [
                f"({t.value(o, u32)} >> u32({16 * k})).astype(u16).view(f16)" for o in operands
            ]
        lines += t.assign(target, texts[compare].format(*values), np.bool_)
    return lines


def _floats(t: Any, ins: Instruction, dtype: Any) -> list[str]:
    flags, (target, *operands) = set(ins.parts[1:-1]), ins.operands
    unrounded = ins.root in ROUNDED and "rn" not in flags
    if ins.root not in FLOATS or flags - {"rn", "ftz"} or unrounded:
        raise unknown(ins)
    flush = "ftz({0})" if "ftz" in flags else "{0}"
    values = [flush.format(t.value(operand, dtype)) for operand in operands]
    result = FLOATS[ins.root].format(*values, bits=8 * WIDTHS[dtype])
    return t.assign(target, flush.format(result), dtype)


def _products(t: Any, ins: Instruction, dtype: Any) -> list[str]:
    """`mul` and `mad` of integers: the low half, the high one, or both."""
    kind, (target, *operands) = ins.parts[1], ins.operands
    wide = UNSIGNED[WIDTHS[dtype]] if kind == "lo" else WIDER.get(dtype)
    if len(ins.parts) != 3 or kind not in ("lo", "hi", "wide") or wide is None:
        raise unknown(ins)
    own = wide if kind == "lo" else dtype
    a, b = (f"{t.value(operand, own)}.astype({NAMES[wide]})" for operand in operands[:2])
    text = f"({a} * {b})"
    if kind == "hi":
        if ins.root == "mad":
            raise unknown(ins)
        by = t.constant(wide(8 * WIDTHS[dtype]))
        return t.assign(target, f"({text} >> {by}).astype({NAMES[dtype]})", dtype)
    if ins.root == "mad":
        text = f"({text} + {t.value(operands[2], wide)})"
    return t.assign(target, text, wide)


def _convert(t: Any, ins: Instruction) -> list[str]:
    """Integers to integers; the others are in `CALLS`."""
    into, out = (DTYPES.get(part, f16) for part in (*ins.parts[1:], "", "")[:2])
    if len(ins.parts) != 3 or {into, out} & {f16, f32, f64}:
        raise unknown(ins)
    target, operand = ins.operands
    if WIDTHS[t.types[target]] > WIDTHS[into]:
        raise unknown(ins)
    value = t.value(operand, out)
    if WIDTHS[into] == WIDTHS[out]:
        return t.assign(target, value, out)
    return t.assign(target, f"{value}.astype({NAMES[into]})", into)


def _move(t: Any, ins: Instruction) -> list[str]:
    target, source = ins.operands
    if ins.parts[-1] == "pred":
        return t.assign(target, t.value(source, np.bool_), np.bool_)
    dtype = UNSIGNED[WIDTHS[dtype_of(ins)]]
    packed = source if source.startswith("{") else target if target.startswith("{") else ""
    if not packed:
        return t.assign(target, t.value(source, dtype), dtype)
    named = split_operands(packed.strip("{} "))
    bits = 8 * WIDTHS[dtype] // len(named)
    part = UNSIGNED[bits // 8]
    shifts = [t.constant(dtype(bits * k)) for k in range(len(named))]
    if packed is source:
        terms = [
            f"({t.value(o, part)}.astype({NAMES[dtype]}) << {by})" for o, by in zip(named, shifts)
        ]
        return t.assign(target, " | ".join(terms), dtype)
    lines = [f"packed = {t.value(source, dtype)}"]
    for register, by in zip(named, shifts):
        lines += t.assign(register, f"(packed >> {by}).astype({NAMES[part]})", part)
    return lines


def _check_modifiers(ins: Instruction, *known: str) -> None:
    """Raise for what is neither a dtype nor known."""
    for part in ins.parts[1:]:
        if part not in DTYPES and part not in known and not part.startswith(("L1:", "L2:")):
            raise unknown(ins)


def _load(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    dtype, (target, source, *_) = dtype_of(ins), ins.operands
    if ins.parts[1] == "param":
        number = t.kernel.params.index(source.strip("[] "))
        return t.assign(target, f"state.params[{number}].astype({NAMES[dtype]})", dtype)
    if "acquire" in ins.parts:
        return _atomic(t, ins, mask, site)
    _check_modifiers(ins, "global", "shared", "v2", "v4")
    named = split_operands(target.strip("{} "))
    where = site(ins.parts[1], WIDTHS[dtype] * len(named), False)
    call = f"load(state, {where}, {t.address(source)}, {NAMES[dtype]}, {len(named)}, {mask})"
    return [f"got = {call}", *t.assign_parts(target, dtype)]


def _store(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    _check_modifiers(ins, "global", "shared", "v2", "v4")
    dtype, (target, source, *_) = UNSIGNED[WIDTHS[dtype_of(ins)]], ins.operands
    named = split_operands(source.strip("{} "))
    where = site(ins.parts[1], WIDTHS[dtype] * len(named), True)
    values = "".join(f"{t.value(operand, dtype)}, " for operand in named)
    return [f"store(state, {where}, {t.address(target)}, {NAMES[dtype]}, ({values}), {mask})"]


def _matrix(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    form = re.fullmatch(r"\w+\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", ins.opcode)
    if form is None:
        raise unknown(ins)
    # each thread has one word of each matrix
    where, (target, source) = site("shared", 4, ins.root == "stmatrix"), ins.operands
    if ins.root == "ldmatrix":
        call = f"load_matrix(state, {where}, {t.address(source)}, {form[1]}, {mask})"
        return [f"got = {call}", *t.assign_parts(target, u32)]
    values = "".join(f"{t.value(o, u32)}, " for o in split_operands(source.strip("{} ")))
    return [f"store_matrix(state, {where}, {t.address(target)}, ({values}), {mask})"]


def _atomic(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    """`atom`, and loads that acquire."""
    _check_modifiers(ins, "global", "gpu", "sys", *ORDERS, "add", "exch")
    if not {"gpu", "sys"} & set(ins.parts):
        raise PtxError(f"no order beyond a program: {ins.text}")
    order = next((ORDERS[part] for part in ins.parts if part in ORDERS), ORDERS["relaxed"])
    dtype, (target, address, *values) = UNSIGNED[WIDTHS[dtype_of(ins)]], ins.operands
    where = site("global", WIDTHS[dtype], ins.root != "ld")
    operation, value = "load", t.constant(dtype(0))
    if ins.root != "ld":
        operation = next((part for part in ins.parts if part in ("add", "exch")), "")
        value = t.value(values[0], dtype)
    call = (
        f"atomic(state, {where}, {t.address(address)}, {NAMES[dtype]}, {operation!r}, {value}, "
        f"{mask}, {order})"
    )
    return t.assign(target.strip("{} "), call, dtype)


def _shuffle(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    target, source, lanes, *rest = ins.operands
    if ins.parts[1:3] != ["sync", "bfly"] or rest not in (["31", "-1"], ["31", "0xffffffff"]):
        raise unknown(ins)
    own = t.types[source]
    value = t.value(source, own)
    return t.assign(target, f"shuffle(state, {value}, {int(lanes, 0)}, {mask}, {ins.text!r})", own)


MEMORY = {
    "ld": _load, "st": _store, "ldmatrix": _matrix, "stmatrix": _matrix, "atom": _atomic,
    "shfl": _shuffle,
}  # fmt: skip

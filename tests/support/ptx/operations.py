"""What each opcode does, as lines of Python; an opcode or modifier that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.arithmetic import NAMES, UNSIGNED, WIDTHS, PtxError, f32, f64, u16, u32, u64
from support.ptx.computing import check_modifiers, convert, dtype_of, floats, integers
from support.ptx.parse import Instruction, split_operands

SYMBOLS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
# true where an operand is NaN
UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
MakeSite = Callable[[str, int, bool], str]


def lines_of(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    """An instruction of a `translate.Program`, under a mask, with the site if it needs one."""
    root, parts = ins.root, ins.parts
    if root in ("ret", "exit"):
        return []
    if root in ("bar", "barrier"):
        if parts[1:] != ["sync"] or ins.operands != ["0"]:
            raise PtxError(f"unknown: {ins.text}")
        return []
    if root in MEMORY:
        return MEMORY[root](t, ins, mask, site)
    if root == "shfl":
        if parts[1:3] != ["sync", "bfly"] or ins.operands[3:] not in (
            ["31", "-1"], ["31", "0xffffffff"]
        ):  # fmt: skip
            raise PtxError(f"unknown: {ins.text}")
        own = t.types[ins.operands[1]]
        value, lanes = t.value(ins.operands[1], own), int(ins.operands[2], 0)
        return t.assign(
            ins.operands[0], f"shuffle(state, {value}, {lanes}, {mask}, {ins.text!r})", own
        )
    if root == "mov":
        return _move(t, ins)
    if root == "createpolicy":
        return t.assign(ins.operands[0], t.constant(u64(0)), u64)
    if root == "setp":
        return _compare(t, ins)
    if root == "selp":
        return _select(t, ins)
    if parts[-1] == "pred":
        return _predicates(t, ins)
    if root == "cvt":
        return convert(t, ins)
    dtype = dtype_of(ins)
    if dtype in (f32, f64):
        return floats(t, ins, dtype)
    return integers(t, ins, dtype)


def _load(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    dtype, (target, source, *_) = dtype_of(ins), ins.operands
    if ins.parts[1] == "param":
        number = t.kernel.params.index(source.strip("[] "))
        return t.assign(target, f"state.params[{number}].astype({NAMES[dtype]})", dtype)
    if "acquire" in ins.parts:
        return _atomic(t, ins, mask, site)
    check_modifiers(ins, "global", "shared", "v2", "v4")
    named = split_operands(target.strip("{} "))
    kinds = {t.types[register] for register in named if register != "_"}
    kind = dtype
    if ins.parts[-1][0] == "b" and len(kinds) == 1 and WIDTHS[min(kinds, key=str)] == WIDTHS[dtype]:
        (kind,) = kinds
    space = ins.parts[1]
    where = site(space, WIDTHS[dtype] * len(named), False)
    call = f"load_{space}(state, {where}, {t.address(source)}, {NAMES[kind]}, {len(named)}, {mask})"
    return [f"got = {call}", *t.assign_parts(target, kind)]


def _store(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    check_modifiers(ins, "global", "shared", "v2", "v4")
    space, dtype = ins.parts[1], UNSIGNED[WIDTHS[dtype_of(ins)]]
    named = split_operands(ins.operands[1].strip("{} "))
    where = site(space, WIDTHS[dtype] * len(named), True)
    values = "".join(f"{t.value(operand, dtype)}, " for operand in named)
    address = t.address(ins.operands[0])
    return [f"store_{space}(state, {where}, {address}, {NAMES[dtype]}, ({values}), {mask})"]


def _matrix(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    shape, count = ins.parts[1:4], ins.parts[4]
    if shape != ["sync", "aligned", "m8n8"] or count not in ("x1", "x2", "x4"):
        raise PtxError(f"unknown: {ins.text}")
    if ins.parts[5:] != ["shared", "b16"]:
        raise PtxError(f"unknown: {ins.text}")
    # each thread has one word of each matrix
    where = site("shared", 4, ins.root == "stmatrix")
    if ins.root == "ldmatrix":
        target, source = ins.operands
        call = f"load_matrix(state, {where}, {t.address(source)}, {count[1:]}, {mask})"
        return [f"got = {call}", *t.assign_parts(target, u32)]
    target, source = ins.operands
    values = "".join(f"{t.value(o, u32)}, " for o in split_operands(source.strip("{} ")))
    return [f"store_matrix(state, {where}, {t.address(target)}, ({values}), {mask})"]


def _atomic(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    check_modifiers(ins, "global", "gpu", "sys", *ORDERS, "add", "exch")
    if not {"gpu", "sys"} & set(ins.parts):
        raise PtxError(f"no order beyond a program: {ins.text}")
    order = next((ORDERS[part] for part in ins.parts if part in ORDERS), ORDERS["relaxed"])
    dtype = UNSIGNED[WIDTHS[dtype_of(ins)]]
    where = site("global", WIDTHS[dtype], ins.root != "ld")
    operands = list(ins.operands)
    target = "_" if ins.root == "red" else operands.pop(0).strip("{} ")
    operation = "load"
    value = t.constant(dtype(0))
    if ins.root != "ld":
        operation = next((part for part in ins.parts if part in ("add", "exch")), "")
        value = t.value(operands[1], dtype)
    call = (
        f"atomic(state, {where}, {t.address(operands[0])}, {NAMES[dtype]}, {operation!r}, {value}, "
        f"{mask}, {order})"
    )
    return [call] if target == "_" else t.assign(target, call, dtype)


# whether it acquires, and whether it releases
ORDERS = {
    "relaxed": (False, False),
    "acquire": (True, False),
    "release": (False, True),
    "acq_rel": (True, True),
}
MEMORY = {
    "ld": _load, "st": _store, "ldmatrix": _matrix, "stmatrix": _matrix, "atom": _atomic,
    "red": _atomic,
}  # fmt: skip


def _move(t: Any, ins: Instruction) -> list[str]:
    target, source = ins.operands
    if ins.parts[-1] == "pred":
        return t.assign(target, t.value(source, np.bool_), np.bool_)
    dtype = dtype_of(ins)
    packed = source if source.startswith("{") else target if target.startswith("{") else ""
    if not packed:
        own = t.types[target]
        kind = own if WIDTHS[own] == WIDTHS[dtype] else dtype
        return t.assign(target, t.value(source, kind), kind)
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


def _compare(t: Any, ins: Instruction) -> list[str]:
    (compare, *flags), a = ins.parts[1:-1], ins.operands
    if flags not in ([], ["ftz"]):
        raise PtxError(f"unknown: {ins.text}")
    kind = ins.parts[-1]
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):

        def widened(text: str) -> str:
            return f"{text}.view(f16)" if kind[0] == "f" else f"from_bf16({text})"

        if not kind.endswith("x2"):
            x, y = (widened(t.value(operand, u16)) for operand in a[1:3])
            return t.assign(a[0], comparison(ins, compare, x, y, True), np.bool_)
        lines = []
        for k, target in enumerate(a[0].split("|")):
            by = t.constant(u32(16 * k))
            x, y = (widened(f"({t.value(o, u32)} >> {by}).astype(u16)") for o in a[1:3])
            lines += t.assign(target, comparison(ins, compare, x, y, True), np.bool_)
        return lines
    dtype = dtype_of(ins)
    x, y = (t.value(operand, dtype) for operand in a[1:3])
    if flags:
        x, y = f"ftz({x})", f"ftz({y})"
    return t.assign(a[0], comparison(ins, compare, x, y, dtype in (f32, f64)), np.bool_)


def comparison(ins: Instruction, compare: str, x: str, y: str, of_floats: bool) -> str:
    if compare in SYMBOLS:
        if of_floats and compare == "ne":
            return f"(({x} < {y}) | ({x} > {y}))"
        return f"({x} {SYMBOLS[compare]} {y})"
    if of_floats and compare in UNORDERED:
        return f"~({x} {UNORDERED[compare]} {y})"
    made = {
        "equ": f"(({x} == {y}) | unordered({x}, {y}))",
        "neu": f"({x} != {y})",
        "num": f"~unordered({x}, {y})",
        "nan": f"unordered({x}, {y})",
    }
    if not of_floats or compare not in made:
        raise PtxError(f"unknown: {ins.text}")
    return made[compare]


def _select(t: Any, ins: Instruction) -> list[str]:
    target, a, b, condition = ins.operands
    dtype, own = dtype_of(ins), t.types[target]
    kind = own if WIDTHS[own] == WIDTHS[dtype] else dtype
    chosen = f"select({t.value(condition, np.bool_)}, {t.value(a, kind)}, {t.value(b, kind)})"
    return t.assign(target, chosen, kind)


def _predicates(t: Any, ins: Instruction) -> list[str]:
    target, *values = ins.operands
    texts = [t.value(operand, np.bool_) for operand in values]
    if ins.root == "not":
        return t.assign(target, f"~{texts[0]}", np.bool_)
    symbol = {"and": "&", "or": "|", "xor": "^"}.get(ins.root)
    if symbol is None:
        raise PtxError(f"unknown: {ins.text}")
    return t.assign(target, f"({texts[0]} {symbol} {texts[1]})", np.bool_)

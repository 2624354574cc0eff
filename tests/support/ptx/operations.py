"""What each opcode does, as lines of Python; an opcode or modifier that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.arithmetic import (
    DTYPES,
    NAMES,
    UNSIGNED,
    WIDTHS,
    PtxError,
    f16,
    f32,
    f64,
    s16,
    s32,
    s64,
    u16,
    u32,
    u64,
)
from support.ptx.parse import Instruction, split_operands

FLOATS = (f16, f32, f64)
WIDER: dict[Any, Any] = {s32: s64, u32: u64, s16: s32, u16: u32}
SYMBOLS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
# true where an operand is NaN
UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
ROUNDINGS = {"rmi": "floor", "rni": "rint", "rzi": "trunc", "rpi": "ceil"}
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
        return _convert(t, ins)
    dtype = _dtype(ins)
    if dtype in (f32, f64):
        return _floats(t, ins, dtype)
    return _integers(t, ins, dtype)


def _dtype(ins: Instruction) -> Any:
    named = [part for part in ins.parts[1:] if part in DTYPES]
    if not named:
        raise PtxError(f"unknown: {ins.text}")
    return DTYPES[named[-1]]


def _modifiers(ins: Instruction, *known: str) -> None:
    """Raise for what is neither a dtype nor known."""
    for part in ins.parts[1:]:
        if part not in DTYPES and part not in known and not part.startswith(("L1:", "L2:")):
            raise PtxError(f"unknown {part}: {ins.text}")


def _load(t: Any, ins: Instruction, mask: str, site: MakeSite) -> list[str]:
    dtype, (target, source, *_) = _dtype(ins), ins.operands
    if ins.parts[1] == "param":
        number = t.kernel.params.index(source.strip("[] "))
        return t.assign(target, f"state.params[{number}].astype({NAMES[dtype]})", dtype)
    if "acquire" in ins.parts:
        return _atomic(t, ins, mask, site)
    _modifiers(ins, "global", "shared", "v2", "v4")
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
    _modifiers(ins, "global", "shared", "v2", "v4")
    space, dtype = ins.parts[1], UNSIGNED[WIDTHS[_dtype(ins)]]
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
    _modifiers(ins, "global", "gpu", "sys", *ORDERS, "add", "exch")
    if not {"gpu", "sys"} & set(ins.parts):
        raise PtxError(f"no order beyond a program: {ins.text}")
    order = next((ORDERS[part] for part in ins.parts if part in ORDERS), ORDERS["relaxed"])
    dtype = UNSIGNED[WIDTHS[_dtype(ins)]]
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
    dtype = _dtype(ins)
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
    dtype = _dtype(ins)
    x, y = (t.value(operand, dtype) for operand in a[1:3])
    if flags:
        x, y = f"ftz({x})", f"ftz({y})"
    return t.assign(a[0], comparison(ins, compare, x, y, dtype in (f32, f64)), np.bool_)


def comparison(ins: Instruction, compare: str, x: str, y: str, floats: bool) -> str:
    if compare in SYMBOLS:
        if floats and compare == "ne":
            return f"(({x} < {y}) | ({x} > {y}))"
        return f"({x} {SYMBOLS[compare]} {y})"
    if floats and compare in UNORDERED:
        return f"~({x} {UNORDERED[compare]} {y})"
    made = {
        "equ": f"(({x} == {y}) | unordered({x}, {y}))",
        "neu": f"({x} != {y})",
        "num": f"~unordered({x}, {y})",
        "nan": f"unordered({x}, {y})",
    }
    if not floats or compare not in made:
        raise PtxError(f"unknown: {ins.text}")
    return made[compare]


def _select(t: Any, ins: Instruction) -> list[str]:
    target, a, b, condition = ins.operands
    dtype, own = _dtype(ins), t.types[target]
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


def _floats(t: Any, ins: Instruction, dtype: Any) -> list[str]:
    if ins.opcode == "ex2.approx.ftz.f32":
        return t.assign(ins.operands[0], f"ex2({t.value(ins.operands[1], f32)})", f32)
    _modifiers(ins, "rn", "ftz")
    target, *operands = ins.operands
    values = [t.value(operand, dtype) for operand in operands]
    if ins.root == "copysign":
        # the sign of the first, the size of the second
        return t.assign(target, f"np.copysign({values[1]}, {values[0]})", dtype)
    flush = "ftz" in ins.parts
    if flush:
        values = [f"ftz({value})" for value in values]
    symbol = {"add": "+", "sub": "-", "mul": "*", "div": "/"}.get(ins.root)
    calls = {
        "fma": "fma32" if dtype is f32 else "fma64", "sqrt": "np.sqrt", "neg": "np.negative",
        "abs": "np.abs", "min": "fmin", "max": "fmax",
    }  # fmt: skip
    if ins.root in ("div", "sqrt", "fma") and "rn" not in ins.parts:
        raise PtxError(f"unknown: {ins.text}")
    if symbol:
        result = f"({values[0]} {symbol} {values[1]})"
    elif ins.root in calls:
        result = f"{calls[ins.root]}({', '.join(values)})"
    else:
        raise PtxError(f"unknown: {ins.text}")
    return t.assign(target, f"ftz({result})" if flush else result, dtype)


def _integers(t: Any, ins: Instruction, dtype: Any) -> list[str]:
    root, kind, (target, *operands) = ins.root, ins.parts[1:-1], ins.operands
    bits = UNSIGNED[WIDTHS[dtype]]

    def plain(k: int) -> str:
        return t.value(operands[k], bits)

    def typed(k: int, as_dtype: Any = dtype) -> str:
        return t.value(operands[k], as_dtype)

    symbol = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}.get(root)
    result = None
    if not kind:
        if symbol:
            result = f"({plain(0)} {symbol} {plain(1)})", bits
        elif root == "not":
            result = f"~{plain(0)}", bits
        elif root == "neg":
            result = f"({t.constant(bits(0))} - {plain(0)})", bits
        elif root in ("shl", "shr"):
            name, value = ("shift_left", plain(0)) if root == "shl" else ("shift_right", typed(0))
            result = f"{name}({value}, {typed(1, u32)})", bits if root == "shl" else dtype
        elif root in ("min", "max"):
            result = f"np.{root}imum({typed(0)}, {typed(1)})", dtype
        elif root == "popc":
            result = f"np.bitwise_count({plain(0)}).astype(u32)", u32
        elif root == "bfe" and dtype is u32:
            low, mask = (u32(int(operands[1], 0)), u32((1 << int(operands[2], 0)) - 1))
            result = f"(({plain(0)} >> {t.constant(low)}) & {t.constant(mask)})", u32
        elif root == "prmt":
            selector = int(operands[2].rstrip("U"), 0)
            result = f"prmt({plain(0)}, {plain(1)}, {selector})", u32
    elif root in ("mul", "mad"):
        result = _products(t, root, kind, dtype, operands)
    if result is None:
        raise PtxError(f"unknown: {ins.text}")
    return t.assign(target, *result)


def _products(t: Any, root: str, kind: list[str], dtype: Any, operands: list[str]) -> Any:
    """`mul` and `mad` of integers: the low half, the high one, or both."""
    part = {"lo": UNSIGNED[WIDTHS[dtype]], "wide": WIDER.get(dtype), "hi": WIDER.get(dtype)}
    wide = part.get(kind[0])
    if len(kind) != 1 or wide is None or (kind == ["hi"] and root == "mad"):
        return None
    own = wide if kind == ["lo"] else dtype
    a, b = (f"{t.value(operand, own)}.astype({NAMES[wide]})" for operand in operands[:2])
    text = f"({a} * {b})"
    if kind == ["hi"]:
        by = t.constant(wide(8 * WIDTHS[dtype]))
        return f"({text} >> {by}).astype({NAMES[dtype]})", dtype
    if root == "mad":
        text = f"({text} + {t.value(operands[2], wide)})"
    return text, wide


def _convert(t: Any, ins: Instruction) -> list[str]:
    halves = ("bf16", "bf16x2", "f16x2")
    kinds = [part for part in ins.parts[1:] if part in DTYPES or part in halves]
    flags = {part for part in ins.parts[1:] if part not in kinds}
    (to, source), target, a = kinds, ins.operands[0], ins.operands[1:]
    unknown = PtxError(f"unknown: {ins.text}")
    if source == "f32" and to in halves:
        if flags != {"rn"}:
            raise unknown

        def half(operand: str) -> str:
            value = t.value(operand, f32)
            return f"{value}.astype(f16).view(u16)" if to == "f16x2" else f"to_bf16({value})"

        if to == "bf16":
            return t.assign(target, half(a[0]), u16)
        high, low = (f"{half(operand)}.astype(u32)" for operand in a)
        return t.assign(target, f"(({high} << {t.constant(u32(16))}) | {low})", u32)
    if source == "bf16" and to in ("f32", "f64") and not flags:
        text = f"from_bf16({t.value(a[0], u16)})"
        return t.assign(target, text if to == "f32" else f"{text}.astype(f64)", DTYPES[to])
    if to in halves or source in halves:
        raise unknown
    into, out = DTYPES[to], DTYPES[source]
    if into in FLOATS and out in FLOATS:
        return _float_to_float(t, ins, flags, into, out)
    if into in FLOATS:
        # NumPy rounds integers to nearest even
        if flags != {"rn"} or into is f16:
            raise unknown
        return t.assign(target, f"{t.value(a[0], out)}.astype({NAMES[into]})", into)
    if out in FLOATS or flags or WIDTHS[t.types[target]] > WIDTHS[into]:
        raise unknown
    value = t.value(a[0], out)
    if WIDTHS[into] == WIDTHS[out]:
        return t.assign(target, value, out)
    return t.assign(target, f"{value}.astype({NAMES[into]})", into)


def _float_to_float(t: Any, ins: Instruction, flags: set[str], into: Any, out: Any) -> list[str]:
    target, operand = ins.operands
    value = f"{t.value(operand, u16)}.view(f16)" if out is f16 else t.value(operand, out)
    to_integer = flags & set(ROUNDINGS)
    if to_integer and into is out and flags - to_integer <= {"ftz"}:
        value = f"ftz({value})" if "ftz" in flags else value
        return t.assign(target, f"np.{ROUNDINGS[to_integer.pop()]}({value})", into)
    if flags != ({"rn"} if WIDTHS[into] < WIDTHS[out] else set()):
        raise PtxError(f"unknown: {ins.text}")
    if into is f16:
        return t.assign(target, f"{value}.astype(f16).view(u16)", u16)
    return t.assign(target, f"{value}.astype({NAMES[into]})", into)

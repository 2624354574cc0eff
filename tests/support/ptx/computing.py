"""Arithmetic and conversions of floats and integers: a part of `operations`."""

from __future__ import annotations

from typing import Any

from support.ptx.parse import Instruction

from support.ptx.arithmetic import (  # isort: skip
    DTYPES, NAMES, UNSIGNED, WIDTHS, PtxError, f16, f32, f64, s16, s32, s64, u16, u32, u64,
)  # fmt: skip

FLOATS = (f16, f32, f64)
WIDER: dict[Any, Any] = {s32: s64, u32: u64, s16: s32, u16: u32}
ROUNDINGS = {"rmi": "floor", "rni": "rint", "rzi": "trunc", "rpi": "ceil"}


def dtype_of(ins: Instruction) -> Any:
    """The last dtype that an opcode names."""
    named = [part for part in ins.parts[1:] if part in DTYPES]
    if not named:
        raise PtxError(f"unknown: {ins.text}")
    return DTYPES[named[-1]]


def check_modifiers(ins: Instruction, *known: str) -> None:
    """Raise for what is neither a dtype nor known."""
    for part in ins.parts[1:]:
        if part not in DTYPES and part not in known and not part.startswith(("L1:", "L2:")):
            raise PtxError(f"unknown {part}: {ins.text}")


def floats(t: Any, ins: Instruction, dtype: Any) -> list[str]:
    if ins.opcode == "ex2.approx.ftz.f32":
        return t.assign(ins.operands[0], f"ex2({t.value(ins.operands[1], f32)})", f32)
    check_modifiers(ins, "rn", "ftz")
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


def integers(t: Any, ins: Instruction, dtype: Any) -> list[str]:
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
        elif root == "shl":
            # NumPy shifts everything out from the width on, as hardware does
            result = f"({plain(0)} << {typed(1, u32)}.astype({NAMES[bits]}))", bits
        elif root == "shr":
            result = f"({typed(0)} >> {typed(1, u32)}.astype({NAMES[dtype]}))", dtype
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


def convert(t: Any, ins: Instruction) -> list[str]:
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

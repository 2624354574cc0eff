"""Machine code on the usual path of a streaming kernel, by the unit that executes it.

A forward branch over code that touches no memory is taken: slow paths of divisions, the CDF. A
branch over other code is not, a way out is taken once the loop has been passed, and of several
loops with streamed loads the first alone is run: the others are remainders.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from support.machine_code import run_tool

# by the start of an opcode: what comes first decides
UNITS = (
    ("float64", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("convert", r"(F2F|I2F|F2I|FRND|MUFU)"),
    ("float32", r"F(ADD|MUL|FMA|SETP|SEL|MNMX|CHK)"),
    ("memory", r"(LD|ST|ATOM|RED)"),
    ("control", r"(BRA|BRX|BSSY|BSYNC|BAR|CALL|RET|EXIT|WARPSYNC|NOP)"),
    ("other", r""),
)
TOUCHES = r"(?:@!?U?P\w+ )?(LD|ST[GS]|ATOM|RED|BAR|SHFL)"
STREAMED = r"(?:@!?U?P\w+ )?LDG\S*\.E[FL]"


@dataclass
class Path:
    """Instructions of one warp: in each trip of the loop, and besides."""

    loop: Counter[str]
    fixed: Counter[str]


def unit(code: str) -> str:
    """Of an instruction without its predicate."""
    bare = re.sub(r"^@!?U?P\w+ ", "", code)
    return next(name for name, pattern in UNITS if re.match(pattern, bare))


def usual_path(compiled: Any) -> Path:
    """Of a compiled kernel with a streaming loop."""
    text = run_tool("cuobjdump", "-sass", compiled.asm["cubin"])
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.M)
    places = {int(at, 16): i for i, (at, _) in enumerate(lines)}
    codes = [code for _, code in lines]
    visited: list[int] = []
    loops: list[tuple[int, int]] = []
    i = 0
    while i < len(codes):
        visited.append(i)
        code = codes[i]
        conditional = code.startswith("@")
        if "EXIT" in code and (not conditional or loops):
            break
        i += 1
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", code)
        if not jump:
            continue
        target = places[int(jump[1], 16)]
        conditional |= bool(re.search(r"BRA !?U?P", code))
        if target < i:
            if any(re.match(STREAMED, c) for c in codes[target:i]):
                loops.append((target, i))
        elif not conditional or not any(re.match(TOUCHES, c) for c in codes[i:target]):
            i = target
    first, last = loops[0]
    inside = [k for k in visited if first <= k < last]
    others = {k for a, b in loops[1:] for k in range(a, b)}
    outside = [k for k in visited if k not in others and not first <= k < last]
    return Path(Counter(unit(codes[k]) for k in inside), Counter(unit(codes[k]) for k in outside))

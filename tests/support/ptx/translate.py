"""A Python function for each block, in which a register of all threads is one NumPy vector.

What is the same in every thread stays a scalar until something makes it differ. Each block has two
functions: one where all threads of the program run it, one under a mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx import accesses, arithmetic
from support.ptx.arithmetic import NAMES, UNSIGNED, WIDTHS, PtxError, f16, f32, f64, u32, u64
from support.ptx.memory import WARP, Site
from support.ptx.operations import lines_of
from support.ptx.parse import Block, Instruction, Kernel, split_operands

Function = Callable[[list[Any], Any, Any], Any]


class Program:
    """A kernel's PTX, translated where it runs.

    Args:
        ptx: the text.
        shared: bytes of shared memory.
        threads: of a program, where the text does not say.
    """

    def __init__(self, ptx: str, shared: int = 0, threads: int | None = None) -> None:
        self.kernel = Kernel(ptx)
        self.shared = shared
        self.threads = self.kernel.threads or threads or 0
        if self.threads % WARP or not self.threads:
            raise PtxError(f"{self.threads} threads are no whole warps")
        self.types = self.kernel.types
        self.numbers = {register: k for k, register in enumerate(self.types)}
        self.sites: list[Site] = []
        self._sites: dict[tuple[int, int], int] = {}
        self._functions: dict[tuple[int, bool], Function] = {}
        self._space: dict[str, Any] = {
            **vars(arithmetic),
            **vars(accesses),
            "SITES": self.sites,
            "TID": np.arange(self.threads, dtype=u32),
            "LANE": np.arange(self.threads, dtype=u32) % u32(WARP),
            "ZERO": u32(0),
        }

    def function(self, block: Block, masked: bool) -> Function:
        key = (block.index, masked)
        if key not in self._functions:
            name = f"{'masked' if masked else 'whole'}_{block.index}"
            source = "\n".join(self._source(name, block, masked))
            exec(compile(source, f"<{self.kernel.name} {name}>", "exec"), self._space)
            self._functions[key] = self._space[name]
        return self._functions[key]

    def translate_all(self) -> None:
        """What is not known shows even in blocks that never run."""
        for block in self.kernel.blocks:
            for masked in (False, True):
                self.function(block, masked)

    def _source(self, name: str, block: Block, masked: bool) -> list[str]:
        lines = [f"def {name}(R, state, m):"]
        for register in sorted(block.reads, key=self.numbers.__getitem__):
            k = self.numbers[register]
            lines.append(f"    v{k} = R[{k}]")
        result = "None"
        for place, instruction in enumerate(block.body):
            if instruction.root == "bra":
                result = self.variable(instruction.guard) if instruction.guard else "None"
            elif instruction.root == "brx":
                result = self.value(instruction.operands[0], u32)
            else:
                emitted = self._guarded(block, place, instruction, masked)
                lines += [f"    {line}" for line in emitted]
        for register in sorted(block.writes & block.live_after, key=self.numbers.__getitem__):
            k = self.numbers[register]
            kept = f"np.where(m, v{k}, R[{k}])" if masked else f"v{k}"
            lines.append(f"    R[{k}] = {kept}")
        return [*lines, f"    return {result}"]

    def _guarded(
        self, block: Block, place: int, instruction: Instruction, masked: bool
    ) -> list[str]:
        guard = ""
        if instruction.guard:
            guard = ("~" if instruction.negated else "") + self.variable(instruction.guard)
        mask = " & ".join([*["m"] * masked, *[guard] * bool(guard)]) or "None"

        def site(space: str, size: int, stores: bool) -> str:
            # the same for both functions of a block
            number = self._sites.setdefault((block.index, place), len(self.sites))
            if number == len(self.sites):
                text, line = instruction.text, instruction.line
                self.sites.append(Site(number, text, line, space, size, stores))
            return f"SITES[{number}]"

        lines = lines_of(self, instruction, f"({mask})", site)
        writes, _ = instruction.registers()
        if guard and writes:
            names = [self.variable(register) for register in writes]
            before = [f"old_{name} = {name}" for name in names]
            after = [f"{name} = select({guard}, {name}, old_{name})" for name in names]
            return [*before, *lines, *after]
        return lines

    def variable(self, register: str) -> str:
        return f"v{self.numbers[register]}"

    def constant(self, value: Any) -> str:
        name = f"K_{type(value).__name__}_{value.tobytes().hex()}"
        self._space[name] = value
        return name

    def literal(self, text: str, dtype: Any) -> str:
        if re.match(r"0[fF][0-9A-Fa-f]{8}$", text):
            value: Any = u32(int(text[2:], 16))
        elif re.match(r"0[dD][0-9A-Fa-f]{16}$", text):
            value = u64(int(text[2:], 16))
        else:
            width = WIDTHS[dtype]
            value = UNSIGNED[width](int(text.rstrip("U"), 0) & ((1 << 8 * width) - 1))
        if WIDTHS[type(value)] != WIDTHS[dtype]:
            raise PtxError(f"literal {text} as {dtype}")
        return self.constant(value.view(dtype))

    def value(self, operand: str, dtype: Any) -> str:
        """An operand as an expression of some dtype: the low part of a wider register."""
        if operand == "global_smem":
            return self.constant(UNSIGNED[WIDTHS[dtype]](0).view(dtype))
        if not operand.startswith("%"):
            return self.literal(operand, dtype)
        special = self._special(operand)
        if special:
            return special if dtype is u32 else f"{special}.view({NAMES[dtype]})"
        own, name = self.types[operand], self.variable(operand)
        if own is dtype:
            return name
        if np.bool_ in (own, dtype):
            raise PtxError(f"predicate {operand} as {dtype}")
        bits = UNSIGNED[WIDTHS[dtype]]
        text = name if own is bits else f"{name}.astype({NAMES[bits]})"
        return text if dtype is bits else f"{text}.view({NAMES[dtype]})"

    @staticmethod
    def _special(name: str) -> str | None:
        if found := re.match(r"%(n?)ctaid\.([xyz])$", name):
            return f"state.{'grid' if found[1] else 'index'}[{'xyz'.index(found[2])}]"
        known = {"%tid.x": "TID", "%tid.y": "ZERO", "%tid.z": "ZERO", "%laneid": "LANE"}
        return known.get(name)

    def assign(self, operand: str, expression: str, dtype: Any) -> list[str]:
        """An expression of some dtype to a register, extended by the kind of that dtype."""
        if operand == "_":
            return []
        own, name = self.types[operand], self.variable(operand)
        if own is dtype:
            return [f"{name} = {expression}"]
        if np.bool_ in (own, dtype):
            raise PtxError(f"{operand} = {expression}")
        if WIDTHS[own] == WIDTHS[dtype]:
            return [f"{name} = ({expression}).view({NAMES[own]})"]
        if WIDTHS[own] < WIDTHS[dtype] or dtype in (f16, f32, f64):
            raise PtxError(f"{operand} of {own} = {expression} of {dtype}")
        return [f"{name} = ({expression}).astype({NAMES[own]})"]

    def assign_parts(self, operand: str, dtype: Any, source: str = "got") -> list[str]:
        """The values of a tuple to one register or several in braces."""
        named = split_operands(operand.strip("{} "))
        return [
            line
            for k, register in enumerate(named)
            for line in self.assign(register, f"{source}[{k}]", dtype)
        ]

    def address(self, text: str) -> str:
        found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if found is None or not found[1].startswith(("%", "global_smem")):
            raise PtxError(f"address {text}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base == "global_smem":
            return self.constant(u32(offset))
        dtype = UNSIGNED[WIDTHS[self.types[base]]]
        if offset == 0:
            return self.value(base, dtype)
        wrapped = dtype(offset & ((1 << 8 * WIDTHS[dtype]) - 1))
        return f"({self.value(base, dtype)} + {self.constant(wrapped)})"

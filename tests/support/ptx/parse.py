"""From the text of a kernel to its blocks, and what is known of its registers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from support.ptx.arithmetic import UNSIGNED, PtxError

# bytes of a register, by the letters of its name; 0 for a predicate
REGISTER_WIDTHS = {"rd": 8, "r": 4, "rs": 2, "p": 0, "f": 4, "fd": 8, "h": 2}
# what writes no register
STORES = {"st", "stmatrix", "bar", "barrier", "bra", "brx", "ret", "exit"}


@dataclass
class Instruction:
    opcode: str
    operands: list[str]
    guard: str | None = None
    negated: bool = False
    # file and line of the Triton source
    line: str = ""
    text: str = ""

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def root(self) -> str:
        return self.opcode.partition(".")[0]

    def registers(self) -> tuple[list[str], list[str]]:
        """Those it writes and those it reads; under a guard it keeps what it does not write."""
        named = [
            [r for r in re.findall(r"%\w+", operand) if register_width(r) is not None]
            for operand in self.operands
        ]
        writes = [] if self.root in STORES or not named else named[0]
        read = named if self.root in STORES else named[1:]
        reads = [register for registers in read for register in registers]
        if self.guard:
            reads = [*reads, self.guard, *writes]
        return writes, reads


@dataclass
class Block:
    """Instructions that run one after the other; only the last may branch."""

    index: int
    body: list[Instruction] = field(default_factory=list)
    # how it ends: fall, cond, table or return
    kind: str = "fall"
    target: str = ""
    negated: bool = False
    # that it begins with a barrier, or with an access that other programs may wait for
    sync: str | None = None
    following: list[int] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    live_after: set[str] = field(default_factory=set)


def register_width(name: str) -> int | None:
    found = re.match(r"%([a-z]+)\d+$", name)
    return REGISTER_WIDTHS.get(found[1]) if found else None


def split_operands(text: str) -> list[str]:
    """At commas that no bracket encloses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


class Kernel:
    """The blocks of one kernel.

    Attributes:
        name: of the kernel.
        params: their names, in order.
        threads: of a program, if the text says so.
        blocks: in the order of the text.
        rank: of each block in reverse post-order: where paths meet comes after those paths.
        types: the NumPy dtype of each register: bits, or a predicate.
    """

    def __init__(self, ptx: str) -> None:
        entry = re.search(r"\.visible \.entry (\w+)\s*\((.*?)\)\s*(.*?)\{\n(.*?)\n\}", ptx, re.S)
        if entry is None:
            raise PtxError("no entry")
        self.name, params, directives, body = entry.groups()
        self.params = re.findall(r"\.param\s+\.\w+(?:\s+\.\w+|\s+\d+)*\s+(\w+)", params)
        required = re.search(r"\.reqntid (\d+)", directives)
        self.threads = int(required[1]) if required else None
        self.files = {
            number: name.rpartition("/")[2]
            for number, name in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', ptx)
        }
        self.blocks = self._blocks(re.sub(r"//[^\n]*", "", body))
        self.rank = self._ranks()
        self.types = self._types()
        self._liveness()

    def _blocks(self, body: str) -> list[Block]:
        table = re.compile(r"(\$\w+):\s*\.branchtargets\s+(.*?);", re.S)
        tables = {name: re.findall(r"\$?\w+", labels) for name, labels in table.findall(body)}
        body = table.sub("", body)
        blocks, labels, line = [Block(0)], {}, ""

        def begin() -> None:
            if blocks[-1].body or blocks[-1].kind != "fall":
                blocks.append(Block(len(blocks)))

        for text in map(str.strip, body.split("\n")):
            if found := re.match(r"\.loc\s+(\d+) (\d+)", text):
                line = f"{self.files.get(found[1], found[1])}:{found[2]}"
                continue
            if found := re.match(r"(\$\w+):\s*(.*)", text):
                if not found[1].startswith(("$L__tmp", "$L__func")):
                    begin()
                    labels[found[1]] = len(blocks) - 1
                text = found[2]
            if re.match(r"\.(reg|pragma)\b", text):
                continue
            for statement in map(str.strip, text.split(";")):
                if statement and statement not in ("{", "}"):
                    self._append(blocks, begin, parse_instruction(statement, line))
        if not blocks[-1].body:
            blocks.pop()
        for block in blocks:
            if block.kind == "table":
                block.following = [labels[label] for label in tables[block.target]]
            elif block.kind != "return":
                after = block.index + 1
                jump = labels[block.target] if block.target else after
                block.following = [jump, after] if block.kind == "cond" else [jump]
        return blocks

    @staticmethod
    def _append(blocks: list[Block], begin: Any, instruction: Instruction) -> None:
        root = instruction.root
        if root in ("bar", "barrier", "atom") or "acquire" in instruction.parts:
            begin()
            blocks[-1].sync = "barrier" if root in ("bar", "barrier") else "atomic"
        block = blocks[-1]
        block.body.append(instruction)
        if root == "bra":
            block.kind = "cond" if instruction.guard else "fall"
            block.target, block.negated = instruction.operands[0], instruction.negated
        elif root == "brx":
            block.kind, block.target = "table", instruction.operands[1]
        elif root in ("ret", "exit"):
            if instruction.guard:
                raise PtxError(f"guarded: {instruction.text}")
            block.kind = "return"
        else:
            return
        blocks.append(Block(len(blocks)))

    def _ranks(self) -> Any:
        seen, order = {0}, []
        stack = [(0, iter(self.blocks[0].following[::-1]))]
        while stack:
            at, rest = stack[-1]
            following = next((k for k in rest if k not in seen), None)
            if following is None:
                order.append(at)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].following[::-1])))
        rank = np.full(len(self.blocks), len(self.blocks))
        rank[order[::-1]] = np.arange(len(order))
        return rank

    def _types(self) -> dict[str, Any]:
        """Floats are bits, too, and viewed as floats where they are used."""
        named = {
            register: register_width(register)
            for block in self.blocks
            for instruction in block.body
            for registers in instruction.registers()
            for register in registers
        }
        return {name: UNSIGNED[width] if width else np.bool_ for name, width in named.items()}

    def _liveness(self) -> None:
        for block in self.blocks:
            for instruction in block.body:
                writes, reads = instruction.registers()
                block.reads |= set(reads) - block.writes
                block.writes |= set(writes)
        live_before: list[set[str]] = [set() for _ in self.blocks]
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                block.live_after = set().union(*(live_before[k] for k in block.following))
                before = block.reads | (block.live_after - block.writes)
                if before != live_before[block.index]:
                    live_before[block.index] = before
                    changed = True


def parse_instruction(text: str, line: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    if found is None:
        raise PtxError(f"cannot parse: {text}")
    operands = split_operands(found[4])
    return Instruction(found[3], operands, found[2], found[1] == "!", line, text)

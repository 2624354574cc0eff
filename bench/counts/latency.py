"""Clocks of one program alone: its instructions in order, each when its operands are there."""

from __future__ import annotations

from typing import Any

# to start a program and fetch its first instructions, assumed
START = 500
# float64 divisions and square roots: a first guess and about nine dependent operations of 8 clocks
DIVISION = 20 + 8 * 9


def latency(instruction: Any, memory: int, l2: int) -> int:
    """From issue to result, in clocks: assumed, by what others measured on earlier GPUs."""
    parts, root = instruction.parts, instruction.root
    if "global" in parts:
        if root == "atom":
            # a fence before it waits for the stores
            return l2 * (2 if {"acq_rel", "release"} & set(parts) else 1)
        # tables are read by many programs; what has a cache hint is streamed
        return memory if "cache_hint" in instruction.opcode else l2
    if "shared" in parts:
        return 29
    if "f64" in parts and root in ("div", "sqrt"):
        return DIVISION
    by_root = {"shfl": 24, "div": 60, "ex2": 20, "cvt": 14 if "f64" in parts else 5}
    return by_root.get(root, 8 if "f64" in parts and root != "selp" else 5)


def clocks(program: Any, trace: list[int], memory: int, l2: int) -> float:
    """Of a program that ran some blocks.

    Args:
        program: a `translate.Program`.
        trace: the blocks.
        memory: clocks of a load from device memory.
        l2: and from L2.
    """
    now, ready = 0.0, dict[str, float]()
    for block in (program.kernel.blocks[k] for k in trace):
        for instruction in block.body:
            writes, reads = instruction.registers()
            operands = max((ready.get(register, 0.0) for register in reads), default=0.0)
            root = instruction.root
            if root in ("mov", "createpolicy") or instruction.parts[:2] == ["ld", "param"]:
                # costs nothing, but is as late as what it copies
                ready.update(dict.fromkeys(writes, operands))
                continue
            now = max(now, operands) + 1 + {"bar": 25, "bra": 8, "brx": 8}.get(root, 0)
            ready.update(dict.fromkeys(writes, now + latency(instruction, memory, l2)))
    return now + START

"""Kernels without an order that they need, made by editing their PTX."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bngd_triton.kernels import devices
from support.ptx.arithmetic import PtxError
from support.ptx.driver import Machine
from support.ptx.steps import StepCase, step

DEVICE = Path(devices.__file__).parent / "device"


def without_wait(ptx: str) -> str:
    """The single launch, whose updates do not wait for their slice's flag."""
    return re.sub(
        r"@%p\d+ ld\.global\.gpu\.acquire\.b32 (?:\{ )?(%r\d+)[^;]*;", r"mov.u32 \1, 1;", ptx
    )


def relaxed(order: str) -> Callable[[str], str]:
    """Atomics of some order are relaxed."""
    return lambda ptx: ptx.replace(f"atom.global.gpu.{order}", "atom.global.gpu.relaxed")


def without_barrier(file: str, function: str) -> Callable[[str], str]:
    """Without the barriers that a function of the device code asks for."""
    lines = (DEVICE / file).read_text().split("\n")
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"def {function}("))
    asked = []
    for i, line in enumerate(lines[begin + 1 :], begin + 2):
        if line.startswith(("def ", "@")):
            break
        if line.strip() == "tl.debug_barrier()":
            asked.append(i)

    def edit(ptx: str) -> str:
        for number in asked:
            of_line = rf"(\.loc\s+\d+ {number} \d+\s*// {file}:{number}[^\n]*\n)\s*bar\.sync\s+0;"
            ptx = re.sub(of_line, r"\1", ptx)
        return ptx

    assert asked, f"{function} asks for no barrier"
    return edit


MUTANTS = {
    "updates that do not wait": without_wait,
    "partial results announced without an order": relaxed("acq_rel"),
    "factors announced without an order": relaxed("release"),
    "windows stored while others may yet read them": without_barrier("factors.py", "admit"),
}


def refusal(machine: Machine, mutant: str, case: StepCase, form: str, schedule: str) -> str:
    """What the machine says of a mutant; "" if nothing."""
    edited = []

    def edit(ptx: str) -> str:
        edited.append(MUTANTS[mutant](ptx) != ptx)
        return MUTANTS[mutant](ptx)

    machine.edit = edit
    try:
        step(machine, case, form, schedule)
    except PtxError as error:
        return str(error)
    finally:
        machine.edit = str
    assert any(edited), "nothing was edited"
    return ""

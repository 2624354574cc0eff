"""Kernels written by hand, to try the machine on."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.ptx.execute import Counts, Schedule, launch
from support.ptx.memory import Memory
from support.ptx.translate import Program

PROLOGUE = """
mov.u32 %r90, %tid.x;
mov.u32 %r91, %ctaid.x;
mul.wide.u32 %rd90, %r90, 4;
"""


def program(body: str, arrays: int, threads: int = 32, shared: int = 0) -> Program:
    """A kernel whose %rd80, %rd81, ... are the addresses of its arrays.

    %r90 is the thread, %r91 the program, %rd90 the thread's offset in 4-byte entries.
    """
    params = ",\n".join(f"\t.param .u64 k_param_{k}" for k in range(arrays))
    loads = "\n".join(f"ld.param.b64 %rd{80 + k}, [k_param_{k}];" for k in range(arrays))
    text = (
        f".visible .entry k(\n{params}\n)\n.reqntid {threads}\n{{\n{PROLOGUE}{loads}\n{body}\n"
        "ret;\n}\n"
    )
    return Program(text, shared)


def run(
    body: str,
    *arrays: Any,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    schedule: Schedule | None = None,
    granule: int = 4,
) -> Counts:
    """Run a kernel on NumPy arrays, in place."""
    memory = Memory()
    for k, array in enumerate(arrays):
        memory.add(array.ctypes.data, array.nbytes, f"array {k}", granule)
    made = program(body, len(arrays), threads, shared)
    made.translate_all()
    params = [np.uint64(array.ctypes.data) for array in arrays]
    return launch(made, (programs, 1, 1), params, memory, schedule)


def elementwise(lines: str, *inputs: Any, result: str = "b32") -> Any:
    """Per thread: inputs in %r0, %r1, ... (%f, %rd, %fd or %h by their dtype), result in %OUT."""
    loads, arrays = [], []
    n = len(inputs[0])
    for k, values in enumerate(inputs):
        bits = 8 * values.itemsize
        name = register(values.dtype, k)
        loads.append(f"mad.wide.u32 %rd70, %r90, {values.itemsize}, %rd{80 + k};")
        loads.append(f"ld.global.b{bits} {{ {name} }}, [ %rd70 + 0 ];")
        arrays.append(np.ascontiguousarray(values))
    width = int(result[1:]) // 8
    out = np.zeros(n, {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width])
    name = register(np.dtype({"f32": "f4", "f64": "f8"}.get(result, f"u{width}")), 60)
    store = [
        f"mad.wide.u32 %rd70, %r90, {width}, %rd{80 + len(inputs)};",
        f"st.global.b{8 * width} [ %rd70 + 0 ], {{ {name} }};",
    ]
    body = "\n".join([*loads, lines.replace("%OUT", name), *store])
    run(body, *arrays, out, threads=-(-n // 32) * 32, granule=1)
    return out


def register(dtype: Any, number: int) -> str:
    """A register of a dtype's width."""
    kind = {("f", 4): "f", ("f", 8): "fd"}.get((dtype.kind, dtype.itemsize))
    return f"%{kind or {2: 'rs', 4: 'r', 8: 'rd'}[dtype.itemsize]}{number}"

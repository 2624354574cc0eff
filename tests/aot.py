"""Compile the kernels ahead of time, without a GPU or a driver, and check the machine code.

    python tests/aot.py [--quick] [--json FILE] [--kernels FOLDER]

Every kernel must, for each target, dtype combination and variant: stream with accesses as wide as
its block allows, keep spills out of the streaming loops, stay within a register budget, and keep
the acquire and release around the counter that elects a segment's last program.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
# parameter, gradient, momentum
COMBINATIONS = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "fp32"),
    ("fp16", "fp16", "fp32"),
    ("bf16", "fp32", "fp32"),
)
WIDEST = 16

# Registers per thread, from the largest count over targets and dtypes plus one allocation step (8)
BUDGETS = {"update": 999, "lanes": 999, "lanes+tiles": 999, "stream": 999, "stream+tiles": 999}
# ptxas trades a few bytes outside the loops for a register step; which kernels depends on its version
SPILL_BYTES = 16

SIGNATURES = {
    "statistics": {
        "slices_ptr": "*i64",
        "n_slices": "i32",
        "tiles_ptr": "*i64",
        "rows_ptr": "*i64",
        "segments_ptr": "*i64",
        "partials_ptr": "*fp64",
        "n_partials": "i32",
        "arrived_ptr": "*i32",
        "moments_ptr": "*fp64",
        "folds_ptr": "*fp32",
        "options_ptr": "*fp64",
        "skipped_ptr": "*i64",
        "grad_ptrs": "*i64",
        "param_ptrs": "*i64",
        "momentum_ptrs": "*i64",
    },
    "update": {
        "chunks_ptr": "*i64",
        "segments_ptr": "*i64",
        "folds_ptr": "*fp32",
        "options_ptr": "*fp64",
        "grad_ptrs": "*i64",
        "param_ptrs": "*i64",
        "momentum_ptrs": "*i64",
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation."""

    kernel: str
    target: str
    param: str
    grad: str
    buffer: str
    aligned: bool = True
    wide: bool = True
    tiles: bool = False

    @property
    def variant(self) -> str:
        """The key of the register budget."""
        if self.kernel == "update":
            return "update"
        return ("lanes" if self.wide else "stream") + ("+tiles" if self.tiles else "")

    def __str__(self) -> str:
        kind = "aligned" if self.aligned else "any"
        dtypes = ",".join((self.param, self.grad, self.buffer))
        return f"{self.variant:12s} {dtypes:14s} {kind:7s} {self.target:6s}"


@dataclasses.dataclass
class Report:
    """What the machine code of one compilation says."""

    registers: int
    shared: int
    # bytes of stack and local memory, and local accesses inside loops that read global memory
    spill: int
    loop_spills: int
    # accesses by width in bytes, inside loops that read global memory and in the whole kernel
    loop_loads: Counter[int]
    loop_stores: Counter[int]
    loads: Counter[int]
    stores: Counter[int]
    instructions: int
    # the counter's atomic, the fence before it, the invalidation after it
    atomics: int
    releases: int
    acquires: int


Instruction = tuple[str, str]  # opcode with modifiers, operands


@functools.cache
def load_kernels(folder: Path) -> dict[str, Any]:
    """The modules of a kernels folder, under a name that no installed package has."""
    name = "aot_kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return {part: importlib.import_module(f"{name}.{part}") for part in ("statistics", "update", "plan")}


def build(case: Case, tuning: Any, modules: dict[str, Any]) -> Any:
    """Compile one case as `launch` would; pointer arguments are not assumed to be aligned."""
    fn = getattr(modules[case.kernel], f"_{case.kernel}_kernel")
    constants: dict[str, Any] = {
        "GRAD": DTYPES[case.grad],
        "PARAM": DTYPES[case.param],
        "BUFFER": DTYPES[case.buffer],
        "ALIGNED": case.aligned,
        "SOFT": False,
    }
    if case.kernel == "update":
        constants |= {"BLOCK": tuning.update_block}
        warps = tuning.update_warps
    else:
        constants |= {"WIDE": case.wide, "TILES": case.tiles, "BLOCK": tuning.block}
        constants |= {"UNROLL": tuning.unroll, "MERGE": tuning.merge, "TILE": tuning.tile}
        warps = tuning.warps
    typed = SIGNATURES[case.kernel]
    assert set(fn.arg_names) == set(typed) | set(constants), "launch arguments changed"
    signature = {name: typed.get(name, "constexpr") for name in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[case.target], options=options)


def run_tool(name: str, flag: str, cubin: bytes) -> str:
    """The output of one of the CUDA tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), flag, file.name]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def innermost(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans that hold no other span."""

    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    return [a for a in spans if not any(holds(a, b) for b in spans)]


def parse_sass(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions without predicates, and the index spans of the innermost loops."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text, re.M)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = set()
    for i, (_, code) in enumerate(lines):
        jump = re.match(r"BRA\b.*?(0x[0-9a-f]+)", code)
        if jump and at[int(jump[1], 16)] < i:
            spans.add((at[int(jump[1], 16)], i))
    return [code for _, code in lines], innermost(spans)


def parse_amdgcn(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Like `parse_sass`, from LLVM's assembly."""
    codes: list[str] = []
    labels: dict[str, int] = {}
    spans = set()
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(codes)
        elif code := re.match(r"\s+([a-z]\w+\b.*?)\s*(?:;.*)?$", line):
            jump = re.match(r"s_c?branch\w*\s+(\S+)", code[1])
            if jump and jump[1] in labels:
                spans.add((labels[jump[1]], len(codes)))
            codes.append(code[1])
    return codes, innermost(spans)


def sass_width(code: str) -> int:
    """Bytes per thread of an LDG or STG."""
    modifiers = code.split()[0].split(".")
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((bits[m] for m in modifiers if m in bits), 32) // 8


def amdgcn_width(code: str) -> int:
    """Bytes per thread of a global or buffer access."""
    kind = code.split()[0]
    if times := re.search(r"dwordx(\d)", kind):
        return 4 * int(times[1])
    return 4 if "dword" in kind else 1 if "byte" in kind else 2


def report(compiled: Any, backend: str) -> Report:
    """Read the machine code."""
    if backend == "cuda":
        cubin = compiled.asm["cubin"]
        usage = run_tool("cuobjdump", "--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None
        registers, stack, local = map(int, found.groups())
        codes, loops = parse_sass(run_tool("cuobjdump", "-sass", cubin))
        width, load, store, spilling = sass_width, r"LDG\b", r"STG\b", r"(LDL|STL)\b"
        patterns = (r"ATOMG.*\.STRONG", r"MEMBAR", r"CCTL\.IVALL")
    else:
        text = compiled.asm["amdgcn"]
        field = {k: int(v) for k, v in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
        registers, stack = field["vgpr_count"], field["private_segment_fixed_size"]
        local = 0
        codes, loops = parse_amdgcn(text)
        width, load, store = amdgcn_width, r"(global|buffer)_load", r"(global|buffer)_store"
        spilling, patterns = r"scratch_", (r"global_atomic", r"buffer_wbl2", r"buffer_inv")

    def widths(pattern: str, lines: list[str]) -> Counter[int]:
        return Counter(width(code) for code in lines if re.match(pattern, code))

    streaming = [codes[a : b + 1] for a, b in loops]
    streaming = [body for body in streaming if widths(load, body)]
    inside = [code for body in streaming for code in body]
    atomics, releases, acquires = (
        sum(bool(re.match(pattern, code)) for code in codes) for pattern in patterns
    )
    return Report(
        registers=registers,
        shared=compiled.metadata.shared,
        spill=stack + local,
        loop_spills=sum(bool(re.match(spilling, code)) for code in inside),
        loop_loads=widths(load, inside),
        loop_stores=widths(store, inside),
        loads=widths(load, codes),
        stores=widths(store, codes),
        instructions=len(codes),
        atomics=atomics,
        releases=releases,
        acquires=acquires,
    )

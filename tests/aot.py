"""Compile the kernels ahead of time, without a GPU or a driver, and check the machine code.

    python tests/aot.py [--quick] [--targets TARGET ...] [--only VARIANT ...] [--kernels FOLDER]
                        [--json FILE]

Every kernel must, for each target, dtype combination and variant: stream with accesses as wide as
its block allows, tell the caches what is read again and what is not, keep spills out of the
streaming loops, stay within a register budget, and keep the acquires and releases around the
counter that elects a slice's last program and, in the single launch, on the flag that its updates
wait for; and wait for all threads between the read of a window and its write.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
KERNELS = Path(str(importlib.util.find_spec("bngd_triton.kernels").origin)).parent  # type: ignore[union-attr]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# one of each vendor, in every form
ALWAYS = ["sm_90", "gfx942"]
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
# parameter, gradient, momentum
COMBINATIONS = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "fp32"),
    ("fp16", "fp16", "fp32"),
    ("bf16", "fp32", "fp32"),
)
# how parameters keep what their storage type would lose: names in plan.py
MASTERS = {
    "plain": "PLAIN",
    "remainder": "REMAINDER",
    "master": "MASTER_COPY",
    "stochastic": "STOCHASTIC",
}
# with the storage types for which each is the default or is asked for
MASTER_COMBINATIONS = (
    ("remainder", ("bf16", "bf16", "fp32")),
    ("remainder", ("bf16", "fp32", "fp32")),
    ("master", ("fp16", "fp16", "fp32")),
    ("stochastic", ("bf16", "bf16", "bf16")),
    ("stochastic", ("fp16", "fp16", "fp32")),
)
WIDEST = 16
PROCESSES = 2

# Registers per thread: the largest count over targets and dtypes, rounded up to ptxas's step of 8;
# aligned, and not aligned, where every element has an address of its own. With 128 threads to a
# program, 48 registers leave 10 programs to an SM of sm_90, 80 leave 6, 96 leave 5.
BUDGETS = {
    "update": (48, 56),
    "lanes": (80, 80),
    "lanes+tiles": (96, 160),
    "stream": (80, 88),
    "stream+tiles": (112, 160),
    "column_moments": (56, 56),
    "standardize": (80, 80),
    "publish": (64, 64),
    "rates": (24, 24),
    # the loop over tickets keeps values for every kind of item; 128 leave 4 programs, 168 leave 3
    "single lanes": (120, 144),
    "single lanes+tiles": (168, 232),
    "single stream": (136, 168),
    "single stream+tiles": (168, 240),
}
# where other versions of Triton need more. Without a program less: 128 leave 4 to an SM, as 120 do,
# and all up to 256 leave 2 waves to a SIMD of gfx942. 88 leave 5 where 80 leave 6
OTHER_BUDGETS: dict[tuple[int, ...], dict[str, tuple[int, int]]] = {
    (3, 6): {"single lanes": (128, 144)},
    (3, 8): {"lanes": (88, 88)},
    (3, 9): {"single lanes+tiles": (168, 240), "single stream+tiles": (168, 248)},
}
# more where parameters have a master or are rounded stochastically, or with micro-batches
MASTER_REGISTERS = 24
# ptxas trades a few bytes outside the loops for a register step; where depends on its version
SPILL_BYTES = {"update": 16, "statistics": 16, "single": 56}
# the update reads again what statistics load: evict_last on each row of a trip and on the rest
READ_AGAIN = {"lanes": 5, "stream": 1}
# nothing reads again what moves: evict_first on the loads of gradient, parameter and momentum and
# on the stores of the last two; once for each shape of a tile, or in the update's loop and after it
MOVED = {"tiles": 4, "update": 2, "single": 2}
# an access with an eviction policy in TTIR: `evictionPolicy = x`, from Triton 3.9 on
# `{cachePolicy = #tt.cache_policy<.., eviction_policy = x>}`
HINT = r"tt\.(load|store) .*eviction(?:P|_p)olicy = (\w+)"
# eviction policies in SASS; AMD's code has none
SASS_HINTS = {
    "load evict_first": r"LDG\S*\.EF\b",
    "load evict_last": r"LDG\S*\.EL\b",
    "store evict_first": r"STG\S*\.EF\b",
    "store evict_last": r"STG\S*\.EL\b",
}
# releases and acquires: around the counter that elects a slice's last program, and on its flag
FENCES = {"statistics": 1, "single": 2}
# what a launch that moves parameters is told of them
TENSORS = {
    "options_ptr": "*fp64",
    "clocks_ptr": "*i64",
    "grad_ptrs": "*i64",
    "param_ptrs": "*i64",
    "momentum_ptrs": "*i64",
    "master_ptrs": "*i64",
}
# what spans and tiles need in either form
WORK = {
    "rows_ptr": "*i64",
    "slices_ptr": "*i64",
    "partials_ptr": "*fp64",
    "n_partials": "i32",
    "arrived_ptr": "*i32",
    "factors_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "found_ptr": "*fp32",
    **TENSORS,
}
SIGNATURES = {
    "statistics": {
        "spans_ptr": "*i64",
        "n_spans": "i32",
        "tiles_ptr": "*i64",
        "moments_ptr": "*fp64",
        **WORK,
    },
    "single": {
        "items_ptr": "*i64",
        "n_items": "i32",
        "counters_ptr": "*i32",
        "first_slice": "i32",
        "n_slices": "i32",
        **WORK,
    },
    "update": {"chunks_ptr": "*i64", "slices_ptr": "*i64", "factors_ptr": "*fp32", **TENSORS},
    "publish": {
        "moments_ptr": "*fp64",
        "n_slices": "i32",
        "slices_ptr": "*i64",
        "factors_ptr": "*fp32",
        "options_ptr": "*fp64",
        "scale_ptr": "*fp32",
        "found_ptr": "*fp32",
    },
    "rates": {"rates_ptr": "*i64", "options_ptr": "*fp64"},
    # x and out have the storage type of the case
    "column_moments": {
        "x_ptr": "*x",
        "partials_ptr": "*fp64",
        "n_rows": "i32",
        "n_columns": "i32",
        "rows_per_split": "i32",
    },
    "standardize": {
        "x_ptr": "*x",
        "out_ptr": "*x",
        "partials_ptr": "*fp64",
        "splits": "i32",
        "n_rows": "i32",
        "n_columns": "i32",
    },
}
# kernels of one form: module, constants, warps
SIMPLE_KERNELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "column_moments": ("columns", {"UNROLL": 8, "COLUMNS": 32}, 1),
    "standardize": ("columns", {"SOFT": False, "ROWS": 64, "COLUMNS": 32}, 4),
    "publish": ("publish", {"WIDE": True, "WINDOWS": True}, 1),
    "rates": ("rates", {}, 1),
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
    master: str = "plain"
    windows: bool = False
    tables: bool = False

    @property
    def variant(self) -> str:
        """The kernel and its form: a key of `BUDGETS`."""
        if self.kernel == "update" or self.kernel in SIMPLE_KERNELS:
            return self.kernel
        form = "single " if self.kernel == "single" else ""
        return form + ("lanes" if self.wide else "stream") + ("+tiles" if self.tiles else "")

    @property
    def budget(self) -> int:
        """Registers it may take."""
        extra = MASTER_REGISTERS if self.master != "plain" or self.windows else 0
        budgets = BUDGETS | OTHER_BUDGETS.get(VERSION, {})
        return budgets[self.variant][0 if self.aligned else 1] + extra

    @property
    def windowed(self) -> bool:
        """Whether it opens and closes windows."""
        return self.kernel == "publish" or (self.windows and self.kernel != "update")

    @property
    def hints(self) -> Counter[str]:
        """How many accesses ask for which eviction policy."""
        parts = re.split("[ +]", self.variant)
        again = sum(READ_AGAIN.get(part, 0) for part in parts)
        moved = sum(MOVED.get(part, 0) for part in parts)
        master = self.master in ("remainder", "master")
        wanted = {
            "load evict_last": again,
            "load evict_first": (3 + master) * moved,
            "store evict_first": (2 + master) * moved,
        }
        return +Counter(wanted)

    def __str__(self) -> str:
        kind = "aligned" if self.aligned else "any"
        dtypes = ",".join((self.param, self.grad, self.buffer))
        extras = f"{self.master}{' windows' if self.windows else ''}"
        return f"{self.variant:19s} {dtypes:14s} {extras:18s} {kind:7s} {self.target:6s}"


@dataclasses.dataclass
class Report:
    """What the machine code of one compilation says.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory.
        spill: bytes of stack and local memory.
        loop_spills: local accesses inside loops that read global memory.
        hints: accesses in the TTIR by eviction policy, which the kernels give to what they stream
            and to nothing else.
        machine_hints: which of them are in the machine code; None on AMD.
        loads: global loads by width in bytes; on NVIDIA those with an eviction policy.
        stores: likewise.
        wanted_loads: the loads that the tensors of the streamed accesses ask for.
        wanted_stores: likewise.
        instructions: of the whole kernel.
        atomics: atomic operations on global memory.
        releases: fences before them.
        acquires: cache invalidations after them.
        hasty: releases that do not wait until caches are written back; None on NVIDIA.
        windows: loads and stores of windows: nothing else has one byte.
        unguarded: stores of a window after a load of it, without a barrier between them.
        seconds: to compile.
    """

    registers: int
    shared: int
    spill: int
    loop_spills: int
    hints: Counter[str]
    machine_hints: list[str] | None
    loads: Counter[int]
    stores: Counter[int]
    wanted_loads: Counter[int]
    wanted_stores: Counter[int]
    instructions: int
    atomics: int
    releases: int
    acquires: int
    hasty: int | None
    windows: int
    unguarded: int
    seconds: float

    def complaints(self, case: Case, waits_from: tuple[int, int]) -> list[str]:
        """What is wrong with it; see `devices.RELEASES_WAIT_FROM`."""
        found = []
        if self.loop_spills or self.spill > SPILL_BYTES.get(case.kernel, 0):
            found.append(f"spills {self.spill} bytes, {self.loop_spills} accesses in loops")
        if self.registers > case.budget:
            found.append(f"{self.registers} registers > {case.budget}")
        if self.hints != case.hints:
            found.append(f"cache hints {dict(self.hints)}, not {dict(case.hints)}")
        if self.machine_hints is not None and self.machine_hints != sorted(case.hints):
            found.append(f"cache hints in machine code {self.machine_hints}")
        if case.aligned:
            for what, seen, wanted in (
                ("loads", self.loads, self.wanted_loads),
                ("stores", self.stores, self.wanted_stores),
            ):
                found += [
                    f"{seen[width]} {width}-byte {what} < {count}"
                    for width, count in wanted.items()
                    if seen[width] < count
                ]
        if min(self.atomics, self.releases, self.acquires) < FENCES.get(case.kernel, 0):
            found.append("an acquire, a release or the atomic between them is missing")
        # a Triton that is hasty with the flag is not given the single launch
        if self.hasty and (case.kernel != "single" or waits_from <= VERSION):
            found.append(f"{self.hasty} releases without a wait for what they release")
        if bool(self.windows) != case.windowed:
            found.append(f"{self.windows} accesses to windows")
        if self.unguarded:
            found.append(f"{self.unguarded} windows stored while other threads may yet read them")
        return found


@functools.cache
def load_kernels(folder: Path) -> dict[str, Any]:
    """The modules of a kernels folder, which need not be the installed one."""
    package = types.ModuleType("bngd_triton.aot_kernels")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    names = {
        "statistics": "device.measure", "publish": "device.factors", "update": "device.update",
        "single": "device.single_launch", "columns": "device.columns", "rates": "device.rates",
        "architectures": "devices", "tables": "tables",
    }  # fmt: skip
    return {
        part: importlib.import_module(f"{package.__name__}.{name}") for part, name in names.items()
    }


def build(case: Case, tuning: Any, modules: dict[str, Any]) -> Any:
    """Compile one case as `launch` would; pointer arguments are not assumed to be aligned."""
    simple = SIMPLE_KERNELS.get(case.kernel)
    module = simple[0] if simple else case.kernel
    fn = getattr(modules[module], f"_{case.kernel}_kernel")
    constants: dict[str, Any] = {
        "GRAD": DTYPES[case.grad],
        "PARAM": DTYPES[case.param],
        "BUFFER": DTYPES[case.buffer],
        "KIND": getattr(modules["tables"], MASTERS[case.master]),
        "ALIGNED": case.aligned,
        "WINDOWS": case.windows,
        "SOFT": False,
    }
    if simple:
        _, constants, warps = simple
    elif case.kernel == "update":
        constants |= {"BLOCK": tuning.update_block}
        warps = tuning.update_warps
    else:
        constants |= {"WIDE": case.wide, "TILES": case.tiles, "BLOCK": tuning.block}
        constants |= {"UNROLL": tuning.unroll, "MERGE": tuning.merge, "TILE": tuning.tile}
        if case.kernel == "single":
            constants |= {"UPDATE_BLOCK": tuning.update_block}
        else:
            constants["TABLES"] = case.tables
        warps = tuning.warps
    storage = f"*{case.param}"
    typed = {n: storage if t == "*x" else t for n, t in SIGNATURES[case.kernel].items()}
    assert set(fn.arg_names) == set(typed) | set(constants), "launch arguments changed"
    # a size of 1 would become a constant, and every multiple of 16 a compilation of its own
    loose = [p.name for p in fn.params if typed.get(p.name) == "i32" and not p.do_not_specialize]
    assert not loose, f"specialised sizes: {loose}"
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


def asked_widths(ttir: str, threads: int) -> dict[str, Counter[int]]:
    """Loads and stores, by width in bytes, that the tensors of the streamed accesses ask for."""
    asked: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    access = HINT + r"[>}]* : tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>>"
    for kind, _, shape, bits in re.findall(access, ttir):
        elements = max(math.prod(map(int, shape.split("x"))) // threads, 1)
        size = elements * int(bits) // 8
        width = min(size, WIDEST)
        asked[kind][width] += size // width
    return asked


def count_unguarded(codes: list[str], load: str, store: str, barrier: str) -> tuple[int, int]:
    """How many loads and stores there are, and stores after a load without a barrier between."""
    accesses = unguarded = 0
    loaded = False
    for code in codes:
        if re.match(load, code):
            accesses, loaded = accesses + 1, True
        elif re.match(barrier, code):
            loaded = False
        elif re.match(store, code):
            accesses, unguarded = accesses + 1, unguarded + loaded
    return accesses, unguarded


def count_hasty(codes: list[str]) -> int:
    """How many atomics follow AMD's write-back of a cache without a wait for its end."""
    hasty = 0
    written = True
    for code in codes:
        if code.startswith("buffer_wbl2"):
            written = False
        elif re.match(r"s_waitcnt\b.*\bvmcnt\(0\)", code):
            written = True
        elif code.startswith("global_atomic"):
            hasty, written = hasty + (not written), True
    return hasty


def inspect(compiled: Any, backend: str, seconds: float) -> Report:
    """Read the machine code."""
    if backend == "cuda":
        cubin = compiled.asm["cubin"]
        usage = run_tool("cuobjdump", "--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None
        registers, stack, local = map(int, found.groups())
        codes, loops = parse_sass(run_tool("cuobjdump", "-sass", cubin))
        width, any_load, spilling = sass_width, r"LDG\b", r"(LDL|STL)\b"
        load, store = r"LDG\S*\.E[FL]\b", r"STG\S*\.E[FL]\b"
        patterns = (r"ATOMG\S*\.STRONG", r"MEMBAR", r"CCTL\.IVALL")
        bytewise = (r"LDG\S*\.U8\b", r"STG\S*\.U8\b", r"BAR\.")
    else:
        text = compiled.asm["amdgcn"]
        field = {k: int(v) for k, v in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
        registers, stack, local = field["vgpr_count"], field["private_segment_fixed_size"], 0
        codes, loops = parse_amdgcn(text)
        width, any_load, spilling = amdgcn_width, r"(global|buffer)_load", r"scratch_"
        load, store = any_load, r"(global|buffer)_store"
        patterns = (r"global_atomic", r"buffer_wbl2", r"buffer_inv")
        bytewise = (
            r"(global|buffer)_load_ubyte", r"(global|buffer)_store_byte", r"s_barrier"
        )  # fmt: skip

    def matching(pattern: str, lines: list[str]) -> list[str]:
        return [code for code in lines if re.match(pattern, code)]

    bodies = [codes[first : last + 1] for first, last in loops]
    atomics, releases, acquires = (len(matching(pattern, codes)) for pattern in patterns)
    hasty = None if backend == "cuda" else count_hasty(codes)
    windows, unguarded = count_unguarded(codes, *bytewise)
    if compiled.metadata.num_warps == 1:
        # a warp reads before it writes: there the barrier is left out
        unguarded = 0
    lanes = compiled.metadata.target.warp_size
    ttir = compiled.asm["ttir"]
    asked = asked_widths(ttir, compiled.metadata.num_warps * lanes)
    hints = re.findall(HINT, ttir)
    in_code = sorted(hint for hint, pattern in SASS_HINTS.items() if matching(pattern, codes))
    return Report(
        registers=registers,
        shared=compiled.metadata.shared,
        spill=stack + local,
        loop_spills=sum(len(matching(spilling, b)) for b in bodies if matching(any_load, b)),
        hints=Counter(map(" ".join, hints)),
        machine_hints=in_code if backend == "cuda" else None,
        loads=Counter(map(width, matching(load, codes))),
        stores=Counter(map(width, matching(store, codes))),
        wanted_loads=asked["load"],
        wanted_stores=asked["store"],
        instructions=len(codes),
        atomics=atomics,
        releases=releases,
        acquires=acquires,
        hasty=hasty,
        windows=windows,
        unguarded=unguarded,
        seconds=seconds,
    )


def run(folder: Path, case: Case) -> tuple[Case, Report | None, list[str]]:
    """Compile and check one case."""
    modules = load_kernels(folder)
    begin = time.perf_counter()
    try:
        row = modules["architectures"].TABLE[case.target]
        tuning = dataclasses.replace(row.tuning, wide=case.wide)
        compiled = build(case, tuning, modules)
    except Exception as error:  # whatever the compiler raises is this case's failure
        return case, None, [f"does not compile: {str(error).splitlines()[-1]}"]
    seconds = time.perf_counter() - begin
    report = inspect(compiled, TARGETS[case.target].backend, seconds)
    return case, report, report.complaints(case, modules["architectures"].RELEASES_WAIT_FROM)


def cases(quick: bool, targets: list[str], only: list[str]) -> Iterator[Case]:
    """What to compile, the longest first."""
    combinations = COMBINATIONS[:2] if quick else COMBINATIONS
    unaligned = () if quick else ALWAYS
    # the longest to compile, and together of nothing but what the others check by themselves
    skipped = ("stream+tiles", "single stream", "single lanes+tiles", "single stream+tiles")
    variants: list[dict[str, Any]] = [
        {"kernel": kernel, "wide": wide, "tiles": tiles}
        for kernel in ("single", "statistics")
        for tiles in (True, False)
        for wide in (True, False)
    ]
    variants += [{"kernel": kernel} for kernel in ("update", *SIMPLE_KERNELS)]
    for variant in variants:
        for target, dtypes in itertools.product(targets, combinations):
            named = dict(zip(("param", "grad", "buffer"), dtypes))
            case = Case(target=target, **named, **variant)
            if case.variant not in only or (quick and case.variant in skipped):
                continue
            if case.kernel in ("single", *SIMPLE_KERNELS) and dtypes not in COMBINATIONS[:2]:
                continue
            yield case
            narrow = target in unaligned and case.kernel not in SIMPLE_KERNELS
            if narrow and set(dtypes) == {"fp32"}:
                yield dataclasses.replace(case, aligned=False)
    yield from narrow_cases(quick, targets, only)
    for target in targets if "lanes" in only else ():
        for form in ({"tables": True}, {"windows": True}):
            yield Case("statistics", target, "fp32", "fp32", "fp32", **form)


def narrow_cases(quick: bool, targets: list[str], only: list[str]) -> Iterator[Case]:
    """With masters, stochastic rounding or micro-batches."""
    kinds = [(*kind, False) for kind in MASTER_COMBINATIONS[: 1 if quick else None]]
    if not quick:
        kinds += [("plain", COMBINATIONS[0], True), (*MASTER_COMBINATIONS[0], True)]
    for kernel, (master, dtypes, windows) in itertools.product(("statistics", "update"), kinds):
        tiles = kernel == "statistics"
        # tiles take up to a minute each
        for target in targets:
            if tiles and target not in ALWAYS:
                continue
            named = dict(zip(("param", "grad", "buffer"), dtypes))
            case = Case(kernel, target, **named, tiles=tiles, master=master, windows=windows)
            if case.variant in only and not (quick and tiles):
                yield case


def widths_text(widths: Counter[int]) -> str:
    """Like ``8x16 1x4``: count x width in bytes."""
    return " ".join(f"{widths[width]}x{width}" for width in sorted(widths, reverse=True)) or "-"


def main() -> int:
    """Compile everything, print a line for each and a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fp32 and bf16, the shorter ones")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="all, quick: sm_90, gfx942")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="folder of the kernels")
    parser.add_argument("--only", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    options = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter compiles nothing"

    targets = options.targets or (ALWAYS if options.quick else list(TARGETS))
    chosen = list(cases(options.quick, targets, options.only))
    failed = 0
    rows = []
    # spawned: a fork would share the compiler's state
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
            work = functools.partial(run, options.kernels.resolve())
            for case, report, complaints in pool.map(work, chosen):
                failed += bool(complaints)
                if report is not None:
                    print(
                        f"{case} registers {report.registers:3d} shared {report.shared:5d}"
                        f" spill {report.spill} loads {widths_text(report.loads)}"
                        f" stores {widths_text(report.stores)}"
                        f" instructions {report.instructions} ({report.seconds:.1f} s)",
                        flush=True,
                    )
                for complaint in complaints:
                    print(f"FAIL {case} {complaint}", flush=True)
                found = vars(report) if report is not None else {}
                rows.append({**vars(case), **found, "complaints": complaints})
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    print(f"Triton {triton.__version__}: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

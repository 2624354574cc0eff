"""What the machine code of a kernel says, and what is wrong with it."""

import dataclasses
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# bytes of one access at most
WIDEST = 16
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
# releases and acquires: around the counter that elects a segment's last program, and on its flag
FENCES = {"statistics": 1, "single": 2}


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

    def complaints(self, case, waits_from):
        """What is wrong with it; see `devices.RELEASES_WAIT_FROM`."""
        found = []
        if self.loop_spills or self.spill > case.spill:
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


def run_tool(name, flag, cubin):
    """The output of one of the CUDA tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), flag, file.name]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def innermost(spans):
    """The spans that hold no other span."""

    def holds(outer, inner):
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    return [a for a in spans if not any(holds(a, b) for b in spans)]


def parse_sass(text):
    """Instructions without predicates, and the index spans of the innermost loops."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text, re.M)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = set()
    for i, (_, code) in enumerate(lines):
        jump = re.match(r"BRA\b.*?(0x[0-9a-f]+)", code)
        if jump and at[int(jump[1], 16)] < i:
            spans.add((at[int(jump[1], 16)], i))
    return [code for _, code in lines], innermost(spans)


def parse_amdgcn(text):
    """Like `parse_sass`, from LLVM's assembly."""
    codes = []
    labels = {}
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


def sass_width(code):
    """Bytes per thread of an LDG or STG."""
    modifiers = code.split()[0].split(".")
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((bits[m] for m in modifiers if m in bits), 32) // 8


def amdgcn_width(code):
    """Bytes per thread of a global or buffer access."""
    kind = code.split()[0]
    if times := re.search(r"dwordx(\d)", kind):
        return 4 * int(times[1])
    return 4 if "dword" in kind else 1 if "byte" in kind else 2


def asked_widths(ttir, threads):
    """Loads and stores, by width in bytes, that the tensors of the streamed accesses ask for."""
    asked = {"load": Counter(), "store": Counter()}
    access = HINT + r"[>}]* : tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>>"
    found = re.findall(access, ttir)
    for kind, policy, shape, bits in found:
        # as many elements to an access as the widest type of the same walk allows: more would
        # leave gaps in its own
        widest = max(int(b) for _, p, _, b in found if p == policy)
        elements = max(math.prod(map(int, shape.split("x"))) // threads, 1)
        width = min(elements, WIDEST * 8 // widest)
        asked[kind][width * int(bits) // 8] += elements // width
    return asked


def count_unguarded(codes, load, store, barrier):
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


def count_hasty(codes):
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


def inspect(compiled, backend, seconds):
    """Read the machine code."""
    if backend == "cuda":
        cubin = compiled.asm["cubin"]
        usage = run_tool("cuobjdump", "--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
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
        bytewise = (r"(global|buffer)_load_ubyte", r"(global|buffer)_store_byte", r"s_barrier")

    def matching(pattern, lines):
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
        registers=registers, shared=compiled.metadata.shared, spill=stack + local,
        loop_spills=sum(len(matching(spilling, b)) for b in bodies if matching(any_load, b)),
        hints=Counter(map(" ".join, hints)),
        machine_hints=in_code if backend == "cuda" else None,
        loads=Counter(map(width, matching(load, codes))),
        stores=Counter(map(width, matching(store, codes))),
        wanted_loads=asked["load"], wanted_stores=asked["store"], instructions=len(codes),
        atomics=atomics, releases=releases, acquires=acquires, hasty=hasty, windows=windows,
        unguarded=unguarded, seconds=seconds,
    )  # fmt: skip

"""Compile the kernels ahead of time, without a GPU or a driver, and check the machine code.

    python tests/aot.py [--quick] [--targets TARGET ...] [--only VARIANT ...] [--kernels FOLDER]
                        [--json FILE]

Every kernel must, for each target, dtype combination and variant: stream with accesses as wide as
its block allows, tell the caches what is read again and what is not, keep spills out of the
streaming loops, stay within a register budget, and keep the acquires and releases around the
counter that elects a slice's last program and, in the single launch, on the flag that its updates
wait for; and wait for all threads between the read of a window and its write.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from support.compiled_cases import ALWAYS, BUDGETS, PINNED, SIMPLE_KERNELS, cases, find_loose
from support.machine_code import VERSION, inspect

KERNELS = Path(str(importlib.util.find_spec("bngd_triton.kernels").origin)).parent

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
# how parameters keep what their storage type would lose: names in plan.py
MASTERS = {
    "plain": "PLAIN", "remainder": "REMAINDER", "master": "MASTER_COPY", "stochastic": "STOCHASTIC"
}  # fmt: skip
PROCESSES = 2

# what a launch hands over, by name; those of `x` have the storage type of the case
ARGUMENTS = {
    **dict.fromkeys(("x_ptr", "out_ptr"), "*x"),
    **dict.fromkeys(("scale_ptr", "found_ptr", "factors_ptr"), "*fp32"),
    **dict.fromkeys(("options_ptr", "partials_ptr", "moments_ptr"), "*fp64"),
    **dict.fromkeys(("arrived_ptr", "counters_ptr"), "*i32"),
    **{f"{table}_ptr": "*i64" for table in ("tiles", "rows", "spans", "slices", "chunks", "items")},
    **dict.fromkeys(("clocks_ptr", "rates_ptr"), "*i64"),
    **{f"{tensor}_ptrs": "*i64" for tensor in ("grad", "param", "momentum", "master")},
    **{f"n_{what}": "i32" for what in ("partials", "items", "slices", "rows", "columns")},
    **dict.fromkeys(("first_slice", "rows_per_split", "splits"), "i32"),
}


@functools.cache
def load_kernels(folder):
    """The modules of a kernels folder, which need not be the installed one."""
    package = types.ModuleType("bngd_triton.aot_kernels")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    names = {
        "tiles": "device.tiles", "statistics": "device.measure", "publish": "device.factors",
        "update": "device.update",
        "single": "device.single_launch", "columns": "device.columns", "rates": "device.rates",
        "devices": "devices", "tables": "tables",
    }  # fmt: skip
    return {
        part: importlib.import_module(f"{package.__name__}.{name}") for part, name in names.items()
    }


def build(case, tuning, modules):
    """Compile one case as `launch` would; pointer arguments are not assumed to be aligned."""
    usual = case.kernel, {}, tuning.update_warps if case.kernel == "update" else tuning.warps
    module, own, warps = SIMPLE_KERNELS.get(case.kernel, usual)
    fn = getattr(modules[module], f"_{case.kernel}_kernel")
    blocks = {"update": tuning.update_block, "tiles": tuning.tile_block}
    param, grad, buffer = (DTYPES[dtype] for dtype in case.dtypes)
    constants = {
        "PARAM": param, "GRAD": grad, "BUFFER": buffer,
        "KIND": getattr(modules["tables"], MASTERS[case.master]), "ALIGNED": case.aligned,
        "HINTS": case.hinted, "WINDOWS": case.windows, "TABLES": case.tables, "SOFT": False,
        "WIDE": case.wide, "BLOCK": blocks.get(case.kernel, tuning.block), "UNROLL": tuning.unroll,
        "MERGE": tuning.merge, "UPDATE_BLOCK": tuning.update_block, **own,
    }  # fmt: skip
    storage = f"*{case.dtypes[0]}"
    typed = {n: ARGUMENTS[n].replace("*x", storage) for n in fn.arg_names if n in ARGUMENTS}
    constants = {name: constants[name] for name in fn.arg_names if name not in typed}
    # a size of 1 would become a constant, and every multiple of 16 a compilation of its own
    loose = [p.name for p in fn.params if typed.get(p.name) == "i32" and not p.do_not_specialize]
    assert not loose, f"specialised sizes: {loose}"
    signature = {name: typed.get(name, "constexpr") for name in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[case.target], options=options)


def run(folder, case):
    """Compile and check one case."""
    modules = load_kernels(folder)
    begin = time.perf_counter()
    try:
        row = modules["devices"].TABLE[case.target]
        tuning = dataclasses.replace(row.tuning, wide=case.wide)
        compiled = build(case, tuning, modules)
    except Exception as error:  # whatever the compiler raises is this case's failure
        return case, None, [f"does not compile: {str(error).splitlines()[-1]}"]
    seconds = time.perf_counter() - begin
    report = inspect(compiled, TARGETS[case.target].backend, seconds)
    return case, report, report.complaints(case, modules["devices"].RELEASES_WAIT_FROM)


def widths_text(widths):
    """Like ``8x16 1x4``: count x width in bytes."""
    return " ".join(f"{widths[width]}x{width}" for width in sorted(widths, reverse=True)) or "-"


def main():
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
    rows, taken = [], []
    # spawned: a fork would share the compiler's state
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
            work = functools.partial(run, options.kernels.resolve())
            for case, report, complaints in pool.map(work, chosen):
                failed += bool(complaints)
                if report is not None:
                    taken.append((case, report.registers))
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
    loose = find_loose(taken) if VERSION == PINNED and not options.quick else []
    for text in loose:
        print(f"FAIL loose budget: {text}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    print(f"Triton {triton.__version__}: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed or loose else 0


if __name__ == "__main__":
    sys.exit(main())

"""Counts of each kernel, for work as large as a program's: what `python -m bench.counts` prints."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from typing import Any

import torch

from bench.counts import h200
from bench.counts.bounds import bounds
from bench.counts.usual_path import usual_path
from support.machine_code import run_tool
from support.ptx.counting import SECTOR

# spans of a slice; 8192 entries each
SPANS = 16
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of one tensor."""

    name: str
    shape: tuple[int, ...]
    param: torch.dtype = F32
    grad: torch.dtype = F32
    momentum: torch.dtype = F32
    remainder: bool = False
    form: str = "two-launch"
    options: tuple[tuple[str, Any], ...] = ()


LONG = (SPANS * 8192,)
STOCHASTIC = (("rounding_key", 5),)
ROWS = (("granularity", "row"),)
QUICK = (
    Case("fp32", LONG),
    Case("bf16 split", LONG, BF16, BF16, remainder=True),
    Case("fp32, rows of 576", (64, 576), options=ROWS),
)
ALL = (
    *QUICK,
    Case("bf16 split, bf16 momentum", LONG, BF16, BF16, BF16, remainder=True),
    Case("bf16 stochastic, bf16 momentum", LONG, BF16, BF16, BF16, options=STOCHASTIC),
    Case("fp32, cdf", LONG, options=(("normalizer", "cdf"),)),
    *(
        Case(f"fp32, rows of {n}", (2**15 // n, n), options=ROWS)
        for n in (64, 256, 768, 1024, 2048)
    ),
    Case("bf16 split, rows of 768", (42, 768), BF16, BF16, remainder=True, options=ROWS),
    Case("fp32, one launch", LONG, form="single-launch"),
    Case("bf16 split, one launch", LONG, BF16, BF16, remainder=True, form="single-launch"),
)


def kind(opcode: str) -> str:
    """The class of a PTX instruction; "" for what costs nothing."""
    parts = opcode.split(".")
    root = parts[0]
    if root in ("mov", "createpolicy") or parts[:2] == ["ld", "param"]:
        return ""
    if root in ("ld", "st", "atom", "ldmatrix", "stmatrix"):
        return "shared" if "shared" in parts else "memory"
    if root in ("bra", "brx", "ret", "bar"):
        return "control"
    if root == "cvt":
        return "convert" if "f64" in parts else "other"
    if root in ("selp", "shfl"):
        return "other"
    if root in ("div", "sqrt") and parts[-1] == "f64":
        return "divide"
    return {"f64": "float64", "f32": "float32"}.get(parts[-1], "other")


def registers_of(compiled: Any) -> int:
    usage = run_tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None
    return int(found[1])


def versions() -> dict[str, str]:
    import numpy as np
    import triton

    found = {"triton": triton.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {**found, "target": "sm_90"}


def machine() -> Any:
    """The one of this process, behind Triton's dispatch."""
    os.environ.pop("TRITON_INTERPRET", None)
    from support.ptx.driver import Machine, Schedule

    made = Machine(Schedule(races=False), processors=4, profiled=True, traces=True)
    made.install()
    return made


def run(on: Any, case: Case) -> list[dict[str, Any]]:
    """A row for each launch of a case."""
    from bngd_triton.kernels import fused_step_

    torch.manual_seed(0)
    param = torch.randn(case.shape).to(case.param)
    grad = (torch.randn(case.shape) * 1e-3 + 1e-4).to(case.grad)
    momentum = torch.randn(case.shape).to(case.momentum)
    masters = [torch.zeros(case.shape, dtype=torch.int16)] if case.remainder else None
    tuning = dataclasses.replace(on.tuning, form=case.form)
    on.launched.clear()
    fused_step_(
        [param], [grad], [momentum], lr=1e-2, masters=masters, tuning=tuning,
        **dict(case.options),
    )  # fmt: skip
    return [row(case, launched, param.numel()) for launched in on.launched]


def row(case: Case, launched: Any, entries: int) -> dict[str, Any]:
    """What one launch took for each entry."""
    program, compiled = launched.program, launched.compiled
    count: Counter[str] = Counter()
    for block, threads in zip(program.kernel.blocks, launched.counts.threads.tolist()):
        for instruction in block.body:
            count[kind(instruction.opcode)] += threads
    del count[""]
    registers = registers_of(compiled)
    touched = list(launched.profile.touched.values())
    by_space = {
        space: [t for t in touched if t.site.space == space] for space in ("global", "shared")
    }
    made: dict[str, Any] = {
        "case": case.name,
        "kernel": launched.name.strip("_").removesuffix("_kernel"),
        "registers": registers,
        "programs": h200.programs(registers, compiled.metadata.num_warps),
        "shared": compiled.metadata.shared,
        "instructions": {k: round(v / entries, 3) for k, v in sorted(count.items())},
        "sector_bytes": round(SECTOR * sum(t.units for t in by_space["global"]) / entries, 3),
        "least_bytes": round(SECTOR * sum(t.least for t in by_space["global"]) / entries, 3),
        "once_bytes": round(SECTOR * sum(map(len, launched.profile.sectors)) / entries, 3),
        "conflicts": sum(t.units - t.least for t in by_space["shared"]),
    }
    made["instructions"]["all"] = round(sum(count.values()) / entries, 3)
    # the usual path is not the CDF's
    if case.form == "two-launch" and case.shape == LONG and "cdf" not in case.name:
        made["machine_code"] = machine_code(compiled, launched.name, entries / launched.grid[0])
    made["bounds"] = bounds(made, launched, entries)
    return made


def machine_code(compiled: Any, name: str, entries: float) -> dict[str, float]:
    """Instructions of the usual path for each entry: those of the loop, and all by unit."""
    from bngd_triton.kernels.devices import TABLE

    tuning = TABLE["sm_90"].tuning
    trip = tuning.update_block if "update" in name else tuning.block * tuning.unroll
    threads = 32 * compiled.metadata.num_warps
    path = usual_path(compiled)
    loop = {unit: n * threads / trip for unit, n in path.loop.items()}
    fixed = {unit: n * threads / entries for unit, n in path.fixed.items()}
    both = {unit: loop.get(unit, 0) + fixed.get(unit, 0) for unit in sorted({*loop, *fixed})}
    made = {"loop": sum(loop.values()), "all": sum(both.values()), **both}
    return {unit: round(n, 2) for unit, n in made.items()}

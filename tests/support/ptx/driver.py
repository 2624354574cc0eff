"""Triton's dispatch as for an H100, with a launch that runs the kernel's PTX on CPU tensors.

Only for a process in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.compiler import CompiledKernel

from bench import driver
from bngd_triton.kernels import devices, fused_step
from bngd_triton.kernels import launch as launches
from bngd_triton.kernels.devices import Tuning
from support.ptx.arithmetic import PtxError
from support.ptx.counting import Profile
from support.ptx.execute import Counts, Schedule, launch
from support.ptx.memory import Memory
from support.ptx.translate import Program

TENSORS = {torch.Tensor, torch.nn.Parameter}


@dataclass
class Launched:
    """One launch that was run."""

    program: Program
    compiled: Any
    grid: tuple[int, int, int]
    counts: Counts
    profile: Profile | None
    seconds: float

    @property
    def name(self) -> str:
        return self.program.kernel.name


@dataclass
class Machine:
    """In the place of a GPU; what it is told changes from launch to launch.

    Attributes:
        schedule: who goes on when.
        processors: how many the GPU has.
        profiled: whether to note what each instruction touches.
        traces: whether to keep which blocks ran.
        edit: what to make of a kernel's PTX before it is run.
        launched: what was run.
    """

    schedule: Schedule = field(default_factory=Schedule)
    processors: int = 1
    profiled: bool = False
    traces: bool = False
    edit: Callable[[str], str] = str
    launched: list[Launched] = field(default_factory=list)
    tuning: Tuning = devices.TABLE["sm_90"].tuning
    _programs: dict[str, Program] = field(default_factory=dict)

    def install(self) -> None:
        """Behind Triton, from here on."""
        driver.as_if_on_a_gpu()
        driver.install("cuda", self._launch)
        fused_step.tuning_for = lambda _: self.tuning
        launches.processors = lambda _: self.processors
        handles = CompiledKernel._init_handles

        def with_itself(compiled: Any) -> None:
            if compiled.module is None:
                handles(compiled)
                compiled.function = compiled

        CompiledKernel._init_handles = with_itself
        # `_tensors` need not look at what was there before
        gc.collect()
        gc.freeze()

    def program(self, compiled: Any) -> Program:
        ptx = self.edit(compiled.asm["ptx"])
        key = hashlib.sha256(ptx.encode()).hexdigest()
        if key not in self._programs:
            threads = compiled.metadata.num_warps * 32
            self._programs[key] = Program(ptx, compiled.metadata.shared, threads)
        return self._programs[key]

    def _launch(self, *arguments: Any) -> None:
        # 3.6 passes the kernel's arguments in line, 3.7 in a tuple
        begin = time.perf_counter()
        flat = arguments[:-1] + arguments[-1] if type(arguments[-1]) is tuple else arguments
        grid, compiled = flat[:3], flat[4]
        types = list(compiled.src.signature.values())
        params = [
            parameter(value, kind)
            for value, kind in zip(flat[len(flat) - len(types) :], types)
            if kind != "constexpr"
        ]
        program = self.program(compiled)
        # scratch memory, which none of the kernels asks for
        params += [np.uint64(0)] * (len(program.kernel.params) - len(params))
        profile = Profile() if self.profiled else None
        counts = launch(
            program, grid, params, memory_of_tensors(), self.schedule, profile=profile,
            traces=self.traces,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        self.launched.append(Launched(program, compiled, grid, counts, profile, seconds))


def parameter(value: Any, kind: str) -> np.uint64:
    """An argument as a kernel finds it."""
    if kind.startswith("*"):
        return np.uint64(value.data_ptr() if isinstance(value, torch.Tensor) else value)
    if kind not in ("i32", "i64", "u32", "u64"):
        raise PtxError(f"argument of {kind}")
    return np.uint64(int(value) & ((1 << int(kind[1:])) - 1))


def memory_of_tensors() -> Memory:
    """The storages of all CPU tensors there are."""
    memory = Memory()
    for item in [item for item in gc.get_objects() if type(item) in TENSORS]:
        if item.device.type == "cpu":
            storage = item.untyped_storage()
            name = f"{tuple(item.shape)} {item.dtype}"
            memory.add(storage.data_ptr(), storage.nbytes(), name, item.element_size())
    return memory

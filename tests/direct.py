"""Launch twice without a GPU, by a driver that notes what reaches its launch function.

    python tests/direct.py cuda|hip

Not in the interpreter, whose kernels are of another kind: `test_direct.py` runs this in a process
of its own. The launchers are Triton's; only what would call the driver's library is replaced.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bngd_triton.kernels import architectures, direct
from bngd_triton.kernels.prepared import FusedStep
from bngd_triton.members import functional_members, functional_pass
from bngd_triton.options import Options

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
CLASSES = {
    "cuda": ("triton.backends.nvidia.driver", "CudaLauncher"),
    "hip": ("triton.backends.amd.driver", "HIPLauncher"),
}
STREAM = 7777
CPU = torch.device("cpu")


class Driver:
    """As much of a driver as `JITFunction.run` and `CompiledKernel` use."""

    def __init__(self, backend: str) -> None:
        self.target = TARGETS[backend]
        self.launched: list[tuple[Any, ...]] = []
        module, name = CLASSES[backend]
        self.module = importlib.import_module(module)
        self.launcher_cls = getattr(self.module, name)
        self.utils = SimpleNamespace(
            launch=self.launch,
            build_signature_metadata=lambda types: tuple(types),
            load_binary=lambda name, *_: (f"module {name}", f"function {name}", 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        )

    def launch(self, *arguments: Any) -> None:
        # 3.6 passes the kernel's arguments in line, 3.7 in a tuple
        flat = arguments[:-1] + arguments[-1] if type(arguments[-1]) is tuple else arguments
        self.launched.append(flat)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return self.target


def without_hooks(arguments: tuple[Any, ...]) -> list[Any]:
    """Chains of no hooks and the metadata for them are as good as none."""
    empty = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    kinds = ("HookChain", "LazyDict")
    assert not any(getattr(hook, "calls", None) for hook in empty)
    return [None if type(one).__name__ in kinds else one for one in arguments]


def same(one: Any, other: Any) -> bool:
    """The same tensor, or equal things of one type."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return type(one) is type(other) and one == other


def main(backend: str) -> None:
    """Check every launch of a step in either form."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1"
    fake = Driver(backend)
    driver.set_active(fake)
    if hasattr(fake.module, "make_launcher"):
        # 3.6 compiles a launcher for each kernel
        mock.patch.object(fake.module, "make_launcher", return_value="").start()
        if hasattr(fake.module, "library_dirs"):
            mock.patch.object(fake.module, "library_dirs", return_value=[]).start()
        library = SimpleNamespace(launch=fake.launch)
        mock.patch.object(fake.module, "compile_module_from_src", return_value=library).start()
    if hasattr(fake.module, "PyKernelArg"):
        # 3.7 gets it from the library
        mock.patch.object(fake.module, "PyKernelArg", SimpleNamespace).start()
    dispatched = []
    run = JITFunction.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        dispatched.append(self)
        return run(self, *args, **kwargs)

    mock.patch.object(JITFunction, "run", noting).start()
    name = {"cuda": "sm_90", "hip": "gfx942"}[backend]
    usual = dataclasses.replace(architectures.TABLE[name].tuning, direct=True)

    # a segment and a tile, in two batches
    shapes = [(n, kind) for kind in (torch.float32, torch.bfloat16) for n in (5000, 16)]
    params, grads = ([torch.zeros(n, dtype=kind) for n, kind in shapes] for _ in range(2))
    options = [Options()]
    momenta = [torch.zeros(n) for n, _ in shapes]
    members = functional_members(params, grads, momenta, None, None, options[0])
    this = functional_pass(params, True, None, None, None)

    def step(prepared: FusedStep) -> tuple[list[tuple[Any, ...]], int]:
        fake.launched.clear()
        dispatched.clear()
        prepared.run(members, options, this)
        return list(fake.launched), len(dispatched)

    for form, launches in (("two-launch", 4), ("single-launch", 2)):
        tuning = dataclasses.replace(usual, form=form)
        prepared = FusedStep(members, options, tuning)
        ordinary, dispatches = step(prepared)
        assert (len(ordinary), dispatches) == (launches, launches), (len(ordinary), dispatches)
        quick, dispatches = step(prepared)
        assert (len(quick), dispatches) == (launches, 0), (len(quick), dispatches)
        for one, other in zip(ordinary, quick):
            assert len(one) == len(other)
            for at, pair in enumerate(zip(without_hooks(one), without_hooks(other))):
                assert same(*pair), (at, *pair)
            assert STREAM in other

        # the launch gets what it is given, not what it was given
        this.clocks[CPU] = this.clocks[CPU].clone()
        (first, *_), dispatches = step(prepared)
        assert dispatches == 0
        assert any(one is this.clocks[CPU] for one in first)

        calls = []
        knobs.runtime.launch_enter_hook.add(calls.append)
        assert step(prepared)[1] == launches, "a hook was passed over"
        knobs.runtime.launch_enter_hook.remove(calls.append)
        assert step(prepared)[1] == 0

        with mock.patch.object(knobs.runtime, "launch_exit_hook", calls.append):
            assert step(prepared)[1] == launches, "a hook in place of the chain was passed over"

        off = FusedStep(members, options, dataclasses.replace(tuning, direct=False))
        assert [step(off)[1] for _ in range(2)] == [launches] * 2
        with mock.patch.object(triton, "__version__", "3.99.0"):
            unknown = FusedStep(members, options, tuning)
            assert [step(unknown)[1] for _ in range(2)] == [launches] * 2

    check_constants(fake, members[:1], options, this, usual)


def check_constants(fake: Driver, members: Any, options: Any, this: Any, tuning: Any) -> None:
    """A constant that differs is another compilation: the handle does not fit."""
    prepared = FusedStep(members, options, tuning)
    prepared.run(members, options, this)
    (handle, *_) = prepared._devices[0].plan.batches[0].handles.values()
    assert isinstance(handle, direct.Handle)
    names = list(handle._kernel.arg_names)
    arguments = dict(zip(names, fake.launched[-2][-len(names) :]))
    chosen = {"num_warps": tuning.warps, "enable_fp_fusion": False}
    assert handle.fits(arguments, chosen)
    assert not handle.fits({**arguments, "ALIGNED": False}, chosen)
    assert not handle.fits({**arguments, "n_slices": 3}, chosen)
    assert not handle.fits(arguments, {**chosen, "num_warps": 8})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(sys.argv[1])
    print("launches agree")

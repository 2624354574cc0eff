"""A driver that launches nothing: Triton compiles and dispatches as for a GPU, without one.

Everything that runs on the host before the driver's library is Triton's own, or ours. Not for a
process in which TRITON_INTERPRET is set.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
CLASSES = {
    "cuda": ("triton.backends.nvidia.driver", "CudaLauncher"),
    "hip": ("triton.backends.amd.driver", "HIPLauncher"),
}
STREAM = 7777


class Driver:
    """As much of a driver as `JITFunction.run` and `CompiledKernel` use.

    Args:
        backend: "cuda" or "hip".
        launch: called in the place of the driver's launch.
    """

    def __init__(self, backend: str, launch: Callable[..., None]) -> None:
        self.target = TARGETS[backend]
        module, name = CLASSES[backend]
        self.module = importlib.import_module(module)
        self.launcher_cls = getattr(self.module, name)
        self.utils = SimpleNamespace(
            launch=launch,
            build_signature_metadata=lambda types: tuple(types),
            load_binary=lambda name, *_: (f"module {name}", f"function {name}", 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return self.target


def install(backend: str, launch: Callable[..., None]) -> Driver:
    """Have Triton use such a driver from here on."""
    fake = Driver(backend, launch)
    driver.set_active(fake)
    if hasattr(fake.module, "make_launcher"):
        # 3.6 compiles a launcher for each kernel
        mock.patch.object(fake.module, "make_launcher", return_value="").start()
        if hasattr(fake.module, "library_dirs"):
            mock.patch.object(fake.module, "library_dirs", return_value=[]).start()
        library = SimpleNamespace(launch=launch)
        mock.patch.object(fake.module, "compile_module_from_src", return_value=library).start()
    if hasattr(fake.module, "PyKernelArg"):
        # 3.7 gets it from the library
        mock.patch.object(fake.module, "PyKernelArg", SimpleNamespace).start()
    return fake


def as_if_on_a_gpu() -> None:
    """Have the kernels serve CPU tensors as an H100 would have it, up to the driver's launch."""
    from bngd_triton.kernels import devices, fused_step, support

    install("cuda", nothing)
    # of `support.why_not` alone: the kernels are compiled
    support.interpreting = lambda: True  # type: ignore[assignment]
    fused_step.tuning_for = lambda _: devices.TABLE["sm_90"].tuning  # type: ignore[assignment]


def nothing(*_: object, **__: object) -> None:
    """Stands in for the driver's launch."""

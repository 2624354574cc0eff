"""Launch again through the handle of a compiled kernel, without Triton's dispatch.

`kernel[grid](...)` binds and specialises its arguments and looks the compilation up by them before
it launches. Here a launch whose constants and sizes are those of the one before goes straight to
the compiled kernel, with the arguments that `JITFunction.run` would pass.

Off unless `Tuning.direct` asks for it: compared with `JITFunction.run` call by call, never run on a
GPU or timed. It relies on internals of Triton, read in the versions below; under any other, in the
interpreter, and while hooks are set, every launch is an ordinary one. Knobs that choose another
compilation (TRITON_DEBUG, instrumentation) are read when a plan's first step is launched.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from torch import Tensor

# whose JITFunction.run and CompiledKernel.run were read
VERSIONS = ("3.6.", "3.7.")
LAUNCHERS = ("triton.backends.nvidia.driver", "triton.backends.amd.driver")


class Handle:
    """A compiled kernel of one plan, and what it was compiled for.

    Args:
        kernel: the JITFunction.
        compiled: what its launch returned.
        arguments: of that launch, by name. Tensors may be others next time, of the same dtypes:
            no kernel here is specialised on their alignment.
        options: of the compilation, such as num_warps.
    """

    def __init__(
        self, kernel: Any, compiled: Any, arguments: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self._kernel = kernel
        # kept: what is collected is unloaded
        self._compiled = compiled
        self._in_order = itemgetter(*kernel.arg_names)
        self._others = itemgetter(*(n for n, v in arguments.items() if not isinstance(v, Tensor)))
        self._expected = self._others(arguments), options

    def fits(self, arguments: dict[str, Any], options: dict[str, Any]) -> bool:
        """Whether Triton would launch this compilation, and do nothing else."""
        return (self._others(arguments), options) == self._expected and not _observed(self._kernel)

    def launch(self, programs: int, arguments: dict[str, Any]) -> None:
        """Launch on the current stream of the current device, which must be the plan's."""
        from triton.runtime.driver import driver

        compiled = self._compiled
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        # grid, stream, function, metadata, then launch metadata and two hooks: none are set
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *self._in_order(arguments),
        )  # fmt: skip


def launch(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    options: dict[str, Any],
    handles: dict[int, Handle] | None,
) -> None:
    """``kernel[(programs,)](**arguments, **options)``, sooner where a handle fits.

    Args:
        kernel: what `triton.jit` made.
        programs: the grid.
        arguments: by name, all of them.
        options: of the compilation.
        handles: of one plan, hence of one device; filled here. None for an ordinary launch.
    """
    handle = None if handles is None else handles.get(id(kernel))
    if handle is not None and handle.fits(arguments, options):
        handle.launch(programs, arguments)
        return
    compiled = kernel[(programs,)](**arguments, **options)
    if handles is not None and _understood(kernel, compiled, arguments):
        handles[id(kernel)] = Handle(kernel, compiled, arguments, options)


def _understood(kernel: Any, compiled: Any, arguments: dict[str, Any]) -> bool:
    """Whether the compiled kernel is of the kind that `Handle.launch` knows how to call."""
    import triton
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    return (
        triton.__version__.startswith(VERSIONS)
        and type(kernel) is JITFunction
        and type(compiled) is CompiledKernel
        and type(compiled.run).__module__ in LAUNCHERS
        and set(kernel.arg_names) == set(arguments)
        and all(
            param.is_constexpr or param.do_not_specialize or param.do_not_specialize_on_alignment
            for param in kernel.params
        )
    )


def _observed(kernel: Any) -> bool:
    """Whether someone wants to see launches: a profiler such as Proton, or a debugger."""
    from triton import knobs

    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        kernel.pre_run_hooks
        # None, a chain of calls, or a function put in its place
        or any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
    )

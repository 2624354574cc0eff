"""Launch again through the handle of a compiled kernel, without Triton's dispatch.

`kernel[grid](...)` binds and specialises its arguments and looks the compilation up by them before
it launches: 12 to 23 us for these kernels, where the handle takes 1.3 to 3. The second launch of a
plan's kernel goes straight to what the first one compiled, with the arguments that
`JITFunction.run` would pass: constants and sizes are the plan's, tensors are of the same dtypes,
and no kernel here is specialised on their alignment.

It relies on internals of Triton, read in the versions below; under any other, in the interpreter,
and while hooks are set, every launch is an ordinary one. Knobs that choose another compilation
(TRITON_DEBUG, instrumentation) are read when a plan's first step is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# whose JITFunction.run and CompiledKernel.run were read
VERSIONS = ("3.6.", "3.7.")
LAUNCHERS = ("triton.backends.nvidia.driver", "triton.backends.amd.driver")


class Launch:
    """A kernel over the work of one plan, to be launched in every step.

    Args:
        kernel: what `triton.jit` made.
        programs: the grid.
        arguments: by name; those that stay, tensors where they are.
        reads: which arguments come from each step's inputs.
        direct: whether to go by the compiled kernel's handle where that is understood.
        options: of the compilation, such as num_warps.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        reads: Sequence[str],
        *,
        direct: bool,
        **options: Any,
    ) -> None:
        self._kernel = kernel
        self._programs = programs
        self._arguments = dict(arguments)
        self._reads = reads
        self._direct = direct
        self._options = {**options, "enable_fp_fusion": False}
        self._inputs: Any = None
        # kept: what is collected is unloaded
        self._compiled: Any = None
        # Triton's, imported with the first launch
        self._knobs: Any = None
        self._driver: Any = None
        # of what stays: they save the launcher two calls for each
        self._addresses = {n: v.data_ptr() for n, v in arguments.items() if isinstance(v, Tensor)}
        self._in_order: tuple[Any, ...] = ()

    def __call__(self, inputs: Any, **more: Any) -> None:
        """Launch on the current stream of the current device, which must be the plan's.

        Args:
            inputs: has what `reads` names.
            **more: other arguments that change from step to step.
        """
        if inputs is not self._inputs or more:
            self._arguments.update({name: getattr(inputs, name) for name in self._reads}, **more)
            for name in more:
                self._addresses.pop(name, None)
            self._inputs, self._in_order = inputs, ()
        kernel, compiled = self._kernel, self._compiled
        if compiled is None or self._observed():
            found = kernel[(self._programs,)](**self._arguments, **self._options)
            if self._direct and _understood(kernel, found, self._arguments):
                from triton import knobs
                from triton.runtime.driver import driver

                self._compiled, self._knobs, self._driver = found, knobs.runtime, driver
            return
        if not self._in_order:
            passed = {**self._arguments, **self._addresses}
            self._in_order = tuple(map(passed.__getitem__, kernel.arg_names))
        active = self._driver.active
        stream = active.get_current_stream(active.get_current_device())
        # grid, stream, function, metadata, then launch metadata and two hooks: none are set
        compiled.run(
            self._programs, 1, 1, stream, compiled.function, compiled.packed_metadata,
            None, None, None, *self._in_order,
        )  # fmt: skip

    def _observed(self) -> bool:
        """Whether someone wants to see launches: a profiler such as Proton, or a debugger."""
        enter, leave = self._knobs.launch_enter_hook, self._knobs.launch_exit_hook
        return bool(
            self._kernel.pre_run_hooks
            # None, a chain of calls, or a function put in its place
            or (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
        )


def _understood(kernel: Any, compiled: Any, arguments: dict[str, Any]) -> bool:
    """Whether the compiled kernel is of the kind that `Launch` knows how to call."""
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

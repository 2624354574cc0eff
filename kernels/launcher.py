"""Launch a kernel in every step, past Triton's dispatch from the second time on.

`kernel[grid](...)` binds and specialises its arguments and looks the compilation up by them before
it launches: 40 us, where Triton's own `compiled[grid](...)` of what the first launch compiled takes
5 (3.7.1, one shared core). It gets the arguments that dispatch would pass: constants and sizes are
the plan's, tensors are of the same dtypes, and no kernel here is specialised on their alignment.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Launch:
    """A kernel over the work of one plan.

    Args:
        kernel: what `triton.jit` made.
        programs: the grid.
        arguments: by name; those that stay, tensors where they are. What the kernel does not take
            is left out; what it takes besides comes from each step's inputs.
        **options: of the compilation, such as num_warps.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        **options: Any,
    ) -> None:
        self._kernel = kernel
        self._programs = programs
        self._arguments = {n: v for n, v in arguments.items() if n in kernel.arg_names}
        self._reads = [name for name in kernel.arg_names if name not in arguments]
        self._options = {**options, "enable_fp_fusion": False}
        self._inputs: Any = None
        # kept: what is collected is unloaded. None in the interpreter, which compiles nothing
        self._compiled: Any = None
        # of what stays: they save the launcher two calls for each
        self._addresses = {
            n: v.data_ptr() for n, v in self._arguments.items() if isinstance(v, Tensor)
        }
        self._in_order: tuple[Any, ...] = ()

    def __call__(self, inputs: Any, **more: Any) -> None:
        """Launch on the current stream of the current device, which must be the plan's.

        Args:
            inputs: has what else the kernel takes, by its names.
            **more: other arguments that change from step to step.
        """
        if inputs is not self._inputs or more:
            self._arguments.update({name: getattr(inputs, name) for name in self._reads}, **more)
            for name in more:
                self._addresses.pop(name, None)
            self._inputs, self._in_order = inputs, ()
        kernel = self._kernel
        if self._compiled is None:
            self._compiled = kernel[(self._programs,)](**self._arguments, **self._options)
            return
        if not self._in_order:
            passed = {**self._arguments, **self._addresses}
            self._in_order = tuple(map(passed.__getitem__, kernel.arg_names))
        self._compiled[(self._programs, 1, 1)](*self._in_order)

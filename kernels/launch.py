"""What a plan launches, made when it is first asked for: only then are the kernels imported."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors import on_device
from .devices import RELEASES_WAIT_FROM, processors, releases_wait
from .launcher import Launch
from .plan import Batch, Plan
from .support import interpreting
from .tables import MOMENTS_COLUMNS

FORMS = ("two-launch", "single-launch")


def form_for(plan: Plan, form: str | None = None) -> str:
    """Which form a step takes: "two-launch" or "single-launch".

    A global group that spans batches takes two launches, since all its statistics come before any
    update. Else `form` decides, then `Tuning.form`, then the device and the bytes of gradient: one
    launch from `Tuning.single_from` bytes on and below `Tuning.single_to`, where the device can.

    Raises:
        ValueError: no such form.
        RuntimeError: one launch is asked for, which would read what is not written yet.
    """
    tuning = plan.tuning
    fits = tuning.single_from <= plan.grad_bytes < tuning.single_to
    form = form or tuning.form or FORMS[fits and releases_wait(plan.device)]
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if plan.across_batches or form == FORMS[0]:
        return FORMS[0]
    if not releases_wait(plan.device):
        import triton

        least = ".".join(map(str, RELEASES_WAIT_FROM))
        raise RuntimeError(
            f"form {form!r} needs Triton {least} or later on AMD, where older ones raise a flag "
            f"before what it announces is written; got Triton {triton.__version__}: update it, or "
            f"use {FORMS[0]!r}"
        )
    return form


class LaunchInputs(NamedTuple):
    """What a step reads besides its plan, by the kernels' names; all on the plan's device.

    Attributes:
        options_ptr: float64 [groups, OPTION_COLUMNS], rows as `tables.encode` makes them.
        clocks_ptr: int64 [groups], the seeds of stochastic rounding.
        scale_ptr: float32 [1], a GradScaler's scale.
        found_ptr: float32 [1], what a GradScaler found.
    """

    options_ptr: Tensor
    clocks_ptr: Tensor
    scale_ptr: Tensor
    found_ptr: Tensor


def update(plan: Plan, inputs: LaunchInputs, form: str | None = None) -> None:
    """Run a step: for each batch a launch for its tiles, then two or one for its spans and chunks.

    Args:
        plan: the work, pointed at this step's gradients.
        inputs: options and seeds.
        form: see `form_for`.
    """
    form = form_for(plan, form)
    launches = plan.launches.get(form)
    with on_device(plan.device):
        if launches is None:
            made = _single(plan) if form == "single-launch" else _statistics(plan) + _updates(plan)
            # what the statistics read last is to be in L2 when the updates read it again
            launches = plan.launches[form] = _tiles(plan) + made
        for launch in launches:
            launch(inputs)


def statistics(plan: Plan, inputs: LaunchInputs) -> None:
    """Records and factors of all slices of a plan without tiles; nothing is updated."""
    with on_device(plan.device):
        for launch in _statistics(plan):
            launch(inputs)


def measure(plan: Plan, inputs: LaunchInputs) -> Tensor:
    """The first half of a step whose slices lie on several processes, for plans without tiles.

    Returns:
        float64 [slices, MOMENTS_COLUMNS], of the parts at hand. Least and greatest are
        meaningless where `Tuning.wide`.
    """
    shape = (len(plan.slices), MOMENTS_COLUMNS)
    moments = torch.empty(shape, dtype=torch.float64, device=plan.device)
    if "measure" not in plan.launches:
        plan.launches["measure"] = _statistics(plan, tables=True)
    with on_device(plan.device):
        for launch in plan.launches["measure"]:
            launch(inputs, moments_ptr=moments)
    return moments


def update_by(plan: Plan, inputs: LaunchInputs, moments: Tensor) -> None:
    """The second half: factors from the statistics of whole slices, and the updates.

    Args:
        plan: as for `measure`.
        inputs: likewise.
        moments: float64 [slices, MOMENTS_COLUMNS], contiguous.
    """
    if "update by" not in plan.launches:
        plan.launches["update by"] = [_publish(plan), *_updates(plan)]
    publish, *updates = plan.launches["update by"]
    with on_device(plan.device):
        publish(inputs, moments_ptr=moments)
        for launch in updates:
            launch(inputs)


def rates_launch(addresses: Tensor, table: Tensor) -> Launch:
    """What writes learning rates that are on a device to a table of options."""
    from .device.rates import _rates_kernel

    arguments = {"rates_ptr": addresses, "options_ptr": table}
    return Launch(_rates_kernel, len(table), arguments, num_warps=1)


def _tiles(plan: Plan) -> list[Launch]:
    """Rows and small tensors from start to end."""
    from .device.tiles import _tiles_kernel

    tuning = plan.tuning
    return _launches(plan, _tiles_kernel, "tiles_ptr", tuning.warps, BLOCK=tuning.tile_block)


def _statistics(plan: Plan, *, tables: bool = False) -> list[Launch]:
    """First launches: factors or statistics of the slices."""
    from .device.measure import _statistics_kernel

    return _launches(plan, _statistics_kernel, "spans_ptr", plan.tuning.warps, TABLES=tables)


def _updates(plan: Plan) -> list[Launch]:
    """Second launches: normalise and update the slices with spans."""
    from .device.update import _update_kernel

    tuning = plan.tuning
    return _launches(
        plan, _update_kernel, "chunks_ptr", tuning.update_warps, BLOCK=tuning.update_block
    )


def _launches(plan: Plan, kernel: Any, table: str, warps: int, **own: Any) -> list[Launch]:
    """One for each batch that has such work, with a program to each row of a table.

    Args:
        plan: the work.
        kernel: what does it.
        table: the kernel's name of the table.
        warps: of a program.
        **own: arguments that other kernels have otherwise.
    """
    launches = []
    for batch in plan.batches:
        arguments = {**_of_plan(plan), **_of_batch(batch), **own}
        programs = len(arguments[table])
        if programs:
            launches.append(Launch(kernel, programs, arguments, num_warps=warps))
    return launches


def _publish(plan: Plan) -> Launch:
    """What makes factors of statistics that were merged over processes."""
    from .device.factors import _publish_kernel

    return Launch(_publish_kernel, len(plan.slices), _of_plan(plan), num_warps=1)


def _single(plan: Plan) -> list[Launch]:
    """Statistics and updates of each batch in one launch."""
    from .device.single_launch import _single_kernel

    tuning = plan.tuning
    most = tuning.programs_per_sm * processors(plan.device)
    launches = []
    for batch in plan.batches:
        if not len(batch.spans):
            continue
        work = batch.work(tuning)
        arguments = {
            **_of_plan(plan),
            **_of_batch(batch),
            "items_ptr": work.items,
            "n_items": len(work.items),
            "counters_ptr": work.counters,
            "first_slice": work.first_slice,
            "n_slices": len(work.counters) - 1,
        }
        # warps of the first launch: the order of its sums depends on them, the update's bits do not
        programs = min(len(work.items), most)
        launches.append(Launch(_single_kernel, programs, arguments, num_warps=tuning.warps))
    return launches


def _of_plan(plan: Plan) -> dict[str, Any]:
    """Arguments of all kernels, by their names for them: those that a plan's batches share."""
    tuning = plan.tuning
    return {
        "slices_ptr": plan.slices,
        "n_slices": len(plan.slices),
        "partials_ptr": plan.partials,
        "n_partials": plan.partials.shape[1],
        # any table, where a step brings none of its own
        "moments_ptr": plan.partials,
        "arrived_ptr": plan.arrived,
        "factors_ptr": plan.factors,
        "HINTS": tuning.hints,
        "WIDE": tuning.wide,
        "WINDOWS": bool(plan.windows),
        "SOFT": interpreting(),
        "BLOCK": tuning.block,
        "UNROLL": tuning.unroll,
        "MERGE": tuning.merge,
        "UPDATE_BLOCK": tuning.update_block,
    }


def _of_batch(batch: Batch) -> dict[str, Any]:
    """The others: the work of a batch, where its tensors are, and of what kind."""
    return {
        "spans_ptr": batch.spans,
        "chunks_ptr": batch.chunks,
        "tiles_ptr": batch.tiles,
        "rows_ptr": batch.rows,
        "grad_ptrs": batch.grad_ptrs,
        "param_ptrs": batch.param_ptrs,
        "momentum_ptrs": batch.momentum_ptrs,
        "master_ptrs": batch.master_ptrs,
        "GRAD": _triton(batch.kind.grad),
        "PARAM": _triton(batch.kind.param),
        "BUFFER": _triton(batch.kind.momentum),
        "KIND": batch.kind.master,
        "ALIGNED": batch.kind.aligned,
    }


def _triton(dtype: torch.dtype) -> Any:
    """A dtype as Triton names it."""
    import triton.language as tl

    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return names[dtype]

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
        plan.launches["measure"] = _statistics(plan, TABLES=True)
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
    return Launch(_rates_kernel, len(table), arguments, (), num_warps=1)


def _tiles(plan: Plan) -> list[Launch]:
    """Rows and small tensors from start to end."""
    from .device.tiles import _tiles_kernel

    tuning = plan.tuning
    return [
        Launch(
            _tiles_kernel,
            batch.n_tiles,
            {
                "tiles_ptr": batch.tiles,
                "rows_ptr": batch.rows,
                **_tensors(plan, batch),
                "BLOCK": tuning.tile_block,
            },
            LaunchInputs._fields,
            num_warps=tuning.warps,
        )
        for batch in plan.batches
        if batch.n_tiles
    ]


def _statistics(plan: Plan, **constants: bool) -> list[Launch]:
    """First launches: factors or statistics of the slices."""
    from .device.measure import _statistics_kernel

    return [
        Launch(
            _statistics_kernel,
            batch.n_spans,
            {
                "spans_ptr": batch.spans,
                "moments_ptr": plan.partials,
                "grad_ptrs": batch.grad_ptrs,
                **_of_spans(plan, batch),
                "TABLES": False,
                **constants,
            },
            ("options_ptr", "scale_ptr", "found_ptr"),
            num_warps=plan.tuning.warps,
        )
        for batch in plan.batches
        if batch.n_spans
    ]


def _updates(plan: Plan) -> list[Launch]:
    """Second launches: normalise and update the slices with spans."""
    from .device.update import _update_kernel

    return [
        Launch(
            _update_kernel,
            batch.n_chunks,
            {
                "chunks_ptr": batch.chunks,
                "slices_ptr": plan.slices,
                "factors_ptr": plan.factors,
                **_tensors(plan, batch),
                "BLOCK": plan.tuning.update_block,
            },
            ("options_ptr", "clocks_ptr"),
            num_warps=plan.tuning.update_warps,
        )
        for batch in plan.batches
        if batch.n_chunks
    ]


def _publish(plan: Plan) -> Launch:
    """What makes factors of statistics that were merged over processes."""
    from .device.factors import _publish_kernel

    return Launch(
        _publish_kernel,
        len(plan.slices),
        {
            "n_slices": len(plan.slices),
            "slices_ptr": plan.slices,
            "factors_ptr": plan.factors,
            "WIDE": plan.tuning.wide,
            "WINDOWS": bool(plan.windows),
        },
        ("options_ptr", "scale_ptr", "found_ptr"),
        num_warps=1,
    )


def _single(plan: Plan) -> list[Launch]:
    """Statistics and updates of each batch in one launch."""
    from .device.single_launch import _single_kernel

    tuning = plan.tuning
    most = tuning.programs_per_sm * processors(plan.device)
    launches = []
    for batch in plan.batches:
        if not batch.n_spans:
            continue
        work = batch.work(tuning)
        arguments = {
            "items_ptr": work.items,
            "n_items": len(work.items),
            "counters_ptr": work.counters,
            "first_slice": work.first_slice,
            "n_slices": len(work.counters) - 1,
            **_of_spans(plan, batch),
            **_tensors(plan, batch),
            "UPDATE_BLOCK": tuning.update_block,
        }
        # warps of the first launch: the order of its sums depends on them, the update's bits do not
        launches.append(
            Launch(
                _single_kernel, min(len(work.items), most), arguments, LaunchInputs._fields,
                num_warps=tuning.warps,
            )
        )  # fmt: skip
    return launches


def _of_spans(plan: Plan, batch: Batch) -> dict[str, Any]:
    """What spans need in either form."""
    tuning = plan.tuning
    return {
        "slices_ptr": plan.slices,
        "partials_ptr": plan.partials,
        "n_partials": plan.partials.shape[1],
        "arrived_ptr": plan.arrived,
        "factors_ptr": plan.factors,
        "GRAD": _triton(batch.kind.grad),
        "ALIGNED": batch.kind.aligned,
        "HINTS": tuning.hints,
        "WIDE": tuning.wide,
        "WINDOWS": bool(plan.windows),
        "BLOCK": tuning.block,
        "UNROLL": tuning.unroll,
        "MERGE": tuning.merge,
    }


def _tensors(plan: Plan, batch: Batch) -> dict[str, Any]:
    """Where the tensors of a batch are, and of what kind."""
    return {
        "grad_ptrs": batch.grad_ptrs,
        "param_ptrs": batch.param_ptrs,
        "momentum_ptrs": batch.momentum_ptrs,
        "master_ptrs": batch.master_ptrs,
        "GRAD": _triton(batch.kind.grad),
        "PARAM": _triton(batch.kind.param),
        "BUFFER": _triton(batch.kind.momentum),
        "KIND": batch.kind.master,
        "ALIGNED": batch.kind.aligned,
        "HINTS": plan.tuning.hints,
        "WINDOWS": bool(plan.windows),
        "SOFT": interpreting(),
    }


def _triton(dtype: torch.dtype) -> Any:
    """A dtype as Triton names it."""
    import triton.language as tl

    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return names[dtype]

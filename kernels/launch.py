"""Launchers: the fused twin of `bngd_triton.reference`, and the only code that imports Triton."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import direct
from .architectures import dependent_launches, processors
from .plan import Batch, Plan
from .support import interpreting

FORMS = ("two-launch", "single-launch")


def form_for(plan: Plan, form: str | None = None) -> str:
    """Which form a step takes: "two-launch" or "single-launch".

    A global group that spans batches takes two launches, since all its statistics come before any
    update. Else `form` decides, then `Tuning.form`, then the default.

    Raises:
        ValueError: no such form.
    """
    # two launches until a measurement on a GPU says where one is faster
    form = form or plan.tuning.form or FORMS[0]
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return FORMS[0] if plan.spanning else form


class Inputs(NamedTuple):
    """What a step reads besides its plan; all on the plan's device.

    Attributes:
        options: float64 [groups, 16], rows as `option_table.encode` makes them.
        clocks: int64 [groups], the seeds of stochastic rounding.
        grad_scale: float32 [1].
        found_inf: float32 [1].
    """

    options: Tensor
    clocks: Tensor
    grad_scale: Tensor
    found_inf: Tensor


def launch(plan: Plan, inputs: Inputs, form: str | None = None) -> None:
    """Run a step: for each batch a launch for the statistics, then one for the updates; or one.

    Args:
        plan: the work, pointed at this step's gradients.
        inputs: options and seeds.
        form: see `form_for`.
    """
    with on_device(plan.device):
        if form_for(plan, form) == "single-launch":
            for batch in plan.batches:
                single(plan, batch, inputs)
            return
        early = early_updates(plan)
        for batch in plan.batches:
            statistics(plan, batch, inputs, early=early)
        for batch in plan.batches:
            update(plan, batch, inputs, early=early)


def early_updates(plan: Plan) -> bool:
    """Whether updates start before the statistics have ended (programmatic dependent launch).

    The first launch never starts early, so that no launch of one step overlaps the step before;
    and it lets the next launch start early only where that is an update of this step.
    """
    wanted = plan.tuning.pdl and dependent_launches(plan.device)
    return wanted and any(batch.n_chunks for batch in plan.batches)


def measure(plan: Plan, inputs: Inputs) -> Tensor:
    """The first half of a step whose segments lie on several processes, for plans without tiles.

    Returns:
        float64 [segments, 5]: entries, mean, sum of squared deviations, least, greatest, of the
        parts at hand. Least and greatest are meaningless where `Tuning.wide`.
    """
    tables = torch.empty(len(plan.segments), 5, dtype=torch.float64, device=plan.device)
    with on_device(plan.device):
        for batch in plan.batches:
            statistics(plan, batch, inputs, tables=tables)
    return tables


def move(plan: Plan, inputs: Inputs, tables: Tensor) -> None:
    """The second half: fold the statistics of whole segments, and update.

    Args:
        plan: as for `measure`.
        inputs: likewise.
        tables: float64 [segments, 5], contiguous.
    """
    from .publish import _publish_kernel

    with on_device(plan.device):
        _publish_kernel[(len(tables),)](
            tables_ptr=tables,
            n_segments=len(tables),
            segments_ptr=plan.segments,
            folds_ptr=plan.folds,
            options_ptr=inputs.options,
            scale_ptr=inputs.grad_scale,
            found_ptr=inputs.found_inf,
            WIDE=plan.tuning.wide,
            WINDOWS=bool(plan.windows),
            num_warps=1,
            enable_fp_fusion=False,
        )
        for batch in plan.batches:
            update(plan, batch, inputs)


def statistics(
    plan: Plan,
    batch: Batch,
    inputs: Inputs,
    *,
    early: bool = False,
    tables: Tensor | None = None,
) -> None:
    """First launch: statistics and folds of the segments, or tables; tiles from start to end."""
    from .statistics import _statistics_kernel

    programs = batch.n_slices + batch.n_tiles
    if programs == 0:
        return
    arguments = {
        "slices_ptr": batch.slices,
        "n_slices": batch.n_slices,
        "tiles_ptr": batch.tiles,
        **_statistics_arguments(plan, batch, inputs),
        "tables_ptr": plan.partials if tables is None else tables,
        "TABLES": tables is not None,
        "PDL": early,
    }
    _run(_statistics_kernel, programs, arguments, plan, batch, num_warps=plan.tuning.warps)


def _run(
    kernel: Any, programs: int, arguments: dict[str, Any], plan: Plan, batch: Batch, **options: Any
) -> None:
    handles = batch.handles if plan.tuning.direct else None
    direct.launch(kernel, programs, arguments, {**options, "enable_fp_fusion": False}, handles)


def _statistics_arguments(plan: Plan, batch: Batch, inputs: Inputs) -> dict[str, Any]:
    """What slices and tiles need in either form."""
    tuning = plan.tuning
    return {
        "rows_ptr": batch.rows,
        "segments_ptr": plan.segments,
        "partials_ptr": plan.partials,
        "n_partials": plan.partials.shape[1],
        "arrived_ptr": plan.arrived,
        "folds_ptr": plan.folds,
        "options_ptr": inputs.options,
        "clocks_ptr": inputs.clocks,
        "scale_ptr": inputs.grad_scale,
        "found_ptr": inputs.found_inf,
        **_tensors(plan, batch),
        "WIDE": tuning.wide,
        "TILES": batch.n_tiles > 0,
        "BLOCK": tuning.block,
        "UNROLL": tuning.unroll,
        "MERGE": tuning.merge,
        "TILE": tuning.tile,
    }


def update(plan: Plan, batch: Batch, inputs: Inputs, *, early: bool = False) -> None:
    """Second launch: normalise and move the segments."""
    from .update import _update_kernel

    if batch.n_chunks == 0:
        return
    arguments = {
        "chunks_ptr": batch.chunks,
        "segments_ptr": plan.segments,
        "folds_ptr": plan.folds,
        "options_ptr": inputs.options,
        "clocks_ptr": inputs.clocks,
        **_tensors(plan, batch),
        "BLOCK": plan.tuning.update_block,
        "PDL": early,
    }
    # an option of the CUDA backend alone
    more = {"launch_pdl": True} if early else {}
    warps = plan.tuning.update_warps
    _run(_update_kernel, batch.n_chunks, arguments, plan, batch, num_warps=warps, **more)


def single(plan: Plan, batch: Batch, inputs: Inputs) -> None:
    """The whole step of a batch in one launch."""
    from .single import _single_kernel

    tuning = plan.tuning
    work = batch.work(tuning)
    if len(work.items) == 0:
        return
    arguments = {
        "items_ptr": work.items,
        "n_items": len(work.items),
        "counters_ptr": work.counters,
        "first_segment": work.first_segment,
        "n_segments": len(work.counters) - 1,
        **_statistics_arguments(plan, batch, inputs),
        "UPDATE_BLOCK": tuning.update_block,
    }
    grid = min(len(work.items), tuning.programs_per_sm * processors(plan.device))
    # warps of the first launch: the order of its sums depends on them, the update's bits do not
    _run(_single_kernel, grid, arguments, plan, batch, num_warps=tuning.warps)


def standardize_columns(x: Tensor) -> Tensor:
    """``(x - mean) / std`` of every column of a row-major matrix; 0 in a constant column.

    Args:
        x: [n, c], contiguous, of a dtype and device that `why_not` serves; n and c at least 1.

    Returns:
        A tensor like `x`.
    """
    from .columns import _column_moments_kernel, _standardize_kernel

    n_rows, n_columns = x.shape
    # 32 columns are one 128-byte line of float32; 256 rows to a split keep the merge short
    columns, rows = 32, 64
    splits = min(64, -(-n_rows // 256))
    partials = torch.empty(3, splits, n_columns, dtype=torch.float64, device=x.device)
    out = torch.empty_like(x)
    across = -(-n_columns // columns)
    with on_device(x.device):
        _column_moments_kernel[(across, splits)](
            x_ptr=x,
            partials_ptr=partials,
            n_rows=n_rows,
            n_columns=n_columns,
            rows_per_split=-(-n_rows // splits),
            UNROLL=8,
            COLUMNS=columns,
            num_warps=1,
            enable_fp_fusion=False,
        )
        _standardize_kernel[(-(-n_rows // rows), across)](
            x_ptr=x,
            out_ptr=out,
            partials_ptr=partials,
            splits=splits,
            n_rows=n_rows,
            n_columns=n_columns,
            SOFT=interpreting(),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def _tensors(plan: Plan, batch: Batch) -> dict[str, Any]:
    """Where the tensors of a batch are, and of what kind."""
    import triton.language as tl

    names = {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
    }
    return {
        "grad_ptrs": batch.grad_ptrs,
        "param_ptrs": batch.param_ptrs,
        "momentum_ptrs": batch.momentum_ptrs,
        "master_ptrs": batch.master_ptrs,
        "GRAD": names[batch.kind.grad],
        "PARAM": names[batch.kind.param],
        "BUFFER": names[batch.kind.momentum],
        "KIND": batch.kind.master,
        "ALIGNED": batch.kind.aligned,
        "WINDOWS": bool(plan.windows),
        "SOFT": interpreting(),
    }


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' device is."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)  # type: ignore[no-any-return]

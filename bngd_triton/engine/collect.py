"""What each group asks of a step; what a step cannot do is refused, before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_step, check_tensors, check_unpartitioned, is_served, nonfinite_somewhere
from ..kernels.plan import capturing
from ..kernels.support import why_not, why_not_memory
from ..options import Options
from ..records import StepInputs
from ..state import KEYS, MOMENTUM, WINDOW
from ..state_dicts import named_parameters, parameter_names
from ..tensors import Written, is_sharded, local

if TYPE_CHECKING:
    # torch may be built without torch.distributed
    from ..sharding.exchange import Share


class Work(NamedTuple):
    """What one group asks of a step: its parameters that have a gradient, or a window to close."""

    params: list[Tensor]
    # as this process holds them
    grads: list[Tensor]
    names: list[str]
    # for each parameter, whether the kernels serve it
    fused: list[bool]
    # and which part of which slices is here; None where nobody holds another part
    shares: list[Share | None]
    # parameters without a gradient whose window is open, or may be; those whose window ends now
    waiting: list[Tensor]
    ending: list[Tensor]


def refuse_capture(optimizer: Any) -> None:
    """A CUDA graph can hold only a step that repeats the one before it."""
    captured = [
        (name, param)
        for _, name, param in named_parameters(optimizer.param_groups)
        if capturing(param.device)
    ]
    if captured and any(group["accumulation_steps"] > 1 for group in optimizer.param_groups):
        raise RuntimeError(
            "a step with accumulation_steps > 1 cannot be captured in a CUDA graph: the host "
            "counts its micro-batches; capture with accumulation_steps=1"
        )
    for name, param in captured:
        if param.grad is None:
            raise RuntimeError(
                f"{name} has no gradient while a CUDA graph is being captured, and would not "
                "move in any replay; give it one, or leave it out of the optimizer"
            )
    if captured:
        raise RuntimeError(
            "a step captured in a CUDA graph must repeat the one before it (same tensors, "
            "layouts and granularity, kernels only); run one whole iteration on the same "
            "stream first, and keep its gradients (zero_grad(set_to_none=False))"
        )


def check_replayable(layouts: Sequence[dict[str, Any]], options: Sequence[Options]) -> None:
    """Refuse options that a captured step cannot follow.

    Args:
        layouts: of the groups, when the step was laid out.
        options: of the groups now.
    """
    if len(layouts) != len(options):
        raise RuntimeError(
            f"{len(layouts)} groups were captured, there are {len(options)} now; take a step and "
            "capture again"
        )
    for index, (old, new) in enumerate(zip(layouts, options)):
        changed = [name for name, now in new.layout.items() if old[name] != now]
        if new.nonfinite == "raise":
            changed.append("nonfinite='raise'")
        if changed:
            raise RuntimeError(
                f"the replay of a CUDA graph cannot follow {', '.join(changed)} of group {index}, "
                "which the host decides by; set it back, or take a step and capture again"
            )


def gather(
    optimizer: Any, index: int, options: Options, inputs: StepInputs, closed: Collection[Tensor]
) -> Work:
    """What a group asks of this step, checked in full before anything changes."""
    group, state = optimizer.param_groups[index], optimizer.state
    every = parameter_names(group, index)
    check_unpartitioned(group["params"], every)
    params = [param for param in group["params"] if param.grad is not None]
    names = [name for param, name in zip(group["params"], every) if param.grad is not None]
    parts, grads = _local_parts(params, names)
    if options.granularity == "global" and options.accumulation_steps > 1:
        _check_complete(group["params"], every)
    shares = _shares(params, grads, names, options)
    # who looks for an inf alone would leave the others waiting: `ShardedStep` looks with them, and
    # below are looked at the rows that nobody else has a part of, but others have rows beside
    alone = [share is None and not is_sharded(p) for share, p in zip(shares, params)]
    looked = inputs.found_inf is None
    finite = [looked and one for one in alone]
    fused = check_group(optimizer, params, parts, grads, names, options, finite=finite)
    if options.nonfinite == "raise" and looked:
        _refuse_nonfinite(
            [(p, grad, name) for p, grad, name, share in zip(params, grads, names, shares)
             if share is None and is_sharded(p)]
        )  # fmt: skip
    waiting = []
    if options.accumulation_steps > 1:
        idle = [p for p in group["params"] if p.grad is None and p not in closed]
        waiting = [p for p in idle if WINDOW in state.get(p, ()) and p.numel()]
    ending = waiting if inputs.closing[index] else []
    return Work(params, grads, names, fused, shares, waiting, ending)


def copy_shared_gradients(work: Sequence[Work], state: dict[Tensor, Any]) -> None:
    """Copy gradients that lie where the step writes, of whatever group."""
    params = [param for part in work for param in (*part.params, *part.ending)]
    entries = [state.get(param, {}) for param in params]
    held = [entry[key] for entry in entries for key in KEYS if key in entry]
    written = Written(map(local, [*params, *held]))
    for part in work:
        part.grads[:] = written.apart(part.grads)


def check_scaled(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a GradScaler where it cannot tell all ranks what one has found."""
    named = [(name, param) for _, name, param in named_parameters(groups) if param.grad is not None]
    if any(is_sharded(param) for _, param in named):
        from ..sharding.placements import check_found_inf

        check_found_inf(named)


def _refuse_nonfinite(sharded: Sequence[tuple[Tensor, Tensor, str]]) -> None:
    """On every rank where one has an inf or a NaN: of parameters, their gradients' parts, names."""
    if not sharded:
        return
    from ..sharding.placements import everywhere

    flags = [grad.isfinite().all() for _, grad, _ in sharded]
    for finite, (_, _, name) in zip(everywhere([p for p, _, _ in sharded], flags), sharded):
        if not finite:
            raise nonfinite_somewhere(name)


def _local_parts(
    params: Sequence[Tensor], names: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """What this process holds of parameters and their gradients."""
    parts, grads = [], []
    for param, name in zip(params, names):
        part, grad = param, param.grad
        assert grad is not None
        if is_sharded(param) or is_sharded(grad):
            from ..sharding.placements import local_parts

            part, grad = local_parts(name, param, grad)
        parts.append(part)
        grads.append(grad)
    return parts, grads


def _shares(
    params: Sequence[Tensor], grads: Sequence[Tensor], names: Sequence[str], options: Options
) -> list[Share | None]:
    """Which part of which slices is here; None for slices of which nobody holds another part."""
    if not any(map(is_sharded, params)):
        return [None] * len(params)
    from ..sharding.placements import share_of

    found = [
        share_of(name, param, grad, options.granularity)
        for name, param, grad in zip(names, params, grads)
    ]
    together = options.granularity == "global" and any(share.groups for share in found)
    if together and options.accumulation_steps > 1:
        raise NotImplementedError(
            "granularity='global' with accumulation_steps > 1 is not supported for sharded "
            "parameters; use granularity='tensor' or 'row'"
        )
    return [share if share.groups or together else None for share in found]


def check_group(
    optimizer: Any,
    params: Sequence[Tensor],
    parts: Sequence[Tensor],
    grads: Sequence[Tensor],
    names: Sequence[str],
    options: Options,
    *,
    finite: Sequence[bool],
) -> list[bool]:
    """Refuse what a step cannot do with parameters of one group; else say who the kernels serve.

    Args:
        optimizer: its state and its choice of implementation.
        params: of one group.
        parts: what this process holds of them.
        grads: of the parts.
        names: of the parameters.
        options: the group's.
        finite: of which parameters ``nonfinite="raise"`` looks for an inf or NaN; an overflow is
            no error where a GradScaler has seen it, and other processes may hold parts of a slice.
    """
    state = optimizer.state
    buffers = [
        local(state[p][MOMENTUM]) if MOMENTUM in state.get(p, ()) else part
        for p, part in zip(params, parts)
    ]
    check_tensors(parts, grads, buffers, buffered=options.buffered, names=names)
    check_step(parts, grads, options, names=names, finite=finite)
    fused = serve(optimizer.fused, params, names, options)
    # a float32 parameter may have a float64 gradient, or state from a float64 checkpoint
    for i, (param, grad) in enumerate(zip(params, grads)):
        if not fused[i]:
            continue
        reason = why_not(grad) or _why_not_state(state.get(param, {}), options)
        if reason and optimizer.fused:
            raise RuntimeError(
                f"fused=True cannot serve {names[i]} with the gradient or state it has: {reason}"
            )
        fused[i] = reason is None
    if options.granularity == "global":
        fused = [all(fused)] * len(fused)
    return fused


def _why_not_state(entry: dict[str, Any], options: Options) -> str | None:
    """Why the kernels cannot write a parameter's state."""
    held = {key: local(entry[key]) for key in KEYS if key in entry}
    reasons = [_why_not_written(held[MOMENTUM])] if options.buffered and MOMENTUM in held else []
    # remainders and windows are integers
    reasons += map(why_not_memory, held.values())
    return next(filter(None, reasons), None)


def _why_not_written(tensor: Tensor) -> str | None:
    """`why_not` for a tensor that is written: a gradient's negative bit is resolved in a copy."""
    if tensor.is_neg():
        return "its negative bit is not in its memory; use fused=None or fused=False, or clone it"
    return why_not(tensor)


def _check_complete(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse a global group whose slice would change within a window."""
    missing = [name for param, name in zip(params, names) if param.grad is None]
    if missing and len(missing) < len(params):
        raise RuntimeError(
            "granularity='global' with accumulation_steps > 1 needs a gradient of every parameter "
            f"of the group in every micro-batch, {missing[0]} has none; put such parameters in "
            "another group, or use granularity='tensor'"
        )


def expect(
    fused: bool | None, params: Sequence[Tensor], names: Sequence[str], options: Options
) -> list[bool]:
    """As `serve`, before there are gradients.

    A parameter that may never have one is not refused: which a step would refuse by its kind, which
    has no shape yet, or which is frozen.
    """
    with torch.no_grad():
        looked_at = [
            is_served(param) and (param.requires_grad or not why_not(local(param)))
            for param in params
        ]
    those, their_names = list(compress(params, looked_at)), list(compress(names, looked_at))
    served = iter(serve(fused, those, their_names, options))
    return [looked and next(served) for looked in looked_at]


def serve(
    fused: bool | None, params: Sequence[Tensor], names: Sequence[str], options: Options
) -> list[bool]:
    """Which parameters go to the kernels; an error where ``fused=True`` cannot be kept."""
    if fused is False:
        return [False] * len(params)
    with torch.no_grad():
        reasons = [_why_not_written(local(param)) for param in params]
    for name, reason in zip(names, reasons):
        if fused and reason:
            raise RuntimeError(f"fused=True cannot serve {name}: {reason}")
    if fused is None:
        # in the interpreter kernels are for tests: they are slower than the reference
        reasons = [
            reason or (None if param.device.type != "cpu" else "cpu")
            for param, reason in zip(params, reasons)
        ]
    if options.granularity == "global" and any(reasons):
        return [False] * len(params)
    return [reason is None for reason in reasons]

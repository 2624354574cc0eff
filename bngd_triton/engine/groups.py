"""Groups of parameters that join an optimizer: what is refused, and what moves to flat buffers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn.parameter import is_lazy

from ..checks import check_step, check_whole
from ..flat_buffers import flatten_, why_not_flat
from ..options import Options
from ..state_dicts import parameter_names
from .collect import expect


def check_joining(fused: bool | None, group: dict[str, Any], index: int) -> None:
    """Refuse options and parameters that no step could serve.

    Args:
        fused: the optimizer's choice of implementation.
        group: with every option.
        index: its place.

    Raises:
        ValueError: an option is out of bounds, or a parameter is there twice.
        TypeError: a parameter is sparse, complex or not of a supported dtype.
        RuntimeError: ``fused=True`` cannot be served.
    """
    options, params = Options.of(group), group["params"]
    names = parameter_names(group, index)
    if len(set(map(id, params))) < len(params):
        raise ValueError(f"a parameter is twice in group {index}; list every one once")
    for name, param in zip(names, params):
        check_whole(name, param)
    check_step([param for param in params if param.requires_grad], [], options)
    expect(fused, params, names, options)


def flatten_groups(
    flatten: bool | None, fused: bool | None, groups: Iterable[tuple[int, dict[str, Any]]]
) -> None:
    """Move the parameters that go to the kernels; all or, if one must stay, none.

    Args:
        flatten: False moves none; True is an error for a parameter that cannot move.
        fused: the optimizer's choice of implementation.
        groups: with their places.

    Raises:
        RuntimeError: ``flatten=True`` cannot be served; says why.
    """
    if flatten is False:
        return
    moving = []
    for index, group in groups:
        names, params = parameter_names(group, index), group["params"]
        served = expect(fused, params, names, Options.of(group))
        moving.append([param for param, by_kernels in zip(params, served) if by_kernels])
        for name, param, by_kernels in zip(names, params, served):
            if not flatten or not param.requires_grad:
                continue
            reason = "it has no shape before one forward pass" if is_lazy(param) else None
            reason = reason or (None if by_kernels else "the kernels do not serve it")
            reason = reason or why_not_flat(param)
            if reason:
                raise RuntimeError(
                    f"flatten=True cannot move {name}: {reason}; "
                    "use flatten=None to leave such parameters where they are"
                )
    for params in moving:
        flatten_(params)

"""What a checkpoint holds, and how it is checked and put in place.

State is one float tensor per parameter, ``momentum_buffer``, of the parameter's shape: a moving
average of normalised gradients, not of gradients as in torch.optim.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .buffers import momentum_like
from .checks import FLOAT_DTYPES, Options

BUFFER = "momentum_buffer"


def parameter_names(group: dict[str, Any], index: int) -> list[str]:
    """The parameters' own names where group number `index` has them, else their places."""
    named = group.get("param_names")
    if named is not None:
        return list(named)
    return [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]


def check_state_dict(optimizer: Optimizer, incoming: dict[str, Any]) -> None:
    """Refuse a checkpoint that is another optimizer's or does not fit.

    Raises:
        ValueError: says what is wrong; a differing number of groups or parameters is left to
            torch's loader.
    """
    groups = incoming["param_groups"]
    for i, group in enumerate(groups):
        if "granularity" not in group:
            raise ValueError(
                f"param_groups[{i}] has no 'granularity': this is not a BNGD checkpoint "
                "(momentum of other optimizers is in other units; start without it)"
            )
        Options.of({**{field.name: field.default for field in fields(Options)}, **group})
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return
    for key, param, name in _pair(optimizer, groups):
        value = incoming["state"].get(key, {}).get(BUFFER)
        if value is None:
            continue
        if value.shape != param.shape:
            raise ValueError(
                f"{BUFFER} of {name} has shape {tuple(value.shape)}, "
                f"the parameter {tuple(param.shape)}"
            )
        if value.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{BUFFER} of {name} has dtype {value.dtype}, not a float")


def place_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Copy a checkpoint's momentum into buffers of its dtype beside the parameters."""
    pairs = [
        (param, saved["state"][key][BUFFER])
        for key, param, _ in _pair(optimizer, saved["param_groups"])
        if BUFFER in saved["state"].get(key, {})
    ]
    buffers = momentum_like([param for param, _ in pairs], [value.dtype for _, value in pairs])
    for (param, value), buffer in zip(pairs, buffers):
        buffer.copy_(value)
        optimizer.state[param][BUFFER] = buffer


def _pair(optimizer: Optimizer, groups: list[dict[str, Any]]) -> list[tuple[Any, Tensor, str]]:
    """The checkpoint's keys beside the parameters they stand for, and their names."""
    return [
        (key, param, name)
        for index, (old, new) in enumerate(zip(groups, optimizer.param_groups))
        for key, param, name in zip(old["params"], new["params"], parameter_names(new, index))
    ]

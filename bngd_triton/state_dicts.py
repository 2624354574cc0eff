"""What a checkpoint holds, and how it is checked and put in place.

State is tensors of a parameter's shape: ``momentum_buffer``, a moving average of normalised
gradients, not of gradients as in torch.optim; ``master_remainder`` (int16) or ``master`` (float32)
for parameters narrower than float32; and ``window`` (uint8, one entry per slice) for micro-batches.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .checks import FLOAT_DTYPES
from .flat_buffers import zeros_like
from .options import Options, on_a_device
from .records import NARROW, slices_of
from .state import KEYS, MASTER, MOMENTUM, REMAINDER, WINDOW, as_state, as_window
from .tensors import is_sharded, local

# a group's place in its window of micro-batches, and how often it has rounded stochastically:
# always there, since torch.distributed.checkpoint loads only the keys that a group has
COUNTS = ("micro_step", "rounding_steps")


def parameter_names(group: dict[str, Any], index: int) -> list[str]:
    """The parameters' own names where group number `index` has them, else their places."""
    named = group.get("param_names")
    if named is not None:
        return list(named)
    return [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]


def named_parameters(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str, Tensor]]:
    """Every parameter, with its group's number and its name."""
    for index, group in enumerate(groups):
        for name, param in zip(parameter_names(group, index), group["params"]):
            yield index, name, param


def names_in(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """The model's name of each parameter that it has, by the optimizer's."""
    names = {id(param): name for name, param in model.named_parameters()}
    return {
        own: names[id(param)]
        for _, own, param in named_parameters(optimizer.param_groups)
        if id(param) in names
    }


def _check_state_dict(optimizer: Optimizer, incoming: dict[str, Any]) -> None:
    """Refuse a checkpoint that is another optimizer's or does not fit.

    Raises:
        ValueError: says what is wrong; a differing number of groups or parameters is left to
            torch's loader.
    """
    groups, state = incoming.get("param_groups"), incoming.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise ValueError(
            "a state dict has a list 'param_groups' and a dict 'state', got a dict of "
            f"{', '.join(map(repr, incoming)) or 'nothing'}; load what state_dict() returned"
        )
    for i, group in enumerate(groups):
        if "granularity" not in group:
            raise ValueError(
                f"param_groups[{i}] has no 'granularity': this is not a BNGD checkpoint "
                "(momentum of other optimizers is in other units; start without it)"
            )
        for key in COUNTS:
            count = group.get(key, 0)
            if type(count) is not int or count < 0:
                raise ValueError(f"{key} of param_groups[{i}] must be a count, got {count!r}")
    groups = _with_options(groups, optimizer.param_groups)
    options = [Options.of({**optimizer.defaults, **group}) for group in groups]
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return
    for index, (old, new) in enumerate(zip(groups, optimizer.param_groups)):
        for key, param, name in _pair(old, new, index):
            entry = state.get(key, {})
            if not isinstance(entry, dict):
                raise ValueError(f"the state of {name} is a {type(entry).__name__}, not a dict")
            if not entry.keys() & set(KEYS):
                continue
            if is_lazy(param):
                raise ValueError(
                    f"{name} has no shape yet, but the checkpoint has its state; run one forward "
                    "pass before loading"
                )
            _check_entry(entry, param, name, options[index])


def _with_options(
    groups: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A checkpoint's groups; options that they lack are those of the optimizer's own groups."""
    if len(groups) != len(own):
        # torch's loader refuses them
        return list(groups)
    names = [field.name for field in fields(Options)]
    return [{**{name: mine[name] for name in names}, **group} for group, mine in zip(groups, own)]


def _of_others(state: dict[Any, Any]) -> dict[Any, Any]:
    """A checkpoint's state but for what is ours; entries that hold nothing else are left out."""
    rest: dict[Any, Any] = {}
    for key, entry in state.items():
        if not isinstance(entry, dict):
            rest[key] = entry
        elif others := {name: value for name, value in entry.items() if name not in KEYS}:
            rest[key] = others
    return rest


def _check_entry(entry: dict[str, Any], param: Tensor, name: str, options: Options) -> None:
    """Refuse a parameter's state that is of another kind."""
    slices = (slices_of(param.shape, options.granularity),)
    expected: dict[str, tuple[Sequence[int], Sequence[torch.dtype]]] = {
        MOMENTUM: (param.shape, FLOAT_DTYPES),
        REMAINDER: (param.shape, (torch.int16,)),
        MASTER: (param.shape, (torch.float32,)),
        WINDOW: (slices, (torch.uint8,)),
    }
    for key, (shape, dtypes) in expected.items():
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} of {name} is a {type(value).__name__}, not a tensor")
        if value.layout is not torch.strided:
            raise ValueError(f"{key} of {name} is {value.layout}; state is dense: use .to_dense()")
        if value.device.type == "meta" and param.device.type != "meta":
            raise ValueError(
                f"{key} of {name} is on the meta device and has no values; load the checkpoint's"
            )
        if value.shape != torch.Size(shape):
            whole = "the parameter" if key != WINDOW else "its slices"
            raise ValueError(
                f"{key} of {name} has shape {tuple(value.shape)}, {whole} {tuple(shape)}"
            )
        if value.dtype not in dtypes:
            allowed = ", ".join(map(str, dtypes))
            raise ValueError(f"{key} of {name} has dtype {value.dtype}, expected {allowed}")
    unlike = {REMAINDER: torch.bfloat16, MASTER: torch.float16}
    for key, dtype in unlike.items():
        if key in entry and param.dtype in NARROW and param.dtype is not dtype:
            raise ValueError(
                f"{name} is {param.dtype}, but the checkpoint holds a {key}, which belongs to "
                f"{dtype} parameters; load it into a model of that dtype"
            )


def asks_for_state(optimizer: Optimizer) -> bool:
    """Whether `torch.distributed.checkpoint` steps an optimizer only to make its state.

    It does so where there is none, with ``lr`` 0 and gradients of zeros, before it saves or loads.
    That must not count as a micro-batch or as a rounding. A first micro-batch under a warm-up, of a
    loss that is 0, brings the very same and must count: what tells them apart is who calls.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    if optimizer.state or any(on_a_device(lr) or lr != 0 for lr in rates):
        return False
    return any(
        str(frame.f_globals.get("__name__")).startswith("torch.distributed.checkpoint.")
        for frame, _ in traceback.walk_stack(sys._getframe())
    )


@contextlib.contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """While torch's loader runs: refuse what does not fit, and keep our state from its casts.

    Whatever fails, a hook of the user's included, nothing has changed.
    """
    saved: dict[str, Any] = {}
    # torch's loader makes groups and state anew: those that were are whole
    before = dict(optimizer.__dict__)

    # runs after the user's own hooks
    def set_aside(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
        _check_state_dict(optimizer, incoming)
        saved.update(incoming)
        groups = _with_options(incoming["param_groups"], optimizer.param_groups)
        return {**incoming, "param_groups": groups, "state": _of_others(incoming["state"])}

    def place(_: Optimizer) -> None:
        _place_state(optimizer, saved)

    handles = [
        optimizer.register_load_state_dict_pre_hook(set_aside),
        optimizer.register_load_state_dict_post_hook(place, prepend=True),
    ]
    try:
        yield
    except BaseException:
        optimizer.__dict__.update(before)
        raise
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _place_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Copy a checkpoint's tensors, in their dtypes, beside the parameters."""
    found = [
        (key, param, saved["state"][number][key], new)
        for index, (old, new) in enumerate(zip(saved["param_groups"], optimizer.param_groups))
        for number, param, _ in _pair(old, new, index)
        for key in KEYS
        if saved["state"].get(number, {}).get(key) is not None
    ]
    flat = [(local(param), value.dtype) for key, param, value, _ in found if key != WINDOW]
    made = iter(zeros_like([part for part, _ in flat], [dtype for _, dtype in flat]))
    for key, param, value, group in found:
        if key == WINDOW:
            options = Options.of(group)
            rows = slices_of(local(param).shape, options.granularity)
            part = torch.zeros(rows, dtype=value.dtype, device=param.device)
            place = as_window(param, part, options)
        else:
            part = next(made)
            place = as_state(param, part)
        part.copy_(_part_of(value, place))
        optimizer.state[param][key] = place


def _part_of(value: Tensor, place: Tensor) -> Tensor:
    """What belongs here of a checkpoint's tensor."""
    if not is_sharded(place) and not is_sharded(value):
        return value
    from .sharding.placements import local_value

    return local_value(value, place)


def _pair(old: dict[str, Any], new: dict[str, Any], index: int) -> list[tuple[Any, Tensor, str]]:
    """A group's keys in the checkpoint beside the parameters they stand for, and their names."""
    return list(zip(old["params"], new["params"], parameter_names(new, index)))

"""The float32 weights of a model whose parameters are bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .eager.rounding import master_dtype, store_, widen
from .flat_buffers import zeros_like
from .optimizer import BNGD
from .options import Options
from .state import as_state, master_key
from .tensors import is_sharded, local


def check_pair(model: nn.Module, optimizer: BNGD) -> None:
    """Refuse what is not a module and the optimizer of its parameters.

    Raises:
        TypeError: other kinds of objects.
        ValueError: no parameter of the model is the optimizer's.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, BNGD):
        found = f"{type(model).__name__} and {type(optimizer).__name__}"
        raise TypeError(f"need a torch.nn.Module and a BNGD, in this order; got {found}")
    known = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if not any(id(param) in known for param in model.parameters()):
        raise ValueError(
            "the optimizer has none of the model's parameters; give the model that it was made for"
        )


@torch.no_grad()
def fp32_state_dict(model: nn.Module, optimizer: BNGD) -> dict[str, Any]:
    """`model.state_dict` with every parameter that has a master in float32.

    Args:
        model: the model.
        optimizer: its optimizer. Parameters whose group has another ``master_weights`` than
            ``"split"`` keep their dtype; those that have had no gradient yet are their own masters.

    Returns:
        A new dict; float32 tensors of the shapes of the parameters (for a DTensor with its
        placements), all other entries as `model.state_dict` has them.

    Raises:
        TypeError: the arguments are not a module and a `BNGD`.
        ValueError: no parameter of the model is the optimizer's.
    """
    check_pair(model, optimizer)
    found = dict(model.state_dict())
    for name, param, _ in _with_masters(model, optimizer):
        master = optimizer.state.get(param, {}).get(master_key(param))
        wide = widen(local(param), None if master is None else local(master)).float()
        found[name] = as_state(param, wide)
    return found


@torch.no_grad()
def load_fp32_state_dict(
    model: nn.Module, optimizer: BNGD, state_dict: Mapping[str, Any], strict: bool = True
) -> None:
    """Load what `fp32_state_dict` returned: the parameters, and the rest into their masters.

    Args:
        model: of any dtypes; float32 entries are rounded to them.
        optimizer: its optimizer, whose masters then hold the float32 values exactly.
        state_dict: names to tensors.
        strict: as in `torch.nn.Module.load_state_dict`, whose errors it raises.

    Raises:
        TypeError: the arguments are not a module and a `BNGD`.
        ValueError: no parameter of the model is the optimizer's.
    """
    check_pair(model, optimizer)
    model.load_state_dict(dict(state_dict), strict=strict)
    for name, param, dtype in _with_masters(model, optimizer):
        value = state_dict.get(name)
        if value is None:
            continue
        part = local(param)
        if is_sharded(param):
            from .sharding.placements import local_value

            value = local_value(value, param)
        entry = optimizer.state[param]
        if master_key(param) not in entry:
            (made,) = zeros_like([part], [dtype])
            entry[master_key(param)] = as_state(param, made)
        store_(part, local(entry[master_key(param)]), value.to(part.device), None)


def _with_masters(model: nn.Module, optimizer: BNGD) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Names of the parameters whose options ask for a master, and its dtype."""
    options = {param: Options.of(group) for group in optimizer.param_groups
               for param in group["params"]}  # fmt: skip
    for name, param in model.named_parameters(remove_duplicate=False):
        one = options.get(param)
        dtype = None if one is None else master_dtype(param, one.master_weights)
        if dtype is not None:
            yield name, param, dtype

"""Options that are not BNGD's: refused by name, with what to write in their place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from .options import Options

# of these every optimizer of torch has one in its groups, and BNGD has none
FOREIGN = {
    "amsgrad": "leave it out: there is no second moment",
    "betas": "write momentum=betas[0]; there is no second moment",
    "capturable": "leave it out: steps can be captured in CUDA graphs as they are",
    "dampening": "leave it out: a gradient enters momentum with weight 1 - momentum",
    "differentiable": "leave it out: a step is not differentiable",
    "foreach": "leave it out: all parameters are stepped together",
    "max_iter": "leave it out: `step` makes one step",
    "ns_steps": "leave it out: nothing is orthogonalised",
}
OWN = tuple(field.name for field in fields(Options))
# a name with one letter too few in eight is above it
ALIKE = 0.85


def meant(name: str) -> str | None:
    """The option that a name is nearly; None for one that is nothing like an option."""
    plain = name.lower()
    if plain in OWN:
        return plain if plain != name else None
    option = next(iter(difflib.get_close_matches(plain, OWN, 1, ALIKE)), None)
    # a word more makes another name, such as `max_weight_decay` of a schedule; a letter does not
    before, found, after = f"_{plain}_".partition(f"_{option}_")
    return None if found and (before + after).strip("_") else option


def check_own(group: Mapping[str, Any], index: int, whole: Mapping[str, Any]) -> None:
    """Refuse a group with options that no step would follow.

    Args:
        group: as it was given.
        index: its place.
        whole: options of the optimizer, not of its groups.

    Raises:
        ValueError: another optimizer's, or nearly one of ours; names them, and the way out.
    """
    foreign = sorted(FOREIGN.keys() & group.keys())
    if foreign:
        raise ValueError(
            f"param_groups[{index}] has options of another optimizer: {', '.join(foreign)}; BNGD "
            "would not follow them, and its lr is in other units. Give parameters and options of "
            'its own: BNGD([{"params": group["params"], "lr": ...} for group in param_groups])'
        )
    for name, value in whole.items():
        # wrappers such as ZeroRedundancyOptimizer repeat the constructor's in each group
        if name in group and group[name] is not value:
            raise ValueError(
                f"{name} is an option of the whole optimizer, not of a group; "
                f"use BNGD(params, {name}={group[name]!r})"
            )
    for name in group:
        if name not in OWN and (option := meant(name)) is not None:
            raise ValueError(
                f"param_groups[{index}] has the key {name!r}, which BNGD would not follow: write "
                f"{option!r} if the option is meant, or choose a name that is less alike"
            )


def refuse_arguments(
    surplus: Iterable[Any], named: Iterable[str], choices: Mapping[str, Any]
) -> None:
    """Refuse what the constructor does not take.

    Args:
        surplus: arguments by position after `momentum`.
        named: keywords that are no option.
        choices: what must be None, True or False.

    Raises:
        TypeError: arguments that are not taken; says what to write.
        ValueError: another choice.
    """
    for value in surplus:
        raise TypeError(
            f"BNGD takes params, lr and momentum by position, got also {value!r}; write options by "
            "their names, such as weight_decay=0.01"
        )
    for name in named:
        option = meant(name)
        hint = FOREIGN.get(name) or (f"did you mean {option}?" if option else None)
        raise TypeError(f"BNGD has no option {name}; {hint or 'it has ' + ', '.join(OWN)}")
    for name, value in choices.items():
        if value not in (None, True, False):
            raise ValueError(f"{name} must be None, True or False, got {value!r}")

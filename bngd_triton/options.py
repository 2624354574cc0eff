"""The options of a step, refused by name and bound where the definition does not cover them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import is_, itemgetter
from typing import Any, Literal, TypedDict, TypeGuard, get_args

import torch
from torch import Tensor

Granularity = Literal["tensor", "row", "global"]
Normalizer = Literal["zscore", "cdf"]
Nonfinite = Literal["skip", "propagate", "raise"]
MasterWeights = Literal["split", "stochastic"]
GRANULARITIES = get_args(Granularity)
NORMALIZERS = get_args(Normalizer)
NONFINITE = get_args(Nonfinite)
MASTER_WEIGHTS = (*get_args(MasterWeights), None)


@dataclass(frozen=True)
class Options:
    """The options of one step, as one parameter group holds them.

    Every field but ``lr`` is a plain Python value; ``lr`` may be a 0-dim tensor, whose value is
    checked only where reading it costs no synchronisation.
    """

    lr: float | Tensor = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    eps: float = 1e-8
    granularity: Granularity = "row"
    normalizer: Normalizer = "zscore"
    centering: float = 1.0
    center_1d: bool = False
    nonfinite: Nonfinite = "skip"
    maximize: bool = False
    master_weights: MasterWeights | None = "split"
    momentum_dtype: torch.dtype | None = None
    accumulation_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what the definition does not cover."""
        if isinstance(self.lr, Tensor):
            if self.lr.numel() != 1 or self.lr.dim() != 0 or not self.lr.is_floating_point():
                raise ValueError(
                    "lr must be a number or a 0-dim floating point tensor, got a tensor of "
                    f"shape {tuple(self.lr.shape)} and dtype {self.lr.dtype}"
                )
            if self.lr.device.type == "cpu":
                _bounded("lr", float(self.lr), 0.0)
        else:
            self._set("lr", _bounded("lr", self.lr, 0.0))
        self._set("momentum", _bounded("momentum", self.momentum, 0.0, 1.0, open_above=True))
        self._set("weight_decay", _bounded("weight_decay", self.weight_decay, 0.0))
        self._set("eps", _bounded("eps", self.eps, 0.0))
        self._set("centering", _bounded("centering", self.centering, 0.0, 1.0))
        for name in ("nesterov", "center_1d", "maximize"):
            _flag(name, getattr(self, name))
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("normalizer", self.normalizer, NORMALIZERS)
        _one_of("nonfinite", self.nonfinite, NONFINITE)
        _one_of("master_weights", self.master_weights, MASTER_WEIGHTS)
        _one_of("momentum_dtype", self.momentum_dtype, (None, torch.float32, torch.bfloat16))
        self._set("accumulation_steps", _count("accumulation_steps", self.accumulation_steps, 1))
        self._set("seed", _count("seed", self.seed, 0))
        self._check_decay()
        if self.nesterov and not self.momentum > 0:
            raise ValueError(f"nesterov needs momentum > 0, got momentum={self.momentum}")
        if self.nesterov and self.accumulation_steps > 1:
            raise ValueError(
                "nesterov needs accumulation_steps=1, since it looks ahead of a whole step; got "
                f"accumulation_steps={self.accumulation_steps}"
            )

    def _check_decay(self) -> None:
        """Where the factor of the parameters is read without waiting for a device."""
        if not self.weight_decay or on_a_device(self.lr):
            return
        lr, decay = float(self.lr), self.weight_decay
        if lr * decay >= 1:
            raise ValueError(
                "lr * weight_decay must be < 1, since a step multiplies parameters by 1 - lr * "
                f"weight_decay; got lr={lr:g} and weight_decay={decay:g}"
            )

    def _set(self, name: str, value: float | int) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, group: dict[str, Any]) -> Options:
        """The options of a parameter group; keys that are not ours are left alone."""
        return cls(**{f.name: group[f.name] for f in fields(cls)})

    def at_rate(self, lr: float) -> Options:
        """These options with another learning rate; nothing else is checked again."""
        made = object.__new__(Options)
        made.__dict__.update(self.__dict__)
        made._set("lr", _bounded("lr", lr, 0.0))
        made._check_decay()
        return made

    def centres(self, ndim: int) -> bool:
        """Whether tensors of `ndim` dimensions are centred; vectors are not unless asked."""
        return ndim >= 2 or self.center_1d or self.granularity == "global"

    @cached_property
    def layout(self) -> dict[str, Any]:
        """What is not in the kernels' table: how a step is laid out, and its clock's seed."""
        return {
            "granularity": self.granularity,
            "center_1d": self.center_1d,
            # whether there are buffers, and windows
            "momentum": self.buffered,
            "accumulation_steps": self.accumulation_steps > 1,
            "master_weights": self.master_weights,
            "seed": self.seed,
        }

    @property
    def buffered(self) -> bool:
        """Whether parameters have a momentum buffer; micro-batches meet there."""
        return self.momentum > 0 or self.accumulation_steps > 1

    @property
    def fresh(self) -> float:
        """Weight of a new ``ghat`` in the momentum buffer."""
        return (1 - self.momentum) / self.accumulation_steps


class StepOptions(TypedDict, total=False):
    """What the functional steps take of the options besides `lr`; see `bngd_triton.BNGD`."""

    momentum: float
    nesterov: bool
    weight_decay: float
    eps: float
    granularity: Granularity
    normalizer: Normalizer
    centering: float
    center_1d: bool
    nonfinite: Nonfinite
    maximize: bool
    accumulation_steps: int


def functional_options(lr: float | Tensor, rounding_key: int | None, given: StepOptions) -> Options:
    """The options of a functional step, which rounds stochastically if it has a key.

    Raises:
        TypeError: an option is unknown, or not one of a functional step.
    """
    unknown = sorted(given.keys() - StepOptions.__annotations__.keys())
    if unknown:
        raise TypeError(
            f"a functional step has no option {', '.join(unknown)}; it takes "
            f"{', '.join(StepOptions.__annotations__)}"
        )
    master_weights: MasterWeights | None = None if rounding_key is None else "stochastic"
    return Options(lr=lr, master_weights=master_weights, **given)


_RATE = itemgetter("lr")
_REST = itemgetter(*(field.name for field in fields(Options) if field.name != "lr"))


class OptionsReader:
    """Reads groups' options over and over, and checks only what changed: mostly the rate.

    Attributes:
        options: of each group, as last read.
        by_value: some `lr` is a tensor or an array, whose value may change in place.
    """

    def __init__(self) -> None:
        self.options: list[Options] = []
        self.by_value = False
        self._rates: list[Any] = []
        self._rest: list[tuple[Any, ...]] = []

    def read(self, groups: Sequence[dict[str, Any]]) -> list[Options]:
        """The options of every group.

        Returns:
            The same object for a group in which nothing changed.

        Raises:
            ValueError: an option is out of bounds.
            TypeError: an option is of another type.
        """
        rates, rest = list(map(_RATE, groups)), list(map(_REST, groups))
        if len(rates) == len(self._rates):
            now = zip(groups, rates, rest, self._rates, self._rest, self.options)
            options = [_follow(*one) for one in now]
        else:
            options = [Options.of(group) for group in groups]
        self.options, self._rates, self._rest = options, rates, rest
        self.by_value = any(map(_is_array, rates))
        return options


def on_a_device(lr: float | Tensor) -> TypeGuard[Tensor]:
    """Whether reading a learning rate would wait for a device."""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _is_array(rate: Any) -> bool:
    """Whether a rate may change in place: a tensor, or an array of NumPy's."""
    return type(rate) is not float and hasattr(rate, "shape")


def _follow(
    group: dict[str, Any],
    rate: Any,
    rest: tuple[Any, ...],
    old_rate: Any,
    old_rest: tuple[Any, ...],
    old: Options,
) -> Options:
    # the same objects: True equals 1.0, but is refused
    if _is_array(rate) or not all(map(is_, rest, old_rest)):
        return Options.of(group)
    return old if rate is old_rate else old.at_rate(rate)


def _bounded(
    name: str, value: Any, low: float, high: float = math.inf, *, open_above: bool = False
) -> float:
    """`value` as a Python float: a NumPy scalar would do the products in its own precision."""
    # most are; the rest of this takes 1 us. NaN and inf go on
    if type(value) is float and low <= value < high:
        return value
    if getattr(value, "shape", None) == () and not isinstance(value, Tensor):
        # a 0-dim array of NumPy's
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    above = number >= high if open_above else number > high
    if not math.isfinite(number) or number < low or above:
        bound = f">= {low:g}"
        if math.isfinite(high):
            bound += f" and {'<' if open_above else '<='} {high:g}"
        elif not math.isfinite(number):
            bound += " and finite"
        raise ValueError(f"{name} must be {bound}, got {value}")
    return number


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= int(value) < 2**31:
        raise ValueError(f"{name} must be >= {least} and < 2**31, got {value}")
    return int(value)


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, numbers.Integral)) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

"""What `bngd verify` steps: cases named by their parts, their tensors and their gradients."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

LR = 1e-2
STEPS = 3
_HALF, _BRAIN, _SINGLE = torch.float16, torch.bfloat16, torch.float32

_GRADIENTS = (
    "normal", "steep", "exploding", "vanishing", "constant", "zeros", "spike", "exact", "inf",
    "nan",
)  # fmt: skip

# the parts of a name: of each factor the first value is the default, which names leave out
FACTORS: dict[str, dict[str, Any]] = {
    # of parameters, then of gradients where these differ
    "storage": {
        "f32": (_SINGLE, _SINGLE),
        "bf16": (_BRAIN, _BRAIN),
        "f16": (_HALF, _HALF),
        "bf16/f32": (_BRAIN, _SINGLE),
        "f32/bf16": (_SINGLE, _BRAIN),
    },
    "granularity": {value: {"granularity": value} for value in ("tensor", "row", "global")},
    "centring": {
        "centred": {},
        "rms": {"centering": 0.0},
        "partial": {"centering": 0.3},
        "center-1d": {"center_1d": True},
    },
    "momentum": {"momentum": {}, "no-momentum": {"momentum": 0.0}, "nesterov": {"nesterov": True}},
    "decay": {"no-decay": {}, "decay": {"weight_decay": 0.1}},
    "eps": {"eps1e-8": {}, "eps0": {"eps": 0.0}, "eps0.1": {"eps": 0.1}},
    "normalizer": {"zscore": {}, "cdf": {"normalizer": "cdf"}},
    "direction": {"minimize": {}, "maximize": {"maximize": True}},
    "masters": {
        "split": {},
        "stochastic": {"master_weights": "stochastic"},
        "nearest": {"master_weights": None},
    },
    "buffers": {"m32": {}, "m16": {"momentum_dtype": _BRAIN}},
    "nonfinite": {"skip": {}, "propagate": {"nonfinite": "propagate"}},
    "gradients": dict.fromkeys(_GRADIENTS),
    "tensors": dict.fromkeys(("tiny", "borders", "layouts", "large")),
}
_FACTOR_OF = {value: factor for factor, values in FACTORS.items() for value in values}
_STEPPED = [n for n in FACTORS if n not in ("storage", "gradients", "tensors")]

# every value in a dozen cases: what `--quick` runs, and every other run first. With an eps,
# vanishing gradients do not move anything: they come with eps0, and eps0.1 with normal ones.
QUICK = (
    "row,borders",
    "row,decay,steep",
    "bf16,nesterov,decay,cdf,eps0,vanishing,layouts",
    "f16,global,eps0,spike",
    "bf16/f32,row,m16,stochastic,inf,decay",
    "f32/bf16,partial,maximize,large",
    "row,rms,no-momentum,eps0,exploding",
    "bf16,row,nearest,decay,exact",
    "global,eps0.1,center-1d,layouts",
    "bf16,nearest,propagate,nan",
    "f16,row,constant,layouts",
    "decay,nesterov,zeros",
)


@dataclass(frozen=True)
class Case:
    """One combination of the values of `FACTORS`; its name says which.

    Attributes:
        values: of every factor, by the factor's name.
    """

    values: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, values: dict[str, str]) -> Case:
        """The case of these values, and the defaults of other factors."""
        return cls(tuple((name, values.get(name, next(iter(FACTORS[name])))) for name in FACTORS))

    @classmethod
    def named(cls, name: str) -> Case:
        """The case of a name: values of factors, in any order, joined by commas.

        Raises:
            ValueError: there is no such value, or two of one factor.
        """
        found: dict[str, str] = {}
        parts = [part.strip() for part in name.split(",")]
        for value in parts if parts != ["defaults"] else []:
            if value not in _FACTOR_OF:
                close = difflib.get_close_matches(value, _FACTOR_OF)
                known = "; ".join(f"{f}: {', '.join(FACTORS[f])}" for f in FACTORS)
                way_out = f"did you mean {' or '.join(close)}?" if close else f"parts are {known}"
                raise ValueError(f"a case has no part {value!r}, in {name!r}; {way_out}")
            factor = _FACTOR_OF[value]
            if factor in found:
                raise ValueError(
                    f"{name!r} names two values of {factor}, {found[factor]} and {value}; keep one"
                )
            found[factor] = value
        return cls.of(found)

    @property
    def name(self) -> str:
        """The values other than defaults, or "defaults"."""
        parts = [value for factor, value in self.values if value != next(iter(FACTORS[factor]))]
        return ",".join(parts) or "defaults"

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of parameters and of gradients."""
        param, grad = FACTORS["storage"][self["storage"]]
        return param, grad

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `BNGD`."""
        found: dict[str, Any] = {"lr": LR}
        for factor in _STEPPED:
            found |= FACTORS[factor][self[factor]]
        return found

    @property
    def rule(self) -> dict[str, Any]:
        """`options` but for how masters and momentum are stored."""
        stored = ("master_weights", "momentum_dtype")
        return {name: value for name, value in self.options.items() if name not in stored}

    @property
    def stochastic(self) -> bool:
        """Whether parameters are rounded at random."""
        return self.options.get("master_weights") == "stochastic"

    @property
    def promises_bits(self) -> bool:
        """Whether kernels and reference must agree in every bit.

        They do where their statistics do, which are exact in any order of summation: of equal
        entries, and of few whose mean is one of them. Their ``erf`` may differ.
        """
        if self["gradients"] == "exact":
            return self["tensors"] in ("tiny", "layouts") and self["normalizer"] != "cdf"
        return self["gradients"] in ("constant", "zeros")

    @property
    def unscaled(self) -> Case | None:
        """The case that must end with the same bits: its gradients differ by a power of two.

        None where there is no such promise: with an eps, and for float16, which rounds the product.
        """
        scaled = self["gradients"] in ("exploding", "vanishing")
        if not scaled or self["eps"] != "eps0" or self.dtypes[1] is torch.float16:
            return None
        return Case.of({**dict(self.values), "gradients": "normal"})

    def __getitem__(self, factor: str) -> str:
        return dict(self.values)[factor]


def suite(strength: int) -> list[Case]:
    """The cases of `QUICK`, then those in which any so many values of factors meet.

    Args:
        strength: 0 for those of `QUICK` alone.
    """
    quick = [Case.named(name) for name in QUICK]
    return quick + covering(strength, quick) if strength else quick


def covering(strength: int, given: Sequence[Case]) -> list[Case]:
    """Few cases in which, with those given, every combination of `strength` values occurs.

    Greedy: a case starts with a combination that is missing and takes, factor by factor, the value
    that adds most.
    """
    # in order, so that the cases are the same everywhere
    missing = dict.fromkeys(
        tuple(zip(factors, values))
        for factors in itertools.combinations(FACTORS, strength)
        for values in itertools.product(*(FACTORS[factor] for factor in factors))
    )

    def fresh(values: dict[str, str]) -> list[Any]:
        """The missing combinations that occur among the values of factors."""
        ordered = [(name, values[name]) for name in FACTORS if name in values]
        return [one for one in itertools.combinations(ordered, strength) if one in missing]

    found: list[Case] = []
    for case in given:
        for combination in fresh(dict(case.values)):
            del missing[combination]
    while missing:
        chosen = dict(next(iter(missing)))
        for factor, values in FACTORS.items():
            if factor not in chosen:
                chosen[factor] = max(values, key=lambda one: len(fresh({**chosen, factor: one})))
        found.append(Case.of(chosen))
        for combination in fresh(chosen):
            del missing[combination]
    return found

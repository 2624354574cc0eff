"""What a step accepts: its options and its tensors, refused by name before anything changes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

GRANULARITIES = ("tensor", "row", "global")
NORMALIZERS = ("zscore", "cdf")
NONFINITE = ("skip", "propagate", "raise")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    granularity: str = "tensor"
    normalizer: str = "zscore"
    centering: float = 1.0
    center_1d: bool = False
    nonfinite: str = "skip"
    maximize: bool = False

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
        if self.nesterov and not self.momentum > 0:
            raise ValueError(f"nesterov needs momentum > 0, got momentum={self.momentum}")

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, group: dict[str, Any]) -> Options:
        """The options of a parameter group; keys that are not ours are left alone."""
        return cls(**{f.name: group[f.name] for f in fields(cls)})

    def centres(self, ndim: int) -> bool:
        """Whether tensors of `ndim` dimensions are centred; vectors are not unless asked."""
        return ndim >= 2 or self.center_1d or self.granularity == "global"


def _bounded(
    name: str, value: Any, low: float, high: float = math.inf, *, open_above: bool = False
) -> float:
    """`value` as a Python float: a NumPy scalar would do the products in its own precision."""
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


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, numbers.Integral)) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_float(what: str, tensor: Tensor) -> None:
    """Refuse a tensor whose kind the definition does not cover.

    Raises:
        TypeError: sparse, complex, integer or 8-bit float; the message starts with `what`.
        NotImplementedError: a sharded tensor, or a device without float64.
    """
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{what} is {tensor.layout}; BNGD needs dense tensors "
            "(an Embedding with sparse=False gives dense gradients)"
        )
    if tensor.is_complex():
        raise TypeError(
            f"{what} has dtype {tensor.dtype}; BNGD does not define complex statistics "
            "(optimise torch.view_as_real(parameter) instead)"
        )
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{what} has dtype {tensor.dtype}; BNGD takes {allowed}")
    if tensor.device.type == "mps":
        raise NotImplementedError(
            f"{what} is on {tensor.device}, which has no float64 for the statistics; "
            "keep the model on the CPU"
        )
    if hasattr(tensor, "placements"):
        raise NotImplementedError(
            f"{what} is sharded (DTensor): statistics of a local shard would be wrong, and those "
            "of the whole tensor are not supported yet; use whole (DDP) parameters"
        )


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse what a step cannot write to.

    Raises:
        TypeError: as `check_float`.
        NotImplementedError: as `check_float`.
        ValueError: entries share memory.
    """
    check_float(name, param)
    if overlaps(param):
        raise ValueError(
            f"{name} overlaps itself in memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}); a step cannot write to it: use .clone() or .contiguous()"
        )


def check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    momentum: float,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse lists that do not belong together.

    Args:
        params: n tensors, written in place.
        grads: n tensors of the same shapes and devices; the dtypes may differ.
        momentum_buffers: n tensors of the same shapes, or None when `momentum` is 0.
        momentum: the option of that name.
        names: what to call the parameters in an error.

    Raises:
        ValueError: lengths, shapes or devices differ, or a buffer is missing.
        TypeError: a tensor is not dense and of a supported float dtype.
    """
    if len(params) != len(grads):
        raise ValueError(f"got {len(params)} params but {len(grads)} grads")
    if momentum and momentum_buffers is None:
        raise ValueError(f"momentum={momentum} needs momentum_buffers, got None")
    if momentum and momentum_buffers is not None and len(momentum_buffers) != len(params):
        raise ValueError(f"got {len(params)} params but {len(momentum_buffers)} momentum_buffers")
    for i, (param, grad) in enumerate(zip(params, grads)):
        name = names[i] if names else f"params[{i}]"
        check_parameter(name, param)
        check_float(f"the gradient of {name}", grad)
        others = [("gradient", grad)]
        if momentum and momentum_buffers is not None:
            check_float(f"the momentum buffer of {name}", momentum_buffers[i])
            others.append(("momentum buffer", momentum_buffers[i]))
        for kind, other in others:
            if other.shape != param.shape:
                raise ValueError(
                    f"the {kind} of {name} has shape {tuple(other.shape)}, "
                    f"the parameter {tuple(param.shape)}"
                )
            if other.device != param.device:
                raise ValueError(
                    f"the {kind} of {name} is on {other.device}, the parameter on {param.device}"
                )


def buffers_of(
    momentum_buffers: Sequence[Tensor] | None, params: Sequence[Tensor], options: Options
) -> Sequence[Tensor | None]:
    """The buffers that a step uses: one for each parameter, None without momentum."""
    if not options.momentum or momentum_buffers is None:
        return [None] * len(params)
    return momentum_buffers


def overlaps(tensor: Tensor) -> bool:
    """Whether two indices of `tensor` may share memory.

    No two do if each stride steps over all that the smaller strides span.
    """
    if tensor.is_contiguous():
        return False
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= span:
            return True
        span += stride * (size - 1)
    return False


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    options: Options,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse what only this combination of options and tensors rules out.

    Raises:
        ValueError: ``granularity="global"`` with parameters on several devices.
        FloatingPointError: ``nonfinite="raise"`` and a gradient with an inf or a NaN; this
            reads every gradient and synchronises.
    """
    if options.granularity == "global":
        devices = sorted({str(param.device) for param in params})
        if len(devices) > 1:
            raise ValueError(
                "granularity='global' needs all parameters of a group on one device, "
                f"got {', '.join(devices)}: make one group per device"
            )
    if options.nonfinite == "raise":
        finite = [torch.isfinite(grad).all() for grad in grads]
        for i, flag in enumerate(finite):
            if not flag:
                name = names[i] if names else f"params[{i}]"
                raise FloatingPointError(
                    f"the gradient of {name} has an inf or a NaN; nothing was changed "
                    "(nonfinite='skip' leaves such slices as they are)"
                )

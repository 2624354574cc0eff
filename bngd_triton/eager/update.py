"""Normalise and update: the elementwise half of the definition, on one block of a matrix.

    ghat  = ((g * up * more) - high - low) * inverse
    m     = momentum * m + (1 - momentum) * ghat
    u     = momentum * m + (1 - momentum) * ghat if nesterov else m
    theta = (1 - lr * weight_decay) * theta - lr * u

The eager twin of ``kernels/device/update.py``: the same operations in the same order, each rounded
once. A row of a block belongs to one slice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from .factors import Factors
from .rounding import store_, widen
from .scratch import Scratch


class Block(NamedTuple):
    """What is updated at a time: [rows, columns]; all but `grad` are written.

    Attributes:
        grad: None closes a window of micro-batches without one more.
        param: the parameters.
        momentum: None where the group has no buffer.
        master: see `records.StepTensor`.
    """

    grad: Tensor | None
    param: Tensor
    momentum: Tensor | None
    master: Tensor | None


class Constants(NamedTuple):
    """A group's options as tensors without dimensions, in the dtype of the arithmetic.

    torch takes 1.9 us for a small operation with a number, 0.8 us with a tensor.
    """

    lr: Tensor
    decay: Tensor
    momentum: Tensor
    fresh: Tensor

    @classmethod
    def of(cls, options: Options, dtype: torch.dtype) -> Constants:
        """Products and differences are rounded once, here."""
        lr, rest = options.lr, (options.momentum, options.fresh)
        if not isinstance(lr, Tensor):
            # tensors on the CPU are numbers to every device
            numbers = (lr, 1 - lr * options.weight_decay, *rest)
            return cls(*torch.tensor(numbers, dtype=dtype, device="cpu").unbind())
        decay = 1 - lr.double() * options.weight_decay
        others = torch.tensor(rest, dtype=dtype, device="cpu").unbind()
        return cls(lr.double().to(dtype), decay.to(dtype), *others)


def update_(
    block: Block,
    factors: Factors,
    constants: Constants,
    options: Options,
    *,
    closing: bool,
    hashed: Tensor | None,
    scratch: Scratch,
) -> None:
    """One block: the last four lines of the definition.

    Args:
        block: what is updated.
        factors: of its rows.
        constants: the group's options, in the dtype of the factors.
        options: the group's.
        closing: whether this is the last micro-batch of a window; the others move no parameter.
        hashed: random bits for each entry, for stochastic rounding.
        scratch: room for temporaries.
    """
    dtype = factors.inverse.dtype
    param, buffer = block.param, block.momentum
    valid, moves = factors.valid, factors.moves
    # normalise
    if block.grad is None:
        ghat = torch.zeros_like(param, dtype=dtype)
    else:
        ghat = normalize(block.grad, factors, options, scratch)
        if valid is not None and options.accumulation_steps > 1:
            ghat = torch.where(valid, ghat, 0.0)
    # momentum
    update = ghat
    if buffer is not None:
        new = ghat.mul_(constants.fresh)
        stored = moves if closing else valid
        in_place = stored is None and buffer.dtype is dtype
        moved = buffer if in_place else scratch.copy("momentum", buffer, dtype)
        moved = moved.mul_(constants.momentum if factors.beta is None else factors.beta).add_(new)
        update = moved * constants.momentum + new if options.nesterov else moved
        if not in_place:
            buffer.copy_(moved if stored is None else torch.where(stored, moved, buffer.to(dtype)))
    if not closing:
        return
    # update
    room = scratch.like("step", param, dtype)
    step = torch.mul(update, constants.lr, out=room)
    if moves is None and block.master is None and hashed is None and param.dtype is dtype:
        if options.weight_decay:
            param.mul_(constants.decay)
        param.sub_(step)
        return
    old = widen(param, block.master)
    target = (old.to(dtype) * constants.decay).sub_(step)
    # store
    kept = target if moves is None else torch.where(moves, target, old.to(dtype))
    store_(param, block.master, kept, hashed)


def normalize(
    grad: Tensor, factors: Factors, options: Options, scratch: Scratch | None = None
) -> Tensor:
    """``ghat`` of a block, in the arithmetic dtype.

    Args:
        grad: [rows, columns].
        factors: of its rows.
        options: the group's.
        scratch: room for the result; None makes a new tensor.
    """
    dtype = factors.inverse.dtype
    room = scratch.like("ghat", grad, dtype) if scratch else None
    if grad.dtype is dtype:
        ghat = torch.mul(grad, factors.up, out=room)
    else:
        wide = grad.to(dtype) if room is None else room.copy_(grad)
        ghat = wide.mul_(factors.up)
    if factors.more is not None:
        ghat = ghat.mul_(factors.more)
    ghat = ghat.sub_(factors.high).sub_(factors.low).mul_(factors.inverse)
    if options.normalizer == "cdf":
        # slices without spread keep their plain quotient
        ghat = torch.where(factors.uniform, ghat, bounded(ghat))
    return ghat


def bounded(ghat: Tensor) -> Tensor:
    """``sqrt(3) * (2 * Phi(ghat) - 1)``, by 2 * Phi(x) - 1 = erf(x / sqrt(2))."""
    return torch.erf(ghat * math.sqrt(0.5)) * math.sqrt(3.0)

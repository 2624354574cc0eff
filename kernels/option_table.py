"""A group's options as the kernels read them: a row of a float64 table."""

from __future__ import annotations

import struct
from typing import TypeGuard

import torch
from torch import Tensor

from ..options import Options

# of a row; which is which is in update.py, which imports Triton
COLUMNS = 16
_WEIGHT_DECAY = 12
_FLOAT32 = struct.Struct("4f")


def encode(options: Options, closing: bool = True) -> list[float]:
    """An option table's row; products and differences are rounded to float32 once, here.

    An `lr` on a device is left to `write_rates`, so that its value need not be read.
    """
    lr = 0.0 if on_a_device(options.lr) else float(options.lr)
    exact = (lr, 1 - lr * options.weight_decay, options.momentum, options.fresh)
    row = [*_FLOAT32.unpack(_FLOAT32.pack(*exact))]
    row += [options.eps, options.centering, -1.0 if options.maximize else 1.0]
    row += [options.nesterov, options.normalizer == "cdf", options.nonfinite == "propagate"]
    row += [options.buffered, closing, options.weight_decay]
    return row + [0.0] * (COLUMNS - len(row))


def on_a_device(lr: float | Tensor) -> TypeGuard[Tensor]:
    """Whether reading a learning rate would wait for a device."""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def write_rates(table: Tensor, row: int, options: Options) -> None:
    """Fill in the columns that depend on an `lr` on a device, there."""
    if on_a_device(options.lr):
        lr = options.lr.detach().to(table.device, torch.float64)
        table[row, 0] = lr.float()
        # the decay from the table too: a graph that holds this follows it
        table[row, 1] = (1 - lr * table[row, _WEIGHT_DECAY]).float()

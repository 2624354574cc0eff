"""Learning rates that are tensors on a device, brought to the table of options by one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import on_device
from .build_plan import INT64, address
from .launch import rates_launch
from .launcher import Launch
from .plan import upload
from .tables import RATE_ADDRESS, RATE_COLUMNS, RATE_DTYPE

# that the kernel reads where they are; others are copied to float64 in every step
RATE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Rates:
    """Learning rates on devices, written to a table of options by one launch.

    Args:
        table: float64 [groups, OPTION_COLUMNS], on the device of the step.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        # read by address: kept alive; None where the table has a group's rate as it is
        self._given: list[Tensor | None] = [None] * len(table)
        self._where = list(map(_where, self._given))
        # those that are read through a copy, beside it
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._addresses: Tensor | None = None
        self._launch: Launch | None = None

    def are(self, given: Sequence[Tensor | None]) -> bool:
        """Whether these tensors lie where those lay that the kernel was last pointed at."""
        return self._where == list(map(_where, given))

    def point_at(self, given: Sequence[Tensor | None]) -> None:
        """Read these from now on; a graph that was captured before does, too."""
        device = self._table.device
        self._copies, table = [], []
        for lr in given:
            if lr is not None and (lr.device != device or lr.dtype not in RATE_DTYPES):
                copy = torch.empty((), dtype=torch.float64, device=device)
                self._copies.append((copy, lr.detach()))
                lr = copy
            row = [0] * RATE_COLUMNS
            if lr is not None:
                row[RATE_ADDRESS], row[RATE_DTYPE] = address(lr), RATE_DTYPES.index(lr.dtype)
            table.append(row)
        if self._addresses is None:
            shape = (len(given), RATE_COLUMNS)
            self._addresses = torch.empty(shape, dtype=torch.int64, device=device)
            self._launch = rates_launch(self._addresses, self._table)
        upload(self._addresses, torch.tensor(table, **INT64))
        self._given, self._where = list(given), list(map(_where, given))

    def write(self) -> None:
        """Fill in the columns that depend on them, in stream order."""
        if self._launch is None or not any(self._where):
            return
        for copy, lr in self._copies:
            copy.copy_(lr)
        with on_device(self._table.device):
            self._launch(None)


def _where(lr: Tensor | None) -> object:
    return None if lr is None else (lr.data_ptr(), lr.dtype, lr.device)
